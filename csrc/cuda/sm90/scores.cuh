// What calls do to scores and probabilities beyond scale and mask: softcap (S8), ALiBi (S9),
// dropout (S12), for accumulator fragments in either orientation.
#pragma once

#include <type_traits>

#include "cuda/ptx/wgmma.h"
#include "semantics/params.h"

namespace jax_flashattn::cuda::sm90 {

// How much of it a kernel instance contains; more costs registers and instructions. kDistances is
// ALiBi alone, kScores both, kDropout everything; kDropoutAlone is dropout without either
// (backward).
enum class Extent { kPlain, kDistances, kScores, kDropout, kDropoutAlone };

template <class Params>
Extent extent(const Params& p) {
  if (p.features.dropout) return Extent::kDropout;
  if (p.features.softcap != 0) return Extent::kScores;
  return p.features.slopes ? Extent::kDistances : Extent::kPlain;
}

constexpr float kLog2e = 1.4426950408889634f;

// Gradients of scores are made without dropout's scale, which their sums get: that of what is kept,
// or 1 where nothing is and only the lse has a gradient. Delta is divided by it.
__device__ __forceinline__ float gradient_scale(const Features& f) {
  return f.dropout && f.keep_threshold ? static_cast<float>(kept_scale(f)) : 1.0f;
}

// Scores in units of log2: x = s * factor, or with a softcap x = cap * tanh(s * factor).
struct ScoreShape {
  float factor, cap;  // cap 0: none
  ScoreShape(double scale, double softcap)
      : factor(static_cast<float>(softcap != 0 ? scale / softcap : scale * 1.4426950408889634)),
        cap(static_cast<float>(softcap * 1.4426950408889634)) {}
};

template <int kCount>
__device__ __forceinline__ void shape_scores(float (&score)[kCount], const ScoreShape& shape) {
  if (shape.cap != 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      score[i] = ptx::tanh_approx(score[i] * shape.factor) * shape.cap;
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) score[i] *= shape.factor;
  }
}

// The slope of a head in units of log2; 0 without ALiBi.
__device__ __forceinline__ float alibi_slope(const Features& f, int64_t head) {
  return f.slopes ? f.slopes[head] * kLog2e : 0.0f;
}

// The transposed fragments of the backward pass: keys down, query rows across. A thread holds keys
// `key` and `key` + 8 and of every eight rows two, from `column` on.

// Numbers of a tile's rows lie in shared memory so that a thread finds those of sixteen rows, four,
// together.
__device__ __forceinline__ int row_place(int row) {
  return row / 16 * 16 + row % 8 / 2 * 4 + row / 8 % 2 * 2 + row % 2;
}
template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T x, y;
};
// A thread's numbers of the eight rows from 8 * j on, read where they are used.
template <class T>
struct RowsInPlace {
  const Pair<T>* first;
  __device__ __forceinline__ RowsInPlace(const T* rows, int thread)
      : first(reinterpret_cast<const Pair<T>*>(rows) + thread % 4 * 2) {}
  __device__ __forceinline__ void load() {}
  __device__ __forceinline__ Pair<T> pair(int j) const { return first[j / 2 * 8 + j % 2]; }
};
// The same for a fragment of kCount elements, in registers from load() on.
template <class T, int kCount>
struct RowsAhead {
  RowsInPlace<T> from;
  Pair<T> pairs[kCount / 4];
  __device__ __forceinline__ RowsAhead(const T* rows, int thread) : from(rows, thread) {}
  __device__ __forceinline__ void load() {
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) pairs[j] = from.pair(j);
  }
  __device__ __forceinline__ Pair<T> pair(int j) const { return pairs[j]; }
};
template <bool kAhead, class T, int kCount>
using RowNumbers = std::conditional_t<kAhead, RowsAhead<T, kCount>, RowsInPlace<T>>;

// What ALiBi has taken off a score: slope * |position - coordinate|, for the eight rows from 8 * j
// on.
template <class Positions>
struct Distances {
  float slope, stride;
  int coordinate;  // of this thread's first key
  const Positions& positions;
  __device__ __forceinline__ void of(int j, float (&taken)[4]) const {
    const Pair<int> at = positions.pair(j);
    const float x = static_cast<float>(at.x - coordinate),
                y = static_cast<float>(at.y - coordinate);
    taken[0] = slope * fabsf(x);
    taken[1] = slope * fabsf(y);
    taken[2] = slope * fabsf(x - 8 * stride);
    taken[3] = slope * fabsf(y - 8 * stride);
  }
};

template <int kCount, class Positions>
__device__ __forceinline__ void take_distances(float (&score)[kCount],
                                               const Distances<Positions>& distances) {
  if (distances.slope == 0) return;
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j) {
    float taken[4];
    distances.of(j, taken);
#pragma unroll
    for (int i = 0; i < 4; ++i) score[4 * j + i] -= taken[i];
  }
}

// The derivative of the softcap, 1 - tanh^2, found again from the probability: registers are dearer
// than a logarithm. Where P underflows to 0 the factor is 0, and so is the gradient.
template <int kCount, class Probability, class Rows, class Positions>
__device__ __forceinline__ void softcap_gradients(float (&ds)[kCount], const Probability& p,
                                                  const Rows& lse, const ScoreShape& shape,
                                                  const Distances<Positions>& distances) {
  if (shape.cap == 0) return;
  const float inverse = 1.0f / shape.cap;
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j) {
    const Pair<float> l = lse.pair(j);
    float taken[4] = {0, 0, 0, 0};
    if (distances.slope != 0) distances.of(j, taken);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float score = ptx::log2_approx(p(4 * j + i)) + (i % 2 ? l.y : l.x) + taken[i];
      const float tanh = score * inverse;
      ds[4 * j + i] *= 1.0f - fminf(tanh * tanh, 1.0f);
    }
  }
}

}  // namespace jax_flashattn::cuda::sm90
