// The CPU kernel: one row at a time, three or four passes over it while it lies in L1. Included once per instruction
// set after lanes.h. Every sum has four accumulators of sixteen lanes in a fixed order and nothing is contracted to
// FMA, so a row's bits depend on its width and dtype only: not on the instruction set, the threads or the batch.

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

// h = round(base + delta); returns |h|^2.
template <class T>
float add(T* h, const T* base, const T* delta, int64_t width) {
  Lanes squares[kSums] = {};
  sweep(width, [&](int64_t j, int g, auto extent) STEER_LAMBDA {
    const Lanes x = rounded(load(base + j, extent) + load(delta + j, extent), h);
    store(h + j, x, extent);
    squares[g] = squares[g] + x * x;
  });
  return total(squares);
}

template <class T>
float square_norm(const T* h, int64_t width) {
  Lanes squares[kSums] = {};
  sweep(width, [&](int64_t j, int g, auto extent) STEER_LAMBDA {
    const Lanes x = load(h + j, extent);
    squares[g] = squares[g] + x * x;
  });
  return total(squares);
}

// a[d] = <h, v[d]> for D directions in one pass over h.
template <int D, class T>
void project(const T* h, const float* const* v, float* a, int64_t width) {
  Lanes sums[D][kSums] = {};
  sweep(width, [&](int64_t j, int g, auto extent) STEER_LAMBDA {
    const Lanes x = load(h + j, extent);
    for (int d = 0; d < D; ++d) sums[d][g] = sums[d][g] + x * load(v[d] + j, extent);
  });
  for (int d = 0; d < D; ++d) a[d] = total(sums[d]);
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
  const auto finish = [&](Lanes x) STEER_LAMBDA {
    if (kind == Lift::kRescale) x = x * fill(ratio);
    return kind == Lift::kMeasure ? x : rounded_mixed(x, h);
  };
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
      const Lanes x = finish(load(h + j, extent) + sum[0]);
      if (kind != Lift::kMeasure) store(h + j, x, extent);
      squares[g] = squares[g] + x * x;
    } else {
      for (int k = 0; k < ahead.count; ++k)
        for (int i = 0; i < kVectors; ++i) __builtin_prefetch(ahead.v[k] + j + i * kLanes);
#pragma GCC unroll 2
      for (int i = 0; i < kVectors; i += 2) {
        const Pair term = order_as({sum[i], sum[i + 1]}, h);
        Pair x = load_pair(h + j + i * kLanes);
        x = {finish(x.one + term.one), finish(x.two + term.two)};
        if (kind != Lift::kMeasure) store_pair(h + j + i * kLanes, x);
        squares[i] = squares[i] + x.one * x.one;
        squares[i + 1] = squares[i + 1] + x.two * x.two;
      }
    }
  });
  return total(squares);
}

// Edits one row; returns the new |h|^2 if a pass had it, else `square` as given.
template <class T>
float edit(const Call& call, T* h, int32_t slot, float* trace, float square, const Ahead& ahead) {
  const Tables& t = *call.tables;
  const int64_t first = t.span[3 * int64_t(slot)];
  const int count = t.span[3 * int64_t(slot) + 1];
  const bool keep_norm = t.span[3 * int64_t(slot) + 2] & kKeepNorm;
  float a[kMaxEntries], packed[kMaxEntries];
  const float* v[kMaxEntries];
  int reads = 0, terms = 0;
  bool needs_norm = keep_norm;
  for (int k = 0; k < count; ++k) {
    if (t.flags(first + k) & kRead) v[reads++] = t.bank + t.row(first + k) * call.width;
    needs_norm |= (t.flags(first + k) & kCosine) != 0;
  }
  int d = 0;
  for (; d + 4 <= reads; d += 4) project<4>(h, v + d, packed + d, call.width);
  if (reads & 2) project<2>(h, v + d, packed + d, call.width), d += 2;
  if (reads & 1) project<1>(h, v + d, packed + d, call.width);
  for (int k = 0, r = 0; k < count; ++k) {
    const bool read = t.flags(first + k) & kRead;
    a[k] = read ? packed[r++] : 0.0f;
    if (read && trace && k < call.trace_columns) trace[k] = a[k];
  }

  if (needs_norm && square == kUnknown) square = square_norm(h, call.width);
  const float norm = needs_norm ? __builtin_sqrtf(square) : 0.0f;
  for (int k = 0; k < count; ++k) {
    const float c = coefficient(t, a, k, first + k, t.gain[slot], norm);
    if (c == 0.0f) continue;
    v[terms] = t.bank + t.row(first + k) * call.width;
    packed[terms++] = c;
  }
  if (terms == 0) return square;
  if (!keep_norm) return lift<Lift::kStore>(h, v, packed, terms, call.width, ahead);
  const float after = __builtin_sqrtf(lift<Lift::kMeasure>(h, v, packed, terms, call.width, ahead));
  return lift<Lift::kRescale>(h, v, packed, terms, call.width, Ahead{}, after > 0.0f ? norm / after : 1.0f);
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

template <class T>
void normalise(const Call& call, const T* h, T* y, int64_t next, float square) {
  const T* weight = static_cast<const T*>(call.weight);
  if (call.norm == Norm::kLayer)
    return layer_norm(h, weight, static_cast<const T*>(call.bias), y, call.width, next, call.eps);
  if (square == kUnknown) square = square_norm(h, call.width);
  const float scale = 1.0f / __builtin_sqrtf(square / float(call.width) + call.eps);
  if (!weight) return scale_row<Norm::kNone>(h, weight, y, call.width, next, scale);
  if (call.norm == Norm::kLlama) return scale_row<Norm::kLlama>(h, weight, y, call.width, next, scale);
  if (call.norm == Norm::kGemma) return scale_row<Norm::kGemma>(h, weight, y, call.width, next, scale);
  scale_row<Norm::kFp32>(h, weight, y, call.width, next, scale);
}

Ahead look_ahead(const Call& call, int64_t i, int64_t end) {
  Ahead ahead;
  if (i + 1 == end) return ahead;
  ahead.row = call.h_stride;
  if (!call.slot || call.slot[i + 1] < 0 || call.slot[i + 1] == call.slot[i]) return ahead;
  const Tables& t = *call.tables;
  const int32_t* span = t.span + 3 * int64_t(call.slot[i + 1]);
  ahead.count = span[1] < kAhead ? span[1] : kAhead;
  for (int k = 0; k < ahead.count; ++k) ahead.v[k] = t.bank + t.row(span[0] + k) * call.width;
  return ahead;
}

template <class T>
void run_rows(const Call& call, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    T* h = static_cast<T*>(call.h) + i * call.h_stride;
    const Ahead ahead = look_ahead(call, i, end);
    float square = kUnknown;
    if (call.delta) {
      const T* base = call.base ? static_cast<const T*>(call.base) + i * call.h_stride : h;
      square = add(h, base, static_cast<const T*>(call.delta) + i * call.delta_stride, call.width);
    }
    if (call.slot && call.slot[i] >= 0)
      square = edit(call, h, call.slot[i], call.trace ? call.trace + i * call.trace_columns : nullptr, square, ahead);
    if (call.norm != Norm::kNone) normalise(call, h, static_cast<T*>(call.y) + i * call.width, ahead.row, square);
  }
}

constexpr Isa kIsa = {STEER_ISA, {run_rows<float>, run_rows<Bfloat16>, run_rows<Float16>}};

}  // namespace
