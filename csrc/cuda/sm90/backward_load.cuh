// The warps of a backward block that make no products: the one that claims key tiles, loads them
// and stores their gradients, the one that zeroes dQ, and those that mind whose turn it is to add
// to it.
#pragma once

#include "cuda/sm90/backward_tiles.cuh"

namespace jax_flashattn::cuda::sm90 {

// Key tiles in the order blocks claim them: sections of key heads that share L2; within a section
// first keys first (under a causal mask the longest) and heads fastest. `last_first` is for
// deterministic calls under a causal mask: rows then get their last visible keys first, for which
// no block has to wait.
struct KeyTileOrder {
  int heads, batches, key_tiles, section;
  bool last_first;
  __device__ int count() const { return heads * batches * key_tiles; }
  __device__ KeyPlace place(int tile, int keys) const {
    const int first = tile / (section * key_tiles) * section;
    const int inside = tile - first * key_tiles, width = min(section, heads * batches - first);
    const int head = first + inside % width, n = inside / width;
    return {head / heads, head % heads, (last_first ? key_tiles - 1 - n : n) * keys};
  }
  // How many blocks add to the rows of these limits before the block at `key`.
  __device__ int before(const TileLimits& rows, int key, int keys) const {
    return last_first ? (rows.max_hi - 1) / keys - key / keys : key / keys - rows.min_lo / keys;
  }
};

// Zeros for the gradients of keys that no row sees, by a warp.
template <class S>
__device__ void write_nothing(const BackwardParams& p, const KeyPlace& at) {
  const auto clear = [&](void* gradient, int64_t width) {
    for (int64_t key = at.key; key < min(int64_t(at.key) + S::kKeys, p.n.sk); ++key) {
      auto* row =
          static_cast<typename S::T*>(gradient) + ((at.b * p.n.sk + key) * p.n.g + at.head) * width;
      for (int i = threadIdx.x % 32; i < width / 8; i += 32)
        reinterpret_cast<uint4*>(row)[i] = make_uint4(0, 0, 0, 0);
    }
  };
  clear(p.dk, p.n.d);
  clear(p.dv, p.n.dv);
}

// A gradient of a key tile from shared memory to global memory.
template <class S>
__device__ __forceinline__ void store_tile(const CUtensorMap* map, const typename S::T* tile,
                                           int64_t width, const KeyPlace& at) {
  for (int c = 0; c < S::kChunks; ++c)
    if (c * kChunk < width)
      ptx::tma_store(map, tile + c * S::kKeys * kChunk, c * kChunk, at.head, at.key, at.b);
}

// The loading warp: claims key tiles, finds their steps, keeps the copy engine busy both ways. All
// lanes agree on everything but which of 32 row tiles they look at, so that few registers do.
template <class S>
__device__ void load(const BackwardMaps& maps, const BackwardParams& p, const BackwardWorkspace& w,
                     const KeyTileOrder& order, BackwardSmem<S>& smem) {
  const int lane = threadIdx.x % 32;
  const int tiles = static_cast<int>((p.n.sq + S::kRows - 1) / S::kRows);
  const int group = static_cast<int>(p.n.r);
  Ring<S::kStages> ring;
  Ring<S::kKeyStages> key_ring;
  // Stores the gradients of the key tile that the ring comes to again, and loads K and V of the one
  // at `next`, if there is one, each as soon as it can.
  const auto change_keys = [&](const KeyPlace* next) {
    const int i = key_ring.index(), parity = key_ring.parity() ^ 1;
    const bool again = key_ring.uses >= S::kKeyStages;
    const KeyPlace before = smem.place[i];
    const auto load_key = [&] {
      if (next && ptx::elect())
        load_tile<S::kKeys, S::kChunks>(smem.key[i], &maps.key, &smem.key_full[i], next->head,
                                        next->key, next->b);
      __syncwarp();
    };
    const auto load_value = [&] {
      if (next && ptx::elect())
        load_tile<S::kKeys, S::kChunks>(smem.value[i], &maps.value, &smem.value_full[i], next->head,
                                        next->key, next->b);
      __syncwarp();
    };
    const auto store = [&](uint64_t* full, bool dk, bool dv) {
      ptx::barrier_wait(full, parity);
      if (lane == 0) {  // always the same: stores are waited for by the lane that committed them
        if (dk) store_tile<S>(&maps.dk, S::kStagesDk ? smem.staged_dk : smem.key[i], p.n.d, before);
        if (dv) store_tile<S>(&maps.dv, smem.value[i], p.n.dv, before);
        ptx::tma_commit();
        ptx::tma_wait_read();
      }
      __syncwarp();
    };
    if constexpr (S::kStagesDk) {
      if (again) ptx::barrier_wait(&smem.key_empty, parity);
      load_key();
      if (again) store(&smem.dv_full, false, true);
      load_value();
      if (again) store(&smem.dk_full, true, false);
      if (again && lane == 0) ptx::barrier_arrive(&smem.dk_empty);
    } else {
      if (again) store(&smem.gradient_full[i], true, true);
      load_key();
      load_value();
    }
    if (next && lane == 0) smem.place[i] = *next;
    __syncwarp();
    key_ring.next();
  };
  const auto load_step = [&](const Step& step, int head) {
    const int s = ring.index(), tile = step.row / S::kRows;
    constexpr int kTileBytes = S::kRows * S::kWidth * 2, kColumnBytes = 2 * S::kRows * 4,
                  kLimitBytes = S::kLimits * S::kRows * 4;
    uint64_t* const full = &smem.query_full[s];
    const bool limited = S::kPlaces || step.partial;
    ptx::barrier_wait(&smem.query_empty[s], ring.parity() ^ 1);
    if (ptx::elect()) {
      smem.step[s] = step;
      ptx::barrier_expect(full, kTileBytes + kColumnBytes + (limited ? kLimitBytes : 0) +
                                    (S::kDropout ? sizeof(uint4) : 0));
#pragma unroll
      for (int c = 0; c < S::kChunks; ++c)
        ptx::tma_load(smem.query[s] + c * S::kRows * kChunk, &maps.query, full, c * kChunk, head,
                      step.row, step.at.b);
      ptx::bulk_load(smem.statistics[s],
                     w.statistics + (int64_t(step.head) * tiles + tile) * (2 * S::kRows),
                     kColumnBytes, full);
      if (limited)
        ptx::bulk_load(smem.limits[s],
                       w.limits + (int64_t(step.at.b) * tiles + tile) * (3 * S::kRows), kLimitBytes,
                       full);
      if constexpr (S::kDropout)
        ptx::bulk_load(&smem.stream[s], p.features.dropout + int64_t(step.head) * 4, sizeof(uint4),
                       full);
    }
    __syncwarp();
    ptx::barrier_wait(&smem.dout_empty[s], ring.parity() ^ 1);
    if (ptx::elect())
      load_tile<S::kRows, S::kChunks>(smem.dout[s], &maps.dout, &smem.dout_full[s], head, step.row,
                                      step.at.b);
    __syncwarp();
    ring.next();
  };
  // Consumers add a step's dQ when they have the next one, which is loaded behind this. In a
  // deterministic call keep_turns waits.
  const auto wait_for_zeros = [&](const Step& step) {
    if constexpr (!S::kDeterministic) {
      const int64_t tile = row_tile<S>(step, tiles);
      while (ptx::load_acquire(w.turns + tile * S::kPieces) == 0) {
      }
      __syncwarp();
    }
  };
  for (int claimed = blockIdx.x; claimed < order.count();) {
    KeyPlace at = order.place(claimed, S::kKeys);
    at = {ptx::uniform(at.b), ptx::uniform(at.head), ptx::uniform(at.key)};
    const int2 rows = w.row_tiles[at.b * order.key_tiles + at.key / S::kKeys];
    const int first = ptx::uniform(INT32_MAX - rows.x), end = ptx::uniform(rows.y);
    const int4* const ranges = w.ranges + int64_t(at.b) * tiles;
    bool opens = true;
    for (int r = 0; r < group; ++r) {
      const int head = at.head * group + r;
      const int64_t head_of_all = int64_t(at.b) * (p.n.g * group) + head;
      const float slope = S::kShaped ? alibi_slope(p.features, head_of_all) : 0.0f;
      for (int base = first; base < end; base += 32) {
        TileLimits limits = no_rows();
        if (base + lane < end) {
          const int4 x = ranges[base + lane];
          limits = {x.x, x.y, x.z, x.w};
        }
        const TileClass seen = classify(limits, at.key, at.key + S::kKeys);
        const unsigned partial = __ballot_sync(0xffffffffu, seen == TileClass::kPartial);
        const unsigned hidden = __ballot_sync(0xffffffffu, limits.min_hi == 0);
        for (unsigned left = __ballot_sync(0xffffffffu, seen != TileClass::kSkip); left;
             left &= left - 1) {
          const int t = __ffs(left) - 1;
          Step step{(base + t) * S::kRows,
                    static_cast<int>(head_of_all),
                    at,
                    opens,
                    static_cast<int>(partial >> t & 1),
                    static_cast<int>(hidden >> t & 1),
                    0,
                    slope};
          if constexpr (S::kDeterministic)
            step.before = __shfl_sync(0xffffffffu, order.before(limits, at.key, S::kKeys), t);
          // With one place for keys, the tile before leaves when this step is known.
          if (S::kKeyStages > 1 && opens) change_keys(&at);
          load_step(step, head);
          if (S::kKeyStages == 1 && opens) change_keys(&at);
          wait_for_zeros(step);
          opens = false;
        }
      }
    }
    if (opens) write_nothing<S>(p, at);
    if (lane == 0) claimed = gridDim.x + atomicAdd(w.claimed, 1);
    claimed = __shfl_sync(0xffffffffu, claimed, 0);
  }
  ptx::barrier_wait(&smem.query_empty[ring.index()], ring.parity() ^ 1);
  if (lane == 0) {
    smem.step[ring.index()] = {kNoMoreSteps};  // nothing of the last step: see wait_for_step
    ptx::barrier_arrive(&smem.query_full[ring.index()]);
  }
  for (int i = 0; i < S::kKeyStages; ++i) change_keys(nullptr);
}

// Zeroes dQ, all blocks together, by a warp that the loads leave idle: heads in the order in which
// they are worked on. A tile's counters go to 1 when it is done. Who waits for that waits only for
// blocks that run.
template <class S>
__device__ void zero_dq(const BackwardParams& p, const BackwardWorkspace& w) {
  constexpr int kAtOnce = 2, kUnits = S::kRows * S::kWidth / 4;
  const int lane = threadIdx.x % 32;
  const int64_t tiles = p.n.b * p.n.g * p.n.r * ((p.n.sq + S::kRows - 1) / S::kRows);
  const auto claim = [&] { return lane == 0 ? int64_t(atomicAdd(w.claimed + 1, 1)) * kAtOnce : 0; };
  for (int64_t claimed = claim();;) {
    const int64_t first = __shfl_sync(0xffffffffu, claimed, 0);
    if (first >= tiles) return;
    claimed = claim();  // early, for its latency
    const int count = first + kAtOnce <= tiles ? kAtOnce : 1;
    auto* const dq = reinterpret_cast<float4*>(w.dq) + first * kUnits;
#pragma unroll 8
    for (int i = lane; i < count * kUnits; i += 32) dq[i] = make_float4(0, 0, 0, 0);
    __syncwarp();
    if (lane < count * S::kPieces) ptx::add_release(w.turns + first * S::kPieces + lane, 1);
  }
}

// S14: blocks add to each piece of dQ in a fixed order, kept by a counter in global memory, which
// is 1 when the piece is zeroed. One lane per consumer warpgroup minds it, so that nobody else
// waits for memory: it opens a turn when the counter says so, and counts the block when its warps
// have added. A key tile waits only for those that were claimed before it.
template <class S>
__device__ void keep_turns(const BackwardParams& p, const BackwardWorkspace& w,
                           BackwardSmem<S>& smem, int group) {
  const int tiles = static_cast<int>((p.n.sq + S::kRows - 1) / S::kRows);
  Ring<S::kStages> ring;
  for (int turn = 0;; ring.next()) {
    const int s = ring.index();
    ptx::barrier_wait(&smem.query_full[s], ring.parity());
    const Step step = smem.step[s];
    ptx::barrier_arrive(&smem.query_empty[s]);
    if (step.row == kNoMoreSteps) return;
    const int64_t tile = row_tile<S>(step, tiles);
    for (int piece = group; piece < S::kPieces; piece += 2, ++turn) {
      int* const counter = w.turns + tile * S::kPieces + piece;
      while (ptx::load_acquire(counter) != step.before + 1) {
      }
      ptx::barrier_arrive(&smem.turn_open[group]);
      ptx::barrier_wait(&smem.turn_over[group], turn & 1);
      ptx::add_release(counter, 1);
    }
  }
}

}  // namespace jax_flashattn::cuda::sm90
