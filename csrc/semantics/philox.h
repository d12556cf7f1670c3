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

// A score has a number of 16 bits and is dropped iff that is at least the threshold. Words hold a
// bit each of the numbers of {i} x {32 c .. 32 c + 31}. The highest is a word of a call that {i} x
// {128 m .. 128 m + 127} have for themselves. The next seven are those of two calls that {i} x
// {1024 n .. 1024 n + 1023} share, each mixed with the own bit of another column; the low byte is
// what the shared calls say of another column. Counters are (i, one of these, batch, head).
constexpr uint32_t kDropoutWord = 32, kDropoutOwn = 128, kDropoutShared = 1024;
constexpr int kMixedBits = 7, kLowBits = 8;
FLASH_FN uint32_t own_counter(uint32_t j) { return j / kDropoutOwn; }
FLASH_FN uint32_t shared_counter(uint32_t j, int call) {
  return 0x80000000u + j / kDropoutShared * 2 + call;
}

// A keep threshold, of 65536, as words: all ones or all zeros for each bit, the lowest first.
constexpr uint32_t kKeepAll = 65536;
struct KeepBits {
  uint32_t bit[16];
  bool some;  // are dropped
  FLASH_MEMBER explicit KeepBits(uint32_t threshold) : some(threshold < kKeepAll) {
    for (int n = 0; n < 16; ++n) bit[n] = 0u - (threshold >> n & 1);
  }
};

// Which scores of a word are dropped, from what lower bits say, a bit of their numbers, and the
// threshold's.
template <class Word>
FLASH_FN Word fold_bit(Word dropped, Word x, uint32_t threshold) {
  return (dropped & x) | ((dropped | x) & (Word{} + ~threshold));
}
// The bits of the columns `count` further on.
template <class Word>
FLASH_FN Word columns_on(Word x, int count) {
  return x >> count | x << (32 - count);
}

// What a row's calls say of 1024 columns.
template <class Word>
struct SharedBits {
  Word mixed[kMixedBits],
      low;  // low: which would be dropped if all higher bits were the threshold's
};
template <class Word>
FLASH_FN void take_shared(const Word (&first)[4], const Word (&second)[4], const KeepBits& keep,
                          SharedBits<Word>* to) {
  to->low = Word{} + 0xffffffffu;
  FLASH_UNROLL(8)
  for (int n = 0; n < kLowBits; ++n) {
    const Word& x = n < 4 ? second[3 - n] : first[7 - n];
    to->low = fold_bit(to->low, columns_on(x, 2), keep.bit[n]);
  }
  FLASH_UNROLL(7)
  for (int n = 0; n < kMixedBits; ++n) to->mixed[n] = n < 4 ? first[n] : second[n - 4];
}

// The flags of 32 scores from their word of a call of their own.
template <class Word>
FLASH_FN Word dropped_word(const Word& own, const SharedBits<Word>& shared, const KeepBits& keep) {
  Word dropped = shared.low;
  FLASH_UNROLL(7)
  for (int n = kMixedBits - 1; n >= 0; --n)
    dropped = fold_bit(dropped, shared.mixed[n] ^ columns_on(own, 4 * n + 4), keep.bit[14 - n]);
  return fold_bit(dropped, own, keep.bit[15]);
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
  const KeepBits keep(threshold);
  if (!keep.some) return true;
  uint32_t own[4], first[4], second[4];
  draw(own_counter(j), own);
  draw(shared_counter(j, 0), first);
  draw(shared_counter(j, 1), second);
  SharedBits<uint32_t> shared;
  take_shared(first, second, keep, &shared);
  return !(dropped_word(own[j / kDropoutWord % 4], shared, keep) >> j % kDropoutWord & 1);
}

}  // namespace jax_flashattn
