// Forward pass for sm_90a: persistent, warp-specialised, TMA and wgmma (docs/kernels.md).
//
// Block: one producer warpgroup and kGroups consumer warpgroups of 64 query rows. A tile is kRows
// query rows of one head; its visible keys come in blocks of kKeys. Of the producers, warp 1
// computes the limits of the tile's rows (scout) and one lane of warp 0 keeps the copy engine busy
// (load); both run a tile ahead. Consumers overlap the softmax of one block with the products of
// its neighbours.
//
// Barriers (mbarriers, one per stage; "full" by the copy engine, "empty" by consumers):
//   query_full/query_empty   Q tile and its TileInfo; emptied when the tile's output has left
//   info_full                TileInfo and row limits, by the scout
//   key_full/key_empty, value_full/value_empty   K and V blocks, each in its own ring
// Every consumer warp waits for and releases every block in order, also those it skips: a parity
// wait cannot tell use u from u + 2, so no warp may fall two uses behind.
#pragma once

#include "cuda/ptx/wgmma.h"
#include "cuda/sm90/pipeline.cuh"
#include "cuda/sm90/scores.cuh"
#include "semantics/params.h"

namespace jax_flashattn::cuda::sm90 {

template <class Element, int kHeadDim, int kRowGroups, int kKeyBlock, int kQueryBuffers,
          int kKeyStages, Extent kExtent>
struct ForwardShape {
  using T = Element;
  static constexpr bool kShaped = kExtent >= Extent::kScores;  // softcap, ALiBi
  static constexpr bool kDropout = kExtent >= Extent::kDropout;
  static constexpr int kD = kHeadDim;
  static constexpr int kGroups = kRowGroups;
  static constexpr int kRows = 64 * kGroups;
  static constexpr int kKeys = kKeyBlock;
  static constexpr int kQueries = kQueryBuffers;
  static constexpr int kStages = kKeyStages;
  static constexpr int kChunks = (kD + kChunk - 1) / kChunk;
  static constexpr int kWidth = kChunks * kChunk;  // of a shared-memory row
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kProducerRegisters = kGroups == 3 ? 32 : 40;
  static constexpr int kConsumerRegisters = kGroups == 3 ? 160 : 232;
  static_assert(registers_fit(kProducerRegisters, kConsumerRegisters, kGroups));
};

// What consumers need to know of a tile.
constexpr int kNoMoreTiles = -1;  // in place of a count of blocks

struct TilePlace {
  int b, head, row;  // first row
};
struct TileInfo {
  TilePlace at;
  int first_key, blocks;  // blocks start at first_key + n * kKeys
  int end_key;            // no row of the tile sees a key from here on
  // Per warpgroup: union and intersection of its rows' intervals.
  int min_lo[3], max_hi[3], max_lo[3], min_hi[3];
};

template <class S>
struct ForwardSmem {
  alignas(1024) typename S::T query[S::kQueries][S::kRows * S::kWidth];
  alignas(1024) typename S::T key[S::kStages][S::kKeys * S::kWidth];
  alignas(1024) typename S::T value[S::kStages][S::kKeys * S::kWidth];
  TileInfo info[S::kQueries];
  int lo[S::kQueries][S::kRows], hi[S::kQueries][S::kRows];
  int position[S::kQueries][S::kShaped ? S::kRows : 1];  // S9, S12
  uint64_t query_full[S::kQueries], query_empty[S::kQueries], info_full[S::kQueries];
  uint64_t key_full[S::kStages], key_empty[S::kStages];
  uint64_t value_full[S::kStages], value_empty[S::kStages];
};

// Scores enter exp2 as exponent * (sign * s), exponent > 0. A scale of 0 is sign 0: the sign is
// applied to scores at once, before the mask, so that -inf stays -inf. Shaped scores come in units
// of log2 already.
struct ScoreScale {
  float sign, exponent;
  ScoreShape shape;
  ScoreScale(double scale, double softcap, bool shaped)
      : sign(shaped || scale > 0 ? 1.0f : (scale < 0 ? -1.0f : 0.0f)),
        exponent(shaped ? 1.0f
                        : static_cast<float>((scale == 0 ? 1.0 : (scale < 0 ? -scale : scale)) *
                                             1.4426950408889634)),
        shape(scale, softcap) {}
};

struct ForwardMaps {
  CUtensorMap query, key, value, out;
};

// Tiles in the order blocks take them: sections of heads whose keys and values stay in L2 together;
// within a section last rows first (under a causal mask the longest) and heads fastest.
struct TileOrder {
  int heads, batches, row_tiles, section;
  int* taken;  // tiles taken beyond each block's first; 0 at launch
  __device__ int count() const { return heads * batches * row_tiles; }
  __device__ TilePlace place(int tile, int rows) const {
    const int first = tile / (section * row_tiles) * section;  // head of all batches
    const int inside = tile - first * row_tiles, width = min(section, heads * batches - first);
    const int head = first + inside % width;
    return {head / heads, head % heads, (row_tiles - 1 - inside / width) * rows};
  }
};

// Limits of a tile's rows and their ranges, to shared memory.
template <class S>
__device__ __forceinline__ void write_tile_info(const ForwardParams& p, const TilePlace& at,
                                                int* lo, int* hi, int* position, TileInfo* to) {
  const int lane = threadIdx.x % 32;
  int first = INT32_MAX, end = 0;
#pragma unroll 1
  for (int w = 0; w < S::kGroups; ++w) {
    int min_lo = INT32_MAX, max_hi = 0, max_lo = 0, min_hi = INT32_MAX;
#pragma unroll 1
    for (int row = w * 64 + lane; row < (w + 1) * 64; row += 32) {
      Interval v = {0, 0};
      if (at.row + row < p.n.sq) v = row_interval(p.mask, p.n, at.b, at.row + row);
      if (empty(v)) {
        v = {0, 0};  // widens nothing; its output is zeroed in the epilogue
      } else {
        min_lo = min(min_lo, v.lo);
        max_hi = max(max_hi, v.hi);
        max_lo = max(max_lo, v.lo);
        min_hi = min(min_hi, v.hi);
      }
      lo[row] = v.lo;
      hi[row] = v.hi;
      if (S::kShaped && at.row + row < p.n.sq)
        position[row] = aligned_position(p.features, p.mask, p.n, at.b, at.row + row);
    }
    min_lo = warp_min(min_lo);
    max_hi = warp_max(max_hi);
    max_lo = warp_max(max_lo);
    min_hi = warp_min(min_hi);
    first = min(first, min_lo);
    end = max(end, max_hi);
    if (lane == 0) {
      to->min_lo[w] = min_lo;
      to->max_hi[w] = max_hi;
      to->max_lo[w] = max_lo;
      to->min_hi[w] = min_hi;
    }
  }
  if constexpr (S::kDropout) first &= ~15;  // squares of random bits begin at multiples of 16
  if (lane == 0) {
    to->at = at;
    to->first_key = first;
    to->end_key = end;
    to->blocks = first < end ? (end - first + S::kKeys - 1) / S::kKeys : 0;
  }
}

template <class S>
__device__ void scout(const ForwardParams& p, TileOrder order, ForwardSmem<S>& smem) {
  const bool leader = threadIdx.x % 32 == 0;
  Ring<S::kQueries> query;
  for (int tile = blockIdx.x;; query.next()) {
    const int i = query.index();
    ptx::barrier_wait(&smem.query_empty[i], query.parity() ^ 1);
    const bool more = tile < order.count();
    if (more)
      write_tile_info<S>(p, order.place(tile, S::kRows), smem.lo[i], smem.hi[i], smem.position[i],
                         &smem.info[i]);
    else if (leader)
      smem.info[i].blocks = kNoMoreTiles;
    __syncwarp();
    if (leader) ptx::barrier_arrive(&smem.info_full[i]);
    if (!more) return;
    if (leader) tile = gridDim.x + atomicAdd(order.taken, 1);
    tile = __shfl_sync(0xffffffffu, tile, 0);
  }
}

template <class S>
__device__ void load(const ForwardMaps& maps, int group, ForwardSmem<S>& smem) {
  Ring<S::kQueries> query;
  Ring<S::kStages> key, value;
  for (;; query.next()) {
    const int i = query.index();
    ptx::barrier_wait(&smem.info_full[i], query.parity());  // the scout waited for query_empty
    const int blocks = smem.info[i].blocks, first = smem.info[i].first_key;
    if (blocks == kNoMoreTiles) return;
    const TilePlace at = smem.info[i].at;
    load_tile<S::kRows, S::kChunks>(smem.query[i], &maps.query, &smem.query_full[i], at.head,
                                    at.row, at.b);
    // Keys one block ahead of values: their stage is free earlier, and they are needed earlier.
    for (int n = 0; n <= blocks; ++n) {
      if (n < blocks) {
        const int x = key.index();
        ptx::barrier_wait(&smem.key_empty[x], key.parity() ^ 1);
        load_tile<S::kKeys, S::kChunks>(smem.key[x], &maps.key, &smem.key_full[x], at.head / group,
                                        first + n * S::kKeys, at.b);
        key.next();
      }
      if (n > 0) {
        const int x = value.index();
        ptx::barrier_wait(&smem.value_empty[x], value.parity() ^ 1);
        load_tile<S::kKeys, S::kChunks>(smem.value[x], &maps.value, &smem.value_full[x],
                                        at.head / group, first + (n - 1) * S::kKeys, at.b);
        value.next();
      }
    }
  }
}

// The state of one consumer warpgroup's rows. Thread t holds rows t / 4 % 8 + 16 * warp (+ 8).
template <class S>
struct Rows {
  float out[S::kD / 2];
  float score[S::kKeys / 2];
  uint32_t probability[S::kKeys / 16][4];
  float largest[2], sum[2];
  int lo[2], hi[2];
  // Where shaped: the aligned key coordinates; where there is dropout: the head's random stream.
  int position[2];
  float slope;
  KeyCoordinates keys;
  uint4 stream;
};

// S = Q K^T, issued but not waited for.
template <class S>
__device__ __forceinline__ void issue_scores(float (&score)[S::kKeys / 2], uint64_t query,
                                             uint64_t key) {
#pragma unroll
  for (int k = 0; k < S::kD / 16; ++k) {
    const int chunk = k / 4, inside = k % 4 * 32;
    ptx::WgmmaShared<typename S::T, S::kKeys, 0, 0>::issue(
        score, ptx::advanced(query, chunk * S::kRows * 128 + inside),
        ptx::advanced(key, chunk * S::kKeys * 128 + inside), k > 0);
  }
  ptx::wgmma_commit();
}

// O += P V, issued but not waited for.
template <class S>
__device__ __forceinline__ void issue_output(Rows<S>& rows, uint64_t value) {
#pragma unroll
  for (int k = 0; k < S::kKeys / 16; ++k)
    ptx::WgmmaRegister<typename S::T, S::kD, 1>::issue(rows.out, rows.probability[k],
                                                       ptx::advanced(value, k * 16 * 128), 1);
  ptx::wgmma_commit();
}

// Keys the row does not see get -inf; `key` is the first of the block.
template <class S>
__device__ __forceinline__ void apply_mask(Rows<S>& rows, int key) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int lo = rows.lo[h] - key - column, hi = rows.hi[h] - key - column;
#pragma unroll
    for (int j = 0; j < S::kKeys / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int c = 8 * j + e;
        if (c < lo || c >= hi) rows.score[4 * j + 2 * h + e] = -INFINITY;
      }
    }
  }
}

// S8, S9. `key` is the first of the block.
template <class S>
__device__ __forceinline__ void shape_rows(Rows<S>& rows, const ScoreShape& shape, int key) {
  if (rows.slope == 0) return shape_scores(rows.score, shape);
  const bool capped = shape.cap != 0;
  if (capped) shape_scores(rows.score, shape);
  // The sum of slope * distance runs on in slope * stride; a slope below 0 changes the sign of
  // both.
  const float sign = rows.slope < 0 ? 1.0f : -1.0f, factor = capped ? 1.0f : shape.factor;
  const float step = rows.slope * static_cast<float>(static_cast<int>(rows.keys.stride));
  const int first = rows.keys.at(key + threadIdx.x % 4 * 2);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float taken = rows.slope * static_cast<float>(rows.position[h] - first);
#pragma unroll
    for (int j = 0; j < S::kKeys / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = rows.score[4 * j + 2 * h + e];
        x = x * factor + sign * fabsf(taken - step * (8 * j + e));
      }
    }
  }
}

// S12: drops probabilities; what stays is scaled with the output. Of a 16 x 16 square a thread
// holds what one Philox call serves, if its two rows lie eight apart in one square; else it takes
// two.
template <class S>
__device__ __forceinline__ void drop(Rows<S>& rows, uint32_t threshold, int key) {
  const uint32_t i0 = rows.position[0], i1 = rows.position[1];
  const bool paired = __all_sync(0xffffffffu, i0 % 16 < 8 && i1 == i0 + 8);
  const DropoutRow row0 = dropout_row(i0), row1 = dropout_row(i1);
#pragma unroll
  for (int k = 0; k < S::kKeys / 16; ++k) {
    const uint32_t column = dropout_column(key + threadIdx.x % 4 * 2).counter + 4 * k;
    uint32_t bits[2][2];  // [row][eight columns]
    const RandomWords x = random_words(rows.stream, row0.counter, column);
    bits[0][0] = row0.word ? x.x[2] : x.x[0];
    bits[0][1] = row0.word ? x.x[3] : x.x[1];
    bits[1][0] = x.x[2];
    bits[1][1] = x.x[3];
    if (!paired) {
      const RandomWords y = random_words(rows.stream, row1.counter, column);
      bits[1][0] = row1.word ? y.x[2] : y.x[0];
      bits[1][1] = row1.word ? y.x[3] : y.x[1];
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* p = rows.score + 8 * k + 4 * half + 2 * h;
        if ((bits[h][half] & 0xffff) >= threshold) p[0] = 0;
        if ((bits[h][half] >> 16) >= threshold) p[1] = 0;
      }
    }
  }
}

// Online softmax: scores become exponentials; returns the factors for earlier sums and outputs.
// Both rows go through each stage together, so that one's latency hides behind the other's work.
template <class S>
__device__ __forceinline__ void softmax(Rows<S>& rows, float scale, float (&correction)[2]) {
  float largest[2], odd[2], reference[2], sum[2] = {0, 0};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    largest[h] = fmaxf(rows.largest[h], rows.score[2 * h]);
    odd[h] = rows.score[2 * h + 1];
  }
#pragma unroll
  for (int j = 1; j < S::kKeys / 8; ++j) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      largest[h] = fmaxf(largest[h], rows.score[4 * j + 2 * h]);
      odd[h] = fmaxf(odd[h], rows.score[4 * j + 2 * h + 1]);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) largest[h] = fmaxf(largest[h], odd[h]);
#pragma unroll
  for (int lanes = 1; lanes < 4; lanes *= 2) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
      largest[h] = fmaxf(largest[h], __shfl_xor_sync(0xffffffffu, largest[h], lanes));
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    reference[h] = largest[h] == -INFINITY ? 0.0f : largest[h] * scale;
    correction[h] = ptx::exp2_approx(rows.largest[h] * scale - reference[h]);
    rows.largest[h] = largest[h];
  }
#pragma unroll
  for (int j = 0; j < S::kKeys / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& x = rows.score[4 * j + i];
      x = ptx::exp2_approx(x * scale - reference[i / 2]);
      sum[i / 2] += x;
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) rows.sum[h] = rows.sum[h] * correction[h] + sum[h];
}

template <class S>
__device__ __forceinline__ void round_probabilities(Rows<S>& rows) {
#pragma unroll
  for (int k = 0; k < S::kKeys / 16; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      rows.probability[k][i] =
          ptx::pack(rows.score[8 * k + 2 * i], rows.score[8 * k + 2 * i + 1], typename S::T());
  }
}

template <class S>
__device__ __forceinline__ void scale_output(Rows<S>& rows, const float (&factor)[2]) {
#pragma unroll
  for (int j = 0; j < S::kD / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) rows.out[4 * j + i] *= factor[i / 2];
  }
}

template <class S>
__device__ __forceinline__ void apply_sign(Rows<S>& rows, float sign) {
#pragma unroll
  for (int i = 0; i < S::kKeys / 2; ++i) rows.score[i] *= sign;
}

// S13: keys behind the tile's last visible one are real memory; a NaN there would meet P = 0.
// Each warpgroup zeroes them for itself: all write the same zeros.
template <class S>
__device__ void zero_values(typename S::T* value, int from) {
  const int thread = threadIdx.x % 128;
  for (int row = from + thread / 8; row < S::kKeys; row += 16) {
    for (int c = 0; c < S::kChunks; ++c) {
      auto* units = reinterpret_cast<uint4*>(value + (c * S::kKeys + row) * kChunk);
      units[thread % 8] = make_uint4(0, 0, 0, 0);
    }
  }
  ptx::proxy_fence();
}

template <class S>
__device__ __forceinline__ void write_output(const ForwardMaps& maps, const ForwardParams& p,
                                             Rows<S>& rows, const TileInfo& info, int group,
                                             typename S::T* staging, float scale_ln) {
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  float inverse[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float sum = rows.sum[h];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    const bool nothing = rows.lo[h] >= rows.hi[h];  // S11
    float largest = rows.largest[h] * scale_ln;
    inverse[h] = 1.0f;
    if (p.features.sinks) {  // S15: joins the denominator
      const float sink = static_cast<const float*>(
          p.features.sinks)[int64_t(info.at.b) * p.n.g * p.n.r + info.at.head];
      const float joint = fmaxf(largest, sink);
      inverse[h] = __expf(largest - joint);
      sum = sum * inverse[h] + __expf(sink - joint);
      largest = joint;
    }
    inverse[h] = nothing ? 0.0f : inverse[h] / sum;
    if constexpr (S::kDropout) inverse[h] *= static_cast<float>(kept_scale(p.features));
    const int row = info.at.row + 64 * group + 16 * warp + lane / 4 + 8 * h;
    if (lane % 4 == 0 && row < p.n.sq)
      static_cast<float*>(
          p.lse)[(int64_t(info.at.b) * p.n.g * p.n.r + info.at.head) * p.n.sq + row] =
          nothing ? -INFINITY : largest + logf(sum);  // S10
    if (nothing) {                                    // not 0 * NaN
#pragma unroll
      for (int j = 0; j < S::kD / 8; ++j) rows.out[4 * j + 2 * h] = rows.out[4 * j + 2 * h + 1] = 0;
    }
  }
  scale_output<S>(rows, inverse);
  // Rows of this warpgroup only: nobody else reads or writes them.
  const int row = 16 * warp + lane % 16;
#pragma unroll
  for (int k = 0; k < S::kD / 16; ++k) {
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      packed[i] = ptx::pack(rows.out[8 * k + 2 * i], rows.out[8 * k + 2 * i + 1], typename S::T());
    const int chunk = k / 4, unit = (k % 4 * 2 + lane / 16) ^ (row % 8);
    ptx::store_matrices(staging + (chunk * S::kRows + 64 * group + row) * kChunk + unit * 8,
                        packed);
  }
  ptx::proxy_fence();
  ptx::named_sync(1 + group, 128);
  if (thread == 0) {
    for (int c = 0; c < S::kChunks; ++c)
      if (c * kChunk < p.n.dv)
        ptx::tma_store(&maps.out, staging + (c * S::kRows + 64 * group) * kChunk, c * kChunk,
                       info.at.head, info.at.row + 64 * group, info.at.b);
    ptx::tma_commit();
  }
}

template <class S>
__device__ void consume(const ForwardMaps& maps, const ForwardParams& p, ScoreScale scale,
                        ForwardSmem<S>& smem, int group) {
  const int thread = threadIdx.x % 128;
  const bool leader = thread == 0;
  Ring<S::kQueries> query;
  Ring<S::kStages> key, value;
  Rows<S> rows;
  int owed = -1;  // query buffer whose output store has not been waited for

  const auto release_query = [&] {
    if (leader && owed >= 0) {
      ptx::tma_wait_read();
      ptx::barrier_arrive(&smem.query_empty[owed]);
    }
    owed = -1;
  };
  const auto release_key = [&] {
    if (thread % 32 == 0) ptx::barrier_arrive(&smem.key_empty[key.index()]);
    key.next();
  };
  const auto release_value = [&] {
    if (thread % 32 == 0) ptx::barrier_arrive(&smem.value_empty[value.index()]);
    value.next();
  };

  for (;; query.next()) {
    ptx::barrier_wait(&smem.info_full[query.index()], query.parity());
    const TileInfo& info = smem.info[query.index()];
    if (info.blocks == kNoMoreTiles) break;
    ptx::barrier_wait(&smem.query_full[query.index()], query.parity());
    const int first_key = info.first_key, blocks = info.blocks;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = 64 * group + 16 * (thread / 32) + thread % 32 / 4 + 8 * h;
      rows.lo[h] = smem.lo[query.index()][row];
      rows.hi[h] = smem.hi[query.index()][row];
      rows.largest[h] = -INFINITY;
      rows.sum[h] = 0;
      if constexpr (S::kShaped) rows.position[h] = smem.position[query.index()][row];
    }
    const int64_t head = int64_t(info.at.b) * p.n.g * p.n.r + info.at.head;
    if constexpr (S::kShaped) {
      rows.slope = alibi_slope(p.features, head);
      rows.keys = key_coordinates(p.features, info.at.b);
    }
    if constexpr (S::kDropout) rows.stream = dropout_stream(p.features, head);
#pragma unroll
    for (int i = 0; i < S::kD / 2; ++i) rows.out[i] = 0;
    const int min_lo = info.min_lo[group], max_hi = info.max_hi[group];
    const int full_from = info.max_lo[group], full_to = info.min_hi[group] - S::kKeys;
    const int last_whole_block = info.end_key - S::kKeys;
    // Blocks this warpgroup's rows see: [begin, end) of the tile's.
    const bool sees = min_lo < max_hi;
    const int begin = sees ? (min_lo - first_key) / S::kKeys : blocks;
    const int end = sees ? (max_hi - first_key + S::kKeys - 1) / S::kKeys : blocks;

    const auto skip = [&](int count) {
      for (int n = 0; n < count; ++n) {
        ptx::barrier_wait(&smem.key_full[key.index()], key.parity());
        release_key();
        ptx::barrier_wait(&smem.value_full[value.index()], value.parity());
        release_value();
      }
    };
    const uint64_t query_rows = ptx::descriptor(smem.query[query.index()] + 64 * group * kChunk);
    const auto scores = [&] {
      ptx::barrier_wait(&smem.key_full[key.index()], key.parity());
      ptx::pin(rows.score);
      ptx::wgmma_fence();
      issue_scores<S>(rows.score, query_rows, ptx::descriptor(smem.key[key.index()]));
    };
    const auto outputs = [&](int block) {
      ptx::barrier_wait(&smem.value_full[value.index()], value.parity());
      const int first = first_key + block * S::kKeys;
      if (first > last_whole_block) {
        zero_values<S>(smem.value[value.index()], last_whole_block + S::kKeys - first);
        ptx::named_sync(1 + group, 128);
      }
      ptx::pin(rows.out);
      ptx::pin(rows.probability);
      ptx::wgmma_fence();
      issue_output<S>(rows, ptx::descriptor(smem.value[value.index()], S::kKeys * 128));
    };
    const auto mask = [&](int block) {
      const int first = first_key + block * S::kKeys;
      if constexpr (S::kShaped) shape_rows<S>(rows, scale.shape, first);
      if (scale.sign <= 0) apply_sign<S>(rows, scale.sign);
      if (first < full_from || first > full_to) apply_mask<S>(rows, first);
    };

    // The wait for a product stands at the top of the next turn: within one stretch of code ptxas
    // moves it in front of the softmax, and with it the overlap away.
    const auto finish_output = [&](bool issued, const float(&correction)[2]) {
      ptx::wgmma_wait<0>();
      ptx::pin(rows.out);
      ptx::pin(rows.probability);
      if (issued) release_value();
      scale_output<S>(rows, correction);
      round_probabilities<S>(rows);
    };
    const auto exponentials = [&](int block, float(&correction)[2]) {
      mask(block);
      softmax<S>(rows, scale.exponent, correction);
      if constexpr (S::kDropout)
        drop<S>(rows, p.features.keep_threshold, first_key + block * S::kKeys);
    };

    skip(begin);
    if (begin < end) {
      float correction[2];
      scores();
      release_query();
      ptx::wgmma_wait<0>();
      ptx::pin(rows.score);
      release_key();
      exponentials(begin, correction);
      for (int n = begin + 1; n < end; ++n) {
        finish_output(n > begin + 1, correction);
        scores();
        outputs(n - 1);
        ptx::wgmma_wait<1>();
        ptx::pin(rows.score);
        release_key();
        exponentials(n, correction);
      }
      finish_output(end > begin + 1, correction);
      outputs(end - 1);
      ptx::wgmma_wait<0>();
      ptx::pin(rows.out);
      release_value();
    }
    release_query();
    skip(blocks - max(begin, end));
    write_output<S>(maps, p, rows, info, group, smem.query[query.index()],
                    scale.exponent * 0.6931471805599453f);
    owed = query.index();
    if constexpr (S::kQueries == 1) release_query();  // the next tile cannot load before
  }
  release_query();
  if (leader) ptx::tma_wait();
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    forward_kernel(const __grid_constant__ ForwardMaps maps, const ForwardParams p,
                   const ScoreScale scale, const TileOrder order) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& smem = *reinterpret_cast<ForwardSmem<S>*>(raw);
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kQueries; ++i) {
      ptx::barrier_init(&smem.query_full[i], 1);
      ptx::barrier_init(&smem.info_full[i], 1);
      ptx::barrier_init(&smem.query_empty[i], S::kGroups);
    }
    for (int i = 0; i < S::kStages; ++i) {
      ptx::barrier_init(&smem.key_full[i], 1);
      ptx::barrier_init(&smem.key_empty[i], 4 * S::kGroups);
      ptx::barrier_init(&smem.value_full[i], 1);
      ptx::barrier_init(&smem.value_empty[i], 4 * S::kGroups);
    }
    ptx::barrier_init_fence();
  }
  __syncthreads();
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    ptx::release_registers<S::kProducerRegisters>();
    if (threadIdx.x == 0) load<S>(maps, static_cast<int>(p.n.r), smem);
    if (threadIdx.x / 32 == 1) scout<S>(p, order, smem);
  } else {
    ptx::take_registers<S::kConsumerRegisters>();
    consume<S>(maps, p, scale, smem, warpgroup - 1);
  }
}

}  // namespace jax_flashattn::cuda::sm90
