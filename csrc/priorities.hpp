// Proportional prioritized replay (Schaul et al. 2016, https://arxiv.org/abs/1511.05952, section 3.3). This file knows
// no Python.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "sum_tree.hpp"

namespace pydqn {

// Each place holds p^alpha of the transition that starts there, or zero. A place is drawn in proportion to that.
class Priorities {
 public:
  Priorities(std::int64_t places, double alpha) : alpha_(alpha), places_(places), tree_(places) {}

  // A new transition gets the largest priority so far, so that it is soon seen once; the first ones get 1.
  void enter(std::int64_t place) { tree_.set(place, largest_); }
  void leave(std::int64_t place) { tree_.set(place, 0.0); }

  // `priority` is positive and at most the largest float.
  void update(std::int64_t place, double priority) {
    const double value = power(priority, alpha_);
    tree_.set(place, value);
    largest_ = std::max(largest_, value);
    most_ = std::max(most_, priority);
  }

  // Changes the exponent, also of what is held: but not away from 0, which has made all priorities 1.
  void set_alpha(double alpha) {
    if (alpha == alpha_) return;
    if (alpha_ > 0.0) {
      for (std::int64_t place = 0; place < places_; ++place) {
        const double value = tree_[place];
        if (value > 0.0) tree_.set(place, power(value, alpha / alpha_));
      }
    }
    alpha_ = alpha;
    largest_ = power(most_, alpha);
  }

  // The place at `fraction` (from 0, below 1) of all priorities laid end to end. At least one is positive.
  std::int64_t find(double fraction) const { return tree_.find(fraction * tree_.total()); }

  // Weights (N P(i))^-beta that undo the bias of drawing so, over the largest of them. Since total and N are the same
  // for all, they cancel: the largest weight belongs to the smallest priority.
  void weigh(const std::int64_t* places, std::int64_t count, double beta, float* weight) const {
    double least = tree_[places[0]];
    for (std::int64_t i = 1; i < count; ++i) least = std::min(least, tree_[places[i]]);
    for (std::int64_t i = 0; i < count; ++i)
      weight[i] = static_cast<float>(std::pow(least / tree_[places[i]], beta));
  }

  // p^alpha of a place, and of the largest priority so far: to be saved and restored.
  double value(std::int64_t place) const { return tree_[place]; }
  void set_value(std::int64_t place, double value) { tree_.set(place, value); }
  double largest() const { return largest_; }
  void set_largest(double value) {
    largest_ = value;
    most_ = alpha_ > 0.0 ? std::pow(value, 1.0 / alpha_) : 1.0;
  }

  void prefetch(std::int64_t place) const { tree_.prefetch(place); }
  std::size_t bytes() const { return tree_.bytes(); }

 private:
  // Kept positive: a place of zero would never be drawn again.
  static double power(double value, double exponent) {
    return std::max(std::pow(value, exponent), std::numeric_limits<double>::min());
  }

  double alpha_;
  double largest_ = 1.0;  // to the power of alpha
  double most_ = 1.0;     // as it came
  std::int64_t places_;
  SumTree tree_;
};

}  // namespace pydqn
