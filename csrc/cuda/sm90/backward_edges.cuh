// What runs before and after the Hopper backward: statistics and limits in tiles, dq to 16 bits.
#pragma once

#include "cuda/sm90/backward_workspace.h"
#include "cuda/sm90/pipeline.cuh"
#include "cuda/sm90/scores.cuh"

namespace jax_flashattn::cuda::sm90 {

// Grid: (batch * row tiles, some heads), kPrepareThreads. Zeroes turns, and writes
// statistics; y = 0 also writes limits, ranges, key_range and row_tiles. Rows past the sequence and
// rows that see nothing get lse = inf: their probabilities are 0 (S11).
constexpr int kPrepareThreads = 256;
template <int kRows, int kWidth, int kKeys>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_backward_kernel(const BackwardParams p, const BackwardWorkspace w, const int tiles,
                            const int key_tiles) {
  const int b = blockIdx.x / tiles, tile = blockIdx.x % tiles, thread = threadIdx.x;
  const int row = tile * kRows + thread;
  const bool mine = thread < kRows;
  const Interval v = mine && row < p.n.sq ? row_interval(p.mask, p.n, b, row) : Interval{0, 0};
  const int heads = static_cast<int>(p.n.g * p.n.r);
  const float inverse = 1.0f / gradient_scale(p.features);
  for (int h = blockIdx.y; h < heads; h += gridDim.y) {
    const int64_t tile_of_all = (int64_t(b) * heads + h) * tiles + tile;
    constexpr int kPieces = kRows / 64 * kWidth / 64;
    if (thread < kPieces) w.turns[tile_of_all * kPieces + thread] = 0;
    if (!mine) continue;
    const int64_t at = (int64_t(b) * heads + h) * p.n.sq + row;
    float* to = w.statistics + tile_of_all * 2 * kRows + row_place(thread);
    to[0] = empty(v) ? INFINITY : static_cast<const float*>(p.lse)[at] * 1.4426950408889634f;
    to[kRows] = empty(v) ? 0.0f : static_cast<const float*>(p.delta)[at] * inverse;
  }
  if (blockIdx.y != 0) return;
  __shared__ int4 shared[kRows / 32];
  if (mine) {
    int* limits = w.limits + blockIdx.x * int64_t(3 * kRows) + row_place(thread);
    limits[0] = v.lo;
    limits[kRows] = v.hi;
    limits[2 * kRows] = row < p.n.sq || !p.features.position
                            ? aligned_position(p.features, p.mask, p.n, b, row)
                            : 0;
    const TileLimits x = add_row(no_rows(), v);
    const int4 all =
        make_int4(warp_min(x.min_lo), warp_max(x.max_hi), warp_max(x.max_lo), warp_min(x.min_hi));
    if (thread % 32 == 0) shared[thread / 32] = all;
  }
  __syncthreads();
  TileLimits all = no_rows();
  for (const int4& x : shared) all = unite(all, {x.x, x.y, x.z, x.w});
  const int end_key_tile = (all.max_hi + kKeys - 1) / kKeys;
  for (int k = all.min_lo / kKeys + thread; k < end_key_tile; k += kPrepareThreads) {
    atomicMax(&w.row_tiles[b * key_tiles + k].x, INT32_MAX - tile);
    atomicMax(&w.row_tiles[b * key_tiles + k].y, tile + 1);
  }
  if (thread != 0) return;
  w.ranges[blockIdx.x] = make_int4(all.min_lo, all.max_hi, all.max_lo, all.min_hi);
  atomicMax(&w.key_range[b].x, INT32_MAX - all.min_lo);
  atomicMax(&w.key_range[b].y, all.max_hi);
}

// Of an accumulator's four groups of eight columns, of which each of four lanes holds two columns
// of 16 bits: the one with this lane's number, whole.
__device__ __forceinline__ uint4 whole_group(const uint32_t (&groups)[4]) {
  const int mine = threadIdx.x % 4;
  uint32_t from[4];
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const int other = mine ^ step;  // gets its group, and has a piece of this lane's
    const uint32_t low = other & 1 ? groups[1] : groups[0];
    const uint32_t high = other & 1 ? groups[3] : groups[2];
    const uint32_t got = __shfl_xor_sync(0xffffffffu, other & 2 ? high : low, step);
#pragma unroll
    for (int q = 0; q < 4; ++q)
      if (q == other) from[q] = got;
  }
  return make_uint4(from[0], from[1], from[2], from[3]);
}

// Grid: one block of 128 threads per 64 x 64 piece of dq, in the order of the accumulators. Four
// lanes hold eight columns of a row; they trade pieces so that each writes 16 bytes.
template <class T, int kRows, int kWidth>
__global__ void __launch_bounds__(128)
    finish_backward_kernel(const BackwardParams p, const BackwardWorkspace w, const int tiles) {
  constexpr int kPieces = kRows / 64 * kWidth / 64;
  // Last tiles first: some of them are still in L2.
  const unsigned index = gridDim.x - 1 - blockIdx.x;
  const int piece = index % kPieces;
  const int64_t tile_of_all = index / kPieces;
  const int tile = static_cast<int>(tile_of_all % tiles), thread = threadIdx.x, lane = thread % 32;
  const int64_t bh = tile_of_all / tiles, heads = p.n.g * p.n.r, b = bh / heads, h = bh % heads;
  const int row_piece = kRows == 64 ? 0 : piece, column_piece = kRows == 64 ? piece : 0;
  const float scale = static_cast<float>(p.scale) * gradient_scale(p.features);
  const auto* from = reinterpret_cast<const float4*>(w.dq) + int64_t(index) * 8 * 128 + thread;
  uint32_t x[2][2][4];  // [row or row + 8][four groups of eight columns]: two columns each
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float4 v = from[j * 128];
    x[0][j / 4][j % 4] = ptx::pack(v.x * scale, v.y * scale, T());
    x[1][j / 4][j % 4] = ptx::pack(v.z * scale, v.w * scale, T());
  }
  const int quarter = lane % 4, row = tile * kRows + row_piece * 64 + thread / 32 * 16 + lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint4 group = whole_group(x[half][j]);
      const int column = column_piece * 64 + (4 * j + quarter) * 8, i = row + 8 * half;
      if (i < p.n.sq && column < p.n.d)
        *reinterpret_cast<uint4*>(static_cast<T*>(p.dq) + ((b * p.n.sq + i) * heads + h) * p.n.d +
                                  column) = group;
    }
  }
}

}  // namespace jax_flashattn::cuda::sm90
