// Row dtypes of the kernels, and the 16 bytes in which rows are read and written.
#pragma once

#include <cstdint>

namespace steerkern::cuda {

struct Bfloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

struct alignas(16) Raw {
  uint32_t word[4];
};

struct Two {
  float low, high;
};

}  // namespace steerkern::cuda
