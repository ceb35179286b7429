// Chooses, launches and loads the CUDA kernels. Static cudart, no torch.
#include <cuda_runtime.h>

#include "choose.h"

namespace steerkern::cuda {
namespace {

// Two blocks of 512 threads on a multiprocessor leave 64 registers each, with which no kernel spills on any arch. Rows
// that need four pieces per thread have as many bytes in flight with one block, and the Gram matrix needs its sums.
template <class T, int kVectors, bool kAligned, bool kGram, bool kLayerNorm>
__global__ __launch_bounds__(kMaxWarps * 32, kVectors == 4 || kGram ? 1 : 2)
void steer_rows(const __grid_constant__ Call call) {
  extern __shared__ float shared[];
  Row<T, kVectors, kAligned, kGram, kLayerNorm>(call, shared).run();
}

using Kernel = void (*)(Call);

struct Kernels {
  template <class T, int kVectors, bool kAligned, bool kGram, bool kLayerNorm>
  static Kernel get() {
    return steer_rows<T, kVectors, kAligned, kGram, kLayerNorm>;
  }
};

struct Device {
  int clusters = -1;  // -1: not asked yet
  int processors = 0;
};

constexpr int kMostDevices = 64;
Device known[kMostDevices];  // written under the GIL

cudaError_t learn(int device) {
  if (device < 0 || device >= kMostDevices) return cudaErrorInvalidDevice;
  Device& d = known[device];
  if (d.clusters >= 0) return cudaSuccess;
  int major = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&d.processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) d.clusters = major >= 9;
  return error;
}

// Makes a device current for as long as it lives.
class Current {
 public:
  explicit Current(int device) {
    error = cudaGetDevice(&before_);
    if (error == cudaSuccess && before_ != device) {
      error = cudaSetDevice(device);
      changed_ = error == cudaSuccess;
    }
  }
  ~Current() {
    if (changed_) cudaSetDevice(before_);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
  cudaError_t error;

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace

int launch(const Call& call, Dtype dtype, int device, uintptr_t stream, const Tuning& tuning) {
  if (call.n == 0) return cudaSuccess;
  cudaError_t error = learn(device);
  if (error != cudaSuccess) return cudaGetLastError(), error;
  const Current current(device);
  if (current.error != cudaSuccess) return cudaGetLastError(), current.error;
  const Shape s = shape(call.n, call.width, dtype, tuning, known[device].clusters > 0, known[device].processors);
  const Way way = {s.vectors, aligned(call, dtype), tuning.gram, call.norm == Norm::kLayer};
  const Kernel kernel = choose<Kernels, Kernel>(dtype, way);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(call.n * s.cluster));
  config.blockDim = dim3(unsigned(s.threads / s.cluster));
  config.dynamicSmemBytes = sizeof(float) * size_t(shared_floats(s.threads / 32, s.threads / 32 / s.cluster));
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (tuning.dependent && known[device].clusters > 0) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (s.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = unsigned(s.cluster);
    attributes[config.numAttrs].val.clusterDim.y = 1;
    attributes[config.numAttrs++].val.clusterDim.z = 1;
  }
  Call argument = call;
  void* arguments[] = {&argument};
  error = cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments);
  // A failed launch leaves its error behind, which torch would find later and report as its own.
  return error == cudaSuccess ? error : (cudaGetLastError(), error);
}

std::string prepare(int device, int64_t width, Dtype dtype, Norm norm, const Tuning& tuning) {
  cudaError_t error = learn(device);
  if (error != cudaSuccess) return cudaGetLastError(), explain(error, device);
  const Current current(device);
  error = current.error;
  const Shape s = shape(1, width, dtype, tuning, known[device].clusters > 0, known[device].processors);
  for (const bool even : {true, false}) {
    cudaFuncAttributes attributes;
    const void* kernel = reinterpret_cast<const void*>(
        choose<Kernels, Kernel>(dtype, {s.vectors, even, tuning.gram, norm == Norm::kLayer}));
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  }
  return error == cudaSuccess ? "" : (cudaGetLastError(), explain(error, device));
}

int devices(std::string* why) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return count;
  cudaGetLastError();
  if (why) *why = explain(error, -1);
  return 0;
}

std::string archs() { return STEER_ARCHS; }

std::string explain(int error, int device) {
  const cudaError_t e = cudaError_t(error);
  if (e == cudaErrorInsufficientDriver || e == cudaErrorNoDevice)
    return std::string("no usable NVIDIA driver or device (") + cudaGetErrorString(e) + ")";
  if (e == cudaErrorNoKernelImageForDevice || e == cudaErrorInvalidDeviceFunction || e == cudaErrorUnsupportedPtxVersion) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    return "no kernel for compute capability " + std::to_string(major) + "." + std::to_string(minor) +
           " of device " + std::to_string(device) + "; this build has " + archs() +
           ", rebuild with STEERKERN_CUDA_ARCHS=" + std::to_string(major * 10 + minor);
  }
  return std::string(cudaGetErrorName(e)) + ": " + cudaGetErrorString(e);
}

}  // namespace steerkern::cuda
