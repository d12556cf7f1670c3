// Dropout's flags for the forward kernel, by a warpgroup of its own that runs ahead of the
// consumers: half of it serves one of them, a thread for each row.
#pragma once

#include "cuda/sm90/dropout.cuh"
#include "cuda/sm90/forward_tiles.cuh"

namespace jax_flashattn::cuda::sm90 {

template <class S>
__device__ void make_flags(const ForwardParams& p, const KeepBits& keep, ForwardSmem<S>& smem) {
  static_assert(S::kGroups == 2);
  const int warpgroup = threadIdx.x % 128 / 64, row = threadIdx.x % 64;
  const bool leader = row % 32 == 0;
  Ring<S::kTiles> tile;
  Ring<kFlagStages> ring;
  for (;; tile.next()) {
    const int at = tile.index();
    ptx::barrier_wait(&smem.info_full[at], tile.parity());
    const TileInfo& info = smem.info[at];
    if (info.blocks == kNoMoreTiles) return;
    const int first_key = info.first_key;
    const int group = (warpgroup + 1 + tile.uses) % 2;  // its rows in this tile (take_tile)
    int begin, end;
    block_range<S>(info, group, &begin, &end);
    DroppedRow dropped(dropout_stream(p.features, head_index(p.n, info.at)),
                       smem.rows[at].position[64 * group + row]);
    __syncwarp();
    if (leader) ptx::barrier_arrive(&smem.info_empty[at]);
#pragma unroll 1
    for (int block = begin; block < end; ++block) {
      const int s = ring.index();
      ptx::barrier_wait(&smem.flags_empty[warpgroup][s], ring.parity() ^ 1);
      dropped.words(first_key + block * S::kKeys, keep, smem.flags[warpgroup][s][row]);
      __syncwarp();
      if (leader) ptx::barrier_arrive(&smem.flags_full[warpgroup][s]);
      ring.next();
    }
  }
}

}  // namespace jax_flashattn::cuda::sm90
