// The two products of a few query rows with keys and values that lie anywhere in memory: head dims
// along the lanes, so that a key or value is loaded as it lies, once for up to four rows.
#pragma once

#include "cpu/matmul.h"

namespace jax_flashattn::cpu::FLASH_ISA {
namespace {

// Elements of storage are widened; keys are taken one at a time.
template <class Storage>
struct WideElements {
  using Math = typename std::conditional_t<std::is_same_v<Storage, double>, F64Math, F32Math>;
  using Acc = typename Math::Acc;
  using T = Acc;       // of query rows
  using Weight = Acc;  // of probabilities
  using V = Vec<Acc>;
  static constexpr int kExpTerms = Math::kExpTerms;
  static constexpr int kWidth = kLanes<Acc>;  // elements of a load
  static constexpr int kVectors = 1;          // accumulators of a load's columns
  static constexpr int kKeysAtOnce = 1;

  static V load_all(const Storage* p) { return load_wide(p); }
  static V load_some(const Storage* p, int64_t count) {
    Storage part[kWidth] = {};
    __builtin_memcpy(part, p, count * sizeof(Storage));
    return load_wide(part);
  }
  static V load_query(const T* p) { return load(p); }
  static Vec<Acc> multiply(Vec<Acc> acc, V a, V b) { return acc + a * b; }
  static V weights(const Weight* p, int64_t) { return splat(*p); }
  static void columns(const V (&keys)[1], V (&v)[1]) { v[0] = keys[0]; }
  static constexpr int64_t column(int64_t c) { return c; }
};

#if defined(__AVX512BF16__)
// Pairs of bfloat16 are multiplied and summed at once: neighbours along the head dim for scores,
// the same column of two keys for values.
struct PairedElements {
  using Acc = float;
  using T = bf16;
  using Weight = bf16;
  using V = Vec<int32_t>;
  static constexpr int kExpTerms = Bf16Math::kExpTerms;
  static constexpr int kWidth = 32, kVectors = 2, kKeysAtOnce = 2;

  static V load_all(const bf16* p) { return (V)_mm512_loadu_si512(p); }
  static V load_some(const bf16* p, int64_t count) {
    return (V)_mm512_maskz_loadu_epi16((__mmask32{1} << count) - 1, p);
  }
  static V load_query(const T* p) { return load_all(p); }
  static Vec<Acc> multiply(Vec<Acc> acc, V a, V b) {
    return (Vec<Acc>)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
  }
  // Of two keys, or of one and nothing.
  static V weights(const Weight* p, int64_t count) {
    int32_t pair;
    if (count >= 2)
      __builtin_memcpy(&pair, p, sizeof pair);
    else
      pair = static_cast<uint16_t>(*p);
    return V{} + pair;
  }
  // In the order of the instruction; `column` says which column is where.
  static void columns(const V (&keys)[2], V (&v)[2]) {
    v[0] = (V)_mm512_unpacklo_epi16((__m512i)keys[0], (__m512i)keys[1]);
    v[1] = (V)_mm512_unpackhi_epi16((__m512i)keys[0], (__m512i)keys[1]);
  }
  static constexpr int64_t column(int64_t c) {
    return c / 32 * 32 + c / 4 % 2 * 16 + c % 32 / 8 * 4 + c % 4;
  }
};
#endif

template <class Storage>
struct Elements : WideElements<Storage> {};
#if defined(__AVX512BF16__)
template <>
struct Elements<bf16> : PairedElements {};
#endif

// Lane n of the result is the sum of the lanes of v[n].
template <class Acc>
inline Vec<Acc> sums_of_lanes(Vec<Acc> (&v)[kLanes<Acc>]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes<Acc>>{};
#pragma GCC unroll 4
  for (int half = kLanes<Acc> / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int n = 0; n < half; ++n)
      v[n] = interleave_low(v[n], v[n + half], lanes) + interleave_high(v[n], v[n + half], lanes);
  return v[0];
}

template <class Storage>
struct Products : Elements<Storage> {
  using E = Elements<Storage>;
  using Acc = typename E::Acc;
  using T = typename E::T;
  using V = typename E::V;
  using Weight = typename E::Weight;
  static constexpr int L = kLanes<Acc>;
  static constexpr int kBlock = L;  // keys of one call of `scores`
  static constexpr int kMostRows = L < 4 ? L : 4;
  static constexpr int kAccumulators = kVectorBytes == 64 ? 16 : 8;

  static constexpr int64_t padded(int64_t width) {
    return (width + E::kWidth - 1) / E::kWidth * E::kWidth;
  }

  // score[row][j] = q[row] . k[at[j]] for kBlock keys; query rows are padded with zeros.
  static void scores(const T* q, int64_t rows, int64_t q_pitch, const Storage* k, const int64_t* at,
                     int64_t d, Acc* score, int64_t pitch) {
    by_rows(rows, [&](auto count, int64_t row) {
      block_of_scores<count.value>(q + row * q_pitch, q_pitch, k, at, d, score + row * pitch,
                                   pitch);
    });
  }

  // out[row] += sum over j of weight[row][j] * v[at[j]], columns in the order of `column`.
  static void add_values(const Weight* weight, int64_t pitch, int64_t rows, const Storage* v,
                         const int64_t* at, int64_t count, int64_t dv, Acc* out,
                         int64_t out_pitch) {
    by_rows(rows, [&](auto n, int64_t row) {
      constexpr int kR = n.value, kUnits = kAccumulators / (kR * E::kVectors);
      const Values x{weight + row * pitch, pitch, v, at, count, out + row * out_pitch, out_pitch};
      const int64_t whole = dv / E::kWidth * E::kWidth;
      const int64_t done = whole_columns<kR, (kUnits > 1 ? kUnits : 1)>(x, 0, whole);
      if (done < dv) columns_of_values<kR, 1, true>(x, done, dv - done);
    });
  }

 private:
  template <class Body>
  static void by_rows(int64_t rows, Body body) {
    int64_t row = 0;
    for (; row + kMostRows <= rows; row += kMostRows) body(Width<kMostRows>{}, row);
    if constexpr (kMostRows > 2)
      if (rows - row >= 2) {
        body(Width<2>{}, row);
        row += 2;
      }
    if (rows - row >= 1) body(Width<1>{}, row);
  }

  template <int kR>
  static void block_of_scores(const T* q, int64_t q_pitch, const Storage* k, const int64_t* at,
                              int64_t d, Acc* score, int64_t pitch) {
    constexpr int kK = L / kR;
    for (int j = 0; j < kBlock; j += kK) {
      Vec<Acc> acc[L] = {};
      const auto step = [&](int64_t c, auto load_key) {
        V row[kR];
#pragma GCC unroll 4
        for (int r = 0; r < kR; ++r) row[r] = E::load_query(q + r * q_pitch + c);
#pragma GCC unroll 16
        for (int n = 0; n < kK; ++n) {
          const V key = load_key(k + at[j + n] + c);
#pragma GCC unroll 4
          for (int r = 0; r < kR; ++r) acc[r * kK + n] = E::multiply(acc[r * kK + n], row[r], key);
        }
      };
      int64_t c = 0;
      for (; c + E::kWidth <= d; c += E::kWidth)
        step(c, [](const Storage* p) { return E::load_all(p); });
      if (c < d) step(c, [&](const Storage* p) { return E::load_some(p, d - c); });
      const Vec<Acc> sums = sums_of_lanes<Acc>(acc);
#pragma GCC unroll 4
      for (int r = 0; r < kR; ++r)
        __builtin_memcpy(score + r * pitch + j, reinterpret_cast<const Acc*>(&sums) + r * kK,
                         kK * sizeof(Acc));
    }
  }

  struct Values {
    const Weight* weight;
    int64_t pitch;
    const Storage* v;
    const int64_t* at;
    int64_t count;
    Acc* out;
    int64_t out_pitch;
  };

  // As many columns as fit whole groups of kUnits loads, then smaller groups; where it ended.
  template <int kR, int kUnits>
  static int64_t whole_columns(const Values& x, int64_t c, int64_t end) {
    for (; c + kUnits * E::kWidth <= end; c += kUnits * E::kWidth)
      columns_of_values<kR, kUnits, false>(x, c, E::kWidth);
    if constexpr (kUnits > 1) return whole_columns<kR, kUnits / 2>(x, c, end);
    return c;
  }

  template <int kR, int kUnits, bool kTail>
  static void columns_of_values(const Values& x, int64_t c0, int64_t left) {
    constexpr int K = E::kKeysAtOnce, kN = kUnits * E::kVectors;
    Vec<Acc> acc[kR][kN];
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r)
#pragma GCC unroll 16
      for (int n = 0; n < kN; ++n) acc[r][n] = load(x.out + r * x.out_pitch + c0 + n * L);
    for (int64_t j = 0; j < x.count; j += K) {
      const int64_t keys = x.count - j;
      V weight[kR];
#pragma GCC unroll 4
      for (int r = 0; r < kR; ++r) weight[r] = E::weights(x.weight + r * x.pitch + j, keys);
#pragma GCC unroll 16
      for (int u = 0; u < kUnits; ++u) {
        V key[K], columns[E::kVectors];
#pragma GCC unroll 2
        for (int n = 0; n < K; ++n) {
          const Storage* const p = x.v + x.at[j + (n < keys ? n : 0)] + c0 + u * E::kWidth;
          key[n] = kTail ? E::load_some(p, left) : E::load_all(p);
          if (K > 1 && n >= keys) key[n] = V{};  // nothing, not 0 * inf
        }
        E::columns(key, columns);
#pragma GCC unroll 2
        for (int n = 0; n < E::kVectors; ++n)
#pragma GCC unroll 4
          for (int r = 0; r < kR; ++r)
            acc[r][u * E::kVectors + n] =
                E::multiply(acc[r][u * E::kVectors + n], weight[r], columns[n]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r)
#pragma GCC unroll 16
      for (int n = 0; n < kN; ++n) store(x.out + r * x.out_pitch + c0 + n * L, acc[r][n]);
  }
};

}  // namespace
}  // namespace jax_flashattn::cpu::FLASH_ISA
