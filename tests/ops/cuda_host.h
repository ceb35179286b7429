// The machine of csrc/cuda/machine.h on one CPU thread: every CUDA thread is a fiber, every barrier a place to switch.
// It stops on what a GPU would hang on or fault on: a barrier that not all threads reach, an address off 16 bytes.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "cuda/elements.h"

#define STEER_DEVICE inline
#define STEER_UNROLL
#define STEER_ROLLED

namespace steerkern::cuda {

[[noreturn]] inline void stop(const char* what) {
  std::fprintf(stderr, "cuda on host: %s\n", what);
  std::abort();
}

// A barrier of `expected` threads that can be passed again and again.
struct Barrier {
  int expected = 0, arrived = 0;
  long generation = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  int thread = 0, rank = 0;
  long cluster_generation = -1;
};

struct Warp {
  Barrier barrier;
  uint32_t value[32];
};

struct Machine {
  int threads = 0, cluster = 1, shared_floats = 0;
  int64_t row = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;      // of all blocks
  std::vector<Barrier> blocks;
  Barrier all;
  std::vector<std::vector<float>> shared;  // by rank
  ucontext_t scheduler;
  Fiber* current = nullptr;
  long passed = 0;  // barriers, to see that something moves
  std::function<void()> body;
};

inline Machine machine;
constexpr size_t kStack = 256 << 10;

inline void switch_away() { swapcontext(&machine.current->context, &machine.scheduler); }

inline long arrive(Barrier& b) {
  const long generation = b.generation;
  if (++b.arrived == b.expected) {
    b.arrived = 0;
    ++b.generation;
    ++machine.passed;
  }
  return generation;
}

inline void pass(Barrier& b, long generation) {
  while (b.generation == generation) switch_away();
}

inline void fiber_main() {
  machine.body();
  machine.current->done = true;
  ++machine.passed;
  switch_away();
}

// Runs `body` once per thread of the blocks that share row `row`.
inline void run_cluster(int64_t row, int threads, int cluster, int shared_floats, std::function<void()> body) {
  Machine& m = machine;
  m.threads = threads;
  m.cluster = cluster;
  m.shared_floats = shared_floats;
  m.row = row;
  m.body = std::move(body);
  m.warps.assign(size_t(threads / 32 * cluster), {});
  for (Warp& warp : m.warps) warp.barrier.expected = 32;
  m.blocks.assign(size_t(cluster), {});
  for (Barrier& block : m.blocks) block.expected = threads;
  m.all = {threads * cluster};
  m.shared.assign(size_t(cluster), std::vector<float>(size_t(shared_floats), std::nanf("")));
  m.fibers.resize(size_t(threads * cluster));
  for (int i = 0; i < threads * cluster; ++i) {
    Fiber& fiber = m.fibers[size_t(i)];
    if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStack);
    fiber.done = false;
    fiber.thread = i % threads;
    fiber.rank = i / threads;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  for (bool left = true; left;) {
    left = false;
    const long before = m.passed;
    for (Fiber& fiber : m.fibers) {
      if (fiber.done) continue;
      left = true;
      m.current = &fiber;
      swapcontext(&m.scheduler, &fiber.context);
    }
    if (left && m.passed == before) stop("not every thread reaches a barrier");
  }
}

inline int thread_in_block() { return machine.current->thread; }
inline int threads_in_block() { return machine.threads; }
inline int64_t block() { return machine.row * machine.cluster + machine.current->rank; }
inline int cluster_size() { return machine.cluster; }
inline int cluster_rank() { return machine.current->rank; }
inline float* shared_memory() { return machine.shared[size_t(machine.current->rank)].data(); }

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float mul(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline float inverse_root(float x) { return float(1.0 / std::sqrt(double(x))); }

inline Two unpack(uint32_t word, Float16) {
  _Float16 half[2];
  std::memcpy(half, &word, 4);
  return {float(half[0]), float(half[1])};
}
inline uint32_t round_bfloat16(float x) {
  if (x != x) return 0x7fff;
  const uint32_t bits = bits_of(x);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
inline uint32_t pack(float low, float high, Bfloat16) { return round_bfloat16(low) | round_bfloat16(high) << 16; }
inline uint32_t pack(float low, float high, Float16) {
  const _Float16 half[2] = {_Float16(low), _Float16(high)};
  uint32_t word;
  std::memcpy(&word, half, 4);
  return word;
}

inline void check_16_bytes(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) stop("an access of 16 bytes off 16 bytes");
}
inline Raw load_once(const void* p) {
  check_16_bytes(p);
  Raw x;
  std::memcpy(&x, p, 16);
  return x;
}
inline Raw load_shared_by_rows(const void* p) { return load_once(p); }
inline float load_float_shared_by_rows(const float* p) { return *p; }
inline void forget_unpacked(Raw&) {}
inline void store(void* p, Raw x) {
  check_16_bytes(p);
  std::memcpy(p, &x, 16);
}
template <class T>
T load_fresh(const T* p) {
  return *p;
}
inline void prefetch(const void*) {}
inline void copy_later(float* shared, const float* p) { *shared = *p; }
inline void wait_for_copies() {}

inline void sync_warp() {
  Barrier& b = machine.warps[size_t(machine.current->rank * (machine.threads / 32) + machine.current->thread / 32)].barrier;
  pass(b, arrive(b));
}
inline uint32_t exchange(uint32_t mine, int from) {
  Warp& warp = machine.warps[size_t(machine.current->rank * (machine.threads / 32) + machine.current->thread / 32)];
  warp.value[machine.current->thread % 32] = mine;
  sync_warp();
  const uint32_t theirs = warp.value[from];
  sync_warp();
  return theirs;
}
inline float shuffle_xor(float x, int mask) {
  return float_of(exchange(bits_of(x), (machine.current->thread % 32) ^ mask));
}
inline int shuffle(int x, int lane) { return int(exchange(uint32_t(x), lane)); }
inline uint32_t ballot(bool x) {
  Warp& warp = machine.warps[size_t(machine.current->rank * (machine.threads / 32) + machine.current->thread / 32)];
  exchange(x, 0);
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= warp.value[i] << i;
  sync_warp();
  return bits;
}
inline int count_ones(uint32_t x) { return __builtin_popcount(x); }
inline int first_one(uint32_t x) { return __builtin_ffs(int(x)) - 1; }
constexpr unsigned kAll = 0xffffffffu;

inline void wait_for_dependency() {}
inline void let_dependents_start() {}
inline void sync_block() {
  Barrier& b = machine.blocks[size_t(machine.current->rank)];
  pass(b, arrive(b));
}
inline void arrive_cluster() { machine.current->cluster_generation = arrive(machine.all); }
inline void wait_cluster() { pass(machine.all, machine.current->cluster_generation); }
inline void store_at_rank(float* p, int rank, float x) {
  machine.shared[size_t(rank)][size_t(p - shared_memory())] = x;
}

}  // namespace steerkern::cuda
