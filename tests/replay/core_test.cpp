// Tests of the C++ core without Python.
//
//   core_test sequences COUNT [SEED]   compares random sequences of calls with a reference implementation
//   core_test threads SECONDS          appends, samples and sets priorities in several threads
//   core_test drift UPDATES            compares rounding errors: SumTree and a tree that adds float32 differences
//   core_test long APPENDS             checks that the process's memory does not grow while the rings are overwritten
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

#include "../../csrc/frame_replay.hpp"

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

using Entries = std::vector<Entry>;  // of one environment, by time step

// The reference implementation: keeps everything that was appended and searches it by definition.
struct Reference {
  const Shape shape;
  std::vector<Entries> envs;

  static std::int64_t time_steps(const Entries& entries) { return static_cast<std::int64_t>(entries.size()); }
  std::int64_t oldest(const Entries& all) const { return std::max<std::int64_t>(0, time_steps(all) - shape.capacity); }

  // The stack that ends at t, or nothing if one of its frames has been overwritten.
  std::optional<std::vector<std::uint8_t>> stack(const Entries& entries, std::int64_t t) const {
    std::vector<std::uint8_t> frames;
    for (std::int64_t i = 0; i < shape.stack; ++i, --t) {
      if (t < oldest(entries)) return std::nullopt;
      const Entry& entry = entries[static_cast<std::size_t>(t)];
      frames.insert(frames.begin(), entry.frame.begin(), entry.frame.end());
      if (entry.first) {
        const std::vector<std::uint8_t> pad =
            shape.padding == Padding::kZero ? std::vector<std::uint8_t>(entry.frame.size(), 0) : entry.frame;
        for (++i; i < shape.stack; ++i) frames.insert(frames.begin(), pad.begin(), pad.end());
        return frames;
      }
    }
    return frames;
  }

  // The transition that starts at t, or nothing if it cannot be sampled.
  std::optional<Transition> transition(const Entries& entries, std::int64_t t) const {
    const auto obs = stack(entries, t);
    if (!obs) return std::nullopt;
    double reward = 0.0, discount = 1.0;
    for (std::int64_t k = 1;; ++k) {
      if (t + k >= time_steps(entries)) return std::nullopt;  // the window is not complete yet
      const Entry& next = entries[static_cast<std::size_t>(t + k)];
      const std::int32_t action = entries[static_cast<std::size_t>(t + 1)].action;
      if (next.first || next.history) {  // the episode ended without a flag
        if (k == 1) return std::nullopt;
        return Transition{*obs, *stack(entries, t + k - 1), action, static_cast<float>(reward),
                          static_cast<float>(discount)};
      }
      reward += discount * static_cast<double>(next.reward);
      discount *= shape.gamma;
      if (k == shape.n_step || next.terminated || next.truncated)
        return Transition{*obs, *stack(entries, t + k), action, static_cast<float>(reward),
                          next.terminated ? 0.0f : static_cast<float>(discount)};
    }
  }

  // All transitions that can be sampled, by index.
  std::map<std::int64_t, Transition> transitions() const {
    std::map<std::int64_t, Transition> found;
    for (std::size_t env = 0; env < envs.size(); ++env) {
      std::int64_t left = shape.limit ? shape.limit : shape.capacity;
      for (std::int64_t t = time_steps(envs[env]) - 1; t >= 0 && left > 0; --t)
        if (const auto one = transition(envs[env], t)) {
          found[t * shape.num_envs + static_cast<std::int64_t>(env)] = *one;
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
    require(found != expected.end(), "every transition in the batch is valid");
    const Transition& wanted = found->second;
    const auto part = static_cast<std::ptrdiff_t>(i) * batch.stride;
    require(std::equal(wanted.obs.begin(), wanted.obs.end(), batch.obs.begin() + part), "obs");
    require(std::equal(wanted.next_obs.begin(), wanted.next_obs.end(), batch.next_obs.begin() + part), "next_obs");
    require(wanted.action == batch.action[i], "action");
    require(wanted.reward == batch.reward[i], "reward");
    require(wanted.discount == batch.discount[i], "discount");
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
    replay_ = std::make_unique<FrameReplay>(shape_, seed);
    reference_ = std::make_unique<Reference>(
        Reference{shape_, std::vector<Entries>(static_cast<std::size_t>(shape_.num_envs))});
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
  std::int64_t pick(std::int64_t bound) {
    return static_cast<std::int64_t>(random_() % static_cast<std::uint64_t>(bound));
  }

  void append() {
    std::vector<std::int64_t> envs;
    for (std::int64_t env = 0; env < shape_.num_envs; ++env)
      if (!uneven_ || pick(3) > 0) envs.push_back(env);
    if (uneven_) std::shuffle(envs.begin(), envs.end(), random_);
    const std::size_t count = envs.size();
    std::vector<std::int32_t> action(count);
    std::vector<float> reward(count);
    const auto flags = [count] { return std::make_unique<bool[]>(count); };
    auto terminated = flags(), truncated = flags(), first = flags(), history = flags();
    std::vector<std::vector<std::uint8_t>> frames(count);
    for (std::size_t i = 0; i < count; ++i) {
      for (std::int64_t byte = 0; byte < shape_.frame_bytes; ++byte)
        frames[i].push_back(static_cast<std::uint8_t>(random_()));
      action[i] = static_cast<std::int32_t>(pick(18));
      reward[i] = static_cast<float>(pick(7)) - 3.0f;
      first[i] = entries(envs[i]).empty() || pick(8) == 0;
      history[i] = pick(9) == 0;
      terminated[i] = pick(9) == 0;
      truncated[i] = pick(9) == 0;
    }
    const bool in_slot = !uneven_ && pick(2);
    std::uint8_t* slot = uneven_ ? nullptr : replay_->next_slot();
    const std::int64_t env_bytes = replay_->env_bytes();
    if (in_slot)
      for (std::size_t i = 0; i < count; ++i)
        std::memcpy(slot + static_cast<std::int64_t>(i) * env_bytes, frames[i].data(), frames[i].size());
    replay_->append(
        static_cast<std::int64_t>(count), uneven_ ? envs.data() : nullptr,
        [&](std::int64_t i) { return in_slot ? slot + i * env_bytes : frames[static_cast<std::size_t>(i)].data(); },
        action.data(), reward.data(), terminated.get(), truncated.get(), first.get(), history.get());
    for (std::size_t i = 0; i < count; ++i)
      entries(envs[i]).push_back(
          first[i] || history[i] ? Entry{frames[i], 0.0f, 0, false, false, first[i], !first[i]}
                                 : Entry{frames[i], reward[i], action[i], terminated[i], truncated[i], false, false});
  }

  Entries& entries(std::int64_t env) { return reference_->envs[static_cast<std::size_t>(env)]; }

  void check() {
    const auto expected = reference_->transitions();
    std::vector<std::int64_t> indices;
    for (const auto& entry : expected) indices.push_back(entry.first);
    require(replay_->valid_indices() == indices, "valid_indices");
    require(replay_->size() == static_cast<std::int64_t>(indices.size()), "size");
    Buffers batch(shape_, static_cast<std::int64_t>(indices.size()));
    replay_->gather(indices.data(), static_cast<std::int64_t>(indices.size()), batch.view());
    compare(batch, expected);
    for (std::int64_t env = 0; env < shape_.num_envs; ++env)
      if (entries(env).empty()) return;
    std::vector<std::uint8_t> latest(static_cast<std::size_t>(shape_.num_envs * shape_.stack * shape_.frame_bytes));
    replay_->latest(latest.data());
    for (std::int64_t env = 0; env < shape_.num_envs; ++env) {
      const auto newest = latest.begin() + env * shape_.stack * shape_.frame_bytes;
      if (const auto stack = reference_->stack(entries(env), Reference::time_steps(entries(env)) - 1))
        require(std::equal(stack->begin(), stack->end(), newest), "latest");
    }
  }

  void draw() {
    if (replay_->size() == 0) return;
    Buffers batch(shape_, 16);
    replay_->sample(16, 0.5, 0.1, batch.view());
    compare(batch, reference_->transitions());
    if (!shape_.alpha) return;
    std::vector<double> priority;
    for (int i = 0; i < 16; ++i) priority.push_back(std::ldexp(1.0, static_cast<int>(pick(60)) - 30));
    replay_->update_priorities(batch.index.data(), priority.data(), 16);
  }

  // Copies the buffer as saving and loading do, in chunks of random length, and continues with the copy.
  void reload() {
    auto other = std::make_unique<FrameReplay>(shape_, 0);
    const std::vector<std::int64_t> all_time_steps = replay_->env_time_steps();
    other->set_generator_state(replay_->generator_state());
    other->set_largest_priority(replay_->largest_priority());
    other->set_time_steps(all_time_steps);
    for (std::int64_t env = 0; env < shape_.num_envs; ++env) {
      const std::int64_t time_steps = all_time_steps[static_cast<std::size_t>(env)], stored = replay_->stored(env);
      for (std::int64_t position = 0; position < stored;) {
        const std::int64_t count = std::min(stored - position, 1 + pick(7));
        const auto size = static_cast<std::size_t>(count);
        std::vector<std::uint8_t> frames(size * static_cast<std::size_t>(shape_.frame_bytes)), flags(size);
        std::vector<float> reward(size);
        std::vector<std::int32_t> action(size);
        const FrameReplay::Columns columns{frames.data(), reward.data(), action.data(), flags.data()};
        replay_->export_run(env, position, count, time_steps, columns);
        other->import_run(env, position, count, columns);
        position += count;
      }
      if (!shape_.alpha) continue;
      std::vector<double> priorities(static_cast<std::size_t>(stored));
      replay_->export_priorities(env, time_steps, priorities.data());
      other->import_priorities(env, priorities.data());
    }
    other->end_import();
    if (replay_->size() > 0) {
      Buffers one(shape_, 8), two(shape_, 8);
      replay_->sample(8, 0.4, 0.1, one.view());
      other->sample(8, 0.4, 0.1, two.view());
      require(one.index == two.index && one.obs == two.obs && one.weight == two.weight, "the copy draws the same");
    }
    replay_ = std::move(other);
  }

  std::mt19937_64 random_;
  Shape shape_{};
  bool uneven_ = false;  // environments do not step together
  std::unique_ptr<FrameReplay> replay_;
  std::unique_ptr<Reference> reference_;
};

// Every byte of a frame, its action and its reward equal its time step modulo 250, so that a torn read is detected.
int threads(double seconds) {
  const Shape shape{64, 3, 16, 4, 3, 1.0, Padding::kZero, 0.6};
  FrameReplay replay(shape, 1);
  std::atomic<bool> done{false};
  std::atomic<std::int64_t> drawn{0};
  const auto append = [&](std::uint8_t t) {
    const std::vector<std::uint8_t> frame(16, t);
    const std::int32_t action[3] = {t, t, t};
    const float reward[3] = {1.0f * t, 1.0f * t, 1.0f * t};
    const bool no[3] = {}, all[3] = {true, true, true};
    const bool *truncated = t % 50 == 49 ? all : no, *first = t % 50 == 0 ? all : no;
    replay.append(3, nullptr, [&](std::int64_t) { return frame.data(); }, action, reward, no, truncated, first);
  };
  append(0);
  std::vector<std::thread> readers;
  for (int reader = 0; reader < 3; ++reader)
    readers.emplace_back([&] {
      Buffers batch(shape, 8);
      const std::vector<double> priority(8, 2.0);
      while (!done) {
        if (replay.size() == 0) continue;
        replay.sample(8, 0.5, 0.1, batch.view());
        for (std::size_t i = 0; i < 8; ++i) {
          const std::uint8_t* last = batch.obs.data() + (static_cast<std::int64_t>(i) + 1) * batch.stride - 16;
          for (int byte = 0; byte < 16; ++byte) require(last[byte] == last[0], "a frame is whole");
          require(batch.action[i] == (last[0] + 1) % 250, "an action follows its frame");
        }
        replay.update_priorities(batch.index.data(), priority.data(), 8);
        drawn += 8;
      }
    });
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  std::int64_t appends = 1;
  for (; std::chrono::steady_clock::now() < end; ++appends) append(static_cast<std::uint8_t>(appends % 250));
  done = true;
  for (auto& reader : readers) reader.join();
  std::printf("threads: %lld appends, %lld transitions checked\n", static_cast<long long>(appends),
              static_cast<long long>(drawn.load()));
  return 0;
}

// The baseline is a binary tree of float32 sums; as is common, it adds the difference to every node on the path.
int drift(std::int64_t updates) {
  const std::int64_t leaves = 1 << 20;
  SumTree tree(leaves);
  std::vector<float> baseline(2 * static_cast<std::size_t>(leaves), 0.0f);
  std::mt19937_64 random(0);
  for (std::int64_t i = 0; i < updates; ++i) {
    const auto leaf = static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(leaves));
    const double value = std::pow(static_cast<double>(random() >> 11) * 0x1p-53 * 10.0, 0.6);
    tree.set(leaf, value);
    auto node = static_cast<std::size_t>(leaf + leaves);
    const float difference = static_cast<float>(value) - baseline[node];
    for (; node >= 1; node /= 2) baseline[node] += difference;
  }
  long double exact = 0.0L, exact_baseline = 0.0L;
  for (std::int64_t leaf = 0; leaf < leaves; ++leaf) {
    exact += tree[leaf];
    exact_baseline += baseline[static_cast<std::size_t>(leaf + leaves)];
  }
  const double ours = std::abs(static_cast<double>((tree.total() - exact) / exact));
  const double theirs = std::abs(static_cast<double>((baseline[1] - exact_baseline) / exact_baseline));
  std::printf("drift: relative error of the total after %lld updates of %lld leaves: %.1e; float32 differences: %.1e\n",
              static_cast<long long>(updates), static_cast<long long>(leaves), ours, theirs);
  require(ours < 1e-13, "rounding errors do not accumulate");
  return 0;
}

// 0 on systems other than Linux, where nothing is checked.
long resident_kilobytes() {
  long pages = 0, ignored = 0;
  std::ifstream("/proc/self/statm") >> ignored >> pages;
  return pages * 4;
}

int long_run(std::int64_t appends) {
  const Shape shape{10000, 8, 64, 4, 3, 0.99, Padding::kZero, 0.6};
  FrameReplay replay(shape, 0);
  Buffers batch(shape, 32);
  const std::vector<std::uint8_t> frame(64, 7);
  const std::int32_t action[8] = {};
  const float reward[8] = {};
  const bool no[8] = {}, all[8] = {true, true, true, true, true, true, true, true};
  long early = 0;
  for (std::int64_t t = 0; t < appends; ++t) {
    const bool* first = t % 700 == 0 ? all : no;
    replay.append(8, nullptr, [&](std::int64_t) { return frame.data(); }, action, reward, no, no, first);
    if (t % 100 == 99) replay.sample(32, 0.4, 0.1, batch.view());
    if (t == 30000) early = resident_kilobytes();  // every slot has been written
  }
  const long late = resident_kilobytes();
  std::printf("long: %lld appends to 8 environments, resident memory %ld KB after 30,000 and %ld KB at the end\n",
              static_cast<long long>(appends), early, late);
  require(appends <= 30000 || late - early < 256, "memory does not grow");
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
  std::printf("sequences: %lld of 120 appends each agree with the reference\n", static_cast<long long>(count));
  return 0;
}
