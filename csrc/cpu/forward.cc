// Forward pass (docs/semantics.md S1 to S15) for one instruction set.
//
// One task is a group of tiles of query rows of one key head; a tile of keys is packed once for the
// group. Scores are kept transposed, keys down and rows across the lanes: S^T = K Q^T and
// O^T = V^T P^T. Row maxima, sums and masks then work lane by lane, and no product needs keys or
// values transposed. Memory: a few tiles per thread.
//
// kFeatured is the instance for softcap, ALiBi, bias, dropout and sinks: it turns raw products into
// scores in units of log2 before the maximum, so that its exponent scale is 1.
#include "cpu/features.h"
#include "cpu/passes.h"

namespace jax_flashattn::cpu::FLASH_ISA {
namespace {

template <class M>
struct ForwardBuffers {
  using T = typename M::T;
  using Acc = typename M::Acc;
  // Per tile of keys, used by one tile of rows after the other.
  T *key, *value, *probability;
  Acc *score, *correction;
  // Per tile of rows.
  T* query;
  Acc *out, *max, *sum;
  Acc* reference;  // of the exponents, as rounded: max times their scale
  // Of features.
  Acc* bias;
  uint64_t* keep;
  int64_t d, dv;

  ForwardBuffers(Arena& a, const Sizes& n, int64_t tiles)
      : key(a.take<T>(kTileKeys * even(n.d))),
        value(a.take<T>(kTileKeys * even(n.dv))),
        probability(M::kDepth == 1 ? nullptr : a.take<T>(kTileKeys * kRows)),
        score(a.take<Acc>(kTileKeys * kRows)),
        correction(a.take<Acc>(kRows)),
        query(a.take<T>(tiles * even(n.d) * kRows)),
        out(a.take<Acc>(tiles * even(n.dv) * kRows)),
        max(a.take<Acc>(tiles * kRows)),
        sum(a.take<Acc>(tiles * kRows)),
        reference(a.take<Acc>(tiles * kRows)),
        bias(a.take<Acc>(kTileKeys * kRows)),
        keep(a.take<uint64_t>(kTileKeys)),
        d(even(n.d)),
        dv(even(n.dv)) {
    if constexpr (M::kDepth == 1) probability = score;  // in place
  }
  ForwardBuffers of_tile(int64_t tile) const {
    ForwardBuffers t = *this;
    t.query += tile * d * kRows;
    t.out += tile * dv * kRows;
    t.max += tile * kRows;
    t.sum += tile * kRows;
    t.reference += tile * kRows;
    return t;
  }
};

// Online softmax of a panel's keys for kN vectors of its rows: scores become probabilities.
template <class M, int kN, bool kFeatured>
inline void softmax_vectors(const ForwardBuffers<M>& t, const Rows& rows, const Panel& panel,
                            const TileFeatures<typename M::Acc>& features, int vector,
                            typename M::Acc c) {
  using Acc = typename M::Acc;
  constexpr int L = kLanes<Acc>;
  constexpr Acc kInf = std::numeric_limits<Acc>::infinity();
  Acc* const s = t.score + vector * L;
  LaneInts<Acc> lo[kN], hi[kN];
  Vec<Acc> largest[kN], reference[kN], sum[kN];
  [[maybe_unused]] std::conditional_t<kFeatured, LaneFeatures<M>, char> lanes[kN];
  for (int n = 0; n < kN; ++n) {
    if constexpr (kFeatured) lanes[n] = LaneFeatures<M>(features, vector + n);
    lane_limits<Acc>(rows, vector + n, features.j0, &lo[n], &hi[n]);
    largest[n] = load(t.max + (vector + n) * L);
    sum[n] = Vec<Acc>{};
  }
  const auto sees = [&](int n, int64_t j) { return lanes_that_see(lo[n], hi[n], j); };
  for_key_ranges(panel, [&](auto partial, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      for (int n = 0; n < kN; ++n) {
        Vec<Acc> x = load(s + j * kRows + n * L);
        if constexpr (kFeatured) {
          x = lanes[n].score(x, j);
          store(s + j * kRows + n * L, x);
        }
        if constexpr (partial.value) x = sees(n, j) ? x : splat(-kInf);
        largest[n] = max(largest[n], x);
      }
    }
  });
  for (int n = 0; n < kN; ++n) {
    const int at = (vector + n) * L;
    const Vec<Acc> before = load(t.max + at);
    const Vec<Acc> nothing = splat(-kInf);
    reference[n] = (largest[n] == nothing ? Vec<Acc>{} : largest[n]) * c;
    const Vec<Acc> correction = exp2<M::kExpTerms>(load(t.reference + at) - reference[n]);
    store(t.max + at, largest[n]);
    store(t.reference + at, reference[n]);
    store(t.correction + at, before == nothing ? Vec<Acc>{} : correction);
  }
  for_key_ranges(panel, [&](auto partial, int64_t begin, int64_t end) {
    const auto probability = [&](int64_t j, int n) {
      Vec<Acc> p = exp2<M::kExpTerms>(load(s + j * kRows + n * L) * c - reference[n]);
      if constexpr (partial.value) p = sees(n, j) ? p : Vec<Acc>{};
      sum[n] += p;
      if constexpr (kFeatured) p = lanes[n].kept(p, j);  // the sum is of all (S12)
      return p;
    };
    for (int64_t j = begin; j < end; j += M::kDepth) {
      for (int n = 0; n < kN; ++n) {
        const Vec<Acc> first = probability(j, n);
        if constexpr (M::kDepth == 1) {
          store(s + j * kRows + n * L, first);
        } else {
          const Vec<Acc> second = j + 1 < end ? probability(j + 1, n) : Vec<Acc>{};
          store_rounded_pairs(t.probability + j * kRows + (vector + n) * L * 2, first, second);
        }
      }
    }
  });
  for (int n = 0; n < kN; ++n) {
    const int at = (vector + n) * L;
    store(t.sum + at, load(t.sum + at) * load(t.correction + at) + sum[n]);
  }
}

template <class M, bool kFeatured>
inline void softmax(const ForwardBuffers<M>& t, const Rows& rows, const Panel& panel,
                    const TileFeatures<typename M::Acc>& features, typename M::Acc c) {
  constexpr int L = kLanes<typename M::Acc>;
  int n = panel.row / L;
  const int end = n + static_cast<int>(ceil_div(panel.rows, L));
  for (; n + 4 <= end; n += 4) softmax_vectors<M, 4, kFeatured>(t, rows, panel, features, n, c);
  for (; n < end; ++n) softmax_vectors<M, 1, kFeatured>(t, rows, panel, features, n, c);
}

// O^T += V^T P^T over visible pairs only (S13): a masked 0 must not meet a NaN or inf in V.
template <class M, class Storage>
inline void add_visible_values(const ForwardBuffers<M>& t, const Storage* v, const Rows& rows,
                               const Panel& panel, const Sizes& n, int64_t b, int64_t g,
                               int64_t j0) {
  using Acc = typename M::Acc;
  for (int l = panel.row; l < panel.row + panel.rows; ++l) {
    for (int64_t x = 0; x < n.dv; ++x) t.out[x * kRows + l] *= t.correction[l];
    for (int64_t j = panel.begin; j < panel.end; ++j) {
      if (!visible(rows.visible[l], j0 + j)) continue;
      const auto p = t.probability[(j / M::kDepth * kRows + l) * M::kDepth + j % M::kDepth];
      const Storage* value = v + ((b * n.sk + j0 + j) * n.g + g) * n.dv;
      for (int64_t x = 0; x < n.dv; ++x)
        t.out[x * kRows + l] += static_cast<Acc>(to_float(p)) * to_float(value[x]);
    }
  }
}

template <class M, class Storage, bool kFeatured>
inline void write_rows(const ForwardBuffers<M>& t, const ForwardParams& p, const Rows& rows,
                       int64_t b, int64_t g) {
  using Acc = typename M::Acc;
  constexpr Acc kInf = std::numeric_limits<Acc>::infinity();
  const Acc kept = static_cast<Acc>(kept_scale(p.features));
  const Acc* const sinks = static_cast<const Acc*>(p.features.sinks);
  Acc inverse[kRows];
  for (int l = 0; l < kRows; ++l) {
    bool nothing = empty(rows.visible[l]);  // S11
    Acc rescale = 1;
    if constexpr (kFeatured) {
      nothing |= p.features.bias.data && t.max[l] == -kInf;
      if (sinks && !nothing && rows.head[l] >= 0)
        add_sink(sinks[(b * p.n.g + g) * p.n.r + rows.head[l]], &t.max[l], &t.sum[l], &rescale);
      rescale *= kept;
    }
    inverse[l] = nothing ? Acc(0) : rescale / t.sum[l];
    if (rows.head[l] < 0) continue;
    Acc& lse = static_cast<Acc*>(p.lse)[stat_offset(rows, p.n, b, g, l)];
    const Acc reference =
        kFeatured ? t.max[l] : t.reference[l];  // a sink may have raised the first
    lse = nothing ? -kInf : reference * Acc(kLn2) + log_of(t.sum[l]);  // S10
  }
  write_columns<Acc>(t.out, inverse, rows, p.n, b, g, p.n.dv, static_cast<Storage*>(p.out));
}

// Scores, softmax and output of one tile of rows and keys [j0, j0 + count), packed.
template <class Storage, bool kFeatured, class M, class Finite>
inline void add_tile(const ForwardBuffers<M>& t, const ForwardParams& p, const Rows& rows,
                     const RowFeatures<typename M::Acc>& features, int64_t b, int64_t g, int64_t j0,
                     int64_t count, const Finite& values_are_finite, Ahead& ahead) {
  using Acc = typename M::Acc;
  constexpr int D = M::kDepth;
  const Sizes& n = p.n;
  const Acc scale = exponent_scale<Acc>(p.scale), c = kFeatured ? Acc(1) : scale;
  const TileFeatures<Acc> tile{
      p.features, features, key_coordinates(p.features, b), j0, count, scale, t.bias, t.keep};
  if constexpr (kFeatured) prepare_tile<Storage>(tile, rows, b, g);
  for_panels(rows, j0, count, [&](const Panel& panel) {
    const int vectors = static_cast<int>(ceil_div(panel.rows, kLanes<Acc>));
    const int64_t keys = panel.end - panel.begin, at = panel.begin * kRows;
    matmul<M, false, Start::kZero>(
        even(keys), vectors, ceil_div(n.d, D), t.key + panel.begin * even(n.d), even(n.d),
        t.query + panel.row * D, kRows * D, t.score + at + panel.row, kRows, ahead);
    softmax<M, kFeatured>(t, rows, panel, tile, c);
    if (panel.partial() && !values_are_finite())
      return add_visible_values<M>(t, static_cast<const Storage*>(p.v), rows, panel, n, b, g, j0);
    multiply_reduced_keys<M, Start::kRescale>(panel, n.dv, t.value, t.probability, t.out, ahead,
                                              t.correction + panel.row);
  });
}

template <class Storage, bool kFeatured>
void forward_group(const ForwardParams& p, const RowMap& map, int64_t b, int64_t g, int64_t first,
                   int64_t tiles) {
  using M = typename MathOf<Storage>::type;
  using Acc = typename M::Acc;
  const Sizes& n = p.n;
  const auto* q = static_cast<const Storage*>(p.q);
  const auto* k = static_cast<const Storage*>(p.k);
  const auto* v = static_cast<const Storage*>(p.v);
  const auto buffers = thread_buffers<ForwardBuffers<M>>(n, tiles);
  const TileRegisters registers;

  Rows rows[kMostTiles];
  RowFeatures<Acc> features[kMostTiles];  // untouched unless featured
  TileLimits all = no_rows();
  for (int64_t x = 0; x < tiles; ++x) {
    rows[x] = tile_rows(map, n, p.mask, b, first + x);
    if constexpr (kFeatured) find_row_features(p.features, p.mask, n, rows[x], b, g, &features[x]);
    all = unite(all, rows[x].limits);
  }
  bool begun[kMostTiles] = {};
  const auto begin = [&](int64_t x) {
    if (begun[x]) return;
    begun[x] = true;
    const auto t = buffers.of_tile(x);
    pack_columns<M>(q, rows[x], n, b, g, n.d, p.scale < 0, t.query);
    fill(t.max, kRows, -std::numeric_limits<Acc>::infinity());
    fill(t.sum, kRows, Acc(0));
    fill(t.reference, kRows, Acc(0));
    fill(t.out, even(n.dv) * kRows, Acc(0));
  };

  for (int64_t j0 = all.min_lo; j0 < all.max_hi; j0 += kTileKeys) {
    const int64_t count = min64(kTileKeys, all.max_hi - j0);
    pack_keys<M>(k, n, b, g, j0, count, n.d, buffers.key);
    pack_reduced_keys<M>(v, n, b, g, j0, count, n.dv, buffers.value);
    const OnceKnown values_are_finite(
        [&] { return all_finite(buffers.value, reduced_elements<M>(count, n.dv)); });
    Ahead ahead;
    const int64_t next = j0 + kTileKeys, wanted = min64(kTileKeys, all.max_hi - next);
    for (int64_t x = 1; x < tiles; ++x)
      if (!begun[x]) want_rows(q, rows[x], n, b, g, n.d, &ahead);
    want_keys(k, n, b, g, next, wanted, n.d, &ahead);
    want_keys(v, n, b, g, next, wanted, n.dv, &ahead);
    for (int64_t x = 0; x < tiles; ++x) {
      if (classify(rows[x].limits, j0, j0 + count) == TileClass::kSkip) continue;
      begin(x);
      if (rows[x].limits.max_hi <= next)
        want_rows(static_cast<const Storage*>(p.out), rows[x], n, b, g, n.dv, &ahead);
      else if constexpr (kFeatured)
        want_bias<Storage>(p.features.bias, rows[x], b, g, next,
                           min64(kTileKeys, rows[x].limits.max_hi - next), &ahead);
      add_tile<Storage, kFeatured>(buffers.of_tile(x), p, rows[x], features[x], b, g, j0,
                                   min64(count, rows[x].limits.max_hi - j0), values_are_finite,
                                   ahead);
    }
  }
  for (int64_t x = 0; x < tiles; ++x) {
    begin(x);
    write_rows<M, Storage, kFeatured>(buffers.of_tile(x), p, rows[x], b, g);
  }
}

}  // namespace

void forward(const ForwardParams& p, Executor& executor) {
  with_instance(p, [&](auto element, auto featured) {
    for_row_groups<forward_group<decltype(element), featured.value>>(p, p.n.d + p.n.dv,
                                                                     2 * score_work(p.n), executor);
  });
}

}  // namespace jax_flashattn::cpu::FLASH_ISA
