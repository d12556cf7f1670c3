// Tangents of the output and lse (forward-mode differentiation) for one instruction set.
//
// With the lse known no maximum is needed: one pass over the visible keys sums, for each row,
//   dS = scale * (q . dk + dq . k) * softcap' + dbias,
//   dlse = sum_j P dS + dsink,   dout = sum_j F P (dS v + dv) - dlse * out,
// F the factor of dropout. Tasks, tiles and transposed scores are those of forward.cc; the products
// are S^T = K Q^T,  dS^T = dK Q^T + K dQ^T,  dO^T += V^T (F P dS)^T + dV^T (F P)^T.
//
// kFeatured is the instance for softcap, ALiBi, bias and dropout; sinks only show in lse and dsink.
#include "cpu/features.h"
#include "cpu/passes.h"

namespace jax_flashattn::cpu::FLASH_ISA {
namespace {

template <class M>
struct TangentBuffers {
  using T = typename M::T;
  using Acc = typename M::Acc;
  // Per tile of keys, used by one tile of rows after the other. A d is a tangent; `weight` is P,
  // `dweight` P dS, as they meet the values.
  T *key, *dkey, *value, *dvalue, *weight, *dweight;
  Acc *score, *dscore;
  // Per tile of rows.
  T *query, *dquery;
  Acc *out, *lse, *dlse;
  // Of features.
  Acc *bias, *dbias;
  uint64_t* keep;
  int64_t d, dv;

  TangentBuffers(Arena& a, const Sizes& n, int64_t tiles)
      : key(a.take<T>(kTileKeys * even(n.d))),
        dkey(a.take<T>(kTileKeys * even(n.d))),
        value(a.take<T>(kTileKeys * even(n.dv))),
        dvalue(a.take<T>(kTileKeys * even(n.dv))),
        score(a.take<Acc>(kTileKeys * kRows)),
        dscore(a.take<Acc>(kTileKeys * kRows)),
        query(a.take<T>(tiles * even(n.d) * kRows)),
        dquery(a.take<T>(tiles * even(n.d) * kRows)),
        out(a.take<Acc>(tiles * even(n.dv) * kRows)),
        lse(a.take<Acc>(tiles * kRows)),
        dlse(a.take<Acc>(tiles * kRows)),
        bias(a.take<Acc>(kTileKeys * kRows)),
        dbias(a.take<Acc>(kTileKeys * kRows)),
        keep(a.take<uint64_t>(kTileKeys)),
        d(even(n.d)),
        dv(even(n.dv)) {
    if constexpr (M::kDepth == 1) {  // in place
      weight = score;
      dweight = dscore;
    } else {
      weight = a.take<T>(kTileKeys * kRows);
      dweight = a.take<T>(kTileKeys * kRows);
    }
  }
  TangentBuffers of_tile(int64_t tile) const {
    TangentBuffers t = *this;
    t.query += tile * d * kRows;
    t.dquery += tile * d * kRows;
    t.out += tile * dv * kRows;
    t.lse += tile * kRows;
    t.dlse += tile * kRows;
    return t;
  }
};

// Probabilities from the given lse, and P dS, for one vector of a panel's rows; adds the latter to
// dlse.
template <class M, bool kFeatured>
inline void score_tangents(const TangentBuffers<M>& t, const Rows& rows, const Panel& panel,
                           const TileFeatures<typename M::Acc>& features, int vector,
                           typename M::Acc scale) {
  using Acc = typename M::Acc;
  const int at = vector * kLanes<Acc>;
  LaneInts<Acc> lo{}, hi{};
  lane_limits<Acc>(rows, vector, features.j0, &lo, &hi);
  const Vec<Acc> lse = load(t.lse + at);
  Vec<Acc> dlse = load(t.dlse + at);
  [[maybe_unused]] std::conditional_t<kFeatured, LaneFeatures<M>, char> lanes;
  if constexpr (kFeatured) lanes = LaneFeatures<M>(features, vector);
  for_key_ranges(panel, [&](auto partial, int64_t begin, int64_t end) {
    const auto one = [&](int64_t j, Vec<Acc>* p, Vec<Acc>* pds) {
      const Vec<Acc> score = load(t.score + j * kRows + at);
      Vec<Acc> ds = load(t.dscore + j * kRows + at) * scale;
      if constexpr (kFeatured) {
        Vec<Acc> steepness;
        *p = exp2<M::kExpTerms>(lanes.score(score, j, &steepness) - lse);
        ds *= steepness;
        if (features.f.bias.data) ds += load(t.dbias + j * kRows + at);
      } else {
        *p = exp2<M::kExpTerms>(score * features.scale - lse);
      }
      *pds = *p * ds;
      if constexpr (partial.value) {
        const auto sees = lanes_that_see(lo, hi, j);
        *p = sees ? *p : Vec<Acc>{};
        *pds = sees ? *pds : Vec<Acc>{};
      }
      dlse += *pds;
      if constexpr (kFeatured) {
        *p = lanes.kept(*p, j);
        *pds = lanes.kept(*pds, j);
      }
    };
    for (int64_t j = begin; j < end; j += M::kDepth) {
      Vec<Acc> p[M::kDepth] = {}, pds[M::kDepth] = {};
      for (int h = 0; h < M::kDepth && j + h < end; ++h) one(j + h, &p[h], &pds[h]);
      if constexpr (M::kDepth == 1) {
        store(t.weight + j * kRows + at, p[0]);
        store(t.dweight + j * kRows + at, pds[0]);
      } else {
        store_rounded_pairs(t.weight + j * kRows + at * 2, p[0], p[1]);
        store_rounded_pairs(t.dweight + j * kRows + at * 2, pds[0], pds[1]);
      }
    }
  });
  store(t.dlse + at, dlse);
}

// The products with values over visible pairs only (S13): a masked 0 must not meet a NaN or inf.
template <class M, class Storage>
inline void add_visible_values(const TangentBuffers<M>& t, const TangentParams& p, const Rows& rows,
                               const Panel& panel, int64_t b, int64_t g, int64_t j0) {
  using Acc = typename M::Acc;
  const Sizes& n = p.n;
  for (int l = panel.row; l < panel.row + panel.rows; ++l) {
    for (int64_t j = panel.begin; j < panel.end; ++j) {
      if (!visible(rows.visible[l], j0 + j)) continue;
      const int64_t at = (j / M::kDepth * kRows + l) * M::kDepth + j % M::kDepth;
      const Acc weight = to_float(t.weight[at]), dweight = to_float(t.dweight[at]);
      const int64_t row = ((b * n.sk + j0 + j) * n.g + g) * n.dv;
      const Storage* value = static_cast<const Storage*>(p.v) + row;
      const Storage* dvalue = static_cast<const Storage*>(p.dv) + row;
      for (int64_t x = 0; x < n.dv; ++x)
        t.out[x * kRows + l] += dweight * to_float(value[x]) + weight * to_float(dvalue[x]);
    }
  }
}

template <class M, class Storage>
inline void pack_tile(const TangentParams& p, const TangentBuffers<M>& t, const Rows& rows,
                      int64_t b, int64_t g) {
  using Acc = typename M::Acc;
  const Sizes& n = p.n;
  pack_columns<M>(static_cast<const Storage*>(p.q), rows, n, b, g, n.d, p.scale < 0, t.query);
  pack_columns<M>(static_cast<const Storage*>(p.dq), rows, n, b, g, n.d, p.scale < 0, t.dquery);
  for (int l = 0; l < kRows; ++l) {
    const Acc lse =
        rows.head[l] < 0
            ? Acc(0)
            : static_cast<const Acc*>(p.lse)[stat_offset(rows, n, b, g, l)] * Acc(kLog2e);
    // S11: where a bias of -inf hides everything, exp2(-inf - inf) is the probability 0.
    t.lse[l] = lse == -std::numeric_limits<Acc>::infinity() ? -lse : lse;
  }
  fill(t.dlse, kRows, Acc(0));
  fill(t.out, even(n.dv) * kRows, Acc(0));
}

// What one tile of rows and keys [j0, j0 + count), packed, add to the sums.
template <class Storage, bool kFeatured, class M, class Finite>
inline void add_tile(const TangentBuffers<M>& t, const TangentParams& p, const Rows& rows,
                     const RowFeatures<typename M::Acc>& features, int64_t b, int64_t g, int64_t j0,
                     int64_t count, const Finite& values_are_finite, Ahead& ahead) {
  using Acc = typename M::Acc;
  constexpr int D = M::kDepth;
  const Sizes& n = p.n;
  const TileFeatures<Acc> tile{p.features, features, key_coordinates(p.features, b),
                               j0,         count,    exponent_scale<Acc>(p.scale),
                               t.bias,     t.keep};
  if constexpr (kFeatured) {
    prepare_tile<Storage>(tile, rows, b, g);
    if (p.dbias.data) pack_bias<Storage>(tile, p.dbias, Acc(1), rows, b, g, t.dbias);
  }
  const Acc scale = static_cast<Acc>(p.scale < 0 ? -p.scale : p.scale);  // the query is flipped
  for_panels(rows, j0, count, [&](const Panel& panel) {
    const int vectors = static_cast<int>(ceil_div(panel.rows, kLanes<Acc>));
    const int64_t keys = panel.end - panel.begin, at = panel.begin * kRows;
    const auto scores = [&](auto start, const auto* key, const auto* query, Acc* to) {
      matmul<M, false, decltype(start)::value>(
          even(keys), vectors, ceil_div(n.d, D), key + panel.begin * even(n.d), even(n.d),
          query + panel.row * D, kRows * D, to + at + panel.row, kRows, ahead);
    };
    using Zero = std::integral_constant<Start, Start::kZero>;
    using Add = std::integral_constant<Start, Start::kAdd>;
    scores(Zero{}, t.key, t.query, t.score);
    scores(Zero{}, t.dkey, t.query, t.dscore);
    scores(Add{}, t.key, t.dquery, t.dscore);
    for (int x = 0; x < vectors; ++x)
      score_tangents<M, kFeatured>(t, rows, panel, tile, panel.row / kLanes<Acc> + x, scale);
    if (panel.partial() && !values_are_finite())
      return add_visible_values<M, Storage>(t, p, rows, panel, b, g, j0);
    const auto add_values = [&](const auto* value, const auto* weight) {
      multiply_reduced_keys<M, Start::kAdd>(panel, n.dv, value, weight, t.out, ahead);
    };
    add_values(t.value, t.dweight);
    add_values(t.dvalue, t.weight);
  });
}

template <class M, class Storage>
inline void write_rows(const TangentBuffers<M>& t, const TangentParams& p, const Rows& rows,
                       int64_t b, int64_t g) {
  using Acc = typename M::Acc;
  const Sizes& n = p.n;
  const Acc kept = static_cast<Acc>(kept_scale(p.features));
  Acc factor[kRows] = {};
  for (int l = 0; l < rows.count; ++l) {
    if (rows.head[l] < 0) continue;
    const int64_t at = stat_offset(rows, n, b, g, l);
    Acc& dlse = static_cast<Acc*>(p.dlse)[at];
    dlse = 0;
    const Acc lse = static_cast<const Acc*>(p.lse)[at];
    if (empty(rows.visible[l]) || lse == -std::numeric_limits<Acc>::infinity()) continue;  // S11
    dlse = t.dlse[l] + static_cast<const Acc*>(p.dsink)[at];
    factor[l] = 1;
    const Storage* out = static_cast<const Storage*>(p.out) + row_offset(rows, n, b, g, l, n.dv);
    for (int64_t x = 0; x < n.dv; ++x)
      t.out[x * kRows + l] = t.out[x * kRows + l] * kept - dlse * to_float(out[x]);
  }
  write_columns<Acc>(t.out, factor, rows, n, b, g, n.dv, static_cast<Storage*>(p.dout));
}

template <class Storage, bool kFeatured>
void tangent_group(const TangentParams& p, const RowMap& map, int64_t b, int64_t g, int64_t first,
                   int64_t tiles) {
  using M = typename MathOf<Storage>::type;
  using Acc = typename M::Acc;
  const Sizes& n = p.n;
  const auto buffers = thread_buffers<TangentBuffers<M>>(n, tiles);
  const TileRegisters registers;
  Rows rows[kMostTiles];
  RowFeatures<Acc> features[kMostTiles];  // untouched unless featured
  TileLimits all = no_rows();
  for (int64_t x = 0; x < tiles; ++x) {
    rows[x] = tile_rows(map, n, p.mask, b, first + x);
    if constexpr (kFeatured) find_row_features(p.features, p.mask, n, rows[x], b, g, &features[x]);
    all = unite(all, rows[x].limits);
    pack_tile<M, Storage>(p, buffers.of_tile(x), rows[x], b, g);
  }
  for (int64_t j0 = all.min_lo; j0 < all.max_hi; j0 += kTileKeys) {
    const int64_t count = min64(kTileKeys, all.max_hi - j0);
    const auto keys = [&](const void* src, auto* to) {
      pack_keys<M>(static_cast<const Storage*>(src), n, b, g, j0, count, n.d, to);
    };
    const auto values = [&](const void* src, auto* to) {
      pack_reduced_keys<M>(static_cast<const Storage*>(src), n, b, g, j0, count, n.dv, to);
    };
    keys(p.k, buffers.key);
    keys(p.dk, buffers.dkey);
    values(p.v, buffers.value);
    values(p.dv, buffers.dvalue);
    const OnceKnown values_are_finite([&] {
      const int64_t packed = reduced_elements<M>(count, n.dv);
      return all_finite(buffers.value, packed) && all_finite(buffers.dvalue, packed);
    });
    Ahead ahead;
    const int64_t next = j0 + kTileKeys, wanted = min64(kTileKeys, all.max_hi - next);
    for (const void* key : {p.k, p.dk})
      want_keys(static_cast<const Storage*>(key), n, b, g, next, wanted, n.d, &ahead);
    for (const void* value : {p.v, p.dv})
      want_keys(static_cast<const Storage*>(value), n, b, g, next, wanted, n.dv, &ahead);
    for (int64_t x = 0; x < tiles; ++x) {
      if (classify(rows[x].limits, j0, j0 + count) == TileClass::kSkip) continue;
      if constexpr (kFeatured) {
        for (const Bias& bias : {p.features.bias, p.dbias})
          want_bias<Storage>(bias, rows[x], b, g, next,
                             min64(kTileKeys, rows[x].limits.max_hi - next), &ahead);
      }
      add_tile<Storage, kFeatured>(buffers.of_tile(x), p, rows[x], features[x], b, g, j0,
                                   min64(count, rows[x].limits.max_hi - j0), values_are_finite,
                                   ahead);
    }
  }
  for (int64_t x = 0; x < tiles; ++x) write_rows<M, Storage>(buffers.of_tile(x), p, rows[x], b, g);
}

}  // namespace

void tangent(const TangentParams& p, Executor& executor) {
  with_instance(p, [&](auto element, auto featured) {
    for_row_groups<tangent_group<decltype(element), featured.value>>(p, 2 * p.n.d + p.n.dv,
                                                                     5 * score_work(p.n), executor);
  });
}

}  // namespace jax_flashattn::cpu::FLASH_ISA
