// What both backward kernels share: shapes, shared memory, steps, and fragments of S^T and dP^T.
//
// Blocks are persistent. A key tile is kKeys keys of one key head: K and V stay in shared memory
// while the block walks the tiles of kRows query rows that see any of these keys, for each query
// head of the group. One such tile is a step; steps of one key tile follow those of the one before
// without a break. Scores are transposed, keys down and rows across.
//
// Barriers (mbarriers, one per stage; "full" by the copy engine, "empty" by every consumer warp):
//   key_full, value_full       K and V of a key tile
//   gradient_full              dK and dV in the places of K and V, by every consumer warp; or
//   key_empty, dk_empty, dk_full, dv_full   (kStagesDk) K is no longer needed; the place of dK is
//                              free; each gradient in its place
//   query_full/query_empty     Q, statistics, limits and the Step
//   dout_full/dout_empty       dO
//   dscore_full/dscore_empty   dS^T of one step
//   flags_full/flags_empty     dropout's flags of one step
//   turn_open/turn_over        one piece of dQ of one warpgroup (deterministic)
// Tiles of dQ are zeroed meanwhile (zero_dq).
#pragma once

#include "cuda/sm90/backward_workspace.h"
#include "cuda/sm90/pipeline.cuh"
#include "cuda/sm90/scores.cuh"

namespace jax_flashattn::cuda::sm90 {

template <class Element, int kHeadDim, int kRowBlock, int kKeyBlock, bool kInTurn, Extent kExtent>
struct BackwardShape {
  using T = Element;
  static constexpr bool kCapped = kExtent == Extent::kScores || kExtent == Extent::kDropout;
  static constexpr bool kShaped = kCapped || kExtent == Extent::kDistances;  // ALiBi
  static constexpr bool kDropout = kExtent >= Extent::kDropout;
  static constexpr bool kDeterministic = kInTurn;  // blocks add to dQ in a fixed order
  static constexpr int kD = kHeadDim;
  static constexpr int kRows = kRowBlock;
  static constexpr int kKeys = kKeyBlock;
  static constexpr int kStages = 2;
  static constexpr int kChunks = (kD + kChunk - 1) / kChunk;
  static constexpr int kWidth = kChunks * kChunk;
  static constexpr int kThreads = 128 * 3;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;
  static_assert(registers_fit(3, kProducerRegisters + 2 * kConsumerRegisters));
  static constexpr bool kPlaces = kShaped || kDropout;  // needs positions
  static constexpr int kLimits = kPlaces ? 3 : 2;
  // Warps that make dropout's flags; the others of their warpgroup load, and keep turns.
  static constexpr int kFlagWarps = kDeterministic ? 1 : 3;
  static constexpr int kPieces = kRows / 64 * kChunks;  // 64 x 64 pieces of a tile of dQ
  // Key tiles in shared memory: where two fit below 200 KB, the next comes while one is worked on.
  // Operands that lie higher cost more than that gains (docs/kernels.md).
  static constexpr int kKeyStages = kD == 64 ? 2 : 1;
  // Where there is room dK leaves through a place of its own, so that the next K comes sooner.
  static constexpr bool kStagesDk = kKeyStages == 1 && kD <= 128;
};

constexpr int kBoth = 1;  // named barrier of both consumer warpgroups

// Keys of one key head of a batch element.
struct KeyPlace {
  int b, head, key;
};

// One tile of query rows with a tile of keys.
struct alignas(16) Step {
  int row;              // first row, or kNoMoreSteps
  int head;             // of all query heads of all batch elements
  KeyPlace at;          // of the key tile
  int opens;            // the first step of its key tile
  int partial, hidden;  // some row sees only some of the keys; some row sees nothing at all
  int before;           // how many blocks add to this tile of dQ before this one (deterministic)
  float slope;          // of the head, in units of log2 (shaped)
};
constexpr int kNoMoreSteps = -1;
// Its tile of rows among those of all query heads, of which each has `tiles`.
template <class S>
__device__ __forceinline__ int64_t row_tile(const Step& step, int tiles) {
  return int64_t(step.head) * tiles + step.row / S::kRows;
}

template <class S>
struct BackwardSmem {
  alignas(1024) typename S::T query[S::kStages][S::kRows * S::kWidth];
  alignas(1024) typename S::T dout[S::kStages][S::kRows * S::kWidth];
  alignas(1024) typename S::T key[S::kKeyStages][S::kKeys * S::kWidth];    // then dK, or staged_dk
  alignas(1024) typename S::T value[S::kKeyStages][S::kKeys * S::kWidth];  // then dV
  alignas(1024) typename S::T dscore[2][S::kKeys * S::kRows];
  alignas(16) float statistics[S::kStages][2][S::kRows];
  alignas(16) int limits[S::kStages][S::kLimits][S::kRows];  // lo, hi, aligned key coordinate
  alignas(16) uint4 stream[S::kStages];                      // S12: of the head
  Step step[S::kStages];
  KeyPlace place[S::kKeyStages];  // the loader's
  uint64_t key_full[S::kKeyStages], value_full[S::kKeyStages], gradient_full[S::kKeyStages];
  uint64_t query_full[S::kStages], query_empty[S::kStages];
  uint64_t dout_full[S::kStages], dout_empty[S::kStages];
  uint64_t dscore_full[2], dscore_empty[2];
  uint64_t turn_open[2], turn_over[2];     // of each warpgroup (deterministic)
  uint64_t flags_full[2], flags_empty[2];  // dropout
  // kStagesDk
  uint64_t key_empty, dk_empty, dk_full, dv_full;
  alignas(S::kStagesDk ? 1024 : 16)
      typename S::T staged_dk[S::kStagesDk ? S::kKeys * S::kWidth : 8];
};

struct BackwardMaps {
  CUtensorMap query, key, value, dout, dk, dv;
};

// Zeroes row `row` of a tile of kRows rows, by eight threads.
template <int kRows, int kChunks, class T>
__device__ __forceinline__ void zero_row(T* tile, int row, int unit) {
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
    reinterpret_cast<uint4*>(tile + (c * kRows + row) * kChunk)[unit] = make_uint4(0, 0, 0, 0);
}

// A (64 rows, K-contiguous) times B (kN rows, K-contiguous)^T over the head dim.
template <class S, int kN>
__device__ __forceinline__ void issue_dot(float (&acc)[kN / 2], ptx::Operand a, int a_rows,
                                          ptx::Operand b, int b_rows) {
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
                                             const uint32_t (&x)[S::kRows / 16][4],
                                             ptx::Operand b) {
#pragma unroll
  for (int k = 0; k < S::kRows / 16; ++k)
    ptx::WgmmaRegister<typename S::T, S::kD, 1>::issue(acc, x[k], ptx::advanced(b, k * 16 * 128),
                                                       1);
  ptx::wgmma_commit();
}

// x(i) is element i.
template <class T, int kGroups, class Element>
__device__ __forceinline__ void round_elements(const Element& x, uint32_t (&packed)[kGroups][4]) {
#pragma unroll
  for (int k = 0; k < kGroups; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      packed[k][i] = ptx::pack(x(8 * k + 2 * i), x(8 * k + 2 * i + 1), T());
  }
}
template <class T, int kCount>
__device__ __forceinline__ void round_fragment(const float (&x)[kCount],
                                               uint32_t (&packed)[kCount / 8][4]) {
  round_elements<T>([&](int i) { return x[i]; }, packed);
}

// A fragment of 64 rows to a tile of kTileRows rows, from row `first` on.
template <int kTileRows, class T, int kGroups>
__device__ __forceinline__ void store_fragment(T* tile, int first,
                                               const uint32_t (&packed)[kGroups][4], int thread) {
  const int row = first + thread / 32 * 16 + thread % 16;
  const uint32_t at = ptx::shared_address(tile) + row * 128 + ((thread % 32 / 16) ^ (row % 8)) * 16;
#pragma unroll
  for (int k = 0; k < kGroups; ++k)
    ptx::store_matrices(k / 4 * kTileRows * 128 + (at ^ k % 4 * 32), packed[k]);
}

// P^T = exp2(c S^T - lse), a fragment [64 keys, kRows].
template <int kCount, class Rows>
__device__ __forceinline__ void probabilities(float (&score)[kCount], float c, const Rows& lse) {
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j) {
    const Pair<float> l = lse.pair(j);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& x = score[4 * j + i];
      x = ptx::exp2_approx(x * c - (i % 2 ? l.y : l.x));
    }
  }
}
// The same less distances, where no softcap comes between.
template <int kCount, class Rows, class Positions>
__device__ __forceinline__ void probabilities(float (&score)[kCount], float c, const Rows& lse,
                                              const Distances<Positions>& distances) {
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j) {
    const Pair<float> l = lse.pair(j);
    float taken[4];
    distances.of(j, taken);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& x = score[4 * j + i];
      x = ptx::exp2_approx(x * c - (taken[i] + (i % 2 ? l.y : l.x)));
    }
  }
}
// 0 where the row does not see the key. `key` is this thread's first.
template <int kCount>
__device__ __forceinline__ void hide(float (&p)[kCount], int key, const int (*limits)[2 * kCount]) {
  const RowsInPlace<int> los(limits[0], threadIdx.x), his(limits[1], threadIdx.x);
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j) {
    const Pair<int> lo = los.pair(j), hi = his.pair(j);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int k = key + 8 * h;
      if (k < lo.x || k >= hi.x) p[4 * j + 2 * h] = 0;
      if (k < lo.y || k >= hi.y) p[4 * j + 2 * h + 1] = 0;
    }
  }
}

// dS^T = P^T (dP^T - delta), in place of dP^T, where kept(i), else -P^T delta. In a partial tile,
// where P is 0 the difference may be NaN (S13), so it is left out there. p(i) is P^T's element i.
template <class S, int kCount, class Probability, class Kept, class Rows>
__device__ __forceinline__ void score_gradients(float (&dp)[kCount], const Probability& p,
                                                const Kept& kept, const Rows& delta, bool partial) {
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j) {
    const Pair<float> d = delta.pair(j);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& x = dp[4 * j + i];
      const float y = i % 2 ? d.y : d.x;
      if constexpr (S::kDropout) {
        const float rest = p(4 * j + i) * -y;
        x = kept(4 * j + i) ? p(4 * j + i) * x + rest : rest;
      } else {
        x = p(4 * j + i) * (x - y);
      }
    }
  }
  if (partial) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (p(i) == 0) dp[i] = 0;
  }
}

// What a step's ALiBi needs.
template <class Positions>
__device__ __forceinline__ Distances<Positions> distances_of(const Step& step,
                                                             const KeyCoordinates& keys, int key,
                                                             const Positions& positions) {
  return {step.slope, static_cast<float>(static_cast<int>(keys.stride)), keys.at(key), positions};
}

// S^T to P^T, whole: shape, exponentials, mask. `capped` is called between softcap and ALiBi.
template <class S, int kCount, class Positions, class Rows, class Capped>
__device__ __forceinline__ void make_probabilities(float (&score)[kCount], const ScoreShape& shape,
                                                   const Distances<Positions>& distances,
                                                   const Rows& lse, const BackwardSmem<S>& smem,
                                                   int stage, const Step& step, int key,
                                                   const Capped& capped) {
  if constexpr (S::kCapped) {
    shape_scores(score, shape);
    capped();
    take_distances(score, distances);
    probabilities(score, 1.0f, lse);
  } else if constexpr (S::kShaped) {
    probabilities(score, shape.factor, lse, distances);
  } else {
    probabilities(score, shape.factor, lse);
  }
  if (step.partial) hide(score, key, smem.limits[stage]);
}

// Adds a 64 x 64 piece of dQ to global memory, in accumulator order. `turns` counts a warpgroup's.
template <class S>
__device__ __forceinline__ void add_piece(const BackwardWorkspace& w, int64_t piece,
                                          const float (&x)[32], BackwardSmem<S>& smem, int group,
                                          int& turns, int thread) {
  if constexpr (S::kDeterministic) ptx::barrier_wait(&smem.turn_open[group], turns & 1);
  float* const dq = w.dq + piece * (64 * 64) + thread * 4;
#pragma unroll
  for (int j = 0; j < 8; ++j)
    ptx::reduce_add(dq + j * 512, {x[4 * j], x[4 * j + 1], x[4 * j + 2], x[4 * j + 3]});
  if constexpr (S::kDeterministic) {
    __syncwarp();
    if (thread % 32 == 0) ptx::barrier_arrive(&smem.turn_over[group]);
    ++turns;
  }
}

// S13: keys that no row sees may hold NaN, which would meet dS = 0.
template <class S>
__device__ void zero_unseen_keys(const int4& key_range, int first_key, typename S::T* keys,
                                 int group) {
  const int first_seen = INT32_MAX - key_range.x, end_seen = key_range.y;
  if (first_key >= first_seen && first_key + S::kKeys <= end_seen) return;
  constexpr int kShare = S::kKeys / 2;
  const int thread = threadIdx.x % 128;
  for (int row = group * kShare + thread / 8; row < (group + 1) * kShare; row += 16)
    if (first_key + row < first_seen || first_key + row >= end_seen)
      zero_row<S::kKeys, S::kChunks>(keys, row, thread % 8);
  ptx::proxy_fence();
  ptx::named_sync(kBoth, 256);
}

// Waits for the next step's rows. S13: rows that see nothing may hold NaN, which would meet P = 0.
template <class S>
__device__ __forceinline__ Step wait_for_step(BackwardSmem<S>& smem, const Ring<S::kStages>& ring,
                                              int group) {
  const int s = ring.index();
  ptx::barrier_wait(&smem.query_full[s], ring.parity());
  const Step step = smem.step[s];
  if (step.hidden) {
    ptx::barrier_wait(&smem.dout_full[s], ring.parity());
    constexpr int kShare = S::kRows / 2;
    const int thread = threadIdx.x % 128;
    for (int row = group * kShare + thread / 8; row < (group + 1) * kShare; row += 16)
      if (smem.limits[s][0][row_place(row)] >= smem.limits[s][1][row_place(row)]) {
        zero_row<S::kRows, S::kChunks>(smem.query[s], row, thread % 8);
        zero_row<S::kRows, S::kChunks>(smem.dout[s], row, thread % 8);
      }
    ptx::proxy_fence();
    ptx::named_sync(kBoth, 256);
  }
  return step;
}

template <class S>
__device__ __forceinline__ void init_barriers(BackwardSmem<S>& smem, int dscore_writers) {
  for (int i = 0; i < S::kKeyStages; ++i) {
    ptx::barrier_init(&smem.key_full[i], 1);
    ptx::barrier_init(&smem.value_full[i], 1);
    ptx::barrier_init(&smem.gradient_full[i], 8);
  }
  ptx::barrier_init(&smem.key_empty, 8);
  ptx::barrier_init(&smem.dk_empty, 1);
  ptx::barrier_init(&smem.dk_full, 8);
  ptx::barrier_init(&smem.dv_full, 8);
  for (int i = 0; i < 2; ++i) {
    ptx::barrier_init(&smem.query_full[i], 1);
    ptx::barrier_init(&smem.dout_full[i], 1);
    ptx::barrier_init(&smem.query_empty[i],
                      8 + (S::kDeterministic ? 2 : 0) + (S::kDropout ? S::kFlagWarps : 0));
    ptx::barrier_init(&smem.dout_empty[i], 8);
    ptx::barrier_init(&smem.dscore_full[i], dscore_writers);
    ptx::barrier_init(&smem.dscore_empty[i], 8);
    ptx::barrier_init(&smem.turn_open[i], 1);
    ptx::barrier_init(&smem.turn_over[i], 4);
    ptx::barrier_init(&smem.flags_full[i], S::kRows / 32);
    ptx::barrier_init(&smem.flags_empty[i], 8);
  }
}

}  // namespace jax_flashattn::cuda::sm90
