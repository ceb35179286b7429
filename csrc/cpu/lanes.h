// Sixteen floats that behave alike in every instruction set, and the three row dtypes that load into them.
// Included once per instruction set, after the target pragma, with STEER_NATIVE floats per register; no standard
// header may be included from here on, or its inline functions would be compiled for that target too.

#define STEER_FN inline __attribute__((always_inline))
#define STEER_LAMBDA __attribute__((always_inline))

namespace {

constexpr int kLanes = 16;
constexpr int kParts = kLanes / STEER_NATIVE;

typedef float Float __attribute__((vector_size(4 * STEER_NATIVE)));
typedef int32_t Int __attribute__((vector_size(4 * STEER_NATIVE)));
typedef uint32_t Word __attribute__((vector_size(4 * STEER_NATIVE)));
typedef uint16_t Short __attribute__((vector_size(2 * STEER_NATIVE)));

struct Lanes {
  Float part[kParts];
};

struct Bfloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

STEER_FN Lanes fill(float value) {
  Lanes x;
  for (int p = 0; p < kParts; ++p) x.part[p] = value - Float{};  // a broadcast: x - 0 is x, x + 0 is not
  return x;
}

STEER_FN Lanes operator+(Lanes a, Lanes b) {
  for (int p = 0; p < kParts; ++p) a.part[p] += b.part[p];
  return a;
}

STEER_FN Lanes operator-(Lanes a, Lanes b) {
  for (int p = 0; p < kParts; ++p) a.part[p] -= b.part[p];
  return a;
}

STEER_FN Lanes operator*(Lanes a, Lanes b) {
  for (int p = 0; p < kParts; ++p) a.part[p] *= b.part[p];
  return a;
}

// The order of additions is fixed, so every instruction set returns the same bits.
STEER_FN float sum(Lanes x) {
  typedef float Four __attribute__((vector_size(16)));
  Four lane[4];
  __builtin_memcpy(lane, &x, sizeof lane);
  const Four s = (lane[0] + lane[2]) + (lane[1] + lane[3]);
  return (s[0] + s[2]) + (s[1] + s[3]);
}

STEER_FN Word bits_of(Float x) { return (Word)x; }
STEER_FN Float float_of(Word x) { return (Float)x; }

// Whether one of them is not a number.
STEER_FN bool has_nan(Lanes a, Lanes b) {
  bool found = false;
  for (int p = 0; p < kParts; ++p) {
#if STEER_NATIVE == 16
    found |= _mm512_cmp_ps_mask((__m512)a.part[p], (__m512)b.part[p], _CMP_UNORD_Q) != 0;
#elif STEER_NATIVE == 8
    found |= _mm256_movemask_ps(_mm256_cmp_ps((__m256)a.part[p], (__m256)b.part[p], _CMP_UNORD_Q)) != 0;
#else
    const Int odd = (a.part[p] != a.part[p]) | (b.part[p] != b.part[p]);
    for (int i = 0; i < STEER_NATIVE; ++i) found |= odd[i] != 0;
#endif
  }
  return found;
}

// Round to nearest even as bfloat16, left in the high half of the word. Integer arithmetic, because
// _mm512_cvtneps_pbh flushes denormals. A NaN whose low half is all zeros comes through; others may carry over into -0.
STEER_FN Float round_bfloat16(Float x) {
  const Word bits = bits_of(x);
#if STEER_NATIVE == 16  // one instruction fewer: a row of 2048 takes 7 % less time
  const __m512i up = _mm512_add_epi32((__m512i)bits, _mm512_set1_epi32(0x7fff));
  const __mmask16 odd = _mm512_test_epi32_mask((__m512i)bits, _mm512_set1_epi32(0x10000));
  const Word nearest = (Word)_mm512_mask_add_epi32(up, odd, up, _mm512_set1_epi32(1));
#else
  const Word nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
#endif
  return float_of(nearest & 0xffff0000u);
}

// What the generic code below would give; GCC 12 takes twice the instructions for it.
#if STEER_NATIVE == 16
STEER_FN Word widen(Short x) { return (Word)_mm512_cvtepu16_epi32((__m256i)x); }
STEER_FN Short narrow(Word x) { return (Short)_mm512_cvtepi32_epi16((__m512i)x); }
STEER_FN Float widen_float16(Short x) { return (Float)_mm512_cvtph_ps((__m256i)x); }
STEER_FN Short narrow_float16(Float x) { return (Short)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
#elif STEER_NATIVE == 8
STEER_FN Word widen(Short x) { return (Word)_mm256_cvtepu16_epi32((__m128i)x); }
STEER_FN Short narrow(Word x) {
  const __m256i word = (__m256i)x;
  return (Short)_mm_packus_epi32(_mm256_castsi256_si128(word), _mm256_extracti128_si256(word, 1));
}
STEER_FN Float widen_float16(Short x) { return (Float)_mm256_cvtph_ps((__m128i)x); }
STEER_FN Short narrow_float16(Float x) { return (Short)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#else
STEER_FN Word widen(Short x) { return __builtin_convertvector(x, Word); }
STEER_FN Short narrow(Word x) { return __builtin_convertvector(x, Short); }

STEER_FN Float widen_float16(Short x) {
  const Word half = widen(x), sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  const Word normal = (magnitude << 13) + (112u << 23);
  const Word subnormal = bits_of(__builtin_convertvector((Int)magnitude, Float) * 0x1p-24f);
  const Word special = (magnitude << 13) | 0x7f800000u | (magnitude > 0x7c00u ? Word{} + 0x400000u : Word{});
  const Word finite = magnitude < 0x400u ? subnormal : normal;
  return float_of(sign | (magnitude >= 0x7c00u ? special : finite));
}

STEER_FN Short narrow_float16(Float x) {
  const Word bits = bits_of(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const Word nearest = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // adding 0.5 rounds at 2^-24, the step of float16 subnormals
  const Word subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const Word normal = magnitude >= 0x477ff000u ? Word{} + 0x7c00u : nearest;
  const Word finite = magnitude < 0x38800000u ? subnormal : normal;
  const Word quiet = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  return narrow(sign | (magnitude > 0x7f800000u ? quiet : finite));
}
#endif

// load: sixteen elements, widened.
template <class V, class T>
STEER_FN V peek(const T* p) {
  V x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

template <class V, class T>
STEER_FN void poke(T* p, V x) {
  __builtin_memcpy(p, &x, sizeof x);
}

STEER_FN Lanes load(const float* p) {
  Lanes x;
  for (int i = 0; i < kParts; ++i) x.part[i] = peek<Float>(p + i * STEER_NATIVE);
  return x;
}

STEER_FN Lanes load(const Bfloat16* p) {
  Lanes x;
  for (int i = 0; i < kParts; ++i) x.part[i] = float_of(widen(peek<Short>(p + i * STEER_NATIVE)) << 16);
  return x;
}

STEER_FN Lanes load(const Float16* p) {
  Lanes x;
  for (int i = 0; i < kParts; ++i) x.part[i] = widen_float16(peek<Short>(p + i * STEER_NATIVE));
  return x;
}

// rounded: the values that a store to that dtype and a load would give back.
STEER_FN Lanes rounded(Lanes x, const float*) { return x; }

STEER_FN Lanes rounded(Lanes x, const Bfloat16*) {
  for (int i = 0; i < kParts; ++i) x.part[i] = round_bfloat16(x.part[i]);
  return x;
}

STEER_FN Lanes rounded(Lanes x, const Float16*) {
  for (int i = 0; i < kParts; ++i) x.part[i] = widen_float16(narrow_float16(x.part[i]));
  return x;
}

// store: sixteen values that `rounded` has returned.
STEER_FN void store(float* p, Lanes x) {
  for (int i = 0; i < kParts; ++i) poke(p + i * STEER_NATIVE, x.part[i]);
}

STEER_FN void store(Bfloat16* p, Lanes x) {
  for (int i = 0; i < kParts; ++i) poke(p + i * STEER_NATIVE, narrow(bits_of(x.part[i]) >> 16));
}

STEER_FN void store(Float16* p, Lanes x) {
  for (int i = 0; i < kParts; ++i) poke(p + i * STEER_NATIVE, narrow_float16(x.part[i]));
}

// Thirty-two elements in an order of the dtype's own, for passes that treat every element alike: bfloat16 comes
// as the even and the odd elements, which takes a shift and a mask where the natural order takes shuffles.
struct Pair {
  Lanes one, two;
};

template <class T>
STEER_FN Pair load_pair(const T* p) {
  return {load(p), load(p + kLanes)};
}

STEER_FN Pair load_pair(const Bfloat16* p) {
  Pair x;
  for (int i = 0; i < kParts; ++i) {
    const Word word = peek<Word>(p + 2 * i * STEER_NATIVE);
    x.one.part[i] = float_of(word << 16);
    x.two.part[i] = float_of(word & 0xffff0000u);
  }
  return x;
}

// Thirty-two floats from their natural order into that of the dtype.
template <class T>
STEER_FN Pair order_as(Pair x, const T*) {
  return x;
}

STEER_FN Pair order_as(Pair x, const Bfloat16*) {
  Int even, odd;
  for (int i = 0; i < STEER_NATIVE; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
  Float natural[2 * kParts];
  for (int i = 0; i < kParts; ++i) natural[i] = x.one.part[i], natural[kParts + i] = x.two.part[i];
  for (int i = 0; i < kParts; ++i) {
    x.one.part[i] = __builtin_shuffle(natural[2 * i], natural[2 * i + 1], even);
    x.two.part[i] = __builtin_shuffle(natural[2 * i], natural[2 * i + 1], odd);
  }
  return x;
}

// And back.
template <class T>
STEER_FN Pair natural_order(Pair x, const T*) {
  return x;
}

STEER_FN Pair natural_order(Pair x, const Bfloat16*) {
  Int low, high;
  for (int i = 0; i < STEER_NATIVE; ++i) {
    low[i] = i / 2 + i % 2 * STEER_NATIVE;
    high[i] = low[i] + STEER_NATIVE / 2;
  }
  Float natural[2 * kParts];
  for (int i = 0; i < kParts; ++i) {
    natural[2 * i] = __builtin_shuffle(x.one.part[i], x.two.part[i], low);
    natural[2 * i + 1] = __builtin_shuffle(x.one.part[i], x.two.part[i], high);
  }
  for (int i = 0; i < kParts; ++i) x.one.part[i] = natural[i], x.two.part[i] = natural[kParts + i];
  return x;
}

// `rounded` for an x with a float32 operand, whose NaNs may have any payload (those of CUDA are all ones): a payload in
// the low half alone is made quiet first. Maths on bfloat16 operands makes no such NaN.
template <class T>
STEER_FN Pair rounded_mixed(Pair x, const T* dtype) {
  return {rounded(x.one, dtype), rounded(x.two, dtype)};
}

STEER_FN Lanes quiet(Lanes x) {
  for (int i = 0; i < kParts; ++i) {
    const Float nan = float_of((bits_of(x.part[i]) | 0x400000u) & 0xffff0000u);
    x.part[i] = x.part[i] != x.part[i] ? nan : x.part[i];
  }
  return x;
}

STEER_FN Pair rounded_mixed(Pair x, const Bfloat16* dtype) {
  if (__builtin_expect(has_nan(x.one, x.two), false)) x = {quiet(x.one), quiet(x.two)};
  return {rounded(x.one, dtype), rounded(x.two, dtype)};
}

template <class T>
STEER_FN void store_pair(T* p, Pair x) {
  store(p, x.one);
  store(p + kLanes, x.two);
}

STEER_FN void store_pair(Bfloat16* p, Pair x) {
  for (int i = 0; i < kParts; ++i) {
    poke(p + 2 * i * STEER_NATIVE, (bits_of(x.one.part[i]) >> 16) | bits_of(x.two.part[i]));
  }
}

// Copies `count` <= kMost elements without a call, across which GCC would keep every accumulator in memory.
template <int kMost, class T>
STEER_FN void copy(T* to, const T* from, int64_t count) {
  if (count == kMost) {
    __builtin_memcpy(to, from, kMost * sizeof(T));
  } else if constexpr (kMost > 1) {
    constexpr int kHalf = kMost / 2;
    const bool upper = count >= kHalf;
    if (upper) __builtin_memcpy(to, from, kHalf * sizeof(T));
    copy<kHalf>(to + upper * kHalf, from + upper * kHalf, count - upper * kHalf);
  }
}

// The last elements of a row, padded with zeros; `count` is at most the capacity.
template <class T, int kCapacity = kLanes>
struct Tail {
  alignas(64) T value[kCapacity] = {};
  STEER_FN Tail(const T* p, int64_t count) { copy<kCapacity>(value, p, count); }
};

}  // namespace
