// Memory asked for ahead of its use: a few rows at a time, between the register tiles of products,
// which leave memory idle. The rows of a head lie far apart, where no hardware foresees them.
#pragma once

#include <cstdint>

namespace jax_flashattn::cpu::FLASH_ISA {
namespace {

class Ahead {
 public:
  // `rows` rows of `bytes` each, `pitch` bytes from one to the next.
  void want(const void* first, int64_t rows, int64_t bytes, int64_t pitch) {
    if (rows > 0 && wanted_ < kMost)
      regions_[wanted_++] = {static_cast<const char*>(first), rows, bytes, pitch};
  }
  // The next few of them.
  void ask() {
    constexpr int64_t kLine = 64, kBytes = 1024;
    for (int64_t asked = 0; asked < kBytes && asked_ < wanted_;) {
      Region& r = regions_[asked_];
      for (int64_t c = 0; c < r.bytes; c += kLine) __builtin_prefetch(r.row + c, 0, 2);
      asked += r.bytes;
      r.row += r.pitch;
      if (--r.rows == 0) ++asked_;
    }
  }

 private:
  static constexpr int kMost = 24;  // the rest goes unasked
  struct Region {
    const char* row;
    int64_t rows, bytes, pitch;
  } regions_[kMost];
  int wanted_ = 0, asked_ = 0;
};

}  // namespace
}  // namespace jax_flashattn::cpu::FLASH_ISA
