// Frames and what led to them, in rings. This file knows no Python.
//
// Every lane (environment) owns a ring of `slots` = capacity + 1 frames. `capacity` of them can be read;
// the one at the write cursor is spare, so that the next frame may be written into it while samplers read the rest.
//
// Frames are named by the tick at which they were appended (0, 1, 2, ... without end); a frame lives in slot
// tick % slots while tick is among the newest `capacity`. Action, reward and flags of a tick are those that led to
// its frame, so a transition that starts at tick t reads its action and first reward from tick t + 1.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>

#include "lazy_memory.hpp"

namespace pydqn {

// kHistory: the frame belongs to its episode and its stacks, but no step that is stored led to it.
enum Flag : std::uint8_t { kFirst = 1, kTerminated = 2, kTruncated = 4, kValid = 8, kHistory = 16 };

struct Record {
  float reward;
  std::int32_t action;
  std::uint8_t flags;
};

class Rings {
 public:
  Rings(std::int64_t capacity, std::int64_t lanes, std::int64_t frame_bytes)
      : lanes_(lanes),
        slots_(capacity + 1),
        frame_bytes_(frame_bytes),
        frames_(checked_bytes(capacity, lanes, frame_bytes)),
        records_(static_cast<std::size_t>(lanes * slots_) * sizeof(Record)) {}

  std::int64_t slots() const { return slots_; }
  std::size_t bytes() const { return frames_.bytes() + records_.bytes(); }

  std::uint8_t* frame(std::int64_t lane, std::int64_t tick) const {
    return frames_.data() + (lane * slots_ + tick % slots_) * frame_bytes_;
  }
  Record& record(std::int64_t lane, std::int64_t tick) const {
    return reinterpret_cast<Record*>(records_.data())[lane * slots_ + tick % slots_];
  }

  // A number for lane and slot, below lanes * slots: lanes side by side, as they are appended.
  std::int64_t place(std::int64_t lane, std::int64_t tick) const { return tick % slots_ * lanes_ + lane; }
  std::int64_t lane_of(std::int64_t place) const { return place % lanes_; }
  // The newest tick before `ticks` that lives in the place.
  std::int64_t tick_of(std::int64_t place, std::int64_t ticks) const {
    return ticks - 1 - (ticks - 1 - place / lanes_) % slots_;
  }

  // Copies the held ticks [from, from + count) of a lane, which wrap at most once.
  void copy_run(std::int64_t lane, std::int64_t from, std::int64_t count, std::uint8_t* out) const {
    const std::int64_t before_wrap = std::min(count, slots_ - from % slots_);
    const auto bytes = static_cast<std::size_t>(frame_bytes_);
    std::memcpy(out, frame(lane, from), static_cast<std::size_t>(before_wrap) * bytes);
    if (before_wrap < count)
      std::memcpy(out + static_cast<std::size_t>(before_wrap) * bytes, frame(lane, from + before_wrap),
                  static_cast<std::size_t>(count - before_wrap) * bytes);
  }

 private:
  static std::size_t checked_bytes(std::int64_t capacity, std::int64_t lanes, std::int64_t frame_bytes) {
    const auto limit = static_cast<double>(std::numeric_limits<std::int64_t>::max()) / 4;
    if (static_cast<double>(capacity + 1) * static_cast<double>(lanes) * static_cast<double>(frame_bytes) > limit)
      throw std::bad_alloc();
    return static_cast<std::size_t>((capacity + 1) * lanes * frame_bytes);
  }

  std::int64_t lanes_, slots_, frame_bytes_;
  LazyMemory frames_;
  LazyMemory records_;
};

}  // namespace pydqn
