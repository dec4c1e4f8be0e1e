// Checks of NumPy arrays, whose error messages name the argument. Independent of the core.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <string>
#include <vector>

namespace pydqn {

namespace py = pybind11;

inline std::string shape_text(const std::vector<py::ssize_t>& shape) {
  std::string text = "(";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

[[noreturn]] inline void reject(const char* name, const std::string& expected, const std::string& got) {
  throw py::value_error(std::string(name) + ": expected " + expected + ", got " + got);
}

// Whether the shape is `leading` followed by `rest`. Does not allocate, because it runs at every step.
inline bool has_shape(const py::array& array, std::initializer_list<py::ssize_t> leading,
                      const std::vector<py::ssize_t>& rest = {}) {
  return array.ndim() == static_cast<py::ssize_t>(leading.size() + rest.size()) &&
         std::equal(leading.begin(), leading.end(), array.shape()) &&
         std::equal(rest.begin(), rest.end(), array.shape() + leading.size());
}

inline void require_shape(const char* name, const py::array& array, std::initializer_list<py::ssize_t> leading,
                          const std::vector<py::ssize_t>& rest = {}) {
  if (has_shape(array, leading, rest)) return;
  std::vector<py::ssize_t> expected(leading);
  expected.insert(expected.end(), rest.begin(), rest.end());
  reject(name, "shape " + shape_text(expected), "shape " + shape_text({array.shape(), array.shape() + array.ndim()}));
}

inline void require_dtype(const char* name, const py::array& array, const py::dtype& expected) {
  if (!array.dtype().is(expected) && !array.dtype().equal(expected))
    reject(name, "dtype " + std::string(py::str(expected)), "dtype " + std::string(py::str(array.dtype())));
}

inline bool is_aligned(const py::array& array) {
  return (array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) != 0;
}

// Returns `value` as an array of `count` values of type T, one per environment. `kinds` lists the NumPy dtype kinds
// that convert to T without a change of meaning.
template <typename T>
py::array_t<T> column(const char* name, const py::object& value, py::ssize_t count, const char* kinds,
                      const char* expected) {
  using Column = py::array_t<T, py::array::c_style>;
  if (py::isinstance<Column>(value)) {
    const auto ready = py::reinterpret_borrow<py::array_t<T>>(value);
    if (has_shape(ready, {count}) && is_aligned(ready)) return ready;
  }
  py::array array = py::array::ensure(value);
  if (!array) {
    PyErr_Clear();
    reject(name, expected, std::string(py::str(py::type::of(value))));
  }
  if (std::strchr(kinds, array.dtype().kind()) == nullptr)
    reject(name, expected, "dtype " + std::string(py::str(array.dtype())));
  require_shape(name, array, {count});
  if (!is_aligned(array)) array = array.attr("copy")();
  return py::array_t<T, py::array::c_style | py::array::forcecast>(array);
}

// Whether all axes but the first are C-contiguous, so that each frame or stack is one block of bytes.
inline bool rows_are_contiguous(const py::array& array) {
  py::ssize_t expected = array.itemsize();
  for (py::ssize_t axis = array.ndim() - 1; axis > 0; --axis) {
    if (array.shape(axis) != 1 && array.strides(axis) != expected) return false;
    expected *= array.shape(axis);
  }
  return true;
}

// The range of addresses that an array occupies.
struct Span {
  const std::uint8_t *begin, *end;

  bool overlaps(const Span& other) const { return begin < other.end && other.begin < end; }
};

inline Span span(const py::array& array) {
  const auto* begin = static_cast<const std::uint8_t*>(array.data());
  const std::uint8_t* end = begin + array.itemsize();
  for (py::ssize_t axis = 0; axis < array.ndim(); ++axis) {
    const py::ssize_t reach = (array.shape(axis) - 1) * array.strides(axis);
    (reach < 0 ? begin : end) += reach;
  }
  return array.size() == 0 ? Span{begin, begin} : Span{begin, end};
}

}  // namespace pydqn
