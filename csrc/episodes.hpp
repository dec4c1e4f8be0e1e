// Which frames belong together: stacks, and n-step windows, within the episodes of each lane. Knows no Python and takes
// no lock. See rings.hpp for lanes, slots and ticks; every lane counts its own.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "rings.hpp"

namespace pydqn {

enum class Padding { kZero, kFirst };  // what stands for the frames before an episode's first

struct Shape {
  std::int64_t capacity;     // readable frames per lane
  std::int64_t lanes;
  std::int64_t frame_bytes;
  std::int64_t stack;
  std::int64_t n_step;
  double gamma;
  Padding padding;
  std::optional<double> alpha;  // of prioritized sampling
  std::int64_t limit = 0;       // transitions per lane, the newest; 0 for as many as the frames give
};

class Episodes {
 public:
  explicit Episodes(const Shape& shape)
      : shape_(shape),
        rings_(shape.capacity, shape.lanes, shape.frame_bytes),
        ticks_(static_cast<std::size_t>(shape.lanes), 0) {}

  const Rings& rings() const { return rings_; }

  // Frames that a lane has got so far, the oldest of them that is still held, and how many are.
  std::int64_t ticks(std::int64_t lane) const { return ticks_[static_cast<std::size_t>(lane)]; }
  std::int64_t oldest(std::int64_t lane) const { return std::max<std::int64_t>(0, ticks(lane) - shape_.capacity); }
  std::int64_t held(std::int64_t lane) const { return ticks(lane) - oldest(lane); }
  std::int64_t most_ticks() const { return *std::max_element(ticks_.begin(), ticks_.end()); }
  std::int64_t fewest_ticks() const { return *std::min_element(ticks_.begin(), ticks_.end()); }
  std::int64_t most_held() const { return std::min(most_ticks(), shape_.capacity); }
  void set_ticks(const std::vector<std::int64_t>& ticks) { ticks_ = ticks; }

  std::uint8_t* frame(std::int64_t lane, std::int64_t tick) const { return rings_.frame(lane, tick); }
  Record& record(std::int64_t lane, std::int64_t tick) const { return rings_.record(lane, tick); }

  // Bytes that already lie in the lane's next slot are not copied.
  void push(std::int64_t lane, const std::uint8_t* source, const Record& entry) {
    std::uint8_t* slot = frame(lane, ticks(lane));
    if (source != slot) std::memcpy(slot, source, static_cast<std::size_t>(shape_.frame_bytes));
    record(lane, ticks(lane)) = entry;
    ++ticks_[static_cast<std::size_t>(lane)];
  }

  // How far the window that starts at `tick` reaches: k steps, ended early by the episode's end. 0 when no step was
  // taken there, or when the window is still open, that is when its last frame has not been appended yet.
  std::int64_t reach(std::int64_t lane, std::int64_t tick) const {
    for (std::int64_t k = 1; k <= shape_.n_step; ++k) {
      if (tick + k >= ticks(lane)) return 0;
      const std::uint8_t flags = record(lane, tick + k).flags;
      if (flags & (kFirst | kHistory)) return k - 1;  // cut off without a flag: as a truncation
      if (k == shape_.n_step || flags & (kTerminated | kTruncated)) return k;
    }
    return 0;
  }

  // Whether every frame of the stack that ends at `tick` is still held.
  bool stack_is_held(std::int64_t lane, std::int64_t tick) const {
    const std::int64_t start = tick - shape_.stack + 1;
    for (std::int64_t t = tick; t >= std::max(start, oldest(lane)); --t)
      if (is_first(lane, t)) return true;
    return start >= oldest(lane);
  }

  bool is_transition(std::int64_t lane, std::int64_t tick) const {
    return stack_is_held(lane, tick) && reach(lane, tick) > 0;
  }

  void gather_stack(std::int64_t lane, std::int64_t tick, std::uint8_t* out) const {
    const std::int64_t start = tick - shape_.stack + 1;
    std::int64_t from = tick;
    while (from > start && from > oldest(lane) && !is_first(lane, from)) --from;
    const std::int64_t missing = from - start;
    const auto bytes = static_cast<std::size_t>(shape_.frame_bytes);
    if (shape_.padding == Padding::kZero)
      std::memset(out, 0, static_cast<std::size_t>(missing) * bytes);
    else
      for (std::int64_t i = 0; i < missing; ++i)
        std::memcpy(out + static_cast<std::size_t>(i) * bytes, frame(lane, from), bytes);
    rings_.copy_run(lane, from, tick - from + 1, out + static_cast<std::size_t>(missing) * bytes);
  }

 private:
  bool is_first(std::int64_t lane, std::int64_t tick) const { return record(lane, tick).flags & kFirst; }

  const Shape shape_;
  Rings rings_;
  std::vector<std::int64_t> ticks_;  // appends so far, per lane
};

}  // namespace pydqn
