// Frame-indexed replay memory. This file knows no Python: the binding file checks what callers pass in.
// See rings.hpp for lanes, slots and ticks, episodes.hpp for stacks and windows.
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
        episodes_(shape),
        rings_(episodes_.rings()),
        generator_(seed),
        counts_(static_cast<std::size_t>(shape.lanes), 0),
        retired_(static_cast<std::size_t>(shape.lanes), 0) {
    if (shape.alpha) priorities_.emplace(shape.lanes * rings_.slots(), *shape.alpha);
  }

  const Shape& shape() const { return shape_; }
  std::size_t bytes() const {
    return rings_.bytes() + (priorities_ ? priorities_->bytes() : 0);
  }

  std::vector<std::int64_t> ticks() const {
    Lock lock(mutex_);
    std::vector<std::int64_t> ticks;
    for (std::int64_t lane = 0; lane < shape_.lanes; ++lane) ticks.push_back(episodes_.ticks(lane));
    return ticks;
  }
  std::int64_t most_ticks() const { Lock lock(mutex_); return episodes_.most_ticks(); }
  std::int64_t size() const { Lock lock(mutex_); return valid_; }

  // The slot that the next append fills, in lane 0; lane i's lies i * lane_bytes() further on.
  std::uint8_t* next_slot() const {
    Lock lock(mutex_);
    if (episodes_.most_ticks() != episodes_.fewest_ticks())
      throw std::runtime_error("next_slot: the lanes have got different numbers of frames, so they have none in common");
    return episodes_.frame(0, episodes_.ticks(0));
  }
  std::int64_t lane_bytes() const { return rings_.slots() * shape_.frame_bytes; }

  // Appends one frame to each of `count` different lanes: those that `lanes` names, or all of them. `frame_at(i)` is the
  // i-th frame's bytes; bytes that already lie in the next slot are not copied. The arrays have `count` entries;
  // `history` may be missing.
  template <typename FrameAt>
  void append(std::int64_t count, const std::int64_t* lanes, FrameAt frame_at, const std::int32_t* action,
              const float* reward, const bool* terminated, const bool* truncated, const bool* first,
              const bool* history = nullptr) {
    Lock lock(mutex_);
    for (std::int64_t i = 0; i < count; ++i)
      if (!first[i] && episodes_.ticks(lanes ? lanes[i] : i) == 0)
        throw std::invalid_argument("first: expected True in every lane at the first append, since no episode is open");
    for (std::int64_t i = 0; i < count; ++i) {
      Record entry{0.0f, 0, kFirst};
      if (!first[i] && history && history[i])
        entry.flags = kHistory;
      else if (!first[i])
        entry = Record{reward[i], action[i],
                       static_cast<std::uint8_t>((terminated[i] ? kTerminated : 0) | (truncated[i] ? kTruncated : 0))};
      episodes_.push(lanes ? lanes[i] : i, frame_at(i), entry);
    }
    for (std::int64_t i = 0; i < count; ++i) refresh_after_append(lanes ? lanes[i] : i);
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
      if (index[i] < 0 || index[i] / shape_.lanes >= episodes_.ticks(index[i] % shape_.lanes))
        throw std::invalid_argument("index: " + std::to_string(index[i]) + " has never been a transition");
      priorities_->prefetch(rings_.place(index[i] % shape_.lanes, index[i] / shape_.lanes));
    }
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t lane = index[i] % shape_.lanes, tick = index[i] / shape_.lanes;
      if (tick >= episodes_.oldest(lane) && record(lane, tick).flags & kValid)
        priorities_->update(rings_.place(lane, tick), priority[i]);
    }
  }

  // Copies out the named transitions; each index must be valid now.
  void gather(const std::int64_t* index, std::int64_t count, const BatchView& batch) const {
    Lock lock(mutex_);
    require_held(index, count);
    for (std::int64_t i = 0; i < count; ++i) gather_one(index[i] % shape_.lanes, index[i] / shape_.lanes, i, batch);
  }

  // How the windows of the named transitions end: after how many steps, and at a termination or cut off.
  void windows(const std::int64_t* index, std::int64_t count, std::int64_t* steps, bool* terminated,
               bool* truncated) const {
    Lock lock(mutex_);
    require_held(index, count);
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t lane = index[i] % shape_.lanes, tick = index[i] / shape_.lanes;
      steps[i] = episodes_.reach(lane, tick);
      const std::uint8_t flags = record(lane, tick + steps[i]).flags;
      terminated[i] = flags & kTerminated;
      truncated[i] = flags & kTruncated || (steps[i] < shape_.n_step && !terminated[i]);
    }
  }

  // All indices that can be sampled now, in order of time.
  std::vector<std::int64_t> valid_indices() const {
    Lock lock(mutex_);
    std::vector<std::int64_t> indices;
    indices.reserve(static_cast<std::size_t>(valid_));
    const std::int64_t start = std::max<std::int64_t>(0, episodes_.fewest_ticks() - shape_.capacity);
    for (std::int64_t tick = start; tick < episodes_.most_ticks(); ++tick)
      for (std::int64_t lane = 0; lane < shape_.lanes; ++lane)
        if (tick >= episodes_.oldest(lane) && tick < episodes_.ticks(lane) && record(lane, tick).flags & kValid)
          indices.push_back(tick * shape_.lanes + lane);
    return indices;
  }

  // The newest stack of each lane, back to back.
  void latest(std::uint8_t* out) const {
    Lock lock(mutex_);
    if (episodes_.fewest_ticks() == 0) throw std::runtime_error("latest: nothing has been appended yet");
    for (std::int64_t lane = 0; lane < shape_.lanes; ++lane)
      episodes_.gather_stack(lane, episodes_.ticks(lane) - 1, out + lane * shape_.stack * shape_.frame_bytes);
  }

  // obs and next_obs of a one-step transition are always the two ends of one run of stack + 1 frames; with a longer
  // window that ended early they are not, so they then need memory of their own.
  bool shares_block() const { return shape_.n_step == 1; }

  // --- what `save` and `load` need: the held ticks of a lane in order of time, and the generator ---

  std::int64_t stored(std::int64_t lane) const { Lock lock(mutex_); return episodes_.held(lane); }

  // Columns of `count` successive ticks of one lane.
  struct Columns {
    std::uint8_t* frames;
    float* reward;
    std::int32_t* action;
    std::uint8_t* flags;
  };

  // Reads `count` held ticks of a lane from the `position`th oldest on. `ticks` is what ticks() said of the lane when the
  // export began: an append in between is refused, because the file would mix two states.
  void export_run(std::int64_t lane, std::int64_t position, std::int64_t count, std::int64_t ticks,
                  const Columns& out) const {
    Lock lock(mutex_);
    require_unchanged(lane, ticks);
    const std::int64_t start = episodes_.oldest(lane) + position;
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
    require_unchanged(lane, ticks);
    if (!priorities_) throw std::logic_error("save: this memory samples uniformly");
    for (std::int64_t tick = episodes_.oldest(lane); tick < ticks; ++tick)
      *out++ = priorities_->value(rings_.place(lane, tick));
  }

  // Fills an empty memory: set_ticks, then import_run until all min(ticks, capacity) ticks of every lane are in, then
  // import_priorities for every lane, if there are any, then end_import.
  void set_ticks(const std::vector<std::int64_t>& ticks) {
    Lock lock(mutex_);
    if (episodes_.most_ticks() != 0) throw std::logic_error("load: expected an empty memory");
    for (const std::int64_t count : ticks)
      if (count < 0 || count > std::numeric_limits<std::int64_t>::max() / 2 / shape_.lanes)
        throw std::invalid_argument("ticks: " + std::to_string(count) + " is out of range");
    episodes_.set_ticks(ticks);
  }
  void import_run(std::int64_t lane, std::int64_t position, std::int64_t count, const Columns& in) {
    Lock lock(mutex_);
    for (std::int64_t i = 0; i < count; ++i) {
      if (in.action[i] < 0 || !std::isfinite(in.reward[i]))
        throw std::invalid_argument("load: expected actions from 0 on and finite rewards");
      const std::int64_t tick = episodes_.oldest(lane) + position + i;
      std::memcpy(episodes_.frame(lane, tick), in.frames + i * shape_.frame_bytes,
                  static_cast<std::size_t>(shape_.frame_bytes));
      record(lane, tick) = Record{in.reward[i], in.action[i], static_cast<std::uint8_t>(in.flags[i] & kStoredFlags)};
    }
  }
  void import_priorities(std::int64_t lane, const double* in) {
    Lock lock(mutex_);
    if (!priorities_) throw std::logic_error("load: this memory samples uniformly");
    for (std::int64_t tick = episodes_.oldest(lane); tick < episodes_.ticks(lane); ++tick)
      priorities_->set_value(rings_.place(lane, tick), *in++);
  }
  void end_import() {
    Lock lock(mutex_);
    for (std::int64_t lane = 0; lane < shape_.lanes; ++lane) {
      retired(lane) = newest(lane, shape_.limit);
      for (std::int64_t tick = episodes_.oldest(lane); tick < episodes_.ticks(lane); ++tick) {
        const double kept = priorities_ ? priorities_->value(rings_.place(lane, tick)) : 0.0;
        refresh(lane, tick);
        if (!priorities_) continue;
        if ((record(lane, tick).flags & kValid) != 0 ? !(kept > 0.0 && kept <= kMostPriority) : kept != 0.0)
          throw std::invalid_argument("priority: " + std::to_string(kept) + " does not fit its transition");
        priorities_->set_value(rings_.place(lane, tick), kept);
      }
    }
  }

  // Changes the exponent of the priorities; see Priorities::set_alpha.
  void set_alpha(double value) { Lock lock(mutex_); if (priorities_) priorities_->set_alpha(value); }

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
  static constexpr std::uint8_t kStoredFlags = kFirst | kTerminated | kTruncated | kHistory;
  static constexpr double kMostPriority = std::numeric_limits<float>::max();  // millions of them still add up

  void require_unchanged(std::int64_t lane, std::int64_t ticks) const {
    if (ticks != episodes_.ticks(lane))
      throw std::runtime_error("save: another thread appended while the replay was being saved");
  }
  void require_held(const std::int64_t* index, std::int64_t count) const {
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t lane = index[i] % shape_.lanes, tick = index[i] / shape_.lanes;
      if (index[i] < 0 || tick < episodes_.oldest(lane) || tick >= episodes_.ticks(lane) ||
          !(record(lane, tick).flags & kValid))
        throw std::invalid_argument("index: " + std::to_string(index[i]) + " is not a transition that is held now");
    }
  }

  Record& record(std::int64_t lane, std::int64_t tick) const { return rings_.record(lane, tick); }
  std::int64_t& count(std::int64_t lane) { return counts_[static_cast<std::size_t>(lane)]; }
  std::int64_t& retired(std::int64_t lane) { return retired_[static_cast<std::size_t>(lane)]; }

  // The tick at which the newest `limit` transitions of a lane begin; 0 where there is no limit.
  std::int64_t newest(std::int64_t lane, std::int64_t limit) const {
    if (limit == 0) return 0;
    std::int64_t tick = episodes_.ticks(lane);
    for (std::int64_t found = 0; tick > episodes_.oldest(lane) && found < limit; --tick)
      found += episodes_.is_transition(lane, tick - 1);
    return tick;
  }

  void refresh(std::int64_t lane, std::int64_t tick) {
    Record& entry = record(lane, tick);
    const bool was = entry.flags & kValid;
    const bool is = tick >= retired(lane) && episodes_.is_transition(lane, tick);
    entry.flags = static_cast<std::uint8_t>(is ? entry.flags | kValid : entry.flags & ~kValid);
    if (is == was) return;
    valid_ += is ? 1 : -1;
    count(lane) += is ? 1 : -1;
    if (priorities_) is ? priorities_->enter(rings_.place(lane, tick)) : priorities_->leave(rings_.place(lane, tick));
  }

  // One append can change validity in four places only: the tick that just became unreadable, the ticks whose
  // stack reached back to it, the newest ticks, whose windows the new frame may have closed, and the oldest
  // transitions, if there are now more than the limit.
  void refresh_after_append(std::int64_t lane) {
    const std::int64_t start = episodes_.oldest(lane), end = episodes_.ticks(lane);
    if (start > 0) {
      Record& gone = record(lane, start - 1);  // still in the spare slot
      if (gone.flags & kValid) {
        --valid_;
        --count(lane);
        if (priorities_) priorities_->leave(rings_.place(lane, start - 1));
      }
      gone.flags = static_cast<std::uint8_t>(gone.flags & ~kValid);
      const std::int64_t stop = std::min(start + shape_.stack - 1, end);
      for (std::int64_t tick = start; tick < stop; ++tick) refresh(lane, tick);
    }
    for (std::int64_t tick = std::max(start, end - 1 - shape_.n_step); tick < end; ++tick) refresh(lane, tick);
    if (shape_.limit == 0) return;
    retired(lane) = std::max(retired(lane), start);
    while (count(lane) > shape_.limit) refresh(lane, retired(lane)++);
  }

  // The lane and the tick of a valid transition.
  std::pair<std::int64_t, std::int64_t> draw() {
    const auto held = static_cast<std::uint64_t>(episodes_.most_held() * shape_.lanes);
    // Nearly every stored frame starts a transition, so the first draw mostly succeeds. Where few do (episodes of
    // one step, lanes that got few frames), counting them out is bounded and just as uniform.
    for (int attempt = 0; attempt < 256; ++attempt) {
      const auto drawn = static_cast<std::int64_t>(generator_.below(held));
      const std::int64_t lane = drawn % shape_.lanes, tick = episodes_.oldest(lane) + drawn / shape_.lanes;
      if (tick < episodes_.ticks(lane) && record(lane, tick).flags & kValid) return {lane, tick};
    }
    auto remaining = static_cast<std::int64_t>(generator_.below(static_cast<std::uint64_t>(valid_)));
    for (std::int64_t lane = 0; lane < shape_.lanes; ++lane)
      for (std::int64_t tick = episodes_.oldest(lane); tick < episodes_.ticks(lane); ++tick)
        if (record(lane, tick).flags & kValid && remaining-- == 0) return {lane, tick};
    throw std::logic_error("sample: the count of valid transitions is wrong");  // unreachable
  }

  // One from the `i`th of `count` equal shares.
  std::pair<std::int64_t, std::int64_t> draw_by_priority(std::int64_t i, std::int64_t count) {
    const double fraction = (static_cast<double>(i) + generator_.fraction()) / static_cast<double>(count);
    const std::int64_t place = priorities_->find(fraction);
    places_[static_cast<std::size_t>(i)] = place;
    const std::int64_t lane = rings_.lane_of(place);
    return {lane, rings_.tick_of(place, episodes_.ticks(lane))};
  }

  void gather_one(std::int64_t lane, std::int64_t tick, std::int64_t i, const BatchView& batch) const {
    const std::int64_t k = episodes_.reach(lane, tick);
    std::uint8_t* obs = batch.obs + i * batch.obs_stride;
    std::uint8_t* next_obs = batch.next_obs + i * batch.next_obs_stride;
    episodes_.gather_stack(lane, tick, obs);
    if (shares_block() && next_obs == obs + shape_.frame_bytes)  // one block: all but the newest frame is there already
      std::memcpy(obs + shape_.stack * shape_.frame_bytes, episodes_.frame(lane, tick + 1),
                  static_cast<std::size_t>(shape_.frame_bytes));
    else
      episodes_.gather_stack(lane, tick + k, next_obs);

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
  Episodes episodes_;
  const Rings& rings_;  // of the episodes
  std::optional<Priorities> priorities_;
  Generator generator_;
  std::vector<std::int64_t> places_;   // where the priorities of the batch lie
  std::vector<std::int64_t> counts_;   // transitions that can be sampled now, per lane
  std::vector<std::int64_t> retired_;  // ticks before this one start none any more, because of the limit, per lane
  std::int64_t valid_ = 0;             // transitions that can be sampled now
  mutable std::mutex mutex_;  // guards everything but the bytes of the spare slot
};

}  // namespace pydqn
