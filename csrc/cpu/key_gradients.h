// dK and dV: every task of the backward sums a share of its own, a second loop adds the shares up.
#pragma once

#include "cpu/tile.h"

namespace jax_flashattn::cpu::FLASH_ISA {
namespace {

// Accumulators of one task: row j holds dK in [0, padded(d)) and dV behind it.
template <class Acc>
struct KeyGradients {
  Acc* base;
  int64_t pitch, dv_at;
  KeyGradients(const BackwardParams& p, int64_t part, int64_t b, int64_t g)
      : pitch(padded_dim(p.n.d) + padded_dim(p.n.dv)), dv_at(padded_dim(p.n.d)) {
    const int64_t share = (b * p.n.g + g) * p.parts + part;
    base = static_cast<Acc*>(p.scratch) + share * even(p.n.sk) * pitch;
  }
  void clear(const Sizes& n) const { __builtin_memset(base, 0, even(n.sk) * pitch * sizeof(Acc)); }
  Acc* dk(int64_t j) const { return base + j * pitch; }
  Acc* dv(int64_t j) const { return base + j * pitch + dv_at; }
};

// Adds the tasks' shares in order, scales, and rounds: keys [j0, j1) of one head.
template <class Acc, class Storage>
void finish_keys(const BackwardParams& p, int64_t b, int64_t g, int64_t j0, int64_t j1) {
  const Sizes& n = p.n;
  const auto sum_of = [&](int64_t j, int64_t at) {
    Vec<Acc> sum = load(KeyGradients<Acc>(p, 0, b, g).dk(j) + at);
    for (int64_t part = 1; part < p.parts; ++part)
      sum += load(KeyGradients<Acc>(p, part, b, g).dk(j) + at);
    return sum;
  };
  const auto write = [&](int64_t j, int64_t at, int64_t width, Acc factor, Storage* to) {
    for (int64_t e = 0; e < width; e += kLanes<Acc>)
      store_some<Acc>(to + e, width - e, sum_of(j, at + e) * factor);
  };
  for (int64_t j = j0; j < j1; ++j) {
    const int64_t row = (b * n.sk + j) * n.g + g;
    write(j, 0, n.d, static_cast<Acc>(p.scale), static_cast<Storage*>(p.dk) + row * n.d);
    write(j, padded_dim(n.d), n.dv, static_cast<Acc>(kept_scale(p.features)),
          static_cast<Storage*>(p.dv) + row * n.dv);
  }
}

// dK and dV from the tasks' shares.
template <class Acc, class Storage>
void finish(const BackwardParams& p, Executor& executor) {
  constexpr int64_t kKeys = 64;
  struct Context {
    const BackwardParams& p;
    int64_t blocks;
  } context{p, ceil_div(p.n.sk, kKeys)};
  executor.run(
      p.n.b * p.n.g * context.blocks,
      static_cast<double>(p.n.b * p.n.g * p.n.sk) * p.parts * (p.n.d + p.n.dv),
      [](void* data, int64_t index) {
        const auto& x = *static_cast<const Context*>(data);
        const int64_t block = index % x.blocks, head = index / x.blocks;
        finish_keys<Acc, Storage>(x.p, head / x.p.n.g, head % x.p.n.g, block * kKeys,
                                  min64(x.p.n.sk, (block + 1) * kKeys));
      },
      &context);
}

}  // namespace
}  // namespace jax_flashattn::cpu::FLASH_ISA
