// A norm's whole call, from the tensor that a model hands over to the tensor that it gets back: the same steps taken in
// Python last longer than the kernel. Tensors are asked what they are by name, so this needs no torch.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>

namespace steerkern {

namespace py = pybind11;

// What a norm module and its session have at hand; `rows` is None for a norm that is never steered.
struct NormParts {
  py::object tensor, dtype, parameters, rows, empty_like, is_grad_enabled, get_num_threads;
  int64_t width, threaded;  // elements from which on more than one thread is used
};

template <class Kernel>
class NormCall {
 public:
  NormCall(py::object kernel, NormParts parts)
      : owner_(std::move(kernel)), kernel_(owner_.cast<const Kernel*>()), parts_(std::move(parts)) {}

  // The state edited in place and, returned, normalised; None where the call is not for one kernel on these tensors.
  py::object norm(PyObject* state) const {
    Rows rows;
    if (grad() || !look(state, &rows)) return py::none();
    py::object y = like(state);
    return run(rows, rows.address, address(y), 0, 0) ? y : py::none();
  }

  // The edited sum of two states, and that normalised; or None.
  py::object sum(PyObject* left, PyObject* right) const {
    Rows one, other;
    if (grad() || !look(left, &one) || !look(right, &other)) return py::none();
    const int same = PyObject_RichCompareBool(one.shape.ptr(), other.shape.ptr(), Py_EQ);
    if (same < 0) throw py::error_already_set();
    if (!same) return py::none();
    py::object h = like(left), y = like(left);
    if (!run(one, address(h), address(y), one.address, other.address)) return py::none();
    return py::make_tuple(std::move(h), std::move(y));
  }

 private:
  struct Rows {
    py::object shape;
    int64_t count = 0, address = 0;
  };

  static PyObject* name(const char* text) {
    PyObject* made = PyUnicode_InternFromString(text);
    if (!made) throw py::error_already_set();
    return made;
  }

  static py::object checked(PyObject* made) {
    if (!made) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(made);
  }

  static int64_t number(const py::object& value) {
    const int64_t made = PyLong_AsLongLong(value.ptr());
    if (made == -1 && PyErr_Occurred()) throw py::error_already_set();
    return made;
  }

  static int64_t address(const py::object& tensor) { return address(tensor.ptr()); }
  static int64_t address(PyObject* tensor) {
    static PyObject* const data_ptr = name("data_ptr");
    return number(checked(PyObject_CallMethodNoArgs(tensor, data_ptr)));
  }

  static int64_t member(const py::object& of, PyObject* what) {
    return number(checked(PyObject_GetAttr(of.ptr(), what)));
  }

  bool grad() const { return checked(PyObject_CallNoArgs(parts_.is_grad_enabled.ptr())).ptr() != Py_False; }

  py::object like(PyObject* tensor) const { return checked(PyObject_CallOneArg(parts_.empty_like.ptr(), tensor)); }

  bool has_dtype(PyObject* tensor) const {
    static PyObject* const dtype = name("dtype");
    return checked(PyObject_GetAttr(tensor, dtype)).ptr() == parts_.dtype.ptr();
  }

  // Whether a tensor is rows for the kernel, and which.
  bool look(PyObject* tensor, Rows* rows) const {
    static PyObject* const shape = name("shape");
    static PyObject* const is_contiguous = name("is_contiguous");
    if (reinterpret_cast<PyObject*>(Py_TYPE(tensor)) != parts_.tensor.ptr() || !has_dtype(tensor)) return false;
    if (checked(PyObject_CallMethodNoArgs(tensor, is_contiguous)).ptr() != Py_True) return false;
    rows->shape = checked(PyObject_GetAttr(tensor, shape));
    const Py_ssize_t dimensions = PyTuple_Check(rows->shape.ptr()) ? PyTuple_GET_SIZE(rows->shape.ptr()) : 0;
    if (dimensions == 0) return false;
    rows->count = 1;
    for (Py_ssize_t d = 0; d < dimensions; ++d) {
      const int64_t size = number(py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(rows->shape.ptr(), d)));
      if (d + 1 == dimensions && size != parts_.width) return false;
      if (d + 1 < dimensions) rows->count *= size;
    }
    rows->address = address(tensor);
    return true;
  }

  // The address of a parameter, 0 without one, -1 if it is of another dtype: it may have been cast since.
  int64_t parameter(PyObject* which) const {
    PyObject* found = PyDict_GetItemWithError(parts_.parameters.ptr(), which);
    if (!found && PyErr_Occurred()) throw py::error_already_set();
    if (!found || found == Py_None) return 0;
    return has_dtype(found) ? address(found) : -1;
  }

  bool run(const Rows& rows, int64_t h, int64_t y, int64_t base, int64_t delta) const {
    static PyObject* const weight_name = name("weight");
    static PyObject* const bias_name = name("bias");
    static PyObject* const pointer = name("pointer");
    static PyObject* const count = name("count");
    const int64_t weight = parameter(weight_name), bias = parameter(bias_name);
    if (weight < 0 || bias < 0) return false;
    const int64_t slot = parts_.rows.is_none() ? 0 : member(parts_.rows, pointer);
    if (slot && member(parts_.rows, count) != rows.count) return false;
    int threads = 1;
    if (rows.count * parts_.width >= parts_.threaded)
      threads = int(number(checked(PyObject_CallNoArgs(parts_.get_num_threads.ptr()))));
    const int64_t width = parts_.width;
    return kernel_->run(rows.count, h, width, slot, weight, bias, y, delta, width, base, 0, 0, threads) < 0;
  }

  py::object owner_;
  const Kernel* kernel_;
  NormParts parts_;
};

// norm(state) or norm(left, right), as a type's tp_call.
template <class Kernel>
PyObject* call_norm(PyObject* self, PyObject* arguments, PyObject* keywords) {
  const Py_ssize_t count = PyTuple_GET_SIZE(arguments);
  const auto holder = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
  const auto* norm = static_cast<const NormCall<Kernel>*>(holder.value_ptr());
  if (!norm || keywords || (count != 1 && count != 2)) {
    PyErr_SetString(PyExc_TypeError, "NormCall takes one state, or two to add");
    return nullptr;
  }
  try {
    PyObject* first = PyTuple_GET_ITEM(arguments, 0);
    return (count == 1 ? norm->norm(first) : norm->sum(first, PyTuple_GET_ITEM(arguments, 1))).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
  }
}

}  // namespace steerkern
