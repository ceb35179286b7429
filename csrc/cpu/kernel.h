// What a CPU kernel is called with, and the table of kernels that each instruction set provides.
#pragma once

#include "../steer_row.h"

namespace steerkern::cpu {

// One call of the op. Strides count elements; `slot`, `weight`, `bias`, `y`, `delta`, `base` and `trace` may be null.
struct Call {
  const Tables* tables;
  int64_t width;
  Norm norm;
  float eps;
  int64_t n;
  void* h;
  int64_t h_stride;
  const int32_t* slot;
  const void* weight;
  const void* bias;
  void* y;  // [n, width], contiguous
  const void* delta;
  int64_t delta_stride;
  const void* base;  // rows that delta is added to, as far apart as those of h; null where those are h itself
  float* trace;  // [n, trace_columns], contiguous
  int64_t trace_columns;
};

// Runs the rows [begin, end) of a call whose slots have been checked.
using Kernel = void (*)(const Call&, int64_t begin, int64_t end);

struct Isa {
  const char* name;
  Kernel kernel[3];  // by Dtype
};

// Null where this build or platform has none.
const Isa* avx512_isa();
const Isa* avx2_isa();
const Isa* portable_isa();

}  // namespace steerkern::cpu
