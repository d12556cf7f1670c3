// Products of bfloat16 by AMX: tile registers of 16 rows and 64 bytes, of which four hold results.
#pragma once

#include "cpu/simd.h"

namespace jax_flashattn::cpu::FLASH_ISA {
namespace {

#if defined(__AMX_BF16__)

constexpr int64_t kTileSide = 16;  // rows and columns of a tile of results; steps of a reduction

// While one lives, the calling thread has its tile registers: other libraries shape them as they
// like.
class TileRegisters {
 public:
  TileRegisters() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const shape;
    static_assert(sizeof shape == 64, "the layout LDTILECFG reads");
    _tile_loadconfig(&shape);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// kM x kN tiles of C (+)= A B, operands as in matmul, over `k` times kTileSide steps.
template <int kM, int kN, bool kAdd>
inline void tile_block(int64_t k, const bf16* a, int64_t lda, const bf16* b, int64_t ldb, float* c,
                       int64_t ldc) {
  // Tiles are named by constants: C 0 to 3, A 4 and 5, B 6 and 7.
  const int64_t a_pitch = lda * sizeof(bf16), b_pitch = ldb * sizeof(bf16),
                c_pitch = ldc * sizeof(float);
  float* const lower = c + kTileSide * ldc;
  if constexpr (kAdd) {
    _tile_loadd(0, c, c_pitch);
    if constexpr (kN == 2) _tile_loadd(1, c + kTileSide, c_pitch);
    if constexpr (kM == 2) _tile_loadd(2, lower, c_pitch);
    if constexpr (kM == 2 && kN == 2) _tile_loadd(3, lower + kTileSide, c_pitch);
  } else {
    _tile_zero(0);
    if constexpr (kN == 2) _tile_zero(1);
    if constexpr (kM == 2) _tile_zero(2);
    if constexpr (kM == 2 && kN == 2) _tile_zero(3);
  }
  for (int64_t p = 0; p < k; ++p) {
    _tile_loadd(4, a, a_pitch);
    _tile_loadd(6, b, b_pitch);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kN == 2) {
      _tile_loadd(7, b + 2 * kTileSide, b_pitch);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kM == 2) {
      _tile_loadd(5, a + kTileSide * lda, a_pitch);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kN == 2) _tile_dpbf16ps(3, 5, 7);
    }
    a += 2 * kTileSide;
    b += kTileSide * ldb;
  }
  _tile_stored(0, c, c_pitch);
  if constexpr (kN == 2) _tile_stored(1, c + kTileSide, c_pitch);
  if constexpr (kM == 2) _tile_stored(2, lower, c_pitch);
  if constexpr (kM == 2 && kN == 2) _tile_stored(3, lower + kTileSide, c_pitch);
}

#else

struct TileRegisters {
  TileRegisters() {}  // not trivial, so that nobody calls one unused
};

#endif

}  // namespace
}  // namespace jax_flashattn::cpu::FLASH_ISA
