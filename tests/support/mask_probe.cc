// csrc/semantics for ctypes: evaluated over whole arrays, compared in tests/unit/test_semantics.py.
#include "semantics/mask.h"
#include "semantics/params.h"
#include "semantics/philox.h"

using namespace jax_flashattn;

// Sizes come as int64 and may be narrower in the structs.
static int32_t narrow(int64_t x) { return static_cast<int32_t>(x); }

extern "C" {

// Limits of rows [0, n) of an arithmetic mask.
void probe_rows(int64_t sq, int64_t sk, int64_t left, int64_t right, int64_t n, int32_t* limits) {
  for (int64_t i = 0; i < n; ++i) {
    const Interval row = row_interval(
        ArithmeticMask{narrow(sq), narrow(sk), narrow(left), narrow(right)}, narrow(i));
    limits[2 * i] = row.lo;
    limits[2 * i + 1] = row.hi;
  }
}

void probe_clamped(int64_t n, const int64_t* lo, const int64_t* hi, int64_t sk, int32_t* limits) {
  for (int64_t i = 0; i < n; ++i) {
    const Interval row = clamped_interval(narrow(lo[i]), narrow(hi[i]), narrow(sk));
    limits[2 * i] = row.lo;
    limits[2 * i + 1] = row.hi;
  }
}

// Limits of the rows of batch `b` of a mask as kernels receive it; null pointers are absent.
void probe_source(int64_t sq, int64_t sk, int64_t left, int64_t right, const int32_t* lengths,
                  const int32_t* lo, const int32_t* hi, int64_t pitch, int64_t b, int32_t* limits) {
  Sizes n{};
  n.sq = sq;
  n.sk = sk;
  const MaskSource source{narrow(left), narrow(right), lengths, lo, hi, 2, pitch};
  for (int64_t i = 0; i < sq; ++i) {
    const Interval row = row_interval(source, n, b, narrow(i));
    limits[2 * i] = row.lo;
    limits[2 * i + 1] = row.hi;
  }
}

// Class of keys [j0, j1) for rows gathered in two halves: 0 skip, 1 partial, 2 full.
int probe_classify(int64_t n, const int32_t* lo, const int32_t* hi, int64_t j0, int64_t j1) {
  TileLimits first = no_rows(), second = no_rows();
  for (int64_t i = 0; i < n; ++i) {
    TileLimits& half = i < n / 2 ? first : second;
    half = add_row(half, {lo[i], hi[i]});
  }
  return static_cast<int>(classify(unite(first, second), j0, j1));
}

void probe_philox(const uint32_t* counter, const uint32_t* key, uint32_t* words) {
  uint32_t x[4] = {counter[0], counter[1], counter[2], counter[3]};
  philox(x, key[0], key[1], MultiplyWords{});
  for (int w = 0; w < 4; ++w) words[w] = x[w];
}

// Which scores of rows at `position` and keys at `coordinate` stay.
void probe_keep(const uint32_t* stream, int64_t rows, const int32_t* position, int64_t keys,
                const int32_t* coordinate, int64_t threshold, uint8_t* keep) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < keys; ++j)
      keep[i * keys + j] =
          keep_score(stream, static_cast<uint32_t>(position[i]),
                     static_cast<uint32_t>(coordinate[j]), static_cast<uint32_t>(threshold));
}

// Aligned positions of rows of batch b, and the coordinates of keys; null pointers are absent.
void probe_coordinates(int64_t sq, int64_t sk, const int32_t* lengths, const int32_t* position,
                       const int32_t* keys, int64_t b, int32_t* rows_out, int32_t* keys_out) {
  Sizes n{};
  n.sq = sq;
  n.sk = sk;
  const MaskSource source{-1, -1, lengths, nullptr, nullptr, 2, sq};
  Features f{};
  f.position = position;
  f.keys = keys;
  f.position_pitch = sq;
  f.keys_pitch = 2;
  for (int64_t i = 0; i < sq; ++i) rows_out[i] = aligned_position(f, source, n, b, narrow(i));
  for (int64_t j = 0; j < sk; ++j) keys_out[j] = key_coordinates(f, b).at(j);
}

int32_t probe_distance(int32_t position, int32_t coordinate) {
  return key_distance(position, coordinate);
}

int probe_visible(int32_t lo, int32_t hi, int64_t j) { return visible({lo, hi}, j); }
int probe_empty(int32_t lo, int32_t hi) { return empty({lo, hi}); }
}
