// Vectors of one instruction set: the only file of csrc/cpu that names one, but for amx.h.
//
// Included once per instruction set, with FLASH_ISA naming the namespace. Everything has internal
// linkage: the linker must never serve one set's code to another.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "semantics/params.h"

namespace jax_flashattn::cpu::FLASH_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kPanelVectors = 4;  // columns of a register tile; 6 x 4 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kPanelVectors = 2;  // 6 x 2 accumulators of 16 registers
#else
constexpr int kVectorBytes = 16;
constexpr int kPanelVectors = 2;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = kVectorBytes / sizeof(T);

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
inline void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}
template <class T>
inline Vec<T> splat(T x) {
  return Vec<T>{} + x;
}

// max(a, b), and b where either is NaN: a NaN in `b` survives.
inline Vec<float> max(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
inline Vec<double> max(Vec<double> a, Vec<double> b) { return a > b ? a : b; }
inline Vec<float> min(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
inline Vec<double> min(Vec<double> a, Vec<double> b) { return a < b ? a : b; }

// 2^x by rounding to an integer n and a minimax polynomial of the rest; 0 below 2^-126, NaN stays.
// Exact for integers. Relative error 9.2e-8 and rounding (Terms 6) or 2.8e-6 (Terms 5, enough where
// the result is rounded to bf16).
template <int Terms>
inline Vec<float> exp2(Vec<float> x) {
  static_assert(Terms == 5 || Terms == 6, "fitted for these");
#if defined(__AVX512DQ__)
  const Vec<float> f = (Vec<float>)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#else
  x = max(splat(-127.0f), min(splat(128.0f), x));
  const Vec<float> shifted = x + 12582912.0f;  // 1.5 * 2^23: the low mantissa bits become n
  const Vec<float> f = x - (shifted - 12582912.0f);
#endif
  Vec<float> p;
  if constexpr (Terms == 6) {
    p = f * 0.00132647285f + 0.00967151299f;
    p = p * f + 0.0555073358f;
    p = p * f + 0.240222424f;
    p = p * f + 0.693147004f;
    p = p * f + 1.0f;
  } else {
    p = f * 0.00958285388f + 0.0559064262f;
    p = p * f + 0.240240991f;
    p = p * f + 0.693124175f;
    p = p * f + 1.0f;
  }
#if defined(__AVX512DQ__)
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (Vec<float>)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)(x - f));
#else
  return p * (Vec<float>)(((Vec<int32_t>)shifted + 127) << 23);
#endif
}

template <int Terms>
inline Vec<double> exp2(Vec<double> x) {
  constexpr double c[] = {0x1.fffffffffffedp-1,  0x1.62e42fefa39d7p-1,  0x1.ebfbdff82c65bp-3,
                          0x1.c6b08d7047c22p-5,  0x1.3b2ab6fb74501p-7,  0x1.5d87fe7d141cbp-10,
                          0x1.43091406f09f4p-13, 0x1.ffcbfc878252cp-17, 0x1.62bc84959dc65p-20,
                          0x1.b4f454080435ap-24, 0x1.ecc67f3b2fd31p-28, 0x1.3b9a6090a534cp-31};
  x = max(splat(-1023.0), min(splat(1024.0), x));
  const Vec<double> shifted = x + 0x1.8p52;
  const Vec<double> f = x - (shifted - 0x1.8p52);
  Vec<double> p = splat(c[11]);
  for (int i = 10; i >= 0; --i) p = p * f + c[i];
  return p * (Vec<double>)(((Vec<int64_t>)shifted + 1023) << 52);
}

inline Vec<float> reciprocal(Vec<float> x) {
#if defined(__AVX512F__)
  const Vec<float> guess = (Vec<float>)_mm512_rcp14_ps((__m512)x);
  return guess * (2.0f - x * guess);
#else
  return 1.0f / x;
#endif
}
inline Vec<double> reciprocal(Vec<double> x) { return 1.0 / x; }

// Minimax polynomials of (2^f - 1) / f for |f| <= 1/2, lowest power first; Terms as of exp2.
template <int Terms>
struct Expm1;
template <>
struct Expm1<5> {
  static constexpr float c[] = {0.693147181f, 0.24022349f, 0.0555038101f, 0.00966636852f,
                                0.00133813025f};
};
template <>
struct Expm1<6> {
  static constexpr float c[] = {0.693147188f,   0.240226508f,   0.0555035711f,
                                0.00961808256f, 0.00133908634f, 0.000154531629f};
};
template <>
struct Expm1<12> {
  static constexpr double c[] = {
      0x1.62e42fefa39efp-1,  0x1.ebfbdff82c598p-3,  0x1.c6b08d704a0c2p-5,  0x1.3b2ab6fba1ddap-7,
      0x1.5d87fe78a5276p-10, 0x1.430913096fd9fp-13, 0x1.ffcbfc670dcd4p-17, 0x1.62bfd47773353p-20,
      0x1.b524fae627834p-24, 0x1.e6063f7217bc6p-28, 0x1.e9d3fe3952179p-32};
};

// tanh(y ln(2) / 2) = (2^y - 1) / (2^y + 1), to a few units of the last place also near 0; and its
// derivative by the argument of tanh, 4 * 2^y / (2^y + 1)^2, also where 1 - tanh^2 would cancel.
template <int Terms, class T, class Float>
inline Float tanh_of_exponent(Float y, Float* derivative) {
  using Ints = std::conditional_t<sizeof(T) == 8, Vec<int64_t>, Vec<int32_t>>;
  constexpr T kShift = sizeof(T) == 8 ? T(0x1.8p52) : T(12582912);  // as in exp2
  constexpr int kMantissa = sizeof(T) == 8 ? 52 : 23, kBias = sizeof(T) == 8 ? 1023 : 127;
  constexpr T kFlat = sizeof(T) == 8 ? T(400) : T(60);  // well beyond where tanh rounds to 1
  y = max(splat(-kFlat), min(splat(kFlat), y));
  const Vec<T> shifted = y + kShift;
  const Vec<T> f = y - (shifted - kShift);
  constexpr auto& c = Expm1<Terms>::c;
  constexpr int kTerms = sizeof c / sizeof c[0];
  Vec<T> p = splat(c[kTerms - 1]);
#pragma GCC unroll 12
  for (int k = kTerms - 2; k >= 0; --k) p = p * f + c[k];
  const Vec<T> power = (Vec<T>)(((Ints)shifted + kBias) << kMantissa);
  const Vec<T> expm1 = power * (p * f) + (power - T(1)), inverse = reciprocal(expm1 + T(2));
  if (derivative) *derivative = T(4) * (power * (p * f) + power) * inverse * inverse;
  return expm1 * inverse;
}

// Products of the low halves of 64-bit lanes with a 32-bit word: what Philox is made of. High
// halves of the lanes hold anything.
struct MultiplyLanes {
  void operator()(Vec<uint64_t> a, uint32_t b, Vec<uint64_t>* high, Vec<uint64_t>* low) const {
#if defined(__AVX512F__)
    *low = (Vec<uint64_t>)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
    *low = (Vec<uint64_t>)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
    *low = (Vec<uint64_t>)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
    *low = (a & 0xffffffffu) * static_cast<uint64_t>(b);
#endif
    *high = *low >> 32;
  }
};

// One bit per lane: whether it is negative.
inline uint32_t lane_signs(Vec<int32_t> x) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)x);
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)x);
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)x);
#else
  uint32_t bits = 0;
  for (int l = 0; l < kLanes<int32_t>; ++l) bits |= (x[l] < 0 ? 1u : 0u) << l;
  return bits;
#endif
}

// Storage types are distinct so that overloads can tell two 16-bit formats apart.
enum bf16 : uint16_t {};
enum f16 : uint16_t {};

inline float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
inline float to_float(f16 x) {
  _Float16 h;
  __builtin_memcpy(&h, &x, 2);
  return static_cast<float>(h);
}
inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }

// Round to nearest even; NaN stays NaN.
inline void round_to(float x, bf16* out) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  *out = static_cast<bf16>(x == x ? rounded : (bits >> 16) | 0x40);
}
inline void round_to(float x, f16* out) {
  const _Float16 h = static_cast<_Float16>(x);
  __builtin_memcpy(out, &h, 2);
}
inline void round_to(float x, float* out) { *out = x; }
inline void round_to(double x, double* out) { *out = x; }

// The 16-bit elements of one vector of floats.
typedef uint16_t HalfWords __attribute__((vector_size(kVectorBytes / 2)));

// kLanes consecutive elements as accumulator-type vectors.
inline Vec<float> load_wide(const float* p) { return load(p); }
inline Vec<double> load_wide(const double* p) { return load(p); }
inline Vec<float> load_wide(const bf16* p) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)),
                                       16);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)),
                                       16);
#else
  HalfWords bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return (Vec<float>)(__builtin_convertvector(bits, Vec<uint32_t>) << 16);
#endif
}
inline Vec<float> load_wide(const f16* p) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

// kLanes consecutive elements, rounded to storage.
inline void store_narrow(float* p, Vec<float> v) { store(p, v); }
inline void store_narrow(double* p, Vec<double> v) { store(p, v); }
inline void store_narrow(float* p, Vec<double> v) {
  for (int i = 0; i < kLanes<double>; ++i) p[i] = static_cast<float>(v[i]);
}
inline void store_narrow(bf16* p, Vec<float> v) {
#if defined(__AVX512BF16__)
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
#else
  const Vec<uint32_t> bits = (Vec<uint32_t>)v;  // as round_to
  const Vec<uint32_t> nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const HalfWords rounded =
      __builtin_convertvector(v == v ? nearest : (bits >> 16) | 0x40, HalfWords);
#endif
  __builtin_memcpy(p, &rounded, sizeof rounded);
}
inline void store_narrow(f16* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) round_to(v[i], p + i);
#endif
}

// Lanes of a and b alternating: the lower or the upper halves of both.
template <class V, int... kLane>
inline V interleave_low(V a, V b, std::integer_sequence<int, kLane...>) {
  constexpr int L = sizeof...(kLane);
  return __builtin_shufflevector(a, b, (kLane / 2 + kLane % 2 * L)...);
}
template <class V, int... kLane>
inline V interleave_high(V a, V b, std::integer_sequence<int, kLane...>) {
  constexpr int L = sizeof...(kLane);
  return __builtin_shufflevector(a, b, (L / 2 + kLane / 2 + kLane % 2 * L)...);
}

// Transposes a square of lanes: out row r, lane c = in row c, lane r.
template <class T>
inline void transpose(Vec<T> (&v)[kLanes<T>]) {
  constexpr int L = kLanes<T>;
  constexpr auto lanes = std::make_integer_sequence<int, L>{};
#pragma GCC unroll 4
  for (int stage = 1; stage < L; stage *= 2) {
    Vec<T> next[L];
#pragma GCC unroll 8
    for (int r = 0; r < L / 2; ++r) {
      next[2 * r] = interleave_low(v[r], v[r + L / 2], lanes);
      next[2 * r + 1] = interleave_high(v[r], v[r + L / 2], lanes);
    }
#pragma GCC unroll 16
    for (int r = 0; r < L; ++r) v[r] = next[r];
  }
}

// How one product multiplies: `T` is an operand element, `V` an operand vector, `Acc` accumulates.
// kDepth elements are consumed at once: with depth 2, operands hold neighbours of the reduction
// dimension side by side. kTiled: by AMX, where whole tiles are to be had.
template <class Float, int kTerms>
struct PlainMath {
  using T = Float;
  using V = Vec<Float>;
  using Acc = Float;
  static constexpr int kDepth = 1;
  static constexpr bool kTiled = false;
  static constexpr int kExpTerms = kTerms;
  static inline Vec<Acc> fma(Vec<Acc> acc, const T* a, V b) { return acc + *a * b; }
};
using F32Math = PlainMath<float, 6>;
using F64Math = PlainMath<double, 12>;

// Whether a set has kernels for bfloat16 alone: what differs from AVX-512 (see dispatch.cc).
#if defined(__AVX512BF16__)
constexpr bool kOnlyBf16 = true;
#else
constexpr bool kOnlyBf16 = false;
#endif
#if defined(__AMX_BF16__)
constexpr bool kHasTiles = true;
#else
constexpr bool kHasTiles = false;
#endif

#if defined(__AVX512BF16__)
struct Bf16Math {
  using T = bf16;
  using V = Vec<int32_t>;
  using Acc = float;
  static constexpr int kDepth = 2;
  static constexpr bool kTiled = kHasTiles;
  static constexpr int kExpTerms = 5;
  static inline Vec<Acc> fma(Vec<Acc> acc, const T* a, V b) {
    int32_t pair;
    __builtin_memcpy(&pair, a, sizeof pair);
    const __m512i broadcast = _mm512_set1_epi32(pair);
    return (Vec<Acc>)_mm512_dpbf16_ps((__m512)acc, (__m512bh)broadcast, (__m512bh)b);
  }
};
using MathForBf16 = Bf16Math;

// Two vectors rounded to bf16, low[l] and high[l] side by side.
inline void store_rounded_pairs(bf16* p, Vec<float> low, Vec<float> high) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  alignas(64) static constexpr uint16_t kInterleave[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), both));
}
#else
using MathForBf16 = F32Math;
#endif

template <class Storage>
struct MathOf {
  using type = F32Math;
};
template <>
struct MathOf<double> {
  using type = F64Math;
};
template <>
struct MathOf<bf16> {
  using type = MathForBf16;
};

}  // namespace
}  // namespace jax_flashattn::cpu::FLASH_ISA
