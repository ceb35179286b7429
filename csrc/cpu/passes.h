// The passes over one row: read (and add), lift, normalise. Every sum has four accumulators of sixteen lanes in a fixed
// order and nothing is contracted to FMA, so a row's bits depend on its width and dtype only: not on the instruction
// set, the threads or the batch. Included once per instruction set, after lanes.h.

namespace {

constexpr int kSums = 4;
constexpr int kAhead = 8;  // directions of the next row that are worth fetching
constexpr float kUnknown = -1.0f;  // a sum of squares that has not been computed

// What a step of a sweep covers: four whole vectors, or `count` elements of one, the rest taken as zeros.
struct Full {
  static constexpr int kVectors = kSums;
};

struct Part {
  static constexpr int kVectors = 1;
  int64_t count;
};

// Calls f(j, g, extent) for each step from element j of a row; vector i of the step belongs to accumulator g + i. The
// elements behind the last whole step go through zero-padded copies, so there is no scalar version of any maths.
template <class F>
STEER_FN void sweep_steps(int64_t width, F f) {
  int64_t j = 0;
  for (; j + kSums * kLanes <= width; j += kSums * kLanes) f(j, 0, Full{});
  if (j == width) return;
#pragma GCC unroll 4
  for (int g = 0; g < kSums; ++g) {
    const int64_t left = width - j - g * kLanes;
    if (left > 0) f(j + g * kLanes, g, Part{left < kLanes ? left : kLanes});
  }
}

// The same, one call per vector.
template <class F>
STEER_FN void sweep(int64_t width, F f) {
  sweep_steps(width, [&](int64_t j, int g, auto extent) STEER_LAMBDA {
#pragma GCC unroll 4
    for (int i = 0; i < extent.kVectors; ++i) f(j + i * kLanes, g + i, extent);
  });
}

template <class T>
STEER_FN Lanes load(const T* p, Full) {
  return load(p);
}

template <class T>
STEER_FN Lanes load(const T* p, Part part) {
  return load(Tail<T>(p, part.count).value);
}

template <class T>
STEER_FN void store(T* p, Lanes x, Full) {
  store(p, x);
}

template <class T>
STEER_FN void store(T* p, Lanes x, Part part) {
  T value[kLanes];
  store(value, x);
  copy<kLanes>(p, value, part.count);
}

STEER_FN float total(const Lanes (&s)[kSums]) { return sum((s[0] + s[1]) + (s[2] + s[3])); }

// h = round(base + delta) if kAdd; then a[d] = <h, v[d]> for D directions. Returns |h|^2 where that costs least, with
// the sum or alone, else kUnknown; in the order of the dtype as in `lift`, so that it does not tell how h came about.
template <int D, bool kAdd, class T>
float read(T* h, const T* base, const T* delta, const float* const* v, float* a, int64_t width) {
  Lanes sums[D + 1][kSums] = {};
  const auto square = [&](int g, Lanes x) STEER_LAMBDA {
    if (kAdd || D == 0) sums[D][g] = sums[D][g] + x * x;
  };
  const auto product = [&](int64_t j, int g, Lanes x, auto extent) STEER_LAMBDA {
    for (int d = 0; d < D; ++d) sums[d][g] = sums[d][g] + x * load(v[d] + j, extent);
  };
  sweep_steps(width, [&](int64_t j, int g, auto extent) STEER_LAMBDA {
    if constexpr (decltype(extent)::kVectors == 1) {
      Lanes x = load((kAdd ? base : h) + j, extent);
      if (kAdd) store(h + j, x = rounded(x + load(delta + j, extent), h), extent);
      square(g, x);
      product(j, g, x, extent);
    } else {
#pragma GCC unroll 2
      for (int i = 0; i < kSums; i += 2) {
        const int64_t k = j + i * kLanes;
        Pair x = kAdd ? load_pair(base + k) : D == 0 ? load_pair(h + k) : Pair{load(h + k), load(h + k + kLanes)};
        if (kAdd) {
          const Pair term = load_pair(delta + k);
          store_pair(h + k, x = {rounded(x.one + term.one, h), rounded(x.two + term.two, h)});
        }
        square(i, x.one), square(i + 1, x.two);
        if (D == 0) continue;
        if (kAdd) x = natural_order(x, h);
        product(k, i, x.one, extent), product(k + kLanes, i + 1, x.two, extent);
      }
    }
  });
  for (int d = 0; d < D; ++d) a[d] = total(sums[d]);
  return kAdd || D == 0 ? total(sums[D]) : kUnknown;
}

template <class T>
float square_norm(T* h, int64_t width) {
  const T* none = nullptr;
  return read<0, false>(h, none, none, nullptr, nullptr, width);
}

// `read` for any number of directions; the first pass adds where there is a delta.
template <class T>
float project(T* h, const T* base, const T* delta, const float* const* v, float* a, int count, int64_t width) {
  float square = kUnknown;
  int d = 0;
  if (delta) {
    d = count >= 4 ? 4 : count >= 2 ? 2 : count;
    square = d == 4   ? read<4, true>(h, base, delta, v, a, width)
             : d == 2 ? read<2, true>(h, base, delta, v, a, width)
             : d == 1 ? read<1, true>(h, base, delta, v, a, width)
                      : read<0, true>(h, base, delta, v, a, width);
  }
  for (; d + 4 <= count; d += 4) read<4, false>(h, base, delta, v + d, a + d, width);
  if (d + 2 <= count) read<2, false>(h, base, delta, v + d, a + d, width), d += 2;
  if (d < count) read<1, false>(h, base, delta, v + d, a + d, width);
  return square;
}

// What the next row will read, fetched while this one is computed: where it lies, and its directions if they differ.
struct Ahead {
  int64_t row = 0;  // elements from this row to the next
  int count = 0;
  const float* v[kAhead];
};

enum class Lift { kStore, kMeasure, kRescale };

// x = h + (c[0] v[0] + c[1] v[1] + ...), added in this order. kMeasure returns |x|^2 and leaves the row alone; kStore
// writes h = round(x) and kRescale h = round(x * ratio), and both return the new |h|^2. Meanwhile the next row's
// directions are fetched, because this pass waits for arithmetic and the others for memory: with a direction of its own
// for each of 256 rows of 2048 bfloat16 the call takes 1.06 times as long as with one for all, 1.4 times without.
template <Lift kind, class T>
float lift(T* h, const float* const* v, const float* c, int terms, int64_t width, const Ahead& ahead,
           float ratio = 1.0f) {
  Lanes squares[kSums] = {};
  const auto scaled = [&](Lanes x) STEER_LAMBDA { return kind == Lift::kRescale ? x * fill(ratio) : x; };
  sweep_steps(width, [&](int64_t j, int g, auto extent) STEER_LAMBDA {
    constexpr int kVectors = decltype(extent)::kVectors;
    Lanes sum[kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) sum[i] = fill(c[0]) * load(v[0] + j + i * kLanes, extent);
    for (int k = 1; k < terms; ++k) {
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) sum[i] = sum[i] + fill(c[k]) * load(v[k] + j + i * kLanes, extent);
    }
    if constexpr (kVectors == 1) {
      Lanes x = scaled(load(h + j, extent) + sum[0]);
      if (kind != Lift::kMeasure) store(h + j, x = rounded_mixed({x, x}, h).one, extent);
      squares[g] = squares[g] + x * x;
    } else {
      for (int k = 0; k < ahead.count; ++k)
        for (int i = 0; i < kVectors; ++i) __builtin_prefetch(ahead.v[k] + j + i * kLanes);
#pragma GCC unroll 2
      for (int i = 0; i < kVectors; i += 2) {
        const Pair term = order_as({sum[i], sum[i + 1]}, h);
        Pair x = load_pair(h + j + i * kLanes);
        x = {scaled(x.one + term.one), scaled(x.two + term.two)};
        if (kind != Lift::kMeasure) store_pair(h + j + i * kLanes, x = rounded_mixed(x, h));
        squares[i] = squares[i] + x.one * x.one;
        squares[i + 1] = squares[i + 1] + x.two * x.two;
      }
    }
  });
  return total(squares);
}

// Calls f(h, weight, bias, y) for each thirty-two elements; the last call works on zero-padded copies. Meanwhile the
// row `next` elements away is fetched: the hardware stops at page borders, and 2048 rows take a fifth less time.
template <class T, class F>
STEER_FN void map_pairs(const T* h, const T* weight, const T* bias, T* y, int64_t width, int64_t next, F f) {
  constexpr int kStep = 2 * kLanes;
  int64_t j = 0;
  for (; j + kStep <= width; j += kStep) {
    for (int line = 0; line < kStep * int(sizeof(T)); line += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(h + j + next) + line);
    f(h + j, weight ? weight + j : weight, bias ? bias + j : bias, y + j);
  }
  if (const int64_t left = width - j) {
    using Rest = Tail<T, kStep>;
    const Rest x(h + j, left), w(weight ? weight + j : h, left), b(bias ? bias + j : h, left);
    T out[kStep];
    f(x.value, weight ? w.value : weight, bias ? b.value : bias, out);
    copy<kStep>(y + j, out, left);
  }
}

// y = round(h * scale * weight) in the convention of `norm`; the reference fixes where it rounds.
template <Norm norm, class T>
void scale_row(const T* h, const T* weight, T* y, int64_t width, int64_t next, float scale) {
  map_pairs(h, weight, weight, y, width, next, [&](const T* h, const T* w, const T*, T* y) STEER_LAMBDA {
    const Pair x = load_pair(h);
    Lanes one = x.one * fill(scale), two = x.two * fill(scale);
    if (norm != Norm::kNone) {
      Pair factor = load_pair(w);
      if (norm == Norm::kGemma) factor = {fill(1.0f) + factor.one, fill(1.0f) + factor.two};
      if (norm == Norm::kLlama) one = rounded(one, h), two = rounded(two, h);
      one = one * factor.one, two = two * factor.two;
    }
    store_pair(y, {rounded(one, h), rounded(two, h)});
  });
}

template <class T>
void layer_norm(const T* h, const T* weight, const T* bias, T* y, int64_t width, int64_t next, float eps) {
  Lanes sums[kSums] = {}, squares[kSums] = {};
  sweep(width, [&](int64_t j, int g, auto extent) STEER_LAMBDA { sums[g] = sums[g] + load(h + j, extent); });
  const float mean = total(sums) / float(width);
  float means[kLanes];
  store(means, fill(mean));
  sweep(width, [&](int64_t j, int g, auto extent) STEER_LAMBDA {
    const Lanes x = load(h + j, extent) - load(means, extent);  // so that the padding stays 0
    squares[g] = squares[g] + x * x;
  });
  const float scale = 1.0f / __builtin_sqrtf(total(squares) / float(width) + eps);
  map_pairs(h, weight, bias, y, width, next, [&](const T* h, const T* w, const T* b, T* y) STEER_LAMBDA {
    const Pair x = load_pair(h);
    Lanes one = (x.one - fill(mean)) * fill(scale), two = (x.two - fill(mean)) * fill(scale);
    if (w) {
      const Pair factor = load_pair(w);
      one = one * factor.one, two = two * factor.two;
    }
    if (b) {
      const Pair shift = load_pair(b);
      one = one + shift.one, two = two + shift.two;
    }
    store_pair(y, {rounded(one, h), rounded(two, h)});
  });
}

}  // namespace
