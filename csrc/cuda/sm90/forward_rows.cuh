// What the forward computes for the rows of one warpgroup: scores, masks, features, the online
// softmax, and the way out of a tile's output.
#pragma once

#include "cuda/ptx/wgmma.h"
#include "cuda/sm90/dropout.cuh"

namespace jax_flashattn::cuda::sm90 {

// The state of one consumer warpgroup's rows. Thread t holds rows t / 4 % 8 + 16 * warp (+ 8).
template <class S>
struct Rows {
  float out[S::kD / 2];
  float score[S::kKeys / 2];
  float largest[2], sum[2];
  bool moved;  // the reference of some row of the warp, so that O must be rescaled
  // Where shaped; the slope in units of the raw score.
  float slope;
  KeyCoordinates keys;
  float offset[2];                         // kInProduct: of all scores of a row in this block
  const uint32_t (*flags)[S::kFlagWords];  // dropout's, of this warpgroup's rows in this block
};

// S = Q K^T, issued but not committed.
template <class S>
__device__ __forceinline__ void issue_scores(float (&score)[S::kKeys / 2], ptx::Operand query,
                                             ptx::Operand key) {
#pragma unroll
  for (int k = 0; k < S::kD / 16; ++k) {
    const int chunk = k / 4, inside = k % 4 * 32;
    ptx::WgmmaShared<typename S::T, S::kKeys, 0, 0>::issue(
        score, ptx::advanced(query, chunk * S::kRows * 128 + inside),
        ptx::advanced(key, chunk * S::kKeys * 128 + inside), k > 0);
  }
}

// Exponentials of a block in the element type, the A operand of O += P V.
template <class S>
using Probabilities = uint32_t[S::kKeys / 16][4];

// O += P V, issued but not waited for.
template <class S>
__device__ __forceinline__ void issue_output(float (&out)[S::kD / 2], const Probabilities<S>& from,
                                             ptx::Operand value) {
  // ptxas counts the registers of an instruction against a launch's share, 128 of four warpgroups.
  constexpr int kColumns = S::kThreads == 512 && S::kD == 256 ? 128 : S::kD;
  using Part = float[kColumns / 2];
#pragma unroll
  for (int k = 0; k < S::kKeys / 16; ++k) {
#pragma unroll
    for (int c = 0; c < S::kD; c += kColumns)
      ptx::WgmmaRegister<typename S::T, kColumns, 1>::issue(
          reinterpret_cast<Part&>(out[c / 2]), from[k],
          ptx::advanced(value, (c / kChunk * S::kKeys + k * 16) * 128), 1);
  }
  ptx::wgmma_commit();
}

// The lowest bits of which each stands for one of a thread's columns in a row of a block: those
// before `column`, of the block's first.
template <class S>
__device__ __forceinline__ uint64_t columns_before(int column) {
  const int mine = clamp(column, 0, S::kKeys) - threadIdx.x % 4 * 2;  // 8 * j + {0, 1} from here
  const int count = mine <= 0 ? 0 : mine / 8 * 2 + min(mine % 8, 2);
  return (uint64_t(1) << count) - 1;
}

// Keys the row does not see get -inf; `key` is the first of the block.
template <class S>
__device__ __forceinline__ void apply_mask(Rows<S>& rows, const TileRows<S>& limits, int group,
                                           int key) {
  static_assert(S::kKeys / 4 <= 32, "a row's columns fit one word");
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = row_of_thread(group, h);
    const uint32_t seen = static_cast<uint32_t>(columns_before<S>(limits.hi[row] - key) &
                                                ~columns_before<S>(limits.lo[row] - key));
#pragma unroll
    for (int i = 0; i < S::kKeys / 4; ++i) {
      if (!(seen >> i & 1)) rows.score[4 * (i / 2) + 2 * h + i % 2] = -INFINITY;
    }
  }
}

// S8: a softcap's scores, in units of the cap.
template <class S>
__device__ __forceinline__ void cap_scores(Rows<S>& rows, float factor) {
#pragma unroll
  for (int i = 0; i < S::kKeys / 2; ++i) rows.score[i] = ptx::tanh_approx(rows.score[i] * factor);
}

// S9: takes slope * distance off. `key` is the first of the block.
template <class S>
__device__ __forceinline__ void subtract_distances(Rows<S>& rows, const int (&position)[2],
                                                   int key) {
  // The sum of slope * distance runs on in slope * stride; a slope below 0 changes the sign of
  // both.
  const float step = rows.slope * static_cast<float>(static_cast<int>(rows.keys.stride));
  const int first = rows.keys.at(key + threadIdx.x % 4 * 2);
  const auto apply = [&](auto less) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float taken = rows.slope * static_cast<float>(position[h] - first);
#pragma unroll
      for (int i = 0; i < S::kKeys / 4; ++i) {
        float& x = rows.score[4 * (i / 2) + 2 * h + i % 2];
        x = less(x, fabsf(taken - step * (i / 2 * 8 + i % 2)));
      }
    }
  };
  if (rows.slope > 0)
    apply([](float x, float y) { return x - y; });
  else
    apply([](float x, float y) { return x + y; });
}

// Exponentials of up to 2^8 do no harm, and their reference need not follow the maximum.
constexpr float kMostBits = 8, kMostSum = 256;

// Online softmax: scores become exponentials; returns the factors for earlier sums and outputs.
// Both rows go through each stage together, so that one's latency hides behind the other's work.
template <class S>
__device__ __forceinline__ void softmax(Rows<S>& rows, float scale, float (&correction)[2]) {
  constexpr int kChains = 4;  // of comparisons a row, for their latency
  float largest[2], chain[2][kChains], reference[2], sum[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < S::kKeys / 4; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float x = rows.score[4 * (i / 2) + 2 * h + i % 2];
      chain[h][i % kChains] = i < kChains ? x : fmaxf(chain[h][i % kChains], x);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h)
    largest[h] = fmaxf(fmaxf(chain[h][0], chain[h][1]), fmaxf(chain[h][2], chain[h][3]));
#pragma unroll
  for (int lanes = 1; lanes < 4; lanes *= 2) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
      largest[h] = fmaxf(largest[h], __shfl_xor_sync(0xffffffffu, largest[h], lanes));
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if constexpr (S::kInProduct) largest[h] += rows.offset[h];
    largest[h] = fmaxf(rows.largest[h], largest[h]);
  }
  bool moved = false;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    // A maximum that has grown by little stays the reference, and O need not be rescaled.
    const bool stays = (largest[h] - rows.largest[h]) * scale <= kMostBits;
    moved |= !stays;
    largest[h] = stays ? rows.largest[h] : largest[h];
    reference[h] = largest[h] == -INFINITY ? 0.0f : largest[h] * scale;
    correction[h] = stays ? 1.0f : ptx::exp2_approx(rows.largest[h] * scale - reference[h]);
    rows.largest[h] = largest[h];
    if constexpr (S::kInProduct) reference[h] -= rows.offset[h] * scale;
  }
  rows.moved = __any_sync(0xffffffffu, moved);
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

// The exponentials x and y as the pair [k][i] of the probabilities. What dropout keeps is scaled
// with the output.
template <class S>
__device__ __forceinline__ uint32_t probability_pair(const Rows<S>& rows, float x, float y, int k,
                                                     int i) {
  uint32_t pair = ptx::pack(x, y, typename S::T());
  if constexpr (S::kDropout) {
    const uint32_t word = rows.flags[row_of_thread(0, i % 2)][k / 2];
    const int first = threadIdx.x % 4 * 2;
    pair &= ~drop_mask(word << (7 - first), word << (6 - first), k % 2 * 2 + i / 2);
  }
  return pair;
}
template <class S>
__device__ __forceinline__ void round_probabilities(const Rows<S>& rows, Probabilities<S>& to) {
#pragma unroll
  for (int k = 0; k < S::kKeys / 16; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      to[k][i] =
          probability_pair<S>(rows, rows.score[8 * k + 2 * i], rows.score[8 * k + 2 * i + 1], k, i);
  }
}

// The same without looking for the maximum: exponentials of the reference so far, in the element
// type. Sums that are too large (or NaN) tell that it no longer serves. Then this returns false,
// with scores as they were. So it does where a softcap's scores, which come without their tanh
// here, are not all small (ScoreScale).
template <class S>
__device__ __forceinline__ bool quick_softmax(Rows<S>& rows, const ScoreScale& scale,
                                              Probabilities<S>& to) {
  float reference[2], sum[2] = {0, 0};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    reference[h] = rows.largest[h] * scale.exponent;
    if constexpr (S::kInProduct) reference[h] -= rows.offset[h] * scale.exponent;
  }
  [[maybe_unused]] int largest = 0;  // bits of a square, which order like integers
  // Beside a softcap in three stages, each some pairs behind the one before, for their latency.
  constexpr int kPairs = S::kKeys / 4, kLag = S::kPolynomial ? 2 : 0, kRing = 2 * kLag + 1;
  float exponent[kRing][2];
#pragma unroll
  for (int n = 0; n < kPairs + 2 * kLag; ++n) {
    if (n < kPairs) {
      const float s = rows.score[2 * n], t = rows.score[2 * n + 1];
      float s_factor = scale.exponent, t_factor = scale.exponent;
      if constexpr (S::kPolynomial) {
        const float s2 = s * s, t2 = t * t;
        largest = __vimax3_s32(largest, __float_as_int(s2), __float_as_int(t2));
        s_factor = (scale.odd[2] * s2 + scale.odd[1]) * s2 + scale.odd[0];
        t_factor = (scale.odd[2] * t2 + scale.odd[1]) * t2 + scale.odd[0];
      }
      exponent[n % kRing][0] = s * s_factor - reference[n % 2];
      exponent[n % kRing][1] = t * t_factor - reference[n % 2];
    }
    if (const int m = n - kLag; m >= 0 && m < kPairs) {
      for (float& x : exponent[m % kRing]) x = ptx::exp2_approx(x);
    }
    if (const int m = n - 2 * kLag; m >= 0) {
      const float(&x)[2] = exponent[m % kRing];
      sum[m % 2] += x[0];
      sum[m % 2] += x[1];
      to[m / 4][m % 4] = probability_pair<S>(rows, x[0], x[1], m / 4, m % 4);
    }
  }
  bool serves = sum[0] <= kMostSum && sum[1] <= kMostSum;
  if constexpr (S::kPolynomial) serves &= __int_as_float(largest) <= scale.small;
  if (!__all_sync(0xffffffffu, serves)) return false;
  rows.sum[0] += sum[0];
  rows.sum[1] += sum[1];
  return true;
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
__device__ __forceinline__ void zero_values(typename S::T* value, int from) {
  const int thread = ptx::thread_index() % 128;  // read here, so that nothing is computed before
#pragma unroll 1
  for (int row = from + thread / 8; row < S::kKeys; row += 16) {
#pragma unroll 1
    for (int c = 0; c < S::kChunks; ++c) {
      auto* units = reinterpret_cast<uint4*>(value + (c * S::kKeys + row) * kChunk);
      units[thread % 8] = make_uint4(0, 0, 0, 0);
    }
  }
  ptx::proxy_fence();
}

// Writes the lse of the rows; returns the factors that turn O into the output, kNothing for rows
// that see no key (S11).
constexpr float kNothing = -1.0f;
template <class S>
__device__ __forceinline__ void finish_rows(const ForwardParams& p, const Rows<S>& rows,
                                            const TileRows<S>& limits, const TilePlace& at,
                                            int group, float scale_ln, float (&factor)[2]) {
  const int64_t head = head_index(p.n, at);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float sum = rows.sum[h];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    const int in_tile = row_of_thread(group, h), row = at.row + in_tile;
    const bool nothing = limits.lo[in_tile] >= limits.hi[in_tile];
    float largest = rows.largest[h] * scale_ln;
    factor[h] = 1.0f;
    if (p.features.sinks) {  // S15: joins the denominator
      const float sink = static_cast<const float*>(p.features.sinks)[head];
      const float joint = fmaxf(largest, sink);
      factor[h] = __expf(largest - joint);
      sum = sum * factor[h] + __expf(sink - joint);
      largest = joint;
    }
    factor[h] = __fdividef(factor[h], sum);
    if constexpr (S::kDropout) factor[h] *= static_cast<float>(kept_scale(p.features));
    if (nothing) factor[h] = kNothing;
    if (threadIdx.x % 4 == 0 && has_row(p.n, at, in_tile))
      static_cast<float*>(p.lse)[head * p.n.sq + row] =
          nothing ? -INFINITY : largest + __logf(sum);  // S10
  }
}

template <class S>
__device__ __forceinline__ void normalise_output(Rows<S>& rows, const float (&factor)[2]) {
  scale_output<S>(rows, factor);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (factor[h] < 0) {  // not NaN * kNothing
#pragma unroll
      for (int j = 0; j < S::kD / 8; ++j) rows.out[4 * j + 2 * h] = rows.out[4 * j + 2 * h + 1] = 0;
    }
  }
}

// O of the tile at `at` through shared memory, rows of this warpgroup that nobody else reads or
// writes, to memory. The copy engine reads `staging` until tma_wait_read. `barrier`: a named one of
// this warpgroup.
template <class S>
__device__ __forceinline__ void stage_output(const ForwardMaps& maps, const Rows<S>& rows,
                                             int64_t dv, const TilePlace& at, int group,
                                             typename S::T* staging, int barrier) {
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const int row = 16 * warp + lane % 16;
#pragma unroll
  for (int k = 0; k < S::kD / 16; ++k) {
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      packed[i] = ptx::pack(rows.out[8 * k + 2 * i], rows.out[8 * k + 2 * i + 1], typename S::T());
    const int chunk = k / 4, unit = (k % 4 * 2 + lane / 16) ^ (row % 8);
    ptx::store_matrices(
        ptx::shared_address(staging + (chunk * S::kRows + 64 * group + row) * kChunk + unit * 8),
        packed);
  }
  ptx::proxy_fence();
  ptx::named_sync(barrier, 128);
  if (thread == 0) {
    for (int c = 0; c < S::kChunks; ++c)
      if (c * kChunk < dv)
        ptx::tma_store(&maps.out, staging + (c * S::kRows + 64 * group) * kChunk, c * kChunk,
                       at.head, at.row + 64 * group, at.b);
    ptx::tma_commit();
  }
}

// The same from registers. Of two groups of eight columns, of which each of four lanes holds two
// columns, neighbouring lanes trade halves, so that each writes four columns of one.
template <class S>
__device__ __forceinline__ void store_output(const ForwardParams& p, const Rows<S>& rows,
                                             const TilePlace& at, int group) {
  const int quarter = threadIdx.x % 4, odd = quarter % 2;
  const int first = at.row + 64 * group + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  auto* out = static_cast<typename S::T*>(p.out) +
              ((at.b * p.n.sq + first) * p.n.g * p.n.r + at.head) * p.n.dv;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int j = 0; j < S::kD / 8; j += 2) {
      const float* x = rows.out + 4 * j + 2 * h;
      const uint32_t even_group = ptx::pack(x[0], x[1], typename S::T());
      const uint32_t odd_group = ptx::pack(x[4], x[5], typename S::T());
      const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? even_group : odd_group, 1);
      const int column = (j + odd) * 8 + quarter / 2 * 4;
      if (first + 8 * h < p.n.sq && column < p.n.dv)
        *reinterpret_cast<uint2*>(out + h * 8 * p.n.g * p.n.r * p.n.dv + column) =
            odd ? make_uint2(got, odd_group) : make_uint2(even_group, got);
    }
  }
}

}  // namespace jax_flashattn::cuda::sm90
