// Dropout's flags (S12) for the backward kernels, by warps that the loads leave idle.
#pragma once

#include "cuda/sm90/backward_tiles.cuh"
#include "cuda/sm90/dropout.cuh"

namespace jax_flashattn::cuda::sm90 {

// A 32 x 32 matrix of bits, of which each lane holds a row: each lane gets a column.
__device__ __forceinline__ uint32_t transpose_bits(uint32_t x) {
  const uint32_t lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const uint32_t low = 0xffffffffu / ((1u << step) + 1);  // the lower of each two times `step`
    const uint32_t other = __shfl_xor_sync(0xffffffffu, x, step);
    x = lane & step ? (x & ~low) | (other >> step & low) : (x & low) | (other << step & ~low);
  }
  return x;
}

// By the last kFlagWarps of the producer warps, which take turns: a lane makes the flags of a row.
// Buffers are used in turn as `empty` says; store(buffer, n, i, flags) puts those of 32 rows away,
// of key i % 32 of the n-th 32 keys and rows from i / 32 * 32 on of a tile.
template <class S, class Store>
__device__ void make_flags(const KeepBits& keep, BackwardSmem<S>& smem, uint64_t* empty,
                           const Store& store) {
  constexpr int kParts = S::kRows / 32, kWords = S::kKeys / 32;
  const int lane = threadIdx.x % 32;
  Ring<S::kStages> ring;
  for (int part = ptx::uniform(threadIdx.x / 32) - (4 - S::kFlagWarps);; ring.next()) {
    const int s = ring.index();
    ptx::barrier_wait(&smem.query_full[s], ring.parity());
    if (ptx::uniform(smem.step[s].row) == kNoMoreSteps) return;
    const int first_key = ptx::uniform(smem.step[s].at.key);
    // Not by a warp without a part in this step: others may have made its flags, and consumers have
    // read them, before this warp comes here, and then the parity is that of the next use.
    if (part < kParts) ptx::barrier_wait(&empty[s], ring.parity() ^ 1);
#pragma unroll 1
    for (; part < kParts; part += S::kFlagWarps) {
      const int row = 32 * part + lane;
      DroppedRow dropped(smem.stream[s], smem.limits[s][S::kLimits - 1][row_place(row)]);
      uint32_t words[kWords];
      dropped.words(first_key, keep, words);
#pragma unroll
      for (int n = 0; n < kWords; ++n) store(s, n, row, transpose_bits(words[n]));
      __syncwarp();
      if (lane == 0) ptx::barrier_arrive(&smem.flags_full[s]);
    }
    part -= kParts;
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(&smem.query_empty[s]);
  }
}

// Which of a fragment's probabilities stay, from the flags of 32 keys, of which `key` is the
// thread's first. The thread has two of every eight rows: of each byte of a word two bits.
template <int kCount>
__device__ __forceinline__ void read_flags(uint32_t (&keep)[kCount], const uint32_t* flags,
                                           int key) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    uint32_t dropped = 0;
#pragma unroll
    for (int n = 0; n < 4; ++n) {  // rows, keys
      const uint32_t word = flags[64 * k + 32 * (n / 2) + key + n % 2 * 8];
      dropped |= (word >> threadIdx.x % 4 * 2 & 0x03030303u) << 2 * n;
    }
    keep[k] = ~dropped;
  }
}
// Whether element i of the fragment does.
template <int kCount>
__device__ __forceinline__ bool stays(const uint32_t (&keep)[kCount], int i) {
  const int rows = i / 4, second = i / 2 % 2;  // of 64: which eight; the second key
  return keep[rows / 8] >> (rows % 4 * 8 + rows / 4 % 2 * 4 + second * 2 + i % 2) & 1;
}

}  // namespace jax_flashattn::cuda::sm90
