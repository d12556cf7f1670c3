// Appends to a cache. One thread, in order: where two sequences share a place, the last one wins.
#include <cstring>

#include "cpu/attention.h"

namespace jax_flashattn::cpu {

void append(const AppendParams& p) {
  for (int64_t b = 0; b < p.b; ++b) {
    for (int64_t t = 0; t < p.n; ++t) {
      const int64_t to = append_offset(p, b, t);
      if (to >= 0) std::memcpy(p.cache + to, p.fresh + (b * p.n + t) * p.bytes, p.bytes);
    }
  }
}

}  // namespace jax_flashattn::cpu
