// Stacks of frames and n-step windows within the episodes of each environment. Takes no lock. See rings.hpp for slots
// and time steps.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "rings.hpp"

namespace pydqn {

enum class Padding { kZero, kFirst };  // replaces the frames before an episode's first frame

struct Shape {
  std::int64_t capacity;  // readable frames per environment
  std::int64_t num_envs;
  std::int64_t frame_bytes;
  std::int64_t stack;
  std::int64_t n_step;
  double gamma;
  Padding padding;
  std::optional<double> alpha;  // exponent of the priorities; empty for uniform sampling
  std::int64_t limit = 0;       // how many transitions per environment, the newest, can be sampled; 0 for no limit
};

class Episodes {
 public:
  explicit Episodes(const Shape& shape)
      : shape_(shape),
        rings_(shape.capacity, shape.num_envs, shape.frame_bytes),
        time_steps_(static_cast<std::size_t>(shape.num_envs), 0) {}

  const Rings& rings() const { return rings_; }

  // The number of frames appended so far, the time step of the oldest readable frame, and the number of readable ones.
  std::int64_t time_steps(std::int64_t env) const { return time_steps_[static_cast<std::size_t>(env)]; }
  std::int64_t oldest(std::int64_t env) const { return std::max<std::int64_t>(0, time_steps(env) - shape_.capacity); }
  std::int64_t held(std::int64_t env) const { return time_steps(env) - oldest(env); }

  const std::vector<std::int64_t>& env_time_steps() const { return time_steps_; }
  void set_time_steps(const std::vector<std::int64_t>& time_steps) { time_steps_ = time_steps; }
  std::int64_t max_time_steps() const { return *std::max_element(time_steps_.begin(), time_steps_.end()); }
  std::int64_t min_time_steps() const { return *std::min_element(time_steps_.begin(), time_steps_.end()); }
  std::int64_t max_held() const { return std::min(max_time_steps(), shape_.capacity); }

  std::uint8_t* frame(std::int64_t env, std::int64_t t) const { return rings_.frame(env, t); }
  Record& record(std::int64_t env, std::int64_t t) const { return rings_.record(env, t); }

  // Whether t is readable and marked as the start of a transition.
  bool is_valid(std::int64_t env, std::int64_t t) const {
    return t >= oldest(env) && t < time_steps(env) && record(env, t).flags & kValid;
  }

  // Does not copy a frame that is already in the environment's next slot.
  void push(std::int64_t env, const std::uint8_t* source, const Record& entry) {
    std::uint8_t* slot = frame(env, time_steps(env));
    if (source != slot) std::memcpy(slot, source, static_cast<std::size_t>(shape_.frame_bytes));
    record(env, time_steps(env)) = entry;
    ++time_steps_[static_cast<std::size_t>(env)];
  }

  // The number of steps in the window that starts at t: n_step, or fewer if the episode ends earlier. 0 if no step
  // starts at t, or if the window's last frame has not been appended yet.
  std::int64_t window_length(std::int64_t env, std::int64_t t) const {
    for (std::int64_t k = 1; k <= shape_.n_step; ++k) {
      if (t + k >= time_steps(env)) return 0;
      const std::uint8_t flags = record(env, t + k).flags;
      if (flags & (kFirst | kHistory)) return k - 1;  // an episode that ends without a flag counts as truncated
      if (k == shape_.n_step || flags & (kTerminated | kTruncated)) return k;
    }
    return 0;
  }

  // Whether every frame of the stack that ends at t is still readable.
  bool stack_is_held(std::int64_t env, std::int64_t t) const {
    const std::int64_t start = t - shape_.stack + 1;
    for (std::int64_t i = t; i >= std::max(start, oldest(env)); --i)
      if (is_first(env, i)) return true;
    return start >= oldest(env);
  }

  bool is_transition(std::int64_t env, std::int64_t t) const {
    return stack_is_held(env, t) && window_length(env, t) > 0;
  }

  void gather_stack(std::int64_t env, std::int64_t t, std::uint8_t* out) const {
    const std::int64_t start = t - shape_.stack + 1;
    std::int64_t from = t;
    while (from > start && from > oldest(env) && !is_first(env, from)) --from;
    const std::int64_t missing = from - start;
    const auto bytes = static_cast<std::size_t>(shape_.frame_bytes);
    if (shape_.padding == Padding::kZero)
      std::memset(out, 0, static_cast<std::size_t>(missing) * bytes);
    else
      for (std::int64_t i = 0; i < missing; ++i)
        std::memcpy(out + static_cast<std::size_t>(i) * bytes, frame(env, from), bytes);
    rings_.copy_run(env, from, t - from + 1, out + static_cast<std::size_t>(missing) * bytes);
  }

 private:
  bool is_first(std::int64_t env, std::int64_t t) const { return record(env, t).flags & kFirst; }

  const Shape shape_;
  Rings rings_;
  std::vector<std::int64_t> time_steps_;  // frames appended so far, per environment
};

}  // namespace pydqn
