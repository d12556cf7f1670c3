// Backward pass for one instruction set, from global lse and delta (docs/semantics.md S10, S14).
//
// One task owns a share of the query tiles of one key head and walks their visible keys. Scores are
// transposed as in forward.cc; the five products are
//   S^T = K Q^T,  dP^T = V dO^T,  dV += P^T dO,  dK += dS^T Q,  dQ^T += K^T dS^T.
// dQ is finished per tile. dK and dV are summed over all query heads of the group in the task's own
// accumulators (scratch), which a second loop adds up in fixed order: no atomics, repeatable.
//
// kFeatured is the instance for softcap, ALiBi, bias and dropout; sinks only show in the lse.
#include "cpu/bias_gradient.h"
#include "cpu/passes.h"

namespace jax_flashattn::cpu::FLASH_ISA {
namespace {

template <class M>
struct BackwardBuffers {
  using T = typename M::T;
  using Acc = typename M::Acc;
  // Per tile of keys, used by one tile of rows after the other. _pairs: keys to reduce over.
  T *key, *key_pairs, *value, *p, *ds, *ds_pairs;
  Acc *score, *dprob;
  // Per tile of rows. _col: rows across lanes; _row: rows to reduce over.
  T *query_col, *dout_col, *query_row, *dout_row;
  Acc *dquery, *lse, *delta;
  // Of features.
  Acc *bias, *dbias, *bias_sum;  // bias_sum: [tiles][sk][kRows], or null
  uint64_t* keep;
  Sizes n;

  BackwardBuffers(Arena& a, const Sizes& n, int64_t tiles, bool sums_bias = false)
      : key(a.take<T>(kTileKeys * even(n.d))),
        key_pairs(M::kDepth == 1 ? key : a.take<T>(kTileKeys * even(n.d))),
        value(a.take<T>(kTileKeys * even(n.dv))),
        score(a.take<Acc>(kTileKeys * kRows)),
        dprob(a.take<Acc>(kTileKeys * kRows)),
        query_col(a.take<T>(tiles * even(n.d) * kRows)),
        dout_col(a.take<T>(tiles * even(n.dv) * kRows)),
        query_row(a.take<T>(tiles * padded_dim(n.d) * kRows)),
        dout_row(a.take<T>(tiles * padded_dim(n.dv) * kRows)),
        dquery(a.take<Acc>(tiles * even(n.d) * kRows)),
        lse(a.take<Acc>(tiles * kRows)),
        delta(a.take<Acc>(tiles * kRows)),
        bias(a.take<Acc>(kTileKeys * kRows)),
        dbias(a.take<Acc>(kTileKeys * kRows)),
        bias_sum(sums_bias ? a.take<Acc>(tiles * n.sk * kRows) : nullptr),
        keep(a.take<uint64_t>(kTileKeys)),
        n(n) {
    if constexpr (M::kDepth == 1) {  // in place
      p = score;
      ds = ds_pairs = dprob;
    } else {
      p = a.take<T>(kTileKeys * kRows);
      ds = a.take<T>(kTileKeys * kRows);
      ds_pairs = a.take<T>(kTileKeys * kRows);
    }
  }
  BackwardBuffers of_tile(int64_t tile) const {
    BackwardBuffers t = *this;
    t.query_col += tile * even(n.d) * kRows;
    t.dout_col += tile * even(n.dv) * kRows;
    t.query_row += tile * padded_dim(n.d) * kRows;
    t.dout_row += tile * padded_dim(n.dv) * kRows;
    t.dquery += tile * even(n.d) * kRows;
    t.lse += tile * kRows;
    t.delta += tile * kRows;
    if (t.bias_sum) t.bias_sum += tile * n.sk * kRows;
    return t;
  }
};

// Where dS of a tile goes for the gradient of a bias: keys down, `step` from one to the next. Rows
// lie side by side, or with a step of one vector in the same lanes, to be added up.
template <class Acc>
struct BiasSums {
  Acc* to;  // null: nowhere
  int64_t step;
  bool add;
};

// Probabilities from the given lse, and dS = P (dP - delta), for one vector of a panel's rows.
template <class M, bool kFeatured>
inline void score_gradients(const BackwardBuffers<M>& t, const Rows& rows, const Panel& panel,
                            const TileFeatures<typename M::Acc>& features,
                            const BiasSums<typename M::Acc>& sums, int vector) {
  using Acc = typename M::Acc;
  constexpr int L = kLanes<Acc>;
  const int at = vector * L;
  LaneInts<Acc> lo{}, hi{};
  lane_limits<Acc>(rows, vector, features.j0, &lo, &hi);
  const Vec<Acc> lse = load(t.lse + at), delta = load(t.delta + at);
  [[maybe_unused]] std::conditional_t<kFeatured, LaneFeatures<M>, char> lanes;
  if constexpr (kFeatured) lanes = LaneFeatures<M>(features, vector);
  for_key_ranges(panel, [&](auto partial, int64_t begin, int64_t end) {
    const auto seen = [&](int64_t j, Vec<Acc> x) {
      if constexpr (partial.value) x = lanes_that_see(lo, hi, j) ? x : Vec<Acc>{};
      return x;
    };
    const auto one = [&](int64_t j, Vec<Acc>* p, Vec<Acc>* ds) {
      const Vec<Acc> score = load(t.score + j * kRows + at), dprob = load(t.dprob + j * kRows + at);
      if constexpr (kFeatured) {
        Vec<Acc> steepness;
        *ds = featured_gradient(lanes, score, dprob, lse, delta, j, p, &steepness);
        if (sums.to) {
          Acc* const to = sums.to + j * sums.step + (sums.step == L ? 0 : at);
          store(to, sums.add ? load(to) + seen(j, *ds) : seen(j, *ds));
        }
        *ds *= steepness;
        *p = lanes.kept(*p, j);
      } else {
        *p = exp2<M::kExpTerms>(score * features.scale - lse);
        *ds = *p * (dprob - delta);
      }
      *p = seen(j, *p);
      *ds = seen(j, *ds);
    };
    for (int64_t j = begin; j < end; j += M::kDepth) {
      Vec<Acc> p[M::kDepth] = {}, ds[M::kDepth] = {};
      for (int h = 0; h < M::kDepth && j + h < end; ++h) one(j + h, &p[h], &ds[h]);
#pragma GCC unroll 2
      for (int h = 0; h < M::kDepth; ++h) {
        store_narrow(t.p + (j + h) * kRows + at, p[h]);
        store_narrow(t.ds + (j + h) * kRows + at, ds[h]);
      }
      if constexpr (M::kDepth == 2)
        store_rounded_pairs(t.ds_pairs + j * kRows + at * 2, ds[0], ds[1]);
    }
  });
}

// The three gradient products over visible pairs only (S13): used when a partial tile meets a value
// that is not finite, because a masked 0 times it would be NaN.
template <class M>
inline void add_visible_gradients(const BackwardBuffers<M>& t,
                                  const KeyGradients<typename M::Acc>& to, const Rows& rows,
                                  const Panel& panel, const Sizes& n, int64_t j0) {
  using Acc = typename M::Acc;
  constexpr int D = M::kDepth;
  const auto row_element = [&](const typename M::T* x, int64_t width, int l, int64_t e) {
    return static_cast<Acc>(to_float(x[l / D * D * padded_dim(width) + e * D + l % D]));
  };
  for (int l = panel.row; l < panel.row + panel.rows; ++l) {
    for (int64_t j = panel.begin; j < panel.end; ++j) {
      if (!visible(rows.visible[l], j0 + j)) continue;
      const Acc p = to_float(t.p[j * kRows + l]), ds = to_float(t.ds[j * kRows + l]);
      for (int64_t e = 0; e < n.dv; ++e)
        to.dv(j0 + j)[e] += p * row_element(t.dout_row, n.dv, l, e);
      for (int64_t e = 0; e < n.d; ++e) {
        to.dk(j0 + j)[e] += ds * row_element(t.query_row, n.d, l, e);
        t.dquery[e * kRows + l] += ds * static_cast<Acc>(to_float(t.key[j * even(n.d) + e]));
      }
    }
  }
}

template <class M, class Storage>
inline void pack_tile(const BackwardParams& p, const BackwardBuffers<M>& t, const Rows& rows,
                      int64_t b, int64_t g) {
  using Acc = typename M::Acc;
  const Sizes& n = p.n;
  const auto* q = static_cast<const Storage*>(p.q);
  const auto* dout = static_cast<const Storage*>(p.dout);
  pack_columns<M>(q, rows, n, b, g, n.d, p.scale < 0, t.query_col);
  pack_columns<M>(dout, rows, n, b, g, n.dv, false, t.dout_col);
  pack_rows<M>(q, rows, n, b, g, n.d, t.query_row);
  pack_rows<M>(dout, rows, n, b, g, n.dv, t.dout_row);
  load_statistics(p, rows, b, g, t.lse, t.delta);
  fill(t.dquery, even(n.d) * kRows, Acc(0));
}

// What one tile of rows and keys [j0, j0 + count), packed, add to the three gradients.
template <class Storage, bool kFeatured, class M, class Finite>
inline void add_tile(const BackwardBuffers<M>& t, const BackwardParams& p,
                     const KeyGradients<typename M::Acc>& to, const Rows& rows,
                     const RowFeatures<typename M::Acc>& features, int64_t b, int64_t g, int64_t j0,
                     int64_t count, const Finite& keys_are_finite, Ahead& ahead) {
  using Acc = typename M::Acc;
  constexpr int D = M::kDepth, L = kLanes<Acc>;
  const Sizes& n = p.n;
  const TileFeatures<Acc> tile{p.features, features, key_coordinates(p.features, b),
                               j0,         count,    exponent_scale<Acc>(p.scale),
                               t.bias,     t.keep};
  if constexpr (kFeatured) prepare_tile<Storage>(tile, rows, b, g);
  BiasSums<Acc> sums{};
  if constexpr (kFeatured) {
    if (t.bias_sum) sums = {t.bias_sum + j0 * kRows, kRows, true};
    if (is_bias_per_pair(p)) sums = {t.dbias, kRows, false};
    if (p.bias_per_key) sums = {t.dbias, L, true};
    const bool full = classify(rows.limits, j0, j0 + count) == TileClass::kFull;
    if (sums.to == t.dbias && (sums.add || !full)) fill(t.dbias, count * sums.step, Acc(0));
  }
  for_panels(rows, j0, count, [&](const Panel& panel) {
    const int vectors = static_cast<int>(ceil_div(panel.rows, L));
    const int64_t keys = panel.end - panel.begin, row_steps = vectors * L / D;
    const int64_t at = panel.begin * kRows + panel.row;  // of scores, and of P and dS by key
    const int64_t key_at = panel.begin * even(n.d);
    matmul<M, false, Start::kZero>(even(keys), vectors, ceil_div(n.d, D), t.key + key_at, even(n.d),
                                   t.query_col + panel.row * D, kRows * D, t.score + at, kRows,
                                   ahead);
    matmul<M, false, Start::kZero>(
        even(keys), vectors, ceil_div(n.dv, D), t.value + panel.begin * even(n.dv), even(n.dv),
        t.dout_col + panel.row * D, kRows * D, t.dprob + at, kRows, ahead);
    for (int x = 0; x < vectors; ++x)
      score_gradients<M, kFeatured>(t, rows, panel, tile, sums, panel.row / L + x);
    if (panel.partial() && !(rows.finite && keys_are_finite()))
      return add_visible_gradients<M>(t, to, rows, panel, n, j0);
    matmul<M, false, Start::kAdd>(even(keys), padded_dim(n.dv) / L, row_steps, t.p + at, kRows,
                                  t.dout_row + panel.row * padded_dim(n.dv), padded_dim(n.dv) * D,
                                  to.dv(j0 + panel.begin), to.pitch, ahead);
    matmul<M, false, Start::kAdd>(even(keys), padded_dim(n.d) / L, row_steps, t.ds + at, kRows,
                                  t.query_row + panel.row * padded_dim(n.d), padded_dim(n.d) * D,
                                  to.dk(j0 + panel.begin), to.pitch, ahead);
    multiply_reduced_keys<M, Start::kAdd>(panel, n.d, t.key_pairs, t.ds_pairs, t.dquery, ahead);
  });
  if constexpr (kFeatured) {
    if (is_bias_per_pair(p)) write_score_gradients<Storage>(p, t.dbias, rows, b, g, j0, count);
    if (p.bias_per_key) add_key_biases(p, to, t.dbias, rows, j0, count);
  }
}

template <class M, class Storage, bool kFeatured>
void backward_group(const BackwardParams& p, const RowMap& map, const BackwardBuffers<M>& buffers,
                    const KeyGradients<typename M::Acc>& to, int64_t b, int64_t g, int64_t first,
                    int64_t tiles) {
  using Acc = typename M::Acc;
  const Sizes& n = p.n;
  const auto* k = static_cast<const Storage*>(p.k);
  const auto* v = static_cast<const Storage*>(p.v);
  const TileRegisters registers;
  Rows rows[kMostTiles];
  int64_t begin[kMostTiles] = {}, end[kMostTiles] = {};  // the keys that were reached
  RowFeatures<Acc> features[kMostTiles];                 // untouched unless featured
  TileLimits all = no_rows();
  for (int64_t x = 0; x < tiles; ++x) {
    rows[x] = tile_rows(map, n, p.mask, b, first + x);
    all = unite(all, rows[x].limits);
    if constexpr (kFeatured) find_row_features(p.features, p.mask, n, rows[x], b, g, &features[x]);
  }
  const auto* q = static_cast<const Storage*>(p.q);
  const auto* dout = static_cast<const Storage*>(p.dout);
  const auto begin_tile = [&](int64_t x) {
    const auto t = buffers.of_tile(x);
    pack_tile<M, Storage>(p, t, rows[x], b, g);
    rows[x].finite = all_finite(t.query_row, kRows * padded_dim(n.d)) &&
                     all_finite(t.dout_row, kRows * padded_dim(n.dv));
  };
  for (int64_t j0 = all.min_lo / 2 * 2; j0 < all.max_hi; j0 += kTileKeys) {
    // Products write an even number of accumulator rows: tiles begin at an even key and have an
    // even count, except at the end of an odd number of keys, where the accumulators have a spare
    // row.
    const int64_t count = min64(kTileKeys, min64(n.sk - j0, even(all.max_hi - j0)));
    pack_keys<M>(k, n, b, g, j0, count, n.d, buffers.key);
    pack_keys<M>(v, n, b, g, j0, count, n.dv, buffers.value);
    if constexpr (M::kDepth == 2)
      pack_reduced_keys<M>(k, n, b, g, j0, count, n.d, buffers.key_pairs);
    const OnceKnown keys_are_finite(
        [&] { return all_finite(buffers.key, even(count) * even(n.d)); });
    Ahead ahead;
    const int64_t next = j0 + kTileKeys, wanted = min64(kTileKeys, all.max_hi - next);
    for (int64_t x = 1; x < tiles; ++x) {
      if (end[x] > 0) continue;
      want_rows(q, rows[x], n, b, g, n.d, &ahead);
      want_rows(dout, rows[x], n, b, g, n.dv, &ahead);
    }
    want_keys(k, n, b, g, next, wanted, n.d, &ahead);
    want_keys(v, n, b, g, next, wanted, n.dv, &ahead);
    ahead.want(to.dk(next), wanted, to.pitch * sizeof(Acc), to.pitch * sizeof(Acc));
    for (int64_t x = 0; x < tiles; ++x) {
      if (classify(rows[x].limits, j0, j0 + count) == TileClass::kSkip) continue;
      const int64_t reached = min64(count, even(rows[x].limits.max_hi - j0));
      if (end[x] == 0) {
        begin[x] = j0;
        begin_tile(x);
      }
      end[x] = j0 + reached;
      to.reach(j0, j0 + reached);
      if (rows[x].limits.max_hi <= next)
        want_rows(static_cast<const Storage*>(p.dq), rows[x], n, b, g, n.d, &ahead);
      else if constexpr (kFeatured)
        want_bias<Storage>(p.features.bias, rows[x], b, g, next,
                           min64(kTileKeys, rows[x].limits.max_hi - next), &ahead);
      add_tile<Storage, kFeatured>(buffers.of_tile(x), p, to, rows[x], features[x], b, g, j0,
                                   reached, keys_are_finite, ahead);
    }
  }
  for (int64_t x = 0; x < tiles; ++x) {
    if (end[x] == 0) begin_tile(x);
    Acc factor[kRows];
    fill(factor, kRows, static_cast<Acc>(p.scale));
    write_columns<Acc>(buffers.of_tile(x).dquery, factor, rows[x], n, b, g, n.d,
                       static_cast<Storage*>(p.dq));
    if constexpr (kFeatured)
      if (is_bias_per_pair(p)) clear_bias_rows<Storage>(p, rows[x], b, g, begin[x], end[x]);
  }
}

// Tiles of rows that share a packed tile of keys: what stays in the L2 cache.
inline int64_t tiles_per_group(const Sizes& n) {
  constexpr int64_t kBytes = 768 * 1024;
  return clamp<int64_t>(kBytes / ((3 * n.d + 2 * n.dv) * kRows * 4), 1, kMostTiles);
}

// Calls body(first, count) for the groups of `per_group` of `all` tiles that one part has. Groups
// are dealt out back and forth: under a causal mask every part gets as much to do.
template <class Body>
inline void for_share(int64_t all, int64_t per_group, int64_t part, int64_t parts,
                      const Body& body) {
  for (int64_t round = 0;; ++round) {
    const int64_t group = round * parts + (round % 2 == 0 ? part : parts - 1 - part);
    const int64_t first = group * per_group;
    if (first >= all) return;
    body(first, min64(per_group, all - first));
  }
}

// dQ, and each task's share of dK and dV: a task has part of the query tiles of one key head.
template <class M, class Storage, bool kFeatured>
void add_shares(const BackwardParams& p, Executor& executor) {
  struct Context {
    const BackwardParams& p;
    RowMap map;
    int64_t per_group;
  } context{p, p.bias_per_key ? RowMap(p.n, RowMap::whole_tiles(p.n.sq)) : RowMap(p.n),
            tiles_per_group(p.n)};
  executor.run(
      p.n.b * p.n.g * p.parts, 5 * score_work(p.n),
      [](void* data, int64_t index) {
        const auto& x = *static_cast<const Context*>(data);
        const Sizes& n = x.p.n;
        const int64_t part = index % x.p.parts, g = index / x.p.parts % n.g,
                      b = index / x.p.parts / n.g;
        const KeyGradients<typename M::Acc> to(x.p, part, b, g);
        to.clear();
        for_share(x.map.tiles(), x.per_group, part, x.p.parts, [&](int64_t first, int64_t tiles) {
          backward_group<M, Storage, kFeatured>(
              x.p, x.map, thread_buffers<BackwardBuffers<M>>(n, tiles), to, b, g, first, tiles);
        });
      },
      &context);
}

// The same, and the gradient of a bias that batch elements or heads share: a task has part of the
// query tiles of everything that reads its rows of the bias.
template <class M, class Storage>
void add_shares_and_bias(const BackwardParams& p, Executor& executor) {
  using Acc = typename M::Acc;
  constexpr int64_t kBytes = 2 << 20;  // of sums
  struct Context {
    const BackwardParams& p;
    RowMap map;
    int64_t per_head, per_group;
    BiasOwners owners;
  } context{p, RowMap(p.n, RowMap::whole_tiles(p.n.sq)), ceil_div(p.n.sq, kRows), 0, BiasOwners(p)};
  const int64_t fit = kBytes / (p.n.sk * kRows * static_cast<int64_t>(sizeof(Acc)));
  context.per_group =
      clamp<int64_t>(min64(ceil_div(context.per_head, p.parts), fit), 1, tiles_per_group(p.n));
  executor.run(
      context.owners.tasks, 5 * score_work(p.n),
      [](void* data, int64_t index) {
        const auto& x = *static_cast<const Context*>(data);
        const Sizes& n = x.p.n;
        const Bias& bias = x.p.features.bias;
        const int64_t part = index % x.p.parts, g0 = index / x.p.parts % x.owners.g,
                      b0 = index / x.p.parts / x.owners.g;
        const AxisRange bs(bias.b, b0, n.b), gs(bias.g, g0, n.g);
        for_pairs(bs, gs,
                  [&](int64_t b, int64_t g) { KeyGradients<Acc>(x.p, part, b, g).clear(); });
        for_share(x.per_head, x.per_group, part, x.p.parts, [&](int64_t i, int64_t tiles) {
          const auto buffers = thread_buffers<BackwardBuffers<M>>(n, tiles, true);
          for (int64_t r0 = 0; r0 < (bias.r ? n.r : 1); ++r0) {
            const AxisRange rs(bias.r, r0, n.r);
            fill(buffers.bias_sum, tiles * n.sk * kRows, Acc(0));
            for_pairs(bs, gs, [&](int64_t b, int64_t g) {
              for (int64_t r = rs.begin; r < rs.end; ++r)
                backward_group<M, Storage, true>(x.p, x.map, buffers,
                                                 KeyGradients<Acc>(x.p, part, b, g), b, g,
                                                 r * x.per_head + i, tiles);
            });
            for (int64_t t = 0; t < tiles; ++t)
              write_bias_rows<Storage>(x.p, buffers.of_tile(t).bias_sum, (i + t) * kRows,
                                       b0 * bias.b + g0 * bias.g + r0 * bias.r);
          }
        });
      },
      &context);
}

template <class Storage, bool kFeatured>
void backward_typed(const BackwardParams& p, Executor& executor) {
  using M = typename MathOf<Storage>::type;
  if (kFeatured && is_bias_summed_in_pass(p))
    add_shares_and_bias<M, Storage>(p, executor);
  else
    add_shares<M, Storage, kFeatured>(p, executor);
  finish<typename M::Acc, Storage>(p, executor);
  if constexpr (kFeatured) bias_gradient<Storage>(p, executor);
}

}  // namespace

void backward(const BackwardParams& p, Executor& executor) {
  with_instance(p, [&](auto element, auto featured) {
    backward_typed<decltype(element), featured.value>(p, executor);
  });
}

}  // namespace jax_flashattn::cpu::FLASH_ISA
