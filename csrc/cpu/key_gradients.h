// dK, dV and the gradient of a bias per key: every task of the backward sums a share of its own, a
// second loop adds the shares up.
#pragma once

#include "cpu/tile.h"

namespace jax_flashattn::cpu::FLASH_ISA {
namespace {

// Accumulators of one task: row j holds dK in [0, padded(d)), dV behind it, and behind that, where
// there is a bias per key, the gradients of key j's biases. The row behind the
// last key holds a flag for each block of keys: whether the task has reached it. The rest of the
// block is memory as it came until then.
template <class Acc>
struct KeyGradients {
  Acc* base;
  int64_t rows, pitch, dv_at, bias_at, block;
  KeyGradients(const BackwardParams& p, int64_t part, int64_t b, int64_t g)
      : rows(even(p.n.sk)),
        pitch(accumulator_columns(p)),
        dv_at(padded_dim(p.n.d)),
        bias_at(dv_at + padded_dim(p.n.dv)),
        block(keys_per_block(p.n)) {
    const int64_t share = (b * p.n.g + g) * p.parts + part;
    base = static_cast<Acc*>(p.scratch) + share * (rows + 1) * pitch;
  }
  // Even, and so many that the flags fit one row.
  static int64_t keys_per_block(const Sizes& n) {
    constexpr int64_t kLeast = 64;
    const int64_t needed = even(ceil_div(n.sk, padded_dim(n.d) + padded_dim(n.dv)));
    return needed > kLeast ? needed : kLeast;
  }
  void clear() const { fill(dk(rows), pitch, Acc(0)); }
  // Before anything is added to the keys [j0, j1).
  void reach(int64_t j0, int64_t j1) const {
    for (int64_t x = j0 / block; x * block < j1; ++x) {
      Acc& reached = dk(rows)[x];
      if (reached == 0) fill(dk(x * block), min64(block, rows - x * block) * pitch, Acc(0));
      reached = 1;
    }
  }
  bool has_reached(int64_t j) const { return dk(rows)[j / block] != 0; }
  Acc* dk(int64_t j) const { return base + j * pitch; }
  Acc* dv(int64_t j) const { return base + j * pitch + dv_at; }
  Acc* dbias(int64_t j) const { return base + j * pitch + bias_at; }
};

// The first part of the tasks of a key head that reached key j; p.parts if none did.
template <class Acc>
inline int64_t first_part(const BackwardParams& p, int64_t b, int64_t g, int64_t j) {
  int64_t part = 0;
  while (part < p.parts && !KeyGradients<Acc>(p, part, b, g).has_reached(j)) ++part;
  return part;
}

// Adds the shares of the tasks that reached the block of keys [j0, j1), in order and in the memory
// of the first, scales, and rounds.
template <class Acc, class Storage>
void finish_keys(const BackwardParams& p, int64_t b, int64_t g, int64_t j0, int64_t j1) {
  constexpr int L = kLanes<Acc>;
  const Sizes& n = p.n;
  const int64_t first = first_part<Acc>(p, b, g, j0);
  const bool reached = first < p.parts;
  const KeyGradients<Acc> sum(p, reached ? first : 0, b, g);
  for (int64_t part = first + 1; part < p.parts; ++part) {
    const KeyGradients<Acc> share(p, part, b, g);
    if (!share.has_reached(j0)) continue;
    Acc* const to = sum.dk(j0);
    const Acc* const from = share.dk(j0);
    for (int64_t x = 0; x < (j1 - j0) * sum.pitch; x += L)
      store(to + x, load(to + x) + load(from + x));
  }
  const auto write = [&](const Acc* from, int64_t width, Acc factor, void* to, int64_t j) {
    const auto row = [&](int64_t j) {
      return static_cast<Storage*>(to) + ((b * n.sk + j) * n.g + g) * width;
    };
    constexpr int64_t kAhead = 8;  // rows lie far apart
    const Storage* const soon = row(min64(j + kAhead, j1 - 1));
    for (int64_t e = 0; e < width; e += L) {
      __builtin_prefetch(soon + e, 1);
      const Vec<Acc> x = reached ? load(from + e) : Vec<Acc>{};
      store_some<Acc>(row(j) + e, width - e, x * factor);
    }
  };
  for (int64_t j = j0; j < j1; ++j) {
    write(sum.dk(j), n.d, static_cast<Acc>(p.scale), p.dk, j);
    write(sum.dv(j), n.dv, static_cast<Acc>(kept_scale(p.features)), p.dv, j);
  }
}

// dK and dV from the tasks' shares.
template <class Acc, class Storage>
void finish(const BackwardParams& p, Executor& executor) {
  struct Context {
    const BackwardParams& p;
    int64_t keys, blocks;
  } context{p, KeyGradients<Acc>::keys_per_block(p.n), 0};
  context.blocks = ceil_div(p.n.sk, context.keys);
  executor.run(
      p.n.b * p.n.g * context.blocks,
      static_cast<double>(p.n.b * p.n.g * p.n.sk) * p.parts * (p.n.d + p.n.dv),
      [](void* data, int64_t index) {
        const auto& x = *static_cast<const Context*>(data);
        const int64_t block = index % x.blocks, head = index / x.blocks;
        finish_keys<Acc, Storage>(x.p, head / x.p.n.g, head % x.p.n.g, block * x.keys,
                                  min64(x.p.n.sk, (block + 1) * x.keys));
      },
      &context);
}

}  // namespace
}  // namespace jax_flashattn::cpu::FLASH_ISA
