// Tiles of the forward kernel: shapes, shared memory, order, and the producer warps that find
// (scout) and load them.
#pragma once

#include "cuda/sm90/pipeline.cuh"
#include "cuda/sm90/scores.cuh"
#include "semantics/params.h"

namespace jax_flashattn::cuda::sm90 {

template <class Element, int kHeadDim, int kRowGroups, int kKeyBlock, int kQueryBuffers,
          int kKeyStages, Extent kExtent>
struct ForwardShape {
  using T = Element;
  static constexpr bool kShaped = kExtent != Extent::kPlain;  // ALiBi, so positions
  static constexpr bool kCapped = kExtent >= Extent::kScores;
  static constexpr bool kDropout = kExtent >= Extent::kDropout;
  // ALiBi's distances come with the scores' product, where a block lies to one side of its rows.
  static constexpr bool kInProduct = kExtent == Extent::kDistances;
  static constexpr bool kPositioned = kInProduct || kDropout;  // shared memory has positions
  static constexpr int kD = kHeadDim;
  static constexpr int kGroups = kRowGroups;
  static constexpr int kRows = 64 * kGroups;
  static constexpr int kKeys = kKeyBlock;
  static constexpr int kQueries = kQueryBuffers;
  static constexpr int kStages = kKeyStages;
  // Tiles known to a block at once: the one worked on and the next; with three groups two more,
  // while tiles have at most kShort blocks and are done before the next one's limits are there.
  static constexpr int kTiles = kGroups == 3 ? 4 : 2, kShort = 2;
  // Output leaves through its tile's query buffer, or, where there is only one of those, straight
  // from registers, so that the next queries can come.
  static constexpr bool kStaged = kQueries >= 2;
  static constexpr int kFlagWords = kKeys / 32;  // dropout's flags of a row in a block
  static constexpr int kChunks = (kD + kChunk - 1) / kChunk;
  static constexpr int kWidth = kChunks * kChunk;  // of a shared-memory row
  static constexpr int kThreads = 128 * (kGroups + 1 + kDropout);
  // A warpgroup's exponentials wait for its products. Three hide each other's, and have no
  // registers for the probabilities of two blocks.
  static constexpr bool kSerial = kGroups == 3;
  static constexpr bool kRoundsEarly = kGroups == 2 && kD < (kDropout ? 192 : 256);
  static constexpr int kProducerRegisters = kDropout ? 24 : kGroups == 3 ? 32 : 40;
  static constexpr int kFlagRegisters = !kDropout ? 0 : kRoundsEarly ? 40 : 56;
  static constexpr int kConsumerRegisters = kGroups == 3   ? 160
                                            : !kDropout    ? 232
                                            : kRoundsEarly ? 224
                                                           : 216;
  // Blocks are not all searched for their maximum. That needs their scores until they are rounded.
  static constexpr bool kQuick = kRoundsEarly || kSerial;
  // Beside a softcap that makes its tanh a polynomial, where all scores are small.
  static constexpr bool kPolynomial = kQuick && kExtent == Extent::kScores;
  // From a tile's first block to the next. With ALiBi the last comes first: under a causal mask the
  // bias falls from there on, and the first maximum serves.
  static constexpr int kStep = kInProduct ? -kKeys : kKeys;
  // Where softmax takes longest, two warpgroups issue products in turn.
  static constexpr bool kInTurn = kPolynomial || kDropout;
  // Operands are advanced from those of the first places, where ptxas keeps these in uniform
  // registers.
  static constexpr bool kAdvances = kQuick && !kInTurn && kD <= 128;
  static_assert(registers_fit(kThreads / 128,
                              kProducerRegisters + kFlagRegisters + kGroups * kConsumerRegisters));
};

// What consumers need to know of a tile.
constexpr int kNoMoreTiles = -1;  // in place of a count of blocks

struct TilePlace {
  int b, head, row;  // first row
};
__device__ __forceinline__ int64_t head_index(const Sizes& n, const TilePlace& at) {
  return int64_t(at.b) * n.g * n.r + at.head;
}
struct TileInfo {
  TilePlace at;
  int first_key, blocks;  // blocks start at first_key + n * kStep
  int end_key;            // no row of the tile sees a key from here on
  // Per warpgroup: union and intersection of its rows' intervals.
  int min_lo[3], max_hi[3], max_lo[3], min_hi[3];
  int min_position[3], max_position[3];  // kInProduct
  float slope;                           // where shaped: ALiBi's, in units of the raw score
};

template <class S>
struct TileRows {
  int lo[S::kRows], hi[S::kRows];
  int position[S::kPositioned ? S::kRows : 1];  // the aligned key coordinates
};

// What single extents need of shared memory.
template <class S, bool kInProduct = S::kInProduct, bool kDropout = S::kDropout>
struct ForwardExtra {};
// S9: one more step of the scores' reduction adds the slope times a key's number in its block. B
// has that, for each tile known, as the sum of three numbers of eight bits; A has 1, -1 and 0 in
// turn.
template <class S>
struct ForwardExtra<S, true, false> {
  alignas(1024) __nv_bfloat16 side[64 * kChunk];
  alignas(1024) __nv_bfloat16 distance[S::kKeys * kChunk];
};
// Dropout's flags of the next blocks of each consumer warpgroup.
constexpr int kFlagStages = 2;
template <class S>
struct ForwardExtra<S, false, true> {
  alignas(16) uint32_t flags[S::kGroups][kFlagStages][64][S::kFlagWords];
  uint64_t flags_full[S::kGroups][kFlagStages], flags_empty[S::kGroups][kFlagStages];
};

template <class S>
struct ForwardSmem : ForwardExtra<S> {
  alignas(1024) typename S::T query[S::kQueries][S::kRows * S::kWidth];
  alignas(1024) typename S::T key[S::kStages][S::kKeys * S::kWidth];
  alignas(1024) typename S::T value[S::kStages][S::kKeys * S::kWidth];
  TileInfo info[S::kTiles];
  TileRows<S> rows[S::kTiles];
  uint64_t info_full[S::kTiles], info_empty[S::kTiles];
  uint64_t query_full[S::kQueries], query_empty[S::kQueries];
  uint64_t key_full[S::kStages], key_empty[S::kStages];
  uint64_t value_full[S::kStages], value_empty[S::kStages];
  int issuing[2][4];  // kInTurn: consumer warps
};

// Scores enter exp2 as exponent * (sign * s), or with a softcap as
// exponent * tanh(factor * (sign * s)); factor and exponent are above 0. A scale of 0 is sign 0:
// the sign is applied to scores at once, before the mask, so that -inf stays -inf. So is a scale by
// which ALiBi's slopes cannot be divided.
// kPolynomial: exponent * tanh(factor * s) is s * (odd[0] + odd[1] s^2 + odd[2] s^4) up to a
// relative error of 2^-12.7 (tanh.approx: 2^-11) where s^2 <= small, which is |factor * s| <= 0.7.
struct ScoreScale {
  bool capped;
  float sign, factor, exponent;
  float odd[3], small;
  uint32_t zero = 0;  // that ptxas knows nothing of
  ScoreScale(double scale, const Features& features) : capped(features.softcap != 0) {
    double magnitude = scale < 0 ? -scale : scale;
    const bool tiny = magnitude < 1e-20;
    sign = tiny ? static_cast<float>(scale) : scale < 0 ? -1.0f : 1.0f;
    if (tiny) magnitude = 1;
    factor = capped ? static_cast<float>(magnitude / features.softcap) : 1.0f;
    exponent = static_cast<float>((capped ? features.softcap : magnitude) * 1.4426950408889634);
    const float f2 = factor * factor, slope = exponent * factor;
    odd[0] = 0.99985216f * slope;
    odd[1] = -0.32779034f * slope * f2;
    odd[2] = 0.10110480f * slope * f2 * f2;
    small = 0.49f / f2;
  }
};

// Sixteen bytes of one step of a K-contiguous operand.
__device__ __forceinline__ uint4& step_unit(__nv_bfloat16* operand, int row, int step) {
  return reinterpret_cast<uint4*>(operand + row * kChunk)[2 * step ^ row % 8];
}
template <class S>
__device__ void init_distances(ForwardSmem<S>& smem) {
  constexpr int kUnits = kChunk / 8;
  for (int i = threadIdx.x; i < S::kKeys * kUnits; i += S::kThreads)
    reinterpret_cast<uint4*>(smem.distance)[i] = make_uint4(0, 0, 0, 0);
  for (int i = threadIdx.x; i < 64 * kUnits; i += S::kThreads) {
    const int unit = i % kUnits ^ i / kUnits % 8;
    const float x = unit == 0 ? 1.0f : unit == 2 ? -1.0f : 0.0f;
    reinterpret_cast<uint4*>(smem.side)[i] =
        make_uint4(ptx::pack(x, x, __nv_bfloat16()), ptx::pack(x, 0, __nv_bfloat16()), 0, 0);
  }
  ptx::proxy_fence();
}
// By one of the warps of the scout.
template <class S>
__device__ __forceinline__ void write_distances(ForwardSmem<S>& smem, int tile, int warp,
                                                float step) {
  for (int row = 32 * warp + threadIdx.x % 32; row < S::kKeys; row += 32 * S::kGroups) {
    float rest = step * static_cast<float>(row);
    const auto part = [&] {
      const float x = __bfloat162float(__float2bfloat16_rn(rest));
      rest -= x;
      return x;
    };
    const float high = part(), middle = part(), low = part();
    step_unit(smem.distance, row, tile) = make_uint4(ptx::pack(high, middle, __nv_bfloat16()),
                                                     ptx::pack(low, 0, __nv_bfloat16()), 0, 0);
  }
  ptx::proxy_fence();
}

struct ForwardMaps {
  CUtensorMap query, key, value, out;
};

// Tiles in the order blocks take them: sections of heads whose keys and values stay in L2 together;
// within a section last rows first (under a causal mask the longest) and heads fastest. Tiles end
// with the last rows, so that the one with empty groups is the shortest: its first row may lie
// whole groups before row 0.
struct TileOrder {
  int heads, batches, row_tiles, section;
  int before;  // rows before row 0
  int* taken;  // tiles taken beyond each block's first; 0 at launch
  __device__ int count() const { return heads * batches * row_tiles; }
  __device__ TilePlace place(int tile, int rows) const {
    const int first = tile / (section * row_tiles) * section;  // head of all batches
    const int inside = tile - first * row_tiles, width = min(section, heads * batches - first);
    const int head = first + inside % width;
    return {head / heads, head % heads, (row_tiles - 1 - inside / width) * rows - before};
  }
};

// The blocks that some row of a group sees: all behind the last one if there is none.
template <class S>
__device__ __forceinline__ void block_range(const TileInfo& info, int group, int* begin, int* end) {
  const int min_lo = info.min_lo[group], max_hi = info.max_hi[group];
  const bool sees = min_lo < max_hi;
  constexpr bool kDown = S::kStep < 0;
  const int top = info.first_key + S::kKeys;  // kDown: where keys are counted from
  *begin = sees ? (kDown ? top - max_hi : min_lo - info.first_key) / S::kKeys : info.blocks;
  *end = sees ? ((kDown ? top - min_lo : max_hi - info.first_key) + S::kKeys - 1) / S::kKeys
              : info.blocks;
}

// A thread's rows of a tile, of accumulators: h is 0 or 1.
__device__ __forceinline__ int row_of_thread(int group, int h) {
  return 64 * group + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + 8 * h;
}

// Whether a row of a tile is one of the call's.
__device__ __forceinline__ bool has_row(const Sizes& n, const TilePlace& at, int row) {
  return static_cast<unsigned>(at.row + row) < n.sq;
}
// The key coordinate that a row of a tile is aligned with; of other rows, anything.
__device__ __forceinline__ int position_of(const ForwardParams& p, const TilePlace& at, int row) {
  return has_row(p.n, at, row) ? aligned_position(p.features, p.mask, p.n, at.b, at.row + row)
                               : row;
}

// Limits of one warpgroup's rows of a tile, and their ranges, to shared memory; by one warp.
template <class S>
__device__ __forceinline__ void write_limits(const ForwardParams& p, const TilePlace& at, int group,
                                             TileRows<S>* rows, TileInfo* to) {
  const int lane = threadIdx.x % 32;
  int min_lo = INT32_MAX, max_hi = 0, max_lo = 0, min_hi = INT32_MAX;
  [[maybe_unused]] int min_position = INT32_MAX, max_position = INT32_MIN;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = group * 64 + half * 32 + lane;
    Interval v = {0, 0};
    if (has_row(p.n, at, row)) v = row_interval(p.mask, p.n, at.b, at.row + row);
    if (empty(v)) {
      v = {0, 0};  // widens nothing; its output is zeroed in the epilogue
    } else {
      min_lo = min(min_lo, v.lo);
      max_hi = max(max_hi, v.hi);
      max_lo = max(max_lo, v.lo);
      min_hi = min(min_hi, v.hi);
    }
    rows->lo[row] = v.lo;
    rows->hi[row] = v.hi;
    if constexpr (S::kPositioned) {
      rows->position[row] = position_of(p, at, row);
      if (has_row(p.n, at, row)) {
        min_position = min(min_position, rows->position[row]);
        max_position = max(max_position, rows->position[row]);
      }
    }
  }
  min_lo = warp_min(min_lo);
  max_hi = warp_max(max_hi);
  max_lo = warp_max(max_lo);
  min_hi = warp_min(min_hi);
  if (lane == 0) {
    to->min_lo[group] = min_lo;
    to->max_hi[group] = max_hi;
    to->max_lo[group] = max_lo;
    to->min_hi[group] = min_hi;
  }
  if constexpr (S::kInProduct) {
    min_position = warp_min(min_position);
    max_position = warp_max(max_position);
    if (lane == 0) {
      to->min_position[group] = min_position;
      to->max_position[group] = max_position;
    }
  }
}

// What there is to know of the next tile, a warp for each group of its rows: consumers wait for it,
// and so do the loads.
template <class S>
__device__ void scout(const ForwardParams& p, TileOrder order, const ScoreScale& scale,
                      ForwardSmem<S>& smem, int group) {
  constexpr int kBarrier = 1 + S::kGroups, kThreads = 32 * S::kGroups;  // of the scouts
  const bool leader = group == 0 && threadIdx.x % 32 == 0;
  bool ahead = false;  // since the last tile is short
  for (Ring<S::kTiles> next;; next.next()) {
    const int i = next.index();
    TileInfo& info = smem.info[i];
    ptx::barrier_wait(&smem.info_empty[i], next.parity() ^ 1);
    if (leader) {
      // Claimed no earlier than needed, for the balance at the end.
      if (S::kTiles > 2 && !ahead && next.uses >= 2) {
        const unsigned done = next.uses - 2;  // the tile before the last
        ptx::barrier_wait(&smem.info_empty[done % S::kTiles], done / S::kTiles & 1);
      }
      const int tile = next.uses == 0 ? blockIdx.x : gridDim.x + atomicAdd(order.taken, 1);
      info.blocks = tile < order.count() ? 0 : kNoMoreTiles;
      info.at = order.place(tile, S::kRows);
    }
    ptx::named_sync(kBarrier, kThreads);
    const bool more = info.blocks != kNoMoreTiles;
    if (more) write_limits<S>(p, info.at, group, &smem.rows[i], &info);
    if constexpr (S::kShaped) {
      if (more) {
        const float slope = alibi_slope(p.features, head_index(p.n, info.at)) / scale.exponent;
        if (leader) info.slope = slope;
        if constexpr (S::kInProduct) {
          const auto stride = static_cast<int>(key_coordinates(p.features, info.at.b).stride);
          write_distances<S>(smem, i, group, scale.sign * slope * static_cast<float>(stride));
        }
      }
    }
    ptx::named_sync(kBarrier, kThreads);
    if (leader) {
      if (more) {
        int first = INT32_MAX, end = 0;
#pragma unroll
        for (int w = 0; w < S::kGroups; ++w) {
          first = min(first, info.min_lo[w]);
          end = max(end, info.max_hi[w]);
        }
        if constexpr (S::kDropout) first &= -S::kKeys;  // its words share their calls
        const int blocks = first < end ? (end - first + S::kKeys - 1) / S::kKeys : 0;
        info.first_key = S::kStep > 0 ? first : first + (blocks - 1) * S::kKeys;
        info.end_key = end;
        info.blocks = blocks;
        ahead = blocks <= S::kShort;
      }
      ptx::barrier_arrive(&smem.info_full[i]);
    }
    if (!more) return;
  }
}

// The loading warp. All its lanes do the same, so that ptxas sees that what they hand to the copy
// engine is uniform.
template <class S>
__device__ void load(const ForwardMaps& maps, int group, ForwardSmem<S>& smem) {
  Ring<S::kQueries> query;
  Ring<S::kStages> key, value;
  const auto load_queries = [&](const TileInfo& info) {
    const int head = ptx::uniform(info.at.head), row = ptx::uniform(info.at.row),
              b = ptx::uniform(info.at.b);
    if (ptx::elect())
      load_tile<S::kRows, S::kChunks>(smem.query[query.index()], &maps.query,
                                      &smem.query_full[query.index()], head, row, b);
    __syncwarp();
    query.next();
  };
  // Queries of the next tile are asked for as soon as their buffer is free: at short lengths most
  // of the traffic is queries, and waits for memory.
  const auto try_queries = [&](const Ring<S::kTiles>& tile) {
    if (!__all_sync(0xffffffffu, ptx::barrier_test(&smem.info_full[tile.index()], tile.parity())))
      return false;
    const TileInfo& info = smem.info[tile.index()];
    if (ptx::uniform(info.blocks) == kNoMoreTiles) return true;
    if (!__all_sync(0xffffffffu,
                    ptx::barrier_test(&smem.query_empty[query.index()], query.parity() ^ 1)))
      return false;
    load_queries(info);
    return true;
  };
  bool queried = false;  // for this tile
  for (Ring<S::kTiles> tile;;) {
    ptx::barrier_wait(&smem.info_full[tile.index()], tile.parity());
    const TileInfo& info = smem.info[tile.index()];
    const int blocks = ptx::uniform(info.blocks), first = ptx::uniform(info.first_key),
              b = ptx::uniform(info.at.b), head = ptx::uniform(info.at.head / group);
    if (blocks == kNoMoreTiles) return;
    if (!queried) {
      ptx::barrier_wait(&smem.query_empty[query.index()], query.parity() ^ 1);
      load_queries(info);
    }
    queried = false;
    __syncwarp();
    if (ptx::elect()) ptx::barrier_arrive(&smem.info_empty[tile.index()]);
    tile.next();
    // Keys one block ahead of values: their stage is free earlier, and they are needed earlier.
    for (int n = 0; n <= blocks; ++n) {
      if (n < blocks) {
        const int x = key.index();
        ptx::barrier_wait(&smem.key_empty[x], key.parity() ^ 1);
        if (ptx::elect())
          load_tile<S::kKeys, S::kChunks>(smem.key[x], &maps.key, &smem.key_full[x], head,
                                          first + n * S::kStep, b);
        __syncwarp();
        key.next();
      }
      if (n > 0) {
        const int x = value.index();
        ptx::barrier_wait(&smem.value_empty[x], value.parity() ^ 1);
        if (ptx::elect())
          load_tile<S::kKeys, S::kChunks>(smem.value[x], &maps.value, &smem.value_full[x], head,
                                          first + (n - 1) * S::kStep, b);
        __syncwarp();
        value.next();
      }
      queried = queried || try_queries(tile);
    }
  }
}

}  // namespace jax_flashattn::cuda::sm90
