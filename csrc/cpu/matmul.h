// The tile product of both passes: C[m][n] (+)= sum over k of A[m][k] * B[k][n].
//
// n runs along vector lanes, A's elements are broadcast, accumulators stay in registers. Every
// product of attention fits this form without transposing keys or values, because scores are kept
// transposed: lanes are query rows (see forward.cc). With AMX (kTiled) the multiples of its tiles
// go there, the rest to the vectors; it has no transposed A, so what is reduced over keys is packed
// transposed (pack_reduced_keys).
#pragma once

#include "cpu/ahead.h"
#include "cpu/amx.h"

namespace jax_flashattn::cpu::FLASH_ISA {
namespace {

template <int kValue>
struct Width {
  static constexpr int value = kValue;
};

enum class Start { kZero, kAdd, kRescale };

// One register tile. A is [m][k] with row stride lda, or with kTransposedA [k][m]; B is [k][n].
// Strides count elements of one k step, which holds kDepth elements of each column side by side.
template <class M, int kM, int kN, bool kTransposedA, Start kStart>
inline void register_tile(int64_t k, const typename M::T* a, int64_t lda, const typename M::T* b,
                          int64_t ldb, typename M::Acc* c, int64_t ldc,
                          const typename M::Acc* rescale) {
  using Acc = typename M::Acc;
  constexpr int L = kLanes<Acc>;
  constexpr int64_t a_k_unit = kTransposedA ? 0 : M::kDepth;
  constexpr int64_t a_m_unit = kTransposedA ? M::kDepth : 0;
  Vec<Acc> acc[kM][kN];
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) {
      if constexpr (kStart == Start::kZero) acc[m][n] = Vec<Acc>{};
      if constexpr (kStart == Start::kAdd) acc[m][n] = load(c + m * ldc + n * L);
      if constexpr (kStart == Start::kRescale)
        acc[m][n] = load(c + m * ldc + n * L) * load(rescale + n * L);
    }
  }
  const int64_t a_m = kTransposedA ? a_m_unit : lda;
  const int64_t a_k = kTransposedA ? lda : a_k_unit;
  for (int64_t p = 0; p < k; ++p) {
    typename M::V row[kN];
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) __builtin_memcpy(&row[n], b + n * L * M::kDepth, sizeof row[n]);
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 8
      for (int n = 0; n < kN; ++n) acc[m][n] = M::fma(acc[m][n], a + m * a_m, row[n]);
    }
    a += a_k;
    b += ldb;
  }
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) store(c + m * ldc + n * L, acc[m][n]);
  }
}

template <class M, int kN, bool kTransposedA, Start kStart>
inline void panel(int64_t m_count, int64_t k, const typename M::T* a, int64_t lda,
                  const typename M::T* b, int64_t ldb, typename M::Acc* c, int64_t ldc,
                  const typename M::Acc* rescale, Ahead& ahead) {
  const int64_t a_row = kTransposedA ? M::kDepth : lda;
  int64_t m = 0;
  for (; m + 6 <= m_count; m += 6) {
    ahead.ask();
    register_tile<M, 6, kN, kTransposedA, kStart>(k, a + m * a_row, lda, b, ldb, c + m * ldc, ldc,
                                                  rescale);
  }
  if (m_count - m >= 4) {
    register_tile<M, 4, kN, kTransposedA, kStart>(k, a + m * a_row, lda, b, ldb, c + m * ldc, ldc,
                                                  rescale);
    m += 4;
  }
  if (m_count - m >= 2)
    register_tile<M, 2, kN, kTransposedA, kStart>(k, a + m * a_row, lda, b, ldb, c + m * ldc, ldc,
                                                  rescale);
}

// m_count is even, n_vectors counts vectors of lanes, k counts steps of kDepth.
template <class M, bool kTransposedA, Start kStart>
inline void vector_matmul(int64_t m_count, int64_t n_vectors, int64_t k, const typename M::T* a,
                          int64_t lda, const typename M::T* b, int64_t ldb, typename M::Acc* c,
                          int64_t ldc, Ahead& ahead, const typename M::Acc* rescale) {
  constexpr int L = kLanes<typename M::Acc>;
  int64_t n = 0;
  const auto step = [&](auto width) {
    panel<M, width.value, kTransposedA, kStart>(m_count, k, a, lda, b + n * L * M::kDepth, ldb,
                                                c + n * L, ldc, rescale ? rescale + n * L : nullptr,
                                                ahead);
    n += width.value;
  };
  // Where accumulators are loaded too, narrow tiles were faster, by up to 9 % (Zen 4).
  constexpr int kWidest = kStart == Start::kZero ? kPanelVectors : 2;
  while (n_vectors - n >= kWidest) step(Width<kWidest>{});
  if constexpr (kWidest > 2) {
    if (n_vectors - n >= 2) step(Width<2>{});
  }
  if (n_vectors - n >= 1) step(Width<1>{});
}

#if defined(__AMX_BF16__)
// Counts of tiles of the three axes.
template <Start kStart>
inline void tile_matmul(int64_t m_tiles, int64_t n_tiles, int64_t k_tiles, const bf16* a,
                        int64_t lda, const bf16* b, int64_t ldb, float* c, int64_t ldc,
                        Ahead& ahead, const float* rescale) {
  constexpr bool kAdd = kStart != Start::kZero;
  const auto stays = [&] {  // no row's maximum has grown
    Vec<int32_t> grown{};
    for (int64_t n = 0; n < n_tiles; ++n) grown |= load(rescale + n * kTileSide) != 1.0f;
    return lane_signs(grown) == 0;
  };
  if (kStart == Start::kRescale && !stays()) {
    for (int64_t m = 0; m < m_tiles * kTileSide; ++m) {
      float* const row = c + m * ldc;
      for (int64_t n = 0; n < n_tiles * kTileSide; n += kTileSide)
        store(row + n, load(row + n) * load(rescale + n));
    }
  }
  const auto blocks = [&](auto height, int64_t m) {
    const bf16* const rows = a + m * kTileSide * lda;
    float* const to = c + m * kTileSide * ldc;
    int64_t n = 0;
    for (; n + 2 <= n_tiles; n += 2) {
      ahead.ask();
      tile_block<height.value, 2, kAdd>(k_tiles, rows, lda, b + n * 2 * kTileSide, ldb,
                                        to + n * kTileSide, ldc);
    }
    if (n < n_tiles)
      tile_block<height.value, 1, kAdd>(k_tiles, rows, lda, b + n * 2 * kTileSide, ldb,
                                        to + n * kTileSide, ldc);
  };
  int64_t m = 0;
  for (; m + 2 <= m_tiles; m += 2) blocks(Width<2>{}, m);
  if (m < m_tiles) blocks(Width<1>{}, m);
}
#endif

template <class M, bool kTransposedA, Start kStart>
inline void matmul(int64_t m_count, int64_t n_vectors, int64_t k, const typename M::T* a,
                   int64_t lda, const typename M::T* b, int64_t ldb, typename M::Acc* c,
                   int64_t ldc, Ahead& ahead, const typename M::Acc* rescale = nullptr) {
  int64_t m = 0;  // rows that tiles have done
#if defined(__AMX_BF16__)
  if constexpr (M::kTiled) {
    static_assert(!kTransposedA && kLanes<float> == kTileSide);
    if (const int64_t k_tiles = k / kTileSide) {
      const int64_t steps = k_tiles * kTileSide;
      m = m_count / kTileSide * kTileSide;
      tile_matmul<kStart>(m / kTileSide, n_vectors, k_tiles, a, lda, b, ldb, c, ldc, ahead,
                          rescale);
      if (steps < k)
        vector_matmul<M, false, Start::kAdd>(m, n_vectors, k - steps, a + 2 * steps, lda,
                                             b + steps * ldb, ldb, c, ldc, ahead, nullptr);
    }
  }
#endif
  if (m < m_count)
    vector_matmul<M, kTransposedA, kStart>(m_count - m, n_vectors, k, a + m * lda, lda, b, ldb,
                                           c + m * ldc, ldc, ahead, rescale);
}

}  // namespace
}  // namespace jax_flashattn::cpu::FLASH_ISA
