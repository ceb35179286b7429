// Python binding: pointers and sizes in, a row index out. No torch; tensors are checked in steerkern/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/steer.h"
#include "norm_call.h"
#if defined(STEERKERN_CUDA)
#include "cuda/binding.h"
#endif

namespace py = pybind11;

namespace steerkern {
namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// One site of one program: what does not change between forward passes is bound once, so that a call carries
// eight integers.
class Steer {
 public:
  Steer(int64_t width, int dtype, int norm, float eps) : dtype_(Dtype(dtype)) {
    if (width < 1) throw py::value_error("width must be positive, got " + std::to_string(width));
    if (dtype < 0 || dtype > 2) throw py::value_error("dtype must be 0, 1 or 2, got " + std::to_string(dtype));
    if (norm < 0 || norm > 4) throw py::value_error("norm must be 0 to 4, got " + std::to_string(norm));
    call_.width = width;
    call_.norm = Norm(norm);
    call_.eps = eps;
  }

  void bind(Address bank, int64_t rows, Address links, Address fields, int64_t entries, Address span, int64_t slots,
            Address gain, py::object owner) {
    owner_ = std::move(owner);
    tables_.bank = at<const float>(bank);
    tables_.rows = rows;
    tables_.links = at<const int32_t>(links);
    tables_.fields = at<const float>(fields);
    tables_.entries = entries;
    tables_.span = at<const int32_t>(span);
    tables_.slots = slots;
    tables_.gain = at<const float>(gain);
  }

  int64_t full(int64_t n, Address h, int64_t h_stride, Address slot, Address weight, Address bias, Address y,
               Address delta, int64_t delta_stride, Address trace, int64_t trace_columns, int threads) const {
    return run(n, h, h_stride, slot, weight, bias, y, delta, delta_stride, 0, trace, trace_columns, threads);
  }

  int64_t run(int64_t n, Address h, int64_t h_stride, Address slot, Address weight, Address bias, Address y,
              Address delta, int64_t delta_stride, Address base, Address trace, int64_t trace_columns,
              int threads) const {
    cpu::Call call = call_;
    call.tables = &tables_;
    call.n = n;
    call.h = at<void>(h);
    call.h_stride = h_stride;
    call.slot = at<const int32_t>(slot);
    call.weight = at<const void>(weight);
    call.bias = at<const void>(bias);
    call.y = at<void>(y);
    call.delta = at<const void>(delta);
    call.delta_stride = delta_stride;
    call.base = at<const void>(base);
    call.trace = at<float>(trace);
    call.trace_columns = trace_columns;
    threads = cpu::useful_threads(n, call.width, threads);
    if (threads == 1) return cpu::steer(call, dtype_, 1);  // too short to be worth letting go of the GIL
    py::gil_scoped_release released;
    return cpu::steer(call, dtype_, threads);
  }

 private:
  Dtype dtype_;
  Tables tables_;
  py::object owner_;  // of the memory behind tables_
  cpu::Call call_{};
};

// steer(n, h, h_stride, slot, weight, bias, y, threads[, base, delta]): the type's tp_call, because a `__call__`
// defined through pybind11 takes 480 ns where this takes 190. With base and delta, as far apart as h, h is their sum.
PyObject* call_steer(PyObject* self, PyObject* arguments, PyObject* keywords) {
  constexpr int kCount = 8, kMost = kCount + 2;
  const Py_ssize_t count = PyTuple_GET_SIZE(arguments);
  if (keywords || (count != kCount && count != kMost)) {
    PyErr_SetString(PyExc_TypeError,
                    "Steer takes eight positional integers: n, h, h_stride, slot, weight, bias, y, threads; or ten, "
                    "with base and delta");
    return nullptr;
  }
  int64_t value[kMost] = {};
  for (int i = 0; i < count; ++i) {
    value[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(arguments, i));
    if (value[i] == -1 && PyErr_Occurred()) return nullptr;
  }
  const auto [n, h, h_stride, slot, weight, bias, y, threads, base, delta] = value;
  const auto holder = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
  const Steer* steer = static_cast<const Steer*>(holder.value_ptr());
  if (!steer) {
    PyErr_SetString(PyExc_TypeError, "Steer.__init__ was not called");
    return nullptr;
  }
  return PyLong_FromLongLong(
      steer->run(n, h, h_stride, slot, weight, bias, y, delta, h_stride, base, 0, 0, int(threads)));
}

void set_isa(const std::string& name) {
  if (cpu::set_isa(name)) return;
  std::string known;
  for (const std::string& isa : cpu::supported_isas()) known += (known.empty() ? "" : ", ") + isa;
  throw py::value_error("instruction set \"" + name + "\": this machine and build have " + known);
}

}  // namespace
}  // namespace steerkern

PYBIND11_MODULE(_C, m) {
  using steerkern::Steer;
  m.doc() = "Native kernels of steerkern: addresses and sizes in, see steerkern/ops/cpu.py and cuda.py.";
  const py::custom_type_setup callable([](PyHeapTypeObject* type) { type->ht_type.tp_call = steerkern::call_steer; });
  py::class_<Steer>(m, "Steer", callable, py::module_local())
      .def(py::init<int64_t, int, int, float>(), py::arg("width"), py::arg("dtype"), py::arg("norm"), py::arg("eps"))
      .def("bind", &Steer::bind, py::arg("bank"), py::arg("rows"), py::arg("links"), py::arg("fields"),
           py::arg("entries"), py::arg("span"), py::arg("slots"), py::arg("gain"), py::arg("owner"))
      .def("full", &Steer::full, py::arg("n"), py::arg("h"), py::arg("h_stride"), py::arg("slot"), py::arg("weight"),
           py::arg("bias"), py::arg("y"), py::arg("delta"), py::arg("delta_stride"), py::arg("trace"),
           py::arg("trace_columns"), py::arg("threads"));
  using steerkern::NormCall;
  using steerkern::NormParts;
  const py::custom_type_setup norm_callable(
      [](PyHeapTypeObject* type) { type->ht_type.tp_call = steerkern::call_norm<Steer>; });
  py::class_<NormCall<Steer>>(m, "NormCall", norm_callable, py::module_local())
      .def(py::init([](py::object kernel, int64_t width, py::object dtype, py::dict parameters, py::object rows,
                       int64_t threaded) {
             const py::module_ torch = py::module_::import("torch");
             NormParts parts{torch.attr("Tensor"), std::move(dtype), std::move(parameters), std::move(rows),
                             torch.attr("empty_like"), torch.attr("is_grad_enabled"), torch.attr("get_num_threads"),
                             width, threaded};
             return NormCall<Steer>(std::move(kernel), std::move(parts));
           }),
           py::arg("kernel"), py::arg("width"), py::arg("dtype"), py::arg("parameters"), py::arg("rows"),
           py::arg("threaded"));
  m.def("supported_isas", &steerkern::cpu::supported_isas, "Instruction sets that run here, the preferred one first.");
  m.def("isa", &steerkern::cpu::isa, "The instruction set in use.");
  m.def("set_isa", &steerkern::set_isa, py::arg("name"), "Use this instruction set from now on, in the whole process.");
#if defined(STEERKERN_CUDA)
  steerkern::bind_cuda(m);
#endif
}
