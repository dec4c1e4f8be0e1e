// Proportional prioritized replay (Schaul et al. 2016, https://arxiv.org/abs/1511.05952, section 3.3).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "sum_tree.hpp"

namespace pydqn {

// Each slot holds p^alpha of the transition that starts there, or 0 if none does. A slot is drawn with a probability
// proportional to that value.
class Priorities {
 public:
  Priorities(std::int64_t slots, double alpha) : alpha_(alpha), slots_(slots), tree_(slots) {}

  // A new transition gets the largest priority so far (1 at first), so that it is soon sampled.
  void add(std::int64_t slot) { tree_.set(slot, largest_); }
  void remove(std::int64_t slot) { tree_.set(slot, 0.0); }

  // `priority` must be positive and at most the largest float.
  void update(std::int64_t slot, double priority) {
    const double value = power(priority, alpha_);
    tree_.set(slot, value);
    largest_ = std::max(largest_, value);
    largest_priority_ = std::max(largest_priority_, priority);
  }

  // Changes the exponent, also of the stored values. A change from alpha = 0 leaves these at 1, since p^0 no longer
  // tells what p was.
  void set_alpha(double alpha) {
    if (alpha == alpha_) return;
    if (alpha_ > 0.0) {
      for (std::int64_t slot = 0; slot < slots_; ++slot) {
        const double value = tree_[slot];
        if (value > 0.0) tree_.set(slot, power(value, alpha / alpha_));
      }
    }
    alpha_ = alpha;
    largest_ = power(largest_priority_, alpha);
  }

  // The slot at `fraction` in [0, 1) of the cumulative sum of all values, of which at least one must be positive.
  std::int64_t find(double fraction) const { return tree_.find(fraction * tree_.total()); }

  // Writes the importance weights (N P(i))^-beta, divided by the largest of the batch, where of the draws from N
  // transitions `uniform_share` are uniform. N and the total cancel: the largest weight belongs to the smallest priority.
  void importance_weights(const std::int64_t* slots, std::int64_t count, double beta, double uniform_share,
                          std::int64_t transitions, float* weight) const {
    const double uniform = uniform_share * (tree_.total() / static_cast<double>(transitions));
    const auto chance = [&](std::int64_t slot) { return (1.0 - uniform_share) * tree_[slot] + uniform; };
    double smallest = chance(slots[0]);
    for (std::int64_t i = 1; i < count; ++i) smallest = std::min(smallest, chance(slots[i]));
    for (std::int64_t i = 0; i < count; ++i)
      weight[i] = static_cast<float>(std::pow(smallest / chance(slots[i]), beta));
  }

  // p^alpha of a slot, and of the largest priority so far; both are saved and restored.
  double value(std::int64_t slot) const { return tree_[slot]; }
  void set_value(std::int64_t slot, double value) { tree_.set(slot, value); }
  double largest() const { return largest_; }
  void set_largest(double value) {
    largest_ = value;
    largest_priority_ = alpha_ > 0.0 ? std::pow(value, 1.0 / alpha_) : 1.0;
  }

  void prefetch(std::int64_t slot) const { tree_.prefetch(slot); }
  std::size_t bytes() const { return tree_.bytes(); }

 private:
  // At least the smallest positive double, because a transition of priority 0 would never be sampled again.
  static double power(double value, double exponent) {
    return std::max(std::pow(value, exponent), std::numeric_limits<double>::min());
  }

  double alpha_;
  double largest_ = 1.0;           // largest_priority_^alpha
  double largest_priority_ = 1.0;
  std::int64_t slots_;
  SumTree tree_;
};

}  // namespace pydqn
