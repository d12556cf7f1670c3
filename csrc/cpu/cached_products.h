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
  template <int kCount>
  static V weights(const Weight* p) {
    return splat(*p);
  }
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
  template <int kCount>
  static V weights(const Weight* p) {
    int32_t pair = 0;
    __builtin_memcpy(&pair, p, kCount * sizeof(Weight));
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

// The largest lane, or NaN if that is what comparisons leave.
template <class Acc, int... kLane>
inline Acc largest_lane(Vec<Acc> v, std::integer_sequence<int, kLane...>) {
  constexpr int L = sizeof...(kLane);
#pragma GCC unroll 4
  for (int half = L / 2; half > 0; half /= 2) {
    Vec<std::conditional_t<sizeof(Acc) == 8, int64_t, int32_t>> other{(kLane ^ half)...};
    v = max(__builtin_shuffle(v, other), v);
  }
  return v[0];
}

// Lane n of the result is the sum of the lanes of v[n]. By recursion, not a loop: the vectors must
// not leave their registers.
template <class Acc, int kHalf = kLanes<Acc> / 2>
[[gnu::always_inline]] inline Vec<Acc> sums_of_lanes(Vec<Acc> (&v)[kLanes<Acc>]) {
  if constexpr (kHalf == 0) {
    return v[0];
  } else {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes<Acc>>{};
#pragma GCC unroll 8
    for (int n = 0; n < kHalf; ++n)
      v[n] = interleave_low(v[n], v[n + kHalf], lanes) + interleave_high(v[n], v[n + kHalf], lanes);
    return sums_of_lanes<Acc, kHalf / 2>(v);
  }
}

template <class Storage>
struct Products : Elements<Storage> {
  using E = Elements<Storage>;
  using Acc = typename E::Acc;
  using T = typename E::T;
  using V = typename E::V;
  using Weight = typename E::Weight;
  static constexpr int L = kLanes<Acc>;
  static constexpr int kBlock = L;                     // keys of one call of `scores`
  static constexpr int64_t kKeys = 64;                 // of a tile: the pitch of scores and weights
  static constexpr int64_t kQueryPitch = kMaxHeadDim;  // of query rows
  static constexpr int kMostRows = L < 4 ? L : 4;
  static constexpr int kAccumulators = kVectorBytes == 64 ? 16 : 8;

  static constexpr int64_t padded(int64_t width) {
    return (width + E::kWidth - 1) / E::kWidth * E::kWidth;
  }

  // Asks for memory that is read next, `rows` pieces of `bytes`, in ascending order: a stream is
  // what the hardware then continues by itself. Both products call it as they go.
  struct Stream {
    const Storage* base;
    const int64_t* at;  // of each piece
    int64_t pieces, bytes;
    const char *p, *end;
    Stream(const void* base, const int64_t* at, int64_t pieces, int64_t bytes)
        : base(static_cast<const Storage*>(base)), at(at), pieces(pieces), bytes(bytes) {
      p = end = static_cast<const char*>(base);
      advance();
    }
    void advance() {
      if (pieces <= 0) return;
      p = reinterpret_cast<const char*>(base + *at++);
      end = p + bytes;
      --pieces;
    }
    // As much as so many loads read.
    template <int kLoads>
    void fetch() {
      constexpr int kBytes = kLoads * E::kWidth * static_cast<int>(sizeof(Storage));
      constexpr int kLines = kBytes > 64 ? kBytes / 64 : 1;
      if (p >= end) return;
#pragma GCC unroll 16
      for (int n = 0; n < kLines; ++n) __builtin_prefetch(p + n * 64, 0, 2);
      p += kLines * 64;
      if (__builtin_expect(p >= end, 0)) advance();
    }
  };

  // score[row][j] = q[row] . k[at[j]] for kBlock keys; query rows are padded with zeros.
  static void scores(const T* q, int64_t rows, const Storage* k, const int64_t* at, int64_t d,
                     Acc* score, Stream& next) {
    by_rows(rows, [&](auto count, int64_t row) {
      const auto block = d % E::kWidth == 0 ? block_of_scores<count.value, false>
                                            : block_of_scores<count.value, true>;
      block(q + row * kQueryPitch, k, at, d, score + row * kKeys, next);
    });
  }

  // out[row] += sum over j of weight[row][j] * v[at[j]], columns in the order of `column`.
  static void add_values(const Weight* weight, int64_t rows, const Storage* v, const int64_t* at,
                         int64_t count, int64_t dv, Acc* out, int64_t out_pitch, Stream& next) {
    by_rows(rows, [&](auto n, int64_t row) {
      constexpr int kR = n.value, kUnits = kAccumulators / (kR * E::kVectors);
      const Values x{weight + row * kKeys, v, at, count, out + row * out_pitch, out_pitch, next};
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

  template <int kR, bool kTail>
  static void block_of_scores(const T* q, const Storage* k, const int64_t* at, int64_t d,
                              Acc* score, Stream& next) {
    constexpr int kK = L / kR;
    Stream stream = next;
    for (int j = 0; j < kBlock; j += kK) {
      Vec<Acc> acc[L];
#pragma GCC unroll 16
      for (int n = 0; n < L; ++n) acc[n] = Vec<Acc>{};
      for (int64_t c = 0; c < d; c += E::kWidth) {
        V row[kR];
#pragma GCC unroll 4
        for (int r = 0; r < kR; ++r) row[r] = E::load_query(q + r * kQueryPitch + c);
#pragma GCC unroll 16
        for (int n = 0; n < kK; ++n) {
          const Storage* const p = k + at[j + n] + c;
          const V key = kTail && c + E::kWidth > d ? E::load_some(p, d - c) : E::load_all(p);
#pragma GCC unroll 4
          for (int r = 0; r < kR; ++r) acc[r * kK + n] = E::multiply(acc[r * kK + n], row[r], key);
        }
        stream.template fetch<kK>();
      }
      const Vec<Acc> sums = sums_of_lanes<Acc>(acc);
#pragma GCC unroll 4
      for (int r = 0; r < kR; ++r)
        __builtin_memcpy(score + r * kKeys + j, reinterpret_cast<const Acc*>(&sums) + r * kK,
                         kK * sizeof(Acc));
    }
    next = stream;
  }

  struct Values {
    const Weight* weight;
    const Storage* v;
    const int64_t* at;
    int64_t count;
    Acc* out;
    int64_t out_pitch;
    Stream& next;
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
    Stream stream = x.next;
    const Storage* const v = x.v + c0;
    const Weight* weight = x.weight;
    const int64_t *at = x.at, *const end = x.at + x.count;
    for (; at + K <= end; at += K, weight += K) {
      stream.template fetch<kUnits * K>();
      add_keys<kR, kUnits, kTail, K>(acc, weight, v, at, left);
    }
    if (at < end) add_keys<kR, kUnits, kTail, 1>(acc, weight, v, at, left);
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r)
#pragma GCC unroll 16
      for (int n = 0; n < kN; ++n) store(x.out + r * x.out_pitch + c0 + n * L, acc[r][n]);
    x.next = stream;
  }

  // kCount keys, of those that one instruction takes; a missing one is nothing, not 0 * inf.
  template <int kR, int kUnits, bool kTail, int kCount>
  [[gnu::always_inline]] static void add_keys(Vec<Acc> (&acc)[kR][kUnits * E::kVectors],
                                              const Weight* weight_at, const Storage* v,
                                              const int64_t* at, int64_t left) {
    V weight[kR];
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) weight[r] = E::template weights<kCount>(weight_at + r * kKeys);
#pragma GCC unroll 16
    for (int u = 0; u < kUnits; ++u) {
      V key[E::kKeysAtOnce] = {}, columns[E::kVectors];
#pragma GCC unroll 2
      for (int n = 0; n < kCount; ++n) {
        const Storage* const p = v + at[n] + u * E::kWidth;
        key[n] = kTail ? E::load_some(p, left) : E::load_all(p);
      }
      E::columns(key, columns);
#pragma GCC unroll 2
      for (int n = 0; n < E::kVectors; ++n)
#pragma GCC unroll 4
        for (int r = 0; r < kR; ++r) {
          Vec<Acc>& sum = acc[r][u * E::kVectors + n];
          sum = E::multiply(sum, weight[r], columns[n]);
        }
    }
  }
};

}  // namespace
}  // namespace jax_flashattn::cpu::FLASH_ISA
