#include "steer.h"

#include <atomic>
#include <cstdlib>

namespace steerkern::cpu {
namespace {

// Below about 32k elements a thread costs more to wake than it saves.
constexpr int64_t kElementsPerThread = 32768;

bool runs_here(const Isa* isa) {
  if (!isa) return false;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  if (isa == avx2_isa()) return avx2;
  if (isa == avx512_isa())
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
  return true;
}

std::vector<const Isa*> supported() {
  std::vector<const Isa*> found;
  for (const Isa* isa : {avx512_isa(), avx2_isa(), portable_isa()})
    if (runs_here(isa)) found.push_back(isa);
  return found;
}

const Isa* find(const std::string& name) {
  for (const Isa* isa : supported())
    if (name == isa->name) return isa;
  return nullptr;
}

std::atomic<const Isa*>& chosen() {
  static std::atomic<const Isa*> isa = [] {
    const char* name = std::getenv("STEERKERN_ISA");
    const Isa* forced = name ? find(name) : nullptr;
    return forced ? forced : supported().front();
  }();
  return isa;
}

bool reachable(const Tables& t, int32_t slot) {
  if (slot >= t.slots) return false;
  const int64_t first = t.span[3 * int64_t(slot)], count = t.span[3 * int64_t(slot) + 1];
  if (count < 0 || count > kMaxEntries || first < 0 || first + count > t.entries) return false;
  for (int64_t e = first; e < first + count; ++e) {
    if (t.row(e) < 0 || t.row(e) >= t.rows || t.mate(e) >= count || t.gate(e) >= count) return false;
    if ((t.flags(e) & kPair) && t.mate(e) < 0) return false;
  }
  return true;
}

int64_t first_fault(const Call& call) {
  if (!call.slot) return -1;
  int32_t passed = -1;
  for (int64_t i = 0; i < call.n; ++i) {
    const int32_t slot = call.slot[i];
    if (slot < 0 || slot == passed) continue;
    if (!reachable(*call.tables, slot)) return i;
    passed = slot;
  }
  return -1;
}

}  // namespace

int useful_threads(int64_t n, int64_t width, int threads) {
  const int64_t most = n * width / kElementsPerThread;
  return most < threads ? int(most > 1 ? most : 1) : threads;
}

int64_t steer(const Call& call, Dtype dtype, int threads) {
  const int64_t fault = first_fault(call);
  if (fault >= 0) return fault;
  const Kernel kernel = chosen().load(std::memory_order_relaxed)->kernel[int(dtype)];
  if (threads <= 1) {
    kernel(call, 0, call.n);
    return -1;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int part = 0; part < threads; ++part)
    kernel(call, call.n * part / threads, call.n * (part + 1) / threads);
  return -1;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa* isa : supported()) names.push_back(isa->name);
  return names;
}

std::string isa() { return chosen().load()->name; }

bool set_isa(const std::string& name) {
  const Isa* wanted = find(name);
  if (wanted) chosen() = wanted;
  return wanted != nullptr;
}

}  // namespace steerkern::cpu
