// Scratch of the Hopper backward: one float buffer, cut into arrays. jax_flashattn/_lowering.py
// allocates it as [b, g, workspace_floats(n)].
//
//   dq          [b, h, tiles, pieces, 8, 128] float4: 64 x 64 pieces in accumulator order
//   turns       [b, h, tiles, pieces] int32: how many blocks have added to a piece (deterministic)
//   key_range   [b] int4: INT32_MAX - first, and end, of the keys that any row sees
//   statistics  [b, h, tiles, 2, rows]: lse * log2(e), delta
//   limits      [b, tiles, 3, rows] int32: lo, hi, aligned key coordinate
//   ranges      [b, tiles] int4: TileLimits
#pragma once

#include "semantics/params.h"

namespace jax_flashattn::cuda::sm90 {

// Columns of dq in whole chunks.
inline int64_t padded_width(const Sizes& n) { return ((n.d > n.dv ? n.d : n.dv) + 63) / 64 * 64; }
// Rows of dq in whole tiles.
inline int64_t padded_rows(const Sizes& n) {
  const int64_t tile = padded_width(n) == 64 ? 128 : 64;
  return (n.sq + tile - 1) / tile * tile;
}
// A few rows would be padded to many times their size; the plain kernels take those.
inline bool worth_tiles(const Sizes& n) { return n.sq > 32 || n.sk > 1024; }

inline int64_t workspace_floats(const Sizes& n) {
  if (!worth_tiles(n)) return 0;
  const int64_t rows = padded_rows(n);
  return n.r * (rows * (padded_width(n) + 2) + rows / 16) + 3 * rows + rows / 16 + 4;
}

struct BackwardWorkspace {
  float* dq;
  int* turns;
  int4* key_range;
  float* statistics;
  int* limits;
  int4* ranges;

  BackwardWorkspace(void* memory, const Sizes& n) {
    const int64_t rows = padded_rows(n), heads = n.b * n.g * n.r;
    dq = static_cast<float*>(memory);
    turns = reinterpret_cast<int*>(dq + heads * rows * padded_width(n));
    key_range = reinterpret_cast<int4*>(turns + heads * rows / 16);
    statistics = reinterpret_cast<float*>(key_range + n.b);
    limits = reinterpret_cast<int*>(statistics + heads * rows * 2);
    ranges = reinterpret_cast<int4*>(limits + n.b * rows * 3);
  }
};

}  // namespace jax_flashattn::cuda::sm90
