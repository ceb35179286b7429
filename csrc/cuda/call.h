// What the CUDA kernels are called with. No CUDA headers, so that the binding includes this too.
#pragma once

#include <string>
#include <vector>

#include "../steer_row.h"

namespace steerkern::cuda {

// One call of the op, passed to the kernel by value. Strides count elements; `slot`, `weight`, `bias`, `y`, `delta` and
// `trace` may be null. A row whose slot, span or links reach outside the tables is left alone.
struct Call {
  Tables tables;
  int64_t n;
  void* h;
  int64_t h_stride;
  const int32_t* slot;
  const void* weight;
  const void* bias;
  void* y;  // [n, width], contiguous
  const void* delta;
  int64_t delta_stride;
  float* trace;  // [n, trace_columns], contiguous
  int64_t trace_columns;
  int32_t width;
  float eps;
  Norm norm;
};

// How a call is launched. Only `warps` and `gram` reach into the bits of a result; by default they follow width and
// dtype alone.
struct Tuning {
  int warps = 0;           // most warps per row, 0 for the default
  int cluster = 0;         // thread blocks that share a row, 0 to choose from the number of rows and entries
  int entries = 1;         // most entries of a row, as far as known
  bool dependent = true;   // programmatic dependent launch, where the device has it
  bool gram = false;       // |h'|^2 from the Gram matrix where that is exact enough: one reduction fewer
};

// Loads the kernels for this width onto the device, which a captured graph could not do. Returns a sentence or "".
std::string prepare(int device, int64_t width, Dtype dtype, Norm norm, const Tuning& tuning);

// Launches on the stream; returns 0 or a CUDA error number.
int launch(const Call& call, Dtype dtype, int device, uintptr_t stream, const Tuning& tuning);

// The sentence for an error number of `launch`.
std::string explain(int error, int device);

// Number of usable devices; with none, `why` says so.
int devices(std::string* why);

// What this build was compiled for: "80,90,100,120+PTX".
std::string archs();

}  // namespace steerkern::cuda
