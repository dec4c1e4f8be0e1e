// Ring buffers of frames, one per environment, with the action, reward and flags that led to each frame.
//
// A ring has `slots` = capacity + 1 slots. The newest `capacity` frames can be read. The other slot is where the next
// frame goes, so that a caller can write it there while other threads sample.
//
// Each environment counts its own time steps: 0, 1, 2, ... The frame appended at time step t is in slot t % slots. The
// action, reward and flags recorded at t are those that led to its frame, so a transition that starts at t has the
// action and the first reward recorded at t + 1.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>

#include "lazy_memory.hpp"

namespace pydqn {

enum Flag : std::uint8_t {
  kFirst = 1,
  kTerminated = 2,
  kTruncated = 4,
  kValid = 8,     // a transition that starts here can be sampled
  kHistory = 16,  // the frame belongs to its episode and its stacks, but the step that led to it is not stored
};

struct Record {
  float reward;
  std::int32_t action;
  std::uint8_t flags;
};

class Rings {
 public:
  Rings(std::int64_t capacity, std::int64_t num_envs, std::int64_t frame_bytes)
      : num_envs_(num_envs),
        slots_(capacity + 1),
        frame_bytes_(frame_bytes),
        frames_(checked_bytes(capacity, num_envs, frame_bytes)),
        records_(static_cast<std::size_t>(num_envs * slots_) * sizeof(Record)) {}

  std::int64_t slots() const { return slots_; }
  std::size_t bytes() const { return frames_.bytes() + records_.bytes(); }

  std::uint8_t* frame(std::int64_t env, std::int64_t t) const {
    return frames_.data() + (env * slots_ + t % slots_) * frame_bytes_;
  }
  Record& record(std::int64_t env, std::int64_t t) const {
    return reinterpret_cast<Record*>(records_.data())[env * slots_ + t % slots_];
  }

  // Numbers the slots of all rings from 0 to num_envs * slots - 1. Slots that are filled together are adjacent.
  std::int64_t slot_index(std::int64_t env, std::int64_t t) const { return t % slots_ * num_envs_ + env; }
  std::int64_t env_of(std::int64_t slot_index) const { return slot_index % num_envs_; }
  // The newest time step before `time_steps` that uses the slot.
  std::int64_t time_step_of(std::int64_t slot_index, std::int64_t time_steps) const {
    return time_steps - 1 - (time_steps - 1 - slot_index / num_envs_) % slots_;
  }

  // Copies the frames of time steps [from, from + count), which wrap around at most once.
  void copy_run(std::int64_t env, std::int64_t from, std::int64_t count, std::uint8_t* out) const {
    const std::int64_t before_wrap = std::min(count, slots_ - from % slots_);
    const auto bytes = static_cast<std::size_t>(frame_bytes_);
    std::memcpy(out, frame(env, from), static_cast<std::size_t>(before_wrap) * bytes);
    if (before_wrap < count)
      std::memcpy(out + static_cast<std::size_t>(before_wrap) * bytes, frame(env, from + before_wrap),
                  static_cast<std::size_t>(count - before_wrap) * bytes);
  }

 private:
  static std::size_t checked_bytes(std::int64_t capacity, std::int64_t num_envs, std::int64_t frame_bytes) {
    const auto limit = static_cast<double>(std::numeric_limits<std::int64_t>::max()) / 4;
    if (static_cast<double>(capacity + 1) * static_cast<double>(num_envs) * static_cast<double>(frame_bytes) > limit)
      throw std::bad_alloc();
    return static_cast<std::size_t>((capacity + 1) * num_envs * frame_bytes);
  }

  std::int64_t num_envs_, slots_, frame_bytes_;
  LazyMemory frames_;
  LazyMemory records_;
};

}  // namespace pydqn
