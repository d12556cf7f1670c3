// Dropout's random bits (docs/semantics.md S12): Philox 4x32-10 and the one place that says which
// bits belong to which score. Mirrored in jax_flashattn/_dropout.py.
//
// Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
#pragma once

#include <cstdint>

#include "semantics/mask.h"

namespace jax_flashattn {

// The full product of two 32-bit words; vector code brings its own (csrc/cpu/features.h).
struct MultiplyWords {
  FLASH_MEMBER void operator()(uint32_t a, uint32_t b, uint32_t* high, uint32_t* low) const {
    const uint64_t product = static_cast<uint64_t>(a) * b;
    *high = static_cast<uint32_t>(product >> 32);
    *low = static_cast<uint32_t>(product);
  }
};

// Encrypts the counter x with the key in ten rounds. Word is uint32_t or a vector of them.
template <class Word, class Multiply>
FLASH_FN void philox(Word (&x)[4], Word key0, Word key1, const Multiply& multiply) {
  for (int round = 0; round < 10; ++round) {
    Word high0, low0, high1, low1;
    multiply(x[0], 0xD2511F53u, &high0, &low0);
    multiply(x[2], 0xCD9E8D57u, &high1, &low1);
    x[0] = high1 ^ x[1] ^ key0;
    x[1] = low1;
    x[2] = high0 ^ x[3] ^ key1;
    x[3] = low0;
    key0 = key0 + 0x9E3779B9u;
    key1 = key1 + 0xBB67AE85u;
  }
}

// A call serves the 2 x 4 scores {i, i + 8} x {j, j + 1, j + 8, j + 9} of a 16 x 16 square of
// absolute coordinates: what one thread holds of a tensor-core accumulator. Its counter is
// (row, column, batch, head). Score (i, j) owns 16 bits, from `shift` of word `row word + column
// word`.
struct DropoutRow {
  uint32_t counter, word;
};
struct DropoutColumn {
  uint32_t counter, word, shift;
};
FLASH_FN DropoutRow dropout_row(uint32_t i) { return {i / 16 * 8 + i % 8, i / 8 % 2 * 2}; }
FLASH_FN DropoutColumn dropout_column(uint32_t j) {
  return {j / 16 * 4 + j % 8 / 2, j / 8 % 2, j % 2 * 16};
}

constexpr uint32_t kKeepAll = 65536;  // keep thresholds count in 1/65536

// Whether score (i, j) stays. `stream`: the two key words, batch index and head index.
FLASH_FN bool keep_score(const uint32_t* stream, uint32_t i, uint32_t j, uint32_t threshold) {
  const DropoutRow row = dropout_row(i);
  const DropoutColumn column = dropout_column(j);
  uint32_t x[4] = {row.counter, column.counter, stream[2], stream[3]};
  philox(x, stream[0], stream[1], MultiplyWords{});
  const uint32_t first = row.word ? x[2] : x[0], second = row.word ? x[3] : x[1];
  return ((column.word ? second : first) >> column.shift & 0xffff) < threshold;
}

}  // namespace jax_flashattn
