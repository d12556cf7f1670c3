// How a pass starts: which instance of its kernel, and the tasks of one that only writes rows.
#pragma once

#include "cpu/tile.h"

namespace jax_flashattn::cpu::FLASH_ISA {
namespace {

// Calls run(an element).
template <class Run>
inline void with_element(DType dtype, const Run& run) {
  if constexpr (kOnlyBf16) {
    run(bf16{});
  } else {
    switch (dtype) {
      case DType::kF16:
        return run(f16{});
      case DType::kBF16:
        return run(bf16{});
      case DType::kF32:
        return run(float{});
      case DType::kF64:
        return run(double{});
    }
  }
}

// Calls run(an element, whether featured): a pass has an instance for each.
template <class Params, class Run>
inline void with_instance(const Params& p, const Run& run) {
  with_element(p.dtype, [&](auto element) {
    return plain_features(p) ? run(element, std::false_type{}) : run(element, std::true_type{});
  });
}

// Calls kGroup(p, map, b, g, first tile, tiles) for all rows of all key heads, in tasks that keep
// `width` accumulators a row.
template <auto kGroup, class Params>
inline void for_row_groups(const Params& p, int64_t width, double work, Executor& executor) {
  struct Context {
    const Params& p;
    RowMap map;
    int64_t tiles, per_task, groups;
  } x{p, RowMap(p.n), 0, 0, 0};
  x.tiles = x.map.tiles();
  x.per_task = tiles_per_task(p.n, x.tiles, width);
  x.groups = ceil_div(x.tiles, x.per_task);
  // Last rows first: under a causal mask they are the longest.
  executor.run(
      p.n.b * p.n.g * x.groups, work,
      [](void* data, int64_t index) {
        const auto& x = *static_cast<const Context*>(data);
        const int64_t heads = x.p.n.b * x.p.n.g;
        const int64_t first = (x.groups - 1 - index / heads) * x.per_task, head = index % heads;
        kGroup(x.p, x.map, head / x.p.n.g, head % x.p.n.g, first,
               min64(x.per_task, x.tiles - first));
      },
      &x);
}

}  // namespace
}  // namespace jax_flashattn::cpu::FLASH_ISA
