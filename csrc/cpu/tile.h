// What both passes do around the products: which rows a tile holds, packing, masks, transposes.
#pragma once

#include <type_traits>

#include "cpu/attention.h"
#include "cpu/matmul.h"

namespace jax_flashattn::cpu {
void* thread_buffer(int64_t bytes);  // dispatch.cc: 64-byte aligned, reused by the calling thread
}

namespace jax_flashattn::cpu::FLASH_ISA {
namespace {

constexpr int64_t kTileKeys = 96;  // keys that are packed at once
constexpr int kRows = 64;          // query rows of a tile: the lanes of transposed scores
// Rows that compute the same keys of a packed tile; under a causal mask, too, the keys between the
// ends of two strips: what AMX reduces over at once.
constexpr int kStripRows = kHasTiles ? 32 : 16;

constexpr int64_t even(int64_t x) { return x + (x & 1); }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// Hands out pieces of the thread's buffer. The first pass (base null) only counts bytes.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* p = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return p;
  }
};

template <class Buffers, class... Options>
inline Buffers thread_buffers(const Sizes& n, int64_t tiles, Options... options) {
  Arena count{nullptr};
  Buffers(count, n, tiles, options...);
  Arena arena{static_cast<char*>(thread_buffer(count.used))};
  return Buffers(arena, n, tiles, options...);
}

template <class T>
inline void fill(T* p, int64_t count, T value) {
  for (int64_t k = 0; k < count; ++k) p[k] = value;
}

// The query rows of one key head, cut into tiles. A long sequence starts every head on a new tile;
// a short one (decode) lets the heads of a group share tiles, because they share keys and values.
struct RowMap {
  int64_t sq, r, pitch;
  RowMap(const Sizes& n, int64_t pitch) : sq(n.sq), r(n.r), pitch(pitch) {}
  explicit RowMap(const Sizes& n) : RowMap(n, n.sq >= kRows ? whole_tiles(n.sq) : n.sq) {}
  static int64_t whole_tiles(int64_t sq) { return ceil_div(sq, kRows) * kRows; }
  int64_t tiles() const { return ceil_div(r * pitch, kRows); }
};

constexpr int64_t kMostTiles = 8;  // of rows, in a task

// How many tiles of rows share one packed tile of keys, where a task only writes rows: what stays
// in the L2 cache, with `width` accumulators a row, and leaves enough tasks for many threads.
// Results do not depend on it beyond where key tiles begin.
inline int64_t tiles_per_task(const Sizes& n, int64_t tiles, int64_t width) {
  constexpr int64_t kTasks = 16, kBytes = 512 * 1024;
  const int64_t fit = kBytes / (width * kRows * 4);
  return clamp<int64_t>(n.b * n.g * tiles / kTasks, 1, clamp<int64_t>(fit, 1, kMostTiles));
}

struct Rows {
  int count;            // lanes in use, up to the last real row
  int64_t head[kRows];  // -1: no row in this lane
  int64_t i[kRows];
  Interval visible[kRows];
  TileLimits limits, strips[kRows / kStripRows];  // of all rows, and of each strip
  bool finite;                                    // backward: what was packed of these rows
};

inline Rows tile_rows(const RowMap& map, const Sizes& n, const MaskSource& mask, int64_t b,
                      int64_t tile) {
  Rows rows;
  rows.count = 0;
  rows.limits = no_rows();
  for (TileLimits& strip : rows.strips) strip = no_rows();
  for (int l = 0; l < kRows; ++l) {
    const int64_t row = tile * kRows + l;
    const int64_t head = row / map.pitch, i = row % map.pitch;
    const bool real = head < map.r && i < map.sq;
    TileLimits& strip = rows.strips[l / kStripRows];
    rows.head[l] = real ? head : -1;
    rows.i[l] = i;
    rows.visible[l] = {0, 0};
    if (!real) {
      strip.min_hi = 0;  // never full: what such a lane computes must be masked
      continue;
    }
    rows.count = l + 1;
    rows.visible[l] = row_interval(mask, n, b, static_cast<int32_t>(i));
    strip = add_row(strip, rows.visible[l]);
  }
  for (const TileLimits& strip : rows.strips) rows.limits = unite(rows.limits, strip);
  return rows;
}

// Rows [row, row + rows) of a tile, and keys [begin, end) of a packed tile of which each of their
// strips may see every pair. All rows see [full_begin, full_end). Bounds are even, but for the end
// of an odd number of packed keys.
struct Panel {
  int row, rows;
  int64_t begin, end, full_begin, full_end;
  bool partial() const { return full_begin > begin || full_end < end; }
};

// Calls body(panel) for all rows of a tile that see any of the keys [j0, j0 + count), keys in
// order. Keys are cut where a strip begins or ends to see them, so that the stairs of a diagonal
// are panels as wide as can be.
template <class Body>
inline void for_panels(const Rows& rows, int64_t j0, int64_t count, const Body& body) {
  constexpr int kStrips = kRows / kStripRows;
  const int strips = static_cast<int>(ceil_div(rows.count, kStripRows));
  int64_t begin[kStrips], end[kStrips], from = count;
  for (int s = 0; s < strips; ++s) {
    begin[s] = clamp<int64_t>(rows.strips[s].min_lo - j0, 0, count) / 2 * 2;
    end[s] = clamp<int64_t>(even(rows.strips[s].max_hi - j0), 0, count);
    from = min64(from, begin[s]);
  }
  for (int64_t to; from < count; from = to) {
    to = count;
    for (int s = 0; s < strips; ++s) {
      if (begin[s] > from) to = min64(to, begin[s]);
      if (end[s] > from) to = min64(to, end[s]);
    }
    const auto sees = [&](int s) { return begin[s] <= from && from < end[s]; };
    for (int s = 0, next; s < strips; s = next) {
      next = s + 1;
      if (!sees(s)) continue;
      TileLimits all = rows.strips[s];
      for (; next < strips && sees(next); ++next) all = unite(all, rows.strips[next]);
      const int row = s * kStripRows;
      Panel panel{row, (next < strips ? next * kStripRows : rows.count) - row, from, to, 0, 0};
      panel.full_begin = even(clamp<int64_t>(all.max_lo - j0, from, to));
      panel.full_end = clamp<int64_t>(all.min_hi - j0, from, to);
      if (panel.full_end < to) panel.full_end = panel.full_end / 2 * 2;
      if (panel.full_begin >= panel.full_end) panel.full_begin = panel.full_end = to;
      body(panel);
    }
  }
}

// Calls body(whether rows may not see the keys, first, end) for the parts of a panel's keys.
template <class Body>
inline void for_key_ranges(const Panel& panel, const Body& body) {
  body(std::false_type{}, panel.full_begin, panel.full_end);
  const int64_t edges[2][2] = {{panel.begin, panel.full_begin}, {panel.full_end, panel.end}};
  for (const auto& edge : edges) body(std::true_type{}, edge[0], edge[1]);
}

// Offset of row l's first element in a [b, s, g, r, width] array.
inline int64_t row_offset(const Rows& rows, const Sizes& n, int64_t b, int64_t g, int l,
                          int64_t width) {
  return (((b * n.sq + rows.i[l]) * n.g + g) * n.r + rows.head[l]) * width;
}
// The same in a [b, g, r, sq] array.
inline int64_t stat_offset(const Rows& rows, const Sizes& n, int64_t b, int64_t g, int l) {
  return ((b * n.g + g) * n.r + rows.head[l]) * n.sq + rows.i[l];
}

inline float negated(float x) { return -x; }
inline double negated(double x) { return -x; }
inline bf16 negated(bf16 x) { return static_cast<bf16>(x ^ 0x8000); }

template <class Storage, class T>
inline T as_operand(Storage x) {
  if constexpr (sizeof(Storage) == sizeof(T))
    return static_cast<T>(x);
  else
    return to_float(x);
}

// `count` elements, widened to operands and zero-filled up to `padded`.
template <class M, class Storage>
inline void pack_row(const Storage* src, int64_t count, int64_t padded, typename M::T* dst) {
  using T = typename M::T;
  int64_t c = 0;
  if constexpr (sizeof(Storage) == sizeof(T)) {
    constexpr int64_t kStep = kVectorBytes / sizeof(T);
    for (; c + kStep <= count; c += kStep) __builtin_memcpy(dst + c, src + c, kVectorBytes);
    for (; c < count; ++c) dst[c] = src[c];
  } else {
    constexpr int L = kLanes<T>;
    for (; c + L <= count; c += L) store(dst + c, load_wide(src + c));
    for (; c < count; ++c) dst[c] = as_operand<Storage, T>(src[c]);
  }
  for (; c < padded; ++c) dst[c] = T(0);
}

// Two neighbouring rows interleaved, for a product that reduces over rows two at a time.
template <class M, class Storage>
inline void pack_row_pair(const Storage* first, const Storage* second, int64_t count,
                          int64_t padded, typename M::T* dst) {
  static_assert(M::kDepth == 2);
  int64_t c = 0;
#if defined(__AVX512BF16__)
  for (; c + 16 <= count; c += 16) {
    const auto wide = [&](const Storage* p) {
      return p ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(p + c)))
               : _mm512_setzero_si512();
    };
    _mm512_storeu_si512(dst + 2 * c,
                        _mm512_or_si512(wide(first), _mm512_slli_epi32(wide(second), 16)));
  }
#endif
  using T = typename M::T;
  for (; c < padded; ++c) {
    dst[2 * c] = c < count && first ? as_operand<Storage, T>(first[c]) : T(0);
    dst[2 * c + 1] = c < count && second ? as_operand<Storage, T>(second[c]) : T(0);
  }
}

// Keys or values [j0, j0 + count) of head g, one after the other: [count][even(width)].
template <class M, class Storage>
inline void pack_keys(const Storage* src, const Sizes& n, int64_t b, int64_t g, int64_t j0,
                      int64_t count, int64_t width, typename M::T* dst) {
  const auto key = [&](int64_t j) { return src + ((b * n.sk + j0 + j) * n.g + g) * width; };
  // Rows are asked for before their turn: their cache lines are far apart.
  constexpr int64_t kAhead = 8;
  for (int64_t j = 0; j < count; ++j) {
    const Storage* row = key(j);
    const Storage* next = key(min64(j + kAhead, count - 1));
    for (int64_t c = 0; c < width; c += 64 / sizeof(Storage)) __builtin_prefetch(next + c);
    pack_row<M>(row, width, even(width), dst + j * even(width));
  }
  fill(dst + count * even(width), (even(count) - count) * even(width), typename M::T(0));
}

// The same with pairs of keys interleaved: [count / 2][even(width)][2].
template <class M, class Storage>
inline void pack_key_pairs(const Storage* src, const Sizes& n, int64_t b, int64_t g, int64_t j0,
                           int64_t count, int64_t width, typename M::T* dst) {
  const auto key = [&](int64_t j) { return src + ((b * n.sk + j0 + j) * n.g + g) * width; };
  for (int64_t j = 0; j < count; j += 2)
    pack_row_pair<M, Storage>(key(j), j + 1 < count ? key(j + 1) : nullptr, width, even(width),
                              dst + j * even(width));
}

#if defined(__AVX512BF16__)
// The same transposed: [even(width)][kTileKeys], zeros behind the last key.
template <class Storage>
inline void pack_transposed_keys(const Storage* src, const Sizes& n, int64_t b, int64_t g,
                                 int64_t j0, int64_t count, int64_t width, bf16* dst) {
  static_assert(sizeof(Storage) == sizeof(bf16) && kTileKeys % 32 == 0);
  for (int64_t j = 0; j < kTileKeys; j += 32) {
    for (int64_t c = 0; c < width; c += 16) {
      const __mmask16 some = width - c < 16 ? (1 << (width - c)) - 1 : 0xffff;
      const auto columns = [&](int64_t key) {
        if (key >= count) return _mm512_setzero_si512();
        const Storage* row = src + ((b * n.sk + j0 + key) * n.g + g) * width + c;
        return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, row));
      };
      Vec<float> square[16];  // of pairs of keys
      for (int u = 0; u < 16; ++u)
        square[u] = (Vec<float>)_mm512_or_si512(columns(j + 2 * u),
                                                _mm512_slli_epi32(columns(j + 2 * u + 1), 16));
      transpose<float>(square);
      for (int64_t u = 0; u < min64(16, even(width) - c); ++u)
        __builtin_memcpy(dst + (c + u) * kTileKeys + j, &square[u], sizeof square[u]);
    }
  }
}
#endif

// What a product reduces over, keys or values: in the form that multiply_reduced_keys takes.
template <class M, class Storage>
inline void pack_reduced_keys(const Storage* src, const Sizes& n, int64_t b, int64_t g, int64_t j0,
                              int64_t count, int64_t width, typename M::T* dst) {
  if constexpr (M::kTiled)
    pack_transposed_keys(src, n, b, g, j0, count, width, dst);
  else if constexpr (M::kDepth == 2)
    pack_key_pairs<M>(src, n, b, g, j0, count, width, dst);
  else
    pack_keys<M>(src, n, b, g, j0, count, width, dst);
}
// How many elements of that there are.
template <class M>
constexpr int64_t reduced_elements(int64_t count, int64_t width) {
  return (M::kTiled ? kTileKeys : ceil_div(count, M::kDepth) * M::kDepth) * even(width);
}

// C [even(width)][kRows] (+)= X^T B for the rows and keys of a panel, X packed so, B
// [keys / depth][kRows][depth].
template <class M, Start kStart>
inline void multiply_reduced_keys(const Panel& panel, int64_t width, const typename M::T* packed,
                                  const typename M::T* b, typename M::Acc* c, Ahead& ahead,
                                  const typename M::Acc* rescale = nullptr) {
  constexpr int D = M::kDepth;
  const int64_t vectors = ceil_div(panel.rows, kLanes<typename M::Acc>),
                steps = ceil_div(panel.end - panel.begin, D);
  const auto multiply = [&](auto transposed, const typename M::T* a, int64_t pitch) {
    matmul<M, transposed.value, kStart>(even(width), vectors, steps, a, pitch,
                                        b + panel.begin * kRows + panel.row * D, kRows * D,
                                        c + panel.row, kRows, ahead, rescale);
  };
  if constexpr (M::kTiled)
    multiply(std::false_type{}, packed + panel.begin, kTileKeys);
  else
    multiply(std::true_type{}, packed + panel.begin * even(width), even(width) * D);
}

// Has keys or values [j0, j0 + count) asked for, which are packed next.
template <class Storage>
inline void want_keys(const Storage* src, const Sizes& n, int64_t b, int64_t g, int64_t j0,
                      int64_t count, int64_t width, Ahead* ahead) {
  constexpr int64_t kBytes = sizeof(Storage);
  ahead->want(src + ((b * n.sk + j0) * n.g + g) * width, count, width * kBytes,
              n.g * width * kBytes);
}

// The same for a tile's rows of a query-shaped array, to be read or written, if they are one
// head's.
template <class Storage>
inline void want_rows(const Storage* src, const Rows& rows, const Sizes& n, int64_t b, int64_t g,
                      int64_t width, Ahead* ahead) {
  constexpr int64_t kBytes = sizeof(Storage);
  if (rows.count > 0 && rows.head[0] == rows.head[rows.count - 1])
    ahead->want(src + row_offset(rows, n, b, g, 0, width), rows.count, width * kBytes,
                n.g * n.r * width * kBytes);
}

// kLanes<Acc> units of a row, starting at unit c, as they will lie in one column each.
template <class M, class Storage>
inline auto load_units(const Storage* row, int64_t c) {
  if constexpr (sizeof(Storage) == sizeof(typename M::T)) {
    Vec<typename M::Acc> v;
    __builtin_memcpy(&v, row + c * M::kDepth, sizeof v);
    return v;
  } else {
    return load_wide(row + c);
  }
}

// Query-side rows as columns: [width / depth][kRows][depth]; `flip` negates (S8 with scale < 0).
// A unit is one step of a column: depth elements, the size of one accumulator.
template <class M, class Storage>
inline void pack_columns(const Storage* src, const Rows& rows, const Sizes& n, int64_t b, int64_t g,
                         int64_t width, bool flip, typename M::T* dst) {
  using T = typename M::T;
  using Acc = typename M::Acc;
  constexpr int D = M::kDepth, L = kLanes<Acc>;
  const int64_t whole = width / D / L * L;  // units that fill vectors
  for (int l0 = 0; l0 < kRows; l0 += L) {
    const Storage* row[L];
    for (int l = 0; l < L; ++l)
      row[l] = rows.head[l0 + l] < 0 ? nullptr : src + row_offset(rows, n, b, g, l0 + l, width);
    for (int64_t c = 0; c < whole; c += L) {
      Vec<Acc> square[L];
      for (int l = 0; l < L; ++l) square[l] = row[l] ? load_units<M>(row[l], c) : Vec<Acc>{};
      transpose<Acc>(square);
      for (int u = 0; u < L; ++u)
        __builtin_memcpy(dst + ((c + u) * kRows + l0) * D, &square[u], sizeof square[u]);
    }
    for (int64_t c = whole * D; c < ceil_div(width, D) * D; ++c)
      for (int l = 0; l < L; ++l)
        dst[(c / D * kRows + l0 + l) * D + c % D] =
            row[l] && c < width ? as_operand<Storage, T>(row[l][c]) : T(0);
  }
  if (flip)
    for (int64_t x = 0; x < ceil_div(width, D) * D * kRows; ++x) dst[x] = negated(dst[x]);
}

// The first `count` lanes, rounded.
template <class Acc, class Storage>
inline void store_some(Storage* p, int64_t count, Vec<Acc> v) {
  if (count >= kLanes<Acc>) return store_narrow(p, v);
  for (int64_t i = 0; i < count; ++i) round_to(v[i], p + i);
}

// Columns [width][kRows] times a factor per row, to rows of a query-shaped array.
template <class Acc, class Storage>
inline void write_columns(const Acc* columns, const Acc* factor, const Rows& rows, const Sizes& n,
                          int64_t b, int64_t g, int64_t width, Storage* dst) {
  constexpr int L = kLanes<Acc>;
  for (int l0 = 0; l0 < rows.count; l0 += L) {
    for (int64_t c = 0; c < width; c += L) {
      Vec<Acc> square[L];
      for (int u = 0; u < L; ++u)
        square[u] =
            c + u < width ? load(columns + (c + u) * kRows + l0) * load(factor + l0) : Vec<Acc>{};
      transpose<Acc>(square);
      for (int l = 0; l < L; ++l)
        if (rows.head[l0 + l] >= 0)
          store_some<Acc>(dst + row_offset(rows, n, b, g, l0 + l, width) + c, width - c, square[l]);
    }
  }
}

// Query-side rows as rows, for products that reduce over them: [kRows / depth][padded][depth].
template <class M, class Storage>
inline void pack_rows(const Storage* src, const Rows& rows, const Sizes& n, int64_t b, int64_t g,
                      int64_t width, typename M::T* dst) {
  const int64_t padded = padded_dim(width);
  const auto row = [&](int l) -> const Storage* {
    return rows.head[l] < 0 ? nullptr : src + row_offset(rows, n, b, g, l, width);
  };
  for (int l = 0; l < kRows; l += M::kDepth) {
    typename M::T* to = dst + l * padded;
    if constexpr (M::kDepth == 2)
      pack_row_pair<M>(row(l), row(l + 1), width, padded, to);
    else if (row(l))
      pack_row<M>(row(l), width, padded, to);
    else
      for (int64_t c = 0; c < padded; ++c) to[c] = 0;
  }
}

// x - x is 0 for a finite x and NaN for any other.
template <class T>
inline bool all_finite(const T* p, int64_t count) {
  constexpr int L = kLanes<T>;
  Vec<T> zeros{};
  int64_t k = 0;
  for (; k + L <= count; k += L) zeros += load(p + k) - load(p + k);
  T sum = 0;
  for (int l = 0; l < L; ++l) sum += zeros[l];
  for (; k < count; ++k) sum += p[k] - p[k];
  return sum == 0;
}
inline bool all_finite(const bf16* p, int64_t count) {
  constexpr int L = kLanes<int16_t>;
  constexpr int16_t kMagnitude = 0x7fff;
  Vec<int16_t> lanes{};
  int64_t k = 0;
  for (; k + L <= count; k += L) {
    Vec<int16_t> bits;
    __builtin_memcpy(&bits, p + k, sizeof bits);
    bits &= kMagnitude;
    lanes = bits > lanes ? bits : lanes;
  }
  int largest = 0;
  const auto add = [&](int bits) { largest = bits > largest ? bits : largest; };
  for (int l = 0; l < L; ++l) add(lanes[l]);
  for (; k < count; ++k) add(p[k] & kMagnitude);
  return largest < 0x7f80;
}

// An answer that is found when it is first asked for.
template <class Find>
class OnceKnown {
 public:
  explicit OnceKnown(const Find& find) : find_(find) {}
  bool operator()() const {
    if (state_ < 0) state_ = find_();
    return state_;
  }

 private:
  Find find_;
  mutable int state_ = -1;
};

// Limits of one vector of rows, counted from key j0.
template <class Acc>
using LaneInts = Vec<std::conditional_t<sizeof(Acc) == 8, int64_t, int32_t>>;

template <class Acc>
inline void lane_limits(const Rows& rows, int vector, int64_t j0, LaneInts<Acc>* lo,
                        LaneInts<Acc>* hi) {
  for (int l = 0; l < kLanes<Acc>; ++l) {
    const Interval v = rows.visible[vector * kLanes<Acc> + l];
    (*lo)[l] = v.lo - j0;
    (*hi)[l] = v.hi - j0;
  }
}
template <class Ints>
inline auto lanes_that_see(Ints lo, Ints hi, int64_t j) {
  const auto key = static_cast<std::remove_reference_t<decltype(lo[0])>>(j);
  return (lo <= key) & (hi > key);
}

// Scores enter exp2 as |scale| * log2(e) * s; a negative scale flips the sign of the packed query.
constexpr double kLog2e = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
template <class Acc>
inline Acc exponent_scale(double scale) {
  return static_cast<Acc>((scale < 0 ? -scale : scale) * kLog2e);
}

inline float log_of(float x) { return __builtin_logf(x); }
inline double log_of(double x) { return __builtin_log(x); }
inline float exp2_of(float x) { return __builtin_exp2f(x); }
inline double exp2_of(double x) { return __builtin_exp2(x); }

}  // namespace
}  // namespace jax_flashattn::cpu::FLASH_ISA
