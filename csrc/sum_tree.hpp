// Sums over many numbers that change one at a time, and search by partial sum.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "lazy_memory.hpp"

namespace pydqn {

// A tree in which each node is the sum of its eight children. Eight doubles fill one cache line, so the path from a
// leaf to the root touches 7 lines for a million leaves; a binary tree would touch 20. A changed node is summed anew
// from its children, never adjusted by a difference, so rounding errors do not accumulate. Unset leaves use no memory.
class SumTree {
 public:
  explicit SumTree(std::int64_t leaves) : memory_(nodes(leaves) * sizeof(double)) {
    auto* level = reinterpret_cast<double*>(memory_.data());
    auto width = static_cast<std::size_t>(leaves);
    do {
      width = (width + kFan - 1) / kFan;
      levels_.push_back(level);
      level += width * kFan;
    } while (width > 1);
  }

  double total() const { return sum(levels_.back()); }
  double operator[](std::int64_t leaf) const { return levels_.front()[leaf]; }

  // `value` must be finite and not negative.
  void set(std::int64_t leaf, double value) {
    auto node = static_cast<std::size_t>(leaf);
    for (double* level : levels_) {
      level[node] = value;
      node /= kFan;
      value = sum(&level[node * kFan]);
    }
  }

  // The first leaf at which the cumulative sum of the leaves exceeds `mass`. Never returns a leaf of value 0, even if
  // rounding puts `mass` at or beyond the total. The total must be positive.
  std::int64_t find(double mass) const {
    std::size_t node = 0;
    for (auto level = levels_.rbegin(); level != levels_.rend(); ++level) {
      const double* children = *level + node * kFan;
      std::size_t chosen = kFan - 1;
      while (chosen > 0 && children[chosen] == 0.0) --chosen;  // the last positive child, if `mass` exceeds the sum
      for (std::size_t i = 0; i < chosen; ++i) {
        if (mass < children[i]) chosen = i;
        else mass -= children[i];
      }
      node = node * kFan + chosen;
    }
    return static_cast<std::int64_t>(node);
  }

  // Loads the leaf's cache line.
  void prefetch(std::int64_t leaf) const {
#if defined(__GNUC__)
    __builtin_prefetch(levels_.front() + leaf);
#else
    (void)leaf;
#endif
  }

  std::size_t bytes() const { return memory_.bytes(); }

 private:
  static constexpr std::size_t kFan = 8;

  // The number of nodes in all levels.
  static std::size_t nodes(std::int64_t leaves) {
    std::size_t total = 0;
    auto width = static_cast<std::size_t>(leaves);
    do {
      width = (width + kFan - 1) / kFan;
      total += width * kFan;
    } while (width > 1);
    return total;
  }

  static double sum(const double* children) {
    return ((children[0] + children[1]) + (children[2] + children[3])) +
           ((children[4] + children[5]) + (children[6] + children[7]));
  }

  LazyMemory memory_;
  std::vector<double*> levels_;  // pointers into memory_; the first level is the leaves, the last the root's children
};

}  // namespace pydqn
