// What the Hopper kernels share: rings of buffers and the loading of tiles.
#pragma once

#include "cuda/ptx/tma.h"
#include "cuda/sm90/tensor_maps.h"

namespace jax_flashattn::cuda::sm90 {

// Whether what the warpgroups take with setmaxnreg is there: a launch gives each thread the same
// share of the registers, in multiples of eight, and a warpgroup that asks for more than that in
// all waits for ever.
constexpr bool registers_fit(int warpgroups, int registers) {
  return registers <= warpgroups * (65536 / (128 * warpgroups) / 8 * 8);
}

// A position in a ring of buffers: which one, and the parity of its barriers. Good for 2^32 uses,
// and for any number where kCount is a power of two.
template <int kCount>
struct Ring {
  unsigned uses = 0;
  __device__ int index() const { return uses % kCount; }
  __device__ int parity() const { return uses / kCount % 2; }
  __device__ void next() { ++uses; }
};

// A tile of one head, kRows rows in kChunks boxes of kChunk columns; expects its bytes on `full`.
template <int kRows, int kChunks, class T>
__device__ __forceinline__ void load_tile(T* shared, const CUtensorMap* map, uint64_t* full,
                                          int head, int row, int b) {
  ptx::barrier_expect(full, kRows * kChunks * kChunk * 2);
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
    ptx::tma_load(shared + c * kRows * kChunk, map, full, c * kChunk, head, row, b);
}

__device__ __forceinline__ int warp_min(int x) { return __reduce_min_sync(0xffffffffu, x); }
__device__ __forceinline__ int warp_max(int x) { return __reduce_max_sync(0xffffffffu, x); }

}  // namespace jax_flashattn::cuda::sm90
