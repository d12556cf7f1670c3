// Backward pass for sm_90a, head dims up to 128 (docs/kernels.md).
//
// Block: one producer warp and two consumer warpgroups for kKeys keys of one key head. K and V stay
// in shared memory, dK and dV in registers; the block walks the tiles of kRows query rows that see
// any of its keys, for each query head of the group. Scores are transposed, keys down: P^T and dS^T
// are then register operands of dV += P^T dO and dK += dS^T Q. dS^T goes to shared memory for
// dQ = dS K, which is added to global memory from registers, in accumulator order.
//
// Barriers (mbarriers, one per stage; "full" by the copy engine, "empty" by every consumer warp):
//   key_full, value_full       once
//   query_full/query_empty     Q, statistics, limits and the Step
//   dout_full/dout_empty       dO
//   dscore_full/dscore_empty   dS^T of one step, filled by every consumer warp
// Named barriers: kBoth, of both warpgroups; kOwn + warpgroup.
#pragma once

#include "cuda/ptx/wgmma.h"
#include "cuda/sm90/backward_workspace.h"
#include "cuda/sm90/pipeline.cuh"

namespace jax_flashattn::cuda::sm90 {

template <class Element, int kHeadDim, int kRowBlock>
struct BackwardShape {
  using T = Element;
  static constexpr int kD = kHeadDim;
  static constexpr int kRows = kRowBlock;
  static constexpr int kKeys = 128;
  static constexpr int kStages = 2;
  static constexpr int kChunks = (kD + kChunk - 1) / kChunk;
  static constexpr int kWidth = kChunks * kChunk;
  static constexpr int kThreads = 128 * 3;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;
  // Each warpgroup makes one 64 x 64 piece of dQ: half of the columns, or of the rows.
  static_assert(kRows / 64 * kChunks == 2, "two pieces of dQ");
};

constexpr int kBoth = 1, kOwn = 2;

// One tile of query rows.
struct Step {
  int row;              // first row, or kNoMoreSteps
  int head;             // of all query heads
  int partial, hidden;  // some row sees only some of the keys; some row sees nothing at all
};
constexpr int kNoMoreSteps = -1;

template <class S>
struct BackwardSmem {
  alignas(1024) typename S::T key[S::kKeys * S::kWidth];
  alignas(1024) typename S::T value[S::kKeys * S::kWidth];
  alignas(1024) typename S::T query[S::kStages][S::kRows * S::kWidth];
  alignas(1024) typename S::T dout[S::kStages][S::kRows * S::kWidth];
  alignas(1024) typename S::T dscore[2][S::kKeys * S::kRows];
  alignas(16) float statistics[S::kStages][2][S::kRows];
  alignas(16) int limits[S::kStages][2][S::kRows];
  Step step[S::kStages];
  uint64_t key_full, value_full;
  uint64_t query_full[S::kStages], query_empty[S::kStages];
  uint64_t dout_full[S::kStages], dout_empty[S::kStages];
  uint64_t dscore_full[2], dscore_empty[2];
};

struct BackwardMaps {
  CUtensorMap query, key, value, dout, dk, dv;
};

// Key tiles in the order blocks take them: sections of key heads that share L2; within a section
// first keys first (under a causal mask the longest) and heads fastest.
struct KeyTileOrder {
  int heads, batches, key_tiles, section;
  struct Place {
    int b, head, key;
  };
  __device__ Place place(int tile, int keys) const {
    const int first = tile / (section * key_tiles) * section;
    const int inside = tile - first * key_tiles, width = min(section, heads * batches - first);
    const int head = first + inside % width;
    return {head / heads, head % heads, inside / width * keys};
  }
};

template <class S>
__device__ void load_steps(const BackwardMaps& maps, const BackwardParams& p,
                           const BackwardWorkspace& w, const KeyTileOrder::Place& at,
                           BackwardSmem<S>& smem) {
  const int lane = threadIdx.x % 32, group = static_cast<int>(p.n.r);
  const bool leader = lane == 0;
  if (leader) {
    load_tile<S::kKeys, S::kChunks>(smem.key, &maps.key, &smem.key_full, at.head, at.key, at.b);
    load_tile<S::kKeys, S::kChunks>(smem.value, &maps.value, &smem.value_full, at.head, at.key,
                                    at.b);
  }
  const int tiles = static_cast<int>((p.n.sq + S::kRows - 1) / S::kRows);
  const int64_t first_tile = int64_t(at.b) * tiles;
  Ring<S::kStages> ring;
  const auto load_step = [&](int tile, int head, bool partial, bool hidden) {
    const int s = ring.index();
    ptx::barrier_wait(&smem.query_empty[s], ring.parity() ^ 1);
    smem.step[s] = {tile * S::kRows, head, partial, hidden};
    constexpr int kTileBytes = S::kRows * S::kWidth * 2, kColumnBytes = 2 * S::kRows * 4;
    uint64_t* full = &smem.query_full[s];
    ptx::barrier_expect(full, kTileBytes + kColumnBytes + (partial ? kColumnBytes : 0));
    for (int c = 0; c < S::kChunks; ++c)
      ptx::tma_load(smem.query[s] + c * S::kRows * kChunk, &maps.query, full, c * kChunk, head,
                    tile * S::kRows, at.b);
    const int64_t heads = p.n.g * p.n.r;
    ptx::bulk_load(smem.statistics[s],
                   w.statistics + ((at.b * heads + head) * tiles + tile) * (2 * S::kRows),
                   kColumnBytes, full);
    if (partial)
      ptx::bulk_load(smem.limits[s], w.limits + (first_tile + tile) * (2 * S::kRows), kColumnBytes,
                     full);
    ptx::barrier_wait(&smem.dout_empty[s], ring.parity() ^ 1);
    load_tile<S::kRows, S::kChunks>(smem.dout[s], &maps.dout, &smem.dout_full[s], head,
                                    tile * S::kRows, at.b);
    ring.next();
  };
  for (int r = 0; r < group; ++r) {
    for (int base = 0; base < tiles; base += 32) {
      TileLimits limits = no_rows();
      if (base + lane < tiles) {
        const int4 x = w.ranges[first_tile + base + lane];
        limits = {x.x, x.y, x.z, x.w};
      }
      const TileClass seen = classify(limits, at.key, at.key + S::kKeys);
      unsigned some = __ballot_sync(0xffffffffu, seen != TileClass::kSkip);
      const unsigned partial = __ballot_sync(0xffffffffu, seen == TileClass::kPartial);
      const unsigned hidden = __ballot_sync(0xffffffffu, limits.min_hi == 0);
      if (leader)
        for (; some; some &= some - 1) {
          const int t = __ffs(some) - 1;
          load_step(base + t, at.head * group + r, partial >> t & 1, hidden >> t & 1);
        }
      __syncwarp();
    }
  }
  if (leader) {
    const int s = ring.index();
    ptx::barrier_wait(&smem.query_empty[s], ring.parity() ^ 1);
    smem.step[s] = {kNoMoreSteps, 0, 0, 0};
    ptx::barrier_arrive(&smem.query_full[s]);
  }
}

// Zeroes row `row` of a tile of kRows rows, by eight threads.
template <int kRows, int kChunks, class T>
__device__ __forceinline__ void zero_row(T* tile, int row, int unit) {
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
    reinterpret_cast<uint4*>(tile + (c * kRows + row) * kChunk)[unit] = make_uint4(0, 0, 0, 0);
}

// A (64 rows, K-contiguous) times B (kN rows, K-contiguous)^T over the head dim.
template <class S, int kN>
__device__ __forceinline__ void issue_dot(float (&acc)[kN / 2], uint64_t a, int a_rows, uint64_t b,
                                          int b_rows) {
#pragma unroll
  for (int k = 0; k < S::kD / 16; ++k) {
    const int chunk = k / 4, inside = k % 4 * 32;
    ptx::WgmmaShared<typename S::T, kN, 0, 0>::issue(
        acc, ptx::advanced(a, chunk * a_rows * 128 + inside),
        ptx::advanced(b, chunk * b_rows * 128 + inside), k > 0);
  }
  ptx::wgmma_commit();
}

// acc += X^T B, X^T in registers [64 keys, kRows], B [kRows, kD] rows of the reduction.
template <class S>
__device__ __forceinline__ void issue_update(float (&acc)[S::kD / 2],
                                             const uint32_t (&x)[S::kRows / 16][4], uint64_t b) {
#pragma unroll
  for (int k = 0; k < S::kRows / 16; ++k)
    ptx::WgmmaRegister<typename S::T, S::kD, 1>::issue(acc, x[k], ptx::advanced(b, k * 16 * 128),
                                                       1);
  ptx::wgmma_commit();
}

template <class S>
struct KeyRows {
  float dk[S::kD / 2], dv[S::kD / 2];
  float score[S::kRows / 2], dprobability[S::kRows / 2];
  float dq[32];
  uint32_t probability[S::kRows / 16][4], dscore[S::kRows / 16][4];
};

template <class T, int kCount>
__device__ __forceinline__ void round_fragment(const float (&x)[kCount],
                                               uint32_t (&packed)[kCount / 8][4]) {
#pragma unroll
  for (int k = 0; k < kCount / 8; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      packed[k][i] = ptx::pack(x[8 * k + 2 * i], x[8 * k + 2 * i + 1], T());
  }
}

// A fragment of 64 rows to a tile of kTileRows rows, from row `first` on.
template <int kTileRows, class T, int kGroups>
__device__ __forceinline__ void store_fragment(T* tile, int first,
                                               const uint32_t (&packed)[kGroups][4]) {
  const int row = first + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 16;
#pragma unroll
  for (int k = 0; k < kGroups; ++k) {
    const int unit = (k % 4 * 2 + threadIdx.x % 32 / 16) ^ (row % 8);
    ptx::store_matrices(tile + (k / 4 * kTileRows + row) * kChunk + unit * 8, packed[k]);
  }
}

// P^T = exp2(c S^T - lse), 0 where the row does not see the key. `key` is this thread's first.
template <class S>
__device__ __forceinline__ void probabilities(KeyRows<S>& t, float c, const float* lse) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int j = 0; j < S::kRows / 8; ++j) {
    const float2 l = *reinterpret_cast<const float2*>(lse + 8 * j + column);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      t.score[4 * j + 2 * h] = ptx::exp2_approx(t.score[4 * j + 2 * h] * c - l.x);
      t.score[4 * j + 2 * h + 1] = ptx::exp2_approx(t.score[4 * j + 2 * h + 1] * c - l.y);
    }
  }
}
template <class S>
__device__ __forceinline__ void hide(KeyRows<S>& t, int key, const int (&limits)[2][S::kRows]) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int j = 0; j < S::kRows / 8; ++j) {
    const int2 lo = *reinterpret_cast<const int2*>(limits[0] + 8 * j + column);
    const int2 hi = *reinterpret_cast<const int2*>(limits[1] + 8 * j + column);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int k = key + 8 * h;
      if (k < lo.x || k >= hi.x) t.score[4 * j + 2 * h] = 0;
      if (k < lo.y || k >= hi.y) t.score[4 * j + 2 * h + 1] = 0;
    }
  }
}

// dS^T = P^T (dP^T - delta). Where P is 0 the difference may be NaN (S13), so it is left out there.
template <class S>
__device__ __forceinline__ void score_gradients(KeyRows<S>& t, const float* delta, bool partial) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int j = 0; j < S::kRows / 8; ++j) {
    const float2 d = *reinterpret_cast<const float2*>(delta + 8 * j + column);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& x = t.dprobability[4 * j + i];
      x = t.score[4 * j + i] * (x - (i % 2 ? d.y : d.x));
    }
  }
  if (partial) {
#pragma unroll
    for (int i = 0; i < S::kRows / 2; ++i)
      if (t.score[i] == 0) t.dprobability[i] = 0;
  }
}

template <class S>
__device__ void consume(const BackwardMaps& maps, const BackwardParams& p,
                        const BackwardWorkspace& w, const KeyTileOrder::Place& at,
                        BackwardSmem<S>& smem, int group) {
  using T = typename S::T;
  const int thread = threadIdx.x % 128, lane = thread % 32;
  const float c = static_cast<float>(p.scale * 1.4426950408889634);
  const int key = at.key + 64 * group + thread / 32 * 16 + lane / 4;
  const int64_t heads = p.n.g * p.n.r;
  const int tiles = static_cast<int>((p.n.sq + S::kRows - 1) / S::kRows);
  Ring<S::kStages> ring;
  KeyRows<S> t;
#pragma unroll
  for (int i = 0; i < S::kD / 2; ++i) t.dk[i] = t.dv[i] = 0;

  ptx::barrier_wait(&smem.key_full, 0);
  ptx::barrier_wait(&smem.value_full, 0);
  const int4 seen = w.key_range[at.b];
  const int first_seen = INT32_MAX - seen.x, end_seen = seen.y;
  if (at.key < first_seen || at.key + S::kKeys > end_seen) {
    // S13: keys that no row sees may hold NaN, which would meet dS = 0.
    for (int row = 64 * group + thread / 8; row < 64 * (group + 1); row += 16)
      if (at.key + row < first_seen || at.key + row >= end_seen)
        zero_row<S::kKeys, S::kChunks>(smem.key, row, thread % 8);
    ptx::proxy_fence();
    ptx::named_sync(kBoth, 256);
  }

  const uint64_t key_rows = ptx::descriptor(smem.key + 64 * group * kChunk);
  const uint64_t value_rows = ptx::descriptor(smem.value + 64 * group * kChunk);
  // dQ piece: dS^T chunk and K chunk, both with keys as rows.
  constexpr bool kSplitColumns = S::kRows == 64;
  const uint64_t key_columns =
      ptx::descriptor(smem.key + (kSplitColumns ? group * S::kKeys * kChunk : 0));

  // Waits for the next step's rows.
  const auto wait_for_step = [&] {
    const int s = ring.index();
    ptx::barrier_wait(&smem.query_full[s], ring.parity());
    const Step step = smem.step[s];
    if (step.hidden) {  // S13: rows that see nothing may hold NaN, which would meet P = 0
      ptx::barrier_wait(&smem.dout_full[s], ring.parity());
      for (int row = group * (S::kRows / 2) + thread / 8; row < (group + 1) * (S::kRows / 2);
           row += 16)
        if (smem.limits[s][0][row] >= smem.limits[s][1][row]) {
          zero_row<S::kRows, S::kChunks>(smem.query[s], row, thread % 8);
          zero_row<S::kRows, S::kChunks>(smem.dout[s], row, thread % 8);
        }
      ptx::proxy_fence();
      ptx::named_sync(kBoth, 256);
    }
    return step;
  };
  const auto issue_scores = [&] {
    ptx::pin(t.score);
    ptx::wgmma_fence();
    issue_dot<S, S::kRows>(t.score, key_rows, S::kKeys, ptx::descriptor(smem.query[ring.index()]),
                           S::kRows);
  };

  // dQ lags a step behind: the other warpgroup's part of dS^T is then long there.
  const auto issue_dq = [&](int turn) {
    const uint64_t dscore =
        ptx::descriptor(smem.dscore[turn & 1] + (kSplitColumns ? 0 : group * S::kKeys * kChunk));
#pragma unroll
    for (int k = 0; k < S::kKeys / 16; ++k)
      ptx::WgmmaShared<T, 64, 1, 1>::issue(t.dq, ptx::advanced(dscore, k * 16 * 128),
                                           ptx::advanced(key_columns, k * 16 * 128), k > 0);
    ptx::wgmma_commit();
  };
  const auto finish_dq = [&](int turn, int64_t tile) {
    if (lane == 0) ptx::barrier_arrive(&smem.dscore_empty[turn & 1]);
    float* const dq = w.dq + (tile * 2 + group) * (64 * 64) + thread * 4;
#pragma unroll
    for (int j = 0; j < 8; ++j)
      ptx::reduce_add(dq + j * 512,
                      {t.dq[4 * j], t.dq[4 * j + 1], t.dq[4 * j + 2], t.dq[4 * j + 3]});
  };
  const auto tile_of = [&](const Step& step) {
    return (at.b * heads + step.head) * tiles + step.row / S::kRows;
  };

  Step step = wait_for_step();
  if (step.row != kNoMoreSteps) {
    issue_scores();
    int64_t tile = tile_of(step), previous = 0;
    int turn = 0;
    for (;; ++turn) {
      const int s = ring.index();
      ptx::barrier_wait(&smem.dout_full[s], ring.parity());
      ptx::pin_dead(t.dprobability);
      ptx::wgmma_fence();
      issue_dot<S, S::kRows>(t.dprobability, value_rows, S::kKeys, ptx::descriptor(smem.dout[s]),
                             S::kRows);
      ptx::wgmma_wait<1>();
      ptx::pin(t.score);
      probabilities<S>(t, c, smem.statistics[s][0]);
      if (step.partial) hide<S>(t, key, smem.limits[s]);
      if constexpr (S::kRows == 64) round_fragment<T>(t.score, t.probability);
      ptx::wgmma_wait<0>();
      ptx::pin(t.dprobability);
      score_gradients<S>(t, smem.statistics[s][1], step.partial);
      if constexpr (S::kRows != 64) round_fragment<T>(t.score, t.probability);
      round_fragment<T>(t.dprobability, t.dscore);
      ptx::barrier_wait(&smem.dscore_empty[turn & 1], turn >> 1 & 1 ^ 1);
      store_fragment<S::kKeys>(smem.dscore[turn & 1], 64 * group, t.dscore);
      ptx::proxy_fence();
      __syncwarp();
      if (lane == 0) ptx::barrier_arrive(&smem.dscore_full[turn & 1]);

      // In the first turn dQ is of whatever lies there, for nobody: a product issued under a
      // condition would make ptxas wait for all of them.
      if (turn > 0) ptx::barrier_wait(&smem.dscore_full[turn - 1 & 1], turn - 1 >> 1 & 1);
      ptx::pin(t.dv);
      ptx::pin(t.probability);
      ptx::pin_dead(t.dq);
      ptx::pin(t.dk);
      ptx::pin(t.dscore);
      ptx::wgmma_fence();
      issue_update<S>(t.dv, t.probability, ptx::descriptor(smem.dout[s], S::kRows * 128));
      issue_dq(turn - 1);
      issue_update<S>(t.dk, t.dscore, ptx::descriptor(smem.query[s], S::kRows * 128));

      ring.next();
      const Step next = wait_for_step();
      ptx::wgmma_wait<1>();  // dV and dQ are done
      ptx::pin(t.dv);
      ptx::pin(t.probability);
      ptx::pin(t.dq);
      if (lane == 0) ptx::barrier_arrive(&smem.dout_empty[s]);
      // The way out has its own wait, in front of the next product: otherwise ptxas serialises all.
      if (next.row == kNoMoreSteps) {
        ptx::wgmma_wait<0>();
        ptx::pin(t.dk);
        ptx::pin(t.dscore);
        break;
      }
      issue_scores();
      if (turn > 0) finish_dq(turn - 1, previous);
      ptx::wgmma_wait<1>();  // dK is done
      ptx::pin(t.dk);
      ptx::pin(t.dscore);
      if (lane == 0) ptx::barrier_arrive(&smem.query_empty[s]);
      step = next;
      previous = tile;
      tile = tile_of(step);
    }
    if (turn > 0) finish_dq(turn - 1, previous);
    ptx::barrier_wait(&smem.dscore_full[turn & 1], turn >> 1 & 1);
    ptx::pin_dead(t.dq);
    ptx::wgmma_fence();
    issue_dq(turn);
    ptx::wgmma_wait<0>();
    ptx::pin(t.dq);
    finish_dq(turn, tile);
  }
  ptx::named_sync(kBoth, 256);  // nobody reads K any more

#pragma unroll
  for (int i = 0; i < S::kD / 2; ++i) t.dk[i] *= static_cast<float>(p.scale);
  uint32_t packed[S::kD / 16][4];
  round_fragment<T>(t.dk, packed);
  store_fragment<S::kKeys>(smem.key, 64 * group, packed);
  round_fragment<T>(t.dv, packed);
  store_fragment<S::kKeys>(smem.value, 64 * group, packed);
  ptx::proxy_fence();
  ptx::named_sync(kOwn + group, 128);
  if (thread == 0) {
    for (int c = 0; c < S::kChunks; ++c) {
      const int from = (c * S::kKeys + 64 * group) * kChunk, row = at.key + 64 * group;
      if (c * kChunk < p.n.d)
        ptx::tma_store(&maps.dk, smem.key + from, c * kChunk, at.head, row, at.b);
      if (c * kChunk < p.n.dv)
        ptx::tma_store(&maps.dv, smem.value + from, c * kChunk, at.head, row, at.b);
    }
    ptx::tma_commit();
    ptx::tma_wait();
  }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    backward_kernel(const __grid_constant__ BackwardMaps maps, const BackwardParams p,
                    const BackwardWorkspace w, const KeyTileOrder order) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& smem = *reinterpret_cast<BackwardSmem<S>*>(raw);
  if (threadIdx.x == 0) {
    ptx::barrier_init(&smem.key_full, 1);
    ptx::barrier_init(&smem.value_full, 1);
    for (int i = 0; i < S::kStages; ++i) {
      ptx::barrier_init(&smem.query_full[i], 1);
      ptx::barrier_init(&smem.dout_full[i], 1);
      ptx::barrier_init(&smem.query_empty[i], 8);
      ptx::barrier_init(&smem.dout_empty[i], 8);
    }
    for (int i = 0; i < 2; ++i) {
      ptx::barrier_init(&smem.dscore_full[i], 8);
      ptx::barrier_init(&smem.dscore_empty[i], 8);
    }
    ptx::barrier_init_fence();
  }
  __syncthreads();
  const KeyTileOrder::Place at = order.place(blockIdx.x, S::kKeys);
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    ptx::release_registers<S::kProducerRegisters>();
    if (threadIdx.x < 32) load_steps<S>(maps, p, w, at, smem);
  } else {
    ptx::take_registers<S::kConsumerRegisters>();
    consume<S>(maps, p, w, at, smem, warpgroup - 1);
  }
}

}  // namespace jax_flashattn::cuda::sm90
