// The replay buffer: stores each frame once and assembles transitions when they are sampled. Callers must check their
// arguments, as bindings.cpp does. See rings.hpp for slots and time steps, episodes.hpp for stacks and windows.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "episodes.hpp"
#include "generator.hpp"
#include "priorities.hpp"

namespace pydqn {

// The arrays of a batch, to be filled. `next_obs` may be `obs` shifted by one frame (see `shares_frames`).
struct BatchView {
  std::uint8_t* obs;
  std::int64_t obs_stride;  // bytes from one sample to the next
  std::uint8_t* next_obs;
  std::int64_t next_obs_stride;
  std::int64_t* action;
  float* reward;
  float* discount;
  std::int64_t* index;
  float* weight;
};

// A transition that starts at time step t of environment env has the index t * num_envs + env.
class FrameReplay {
  using Lock = std::lock_guard<std::mutex>;
  using Start = std::pair<std::int64_t, std::int64_t>;  // env and t

 public:
  FrameReplay(const Shape& shape, std::uint64_t seed)
      : shape_(shape),
        episodes_(shape),
        rings_(episodes_.rings()),
        generator_(seed),
        counts_(static_cast<std::size_t>(shape.num_envs), 0),
        limit_starts_(static_cast<std::size_t>(shape.num_envs), 0) {
    if (shape.alpha) priorities_.emplace(shape.num_envs * rings_.slots(), *shape.alpha);
  }

  const Shape& shape() const { return shape_; }
  std::size_t bytes() const { return rings_.bytes() + (priorities_ ? priorities_->bytes() : 0); }

  // The number of frames appended so far: the maximum over the environments, and the number of each environment.
  std::int64_t time_steps() const { Lock lock(mutex_); return episodes_.max_time_steps(); }
  std::vector<std::int64_t> env_time_steps() const { Lock lock(mutex_); return episodes_.env_time_steps(); }
  // The number of transitions that can be sampled now.
  std::int64_t size() const { Lock lock(mutex_); return valid_; }

  // Where the next frame of environment 0 goes. Environment i's next frame goes i * env_bytes() further on.
  std::uint8_t* next_slot() const {
    Lock lock(mutex_);
    if (episodes_.max_time_steps() != episodes_.min_time_steps())
      throw std::runtime_error("next_slot: the environments have different numbers of frames, so their slots differ");
    return episodes_.frame(0, episodes_.time_steps(0));
  }
  std::int64_t env_bytes() const { return rings_.slots() * shape_.frame_bytes; }

  // Appends one frame to each of `count` different environments: those in `envs`, or all if it is null. `frame_at(i)`
  // points to the i-th frame; a frame that is already in its next slot is not copied. Each array has `count` values.
  // `history` may be null.
  template <typename FrameAt>
  void append(std::int64_t count, const std::int64_t* envs, FrameAt frame_at, const std::int32_t* action,
              const float* reward, const bool* terminated, const bool* truncated, const bool* first,
              const bool* history = nullptr) {
    Lock lock(mutex_);
    for (std::int64_t i = 0; i < count; ++i)
      if (!first[i] && episodes_.time_steps(envs ? envs[i] : i) == 0)
        throw std::invalid_argument("first: expected True in every environment at its first append");
    for (std::int64_t i = 0; i < count; ++i) {
      Record entry{0.0f, 0, kFirst};
      if (!first[i] && history && history[i])
        entry.flags = kHistory;
      else if (!first[i])
        entry = Record{reward[i], action[i],
                       static_cast<std::uint8_t>((terminated[i] ? kTerminated : 0) | (truncated[i] ? kTruncated : 0))};
      episodes_.push(envs ? envs[i] : i, frame_at(i), entry);
    }
    for (std::int64_t i = 0; i < count; ++i) refresh_after_append(envs ? envs[i] : i);
  }

  // Draws `count` valid transitions with replacement: uniformly, or in proportion to the priorities, one from each of
  // `count` equal shares of their sum. Even then, each draw is a uniform one with the probability `uniform_share`.
  void sample(std::int64_t count, double beta, double uniform_share, const BatchView& batch) {
    Lock lock(mutex_);
    if (valid_ == 0) throw std::runtime_error("sample: no transition can be sampled yet");
    sampled_slots_.resize(priorities_ ? static_cast<std::size_t>(count) : 0);
    for (std::int64_t i = 0; i < count; ++i) {
      const bool uniform = !priorities_ || (uniform_share > 0.0 && generator_.fraction() < uniform_share);
      const auto [env, t] = uniform ? draw() : draw_by_priority(i, count);
      if (priorities_) sampled_slots_[static_cast<std::size_t>(i)] = rings_.slot_index(env, t);
      gather_one(env, t, i, batch);
    }
    if (priorities_)
      priorities_->importance_weights(sampled_slots_.data(), count, beta, uniform_share, valid_, batch.weight);
  }

  // Sets the priorities of transitions by index. Skips transitions that have been overwritten.
  void update_priorities(const std::int64_t* index, const double* priority, std::int64_t count) {
    Lock lock(mutex_);
    if (!priorities_) throw std::runtime_error("update_priorities: this replay buffer samples uniformly");
    for (std::int64_t i = 0; i < count; ++i) {
      const auto [env, t] = start_of(index[i]);
      if (index[i] < 0 || t >= episodes_.time_steps(env))
        throw std::invalid_argument("index: " + std::to_string(index[i]) + " has never been a transition");
      priorities_->prefetch(rings_.slot_index(env, t));
    }
    for (std::int64_t i = 0; i < count; ++i) {
      const auto [env, t] = start_of(index[i]);
      if (episodes_.is_valid(env, t)) priorities_->update(rings_.slot_index(env, t), priority[i]);
    }
  }

  // Copies transitions by index. Every index must be valid now.
  void gather(const std::int64_t* index, std::int64_t count, const BatchView& batch) const {
    Lock lock(mutex_);
    require_valid(index, count);
    for (std::int64_t i = 0; i < count; ++i) {
      const auto [env, t] = start_of(index[i]);
      gather_one(env, t, i, batch);
    }
  }

  // For each index, which must be valid now: the length of the n-step window and how it ends.
  void windows(const std::int64_t* index, std::int64_t count, std::int64_t* steps, bool* terminated,
               bool* truncated) const {
    Lock lock(mutex_);
    require_valid(index, count);
    for (std::int64_t i = 0; i < count; ++i) {
      const auto [env, t] = start_of(index[i]);
      steps[i] = episodes_.window_length(env, t);
      const std::uint8_t flags = record(env, t + steps[i]).flags;
      terminated[i] = flags & kTerminated;
      truncated[i] = flags & kTruncated || (steps[i] < shape_.n_step && !terminated[i]);
    }
  }

  // The indices of all transitions that can be sampled now, in increasing order.
  std::vector<std::int64_t> valid_indices() const {
    Lock lock(mutex_);
    std::vector<std::int64_t> indices;
    indices.reserve(static_cast<std::size_t>(valid_));
    const std::int64_t start = std::max<std::int64_t>(0, episodes_.min_time_steps() - shape_.capacity);
    for (std::int64_t t = start; t < episodes_.max_time_steps(); ++t)
      for (std::int64_t env = 0; env < shape_.num_envs; ++env)
        if (episodes_.is_valid(env, t)) indices.push_back(t * shape_.num_envs + env);
    return indices;
  }

  // Copies the newest stack of each environment, one after the other.
  void latest(std::uint8_t* out) const {
    Lock lock(mutex_);
    if (episodes_.min_time_steps() == 0) throw std::runtime_error("latest: nothing has been appended yet");
    for (std::int64_t env = 0; env < shape_.num_envs; ++env)
      episodes_.gather_stack(env, episodes_.time_steps(env) - 1, out + env * shape_.stack * shape_.frame_bytes);
  }

  // Whether obs and next_obs of a transition may share all frames but one. Windows of several steps may end early, so
  // their two stacks are not always the same distance apart.
  bool shares_frames() const { return shape_.n_step == 1; }

  // --- saving and loading ---

  std::int64_t stored(std::int64_t env) const { Lock lock(mutex_); return episodes_.held(env); }

  // The columns of successive time steps of one environment.
  struct Columns {
    std::uint8_t* frames;
    float* reward;
    std::int32_t* action;
    std::uint8_t* flags;
  };

  // Copies `count` time steps of an environment, starting `position` time steps after the oldest. `time_steps` is the
  // environment's number of time steps when saving began. If a frame has been appended since, this throws, because the
  // file would mix two states.
  void export_run(std::int64_t env, std::int64_t position, std::int64_t count, std::int64_t time_steps,
                  const Columns& out) const {
    Lock lock(mutex_);
    require_unchanged(env, time_steps);
    const std::int64_t start = episodes_.oldest(env) + position;
    rings_.copy_run(env, start, count, out.frames);
    for (std::int64_t i = 0; i < count; ++i) {
      const Record& entry = record(env, start + i);
      out.reward[i] = entry.reward;
      out.action[i] = entry.action;
      out.flags[i] = entry.flags & kStoredFlags;
    }
  }

  // Copies p^alpha of all stored time steps of an environment, 0 where no transition can be sampled.
  void export_priorities(std::int64_t env, std::int64_t time_steps, double* out) const {
    Lock lock(mutex_);
    require_unchanged(env, time_steps);
    if (!priorities_) throw std::logic_error("save: this replay buffer samples uniformly");
    for (std::int64_t t = episodes_.oldest(env); t < time_steps; ++t)
      *out++ = priorities_->value(rings_.slot_index(env, t));
  }

  // To fill an empty replay buffer, call set_time_steps, then import_run until all stored time steps of every
  // environment are filled, then import_priorities for every environment if sampling is prioritized, then end_import.
  void set_time_steps(const std::vector<std::int64_t>& time_steps) {
    Lock lock(mutex_);
    if (episodes_.max_time_steps() != 0) throw std::logic_error("load: expected an empty replay buffer");
    for (const std::int64_t count : time_steps)
      if (count < 0 || count > std::numeric_limits<std::int64_t>::max() / 2 / shape_.num_envs)
        throw std::invalid_argument("time_steps: " + std::to_string(count) + " is out of range");
    episodes_.set_time_steps(time_steps);
  }
  void import_run(std::int64_t env, std::int64_t position, std::int64_t count, const Columns& in) {
    Lock lock(mutex_);
    for (std::int64_t i = 0; i < count; ++i) {
      if (in.action[i] < 0 || !std::isfinite(in.reward[i]))
        throw std::invalid_argument("load: expected actions of at least 0 and finite rewards");
      const std::int64_t t = episodes_.oldest(env) + position + i;
      std::memcpy(episodes_.frame(env, t), in.frames + i * shape_.frame_bytes,
                  static_cast<std::size_t>(shape_.frame_bytes));
      record(env, t) = Record{in.reward[i], in.action[i], static_cast<std::uint8_t>(in.flags[i] & kStoredFlags)};
    }
  }
  void import_priorities(std::int64_t env, const double* in) {
    Lock lock(mutex_);
    if (!priorities_) throw std::logic_error("load: this replay buffer samples uniformly");
    for (std::int64_t t = episodes_.oldest(env); t < episodes_.time_steps(env); ++t)
      priorities_->set_value(rings_.slot_index(env, t), *in++);
  }
  void end_import() {
    Lock lock(mutex_);
    for (std::int64_t env = 0; env < shape_.num_envs; ++env) {
      limit_start(env) = start_of_newest(env);
      for (std::int64_t t = episodes_.oldest(env); t < episodes_.time_steps(env); ++t) {
        const double value = priorities_ ? priorities_->value(rings_.slot_index(env, t)) : 0.0;
        refresh(env, t);
        if (!priorities_) continue;
        if ((record(env, t).flags & kValid) != 0 ? !(value > 0.0 && value <= kMaxPriority) : value != 0.0)
          throw std::invalid_argument("priority: " + std::to_string(value) + " does not fit its transition");
        priorities_->set_value(rings_.slot_index(env, t), value);  // refresh() may have overwritten it
      }
    }
  }

  // See Priorities::set_alpha.
  void set_alpha(double value) { Lock lock(mutex_); if (priorities_) priorities_->set_alpha(value); }

  // p^alpha of the largest priority so far; 1 if sampling is uniform.
  double largest_priority() const { Lock lock(mutex_); return priorities_ ? priorities_->largest() : 1.0; }
  void set_largest_priority(double value) {
    Lock lock(mutex_);
    if (!(value > 0.0 && value <= kMaxPriority)) throw std::invalid_argument("largest_priority: out of range");
    if (priorities_) priorities_->set_largest(value);
  }

  std::string generator_state() const { Lock lock(mutex_); return generator_.state(); }
  void set_generator_state(const std::string& state) { Lock lock(mutex_); generator_.set_state(state); }

 private:
  static constexpr std::uint8_t kStoredFlags = kFirst | kTerminated | kTruncated | kHistory;
  static constexpr double kMaxPriority = std::numeric_limits<float>::max();  // so that sums of doubles stay finite

  void require_unchanged(std::int64_t env, std::int64_t time_steps) const {
    if (time_steps != episodes_.time_steps(env))
      throw std::runtime_error("save: another thread appended while the replay buffer was being saved");
  }
  void require_valid(const std::int64_t* index, std::int64_t count) const {
    for (std::int64_t i = 0; i < count; ++i) {
      const auto [env, t] = start_of(index[i]);
      if (index[i] < 0 || !episodes_.is_valid(env, t))
        throw std::invalid_argument("index: " + std::to_string(index[i]) + " is not a transition that is held now");
    }
  }

  Start start_of(std::int64_t index) const { return {index % shape_.num_envs, index / shape_.num_envs}; }
  Record& record(std::int64_t env, std::int64_t t) const { return rings_.record(env, t); }
  std::int64_t& count(std::int64_t env) { return counts_[static_cast<std::size_t>(env)]; }
  std::int64_t& limit_start(std::int64_t env) { return limit_starts_[static_cast<std::size_t>(env)]; }

  // The time step at which the newest `limit` transitions of an environment begin; 0 if there is no limit.
  std::int64_t start_of_newest(std::int64_t env) const {
    if (shape_.limit == 0) return 0;
    std::int64_t t = episodes_.time_steps(env);
    for (std::int64_t found = 0; t > episodes_.oldest(env) && found < shape_.limit; --t)
      found += episodes_.is_transition(env, t - 1);
    return t;
  }

  // Determines anew whether a transition that starts at t can be sampled.
  void refresh(std::int64_t env, std::int64_t t) {
    Record& entry = record(env, t);
    const bool was = entry.flags & kValid;
    const bool is = t >= limit_start(env) && episodes_.is_transition(env, t);
    entry.flags = static_cast<std::uint8_t>(is ? entry.flags | kValid : entry.flags & ~kValid);
    if (is == was) return;
    valid_ += is ? 1 : -1;
    count(env) += is ? 1 : -1;
    if (priorities_) is ? priorities_->add(rings_.slot_index(env, t)) : priorities_->remove(rings_.slot_index(env, t));
  }

  // An append changes validity only at four kinds of time steps: the one that became unreadable, those whose stacks
  // reached back to it, the newest, whose windows the new frame may complete, and the oldest if the limit is exceeded.
  void refresh_after_append(std::int64_t env) {
    const std::int64_t start = episodes_.oldest(env), end = episodes_.time_steps(env);
    if (start > 0) {
      Record& gone = record(env, start - 1);  // in the spare slot, not overwritten yet
      if (gone.flags & kValid) {
        --valid_;
        --count(env);
        if (priorities_) priorities_->remove(rings_.slot_index(env, start - 1));
      }
      gone.flags = static_cast<std::uint8_t>(gone.flags & ~kValid);
      const std::int64_t stop = std::min(start + shape_.stack - 1, end);
      for (std::int64_t t = start; t < stop; ++t) refresh(env, t);
    }
    for (std::int64_t t = std::max(start, end - 1 - shape_.n_step); t < end; ++t) refresh(env, t);
    if (shape_.limit == 0) return;
    limit_start(env) = std::max(limit_start(env), start);
    while (count(env) > shape_.limit) refresh(env, limit_start(env)++);
  }

  // Draws a valid transition uniformly.
  Start draw() {
    const auto held = static_cast<std::uint64_t>(episodes_.max_held() * shape_.num_envs);
    // Nearly every frame starts a transition, so the first attempt mostly succeeds. Where few do (episodes of one step,
    // environments with few frames), a scan is as uniform and takes bounded time.
    for (int attempt = 0; attempt < 256; ++attempt) {
      const auto drawn = static_cast<std::int64_t>(generator_.below(held));
      const std::int64_t env = drawn % shape_.num_envs, t = episodes_.oldest(env) + drawn / shape_.num_envs;
      if (episodes_.is_valid(env, t)) return {env, t};
    }
    auto remaining = static_cast<std::int64_t>(generator_.below(static_cast<std::uint64_t>(valid_)));
    for (std::int64_t env = 0; env < shape_.num_envs; ++env)
      for (std::int64_t t = episodes_.oldest(env); t < episodes_.time_steps(env); ++t)
        if (record(env, t).flags & kValid && remaining-- == 0) return {env, t};
    throw std::logic_error("sample: the count of valid transitions is wrong");  // unreachable
  }

  // Draws from the i-th of `count` equal shares of the sum of the priorities.
  Start draw_by_priority(std::int64_t i, std::int64_t count) {
    const double fraction = (static_cast<double>(i) + generator_.fraction()) / static_cast<double>(count);
    const std::int64_t slot = priorities_->find(fraction);
    const std::int64_t env = rings_.env_of(slot);
    return {env, rings_.time_step_of(slot, episodes_.time_steps(env))};
  }

  // Copies a valid transition into the i-th row of the batch.
  void gather_one(std::int64_t env, std::int64_t t, std::int64_t i, const BatchView& batch) const {
    const std::int64_t k = episodes_.window_length(env, t);
    std::uint8_t* obs = batch.obs + i * batch.obs_stride;
    std::uint8_t* next_obs = batch.next_obs + i * batch.next_obs_stride;
    episodes_.gather_stack(env, t, obs);
    if (shares_frames() && next_obs == obs + shape_.frame_bytes)  // only the newest frame is missing
      std::memcpy(obs + shape_.stack * shape_.frame_bytes, episodes_.frame(env, t + 1),
                  static_cast<std::size_t>(shape_.frame_bytes));
    else
      episodes_.gather_stack(env, t + k, next_obs);

    double reward = 0.0, discount = 1.0;
    for (std::int64_t j = 1; j <= k; ++j) {
      reward += discount * static_cast<double>(record(env, t + j).reward);
      discount *= shape_.gamma;
    }
    if (record(env, t + k).flags & kTerminated) discount = 0.0;
    batch.action[i] = record(env, t + 1).action;
    batch.reward[i] = static_cast<float>(reward);
    batch.discount[i] = static_cast<float>(discount);
    batch.index[i] = t * shape_.num_envs + env;
    batch.weight[i] = 1.0f;
  }

  const Shape shape_;
  Episodes episodes_;
  const Rings& rings_;  // those of episodes_
  std::optional<Priorities> priorities_;
  Generator generator_;
  std::vector<std::int64_t> sampled_slots_;  // of the last batch; a member to avoid an allocation per batch
  std::vector<std::int64_t> counts_;         // transitions that can be sampled now, per environment
  std::vector<std::int64_t> limit_starts_;   // because of the limit, no transition starts before this time step
  std::int64_t valid_ = 0;                   // transitions that can be sampled now
  mutable std::mutex mutex_;                 // guards everything but the frames in the spare slots
};

}  // namespace pydqn
