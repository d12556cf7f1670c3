// The gradient of an additive bias (docs/semantics.md S8): dS summed over what shares a bias.
//
// Where every pair has a bias of its own, the backward pass writes its dS as it goes. Where batch
// elements or heads share one, a task of that pass owns rows of the bias, takes all that read them
// one after the other, sums dS in its thread's memory and writes the rows once. Where keys have one
// each and rows share it, it is summed beside dK and dV. Else (keys share it, or few tasks would
// come of it) a pass of its own does that for blocks of the bias; it computes scores and dP a
// second time. All sums have a fixed order: no race, the same bits for any number of threads.
#pragma once

#include "cpu/features.h"
#include "cpu/key_gradients.h"

namespace jax_flashattn::cpu::FLASH_ISA {
namespace {

// lse in units of log2, and delta, of one tile of rows.
template <class Acc>
inline void load_statistics(const BackwardParams& p, const Rows& rows, int64_t b, int64_t g,
                            Acc* lse, Acc* delta) {
  for (int l = 0; l < kRows; ++l) {
    const bool real = rows.head[l] >= 0;
    const int64_t at = real ? stat_offset(rows, p.n, b, g, l) : 0;
    lse[l] = real ? static_cast<const Acc*>(p.lse)[at] * Acc(kLog2e) : Acc(0);
    delta[l] = real ? static_cast<const Acc*>(p.delta)[at] : Acc(0);
    // S11: where a bias of -inf hides everything, exp2(-inf - inf) is the probability 0.
    if (p.features.bias.data && lse[l] == -std::numeric_limits<Acc>::infinity()) {
      lse[l] = -lse[l];
      delta[l] = 0;
    }
  }
}

// Probability p and dS with respect to the score behind the softcap.
template <class M, class V>
[[gnu::always_inline]] inline V featured_gradient(const LaneFeatures<M>& lanes, V score, V dprob,
                                                  V lse, V delta, int64_t j, V* p, V* steepness) {
  *p = exp2<M::kExpTerms>(lanes.score(score, j, steepness) - lse);
  return *p * (lanes.kept_and_scaled(dprob, j) - delta);
}

// Calls `write(element type)` with a value of the type of the bias.
template <class Storage, class Write>
inline void with_bias_type(const BackwardParams& p, const Write& write) {
  if (p.features.bias.dtype == DType::kF32) return write(float());
  write(Storage());
}

// The biases of a tile's rows, from key 0: null for a lane without a row.
template <class To>
inline To* bias_row(const BackwardParams& p, const Rows& rows, int64_t b, int64_t g, int l) {
  const Bias& bias = p.features.bias;
  if (rows.head[l] < 0) return nullptr;
  return static_cast<To*>(p.dbias) + b * bias.b + g * bias.g + rows.head[l] * bias.r +
         rows.i[l] * bias.i;
}

// Bias of its own per pair: 0 at the keys [0, j0) and [j1, sk), which no tile reached.
template <class Storage>
inline void clear_bias_rows(const BackwardParams& p, const Rows& rows, int64_t b, int64_t g,
                            int64_t j0, int64_t j1) {
  with_bias_type<Storage>(p, [&](auto type) {
    for (int l = 0; l < rows.count; ++l) {
      if (auto* row = bias_row<decltype(type)>(p, rows, b, g, l)) {
        __builtin_memset(row, 0, j0 * sizeof type);
        __builtin_memset(row + j1, 0, (p.n.sk - j1) * sizeof type);
      }
    }
  });
}

// Bias of its own per pair: dS [count][kRows] of one tile of rows, rounded into place.
template <class Storage, class Acc>
inline void write_score_gradients(const BackwardParams& p, const Acc* ds, const Rows& rows,
                                  int64_t b, int64_t g, int64_t j0, int64_t count) {
  constexpr int L = kLanes<Acc>;
  with_bias_type<Storage>(p, [&](auto type) {
    for (int l0 = 0; l0 < rows.count; l0 += L) {
      for (int64_t j = 0; j < count; j += L) {
        Vec<Acc> square[L];
        for (int u = 0; u < L; ++u)
          square[u] = j + u < count ? load(ds + (j + u) * kRows + l0) : Vec<Acc>{};
        transpose<Acc>(square);
        for (int l = 0; l < L; ++l) {
          if (auto* row = bias_row<decltype(type)>(p, rows, b, g, l0 + l)) {
            store_some<Acc>(row + j0 + j, count - j, square[l]);
            __builtin_prefetch(row + j0 + j + kTileKeys, 1);  // of the next tile
          }
        }
      }
    }
  });
}

template <class M>
struct BiasGradientBuffers {
  using T = typename M::T;
  using Acc = typename M::Acc;
  T *key, *value, *query, *dout;
  Acc *score, *dprob, *lse, *delta, *bias, *sum;  // sum: [kTileKeys or 1][kRows]
  uint64_t* keep;

  BiasGradientBuffers(Arena& a, const Sizes& n, int64_t)
      : key(a.take<T>(kTileKeys * even(n.d))),
        value(a.take<T>(kTileKeys * even(n.dv))),
        query(a.take<T>(even(n.d) * kRows)),
        dout(a.take<T>(even(n.dv) * kRows)),
        score(a.take<Acc>(kTileKeys * kRows)),
        dprob(a.take<Acc>(kTileKeys * kRows)),
        lse(a.take<Acc>(kRows)),
        delta(a.take<Acc>(kRows)),
        bias(a.take<Acc>(kTileKeys * kRows)),
        sum(a.take<Acc>(kTileKeys * kRows)),
        keep(a.take<uint64_t>(kTileKeys)) {}
};

// How many indices of each axis the bias tells apart, in blocks of rows and keys.
struct BiasBlocks {
  int64_t b, g, r, i, j;
  explicit BiasBlocks(const BackwardParams& p)
      : b(p.features.bias.b ? p.n.b : 1),
        g(p.features.bias.g ? p.n.g : 1),
        r(p.features.bias.r ? p.n.r : 1),
        i(p.features.bias.i ? ceil_div(p.n.sq, kRows) : 1),
        j(p.features.bias.j ? ceil_div(p.n.sk, kTileKeys) : 1) {}
  int64_t count() const { return b * g * r * i * j; }
  // The block of that number, in blocks.
  struct Place {
    int64_t b, g, r, i, j;
  };
  Place place(int64_t index) const {
    Place at;
    at.j = index % j, index /= j;
    at.i = index % i, index /= i;
    at.r = index % r, index /= r;
    at.g = index % g, at.b = index / g;
    return at;
  }
};

// A range of an axis: one index if the bias tells them apart, else all.
struct AxisRange {
  int64_t begin, end;
  AxisRange(int64_t stride, int64_t index, int64_t count)
      : begin(stride ? index : 0), end(stride ? index + 1 : count) {}
};

// The tasks of a backward pass that sums the gradient of a shared bias: parts of the rows of a
// bias.
struct BiasOwners {
  int64_t b, g, tasks;
  explicit BiasOwners(const BackwardParams& p)
      : b(p.features.bias.b ? p.n.b : 1),
        g(p.features.bias.g ? p.n.g : 1),
        tasks(b * g * p.parts) {}
};

// Whether it does: rows and keys have biases of their own, and there are tasks enough.
inline bool is_bias_summed_in_pass(const BackwardParams& p) {
  constexpr int64_t kEnoughTasks = 8;
  const Bias& bias = p.features.bias;
  return bias.data && !is_bias_per_pair(p) && bias.i && bias.j &&
         BiasOwners(p).tasks >= kEnoughTasks;
}

template <class Body>
inline void for_pairs(const AxisRange& bs, const AxisRange& gs, const Body& body) {
  for (int64_t b = bs.begin; b < bs.end; ++b)
    for (int64_t g = gs.begin; g < gs.end; ++g) body(b, g);
}

// Adds dS of one tile of rows and keys to the block's sum.
template <class M, class Storage>
inline void add_score_gradients(const BackwardParams& p, const BiasGradientBuffers<M>& t,
                                const Rows& rows, const RowFeatures<typename M::Acc>& features,
                                int64_t b, int64_t g, int64_t j0, int64_t count) {
  using Acc = typename M::Acc;
  constexpr int L = kLanes<Acc>;
  const Sizes& n = p.n;
  const int vectors = static_cast<int>(ceil_div(rows.count, L));
  pack_keys<M>(static_cast<const Storage*>(p.k), n, b, g, j0, count, n.d, t.key);
  pack_keys<M>(static_cast<const Storage*>(p.v), n, b, g, j0, count, n.dv, t.value);
  Ahead ahead;  // nothing
  matmul<M, false, Start::kZero>(even(count), vectors, ceil_div(n.d, M::kDepth), t.key, even(n.d),
                                 t.query, kRows * M::kDepth, t.score, kRows, ahead);
  matmul<M, false, Start::kZero>(even(count), vectors, ceil_div(n.dv, M::kDepth), t.value,
                                 even(n.dv), t.dout, kRows * M::kDepth, t.dprob, kRows, ahead);
  const TileFeatures<Acc> tile{p.features, features, key_coordinates(p.features, b),
                               j0,         count,    exponent_scale<Acc>(p.scale),
                               t.bias,     t.keep};
  prepare_tile<Storage>(tile, rows, b, g);
  const int64_t step = p.features.bias.j ? kRows : 0;
  for (int x = 0; x < vectors; ++x) {
    const LaneFeatures<M> lanes(tile, x);
    LaneInts<Acc> lo, hi;
    lane_limits<Acc>(rows, x, j0, &lo, &hi);
    const Vec<Acc> lse = load(t.lse + x * L), delta = load(t.delta + x * L);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t at = j * kRows + x * L;
      Vec<Acc> probability, steepness;
      const Vec<Acc> ds = featured_gradient(lanes, load(t.score + at), load(t.dprob + at), lse,
                                            delta, j, &probability, &steepness);
      Acc* const sum = t.sum + j * step + x * L;
      store(sum, load(sum) + (lanes_that_see(lo, hi, j) ? ds : Vec<Acc>{}));
    }
  }
}

// Rounds the block into place, summed over lanes where rows share a bias.
template <class Acc, class To>
inline void write_bias_block(const BackwardParams& p, Acc* sum, int64_t i0, int64_t j0,
                             int64_t offset) {
  constexpr int L = kLanes<Acc>;
  const Bias& bias = p.features.bias;
  const int64_t rows = bias.i ? min64(kRows, p.n.sq - i0) : 1;
  const int64_t keys = bias.j ? min64(kTileKeys, p.n.sk - j0) : 1;
  if (!bias.i)
    for (int64_t j = 0; j < keys; ++j)
      for (int l = 1; l < kRows; ++l) sum[j * kRows] += sum[j * kRows + l];
  for (int64_t l0 = 0; l0 < rows; l0 += L) {
    for (int64_t j = 0; j < keys; j += L) {
      Vec<Acc> square[L];
      for (int u = 0; u < L; ++u)
        square[u] = j + u < keys ? load(sum + (j + u) * kRows + l0) : Vec<Acc>{};
      transpose<Acc>(square);
      To* const to = static_cast<To*>(p.dbias) + offset + (i0 + l0) * bias.i + (j0 + j) * bias.j;
      for (int64_t l = 0; l < min64(L, rows - l0); ++l)
        store_some<Acc>(to + l * bias.i, keys - j, square[l]);
    }
  }
}

// The same of one tile of rows, for all keys.
template <class Storage, class Acc>
inline void write_bias_rows(const BackwardParams& p, Acc* sum, int64_t i0, int64_t offset) {
  with_bias_type<Storage>(p, [&](auto type) {
    for (int64_t j0 = 0; j0 < p.n.sk; j0 += kTileKeys)
      write_bias_block<Acc, decltype(type)>(p, sum + j0 * kRows, i0, j0, offset);
  });
}

template <class Storage>
void bias_gradient_block(const BackwardParams& p, const BiasBlocks& blocks, int64_t index) {
  using M = typename MathOf<Storage>::type;
  using Acc = typename M::Acc;
  const Sizes& n = p.n;
  const Bias& bias = p.features.bias;
  const BiasBlocks::Place at = blocks.place(index);
  const AxisRange bs(bias.b, at.b, n.b), gs(bias.g, at.g, n.g), rs(bias.r, at.r, n.r),
      is(bias.i, at.i, ceil_div(n.sq, kRows)), js(bias.j, at.j, ceil_div(n.sk, kTileKeys));
  const RowMap map(n, RowMap::whole_tiles(n.sq));
  const auto t = thread_buffers<BiasGradientBuffers<M>>(n, 1);
  const TileRegisters registers;
  fill(t.sum, kTileKeys * kRows, Acc(0));
  RowFeatures<Acc> features;
  const auto add_rows = [&](int64_t b, int64_t g, int64_t tile) {
    const Rows rows = tile_rows(map, n, p.mask, b, tile);
    const auto kind = [&](int64_t j0, int64_t j1) { return classify(rows.limits, j0, j1); };
    if (kind(js.begin * kTileKeys, min64(js.end * kTileKeys, n.sk)) == TileClass::kSkip) return;
    find_row_features(p.features, p.mask, n, rows, b, g, &features);
    load_statistics(p, rows, b, g, t.lse, t.delta);
    pack_columns<M>(static_cast<const Storage*>(p.q), rows, n, b, g, n.d, p.scale < 0, t.query);
    pack_columns<M>(static_cast<const Storage*>(p.dout), rows, n, b, g, n.dv, false, t.dout);
    for (int64_t y = js.begin; y < js.end; ++y) {
      const int64_t j0 = y * kTileKeys, count = min64(kTileKeys, n.sk - j0);
      if (kind(j0, j0 + count) != TileClass::kSkip)
        add_score_gradients<M, Storage>(p, t, rows, features, b, g, j0, count);
    }
  };
  for_pairs(bs, gs, [&](int64_t b, int64_t g) {
    for (int64_t r = rs.begin; r < rs.end; ++r)
      for (int64_t i = is.begin; i < is.end; ++i) add_rows(b, g, r * ceil_div(n.sq, kRows) + i);
  });
  const int64_t offset = at.b * bias.b + at.g * bias.g + at.r * bias.r;
  with_bias_type<Storage>(p, [&](auto type) {
    write_bias_block<Acc, decltype(type)>(p, t.sum, at.i * kRows, at.j * kTileKeys, offset);
  });
}

// Bias per key: dS [count][lanes] of one tile of rows, all of one query head, summed over lanes.
template <class Acc>
inline void add_key_biases(const BackwardParams& p, const KeyGradients<Acc>& to, const Acc* ds,
                           const Rows& rows, int64_t j0, int64_t count) {
  constexpr int L = kLanes<Acc>;
  const int64_t column = p.features.bias.r ? rows.head[0] : 0;
  for (int64_t j = 0; j < count; ++j) {
    Acc sum = 0;
    for (int l = 0; l < L; ++l) sum += ds[j * L + l];
    to.dbias(j0 + j)[column] += sum;
  }
}

// Bias per key: a block of it from what `finish` made of the tasks' shares.
template <class Storage>
void write_key_biases(const BackwardParams& p, const BiasBlocks& blocks, int64_t index) {
  using Acc = typename MathOf<Storage>::type::Acc;
  const Sizes& n = p.n;
  const Bias& bias = p.features.bias;
  const BiasBlocks::Place at = blocks.place(index);
  with_bias_type<Storage>(p, [&](auto type) {
    auto* const to =
        static_cast<decltype(type)*>(p.dbias) + at.b * bias.b + at.g * bias.g + at.r * bias.r;
    const int64_t end = min64(n.sk, (at.j + 1) * kTileKeys);
    for (int64_t j = at.j * kTileKeys; j < end; ++j) {
      Acc sum = 0;
      for_pairs(AxisRange(bias.b, at.b, n.b), AxisRange(bias.g, at.g, n.g),
                [&](int64_t b, int64_t g) {
                  const int64_t part = first_part<Acc>(p, b, g, j);
                  if (part < p.parts) sum += KeyGradients<Acc>(p, part, b, g).dbias(j)[at.r];
                });
      round_to(sum, to + j * bias.j);
    }
  });
}

template <class Storage>
void bias_gradient(const BackwardParams& p, Executor& executor) {
  if (!p.features.bias.data || is_bias_per_pair(p) || is_bias_summed_in_pass(p)) return;
  struct Context {
    const BackwardParams& p;
    BiasBlocks blocks;
  } context{p, BiasBlocks(p)};
  executor.run(
      context.blocks.count(), 2 * score_work(p.n),
      [](void* data, int64_t index) {
        const auto& x = *static_cast<const Context*>(data);
        if (x.p.bias_per_key) return write_key_biases<Storage>(x.p, x.blocks, index);
        bias_gradient_block<Storage>(x.p, x.blocks, index);
      },
      &context);
}

}  // namespace
}  // namespace jax_flashattn::cpu::FLASH_ISA
