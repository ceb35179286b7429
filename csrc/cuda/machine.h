// What a kernel asks of the machine: loads and stores of 16 bytes, conversions, shuffles, barriers, clusters.
// tests/ops/cuda_host.h has the same on the CPU, so that the kernel's own code can be run without a GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "elements.h"

#define STEER_DEVICE __device__ __forceinline__
#define STEER_UNROLL _Pragma("unroll")
#define STEER_ROLLED _Pragma("unroll 1")

namespace steerkern::cuda {

constexpr unsigned kAll = 0xffffffffu;

STEER_DEVICE int thread_in_block() { return threadIdx.x; }
STEER_DEVICE int threads_in_block() { return blockDim.x; }
STEER_DEVICE int64_t block() { return blockIdx.x; }

STEER_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
STEER_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }

// Exactly one rounding each; nvcc is also told -fmad=false.
STEER_DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
STEER_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
STEER_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
STEER_DEVICE float inverse_root(float x) { return __frsqrt_rn(x); }

// Two elements in one word, the first in its low half.
STEER_DEVICE Two unpack(uint32_t word, Float16) {
  __half2 pair;
  memcpy(&pair, &word, 4);
  const float2 wide = __half22float2(pair);
  return {wide.x, wide.y};
}
STEER_DEVICE uint32_t pack(float low, float high, Bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, 4);
  return word;
}
STEER_DEVICE uint32_t pack(float low, float high, Float16) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, 4);
  return word;
}

// A row is read once: it should not push the bank and the weight out of L1.
STEER_DEVICE Raw load_once(const void* p) {
  Raw x;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3])
               : "l"(p)
               : "memory");
  return x;
}

// Read by every row, written by none.
STEER_DEVICE Raw load_shared_by_rows(const void* p) {
  Raw x;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3])
               : "l"(p));
  return x;
}
STEER_DEVICE float load_float_shared_by_rows(const float* p) { return __ldg(p); }

STEER_DEVICE void store(void* p, Raw x) {
  *static_cast<uint4*>(p) = make_uint4(x.word[0], x.word[1], x.word[2], x.word[3]);
}

// Makes the compiler forget what it has unpacked from x, or it would keep that in registers beside x.
STEER_DEVICE void forget_unpacked(Raw& x) {
  asm volatile("" : "+r"(x.word[0]), "+r"(x.word[1]), "+r"(x.word[2]), "+r"(x.word[3]));
}

// Past L1, because what is read before wait_for_dependency() is read again after it.
template <class T>
STEER_DEVICE T load_fresh(const T* p) {
  return __ldcg(p);
}

// Copies four bytes to shared memory while the thread goes on; they are there after wait_for_copies() and a barrier.
STEER_DEVICE void copy_later(float* shared, const float* p) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(p) : "memory");
}
STEER_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// A hint; it cannot fault and keeps nothing stale, unlike a load ahead of the wait.
STEER_DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

STEER_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(kAll, x, mask); }
STEER_DEVICE int shuffle(int x, int lane) { return __shfl_sync(kAll, x, lane); }
STEER_DEVICE uint32_t ballot(bool x) { return __ballot_sync(kAll, x); }
STEER_DEVICE void sync_warp() { __syncwarp(); }
STEER_DEVICE int count_ones(uint32_t x) { return __popc(x); }
STEER_DEVICE int first_one(uint32_t x) { return __ffs(int(x)) - 1; }

#if __CUDA_ARCH__ >= 900
STEER_DEVICE void wait_for_dependency() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
STEER_DEVICE void let_dependents_start() { asm volatile("griddepcontrol.launch_dependents;"); }
STEER_DEVICE int cluster_size() {
  int x;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(x));
  return x;
}
STEER_DEVICE int cluster_rank() {
  int x;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(x));
  return x;
}
STEER_DEVICE void arrive_cluster() { asm volatile("barrier.cluster.arrive.aligned;" ::: "memory"); }
STEER_DEVICE void wait_cluster() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
// Stores into the same place of another block's shared memory.
STEER_DEVICE void store_at_rank(float* p, int rank, float x) {
  const uint32_t here = static_cast<uint32_t>(__cvta_generic_to_shared(p));
  asm volatile(
      "{.reg .u32 there; mapa.shared::cluster.u32 there, %0, %1; st.shared::cluster.f32 [there], %2;}" ::"r"(here),
      "r"(rank), "f"(x)
      : "memory");
}
#else
STEER_DEVICE void wait_for_dependency() {}
STEER_DEVICE void let_dependents_start() {}
STEER_DEVICE int cluster_size() { return 1; }
STEER_DEVICE int cluster_rank() { return 0; }
STEER_DEVICE void arrive_cluster() {}
STEER_DEVICE void wait_cluster() {}
STEER_DEVICE void store_at_rank(float* p, int, float x) { *p = x; }
#endif

STEER_DEVICE void sync_block() { __syncthreads(); }

}  // namespace steerkern::cuda
