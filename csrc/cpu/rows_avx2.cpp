#include "kernel.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#pragma GCC target("avx2,f16c")
#define STEER_ISA "avx2"
#define STEER_NATIVE 8
namespace steerkern::cpu {
#include "lanes.h"
#include "passes.h"
#include "rows.h"
const Isa* avx2_isa() { return &kIsa; }
}  // namespace steerkern::cpu
#else
namespace steerkern::cpu {
const Isa* avx2_isa() { return nullptr; }
}  // namespace steerkern::cpu
#endif
