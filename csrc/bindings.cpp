// The Python binding: checks shapes, dtypes and ranges, and releases the GIL. Only this file and arrays.hpp depend on
// Python.
//
// The GIL is released before every call that takes the core's mutex. Thus a thread that waits for the mutex does not
// stop the other threads, and the two locks cannot deadlock.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <optional>

#include "arrays.hpp"
#include "frame_replay.hpp"

namespace pydqn {
namespace {

class Binding {
 public:
  Binding(std::int64_t capacity, std::vector<py::ssize_t> frame_shape, std::int64_t stack, std::int64_t n_step,
          double gamma, std::int64_t num_envs, const py::dtype& dtype, bool pad_with_first, std::optional<double> alpha,
          std::int64_t limit, std::uint64_t seed)
      : frame_shape_(std::move(frame_shape)),
        dtype_(dtype),
        core_({capacity / num_envs, num_envs, frame_bytes(), stack, n_step, gamma,
               pad_with_first ? Padding::kFirst : Padding::kZero, alpha, limit / num_envs},
              seed) {}

  // Called without the GIL (see `Unlocked` below).
  std::int64_t size() const { return core_.size(); }
  std::int64_t time_steps() const { return core_.time_steps(); }
  std::vector<std::int64_t> env_time_steps() const { return core_.env_time_steps(); }
  void set_time_steps(const std::vector<std::int64_t>& time_steps) {
    if (static_cast<py::ssize_t>(time_steps.size()) != num_envs())
      throw std::invalid_argument("time_steps: expected one per environment");
    core_.set_time_steps(time_steps);
  }
  void end_import() { core_.end_import(); }
  std::string generator_state() const { return core_.generator_state(); }
  void set_generator_state(const std::string& state) { core_.set_generator_state(state); }
  double largest_priority() const { return core_.largest_priority(); }
  void set_largest_priority(double value) { core_.set_largest_priority(value); }
  void set_alpha(double value) { core_.set_alpha(value); }

  // The others are called with the GIL and release it before they take the mutex.
  std::size_t bytes() const { return core_.bytes(); }
  std::int64_t stored(std::int64_t env) const {
    py::gil_scoped_release release;
    return core_.stored(env);
  }

  static py::array next_slot(const py::object& self) {
    auto& binding = self.cast<Binding&>();
    auto shape = binding.with_frame_shape({binding.num_envs()});
    std::vector<py::ssize_t> strides(shape.size());
    py::ssize_t stride = binding.dtype_.itemsize();
    for (std::size_t axis = shape.size(); axis-- > 1;) {
      strides[axis] = stride;
      stride *= shape[axis];
    }
    strides[0] = binding.core_.env_bytes();
    const std::uint8_t* slot = nullptr;
    {
      py::gil_scoped_release release;
      slot = binding.core_.next_slot();
    }
    return py::array(binding.dtype_, shape, strides, slot, self);
  }

  // `env_indices` may be None for all environments in order, `history` for none.
  void append(const py::object& frame, const py::object& action, const py::object& reward,
              const py::object& terminated, const py::object& truncated, const py::object& first,
              const py::object& env_indices, const py::object& history) {
    const bool all = env_indices.is_none();
    const std::vector<std::int64_t> envs = all ? std::vector<std::int64_t>() : distinct_envs(env_indices);
    const py::ssize_t n = all ? num_envs() : static_cast<py::ssize_t>(envs.size());
    py::array frames =
        py::isinstance<py::array>(frame) ? py::reinterpret_borrow<py::array>(frame) : py::array::ensure(frame);
    if (!frames) {
      PyErr_Clear();
      reject("frame", "an array", std::string(py::str(py::type::of(frame))));
    }
    require_shape("frame", frames, {n}, frame_shape_);
    require_dtype("frame", frames, dtype_);
    if (!rows_are_contiguous(frames)) frames = py::array::ensure(frames, py::array::c_style);

    const auto firsts = column<bool>("first", first, n, "b", "booleans");
    const auto terminateds = column<bool>("terminated", terminated, n, "b", "booleans");
    const auto truncateds = column<bool>("truncated", truncated, n, "b", "booleans");
    const auto actions64 = column<std::int64_t>("action", action, n, "iu", "integers");
    const auto rewards64 = column<double>("reward", reward, n, "fiub", "real numbers");
    std::optional<py::array_t<bool>> histories;
    if (!history.is_none()) histories = column<bool>("history", history, n, "b", "booleans");
    std::vector<std::int32_t> actions(static_cast<std::size_t>(n));
    std::vector<float> rewards(static_cast<std::size_t>(n));
    for (py::ssize_t i = 0; i < n; ++i) {
      if (firsts.at(i) || (histories && histories->at(i))) continue;  // action and reward are ignored
      const std::int64_t a = actions64.at(i);
      const std::int64_t env = all ? i : envs[static_cast<std::size_t>(i)];
      const auto where = [env] { return " in environment " + std::to_string(env); };
      if (a < 0 || a > std::numeric_limits<std::int32_t>::max())
        reject("action", "integers from 0 to 2147483647", std::to_string(a) + where());
      actions[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(a);
      rewards[static_cast<std::size_t>(i)] = static_cast<float>(rewards64.at(i));
      if (!std::isfinite(rewards[static_cast<std::size_t>(i)]))
        reject("reward", "finite float32 numbers", std::to_string(rewards64.at(i)) + where());
    }

    const auto* base = static_cast<const std::uint8_t*>(frames.data());
    const py::ssize_t stride = frames.strides(0);
    const bool* histories_data = histories ? histories->data() : nullptr;
    py::gil_scoped_release release;
    core_.append(n, all ? nullptr : envs.data(), [=](std::int64_t i) { return base + i * stride; }, actions.data(),
                 rewards.data(), terminateds.data(), truncateds.data(), firsts.data(), histories_data);
  }

  void sample(std::int64_t count, double beta, double uniform_share, py::array obs, py::array next_obs,
              py::array action, py::array reward, py::array discount, py::array index, py::array weight) {
    const BatchView view = batch_view(count, obs, next_obs, action, reward, discount, index, weight);
    py::gil_scoped_release release;
    core_.sample(count, beta, uniform_share, view);
  }

  void update_priorities(const py::array_t<std::int64_t, py::array::c_style>& index,
                         const py::array_t<double, py::array::c_style>& priority) {
    require_shape("priority", priority, {index.size()});
    for (py::ssize_t i = 0; i < priority.size(); ++i) {
      const double value = priority.data()[i];
      if (!(value > 0.0 && value <= std::numeric_limits<float>::max()))
        reject("priority", "positive finite float32 numbers", std::to_string(value));
    }
    const std::int64_t* indices = index.data();
    const double* priorities = priority.data();
    const std::int64_t count = index.size();
    py::gil_scoped_release release;
    core_.update_priorities(indices, priorities, count);
  }

  void gather(const py::array_t<std::int64_t, py::array::c_style>& wanted, py::array obs, py::array next_obs,
              py::array action, py::array reward, py::array discount, py::array index, py::array weight) {
    const BatchView view = batch_view(wanted.size(), obs, next_obs, action, reward, discount, index, weight);
    const std::int64_t* wanted_data = wanted.data();
    const std::int64_t count = wanted.size();
    py::gil_scoped_release release;
    core_.gather(wanted_data, count, view);
  }

  py::tuple windows(const py::array_t<std::int64_t, py::array::c_style>& index) const {
    py::array_t<std::int64_t> steps(index.size());
    py::array_t<bool> terminated(index.size()), truncated(index.size());
    const std::int64_t* wanted = index.data();
    std::int64_t* steps_data = steps.mutable_data();
    bool *terminated_data = terminated.mutable_data(), *truncated_data = truncated.mutable_data();
    const std::int64_t count = index.size();
    {
      py::gil_scoped_release release;
      core_.windows(wanted, count, steps_data, terminated_data, truncated_data);
    }
    return py::make_tuple(steps, terminated, truncated);
  }

  void latest(py::array out) const {
    require_shape("out", out, {num_envs(), core_.shape().stack}, frame_shape_);
    require_dtype("out", out, dtype_);
    if (!(out.flags() & py::array::c_style)) reject("out", "a C-contiguous array", "another layout");
    auto* data = writable<std::uint8_t>("out", out);
    py::gil_scoped_release release;
    core_.latest(data);
  }

  py::array_t<std::int64_t> valid_indices() const {
    std::vector<std::int64_t> indices;
    {
      py::gil_scoped_release release;
      indices = core_.valid_indices();
    }
    return py::array_t<std::int64_t>(static_cast<py::ssize_t>(indices.size()), indices.data());
  }

  py::tuple export_run(std::int64_t env, std::int64_t position, std::int64_t count, std::int64_t time_steps) const {
    require_run(env, position, count);
    py::array frames(dtype_, with_frame_shape({count}));
    py::array_t<float> reward(count);
    py::array_t<std::int32_t> action(count);
    py::array_t<std::uint8_t> flags(count);
    const FrameReplay::Columns out{static_cast<std::uint8_t*>(frames.mutable_data()), reward.mutable_data(),
                                   action.mutable_data(), flags.mutable_data()};
    {
      py::gil_scoped_release release;
      core_.export_run(env, position, count, time_steps, out);
    }
    return py::make_tuple(frames, reward, action, flags);
  }

  void import_run(std::int64_t env, std::int64_t position, py::array frames,
                  py::array_t<float, py::array::c_style> reward, py::array_t<std::int32_t, py::array::c_style> action,
                  py::array_t<std::uint8_t, py::array::c_style> flags) {
    const std::int64_t count = reward.size();
    require_run(env, position, count);
    require_shape("frames", frames, {count}, frame_shape_);
    require_dtype("frames", frames, dtype_);
    require_shape("action", action, {count});
    require_shape("flags", flags, {count});
    frames = py::array::ensure(frames, py::array::c_style);
    const FrameReplay::Columns in{static_cast<std::uint8_t*>(const_cast<void*>(frames.data())),
                                  const_cast<float*>(reward.data()), const_cast<std::int32_t*>(action.data()),
                                  const_cast<std::uint8_t*>(flags.data())};
    py::gil_scoped_release release;
    core_.import_run(env, position, count, in);
  }

  py::array_t<double> export_priorities(std::int64_t env, std::int64_t time_steps) const {
    require_run(env, 0, 0);
    py::array_t<double> values(stored(env));
    double* out = values.mutable_data();
    py::gil_scoped_release release;
    core_.export_priorities(env, time_steps, out);
    return values;
  }

  void import_priorities(std::int64_t env, const py::array_t<double, py::array::c_style>& values) {
    require_run(env, 0, 0);
    require_shape("priorities", values, {stored(env)});
    const double* in = values.data();
    py::gil_scoped_release release;
    core_.import_priorities(env, in);
  }

 private:
  std::int64_t frame_bytes() const {
    std::int64_t bytes = dtype_.itemsize();
    for (const py::ssize_t axis : frame_shape_) bytes *= axis;
    return bytes;
  }
  py::ssize_t num_envs() const { return core_.shape().num_envs; }

  std::vector<py::ssize_t> with_frame_shape(std::vector<py::ssize_t> leading) const {
    leading.insert(leading.end(), frame_shape_.begin(), frame_shape_.end());
    return leading;
  }

  void require_run(std::int64_t env, std::int64_t position, std::int64_t count) const {
    const std::int64_t held = env < 0 || env >= num_envs() ? -1 : stored(env);
    if (position < 0 || count < 0 || count > held || position > held - count)
      throw py::value_error("run: env, position and count reach beyond the stored frames");
  }

  std::vector<std::int64_t> distinct_envs(const py::object& value) const {
    py::array array = py::array::ensure(value);
    if (!array || array.ndim() != 1 || std::strchr("iu", array.dtype().kind()) == nullptr) {
      PyErr_Clear();
      reject("env_indices", "a list of integers", std::string(py::str(value)));
    }
    const py::array_t<std::int64_t, py::array::c_style | py::array::forcecast> integers(array);
    std::vector<std::int64_t> envs(integers.data(), integers.data() + integers.size());
    std::vector<bool> seen(static_cast<std::size_t>(num_envs()));
    for (const std::int64_t env : envs) {
      if (env < 0 || env >= num_envs() || seen[static_cast<std::size_t>(env)])
        reject("env_indices", "different integers from 0 to " + std::to_string(num_envs() - 1),
               std::string(py::str(value)));
      seen[static_cast<std::size_t>(env)] = true;
    }
    return envs;
  }

  template <typename T>
  static T* writable(const char* name, py::array& array) {
    if (!array.writeable()) reject(name, "a writable array", "one that is read-only");
    return static_cast<T*>(array.mutable_data());
  }

  template <typename T>
  static T* batch_column(const char* name, py::array& array, std::int64_t count) {
    require_shape(name, array, {count});
    require_dtype(name, array, py::dtype::of<T>());
    if (!(array.flags() & py::array::c_style) || !is_aligned(array))
      reject(name, "a C-contiguous, aligned array", "another layout");
    return writable<T>(name, array);
  }

  BatchView batch_view(std::int64_t count, py::array& obs, py::array& next_obs, py::array& action, py::array& reward,
                       py::array& discount, py::array& index, py::array& weight) const {
    for (auto [name, array] : {std::pair{"obs", &obs}, std::pair{"next_obs", &next_obs}}) {
      require_shape(name, *array, {count, core_.shape().stack}, frame_shape_);
      require_dtype(name, *array, dtype_);
      if (!rows_are_contiguous(*array)) reject(name, "contiguous stacks", "another layout");
    }
    const BatchView view{writable<std::uint8_t>("obs", obs),
                         obs.strides(0),
                         writable<std::uint8_t>("next_obs", next_obs),
                         next_obs.strides(0),
                         batch_column<std::int64_t>("action", action, count),
                         batch_column<float>("reward", reward, count),
                         batch_column<float>("discount", discount, count),
                         batch_column<std::int64_t>("index", index, count),
                         batch_column<float>("weight", weight, count)};
    require_disjoint_stacks(view, count);
    const std::array<std::pair<const char*, Span>, 7> parts{{{"obs", span(obs)},
                                                             {"next_obs", span(next_obs)},
                                                             {"action", span(action)},
                                                             {"reward", span(reward)},
                                                             {"discount", span(discount)},
                                                             {"index", span(index)},
                                                             {"weight", span(weight)}}};
    for (std::size_t one = 2; one < parts.size(); ++one)  // obs and next_obs may be interleaved; they are checked above
      for (std::size_t other = 0; other < one; ++other)
        if (parts[one].second.overlaps(parts[other].second))
          reject(parts[one].first, std::string("memory that does not overlap ") + parts[other].first,
                 "overlapping memory");
    return view;
  }

  // No stack may overlap another, except that obs and next_obs of one transition may share frames.
  void require_disjoint_stacks(const BatchView& view, std::int64_t count) const {
    const std::int64_t frame = core_.shape().frame_bytes, stack = core_.shape().stack * frame;
    for (auto [name, stride] : {std::pair{"obs", view.obs_stride}, std::pair{"next_obs", view.next_obs_stride}})
      if (count > 1 && std::abs(stride) < stack)
        reject(name, "stacks that do not overlap each other", "overlapping stacks");
    const std::int64_t step = count > 1 ? std::abs(view.obs_stride) : std::int64_t{1} << 62;
    const std::int64_t offset = view.next_obs - view.obs;
    const std::int64_t length = count > 1 ? (count - 1) * step + stack : stack;
    if (count == 1 || view.obs_stride == view.next_obs_stride) {
      if (core_.shares_frames() && offset == frame && step >= stack + frame) return;
      // The distance from a stack of obs to the nearest stacks of next_obs, after it and before it.
      const std::int64_t after = ((offset % step) + step) % step;
      if (std::abs(offset) >= length || (after >= stack && step - after >= stack)) return;
    } else {
      const std::int64_t next_length = (count - 1) * std::abs(view.next_obs_stride) + stack;
      const std::int64_t start = view.obs_stride < 0 ? (count - 1) * view.obs_stride : 0;
      const std::int64_t next_start = offset + (view.next_obs_stride < 0 ? (count - 1) * view.next_obs_stride : 0);
      if (next_start >= start + length || next_start + next_length <= start) return;
    }
    reject("next_obs",
           core_.shares_frames() ? "memory that does not overlap obs, or obs shifted by one frame (see empty_batch)"
                                 : "memory that does not overlap obs, since n_step > 1",
           "overlapping memory");
  }

  std::vector<py::ssize_t> frame_shape_;
  py::dtype dtype_;
  FrameReplay core_;
};

}  // namespace
}  // namespace pydqn

PYBIND11_MODULE(_core, module) {
  using namespace pydqn;
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  module.doc() = "The C++ core of pydqn; use it through pydqn.FrameReplay.";
  py::class_<Binding>(module, "FrameReplay")
      .def(py::init<std::int64_t, std::vector<py::ssize_t>, std::int64_t, std::int64_t, double, std::int64_t,
                    const py::dtype&, bool, std::optional<double>, std::int64_t, std::uint64_t>(),
           py::arg("capacity"), py::arg("frame_shape"), py::arg("stack"), py::arg("n_step"), py::arg("gamma"),
           py::arg("num_envs"), py::arg("dtype"), py::arg("pad_with_first"), py::arg("alpha"),
           py::arg("limit"), py::arg("seed"))
      .def("__len__", &Binding::size, Unlocked())
      .def_property_readonly("time_steps", py::cpp_function(&Binding::time_steps, Unlocked()))
      .def_property_readonly("env_time_steps", py::cpp_function(&Binding::env_time_steps, Unlocked()))
      .def("stored", &Binding::stored)
      .def_property_readonly("nbytes", &Binding::bytes)
      .def("next_slot", &Binding::next_slot)
      .def("append", &Binding::append)
      .def("sample", &Binding::sample)
      .def("update_priorities", &Binding::update_priorities)
      .def("gather", &Binding::gather)
      .def("latest", &Binding::latest)
      .def("windows", &Binding::windows)
      .def("valid_indices", &Binding::valid_indices)
      .def("export_run", &Binding::export_run)
      .def("import_run", &Binding::import_run)
      .def("export_priorities", &Binding::export_priorities)
      .def("import_priorities", &Binding::import_priorities)
      .def("set_time_steps", &Binding::set_time_steps, Unlocked())
      .def("end_import", &Binding::end_import, Unlocked())
      .def("set_alpha", &Binding::set_alpha, Unlocked())
      .def_property("generator_state", py::cpp_function(&Binding::generator_state, Unlocked()),
                    py::cpp_function(&Binding::set_generator_state, Unlocked()))
      .def_property("largest_priority", py::cpp_function(&Binding::largest_priority, Unlocked()),
                    py::cpp_function(&Binding::set_largest_priority, Unlocked()));

  module.def("keep_freed_memory", &keep_freed_memory);

  // Exposed for its unit tests.
  py::class_<SumTree>(module, "SumTree")
      .def(py::init<std::int64_t>())
      .def("__getitem__", &SumTree::operator[])
      .def("__setitem__", &SumTree::set)
      .def_property_readonly("total", &SumTree::total)
      .def("find", &SumTree::find);
}
