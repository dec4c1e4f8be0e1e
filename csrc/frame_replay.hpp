// Frame-indexed replay memory. This file knows no Python: the binding file checks what callers pass in.
// See rings.hpp for lanes, slots and ticks.
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

#include "generator.hpp"
#include "priorities.hpp"
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
};

// Where `gather` writes, sample by sample. `next_obs` may overlap `obs` shifted by one frame (see `shares_block`).
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

class FrameReplay {
  using Lock = std::lock_guard<std::mutex>;

 public:
  FrameReplay(const Shape& shape, std::uint64_t seed)
      : shape_(shape),
        rings_(shape.capacity, shape.lanes, shape.frame_bytes),
        generator_(seed) {
    if (shape.alpha) priorities_.emplace(shape.lanes * rings_.slots(), *shape.alpha);
  }

  const Shape& shape() const { return shape_; }
  std::size_t bytes() const {
    return rings_.bytes() + (priorities_ ? priorities_->bytes() : 0);
  }

  std::int64_t ticks() const { Lock lock(mutex_); return ticks_; }
  std::int64_t size() const { Lock lock(mutex_); return valid_; }

  // The slot that the next append fills, in lane 0; lane i's lies i * lane_bytes() further on.
  std::uint8_t* next_slot() const { Lock lock(mutex_); return frame(0, ticks_); }
  std::int64_t lane_bytes() const { return rings_.slots() * shape_.frame_bytes; }

  // Appends one frame per lane. `frame_at(lane)` names the frame's bytes; bytes that already lie in the next slot
  // are not copied. The arrays have one entry per lane.
  template <typename FrameAt>
  void append(FrameAt frame_at, const std::int32_t* action, const float* reward, const bool* terminated,
              const bool* truncated, const bool* first) {
    Lock lock(mutex_);
    if (ticks_ == 0 && !std::all_of(first, first + shape_.lanes, [](bool f) { return f; }))
      throw std::invalid_argument("first: expected True in every lane at the first append, since no episode is open");
    for (std::int64_t lane = 0; lane < shape_.lanes; ++lane) {
      std::uint8_t* slot = frame(lane, ticks_);
      const std::uint8_t* source = frame_at(lane);
      if (source != slot) std::memcpy(slot, source, static_cast<std::size_t>(shape_.frame_bytes));
      Record& entry = record(lane, ticks_);
      if (first[lane])
        entry = Record{0.0f, 0, kFirst};
      else
        entry = Record{reward[lane], action[lane],
                       static_cast<std::uint8_t>((terminated[lane] ? kTerminated : 0) |
                                                 (truncated[lane] ? kTruncated : 0))};
    }
    ++ticks_;
    for (std::int64_t lane = 0; lane < shape_.lanes; ++lane) refresh_after_append(lane);
  }

  // Draws `count` transitions, with replacement, from exactly the valid ones: uniformly, or one from each of `count`
  // equal shares of the priorities.
  void sample(std::int64_t count, double beta, const BatchView& batch) {
    Lock lock(mutex_);
    if (valid_ == 0) throw std::runtime_error("sample: no transition can be sampled yet");
    places_.resize(priorities_ ? static_cast<std::size_t>(count) : 0);
    for (std::int64_t i = 0; i < count; ++i) {
      const auto [lane, tick] = priorities_ ? draw_by_priority(i, count) : draw();
      gather_one(lane, tick, i, batch);
    }
    if (priorities_) priorities_->weigh(places_.data(), count, beta, batch.weight);
  }

  // Sets the priorities of transitions by index. Those that are gone meanwhile are passed over.
  void update_priorities(const std::int64_t* index, const double* priority, std::int64_t count) {
    Lock lock(mutex_);
    if (!priorities_) throw std::runtime_error("update_priorities: this memory samples uniformly");
    for (std::int64_t i = 0; i < count; ++i) {
      if (index[i] < 0 || index[i] / shape_.lanes >= ticks_)
        throw std::invalid_argument("index: " + std::to_string(index[i]) + " has never been a transition");
      priorities_->prefetch(rings_.place(index[i] % shape_.lanes, index[i] / shape_.lanes));
    }
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t lane = index[i] % shape_.lanes, tick = index[i] / shape_.lanes;
      if (tick >= oldest() && record(lane, tick).flags & kValid) priorities_->update(rings_.place(lane, tick), priority[i]);
    }
  }

  // Copies out the named transitions; each index must be valid now.
  void gather(const std::int64_t* index, std::int64_t count, const BatchView& batch) const {
    Lock lock(mutex_);
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t lane = index[i] % shape_.lanes, tick = index[i] / shape_.lanes;
      if (index[i] < 0 || tick < oldest() || tick >= ticks_ || !(record(lane, tick).flags & kValid))
        throw std::invalid_argument("index: " + std::to_string(index[i]) + " is not a transition that is held now");
    }
    for (std::int64_t i = 0; i < count; ++i) gather_one(index[i] % shape_.lanes, index[i] / shape_.lanes, i, batch);
  }

  // All indices that can be sampled now, in order of time.
  std::vector<std::int64_t> valid_indices() const {
    Lock lock(mutex_);
    std::vector<std::int64_t> indices;
    indices.reserve(static_cast<std::size_t>(valid_));
    for (std::int64_t tick = oldest(); tick < ticks_; ++tick)
      for (std::int64_t lane = 0; lane < shape_.lanes; ++lane)
        if (record(lane, tick).flags & kValid) indices.push_back(tick * shape_.lanes + lane);
    return indices;
  }

  // The newest stack of each lane, back to back.
  void latest(std::uint8_t* out) const {
    Lock lock(mutex_);
    if (ticks_ == 0) throw std::runtime_error("latest: nothing has been appended yet");
    for (std::int64_t lane = 0; lane < shape_.lanes; ++lane)
      gather_stack(lane, ticks_ - 1, out + lane * shape_.stack * shape_.frame_bytes);
  }

  // obs and next_obs of a one-step transition are always the two ends of one run of stack + 1 frames; with a longer
  // window that ended early they are not, so they then need memory of their own.
  bool shares_block() const { return shape_.n_step == 1; }

  // --- what `save` and `load` need: the held ticks of a lane in order of time, and the generator ---

  std::int64_t stored() const { Lock lock(mutex_); return ticks_ - oldest(); }

  // Columns of `count` successive ticks of one lane.
  struct Columns {
    std::uint8_t* frames;
    float* reward;
    std::int32_t* action;
    std::uint8_t* flags;
  };

  // Reads `count` held ticks of a lane from the `position`th oldest on. `ticks` is what ticks() said when the export
  // began: an append in between is refused, because the file would mix two states.
  void export_run(std::int64_t lane, std::int64_t position, std::int64_t count, std::int64_t ticks,
                  const Columns& out) const {
    Lock lock(mutex_);
    require_unchanged(ticks);
    const std::int64_t start = oldest() + position;
    rings_.copy_run(lane, start, count, out.frames);
    for (std::int64_t i = 0; i < count; ++i) {
      const Record& entry = record(lane, start + i);
      out.reward[i] = entry.reward;
      out.action[i] = entry.action;
      out.flags[i] = entry.flags & kStoredFlags;
    }
  }

  // Reads p^alpha of all held ticks of a lane, 0 where no transition can be sampled. `ticks` as in export_run.
  void export_priorities(std::int64_t lane, std::int64_t ticks, double* out) const {
    Lock lock(mutex_);
    require_unchanged(ticks);
    if (!priorities_) throw std::logic_error("save: this memory samples uniformly");
    for (std::int64_t tick = oldest(); tick < ticks_; ++tick) *out++ = priorities_->value(rings_.place(lane, tick));
  }

  // Fills an empty memory: set_ticks, then import_run until all min(ticks, capacity) ticks of every lane are in, then
  // import_priorities for every lane, if there are any, then end_import.
  void set_ticks(std::int64_t ticks) {
    Lock lock(mutex_);
    if (ticks_ != 0) throw std::logic_error("load: expected an empty memory");
    if (ticks < 0 || ticks > std::numeric_limits<std::int64_t>::max() / 2 / shape_.lanes)
      throw std::invalid_argument("ticks: " + std::to_string(ticks) + " is out of range");
    ticks_ = ticks;
  }
  void import_run(std::int64_t lane, std::int64_t position, std::int64_t count, const Columns& in) {
    Lock lock(mutex_);
    for (std::int64_t i = 0; i < count; ++i) {
      if (in.action[i] < 0 || !std::isfinite(in.reward[i]))
        throw std::invalid_argument("load: expected actions from 0 on and finite rewards");
      const std::int64_t tick = oldest() + position + i;
      std::memcpy(frame(lane, tick), in.frames + i * shape_.frame_bytes, static_cast<std::size_t>(shape_.frame_bytes));
      record(lane, tick) = Record{in.reward[i], in.action[i], static_cast<std::uint8_t>(in.flags[i] & kStoredFlags)};
    }
  }
  void import_priorities(std::int64_t lane, const double* in) {
    Lock lock(mutex_);
    if (!priorities_) throw std::logic_error("load: this memory samples uniformly");
    for (std::int64_t tick = oldest(); tick < ticks_; ++tick) priorities_->set_value(rings_.place(lane, tick), *in++);
  }
  void end_import() {
    Lock lock(mutex_);
    for (std::int64_t lane = 0; lane < shape_.lanes; ++lane)
      for (std::int64_t tick = oldest(); tick < ticks_; ++tick) {
        const double kept = priorities_ ? priorities_->value(rings_.place(lane, tick)) : 0.0;
        refresh(lane, tick);
        if (!priorities_) continue;
        if ((record(lane, tick).flags & kValid) != 0 ? !(kept > 0.0 && kept <= kMostPriority) : kept != 0.0)
          throw std::invalid_argument("priority: " + std::to_string(kept) + " does not fit its transition");
        priorities_->set_value(rings_.place(lane, tick), kept);
      }
  }

  // The largest priority so far, to the power of alpha; 1 where sampling is uniform.
  double largest_priority() const { Lock lock(mutex_); return priorities_ ? priorities_->largest() : 1.0; }
  void set_largest_priority(double value) {
    Lock lock(mutex_);
    if (!(value > 0.0 && value <= kMostPriority)) throw std::invalid_argument("largest_priority: out of range");
    if (priorities_) priorities_->set_largest(value);
  }

  std::string generator_state() const { Lock lock(mutex_); return generator_.state(); }
  void set_generator_state(const std::string& state) { Lock lock(mutex_); generator_.set_state(state); }

 private:
  static constexpr std::uint8_t kStoredFlags = kFirst | kTerminated | kTruncated;
  static constexpr double kMostPriority = std::numeric_limits<float>::max();  // millions of them still add up

  void require_unchanged(std::int64_t ticks) const {
    if (ticks != ticks_) throw std::runtime_error("save: another thread appended while the replay was being saved");
  }

  std::int64_t oldest() const { return std::max<std::int64_t>(0, ticks_ - shape_.capacity); }

  std::uint8_t* frame(std::int64_t lane, std::int64_t tick) const { return rings_.frame(lane, tick); }
  Record& record(std::int64_t lane, std::int64_t tick) const { return rings_.record(lane, tick); }
  bool is_first(std::int64_t lane, std::int64_t tick) const { return record(lane, tick).flags & kFirst; }

  // How far the window that starts at `tick` reaches: k steps, ended early by the episode's end. 0 when the window is
  // still open, that is when its last frame has not been appended yet.
  std::int64_t reach(std::int64_t lane, std::int64_t tick) const {
    for (std::int64_t k = 1; k <= shape_.n_step; ++k) {
      if (tick + k >= ticks_) return 0;
      if (is_first(lane, tick + k)) return k - 1;  // cut off without a flag: as a truncation
      if (k == shape_.n_step || record(lane, tick + k).flags & (kTerminated | kTruncated)) return k;
    }
    return 0;
  }

  // Whether every frame of the stack that ends at `tick` is still held.
  bool stack_is_held(std::int64_t lane, std::int64_t tick) const {
    const std::int64_t start = tick - shape_.stack + 1;
    for (std::int64_t t = tick; t >= std::max(start, oldest()); --t)
      if (is_first(lane, t)) return true;
    return start >= oldest();
  }

  void refresh(std::int64_t lane, std::int64_t tick) {
    Record& entry = record(lane, tick);
    const bool was = entry.flags & kValid;
    const bool is = stack_is_held(lane, tick) && reach(lane, tick) > 0;
    entry.flags = static_cast<std::uint8_t>(is ? entry.flags | kValid : entry.flags & ~kValid);
    if (is == was) return;
    valid_ += is ? 1 : -1;
    if (priorities_) is ? priorities_->enter(rings_.place(lane, tick)) : priorities_->leave(rings_.place(lane, tick));
  }

  // One append can change validity in three places only: the tick that just became unreadable, the ticks whose
  // stack reached back to it, and the newest ticks, whose windows the new frame may have closed.
  void refresh_after_append(std::int64_t lane) {
    const std::int64_t start = oldest();
    if (start > 0) {
      Record& gone = record(lane, start - 1);  // still in the spare slot
      if (gone.flags & kValid) {
        --valid_;
        if (priorities_) priorities_->leave(rings_.place(lane, start - 1));
      }
      gone.flags = static_cast<std::uint8_t>(gone.flags & ~kValid);
      const std::int64_t stop = std::min(start + shape_.stack - 1, ticks_);
      for (std::int64_t tick = start; tick < stop; ++tick) refresh(lane, tick);
    }
    for (std::int64_t tick = std::max(start, ticks_ - 1 - shape_.n_step); tick < ticks_; ++tick) refresh(lane, tick);
  }

  // The lane and the tick of a valid transition.
  std::pair<std::int64_t, std::int64_t> draw() {
    const std::int64_t start = oldest();
    const auto held = static_cast<std::uint64_t>((ticks_ - start) * shape_.lanes);
    // Nearly every stored frame starts a transition, so the first draw mostly succeeds. Where few do (episodes of
    // one step, say), counting them out is bounded and just as uniform.
    for (int attempt = 0; attempt < 256; ++attempt) {
      const auto drawn = static_cast<std::int64_t>(generator_.below(held));
      const std::int64_t lane = drawn % shape_.lanes, tick = start + drawn / shape_.lanes;
      if (record(lane, tick).flags & kValid) return {lane, tick};
    }
    auto remaining = static_cast<std::int64_t>(generator_.below(static_cast<std::uint64_t>(valid_)));
    for (std::int64_t lane = 0; lane < shape_.lanes; ++lane)
      for (std::int64_t tick = start; tick < ticks_; ++tick)
        if (record(lane, tick).flags & kValid && remaining-- == 0) return {lane, tick};
    throw std::logic_error("sample: the count of valid transitions is wrong");  // unreachable
  }

  // One from the `i`th of `count` equal shares.
  std::pair<std::int64_t, std::int64_t> draw_by_priority(std::int64_t i, std::int64_t count) {
    const double fraction = (static_cast<double>(i) + generator_.fraction()) / static_cast<double>(count);
    const std::int64_t place = priorities_->find(fraction);
    places_[static_cast<std::size_t>(i)] = place;
    return {rings_.lane_of(place), rings_.tick_of(place, ticks_)};
  }

  void gather_stack(std::int64_t lane, std::int64_t tick, std::uint8_t* out) const {
    const std::int64_t start = tick - shape_.stack + 1;
    std::int64_t from = tick;
    while (from > start && from > oldest() && !is_first(lane, from)) --from;
    const std::int64_t missing = from - start;
    const auto bytes = static_cast<std::size_t>(shape_.frame_bytes);
    if (shape_.padding == Padding::kZero)
      std::memset(out, 0, static_cast<std::size_t>(missing) * bytes);
    else
      for (std::int64_t i = 0; i < missing; ++i)
        std::memcpy(out + static_cast<std::size_t>(i) * bytes, frame(lane, from), bytes);
    rings_.copy_run(lane, from, tick - from + 1, out + static_cast<std::size_t>(missing) * bytes);
  }

  void gather_one(std::int64_t lane, std::int64_t tick, std::int64_t i, const BatchView& batch) const {
    const std::int64_t k = reach(lane, tick);
    std::uint8_t* obs = batch.obs + i * batch.obs_stride;
    std::uint8_t* next_obs = batch.next_obs + i * batch.next_obs_stride;
    gather_stack(lane, tick, obs);
    if (shares_block() && next_obs == obs + shape_.frame_bytes)  // one block: all but the newest frame is there already
      std::memcpy(obs + shape_.stack * shape_.frame_bytes, frame(lane, tick + 1),
                  static_cast<std::size_t>(shape_.frame_bytes));
    else
      gather_stack(lane, tick + k, next_obs);

    double reward = 0.0, discount = 1.0;
    for (std::int64_t j = 1; j <= k; ++j) {
      reward += discount * static_cast<double>(record(lane, tick + j).reward);
      discount *= shape_.gamma;
    }
    if (record(lane, tick + k).flags & kTerminated) discount = 0.0;
    batch.action[i] = record(lane, tick + 1).action;
    batch.reward[i] = static_cast<float>(reward);
    batch.discount[i] = static_cast<float>(discount);
    batch.index[i] = tick * shape_.lanes + lane;
    batch.weight[i] = 1.0f;
  }

  const Shape shape_;
  Rings rings_;
  std::optional<Priorities> priorities_;
  Generator generator_;
  std::vector<std::int64_t> places_;  // where the priorities of the batch lie
  std::int64_t ticks_ = 0;   // appends so far
  std::int64_t valid_ = 0;   // transitions that can be sampled now
  mutable std::mutex mutex_;  // guards everything but the bytes of the spare slot
};

}  // namespace pydqn
