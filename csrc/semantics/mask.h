// Which keys a query row sees (docs/semantics.md S2, S3, S5, S11). Host and device, no
// dependencies.
//
// Every mask is a row interval: row i sees the keys j with lo(i) <= j < hi(i). This header and
// jax_flashattn/_mask.py are the only two places where that rule is written.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FLASH_MEMBER __host__ __device__ __forceinline__
#define FLASH_PRAGMA(x) _Pragma(#x)
#define FLASH_UNROLL(n) FLASH_PRAGMA(unroll n)
#else
#define FLASH_MEMBER inline
#define FLASH_UNROLL(n)
#endif
#define FLASH_FN static FLASH_MEMBER

namespace jax_flashattn {

constexpr int kUnbounded = -1;  // of a window side

// The visible keys [lo, hi) of one row; empty iff lo >= hi.
struct Interval {
  int32_t lo, hi;
};

// Lengths and window sides are below this, so that sums of two of them fit int32.
constexpr int32_t kMaxLength = 1 << 30;

// The arithmetic mask of one sequence pair. `sq` and `sk` are its true lengths.
struct ArithmeticMask {
  int32_t sq, sk;
  int32_t left, right;  // kUnbounded or >= 0
};

template <class T>
FLASH_FN T clamp(T x, T low, T high) {
  return x < low ? low : (x > high ? high : x);
}

// S2: query row i is aligned with key i + sk - sq; a row past the sequence sees nothing.
FLASH_FN Interval row_interval(const ArithmeticMask& m, int32_t i) {
  if (i >= m.sq) return {0, 0};
  const int32_t centre = i + m.sk - m.sq;
  return {m.left == kUnbounded ? 0 : clamp(centre - m.left, 0, m.sk),
          m.right == kUnbounded ? m.sk : clamp(centre + m.right + 1, 0, m.sk)};
}

// An interval read from an array is clamped: nothing a caller passes can point outside the keys.
FLASH_FN Interval clamped_interval(int32_t lo, int32_t hi, int32_t sk) {
  return {clamp(lo, 0, sk), clamp(hi, 0, sk)};
}

FLASH_FN bool visible(Interval row, int64_t j) { return row.lo <= j && j < row.hi; }

FLASH_FN bool empty(Interval row) { return row.lo >= row.hi; }

// What a tile needs to know of its rows: the union of their intervals (over rows that see anything)
// and the intersection (over all rows; empty if one of them is).
struct TileLimits {
  int32_t min_lo, max_hi;  // union
  int32_t max_lo, min_hi;  // intersection
};

FLASH_FN TileLimits no_rows() { return {INT32_MAX, 0, 0, INT32_MAX}; }

FLASH_FN TileLimits add_row(TileLimits t, Interval row) {
  if (empty(row)) {  // it widens nothing, and no tile is full for it
    t.min_hi = 0;
    return t;
  }
  t.min_lo = row.lo < t.min_lo ? row.lo : t.min_lo;
  t.max_hi = row.hi > t.max_hi ? row.hi : t.max_hi;
  t.max_lo = row.lo > t.max_lo ? row.lo : t.max_lo;
  t.min_hi = row.hi < t.min_hi ? row.hi : t.min_hi;
  return t;
}

FLASH_FN TileLimits unite(TileLimits a, const TileLimits& b) {
  a.min_lo = b.min_lo < a.min_lo ? b.min_lo : a.min_lo;
  a.max_hi = b.max_hi > a.max_hi ? b.max_hi : a.max_hi;
  a.max_lo = b.max_lo > a.max_lo ? b.max_lo : a.max_lo;
  a.min_hi = b.min_hi < a.min_hi ? b.min_hi : a.min_hi;
  return a;
}

enum class TileClass { kSkip, kPartial, kFull };

// S5: the class of keys [j0, j1) for the rows gathered in `t`.
FLASH_FN TileClass classify(const TileLimits& t, int64_t j0, int64_t j1) {
  if (j1 <= t.min_lo || j0 >= t.max_hi) return TileClass::kSkip;
  return t.max_lo <= j0 && j1 <= t.min_hi ? TileClass::kFull : TileClass::kPartial;
}

}  // namespace jax_flashattn
