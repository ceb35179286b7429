// Rows in pieces of 16 bytes: packed and unpacked, and sums over the threads of a warp.
#pragma once

#include "elements.h"
#include "target.h"

namespace steerkern::cuda {

template <class T>
constexpr int kWide = 16 / int(sizeof(T));  // elements in 16 bytes

STEER_DEVICE Two unpack(uint32_t word, Bfloat16) { return {float_of(word << 16), float_of(word & 0xffff0000u)}; }

template <class T>
STEER_DEVICE void unpack(const Raw& raw, float (&x)[kWide<T>]) {
  STEER_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      x[i] = float_of(raw.word[i]);
    } else {
      const Two pair = unpack(raw.word[i], T{});
      x[2 * i] = pair.low;
      x[2 * i + 1] = pair.high;
    }
  }
}

template <class T>
STEER_DEVICE Raw pack(const float (&x)[kWide<T>]) {
  Raw raw;
  STEER_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      raw.word[i] = bits_of(x[i]);
    } else {
      raw.word[i] = pack(x[2 * i], x[2 * i + 1], T{});
    }
  }
  return raw;
}

// Rounds to the row's dtype and back; returns the rounded piece.
template <class T>
STEER_DEVICE Raw round_to(float (&x)[kWide<T>]) {
  const Raw raw = pack<T>(x);
  if constexpr (sizeof(T) == 2) unpack<T>(raw, x);
  return raw;
}

STEER_DEVICE float reduce(float x) {
  STEER_UNROLL
  for (int mask = 16; mask > 0; mask >>= 1) x = add(x, shuffle_xor(x, mask));
  return x;
}

// Four sums over a warp in 6 shuffles instead of 20: lane l ends up with the total of s[l / 8].
STEER_DEVICE float reduce(const float (&s)[4], int lane) {
  const bool upper = lane & 16, odd = lane & 8;
  const float low = add(upper ? s[2] : s[0], shuffle_xor(upper ? s[0] : s[2], 16));
  const float high = add(upper ? s[3] : s[1], shuffle_xor(upper ? s[1] : s[3], 16));
  float x = add(odd ? high : low, shuffle_xor(odd ? low : high, 8));
  STEER_UNROLL
  for (int mask = 4; mask > 0; mask >>= 1) x = add(x, shuffle_xor(x, mask));
  return x;
}

}  // namespace steerkern::cuda
