// Which kernel runs a call, and with how many threads.
#pragma once

#include "row.h"

namespace steerkern::cuda {

// How a call of some width is launched.
struct Shape {
  int vectors;  // 16-byte pieces that a thread holds, 0 for rows too wide for registers
  int threads;  // of all blocks of a row
  int cluster;  // blocks of a row
};

// Which kernel: what is rare (rows off 16 bytes, LayerNorm, the widest rows) is read again in each pass, by the same
// threads in the same order, so with the same bits.
struct Way {
  int vectors;
  bool aligned, gram, layer;
};

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

inline Shape shape(int64_t n, int64_t width, Dtype dtype, const Tuning& tuning, bool clusters, int processors) {
  const int64_t pieces = (width * size_of(dtype) + 15) / 16;
  // Several blocks on a multiprocessor hide each other's barriers: at first 8 warps, then two pieces per thread, then 16.
  Shape s = {1, 0, 1};
  if (tuning.warps > 0) {
    while (s.vectors < 4 && pieces > s.vectors * tuning.warps * 32) s.vectors *= 2;
  } else {
    s.vectors = pieces <= 256 ? 1 : pieces <= 1024 ? 2 : 4;
  }
  int64_t warps = (pieces + s.vectors * 32 - 1) / (s.vectors * 32);
  if (warps > kMaxWarps) {
    s.vectors = 0;
    warps = kMaxWarps;
  }
  s.threads = int(warps) * 32;
  // One processor reads the bank at 64 bytes per clock: 16 rows of 4096 take it longer than the whole unsteered kernel.
  int blocks = tuning.cluster;
  if (blocks == 0) blocks = tuning.entries >= 8 && n * kMaxCluster <= processors ? kMaxCluster : 1;
  if (!clusters) blocks = 1;
  if (blocks > kMaxCluster) blocks = kMaxCluster;
  while (warps % blocks) --blocks;
  s.cluster = blocks;
  return s;
}

inline bool aligned(const Call& call, Dtype dtype) {
  const int64_t size = size_of(dtype);
  if (call.width * size % 16 || call.h_stride * size % 16 || call.delta_stride * size % 16) return false;
  for (const void* p : {static_cast<const void*>(call.h), call.weight, call.bias, static_cast<const void*>(call.y),
                        call.delta, static_cast<const void*>(call.tables.bank)})
    if (reinterpret_cast<uintptr_t>(p) % 16) return false;
  return true;
}

template <class Kernels, class Kernel, class T>
Kernel choose(Way way) {
  if (!way.aligned)
    return way.layer ? Kernels::template get<T, 0, false, false, true>() : Kernels::template get<T, 0, false, false, false>();
  if (way.layer) return Kernels::template get<T, 0, true, false, true>();
  switch (way.vectors) {
    case 1:
      return way.gram ? Kernels::template get<T, 1, true, true, false>() : Kernels::template get<T, 1, true, false, false>();
    case 2:
      return way.gram ? Kernels::template get<T, 2, true, true, false>() : Kernels::template get<T, 2, true, false, false>();
    case 4: return Kernels::template get<T, 4, true, false, false>();
  }
  return Kernels::template get<T, 0, true, false, false>();
}

template <class Kernels, class Kernel>
Kernel choose(Dtype dtype, Way way) {
  if (dtype == Dtype::kFloat32) return choose<Kernels, Kernel, float>(way);
  return dtype == Dtype::kBfloat16 ? choose<Kernels, Kernel, Bfloat16>(way) : choose<Kernels, Kernel, Float16>(way);
}

}  // namespace steerkern::cuda
