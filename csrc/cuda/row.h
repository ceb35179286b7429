// The CUDA kernel: one row by one block of threads, or by the blocks of one cluster.
//
// Thread t of a row's `threads` holds its 16-byte pieces t, t + threads, ... between the passes. Every sum runs over a
// thread's elements, then over its warp, then over the warps in order; threads per row follow width and dtype. So a
// row's bits depend neither on the batch, nor on alignment, nor on the number of blocks that share the row.
#pragma once

#include <cstring>

#include "pieces.h"
#include "span.h"

namespace steerkern::cuda {

constexpr int kMaxWarps = 16;
constexpr int kMaxCluster = 8;         // a group of lanes that holds one of four sums has eight, one per block to tell
constexpr int kGramEntries = 2;        // the Gram matrix of more takes more sums than the reduction it saves
constexpr float kGramGuard = 1e-2f;    // below this part of |h|^2 the difference has lost too much: sum h' itself
constexpr int kTableRows = 4 + 7;      // links and fields of a slot's entries, copied to shared memory with the gain
constexpr int kGain = kTableRows * kMaxEntries;
constexpr int kTableFloats = kGain + 4;

// Sums of one warp in the projection: coordinates (or, for Gram, coordinates and products), then |h|^2.
constexpr int kSums = kMaxEntries + 4;
constexpr int kSquare = kMaxEntries;

// Single sums after it; each has a place of its own, so that one barrier per sum is enough.
enum Stage { kAfterLift, kSquares, kMean, kVariance, kStages };

// Floats of shared memory: tables, sums of every warp of the row, and per warp of this block coefficients and rows.
STEER_INLINE constexpr int shared_floats(int warps, int warps_of_block) {
  return kTableFloats + (kSums + kStages) * warps + 2 * kMaxEntries * warps_of_block;
}

// kVectors: 16-byte pieces that a thread keeps in registers; 0: they are read again in each pass.
// kAligned: every row, weight and bank row starts on 16 bytes and ends on a whole piece.
// kGram: |h'|^2 of up to kGramEntries entries comes from the Gram matrix.
// kLayerNorm: LayerNorm instead of the other norms, from whose kernels its two sums would take registers.
template <class T, int kVectors, bool kAligned, bool kGram, bool kLayerNorm>
class Row {
 public:
  static constexpr int kW = kWide<T>;
  static constexpr int kGroup = kVectors == 1 ? 2 : 1;  // bank rows read at once: four loads of 16 bytes per thread for bf16
  static constexpr int kHeld = kVectors > 0 ? kVectors : 1;
  using Values = float[kW];

  STEER_DEVICE Row(const Call& call, float* shared)
      : call_(call),
        cluster_(cluster_size()),
        warps_(threads_in_block() / 32 * cluster_),
        thread_(cluster_rank() * threads_in_block() + thread_in_block()),
        row_(block() / cluster_),
        h_(static_cast<T*>(call.h) + row_ * call.h_stride),
        tables_(shared) {}

  STEER_DEVICE void run() {
    if (cluster_ > 1) arrive_cluster();
    let_dependents_start();
    const int32_t guess = call_.slot ? load_fresh(call_.slot + row_) : -1;
    const Span ahead = span_of(call_.tables, guess);
    prefetch_constants(ahead);
    wait_for_dependency();

    // What was read ahead of the wait only named addresses: everything is read again, all at once and with the row.
    const int32_t slot = call_.slot ? load_fresh(call_.slot + row_) : -1;
    Span span = span_of(call_.tables, guess);
    Entries entries = entries_of(call_.tables, ahead, lane());
    fetch_row();
    if (slot != guess || !(span == ahead)) {
      span = span_of(call_.tables, slot);
      entries = entries_of(call_.tables, span, lane());
    }
    if (cluster_ > 1) wait_cluster();  // the other blocks run by now, their shared memory may be written
    float square = kUnknown;
    if (span.count > 0 && ballot(entries.fault) == 0) square = edit(span, entries, slot);
    if (kVectors > 0 && call_.delta && !written_) store_row();
    if constexpr (kLayerNorm) {
      layer_norm();
    } else if (call_.norm != Norm::kNone) {
      rms_norm(square);
    }
  }

 private:
  static constexpr float kUnknown = -1.0f;

  // Calls f(j, x) for each piece of this thread with its values. Between the passes they stay packed: 8 elements of
  // bf16 take 4 registers, and what a pass unpacks is cheap beside the 32 bytes of bank per direction that it reads.
  template <class F>
  STEER_DEVICE void each(F f) {
    if constexpr (kVectors > 0) {
      STEER_UNROLL
      for (int j = 0; j < kVectors; ++j) {
        Values x;
        forget_unpacked(held_[j]);
        unpack<T>(held_[j], x);
        f(j, x);
      }
    } else {
      STEER_ROLLED
      for (int j = 0; first(j) - kW * thread_ < call_.width; ++j) {
        Values x;
        unpack<T>(load(h_, j), x);
        f(j, x);
      }
    }
  }

  // First element of piece j of this thread.
  STEER_DEVICE int first(int j) const { return (j * warps_ * 32 + thread_) * kW; }

  STEER_DEVICE bool inside(int j, int e) const { return first(j) + (kAligned ? 0 : e) < call_.width; }

  // Piece j of something of the row's dtype; zeros outside the row.
  STEER_DEVICE Raw load(const T* p, int j) const {
    if constexpr (!kAligned) return load_elements(p, j);
    return inside(j, 0) ? load_once(p + first(j)) : Raw{};
  }

  STEER_DEVICE Raw load_parameter(const T* p, int j) const {
    if constexpr (!kAligned) return load_elements(p, j);
    return inside(j, 0) ? load_shared_by_rows(p + first(j)) : Raw{};
  }

  STEER_DEVICE Raw load_elements(const T* p, int j) const {
    T value[kW] = {};
    STEER_UNROLL
    for (int e = 0; e < kW; ++e)
      if (inside(j, e)) value[e] = p[first(j) + e];
    Raw raw;
    memcpy(&raw, value, 16);
    return raw;
  }

  // Four elements from element e of piece j of a bank row; zeros for bank row -1.
  STEER_DEVICE void load_bank(int32_t bank_row, int j, int e, float (&v)[4]) const {
    const float* p = call_.tables.bank + int64_t(bank_row) * call_.width + first(j) + e;
    if constexpr (kAligned) {
      const Raw raw = bank_row >= 0 && inside(j, e) ? load_shared_by_rows(p) : Raw{};
      STEER_UNROLL
      for (int i = 0; i < 4; ++i) v[i] = float_of(raw.word[i]);
    } else {
      STEER_UNROLL
      for (int i = 0; i < 4; ++i) v[i] = bank_row >= 0 && inside(j, e + i) ? load_float_shared_by_rows(p + i) : 0.0f;
    }
  }

  STEER_DEVICE void store(T* p, int j, const Raw& raw) const {
    if constexpr (kAligned) {
      if (inside(j, 0)) cuda::store(p + first(j), raw);
    } else {
      T value[kW];
      memcpy(value, &raw, 16);
      STEER_UNROLL
      for (int e = 0; e < kW; ++e)
        if (inside(j, e)) p[first(j) + e] = value[e];
    }
  }

  // What the later passes read as piece j.
  STEER_DEVICE void hold(int j, const Raw& raw, bool stored) {
    if constexpr (kVectors > 0) {
      held_[j] = raw;
      if (!stored) return;
    }
    store(h_, j, raw);
  }

  STEER_DEVICE void prefetch_constants(const Span& span) const {
    constexpr int kLine = 128;
    const int at = thread_ * kLine, step = warps_ * 32 * kLine;
    if (call_.weight)
      for (int b = at; b < call_.width * int(sizeof(T)); b += step)
        prefetch(static_cast<const char*>(call_.weight) + b);
    for (int k = 0; k < span.count; ++k) {
      const int32_t row = load_fresh(call_.tables.links + span.first + k);
      if (row < 0 || row >= call_.tables.rows) return;
      const char* p = reinterpret_cast<const char*>(call_.tables.bank + int64_t(row) * call_.width);
      for (int b = at; b < call_.width * 4; b += step) prefetch(p + b);
    }
  }

  // h, or round(h + delta), which is stored at once only where the row does not stay in registers.
  STEER_DEVICE void fetch_row() {
    if constexpr (kVectors > 0) {
      STEER_UNROLL
      for (int j = 0; j < kVectors; ++j) held_[j] = load(h_, j);
    }
    if (!call_.delta) return;
    const T* delta = static_cast<const T*>(call_.delta) + row_ * call_.delta_stride;
    each([&](int j, Values& x) {
      Values d;
      unpack<T>(load(delta, j), d);
      STEER_UNROLL
      for (int e = 0; e < kW; ++e) x[e] = add(x[e], d[e]);
      hold(j, pack<T>(x), false);
    });
  }

  STEER_DEVICE void store_row() {
    STEER_UNROLL
    for (int j = 0; j < kVectors; ++j) store(h_, j, held_[j]);
  }

  STEER_DEVICE void sync() {
    if (cluster_ == 1) {
      sync_block();
    } else {
      arrive_cluster();
      wait_cluster();
    }
  }

  // Writes x to the same place in every block of the row; `part` tells apart the lanes that hold the same x.
  STEER_DEVICE void tell(float* place, int part, float x) const {
    if (cluster_ == 1) {
      if (part == 0) *place = x;
    } else if (part < cluster_) {
      store_at_rank(place, part, x);
    }
  }

  // The sum of `partial` over the whole row.
  STEER_DEVICE float total(Stage stage, float partial) {
    float* places = stages() + stage * warps_;
    tell(places + warp(), lane(), reduce(partial));
    sync();
    float sum = places[0];
    for (int w = 1; w < warps_; ++w) sum = add(sum, places[w]);
    return sum;
  }

  // After the barrier: sum number i of the projection.
  STEER_DEVICE float projected(int i) const {
    float sum = sums()[i];
    for (int w = 1; w < warps_; ++w) sum = add(sum, sums()[w * kSums + i]);
    return sum;
  }

  STEER_DEVICE float squares() {
    float square = 0.0f;
    each([&](int, Values& x) { square = squares_of(x, square); });
    return square;
  }

  STEER_DEVICE static float squares_of(const Values& x, float square) {
    STEER_UNROLL
    for (int e = 0; e < kW; ++e) square = fma(x[e], x[e], square);
    return square;
  }

  // Starts to copy links, fields and gain into shared memory, where the map after the barrier reads them.
  STEER_DEVICE Tables stage_tables(const Span& span, int32_t slot) {
    if (thread_in_block() == 0) copy_later(tables_ + kGain, call_.tables.gain + slot);
    for (int i = thread_in_block(); i < kTableRows * kMaxEntries; i += threads_in_block()) {
      const int table = i / kMaxEntries, k = i % kMaxEntries;
      if (k >= span.count) continue;
      const int64_t e = span.first + k;
      const float* source = table < 4 ? reinterpret_cast<const float*>(call_.tables.links) + table * call_.tables.entries
                                      : call_.tables.fields + (table - 4) * call_.tables.entries;
      copy_later(tables_ + i, source + e);
    }
    Tables here;
    here.links = reinterpret_cast<const int32_t*>(tables_);
    here.fields = tables_ + 4 * kMaxEntries;
    here.entries = kMaxEntries;
    return here;
  }

  // Dot products of the row with kGroup bank rows, of which -1 is none; this thread's part.
  STEER_DEVICE void project(const int32_t (&bank_row)[kGroup], float (&s)[kGroup]) {
    STEER_UNROLL
    for (int d = 0; d < kGroup; ++d) s[d] = 0.0f;
    each([&](int j, Values& x) {
      STEER_UNROLL
      for (int e = 0; e < kW; e += 4) {
        float v[kGroup][4];
        STEER_UNROLL
        for (int d = 0; d < kGroup; ++d) load_bank(bank_row[d], j, e, v[d]);
        STEER_UNROLL
        for (int d = 0; d < kGroup; ++d) {
          STEER_UNROLL
          for (int i = 0; i < 4; ++i) s[d] = fma(x[e + i], v[d][i], s[d]);
        }
      }
    });
  }

  // All kD entries of a slot, with |h|^2 and the products of the bank rows with each other: sums
  // 0..kD-1 are coordinates, kSquare is |h|^2, and from kGramEntries on follow the products of rows 0 and 0, 0 and 1,
  // 1 and 1.
  template <int kD>
  STEER_DEVICE void project_with_gram(int32_t row) {
    constexpr int kCount = kD + 1 + kD * (kD + 1) / 2;
    float s[(kCount + 3) / 4 * 4] = {};
    int32_t bank_row[kD];
    STEER_UNROLL
    for (int d = 0; d < kD; ++d) bank_row[d] = shuffle(row, d);
    each([&](int j, Values& x) {
      STEER_UNROLL
      for (int e = 0; e < kW; e += 4) {
        float v[kD][4];
        STEER_UNROLL
        for (int d = 0; d < kD; ++d) load_bank(bank_row[d], j, e, v[d]);
        STEER_UNROLL
        for (int i = 0; i < 4; ++i) {
          s[kD] = fma(x[e + i], x[e + i], s[kD]);
          STEER_UNROLL
          for (int k = 0; k < kD; ++k) {
            s[k] = fma(x[e + i], v[k][i], s[k]);
            STEER_UNROLL
            for (int m = 0; m <= k; ++m) {
              float& product = s[kD + 1 + k * (k + 1) / 2 + m];
              product = fma(v[m][i], v[k][i], product);
            }
          }
        }
      }
    });
    STEER_UNROLL
    for (int g = 0; g < kCount; g += 4) {
      const float four[4] = {s[g], s[g + 1], s[g + 2], s[g + 3]};
      const float x = reduce(four, lane());
      const int i = g + lane() / 8;
      const int place = i < kD ? i : i == kD ? kSquare : kGramEntries + i - kD - 1;
      if (i < kCount) tell(sums() + warp() * kSums + place, lane() % 8, x);
    }
  }

  // |h'|^2 from what was projected and the coefficients.
  STEER_DEVICE float gram_square(int count, const float* c) const {
    float term = 0.0f;
    const int pairs = count * (count + 1) / 2;
    if (lane() < count) term = mul(mul(2.0f, c[lane()]), projected(lane()));
    if (lane() >= kGramEntries && lane() < kGramEntries + pairs) {
      const int p = lane() - kGramEntries;
      const int k = p < 1 ? 0 : 1, i = p - k;
      static_assert(kGramEntries == 2);
      term = mul(mul(i == k ? 1.0f : 2.0f, mul(c[i], c[k])), projected(lane()));
    }
    if (lane() == 31) term = projected(kSquare);
    return reduce(term);
  }

  // Edits the row; returns the new |h|^2 where it is known.
  STEER_DEVICE float edit(const Span& span, const Entries& entries, int32_t slot) {
    const int count = span.count;
    const bool keep_norm = span.mode & kKeepNorm;
    const Tables here = stage_tables(span, slot);
    const uint32_t reads[2] = {ballot(entries.flags[0] & kRead), ballot(entries.flags[1] & kRead)};
    const bool cosine = ballot((entries.flags[0] | entries.flags[1]) & kCosine) != 0;
    const bool gram = kGram && count <= kGramEntries && !keep_norm && call_.norm != Norm::kNone;

    const bool measured = gram || keep_norm || cosine;
    if (gram) {
      if constexpr (kGram) {
        if (count == 1) project_with_gram<1>(entries.row[0]);
        if (count == 2) project_with_gram<2>(entries.row[0]);
      }
    } else {
      project_reads(entries.row, reads[0], reads[1]);
      if (measured) tell(sums() + warp() * kSums + kSquare, lane(), reduce(squares()));
    }
    wait_for_copies();
    sync();

    const float before = measured ? projected(kSquare) : kUnknown;
    const float norm = measured ? sqrtf(before) : 0.0f;
    float a[2] = {}, c[2] = {};
    STEER_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int k = lane() + 32 * i;
      if (k < count && (here.flags(k) & kRead)) {
        const int below = count_ones(reads[0] & (i ? kAll : (1u << lane()) - 1)) + (i ? count_ones(reads[1] & ((1u << lane()) - 1)) : 0);
        a[i] = projected(gram ? k : below);
        if (call_.trace && warp() == 0 && k < call_.trace_columns) call_.trace[row_ * call_.trace_columns + k] = a[i];
      }
      mine()[k] = a[i];
    }
    sync_warp();
    STEER_UNROLL
    for (int i = 0; i < 2; ++i)
      if (lane() + 32 * i < count) c[i] = coefficient(here, mine(), lane() + 32 * i, lane() + 32 * i, tables_[kGain], norm);
    sync_warp();
    float after = kUnknown;
    if (gram) {
      if (lane() < count) mine()[lane()] = c[0];
      sync_warp();
      after = gram_square(count, mine());
      sync_warp();
    }
    const uint32_t acts[2] = {ballot(c[0] != 0.0f), ballot(c[1] != 0.0f)};
    const int lower = count_ones(acts[0]), terms = lower + count_ones(acts[1]);
    if (terms == 0) return before;
    STEER_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (c[i] == 0.0f) continue;
      const int at = i * lower + count_ones(acts[i] & ((1u << lane()) - 1));
      mine()[at] = c[i];
      mine()[kMaxEntries + at] = float_of(uint32_t(here.row(lane() + 32 * i)));
    }
    sync_warp();
    lift(terms, keep_norm, norm);
    return after >= mul(kGramGuard, before) ? after : kUnknown;
  }

  // The coordinates that are read; the r-th of them becomes sum r. Four are reduced at a time: s[0] is the last one.
  STEER_DEVICE void project_reads(const int32_t (&row)[2], uint32_t low, uint32_t high) {
    float s[4] = {};
    int place = 0, held = 0;
    const auto next = [&] {
      const bool upper = low == 0;
      const uint32_t left = upper ? high : low;
      if (left == 0) return int32_t(-1);
      (upper ? high : low) = left & (left - 1);
      return shuffle(upper ? row[1] : row[0], first_one(left));
    };
    STEER_ROLLED
    while (low | high) {
      int32_t rows[kGroup];
      STEER_UNROLL
      for (int d = 0; d < kGroup; ++d) rows[d] = next();
      float t[kGroup];
      project(rows, t);
      STEER_UNROLL
      for (int d = 0; d < kGroup; ++d) {
        s[3] = s[2], s[2] = s[1], s[1] = s[0], s[0] = t[d];
      }
      held += kGroup;
      if (held < 4 && (low | high)) continue;
      const float x = reduce(s, lane());
      const int i = held - 1 - lane() / 8;
      if (i >= 0) tell(sums() + warp() * kSums + place + i, lane() % 8, x);
      place += held;
      held = 0;
    }
  }

  // sum = sum + c[k] v[k] + ..., in this order, for the kGroup terms from k as far as there are any; term 0 starts the
  // sum. Four elements from element e of piece j.
  STEER_DEVICE void add_terms(int k, int terms, int j, int e, float (&sum)[4]) const {
    float v[kGroup][4];
    STEER_UNROLL
    for (int d = 0; d < kGroup; ++d)
      load_bank(k + d < terms ? int32_t(bits_of(mine()[kMaxEntries + k + d])) : -1, j, e, v[d]);
    STEER_UNROLL
    for (int d = 0; d < kGroup; ++d) {
      if (k + d >= terms) break;
      const float c = mine()[k + d];
      STEER_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float term = mul(c, v[d][i]);
        sum[i] = k + d == 0 ? term : add(sum[i], term);
      }
    }
  }

  // h = round(h + sum of terms), with the norm it had where that is kept.
  STEER_DEVICE void lift(int terms, bool keep_norm, float norm) {
    float ratio = 1.0f, square = 0.0f;
    for (int pass = keep_norm ? 0 : 1; pass < 2; ++pass) {
      each([&](int j, Values& x) {
        STEER_UNROLL
        for (int e = 0; e < kW; e += 4) {
          float sum[4];
          for (int k = 0; k < terms; k += kGroup) add_terms(k, terms, j, e, sum);
          STEER_UNROLL
          for (int i = 0; i < 4; ++i) x[e + i] = add(x[e + i], sum[i]);
        }
        if (pass == 0) {
          square = squares_of(x, square);
          return;
        }
        if (keep_norm) {
          STEER_UNROLL
          for (int e = 0; e < kW; ++e) x[e] = mul(x[e], ratio);
        }
        hold(j, pack<T>(x), true);
      });
      if (pass == 0) {
        const float after = sqrtf(total(kAfterLift, square));
        ratio = after > 0.0f ? norm / after : 1.0f;
      }
    }
    written_ = true;
  }

  STEER_DEVICE T* y_of_row() const { return static_cast<T*>(call_.y) + row_ * call_.width; }

  // The reference fixes where each convention rounds.
  STEER_DEVICE void rms_norm(float square) {
    const T* weight = static_cast<const T*>(call_.weight);
    [[maybe_unused]] Raw early[kHeld] = {};  // on its way while the sum is taken
    if constexpr (kVectors > 0) {
      if (weight) {
        STEER_UNROLL
        for (int j = 0; j < kVectors; ++j) early[j] = load_parameter(weight, j);
      }
    }
    if (square == kUnknown) square = total(kSquares, squares());
    const float scale = inverse_root(add(square / float(call_.width), call_.eps));
    T* y = y_of_row();
    each([&](int j, Values& x) {
      Values w, out;
      STEER_UNROLL
      for (int e = 0; e < kW; ++e) out[e] = mul(x[e], scale);
      if (weight) {
        if constexpr (kVectors > 0) {
          unpack<T>(early[j], w);
        } else {
          unpack<T>(load_parameter(weight, j), w);
        }
        if (call_.norm == Norm::kLlama) round_to<T>(out);
        const float offset = call_.norm == Norm::kGemma ? 1.0f : 0.0f;
        STEER_UNROLL
        for (int e = 0; e < kW; ++e) out[e] = mul(out[e], add(offset, w[e]));
      }
      store(y, j, pack<T>(out));
    });
  }

  STEER_DEVICE void layer_norm() {
    float partial = 0.0f;
    each([&](int, Values& x) {
      STEER_UNROLL
      for (int e = 0; e < kW; ++e) partial = add(partial, x[e]);
    });
    const float mean = total(kMean, partial) / float(call_.width);
    float square = 0.0f;
    each([&](int j, Values& x) {
      STEER_UNROLL
      for (int e = 0; e < kW; ++e) {
        const float d = inside(j, e) ? add(x[e], -mean) : 0.0f;
        square = fma(d, d, square);
      }
    });
    const float scale = inverse_root(add(total(kVariance, square) / float(call_.width), call_.eps));
    const T *weight = static_cast<const T*>(call_.weight), *bias = static_cast<const T*>(call_.bias);
    T* y = y_of_row();
    each([&](int j, Values& x) {
      Values w, b, out;
      if (weight) unpack<T>(load_parameter(weight, j), w);
      if (bias) unpack<T>(load_parameter(bias, j), b);
      STEER_UNROLL
      for (int e = 0; e < kW; ++e) {
        out[e] = mul(add(x[e], -mean), scale);
        if (weight) out[e] = mul(out[e], w[e]);
        if (bias) out[e] = add(out[e], b[e]);
      }
      store(y, j, pack<T>(out));
    });
  }

  STEER_DEVICE int lane() const { return thread_ % 32; }
  STEER_DEVICE int warp() const { return thread_ / 32; }
  STEER_DEVICE float* sums() const { return tables_ + kTableFloats; }
  STEER_DEVICE float* stages() const { return sums() + kSums * warps_; }
  STEER_DEVICE float* mine() const { return stages() + kStages * warps_ + 2 * kMaxEntries * (thread_in_block() / 32); }

  const Call& call_;
  const int cluster_, warps_, thread_;  // blocks and warps of the row; this thread among all of the row
  const int64_t row_;
  T* const h_;
  float* const tables_;
  bool written_ = false;
  Raw held_[kHeld];
};

}  // namespace steerkern::cuda
