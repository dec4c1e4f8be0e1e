// Sums over many numbers that change one at a time, and the search in them. This file knows no Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "lazy_memory.hpp"

namespace pydqn {

// A tree whose every node is the sum of the eight below it: eight doubles are one line of the cache, so a path from the
// root to one of a million leaves touches seven lines, where a binary tree touches twenty. Nodes are summed anew from
// their children whenever one changes, never adjusted by a difference, so the sums depend on the leaves alone and no
// rounding error adds up. Leaves that were never set cost no memory.
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

  // `value` is finite and not negative.
  void set(std::int64_t leaf, double value) {
    auto place = static_cast<std::size_t>(leaf);
    for (double* level : levels_) {
      level[place] = value;
      place /= kFan;
      value = sum(&level[place * kFan]);
    }
  }

  // The leaf in whose share of the total `mass` lies, when all shares are laid end to end; never one of zero, wherever
  // rounding puts `mass`. The total is positive.
  std::int64_t find(double mass) const {
    std::size_t place = 0;
    for (auto level = levels_.rbegin(); level != levels_.rend(); ++level) {
      const double* children = *level + place * kFan;
      std::size_t chosen = kFan - 1;
      while (chosen > 0 && children[chosen] == 0.0) --chosen;  // the last share, if mass lies beyond all of them
      for (std::size_t i = 0; i < chosen; ++i) {
        if (mass < children[i]) chosen = i;
        else mass -= children[i];
      }
      place = place * kFan + chosen;
    }
    return static_cast<std::int64_t>(place);
  }

  // Brings the leaf's line into the cache.
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

  // All levels together.
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
  std::vector<double*> levels_;  // in it, leaves first; the last is the eight below the root
};

}  // namespace pydqn
