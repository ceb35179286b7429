// The CPU kernel: one row at a time, three or four passes over it while it lies in L1. Included once per instruction
// set, after passes.h.

namespace {

// Edits one row; returns the new |h|^2 if a pass had it, else kUnknown.
template <class T>
float edit(const Call& call, T* h, const T* base, const T* delta, int32_t slot, float* trace, const Ahead& ahead) {
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
  float square = project(h, base, delta, v, packed, reads, call.width);
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

template <class T>
void normalise(const Call& call, T* h, T* y, int64_t next, float square) {
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
    const T* base = call.base ? static_cast<const T*>(call.base) + i * call.h_stride : h;
    const T* delta = call.delta ? static_cast<const T*>(call.delta) + i * call.delta_stride : nullptr;
    float square = kUnknown;
    float* trace = call.trace ? call.trace + i * call.trace_columns : nullptr;
    if (call.slot && call.slot[i] >= 0)
      square = edit(call, h, base, delta, call.slot[i], trace, ahead);
    else if (delta)
      square = read<0, true>(h, base, delta, nullptr, nullptr, call.width);
    if (call.norm != Norm::kNone) normalise(call, h, static_cast<T*>(call.y) + i * call.width, ahead.row, square);
  }
}

constexpr Isa kIsa = {STEER_ISA, {run_rows<float>, run_rows<Bfloat16>, run_rows<Float16>}};

}  // namespace
