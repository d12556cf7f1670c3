// Scratch of the Hopper backward: one float buffer, cut into arrays. jax_flashattn/_lowering.py
// allocates it as [b, g, workspace_floats(n)].
//
//   dq          [b, h, tiles, pieces, 8, 128] float4: 64 x 64 pieces in accumulator order
//   turns       [b, h, tiles, pieces] int32: 1 when a piece is zeroed, and how many blocks have
//               added to it (deterministic)
//   claimed     int32 (two of four): key tiles taken, beyond one for each block; tiles of dq taken
//               to be zeroed, in twos
//   key_range   [b] int4: INT32_MAX - first, and end, of the keys that any row sees
//   row_tiles   [b, key tiles] int2: INT32_MAX - first, and end, of the row tiles that see any key
//   statistics  [b, h, tiles, 2, rows]: lse * log2(e), delta, each in the order of row_place
//   limits      [b, tiles, 3, rows] int32: lo, hi, aligned key coordinate, likewise
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
// Places for key tiles, of 64 keys or more, in whole 16 bytes of row_tiles.
inline int64_t padded_key_tiles(const Sizes& n) { return (n.sk + 127) / 128 * 2; }
// A few rows would be padded to many times their size; the plain kernels take those.
inline bool worth_tiles(const Sizes& n) { return n.sq > 32 || n.sk > 1024; }

inline int64_t workspace_floats(const Sizes& n) {
  if (!worth_tiles(n)) return 0;
  const int64_t rows = padded_rows(n);
  return n.r * (rows * (padded_width(n) + 2) + rows / 16) + 3 * rows + rows / 16 + 8 +
         2 * padded_key_tiles(n);
}

struct BackwardWorkspace {
  float* dq;
  int* turns;
  int* claimed;
  int4* key_range;
  int2* row_tiles;
  float* statistics;
  int* limits;
  int4* ranges;

  BackwardWorkspace(void* memory, const Sizes& n) {
    const int64_t rows = padded_rows(n), heads = n.b * n.g * n.r;
    dq = static_cast<float*>(memory);
    turns = reinterpret_cast<int*>(dq + heads * rows * padded_width(n));
    claimed = turns + heads * rows / 16;
    key_range = reinterpret_cast<int4*>(claimed + 4);
    row_tiles = reinterpret_cast<int2*>(key_range + n.b);
    statistics = reinterpret_cast<float*>(row_tiles + n.b * padded_key_tiles(n));
    limits = reinterpret_cast<int*>(statistics + heads * rows * 2);
    ranges = reinterpret_cast<int4*>(limits + n.b * rows * 3);
  }

  // What starts as zero: claimed, key_range and row_tiles.
  size_t counters_bytes() const {
    return reinterpret_cast<char*>(statistics) - reinterpret_cast<char*>(claimed);
  }
};

}  // namespace jax_flashattn::cuda::sm90
