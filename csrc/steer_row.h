// The maths of one row between its projection and its lift, shared by the CPU and the CUDA kernels.
// No torch, no CUDA headers. The meaning is fixed by steerkern/ops/reference.py; the layout by steerkern/ops/schemas.py.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define STEER_INLINE __host__ __device__ __forceinline__
#else
#define STEER_INLINE inline
#endif

namespace steerkern {

constexpr int kMaxEntries = 64;

enum Flag : int32_t { kRead = 1, kWrite = 2, kPair = 4, kCosine = 8, kGained = 16 };
enum Mode : int32_t { kKeepNorm = 1 };
enum class Norm : int32_t { kNone = 0, kLlama = 1, kFp32 = 2, kGemma = 3, kLayer = 4 };
enum class Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// The tables of one site; `entries` is also the distance between two rows of `links` and of `fields`.
struct Tables {
  const float* bank = nullptr;      // [rows, width]
  const int32_t* links = nullptr;   // [4, entries]: bank row, mate, gate, flags
  const float* fields = nullptr;    // [7, entries]: alpha, beta, lo, hi, scale, gate lo, gate hi
  const int32_t* span = nullptr;    // [slots, 3]: first entry, count, mode
  const float* gain = nullptr;      // [slots]
  int64_t rows = 0, entries = 0, slots = 0;

  STEER_INLINE int32_t row(int64_t e) const { return links[e]; }
  STEER_INLINE int32_t mate(int64_t e) const { return links[entries + e]; }
  STEER_INLINE int32_t gate(int64_t e) const { return links[2 * entries + e]; }
  STEER_INLINE int32_t flags(int64_t e) const { return links[3 * entries + e]; }
  STEER_INLINE float field(int f, int64_t e) const { return fields[f * entries + e]; }
};

// Coefficient of v_e in the lift: gain * scale * (a'_e - a_e), or 0 where the gate is shut.
// `a` holds the coordinates of the slot's entries, `k` is the entry's index in the slot, `e` its index in the tables.
STEER_INLINE float coefficient(const Tables& t, const float* a, int k, int64_t e, float gain, float norm) {
  const int32_t flags = t.flags(e);
  if (!(flags & kWrite)) return 0.0f;
  const int32_t gate = t.gate(e);
  if (gate >= 0) {
    float condition = a[gate];
    if (flags & kCosine) condition = norm > 0.0f ? condition / norm : 0.0f;
    if (!(t.field(5, e) <= condition && condition <= t.field(6, e))) return 0.0f;
  }
  float d;
  if (flags & kPair) {
    const float other = a[t.mate(e)];
    const float radius = sqrtf(a[k] * a[k] + other * other);
    d = t.field(0, e) * radius - a[k];
  } else {
    d = t.field(0, e) - t.field(1, e) * a[k];
    const float low = t.field(2, e) - a[k], high = t.field(3, e) - a[k];
    d = d < low ? low : d;
    d = d > high ? high : d;
  }
  const float strength = (flags & kGained) ? gain * t.field(4, e) : t.field(4, e);
  return strength * d;
}

}  // namespace steerkern
