// The only file that knows both Python and the core: shapes, dtypes, errors, and the GIL, which is released around
// everything that copies frames. The core's mutex is taken only after the GIL is given up, so the two cannot deadlock and
// no thread stops the others while it waits for the memory.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <initializer_list>
#include <optional>

#include "frame_replay.hpp"

namespace py = pybind11;
using pydqn::BatchView;
using pydqn::FrameReplay;

namespace {

std::string shape_text(const std::vector<py::ssize_t>& shape) {
  std::string text = "(";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

std::vector<py::ssize_t> shape_of(const py::array& array) { return {array.shape(), array.shape() + array.ndim()}; }

[[noreturn]] void reject(const char* name, const std::string& expected, const std::string& got) {
  throw py::value_error(std::string(name) + ": expected " + expected + ", got " + got);
}

// The shape `leading` + `rest`, without making a list of it: these checks run at every step.
bool has_shape(const py::array& array, std::initializer_list<py::ssize_t> leading,
               const std::vector<py::ssize_t>& rest = {}) {
  return array.ndim() == static_cast<py::ssize_t>(leading.size() + rest.size()) &&
         std::equal(leading.begin(), leading.end(), array.shape()) &&
         std::equal(rest.begin(), rest.end(), array.shape() + leading.size());
}

void require_shape(const char* name, const py::array& array, std::initializer_list<py::ssize_t> leading,
                   const std::vector<py::ssize_t>& rest = {}) {
  if (has_shape(array, leading, rest)) return;
  std::vector<py::ssize_t> expected(leading);
  expected.insert(expected.end(), rest.begin(), rest.end());
  reject(name, "shape " + shape_text(expected), "shape " + shape_text(shape_of(array)));
}

void require_dtype(const char* name, const py::array& array, const py::dtype& expected) {
  if (!array.dtype().is(expected) && !array.dtype().equal(expected))
    reject(name, "dtype " + std::string(py::str(expected)), "dtype " + std::string(py::str(array.dtype())));
}

bool is_aligned(const py::array& array) { return (array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) != 0; }

// A column of one value per lane, converted to T; `kinds` are the NumPy dtype kinds that convert without loss of meaning.
template <typename T>
py::array_t<T> column(const char* name, const py::object& value, py::ssize_t lanes, const char* kinds,
                      const char* expected) {
  using Column = py::array_t<T, py::array::c_style>;
  if (py::isinstance<Column>(value)) {  // as it should be: nothing to convert
    const auto ready = py::reinterpret_borrow<py::array_t<T>>(value);
    if (has_shape(ready, {lanes}) && is_aligned(ready)) return ready;
  }
  py::array array = py::array::ensure(value);
  if (!array) {
    PyErr_Clear();
    reject(name, expected, std::string(py::str(py::type::of(value))));
  }
  if (std::strchr(kinds, array.dtype().kind()) == nullptr)
    reject(name, expected, "dtype " + std::string(py::str(array.dtype())));
  require_shape(name, array, {lanes});
  if (!is_aligned(array)) array = array.attr("copy")();
  return py::array_t<T, py::array::c_style | py::array::forcecast>(array);
}

// Whether all axes but the leading one are C-contiguous, so that a frame (or a stack) is one run of bytes.
bool rows_are_contiguous(const py::array& array) {
  py::ssize_t expected = array.itemsize();
  for (py::ssize_t axis = array.ndim() - 1; axis > 0; --axis) {
    if (array.shape(axis) != 1 && array.strides(axis) != expected) return false;
    expected *= array.shape(axis);
  }
  return true;
}

class Binding {
 public:
  Binding(std::int64_t capacity, std::vector<py::ssize_t> frame_shape, std::int64_t stack, std::int64_t n_step,
          double gamma, std::int64_t lanes, const py::dtype& dtype, bool pad_with_first, std::optional<double> alpha,
          std::uint64_t seed)
      : frame_shape_(std::move(frame_shape)),
        dtype_(dtype),
        core_({capacity / lanes, lanes, frame_bytes(), stack, n_step, gamma,
               pad_with_first ? pydqn::Padding::kFirst : pydqn::Padding::kZero, alpha},
              seed) {}

  std::int64_t size() const {
    py::gil_scoped_release release;
    return core_.size();
  }
  std::int64_t ticks() const {
    py::gil_scoped_release release;
    return core_.ticks();
  }
  std::int64_t stored() const {
    py::gil_scoped_release release;
    return core_.stored();
  }
  std::size_t bytes() const { return core_.bytes(); }

  static py::array next_slot(const py::object& self) {
    auto& binding = self.cast<Binding&>();
    auto shape = binding.with_frame_shape({binding.lanes()});
    std::vector<py::ssize_t> strides(shape.size());
    py::ssize_t stride = binding.dtype_.itemsize();
    for (std::size_t axis = shape.size(); axis-- > 1;) {
      strides[axis] = stride;
      stride *= shape[axis];
    }
    strides[0] = binding.core_.lane_bytes();
    const std::uint8_t* slot = nullptr;
    {
      py::gil_scoped_release release;
      slot = binding.core_.next_slot();
    }
    return py::array(binding.dtype_, shape, strides, slot, self);
  }

  void append(const py::object& frame, const py::object& action, const py::object& reward,
              const py::object& terminated, const py::object& truncated, const py::object& first) {
    const py::ssize_t n = lanes();
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
    std::vector<std::int32_t> actions(static_cast<std::size_t>(n));
    std::vector<float> rewards(static_cast<std::size_t>(n));
    for (py::ssize_t lane = 0; lane < n; ++lane) {
      if (firsts.at(lane)) continue;  // these belong to no transition
      const std::int64_t a = actions64.at(lane);
      if (a < 0 || a > std::numeric_limits<std::int32_t>::max())
        reject("action", "integers from 0 to 2147483647", std::to_string(a) + " in lane " + std::to_string(lane));
      actions[static_cast<std::size_t>(lane)] = static_cast<std::int32_t>(a);
      rewards[static_cast<std::size_t>(lane)] = static_cast<float>(rewards64.at(lane));
      if (!std::isfinite(rewards[static_cast<std::size_t>(lane)]))
        reject("reward", "finite float32 numbers",
               std::to_string(rewards64.at(lane)) + " in lane " + std::to_string(lane));
    }

    const auto* base = static_cast<const std::uint8_t*>(frames.data());
    const py::ssize_t stride = frames.strides(0);
    py::gil_scoped_release release;
    core_.append([=](std::int64_t lane) { return base + lane * stride; }, actions.data(), rewards.data(),
                 terminateds.data(), truncateds.data(), firsts.data());
  }

  void sample(std::int64_t count, double beta, py::array obs, py::array next_obs, py::array action, py::array reward,
              py::array discount, py::array index, py::array weight) {
    const BatchView view = batch_view(count, obs, next_obs, action, reward, discount, index, weight);
    py::gil_scoped_release release;
    core_.sample(count, beta, view);
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

  void latest(py::array out) const {
    require_shape("out", out, {lanes(), core_.shape().stack}, frame_shape_);
    require_dtype("out", out, dtype_);
    if (!(out.flags() & py::array::c_style)) reject("out", "a C-contiguous array", "another layout");
    auto* data = static_cast<std::uint8_t*>(out.mutable_data());
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

  py::tuple export_run(std::int64_t lane, std::int64_t position, std::int64_t count, std::int64_t ticks) const {
    require_run(lane, position, count);
    py::array frames(dtype_, with_frame_shape({count}));
    py::array_t<float> reward(count);
    py::array_t<std::int32_t> action(count);
    py::array_t<std::uint8_t> flags(count);
    const FrameReplay::Columns out{static_cast<std::uint8_t*>(frames.mutable_data()), reward.mutable_data(),
                                   action.mutable_data(), flags.mutable_data()};
    {
      py::gil_scoped_release release;
      core_.export_run(lane, position, count, ticks, out);
    }
    return py::make_tuple(frames, reward, action, flags);
  }

  void import_run(std::int64_t lane, std::int64_t position, py::array frames,
                  py::array_t<float, py::array::c_style> reward, py::array_t<std::int32_t, py::array::c_style> action,
                  py::array_t<std::uint8_t, py::array::c_style> flags) {
    const std::int64_t count = reward.size();
    require_run(lane, position, count);
    require_shape("frames", frames, {count}, frame_shape_);
    require_dtype("frames", frames, dtype_);
    require_shape("action", action, {count});
    require_shape("flags", flags, {count});
    frames = py::array::ensure(frames, py::array::c_style);
    const FrameReplay::Columns in{static_cast<std::uint8_t*>(const_cast<void*>(frames.data())),
                                  const_cast<float*>(reward.data()), const_cast<std::int32_t*>(action.data()),
                                  const_cast<std::uint8_t*>(flags.data())};
    py::gil_scoped_release release;
    core_.import_run(lane, position, count, in);
  }

  py::array_t<double> export_priorities(std::int64_t ticks) const {
    const std::int64_t held = stored();
    py::array_t<double> values({lanes(), held});
    double* out = values.mutable_data();
    py::gil_scoped_release release;
    for (std::int64_t lane = 0; lane < core_.shape().lanes; ++lane)
      core_.export_priorities(lane, ticks, out + lane * held);
    return values;
  }

  void import_priorities(const py::array_t<double, py::array::c_style>& values) {
    const std::int64_t held = stored();
    require_shape("priorities", values, {lanes(), held});
    const double* in = values.data();
    py::gil_scoped_release release;
    for (std::int64_t lane = 0; lane < core_.shape().lanes; ++lane) core_.import_priorities(lane, in + lane * held);
  }

  void set_ticks(std::int64_t ticks) {
    py::gil_scoped_release release;
    core_.set_ticks(ticks);
  }
  void end_import() {
    py::gil_scoped_release release;
    core_.end_import();
  }
  std::string generator_state() const {
    py::gil_scoped_release release;
    return core_.generator_state();
  }
  void set_generator_state(const std::string& state) {
    py::gil_scoped_release release;
    core_.set_generator_state(state);
  }
  double largest_priority() const {
    py::gil_scoped_release release;
    return core_.largest_priority();
  }
  void set_largest_priority(double value) {
    py::gil_scoped_release release;
    core_.set_largest_priority(value);
  }

 private:
  std::int64_t frame_bytes() const {
    std::int64_t bytes = dtype_.itemsize();
    for (const py::ssize_t axis : frame_shape_) bytes *= axis;
    return bytes;
  }
  py::ssize_t lanes() const { return core_.shape().lanes; }

  std::vector<py::ssize_t> with_frame_shape(std::vector<py::ssize_t> leading) const {
    leading.insert(leading.end(), frame_shape_.begin(), frame_shape_.end());
    return leading;
  }

  void require_run(std::int64_t lane, std::int64_t position, std::int64_t count) const {
    const std::int64_t held = stored();
    if (lane < 0 || lane >= lanes() || position < 0 || count < 0 || count > held || position > held - count)
      throw py::value_error("run: lane, position and count reach beyond what is stored");
  }

  // The bytes of a column of the batch, checked.
  template <typename T>
  static T* batch_column(const char* name, py::array& array, std::int64_t count) {
    require_shape(name, array, {count});
    require_dtype(name, array, py::dtype::of<T>());
    if (!(array.flags() & py::array::c_style) || !is_aligned(array))
      reject(name, "a C-contiguous, aligned array", "another layout");
    return static_cast<T*>(array.mutable_data());
  }

  BatchView batch_view(std::int64_t count, py::array& obs, py::array& next_obs, py::array& action, py::array& reward,
                       py::array& discount, py::array& index, py::array& weight) const {
    for (auto [name, array] : {std::pair{"obs", &obs}, std::pair{"next_obs", &next_obs}}) {
      require_shape(name, *array, {count, core_.shape().stack}, frame_shape_);
      require_dtype(name, *array, dtype_);
      if (!rows_are_contiguous(*array)) reject(name, "contiguous stacks", "another layout");
    }
    auto* obs_data = static_cast<std::uint8_t*>(obs.mutable_data());
    auto* next_obs_data = static_cast<std::uint8_t*>(next_obs.mutable_data());
    const std::int64_t stack_bytes = core_.shape().stack * core_.shape().frame_bytes;
    if (!core_.shares_block() && std::abs(next_obs_data - obs_data) < stack_bytes)
      reject("next_obs", "memory apart from obs, since n_step > 1", "memory that overlaps it");
    return {obs_data,
            obs.strides(0),
            next_obs_data,
            next_obs.strides(0),
            batch_column<std::int64_t>("action", action, count),
            batch_column<float>("reward", reward, count),
            batch_column<float>("discount", discount, count),
            batch_column<std::int64_t>("index", index, count),
            batch_column<float>("weight", weight, count)};
  }

  std::vector<py::ssize_t> frame_shape_;
  py::dtype dtype_;
  FrameReplay core_;
};

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "The C++ core of pydqn; use it through pydqn.FrameReplay.";
  py::class_<Binding>(module, "FrameReplay")
      .def(py::init<std::int64_t, std::vector<py::ssize_t>, std::int64_t, std::int64_t, double, std::int64_t,
                    const py::dtype&, bool, std::optional<double>, std::uint64_t>(),
           py::arg("capacity"), py::arg("frame_shape"), py::arg("stack"), py::arg("n_step"), py::arg("gamma"),
           py::arg("num_envs"), py::arg("dtype"), py::arg("pad_with_first"), py::arg("alpha"),
           py::arg("seed"))
      .def("__len__", &Binding::size)
      .def_property_readonly("ticks", &Binding::ticks)
      .def_property_readonly("stored", &Binding::stored)
      .def_property_readonly("nbytes", &Binding::bytes)
      .def("next_slot", [](const py::object& self) { return Binding::next_slot(self); })
      .def("append", &Binding::append)
      .def("sample", &Binding::sample)
      .def("update_priorities", &Binding::update_priorities)
      .def("gather", &Binding::gather)
      .def("latest", &Binding::latest)
      .def("valid_indices", &Binding::valid_indices)
      .def("export_run", &Binding::export_run)
      .def("import_run", &Binding::import_run)
      .def("export_priorities", &Binding::export_priorities)
      .def("import_priorities", &Binding::import_priorities)
      .def("set_ticks", &Binding::set_ticks)
      .def("end_import", &Binding::end_import)
      .def_property("generator_state", &Binding::generator_state, &Binding::set_generator_state)
      .def_property("largest_priority", &Binding::largest_priority, &Binding::set_largest_priority);

  module.def("keep_freed_memory", &pydqn::keep_freed_memory);

  // For its tests: what the memory does with it is too indirect to see every corner.
  py::class_<pydqn::SumTree>(module, "SumTree")
      .def(py::init<std::int64_t>())
      .def("__getitem__", &pydqn::SumTree::operator[])
      .def("__setitem__", &pydqn::SumTree::set)
      .def_property_readonly("total", &pydqn::SumTree::total)
      .def("find", &pydqn::SumTree::find);
}
