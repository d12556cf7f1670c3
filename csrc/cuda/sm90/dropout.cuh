// Dropout's flags (S12), several words in step.
#pragma once

#include "cuda/ptx/wgmma.h"
#include "semantics/params.h"
#include "semantics/philox.h"

namespace jax_flashattn::cuda::sm90 {

// One number for each of several Philox calls, so that one's latency hides behind the others.
template <int kCount>
struct Lanes {
  uint32_t x[kCount];
};
template <int kCount, class Function>
__device__ __forceinline__ Lanes<kCount> each(const Function& f) {
  Lanes<kCount> result;
#pragma unroll
  for (int i = 0; i < kCount; ++i) result.x[i] = f(i);
  return result;
}
template <int kCount>
__device__ __forceinline__ Lanes<kCount> operator^(const Lanes<kCount>& a, const Lanes<kCount>& b) {
  return each<kCount>([&](int i) { return a.x[i] ^ b.x[i]; });
}
template <int kCount>
__device__ __forceinline__ Lanes<kCount> operator+(const Lanes<kCount>& a, uint32_t b) {
  return each<kCount>([&](int i) { return a.x[i] + b; });
}
struct MultiplyLanes {
  template <int kCount>
  __device__ __forceinline__ void operator()(const Lanes<kCount>& a, uint32_t b,
                                             Lanes<kCount>* high, Lanes<kCount>* low) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) MultiplyWords{}(a.x[i], b, &high->x[i], &low->x[i]);
  }
};

// The 64 key words and the batch and head index of a head's random bits.
__device__ __forceinline__ uint4 dropout_stream(const Features& f, int64_t head) {
  return *reinterpret_cast<const uint4*>(f.dropout + head * 4);
}

// The Philox calls of a row, which differ in the counter's second word. Of the first three rounds'
// six products four have nothing of it: they are made once. No more than two rounds are unrolled:
// ptxas keeps the keys of all that are, and where registers are few it spills them.
class RowCalls {
 public:
  __device__ RowCalls(const uint4& stream, uint32_t position) : key0_(stream.x), key1_(stream.y) {
    const MultiplyWords multiply;
    uint32_t high0, low0, high1, low1, high2, low2, high3;
    multiply(position, kPhiloxFactor0, &high0, &low0);
    multiply(stream.z, kPhiloxFactor1, &high1, &low1);
    multiply(high0 ^ stream.w ^ key1(0), kPhiloxFactor1, &high2, &low2);
    multiply(high2 ^ low1 ^ key0(1), kPhiloxFactor0, &high3, &third3_);
    first_ = high1 ^ key0(0);
    second_ = low0 ^ key1(1);
    third0_ = low2 ^ key0(2);
    third2_ = high3 ^ key1(2);
  }

  // counter(i) is the second word of call i's.
  template <int kCount, class Counter>
  __device__ __forceinline__ void draw(Lanes<kCount> (&x)[4], const Counter& counter) const {
    const auto same = [](uint32_t y) { return each<kCount>([&](int) { return y; }); };
    const MultiplyLanes multiply;
    Lanes<kCount> high, low;
    multiply(same(first_) ^ each<kCount>(counter), kPhiloxFactor0, &high, &low);
    multiply(high ^ same(second_), kPhiloxFactor1, &x[0], &x[1]);
    x[0] = x[0] ^ same(third0_);
    x[2] = low ^ same(third2_);
    x[3] = same(third3_);
    Lanes<kCount> round_key0 = same(key0(3)), round_key1 = same(key1(3));
#pragma unroll 2
    for (int round = 3; round < kPhiloxRounds; ++round) {
      philox_round(x, round_key0, round_key1, multiply);
      round_key0 = round_key0 + kPhiloxStep0;
      round_key1 = round_key1 + kPhiloxStep1;
    }
  }

 private:
  __device__ uint32_t key0(int round) const { return key0_ + round * kPhiloxStep0; }
  __device__ uint32_t key1(int round) const { return key1_ + round * kPhiloxStep1; }
  uint32_t key0_, key1_;
  // What these products give to x[0] after round 1, to x[2] after round 2, to x after round 3.
  uint32_t first_, second_, third0_, third2_, third3_;
};

// Flags of a row, word after word. What 1024 columns share is kept as long as it serves.
class DroppedRow {
 public:
  __device__ DroppedRow(const uint4& stream, int position)
      : calls_(stream, static_cast<uint32_t>(position)) {}

  // Of columns j on, a multiple of 32 * kWords that is the same for the whole warp.
  template <int kWords>
  __device__ __forceinline__ void words(uint32_t j, const KeepBits& keep, uint32_t (&to)[kWords]) {
    static_assert(kWords == 4 || kWords == 2, "four words share a call");
    if (__any_sync(0xffffffffu, j / kDropoutShared != group_)) {
      group_ = j / kDropoutShared;
      Lanes<2> x[4];
      calls_.draw(x, [&](int i) { return shared_counter(j, i); });
      uint32_t first[4], second[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) first[w] = x[w].x[0], second[w] = x[w].x[1];
      take_shared(first, second, keep, &shared_);
    }
    Lanes<1> x[4];
    calls_.draw(x, [&](int) { return own_counter(j); });
    const bool second_half = kWords == 2 && j / (2 * kDropoutWord) % 2;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const uint32_t own = second_half ? x[2 + w % 2].x[0] : x[w].x[0];
      to[w] = dropped_word(own, shared_, keep);
    }
  }

 private:
  RowCalls calls_;
  uint32_t group_ = ~0u;
  SharedBits<uint32_t> shared_;
};

// All ones for what is dropped of two neighbouring scores: flags `first` + 8 * byte of word a and
// of word b, that have been shifted left by 7 - first.
__device__ __forceinline__ uint32_t drop_mask(uint32_t a, uint32_t b, int byte) {
  return ptx::permute(a, b, (8 | byte) * 0x11 | (12 | byte) * 0x1100);
}

}  // namespace jax_flashattn::cuda::sm90
