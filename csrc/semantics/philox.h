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

constexpr uint32_t kPhiloxFactor0 = 0xD2511F53u, kPhiloxFactor1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxStep0 = 0x9E3779B9u, kPhiloxStep1 = 0xBB67AE85u;  // of the key
constexpr int kPhiloxRounds = 10;

// One round. Word is uint32_t or a vector of them.
template <class Word, class Multiply>
FLASH_FN void philox_round(Word (&x)[4], const Word& key0, const Word& key1,
                           const Multiply& multiply) {
  Word high0, low0, high1, low1;
  multiply(x[0], kPhiloxFactor0, &high0, &low0);
  multiply(x[2], kPhiloxFactor1, &high1, &low1);
  x[0] = high1 ^ x[1] ^ key0;
  x[1] = low1;
  x[2] = high0 ^ x[3] ^ key1;
  x[3] = low0;
}
// Encrypts the counter x with the key.
template <class Word, class Multiply>
FLASH_FN void philox(Word (&x)[4], Word key0, Word key1, const Multiply& multiply) {
  FLASH_UNROLL(2)
  for (int round = 0; round < kPhiloxRounds; ++round) {
    philox_round(x, key0, key1, multiply);
    key0 = key0 + kPhiloxStep0;
    key1 = key1 + kPhiloxStep1;
  }
}

// Scores {i} x {32 c .. 32 c + 31} share a word of flags. Bit j % 32 of the words of two calls of
// their own is the high byte of score (i, j)'s number, of two calls that {i} x {1024 n .. 1024 n +
// 1023} share the low byte; the first call's first word is the highest bit. A score is dropped iff
// its number is at least the threshold. Counters are (i, one of these, batch, head).
constexpr uint32_t kDropoutWord = 32, kDropoutShared = 1024;
FLASH_FN uint32_t own_counter(uint32_t j, int call) { return j / kDropoutWord * 2 + call; }
FLASH_FN uint32_t shared_counter(uint32_t j, int call) {
  return 0x80000000u + j / kDropoutShared * 2 + call;
}

// Which of the scores of a word are dropped, from what the bits below say, a call's words, and the
// threshold's four bits of that call.
template <class Word>
FLASH_FN Word fold_call(Word dropped, const Word (&x)[4], uint32_t bits) {
  FLASH_UNROLL(4)
  for (int w = 3; w >= 0; --w) {
    const Word either = dropped | x[w], both = dropped & x[w];
    const int32_t all = static_cast<int32_t>(bits << (28 + w)) >> 31;  // the bit, 32 times
    dropped = both | (either & (Word{} + static_cast<uint32_t>(~all)));
  }
  return dropped;
}

constexpr uint32_t kKeepAll = 65536;  // keep thresholds count in 1/65536

// The flags of 32 scores. draw(counter, x) makes a call; `low` are those of the low byte alone.
template <class Word, class Draw>
FLASH_FN Word dropped_low(const Draw& draw, uint32_t j, uint32_t threshold) {
  Word x[4], low = Word{} + 0xffffffffu;
  for (int call = 1; call >= 0; --call) {
    draw(shared_counter(j, call), x);
    low = fold_call(low, x, threshold >> (4 - 4 * call));
  }
  return low;
}
template <class Word, class Draw>
FLASH_FN Word dropped_word(const Draw& draw, uint32_t j, uint32_t threshold, Word low) {
  if (threshold >= kKeepAll) return Word{};
  Word x[4];
  for (int call = 1; call >= 0; --call) {
    draw(own_counter(j, call), x);
    low = fold_call(low, x, threshold >> (12 - 4 * call));
  }
  return low;
}

// Whether score (i, j) stays. `stream`: the two key words, batch index and head index.
FLASH_FN bool keep_score(const uint32_t* stream, uint32_t i, uint32_t j, uint32_t threshold) {
  const auto draw = [&](uint32_t counter, uint32_t(&x)[4]) {
    x[0] = i;
    x[1] = counter;
    x[2] = stream[2];
    x[3] = stream[3];
    philox(x, stream[0], stream[1], MultiplyWords{});
  };
  const uint32_t low = dropped_low<uint32_t>(draw, j, threshold);
  return !(dropped_word(draw, j, threshold, low) >> j % kDropoutWord & 1);
}

}  // namespace jax_flashattn
