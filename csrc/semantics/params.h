// One attention problem, as both backends receive it: sizes, buffers, the mask source.
//
// Letters: b batch, g key heads, r query heads per key head, sq/sk lengths, d/dv head dims.
// Memory is b, s, h, d (h = g * r + r') for query, key, value, out and their gradients, and
// b, g, r, sq for lse and delta.
#pragma once

#include <cstdint>

#include "semantics/mask.h"

namespace jax_flashattn {

constexpr int64_t kMaxHeadDim = 256;

enum class DType { kF16, kBF16, kF32, kF64 };

struct Sizes {
  int64_t b, g, r, sq, sk, d, dv;
};

// Arithmetic limits unless `lo` is given. Lengths are optional in both.
struct MaskSource {
  int32_t left, right;
  const int32_t* lengths;  // (query, key) length of batch b at b * lengths_pitch, or null
  const int32_t* lo;       // row i of batch b at b * limits_pitch + i, or null
  const int32_t* hi;
  int64_t lengths_pitch, limits_pitch;
};

FLASH_FN Interval row_interval(const MaskSource& m, const Sizes& n, int64_t b, int32_t i) {
  int32_t sq = static_cast<int32_t>(n.sq), sk = static_cast<int32_t>(n.sk);
  if (m.lengths) {
    sq = clamp(m.lengths[b * m.lengths_pitch], 0, sq);
    sk = clamp(m.lengths[b * m.lengths_pitch + 1], 0, sk);
  }
  if (m.lo == nullptr) return row_interval(ArithmeticMask{sq, sk, m.left, m.right}, i);
  if (i >= sq) return {0, 0};
  const int64_t at = b * m.limits_pitch + i;
  return clamped_interval(m.lo[at], m.hi[at], sk);
}

struct ForwardParams {
  Sizes n;
  DType dtype;
  MaskSource mask;
  double scale;
  const void *q, *k, *v;
  void* out;
  void* lse;      // float, or double for kF64
  void* scratch;  // CUDA only: one int32, a tile counter
};

struct BackwardParams {
  Sizes n;
  DType dtype;
  MaskSource mask;
  double scale;
  const void *q, *k, *v, *dout;
  const void *lse, *delta;  // float, or double for kF64
  void *dq, *dk, *dv;
  bool deterministic;  // S14: bitwise repeatable
  // CPU: accumulators [b, g, parts, sk + odd, padded(d) + padded(dv)]. CUDA: a workspace.
  void* scratch;
  int64_t parts;
};

}  // namespace jax_flashattn
