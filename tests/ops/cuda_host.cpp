// The CUDA kernels on the CPU, for tests: g++ -std=c++17 -DSTEER_MACHINE='"cuda_host.h"' -I tests/ops -I csrc -shared
#include "cuda/choose.h"

namespace steerkern::cuda {
namespace {

using Kernel = void (*)(const Call&, float*);

struct Kernels {
  template <class T, int kVectors, bool kAligned, bool kGram, bool kLayerNorm>
  static Kernel get() {
    return [](const Call& call, float* shared) { Row<T, kVectors, kAligned, kGram, kLayerNorm>(call, shared).run(); };
  }
};

}  // namespace
}  // namespace steerkern::cuda

extern "C" int64_t steer_on_host(const void* bank, int64_t rows, const void* links, const void* fields, int64_t entries,
                                 const void* span, int64_t slots, const void* gain, int64_t width, int64_t dtype,
                                 int64_t norm, float eps, int64_t n, void* h, int64_t h_stride, const void* slot,
                                 const void* weight, const void* bias, void* y, const void* delta, int64_t delta_stride,
                                 void* trace, int64_t trace_columns, int64_t warps, int64_t cluster, int64_t gram) {
  using namespace steerkern;
  using namespace steerkern::cuda;
  Call call = {};
  call.tables.bank = static_cast<const float*>(bank);
  call.tables.rows = rows;
  call.tables.links = static_cast<const int32_t*>(links);
  call.tables.fields = static_cast<const float*>(fields);
  call.tables.entries = entries;
  call.tables.span = static_cast<const int32_t*>(span);
  call.tables.slots = slots;
  call.tables.gain = static_cast<const float*>(gain);
  call.width = int32_t(width);
  call.norm = Norm(norm);
  call.eps = eps;
  call.n = n;
  call.h = h;
  call.h_stride = h_stride;
  call.slot = static_cast<const int32_t*>(slot);
  call.weight = weight;
  call.bias = bias;
  call.y = y;
  call.delta = delta;
  call.delta_stride = delta_stride;
  call.trace = static_cast<float*>(trace);
  call.trace_columns = trace_columns;
  Tuning tuning;
  tuning.warps = int(warps);
  tuning.cluster = int(cluster);
  const Shape s = shape(n, width, Dtype(dtype), tuning, true, 132);
  const bool even = aligned(call, Dtype(dtype));
  const Kernel kernel = choose<Kernels, Kernel>(Dtype(dtype), {s.vectors, even, gram != 0, call.norm == Norm::kLayer});
  const int all = s.threads / 32, block_threads = s.threads / s.cluster;
  for (int64_t row = 0; row < n; ++row)
    run_cluster(row, block_threads, s.cluster, shared_floats(all, all / s.cluster),
                [&] { kernel(call, shared_memory()); });
  return (s.threads << 8) | (s.cluster << 4) | (s.vectors << 1) | even;
}
