// Python binding of the CUDA kernels: device addresses, sizes and a stream handle in. A launch is asynchronous and takes
// about 2 us, so the GIL is kept.
#include "binding.h"

#include <climits>

#include "call.h"

namespace py = pybind11;

namespace steerkern {
namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

[[noreturn]] void fail(const std::string& reason) {
  const py::object type = py::module_::import("steerkern.errors").attr("BackendError");
  PyErr_SetString(type.ptr(), ("backend cuda: " + reason).c_str());
  throw py::error_already_set();
}

// One site of one program on one device: what does not change between forward passes is bound once.
class SteerCuda {
 public:
  SteerCuda(int64_t width, int dtype, int norm, float eps, int device) : dtype_(Dtype(dtype)), device_(device) {
    if (width < 1 || width > INT_MAX / 8)  // elements of a row are counted in 32 bits
      throw py::value_error("width must lie in 1.." + std::to_string(INT_MAX / 8) + ", got " + std::to_string(width));
    if (dtype < 0 || dtype > 2) throw py::value_error("dtype must be 0, 1 or 2, got " + std::to_string(dtype));
    if (norm < 0 || norm > 4) throw py::value_error("norm must be 0 to 4, got " + std::to_string(norm));
    call_.width = int32_t(width);
    call_.norm = Norm(norm);
    call_.eps = eps;
  }

  void bind(Address bank, int64_t rows, Address links, Address fields, int64_t entries, Address span, int64_t slots,
            Address gain, py::object owner) {
    owner_ = std::move(owner);
    call_.tables.bank = at<const float>(bank);
    call_.tables.rows = rows;
    call_.tables.links = at<const int32_t>(links);
    call_.tables.fields = at<const float>(fields);
    call_.tables.entries = entries;
    call_.tables.span = at<const int32_t>(span);
    call_.tables.slots = slots;
    call_.tables.gain = at<const float>(gain);
  }

  void tune(int warps, int cluster, int entries, bool dependent, bool gram) {
    if (warps < 0 || warps > 16) throw py::value_error("warps must lie in 0..16, got " + std::to_string(warps));
    if (cluster < 0 || cluster > 8) throw py::value_error("cluster must lie in 0..8, got " + std::to_string(cluster));
    tuning_ = {warps, cluster, entries, dependent, gram};
  }

  void prepare() const {
    const std::string reason = cuda::prepare(device_, call_.width, dtype_, call_.norm, tuning_);
    if (!reason.empty()) fail(reason);
  }

  int64_t full(int64_t n, Address h, int64_t h_stride, Address slot, Address weight, Address bias, Address y,
               Address delta, int64_t delta_stride, Address trace, int64_t trace_columns, Address stream) const {
    cuda::Call call = call_;
    if (slot && !call.tables.bank) throw py::value_error("slots without tables: call bind first");
    call.n = n;
    call.h = at<void>(h);
    call.h_stride = h_stride;
    call.slot = at<const int32_t>(slot);
    call.weight = at<const void>(weight);
    call.bias = at<const void>(bias);
    call.y = at<void>(y);
    call.delta = at<const void>(delta);
    call.delta_stride = delta_stride;
    call.trace = at<float>(trace);
    call.trace_columns = trace_columns;
    const int error = cuda::launch(call, dtype_, device_, stream, tuning_);
    if (error != 0) fail(cuda::explain(error, device_));
    return -1;
  }

 private:
  Dtype dtype_;
  int device_;
  cuda::Call call_{};
  cuda::Tuning tuning_;
  py::object owner_;  // of the memory behind the tables
};

// steer(n, h, h_stride, slot, weight, bias, y, stream): the type's tp_call, as for the CPU.
PyObject* call_steer_cuda(PyObject* self, PyObject* arguments, PyObject* keywords) {
  constexpr int kCount = 8;
  if (keywords || PyTuple_GET_SIZE(arguments) != kCount) {
    PyErr_SetString(PyExc_TypeError,
                    "SteerCuda takes eight positional integers: n, h, h_stride, slot, weight, bias, y, stream");
    return nullptr;
  }
  int64_t value[kCount];
  for (int i = 0; i < kCount; ++i) {
    value[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(arguments, i));
    if (value[i] == -1 && PyErr_Occurred()) return nullptr;
  }
  const auto [n, h, h_stride, slot, weight, bias, y, stream] = value;
  const auto holder = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
  const SteerCuda* steer = static_cast<const SteerCuda*>(holder.value_ptr());
  if (!steer) {
    PyErr_SetString(PyExc_TypeError, "SteerCuda.__init__ was not called");
    return nullptr;
  }
  try {
    return PyLong_FromLongLong(steer->full(n, h, h_stride, slot, weight, bias, y, 0, 0, 0, 0, Address(stream)));
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::value_error& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  }
  return nullptr;
}

// Why nothing can be launched on this machine, or "".
std::string unusable() {
  std::string why;
  if (cuda::devices(&why) > 0) return "";
  return why.empty() ? "no CUDA device is visible" : why;
}

}  // namespace

void bind_cuda(py::module_& m) {
  const py::custom_type_setup callable([](PyHeapTypeObject* type) { type->ht_type.tp_call = call_steer_cuda; });
  py::class_<SteerCuda>(m, "SteerCuda", callable, py::module_local())
      .def(py::init<int64_t, int, int, float, int>(), py::arg("width"), py::arg("dtype"), py::arg("norm"),
           py::arg("eps"), py::arg("device"))
      .def("bind", &SteerCuda::bind, py::arg("bank"), py::arg("rows"), py::arg("links"), py::arg("fields"),
           py::arg("entries"), py::arg("span"), py::arg("slots"), py::arg("gain"), py::arg("owner") = py::none())
      .def("tune", &SteerCuda::tune, py::kw_only(), py::arg("warps") = 0, py::arg("cluster") = 0,
           py::arg("entries") = 1, py::arg("dependent") = true, py::arg("gram") = false)
      .def("prepare", &SteerCuda::prepare)
      .def("full", &SteerCuda::full, py::arg("n"), py::arg("h"), py::arg("h_stride"), py::arg("slot"),
           py::arg("weight"), py::arg("bias"), py::arg("y"), py::arg("delta"), py::arg("delta_stride"),
           py::arg("trace"), py::arg("trace_columns"), py::arg("stream"));
  m.def("cuda_unusable", &unusable, "Why no kernel can be launched here; empty if one can.");
  m.def("cuda_archs", &cuda::archs, "What this build was compiled for.");
}

}  // namespace steerkern
