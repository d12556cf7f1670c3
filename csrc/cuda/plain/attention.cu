// Attention without tensor cores, for any GPU: slow, short, and a second opinion for fast kernels.
//
// A warp owns one query row (forward, tangent, dQ) or one key (dK, dV) and walks its counterparts
// 32 at a time: lane l scores counterpart l, then the warp adds each one's vector, lanes across the
// head dim. It touches visible pairs only, in fixed order: no NaN leaks (S13), bitwise repeatable
// (S14).
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/plain/attention.h"
#include "semantics/philox.h"

namespace jax_flashattn::cuda::plain {
namespace {

constexpr int kWarps = 4;  // of a block
constexpr int kThreads = 32 * kWarps;
constexpr int kBlocks = 4;  // resident: 128 registers a thread, so that nothing spills
constexpr int kMostColumns = kMaxHeadDim / 32;  // of a head dim, per lane
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ void round_to(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }
__device__ void round_to(float x, __half* out) { *out = __float2half_rn(x); }

template <class T>
__device__ float dot(const T* x, const T* y, int64_t count) {
  float sum = 0;
  for (int64_t c = 0; c < count; ++c) sum += to_float(x[c]) * to_float(y[c]);
  return sum;
}

__device__ float warp_max(float x) {
  for (int m = 16; m > 0; m /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, m));
  return x;
}
__device__ float warp_sum(float x) {
  for (int m = 16; m > 0; m /= 2) x += __shfl_xor_sync(kAllLanes, x, m);
  return x;
}

// sum[c] += weight * vector[c * 32 + lane] for one counterpart.
template <class T>
__device__ void add_vector(float (&sum)[kMostColumns], float weight, const T* vector, int64_t width,
                           int lane) {
#pragma unroll
  for (int c = 0; c < kMostColumns; ++c)
    if (c * 32 + lane < width) sum[c] += weight * to_float(vector[c * 32 + lane]);
}
template <class T>
__device__ void write_vector(const float (&sum)[kMostColumns], float factor, T* vector,
                             int64_t width, int lane) {
#pragma unroll
  for (int c = 0; c < kMostColumns; ++c)
    if (c * 32 + lane < width) round_to(sum[c] * factor, vector + c * 32 + lane);
}

// The row or key a warp works on: x = ((b * length + s) * g + kv head) * r + query head.
struct Place {
  int64_t b, s, g, r;
};
__device__ Place row_place(const Sizes& n, int64_t x) {
  return {x / (n.r * n.g * n.sq), x / (n.r * n.g) % n.sq, x / n.r % n.g, x % n.r};
}
__device__ int64_t key_index(const Sizes& n, const Place& at, int64_t j) {
  return (at.b * n.sk + j) * n.g + at.g;
}
__device__ int64_t statistic_index(const Sizes& n, const Place& at) {
  return ((at.b * n.g + at.g) * n.r + at.r) * n.sq + at.s;
}

// x times the dropout factor; 0 drops also what is not finite.
__device__ float drop(float x, float kept) { return kept == 0.0f ? 0.0f : x * kept; }

// What features need of one query row. Nothing here is fast: each score draws its own Philox call.
struct RowFeatures {
  const Features& f;
  int32_t position;
  KeyCoordinates keys;
  int64_t head;  // of [b, g, r] arrays
  float kept_scale;

  template <class Params>
  __device__ RowFeatures(const Params& p, const Place& at)
      : f(p.features),
        position(aligned_position(p.features, p.mask, p.n, at.b, static_cast<int32_t>(at.s))),
        keys(key_coordinates(p.features, at.b)),
        head((at.b * p.n.g + at.g) * p.n.r + at.r),
        kept_scale(static_cast<float>(jax_flashattn::kept_scale(p.features))) {}

  // S8, S9: the score of a scaled product with key j, and the derivative of the softcap.
  __device__ float score(float s, int64_t j, float* steepness) const {
    *steepness = 1.0f;
    if (f.softcap > 0) {
      const float x = s / float(f.softcap), half = expf(-fabsf(x)), whole = 1.0f + half * half;
      *steepness = 4.0f * (half / whole) * (half / whole);  // 1 - tanh^2 would cancel
      s = float(f.softcap) * tanhf(x);
    }
    if (f.slopes) s -= f.slopes[head] * float(key_distance(position, keys.at(j)));
    return s;
  }

  // S12: what a probability of key j is multiplied with, 0 or the scale of what is kept.
  __device__ float kept(int64_t j) const {
    if (f.dropout == nullptr) return 1.0f;
    const bool keep = keep_score(f.dropout + head * 4, static_cast<uint32_t>(position),
                                 static_cast<uint32_t>(keys.at(j)), f.keep_threshold);
    return keep ? kept_scale : 0.0f;
  }

  // S15: a sink joins the sum of weights exp(s - largest), and maybe raises the maximum. The result
  // rescales what was summed before.
  __device__ float add_sink(float* largest, float* total) const {
    if (f.sinks == nullptr) return 1.0f;
    const float sink = static_cast<const float*>(f.sinks)[head], before = *largest;
    *largest = fmaxf(before, sink);
    const float rescale = before > sink ? 1.0f : expf(before - *largest);
    *total = *total * rescale + expf(sink - *largest);
    return rescale;
  }
};

// Grid: warps over all query rows, strided. No shared memory. Writes out and lse of each row.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) forward_kernel(ForwardParams p) {
  const Sizes n = p.n;
  const int lane = threadIdx.x % 32;
  const auto* q = static_cast<const T*>(p.q);
  const auto* k = static_cast<const T*>(p.k);
  const auto* v = static_cast<const T*>(p.v);
  const int64_t rows = n.b * n.sq * n.g * n.r, warps = int64_t(gridDim.x) * kWarps;
  for (int64_t x = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; x < rows; x += warps) {
    const Place at = row_place(n, x);
    const Interval row = row_interval(p.mask, n, at.b, static_cast<int32_t>(at.s));
    const RowFeatures features(p, at);
    float sum[kMostColumns] = {}, largest = -INFINITY, total = 0;
    for (int64_t j0 = row.lo; j0 < row.hi; j0 += 32) {
      const bool sees = j0 + lane < row.hi;
      float s = -INFINITY, steepness;
      if (sees)
        s = features.score(
            float(p.scale) * dot(q + x * n.d, k + key_index(n, at, j0 + lane) * n.d, n.d),
            j0 + lane, &steepness);
      const float before = largest;
      largest = fmaxf(largest, warp_max(s));
      const float reference = largest == -INFINITY ? 0.0f : largest;
      const float correction = before == -INFINITY ? 0.0f : expf(before - reference);
      float weight = sees ? expf(s - reference) : 0.0f;
      total = total * correction + warp_sum(weight);
      if (sees) weight = drop(weight, features.kept(j0 + lane));
#pragma unroll
      for (int c = 0; c < kMostColumns; ++c) sum[c] *= correction;
      for (int l = 0; l < 32 && j0 + l < row.hi; ++l)
        add_vector(sum, __shfl_sync(kAllLanes, weight, l), v + key_index(n, at, j0 + l) * n.dv,
                   n.dv, lane);
    }
    const bool nothing = empty(row);  // S11
    const float rescale = nothing ? 0.0f : features.add_sink(&largest, &total);
    write_vector(sum, nothing ? 0.0f : rescale / total, static_cast<T*>(p.out) + x * n.dv, n.dv,
                 lane);
    if (lane == 0)
      static_cast<float*>(p.lse)[statistic_index(n, at)] =
          nothing ? -INFINITY : largest + logf(total);
  }
}

// Grid: warps over all query rows, strided. No shared memory. Writes dout and dlse of each row:
//   dout = sum_j P (dS v + dv) - dlse out,  dlse = sum_j P dS.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) tangent_kernel(TangentParams p) {
  const Sizes n = p.n;
  const int lane = threadIdx.x % 32;
  const auto array = [](const void* data) { return static_cast<const T*>(data); };
  const int64_t rows = n.b * n.sq * n.g * n.r, warps = int64_t(gridDim.x) * kWarps;
  for (int64_t x = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; x < rows; x += warps) {
    const Place at = row_place(n, x);
    const int64_t statistic = statistic_index(n, at);
    const Interval row = row_interval(p.mask, n, at.b, static_cast<int32_t>(at.s));
    const RowFeatures features(p, at);
    const float lse = static_cast<const float*>(p.lse)[statistic];
    float sum[kMostColumns] = {}, dlse = 0;
    for (int64_t j0 = row.lo; j0 < row.hi; j0 += 32) {
      const int64_t j = j0 + lane, y = key_index(n, at, j);
      float probability = 0, weight = 0;  // of dv, of v
      if (j < row.hi) {
        const T *q = array(p.q) + x * n.d, *k = array(p.k) + y * n.d;
        float steepness;
        const float s = features.score(float(p.scale) * dot(q, k, n.d), j, &steepness);
        const float ds = float(p.scale) * steepness *
                         (dot(array(p.dq) + x * n.d, k, n.d) + dot(q, array(p.dk) + y * n.d, n.d));
        probability = expf(s - lse);
        weight = probability * ds;
      }
      dlse += warp_sum(weight);
      if (j < row.hi) {
        const float kept = features.kept(j);
        probability = drop(probability, kept);
        weight = drop(weight, kept);
      }
      for (int l = 0; l < 32 && j0 + l < row.hi; ++l) {
        const int64_t at_value = key_index(n, at, j0 + l) * n.dv;
        add_vector(sum, __shfl_sync(kAllLanes, weight, l), array(p.v) + at_value, n.dv, lane);
        add_vector(sum, __shfl_sync(kAllLanes, probability, l), array(p.dv) + at_value, n.dv, lane);
      }
    }
    const bool nothing = empty(row);  // S11
    dlse = nothing ? 0.0f : dlse + static_cast<const float*>(p.dsink)[statistic];
    if (!nothing) add_vector(sum, -dlse, array(p.out) + x * n.dv, n.dv, lane);
    write_vector(sum, 1.0f, static_cast<T*>(p.dout) + x * n.dv, n.dv, lane);
    if (lane == 0) static_cast<float*>(p.dlse)[statistic] = dlse;
  }
}

struct ScoreGradient {
  float p, ds;
};

// Probability of (row x, key j with index y), as it entered the output, and dS = P (dP - delta).
template <class T>
__device__ ScoreGradient score_gradient(const BackwardParams& p, const RowFeatures& features,
                                        int64_t x, int64_t j, int64_t y, int64_t statistic) {
  const Sizes& n = p.n;
  float steepness;
  const float s = features.score(float(p.scale) * dot(static_cast<const T*>(p.q) + x * n.d,
                                                      static_cast<const T*>(p.k) + y * n.d, n.d),
                                 j, &steepness);
  const float dp =
      dot(static_cast<const T*>(p.dout) + x * n.dv, static_cast<const T*>(p.v) + y * n.dv, n.dv);
  const float probability = expf(s - static_cast<const float*>(p.lse)[statistic]);
  const float delta = static_cast<const float*>(p.delta)[statistic], kept = features.kept(j);
  return {drop(probability, kept), probability * (drop(dp, kept) - delta) * steepness};
}

// Grid: warps over all query rows, strided. No shared memory. Writes dq of each row.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) query_gradient_kernel(BackwardParams p) {
  const Sizes n = p.n;
  const int lane = threadIdx.x % 32;
  const int64_t rows = n.b * n.sq * n.g * n.r, warps = int64_t(gridDim.x) * kWarps;
  for (int64_t x = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; x < rows; x += warps) {
    const Place at = row_place(n, x);
    const Interval row = row_interval(p.mask, n, at.b, static_cast<int32_t>(at.s));
    const RowFeatures features(p, at);
    float sum[kMostColumns] = {};
    for (int64_t j0 = row.lo; j0 < row.hi; j0 += 32) {
      ScoreGradient mine{0, 0};
      if (j0 + lane < row.hi)
        mine = score_gradient<T>(p, features, x, j0 + lane, key_index(n, at, j0 + lane),
                                 statistic_index(n, at));
      for (int l = 0; l < 32 && j0 + l < row.hi; ++l)
        add_vector(sum, __shfl_sync(kAllLanes, mine.ds, l),
                   static_cast<const T*>(p.k) + key_index(n, at, j0 + l) * n.d, n.d, lane);
    }
    write_vector(sum, float(p.scale), static_cast<T*>(p.dq) + x * n.d, n.d, lane);
  }
}

// Grid: warps over all keys, strided. No shared memory. Writes dk and dv of each key, summed over
// the query heads of its group.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) key_gradient_kernel(BackwardParams p) {
  const Sizes n = p.n;
  const int lane = threadIdx.x % 32;
  const int64_t keys = n.b * n.sk * n.g, warps = int64_t(gridDim.x) * kWarps;
  for (int64_t y = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; y < keys; y += warps) {
    const int64_t b = y / (n.g * n.sk), j = y / n.g % n.sk, g = y % n.g;
    float dk[kMostColumns] = {}, dv[kMostColumns] = {};
    for (int64_t i0 = 0; i0 < n.sq; i0 += 32) {
      const int64_t i = i0 + lane;
      const bool sees = i < n.sq && visible(row_interval(p.mask, n, b, static_cast<int32_t>(i)), j);
      const unsigned seeing = __ballot_sync(kAllLanes, sees);
      if (seeing == 0) continue;
      for (int64_t r = 0; r < n.r; ++r) {
        const auto row = [&](int64_t i) { return ((b * n.sq + i) * n.g + g) * n.r + r; };
        ScoreGradient mine{0, 0};
        if (sees) {
          const Place at{b, i, g, r};
          mine = score_gradient<T>(p, RowFeatures(p, at), row(i), j, y, statistic_index(n, at));
        }
        for (int l = 0; l < 32; ++l) {
          if (!(seeing >> l & 1)) continue;
          add_vector(dk, __shfl_sync(kAllLanes, mine.ds, l),
                     static_cast<const T*>(p.q) + row(i0 + l) * n.d, n.d, lane);
          add_vector(dv, __shfl_sync(kAllLanes, mine.p, l),
                     static_cast<const T*>(p.dout) + row(i0 + l) * n.dv, n.dv, lane);
        }
      }
    }
    write_vector(dk, float(p.scale), static_cast<T*>(p.dk) + y * n.d, n.d, lane);
    write_vector(dv, 1.0f, static_cast<T*>(p.dv) + y * n.dv, n.dv, lane);
  }
}

template <class Params>
std::string launch(const char* name, void (*kernel)(Params), const Params& p, int64_t warps,
                   cudaStream_t stream) {
  if (warps == 0) return "";
  const int64_t blocks = clamp<int64_t>((warps + kWarps - 1) / kWarps, 1, 1 << 20);
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p);
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return "";
  return std::string("kernel ") + name + " (grid " + std::to_string(blocks) + ", block " +
         std::to_string(kThreads) + ") could not be launched: " + cudaGetErrorString(error);
}

template <class T>
std::string backward_typed(const BackwardParams& p, cudaStream_t stream) {
  const Sizes& n = p.n;
  std::string error =
      launch("query_gradient", query_gradient_kernel<T>, p, n.b * n.sq * n.g * n.r, stream);
  if (error.empty())
    error = launch("key_gradient", key_gradient_kernel<T>, p, n.b * n.sk * n.g, stream);
  return error;
}

std::string unsupported() { return "CUDA kernels take bfloat16 and float16 only"; }

}  // namespace

std::string forward(const ForwardParams& p, cudaStream_t stream) {
  const int64_t rows = p.n.b * p.n.sq * p.n.g * p.n.r;
  if (p.dtype == DType::kBF16)
    return launch("forward", forward_kernel<__nv_bfloat16>, p, rows, stream);
  if (p.dtype == DType::kF16) return launch("forward", forward_kernel<__half>, p, rows, stream);
  return unsupported();
}

std::string backward(const BackwardParams& p, cudaStream_t stream) {
  if (p.dtype == DType::kBF16) return backward_typed<__nv_bfloat16>(p, stream);
  if (p.dtype == DType::kF16) return backward_typed<__half>(p, stream);
  return unsupported();
}

std::string tangent(const TangentParams& p, cudaStream_t stream) {
  const int64_t rows = p.n.b * p.n.sq * p.n.g * p.n.r;
  if (p.dtype == DType::kBF16)
    return launch("tangent", tangent_kernel<__nv_bfloat16>, p, rows, stream);
  if (p.dtype == DType::kF16) return launch("tangent", tangent_kernel<__half>, p, rows, stream);
  return unsupported();
}

}  // namespace jax_flashattn::cuda::plain
