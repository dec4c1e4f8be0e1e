// The core alone, without Python: against a slow twin, under sanitizers, and for long.
//
//   core_test sequences COUNT [SEED]   random sequences of calls, compared with a twin that keeps everything
//   core_test threads SECONDS          appends, samples and sets priorities from several threads
//   core_test drift UPDATES            sums of a tree after so many updates, beside one that adds differences in float32
//   core_test long APPENDS             memory of the process while a ring goes round and round
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../csrc/frame_replay.hpp"

using namespace pydqn;

namespace {

std::string context;

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "failed: %s (%s)\n", what, context.c_str());
  std::exit(1);
}

struct Entry {
  std::vector<std::uint8_t> frame;
  float reward;
  std::int32_t action;
  bool terminated, truncated, first, history;
};

struct Transition {
  std::vector<std::uint8_t> obs, next_obs;
  std::int32_t action;
  float reward, discount;
};

// Everything that ever happened, read by the words of the contract.
struct Twin {
  const Shape shape;
  std::vector<std::vector<Entry>> lanes;

  static std::int64_t ticks(const std::vector<Entry>& lane) { return static_cast<std::int64_t>(lane.size()); }
  std::int64_t oldest(const std::vector<Entry>& lane) const {
    return std::max<std::int64_t>(0, ticks(lane) - shape.capacity);
  }

  // The frames of a stack, or nothing where one of them is not held any more.
  std::optional<std::vector<std::uint8_t>> stack(const std::vector<Entry>& lane, std::int64_t tick) const {
    std::vector<std::uint8_t> frames;
    std::int64_t t = tick;
    for (std::int64_t i = 0; i < shape.stack; ++i) {
      if (t < oldest(lane)) return std::nullopt;
      const auto& frame = lane[static_cast<std::size_t>(t)].frame;
      frames.insert(frames.begin(), frame.begin(), frame.end());
      if (lane[static_cast<std::size_t>(t)].first) {
        const std::vector<std::uint8_t> pad =
            shape.padding == Padding::kZero ? std::vector<std::uint8_t>(frame.size(), 0) : frame;
        for (++i; i < shape.stack; ++i) frames.insert(frames.begin(), pad.begin(), pad.end());
        return frames;
      }
      --t;
    }
    return frames;
  }

  std::optional<Transition> at(std::size_t number, std::int64_t tick) const {
    const auto& lane = lanes[number];
    if (tick < oldest(lane)) return std::nullopt;
    const auto obs = stack(lane, tick);
    if (!obs) return std::nullopt;
    double reward = 0.0, discount = 1.0;
    for (std::int64_t k = 1;; ++k) {
      if (tick + k >= ticks(lane)) return std::nullopt;  // the window is still open
      const Entry& next = lane[static_cast<std::size_t>(tick + k)];
      if (next.first || next.history) {  // cut off without a flag
        if (k == 1) return std::nullopt;
        return Transition{*obs, *stack(lane, tick + k - 1), lane[static_cast<std::size_t>(tick + 1)].action,
                          static_cast<float>(reward), static_cast<float>(discount)};
      }
      reward += discount * static_cast<double>(next.reward);
      discount *= shape.gamma;
      if (k == shape.n_step || next.terminated || next.truncated)
        return Transition{*obs, *stack(lane, tick + k), lane[static_cast<std::size_t>(tick + 1)].action,
                          static_cast<float>(reward), next.terminated ? 0.0f : static_cast<float>(discount)};
    }
  }

  std::map<std::int64_t, Transition> transitions() const {
    std::map<std::int64_t, Transition> found;
    for (std::size_t lane = 0; lane < lanes.size(); ++lane) {
      std::int64_t left = shape.limit ? shape.limit : shape.capacity;
      for (std::int64_t tick = ticks(lanes[lane]) - 1; tick >= 0 && left > 0; --tick)
        if (const auto transition = at(lane, tick)) {
          found[tick * shape.lanes + static_cast<std::int64_t>(lane)] = *transition;
          --left;
        }
    }
    return found;
  }
};

struct Buffers {
  Buffers(const Shape& shape, std::int64_t count)
      : stride(shape.stack * shape.frame_bytes),
        obs(static_cast<std::size_t>(count * stride)), next_obs(obs.size()), action(static_cast<std::size_t>(count)),
        index(action.size()), reward(action.size()), discount(action.size()), weight(action.size()) {}
  BatchView view() {
    return {obs.data(), stride, next_obs.data(), stride, action.data(), reward.data(), discount.data(), index.data(),
            weight.data()};
  }
  std::int64_t stride;
  std::vector<std::uint8_t> obs, next_obs;
  std::vector<std::int64_t> action, index;
  std::vector<float> reward, discount, weight;
};

void compare(const Buffers& batch, const std::map<std::int64_t, Transition>& expected) {
  for (std::size_t i = 0; i < batch.index.size(); ++i) {
    const auto found = expected.find(batch.index[i]);
    require(found != expected.end(), "a sampled transition may be sampled");
    const Transition& twin = found->second;
    const auto part = static_cast<std::ptrdiff_t>(i) * batch.stride;
    require(std::equal(twin.obs.begin(), twin.obs.end(), batch.obs.begin() + part), "obs");
    require(std::equal(twin.next_obs.begin(), twin.next_obs.end(), batch.next_obs.begin() + part), "next_obs");
    require(twin.action == batch.action[i], "action");
    require(twin.reward == batch.reward[i], "reward");
    require(twin.discount == batch.discount[i], "discount");
    require(batch.weight[i] > 0.0f && batch.weight[i] <= 1.0f, "weight");
  }
}

class Sequence {
 public:
  explicit Sequence(std::uint64_t seed) : random_(seed) {
    shape_ = Shape{1 + pick(24), 1 + pick(4), 1 + pick(9), 1 + pick(4), 1 + pick(4), pick(2) ? 0.9 : 1.0,
                   pick(2) ? Padding::kZero : Padding::kFirst, std::nullopt};
    if (pick(2)) shape_.alpha = 0.25 * static_cast<double>(pick(5));
    if (pick(2)) shape_.limit = 1 + pick(shape_.capacity);
    uneven_ = pick(2);
    memory_ = std::make_unique<FrameReplay>(shape_, seed);
    twin_ = std::make_unique<Twin>(Twin{shape_, std::vector<std::vector<Entry>>(static_cast<std::size_t>(shape_.lanes))});
  }

  void run() {
    for (int step = 0; step < 120; ++step) {
      append();
      if (pick(6) == 0) check();
      if (pick(10) == 0) draw();
      if (pick(40) == 0) reload();
    }
    check();
    draw();
  }

 private:
  std::int64_t pick(std::int64_t bound) { return static_cast<std::int64_t>(random_() % static_cast<std::uint64_t>(bound)); }

  void append() {
    std::vector<std::int64_t> lanes;
    for (std::int64_t lane = 0; lane < shape_.lanes; ++lane)
      if (!uneven_ || pick(3) > 0) lanes.push_back(lane);
    if (uneven_) std::shuffle(lanes.begin(), lanes.end(), random_);
    const std::size_t count = lanes.size();
    std::vector<std::int32_t> action(count);
    std::vector<float> reward(count);
    const auto flags = [count] { return std::make_unique<bool[]>(count); };
    auto terminated = flags(), truncated = flags(), first = flags(), history = flags();
    std::vector<std::vector<std::uint8_t>> frames(count);
    for (std::size_t i = 0; i < count; ++i) {
      for (std::int64_t byte = 0; byte < shape_.frame_bytes; ++byte) frames[i].push_back(static_cast<std::uint8_t>(random_()));
      action[i] = static_cast<std::int32_t>(pick(18));
      reward[i] = static_cast<float>(pick(7)) - 3.0f;
      first[i] = lane_of(lanes[i]).empty() || pick(8) == 0;
      history[i] = pick(9) == 0;
      terminated[i] = pick(9) == 0;
      truncated[i] = pick(9) == 0;
    }
    const bool in_place = !uneven_ && pick(2);
    std::uint8_t* slot = uneven_ ? nullptr : memory_->next_slot();
    const std::int64_t lane_bytes = memory_->lane_bytes();
    if (in_place)
      for (std::size_t i = 0; i < count; ++i)
        std::memcpy(slot + static_cast<std::int64_t>(i) * lane_bytes, frames[i].data(), frames[i].size());
    memory_->append(
        static_cast<std::int64_t>(count), uneven_ ? lanes.data() : nullptr,
        [&](std::int64_t i) { return in_place ? slot + i * lane_bytes : frames[static_cast<std::size_t>(i)].data(); },
        action.data(), reward.data(), terminated.get(), truncated.get(), first.get(), history.get());
    for (std::size_t i = 0; i < count; ++i)
      lane_of(lanes[i]).push_back(first[i]     ? Entry{frames[i], 0.0f, 0, false, false, true, false}
                                  : history[i] ? Entry{frames[i], 0.0f, 0, false, false, false, true}
                                               : Entry{frames[i], reward[i], action[i], terminated[i], truncated[i],
                                                       false, false});
  }

  std::vector<Entry>& lane_of(std::int64_t lane) { return twin_->lanes[static_cast<std::size_t>(lane)]; }

  void check() {
    const auto expected = twin_->transitions();
    std::vector<std::int64_t> indices;
    for (const auto& entry : expected) indices.push_back(entry.first);
    require(memory_->valid_indices() == indices, "valid_indices");
    require(memory_->size() == static_cast<std::int64_t>(indices.size()), "size");
    Buffers batch(shape_, static_cast<std::int64_t>(indices.size()));
    memory_->gather(indices.data(), static_cast<std::int64_t>(indices.size()), batch.view());
    compare(batch, expected);
    for (std::int64_t lane = 0; lane < shape_.lanes; ++lane)
      if (lane_of(lane).empty()) return;
    std::vector<std::uint8_t> latest(static_cast<std::size_t>(shape_.lanes * shape_.stack * shape_.frame_bytes));
    memory_->latest(latest.data());
    if (shape_.capacity >= shape_.stack)
      for (std::int64_t lane = 0; lane < shape_.lanes; ++lane) {
        const auto stack = twin_->stack(lane_of(lane), Twin::ticks(lane_of(lane)) - 1);
        if (stack)
          require(std::equal(stack->begin(), stack->end(),
                             latest.begin() + lane * shape_.stack * shape_.frame_bytes), "latest");
      }
  }

  void draw() {
    if (memory_->size() == 0) return;
    Buffers batch(shape_, 16);
    memory_->sample(16, 0.5, batch.view());
    compare(batch, twin_->transitions());
    if (!shape_.alpha) return;
    std::vector<double> priority;
    for (int i = 0; i < 16; ++i) priority.push_back(std::ldexp(1.0, static_cast<int>(pick(60)) - 30));
    memory_->update_priorities(batch.index.data(), priority.data(), 16);
  }

  // Saves and loads, in pieces of random length, and goes on with what was loaded.
  void reload() {
    auto other = std::make_unique<FrameReplay>(shape_, 0);
    const std::vector<std::int64_t> all_ticks = memory_->ticks();
    other->set_generator_state(memory_->generator_state());
    other->set_largest_priority(memory_->largest_priority());
    other->set_ticks(all_ticks);
    for (std::int64_t lane = 0; lane < shape_.lanes; ++lane) {
      const std::int64_t ticks = all_ticks[static_cast<std::size_t>(lane)], stored = memory_->stored(lane);
      for (std::int64_t position = 0; position < stored;) {
        const std::int64_t count = std::min(stored - position, 1 + pick(7));
        const auto size = static_cast<std::size_t>(count);
        std::vector<std::uint8_t> frames(size * static_cast<std::size_t>(shape_.frame_bytes)), flags(size);
        std::vector<float> reward(size);
        std::vector<std::int32_t> action(size);
        const FrameReplay::Columns columns{frames.data(), reward.data(), action.data(), flags.data()};
        memory_->export_run(lane, position, count, ticks, columns);
        other->import_run(lane, position, count, columns);
        position += count;
      }
      if (!shape_.alpha) continue;
      std::vector<double> priorities(static_cast<std::size_t>(stored));
      memory_->export_priorities(lane, ticks, priorities.data());
      other->import_priorities(lane, priorities.data());
    }
    other->end_import();
    if (memory_->size() > 0) {
      Buffers one(shape_, 8), two(shape_, 8);
      memory_->sample(8, 0.4, one.view());
      other->sample(8, 0.4, two.view());
      require(one.index == two.index && one.obs == two.obs && one.weight == two.weight, "the loaded memory draws the same");
    }
    memory_ = std::move(other);
  }

  std::mt19937_64 random_;
  Shape shape_{};
  bool uneven_ = false;  // lanes do not step together
  std::unique_ptr<FrameReplay> memory_;
  std::unique_ptr<Twin> twin_;
};

// Frames, actions and rewards all say the tick at which they came, so that a torn read shows.
int threads(double seconds) {
  const Shape shape{64, 3, 16, 4, 3, 1.0, Padding::kZero, 0.6};
  FrameReplay memory(shape, 1);
  std::atomic<bool> over{false};
  std::atomic<std::int64_t> drawn{0};
  const auto append = [&](std::uint8_t tick) {
    std::vector<std::uint8_t> frame(16, tick);
    const std::int32_t action[3] = {tick, tick, tick};
    const float reward[3] = {1.0f * tick, 1.0f * tick, 1.0f * tick};
    const bool no[3] = {false, false, false}, all[3] = {true, true, true};
    memory.append(3, nullptr, [&](std::int64_t) { return frame.data(); }, action, reward, no, tick % 50 == 49 ? all : no,
                  tick % 50 == 0 ? all : no);
  };
  append(0);
  std::vector<std::thread> readers;
  for (int reader = 0; reader < 3; ++reader)
    readers.emplace_back([&] {
      Buffers batch(shape, 8);
      const std::vector<double> priority(8, 2.0);
      while (!over) {
        if (memory.size() == 0) continue;
        memory.sample(8, 0.5, batch.view());
        for (std::size_t i = 0; i < 8; ++i) {
          const std::uint8_t* last = batch.obs.data() + (static_cast<std::int64_t>(i) + 1) * batch.stride - 16;
          for (int byte = 0; byte < 16; ++byte) require(last[byte] == last[0], "a frame is whole");
          require(batch.action[i] == (last[0] + 1) % 250, "an action follows its frame");
        }
        memory.update_priorities(batch.index.data(), priority.data(), 8);
        drawn += 8;
      }
    });
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  std::int64_t ticks = 1;
  for (; std::chrono::steady_clock::now() < end; ++ticks) append(static_cast<std::uint8_t>(ticks % 250));
  over = true;
  for (auto& reader : readers) reader.join();
  std::printf("threads: %lld appends, %lld transitions checked\n", static_cast<long long>(ticks),
              static_cast<long long>(drawn.load()));
  return 0;
}

// A binary tree of float32 sums that adds the difference to every node above, as is common.
int drift(std::int64_t updates) {
  const std::int64_t leaves = 1 << 20;
  SumTree tree(leaves);
  std::vector<float> common(2 * static_cast<std::size_t>(leaves), 0.0f);
  std::mt19937_64 random(0);
  for (std::int64_t i = 0; i < updates; ++i) {
    const auto leaf = static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(leaves));
    const double value = std::pow(static_cast<double>(random() >> 11) * 0x1p-53 * 10.0, 0.6);
    tree.set(leaf, value);
    auto node = static_cast<std::size_t>(leaf + leaves);
    const float difference = static_cast<float>(value) - common[node];
    for (; node >= 1; node /= 2) common[node] += difference;
  }
  long double exact = 0.0L, exact_common = 0.0L;
  for (std::int64_t leaf = 0; leaf < leaves; ++leaf) {
    exact += static_cast<long double>(tree[leaf]);
    exact_common += static_cast<long double>(common[static_cast<std::size_t>(leaf + leaves)]);
  }
  const double ours = std::abs(static_cast<double>((static_cast<long double>(tree.total()) - exact) / exact));
  const double theirs =
      std::abs(static_cast<double>((static_cast<long double>(common[1]) - exact_common) / exact_common));
  std::printf("drift: after %lld updates of %lld leaves the total is off by %.1e of it; float32 differences: %.1e\n",
              static_cast<long long>(updates), static_cast<long long>(leaves), ours, theirs);
  require(ours < 1e-13, "sums depend on the leaves alone");
  return 0;
}

// On Linux; elsewhere 0, and nothing is checked.
long resident_kilobytes() {
  long pages = 0, ignored = 0;
  std::ifstream("/proc/self/statm") >> ignored >> pages;
  return pages * 4;
}

int long_run(std::int64_t appends) {
  const Shape shape{10000, 8, 64, 4, 3, 0.99, Padding::kZero, 0.6};
  FrameReplay memory(shape, 0);
  Buffers batch(shape, 32);
  const std::vector<std::uint8_t> frame(64, 7);
  const std::int32_t action[8] = {};
  const float reward[8] = {};
  const bool no[8] = {}, all[8] = {true, true, true, true, true, true, true, true};
  long early = 0;
  for (std::int64_t tick = 0; tick < appends; ++tick) {
    memory.append(8, nullptr, [&](std::int64_t) { return frame.data(); }, action, reward, no, no, tick % 700 == 0 ? all : no);
    if (tick % 100 == 99) memory.sample(32, 0.4, batch.view());
    if (tick == 30000) early = resident_kilobytes();  // the ring has gone round
  }
  const long late = resident_kilobytes();
  std::printf("long: %lld appends of 8 lanes, resident memory %ld KB after 30,000 and %ld KB at the end\n",
              static_cast<long long>(appends), early, late);
  require(appends <= 30000 || late - early < 256, "memory stays flat");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  const double amount = argc > 2 ? std::atof(argv[2]) : 0.0;
  const auto count = static_cast<std::int64_t>(amount);
  if (what == "threads") return threads(amount);
  if (what == "drift") return drift(count);
  if (what == "long") return long_run(count);
  if (what != "sequences") return 2;
  const std::uint64_t start = argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 0;
  for (std::uint64_t seed = start; seed < start + static_cast<std::uint64_t>(count); ++seed) {
    context = "seed " + std::to_string(seed);
    Sequence(seed).run();
  }
  std::printf("sequences: %lld of 120 appends each equal the twin\n", static_cast<long long>(count));
  return 0;
}
