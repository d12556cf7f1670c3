// Warpgroup matrix products: descriptors, ordering, and conversion of fragments.
#pragma once

#include "cuda/ptx/barrier.h"
#include "ptx/wgmma_shapes.h"  // generated: WgmmaShared, WgmmaRegister

namespace jax_flashattn::cuda::ptx {

// A shared-memory operand in the 128-byte swizzle; the same for the whole warp. `leading` is the
// distance in bytes between 64-element chunks of an M- or N-contiguous operand; a K-contiguous one
// ignores it. The reduction puts it into a uniform register, where products want it: without,
// ptxas moves every word of every operand there, and the latency of that holds products back.
static __device__ __forceinline__ Operand operand(const void* shared, int leading = 16) {
  return {__reduce_or_sync(0xffffffffu, (shared_address(shared) & 0x3ffff) >> 4 |
                                            static_cast<uint32_t>(leading >> 4) << 16)};
}
// The operand some bytes further on.
static __device__ __forceinline__ Operand advanced(Operand operand, int bytes) {
  return {operand.low + (bytes >> 4)};
}

static __device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
static __device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
static __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving register accesses into an asynchronous region.
template <int kCount>
static __device__ __forceinline__ void pin(float (&r)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(r[i])::"memory");
}
// The same before a product that overwrites its accumulator: what was there is dead.
template <int kCount>
static __device__ __forceinline__ void pin_dead(float (&r)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "=f"(r[i])::"memory");
}
template <int kRows, int kCount>
static __device__ __forceinline__ void pin(uint32_t (&r)[kRows][kCount]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) asm volatile("" : "+r"(r[i][j])::"memory");
  }
}

static __device__ __forceinline__ uint32_t pack(float low, float high, __nv_bfloat16) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
static __device__ __forceinline__ uint32_t pack(float low, float high, __half) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

// One of two packed numbers.
static __device__ __forceinline__ float unpack(uint32_t pair, int high, __nv_bfloat16) {
  return __uint_as_float(high ? pair & 0xffff0000u : pair << 16);
}
static __device__ __forceinline__ float unpack(uint32_t pair, int high, __half) {
  return __half2float(__ushort_as_half(high ? pair >> 16 : pair & 0xffffu));
}

// Each nibble of `selector` chooses a byte of (a, b); with its highest bit, that byte's sign eight
// times, which __byte_perm does not do.
static __device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}

static __device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

static __device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
static __device__ __forceinline__ float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Four 8x8 matrices of 16-bit elements from an accumulator-shaped fragment to shared memory.
static __device__ __forceinline__ void store_matrices(uint32_t row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

}  // namespace jax_flashattn::cuda::ptx
