// Dropout's flags (S12) for the backward kernels, by warps that the loads leave idle.
#pragma once

#include "cuda/sm90/backward_tiles.cuh"
#include "cuda/sm90/dropout.cuh"

namespace jax_flashattn::cuda::sm90 {

// By the last kFlagWarps of the producer warps, which take turns: a lane makes the flags of a row.
// Buffers are used in turn as `empty` says; store(buffer, n, row, flags) puts those of the n-th 32
// keys of a tile away.
template <class S, class Store>
__device__ void make_flags(const BackwardParams& p, BackwardSmem<S>& smem, uint64_t* empty,
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
      DroppedRow<2> dropped(smem.stream[s], smem.limits[s][S::kLimits - 1][row],
                            p.features.keep_threshold);
#pragma unroll 1
      for (int n = 0; n < kWords; ++n) {
        uint32_t word[1];
        dropped.words(first_key + 32 * n, word);
        store(s, n, row, word[0]);
      }
      __syncwarp();
      if (lane == 0) ptx::barrier_arrive(&smem.flags_full[s]);
    }
    part -= kParts;
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(&smem.query_empty[s]);
  }
}

// Which of a fragment's probabilities stay, from the flags of 32 keys, of which `key` is the
// thread's first: bit n of the halves of a word is for row n or n + 8 of the thread's 16 rows in 64
// with that key, bit n + 8 with the other.
template <int kCount>
__device__ __forceinline__ void read_flags(uint32_t (&keep)[kCount], const uint32_t* flags,
                                           int key) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    uint32_t dropped = 0;
#pragma unroll
    for (int m = 0; m < 8; ++m) {
      const uint2 words =
          *reinterpret_cast<const uint2*>(flags + 64 * k + 8 * m + threadIdx.x % 4 * 2);
      dropped |= (words.x >> key & 0x101) << (m / 4 * 16 + m % 4 * 2);
      dropped |= (words.y >> key & 0x101) << (m / 4 * 16 + m % 4 * 2 + 1);
    }
    keep[k] = ~dropped;
  }
}
// Whether element i of the fragment does.
template <int kCount>
__device__ __forceinline__ bool stays(const uint32_t (&keep)[kCount], int i) {
  const int row = i / 4 * 2 + i % 2, second = i / 2 % 2;
  return keep[row / 16] >> (row % 16 / 8 * 16 + row % 8 + 8 * second) & 1;
}

}  // namespace jax_flashattn::cuda::sm90
