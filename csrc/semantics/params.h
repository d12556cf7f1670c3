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

// The true lengths of batch b.
FLASH_FN ArithmeticMask arithmetic_mask(const MaskSource& m, const Sizes& n, int64_t b) {
  int32_t sq = static_cast<int32_t>(n.sq), sk = static_cast<int32_t>(n.sk);
  if (m.lengths) {
    sq = clamp(m.lengths[b * m.lengths_pitch], 0, sq);
    sk = clamp(m.lengths[b * m.lengths_pitch + 1], 0, sk);
  }
  return {sq, sk, m.left, m.right};
}

FLASH_FN Interval row_interval(const MaskSource& m, const Sizes& n, int64_t b, int32_t i) {
  const ArithmeticMask arithmetic = arithmetic_mask(m, n, b);
  if (m.lo == nullptr) return row_interval(arithmetic, i);
  if (i >= arithmetic.sq) return {0, 0};
  const int64_t at = b * m.limits_pitch + i;
  return clamped_interval(m.lo[at], m.hi[at], arithmetic.sk);
}

// An additive bias, or its gradient: element (b, g, r, i, j) lies at the sum of index * stride.
// A broadcast axis has extent 1 and stride 0.
struct Bias {
  const void* data;  // null: none
  DType dtype;
  int64_t b, g, r, i, j;  // strides
};

// What a call does to its scores and probabilities beyond mask and scale; zeros and nulls are
// absent. Arrays per head are [b, g, r].
struct Features {
  double softcap;           // S8
  const float* slopes;      // S9: ALiBi
  const void* sinks;        // S15, forward only; float, or double for kF64
  Bias bias;                // S8
  uint32_t keep_threshold;  // S12: of 65536
  const uint32_t* dropout;  // S12: [b, g, r, 4], key words, batch and head index
  const int32_t* position;  // the aligned key coordinate of row i at b * position_pitch + i
  const int32_t* keys;      // (start, stride) of the keys' coordinates at b * keys_pitch
  int64_t position_pitch, keys_pitch;
};

// The key coordinate that row i is aligned with: of ALiBi and dropout, not of the mask.
FLASH_FN int32_t aligned_position(const Features& f, const MaskSource& m, const Sizes& n, int64_t b,
                                  int32_t i) {
  if (f.position) return f.position[b * f.position_pitch + i];
  const ArithmeticMask arithmetic = arithmetic_mask(m, n, b);
  return i + arithmetic.sk - arithmetic.sq;
}

// Coordinates wrap around rather than overflow: they may be nonsense, but never undefined.
struct KeyCoordinates {
  uint32_t start, stride;
  FLASH_MEMBER int32_t at(int64_t j) const {
    return static_cast<int32_t>(start + stride * static_cast<uint32_t>(j));
  }
};
FLASH_FN KeyCoordinates key_coordinates(const Features& f, int64_t b) {
  if (f.keys == nullptr) return {0, 1};
  const int32_t* keys = f.keys + b * f.keys_pitch;
  return {static_cast<uint32_t>(keys[0]), static_cast<uint32_t>(keys[1])};
}

// |position - coordinate|, wrapping likewise.
FLASH_FN int32_t key_distance(int32_t position, int32_t coordinate) {
  const uint32_t distance = static_cast<uint32_t>(position) - static_cast<uint32_t>(coordinate);
  const int32_t toward = static_cast<int32_t>(distance);
  return toward < 0 ? static_cast<int32_t>(0u - distance) : toward;
}

// What kept probabilities are multiplied with: exactly one over the rate applied (S12).
FLASH_FN double kept_scale(const Features& f) {
  if (f.dropout == nullptr) return 1.0;
  return f.keep_threshold == 0 ? 0.0 : 65536.0 / f.keep_threshold;
}

struct ForwardParams {
  Sizes n;
  DType dtype;
  MaskSource mask;
  Features features;
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
  Features features;
  double scale;
  const void *q, *k, *v, *dout;
  const void *lse, *delta;  // float, or double for kF64
  void *dq, *dk, *dv;
  void* dbias;         // of the shape of features.bias
  bool deterministic;  // S14: bitwise repeatable
  // CPU: accumulators [b, g, parts, sk + odd + 1, columns] (key_gradients.h). CUDA: a workspace.
  void* scratch;
  int64_t parts;
  // CPU: keys have biases of their own that all query rows share, and scratch has columns for their
  // gradient. Who makes it decides (jax_flashattn/_lowering.py).
  bool bias_per_key = false;
};

// Whether every pair has a bias of its own.
FLASH_FN bool is_bias_per_pair(const BackwardParams& p) {
  const Bias& bias = p.features.bias;
  const Sizes& n = p.n;
  return bias.data && !p.bias_per_key && (bias.b || n.b == 1) && (bias.g || n.g == 1) &&
         (bias.r || n.r == 1) && (bias.i || n.sq == 1) && (bias.j || n.sk == 1);
}

// Forward mode: q, k, v have tangents dq, dk, dv, and so on; out and lse are those of the forward.
struct TangentParams {
  Sizes n;
  DType dtype;
  MaskSource mask;
  Features features;
  double scale;
  const void *q, *k, *v, *out, *lse;
  const void *dq, *dk, *dv;
  Bias dbias;         // of features.bias; none without one
  const void* dsink;  // [b, g, r, sq]: what the tangent of a sink adds to that of lse
  void *dout, *dlse;  // lse, dsink, dlse: float, or double for kF64
};

// Whether a call is scale and mask alone: the CPU kernels' plain instance.
template <class Params>
bool plain_features(const Params& p) {
  const Features& f = p.features;
  return f.softcap == 0 && !f.slopes && !f.sinks && !f.bias.data && !f.dropout;
}

}  // namespace jax_flashattn
