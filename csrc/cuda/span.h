// What a row's slot says: its span of entries, read from the tables with every index checked.
#pragma once

#include "call.h"
#include "target.h"

namespace steerkern::cuda {

// What a row's slot refers to. `count` is 0 where there is nothing to do or a table would be left.
struct Span {
  int32_t first, count, mode;
  STEER_DEVICE bool operator==(const Span& o) const { return first == o.first && count == o.count && mode == o.mode; }
};

STEER_DEVICE Span span_of(const Tables& t, int32_t slot) {
  if (slot < 0 || slot >= t.slots) return {0, 0, 0};
  const int32_t* p = t.span + 3 * int64_t(slot);
  const Span s = {load_fresh(p), load_fresh(p + 1), load_fresh(p + 2)};
  if (s.count < 0 || s.count > kMaxEntries || s.first < 0 || int64_t(s.first) + s.count > t.entries) return {0, 0, 0};
  return s;
}

// What a lane needs to know of the entries `lane` and `lane + 32` of a span; all loads are independent.
struct Entries {
  int32_t row[2], flags[2];
  bool fault;  // a row, mate or gate that does not exist
};

STEER_DEVICE Entries entries_of(const Tables& t, const Span& span, int lane) {
  Entries found = {};
  STEER_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int k = lane + 32 * i;
    if (k >= span.count) continue;
    const int32_t* p = t.links + span.first + k;
    const int32_t row = load_fresh(p), mate = load_fresh(p + t.entries), gate = load_fresh(p + 2 * t.entries);
    const int32_t flags = load_fresh(p + 3 * t.entries);
    found.row[i] = row;
    found.flags[i] = flags;
    found.fault |= row < 0 || row >= t.rows || mate >= span.count || gate >= span.count || ((flags & kPair) && mate < 0);
  }
  return found;
}

}  // namespace steerkern::cuda
