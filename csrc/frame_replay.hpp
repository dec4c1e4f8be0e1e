// Frame-indexed replay memory. This file knows no Python: the binding file checks what callers pass in.
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
#include <mutex>
#include <new>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "lazy_memory.hpp"

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
        slots_(shape.capacity + 1),
        frames_(checked_bytes(shape)),
        records_(static_cast<std::size_t>(shape.lanes * slots_) * sizeof(Record)),
        generator_(seed) {}

  const Shape& shape() const { return shape_; }
  std::int64_t slots() const { return slots_; }
  std::size_t bytes() const { return frames_.bytes() + records_.bytes(); }

  std::int64_t ticks() const { Lock lock(mutex_); return ticks_; }
  std::int64_t size() const { Lock lock(mutex_); return valid_; }

  // The slot that the next append fills, in lane 0; lane i's lies i * lane_bytes() further on.
  std::uint8_t* next_slot() const { Lock lock(mutex_); return frame(0, ticks_); }
  std::int64_t lane_bytes() const { return slots_ * shape_.frame_bytes; }

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

  // Draws `count` transitions uniformly, with replacement, from exactly the valid ones.
  void sample(std::int64_t count, const BatchView& batch) {
    Lock lock(mutex_);
    if (valid_ == 0) throw std::runtime_error("sample: no transition can be sampled yet");
    for (std::int64_t i = 0; i < count; ++i) {
      const auto [lane, tick] = draw();
      gather_one(lane, tick, i, batch);
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
    if (ticks != ticks_) throw std::runtime_error("save: another thread appended while the replay was being saved");
    const std::int64_t start = oldest() + position;
    copy_run(lane, start, count, out.frames);
    for (std::int64_t i = 0; i < count; ++i) {
      const Record& entry = record(lane, start + i);
      out.reward[i] = entry.reward;
      out.action[i] = entry.action;
      out.flags[i] = entry.flags & kStoredFlags;
    }
  }

  // Fills an empty memory: set_ticks, then import_run until all min(ticks, capacity) ticks of every lane are in, then
  // end_import.
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
      const std::int64_t tick = oldest() + position + i;
      std::memcpy(frame(lane, tick), in.frames + i * shape_.frame_bytes, static_cast<std::size_t>(shape_.frame_bytes));
      record(lane, tick) = Record{in.reward[i], in.action[i], static_cast<std::uint8_t>(in.flags[i] & kStoredFlags)};
    }
  }
  void end_import() {
    Lock lock(mutex_);
    for (std::int64_t lane = 0; lane < shape_.lanes; ++lane)
      for (std::int64_t tick = oldest(); tick < ticks_; ++tick) refresh(lane, tick);
  }

  std::string generator_state() const {
    Lock lock(mutex_);
    std::ostringstream text;
    text << generator_;
    return text.str();
  }
  void set_generator_state(const std::string& state) {
    std::istringstream text(state);
    std::mt19937_64 generator;
    text >> generator;
    // A state of zeros would give zeros for ever, and drawing below a bound would never end.
    std::mt19937_64 ahead = generator;
    bool alive = false;
    for (std::size_t i = 0; i < std::mt19937_64::state_size; ++i) alive |= ahead() != 0;
    if (text.fail() || !alive)
      throw std::invalid_argument("generator: expected the state of a 64-bit Mersenne twister");
    Lock lock(mutex_);
    generator_ = generator;
  }

 private:
  enum Flag : std::uint8_t { kFirst = 1, kTerminated = 2, kTruncated = 4, kValid = 8 };
  static constexpr std::uint8_t kStoredFlags = kFirst | kTerminated | kTruncated;

  struct Record {
    float reward;
    std::int32_t action;
    std::uint8_t flags;
  };

  static std::size_t checked_bytes(const Shape& shape) {
    const auto limit = static_cast<double>(std::numeric_limits<std::int64_t>::max()) / 4;
    if (static_cast<double>(shape.capacity + 1) * static_cast<double>(shape.lanes) *
            static_cast<double>(shape.frame_bytes) > limit)
      throw std::bad_alloc();
    return static_cast<std::size_t>((shape.capacity + 1) * shape.lanes * shape.frame_bytes);
  }

  std::int64_t oldest() const { return std::max<std::int64_t>(0, ticks_ - shape_.capacity); }

  std::uint8_t* frame(std::int64_t lane, std::int64_t tick) const {
    return frames_.data() + (lane * slots_ + tick % slots_) * shape_.frame_bytes;
  }
  Record& record(std::int64_t lane, std::int64_t tick) const {
    return reinterpret_cast<Record*>(records_.data())[lane * slots_ + tick % slots_];
  }
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
    valid_ += static_cast<std::int64_t>(is) - static_cast<std::int64_t>(was);
  }

  // One append can change validity in three places only: the tick that just became unreadable, the ticks whose
  // stack reached back to it, and the newest ticks, whose windows the new frame may have closed.
  void refresh_after_append(std::int64_t lane) {
    const std::int64_t start = oldest();
    if (start > 0) {
      Record& gone = record(lane, start - 1);  // still in the spare slot
      if (gone.flags & kValid) --valid_;
      gone.flags = static_cast<std::uint8_t>(gone.flags & ~kValid);
      const std::int64_t stop = std::min(start + shape_.stack - 1, ticks_);
      for (std::int64_t tick = start; tick < stop; ++tick) refresh(lane, tick);
    }
    for (std::int64_t tick = std::max(start, ticks_ - 1 - shape_.n_step); tick < ticks_; ++tick) refresh(lane, tick);
  }

  // Uniform on [0, bound): multiply-shift with rejection (Lemire 2019), so that it is exact and the same everywhere,
  // which std::uniform_int_distribution is not.
  std::uint64_t below(std::uint64_t bound) {
    __extension__ using Product = unsigned __int128;
    const std::uint64_t threshold = (0 - bound) % bound;
    for (;;) {
      const Product product = static_cast<Product>(generator_()) * bound;
      if (static_cast<std::uint64_t>(product) >= threshold) return static_cast<std::uint64_t>(product >> 64);
    }
  }

  std::pair<std::int64_t, std::int64_t> draw() {
    const std::int64_t start = oldest();
    const auto held = static_cast<std::uint64_t>((ticks_ - start) * shape_.lanes);
    // Nearly every stored frame starts a transition, so the first draw mostly succeeds. Where few do (episodes of
    // one step, say), counting them out is bounded and just as uniform.
    for (int attempt = 0; attempt < 256; ++attempt) {
      const auto drawn = static_cast<std::int64_t>(below(held));
      const std::int64_t lane = drawn % shape_.lanes, tick = start + drawn / shape_.lanes;
      if (record(lane, tick).flags & kValid) return {lane, tick};
    }
    auto remaining = static_cast<std::int64_t>(below(static_cast<std::uint64_t>(valid_)));
    for (std::int64_t lane = 0; lane < shape_.lanes; ++lane)
      for (std::int64_t tick = start; tick < ticks_; ++tick)
        if (record(lane, tick).flags & kValid && remaining-- == 0) return {lane, tick};
    throw std::logic_error("sample: the count of valid transitions is wrong");  // unreachable
  }

  // Copies the held ticks [from, from + count) of a lane, which wrap at most once.
  void copy_run(std::int64_t lane, std::int64_t from, std::int64_t count, std::uint8_t* out) const {
    const std::int64_t before_wrap = std::min(count, slots_ - from % slots_);
    const auto bytes = static_cast<std::size_t>(shape_.frame_bytes);
    std::memcpy(out, frame(lane, from), static_cast<std::size_t>(before_wrap) * bytes);
    if (before_wrap < count)
      std::memcpy(out + static_cast<std::size_t>(before_wrap) * bytes, frame(lane, from + before_wrap),
                  static_cast<std::size_t>(count - before_wrap) * bytes);
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
    copy_run(lane, from, tick - from + 1, out + static_cast<std::size_t>(missing) * bytes);
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
  const std::int64_t slots_;
  LazyMemory frames_;
  LazyMemory records_;
  std::mt19937_64 generator_;
  std::int64_t ticks_ = 0;   // appends so far
  std::int64_t valid_ = 0;   // transitions that can be sampled now
  mutable std::mutex mutex_;  // guards everything but the bytes of the spare slot
};

}  // namespace pydqn
