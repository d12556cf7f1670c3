// Reads memory as fast as one core can: the "read" of STREAM. Compiled by benchmarks/decode.py.
#include <stdint.h>

// The sum of `count` words, so that no read can be left out; count is a multiple of 64.
uint64_t read_words(const uint64_t* p, int64_t count) {
  uint64_t sums[64] = {0};
  for (int64_t n = 0; n < count; n += 64)
    for (int x = 0; x < 64; ++x) sums[x] += p[n + x];
  uint64_t sum = 0;
  for (int x = 0; x < 64; ++x) sum += sums[x];
  return sum;
}
