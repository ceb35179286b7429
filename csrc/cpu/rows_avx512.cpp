#include "kernel.h"

// GCC only: clang has no `#pragma GCC target`, and takes the portable kernel.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // _mm512_undefined_ps of GCC 12, its bug 105593
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c,prefer-vector-width=512")
#define STEER_ISA "avx512"
#define STEER_NATIVE 16
namespace steerkern::cpu {
#include "lanes.h"
#include "passes.h"
#include "rows.h"
const Isa* avx512_isa() { return &kIsa; }
}  // namespace steerkern::cpu
#else
namespace steerkern::cpu {
const Isa* avx512_isa() { return nullptr; }
}  // namespace steerkern::cpu
#endif
