// What calls do to scores and probabilities beyond scale and mask: softcap (S8), ALiBi (S9),
// dropout (S12), for accumulator fragments in either orientation.
#pragma once

#include "cuda/ptx/wgmma.h"
#include "semantics/params.h"
#include "semantics/philox.h"

namespace jax_flashattn::cuda::sm90 {

// How much of it a kernel instance contains; more costs registers and instructions.
enum class Extent { kPlain, kScores, kDropout };

template <class Params>
Extent extent(const Params& p) {
  if (p.features.dropout) return Extent::kDropout;
  return p.features.softcap != 0 || p.features.slopes ? Extent::kScores : Extent::kPlain;
}

constexpr float kLog2e = 1.4426950408889634f;

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

// The 64 key words and the batch and head index of a head's random bits.
__device__ __forceinline__ uint4 dropout_stream(const Features& f, int64_t head) {
  return *reinterpret_cast<const uint4*>(f.dropout + head * 4);
}

struct RandomWords {
  uint32_t x[4];
};
__device__ __forceinline__ RandomWords random_words(const uint4& stream, uint32_t row,
                                                    uint32_t column) {
  RandomWords words{{row, column, stream.z, stream.w}};
  philox(words.x, stream.x, stream.y, MultiplyWords{});
  return words;
}

// The transposed fragments of the backward pass: keys down, query rows across. A thread holds keys
// `key` and `key` + 8 and of every eight rows two, from `column` on.

// What ALiBi has taken off a score: slope * |position - coordinate|, for the eight rows from 8 * j
// on.
struct Distances {
  float slope, stride;
  int coordinate;       // of this thread's first key
  const int* position;  // of the tile's rows
  __device__ __forceinline__ void of(int j, float (&taken)[4]) const {
    const int2 at = *reinterpret_cast<const int2*>(position + 8 * j + threadIdx.x % 4 * 2);
    const float x = static_cast<float>(at.x - coordinate),
                y = static_cast<float>(at.y - coordinate);
    taken[0] = slope * fabsf(x);
    taken[1] = slope * fabsf(y);
    taken[2] = slope * fabsf(x - 8 * stride);
    taken[3] = slope * fabsf(y - 8 * stride);
  }
};

template <int kCount>
__device__ __forceinline__ void take_distances(float (&score)[kCount], const Distances& distances) {
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
template <int kCount, class Probability>
__device__ __forceinline__ void softcap_gradients(float (&ds)[kCount], const Probability& p,
                                                  const float* lse, const ScoreShape& shape,
                                                  const Distances& distances) {
  if (shape.cap == 0) return;
  const float inverse = 1.0f / shape.cap;
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j) {
    const float2 l = *reinterpret_cast<const float2*>(lse + 8 * j + threadIdx.x % 4 * 2);
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

// S12: which of a fragment's probabilities stay, a bit each. The two lanes that hold keys j and
// j + 1 need the same Philox calls, of rows i and i + 1: where the rows of a square lie in order
// each makes one and they trade halves. Elsewhere a thread makes the calls of its four rows.
template <int kWords>
__device__ __forceinline__ void kept(uint32_t (&keep)[kWords], const uint4& stream,
                                     uint32_t threshold, int key, const int* position) {
  const DropoutColumn mine = dropout_column(key);
  const uint32_t odd = key % 2, first = threadIdx.x % 4 * 2;
  const auto test = [&](uint32_t bits, int i) {
    if (bits < threshold) keep[i / 32] |= 1u << i % 32;
  };
#pragma unroll
  for (int i = 0; i < kWords; ++i) keep[i] = 0;
#pragma unroll
  for (int k = 0; k < 4 * kWords; ++k) {
    const int2 low = *reinterpret_cast<const int2*>(position + 16 * k + first);
    const int2 high = *reinterpret_cast<const int2*>(position + 16 * k + 8 + first);
    const bool in_order = low.x % 16 == int(first) && low.y == low.x + 1 && high.x == low.x + 8 &&
                          high.y == low.x + 9;
    if (__all_sync(0xffffffffu, in_order)) {
      const RandomWords x = random_words(stream, dropout_row(low.x + odd).counter, mine.counter);
      const uint32_t own = odd ? 0x7632 : 0x5410, other = odd ? 0x5410 : 0x7632;
      uint32_t bits[2]
                   [2];  // [of row i, of row i + 1][eight rows]: of keys j (low) and j + 8 (high)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t a = x.x[2 * half], b = x.x[2 * half + 1];
        const uint32_t stays = __byte_perm(a, b, own);
        const uint32_t comes = __shfl_xor_sync(0xffffffffu, __byte_perm(a, b, other), 4);
        bits[0][half] = odd ? comes : stays;
        bits[1][half] = odd ? stays : comes;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          test(bits[e][half] & 0xffff, 8 * k + 4 * half + e);
          test(bits[e][half] >> 16, 8 * k + 4 * half + 2 + e);
        }
      }
    } else {
#pragma unroll 1
      for (int row = 0; row < 4; ++row) {
        const int i = row == 0 ? low.x : row == 1 ? low.y : row == 2 ? high.x : high.y;
        const DropoutRow at = dropout_row(i);
        const RandomWords x = random_words(stream, at.counter, mine.counter);
        const int element = 8 * k + 4 * (row / 2) + row % 2;
        const uint32_t a = at.word ? x.x[2] : x.x[0], b = at.word ? x.x[3] : x.x[1];
        const uint32_t yes = ((a >> mine.shift & 0xffff) < threshold ? 1u : 0u) |
                             ((b >> mine.shift & 0xffff) < threshold ? 4u : 0u);
        keep[8 * k / 32] |= yes << element % 32;
      }
    }
  }
}

}  // namespace jax_flashattn::cuda::sm90
