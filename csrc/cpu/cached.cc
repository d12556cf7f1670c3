// Forward pass over a cache for few query rows (decode), for one instruction set.
//
// Memory decides its speed: every key and value is read once, where it lies, by all query rows that
// use it. One task is a sequence, a few key heads (neighbours in memory), all their query rows and
// one part of the keys; parts are merged in order afterwards, so that results do not depend on the
// number of threads. Head dims run along the lanes: S = Q K^T by dot products over registers,
// O += P V row by row (cpu/cached_products.h).
//
// Scores are in units of log2. What a row does not see is never multiplied (S13): a tile of keys
// that only some rows see is taken row by row.
#include "cpu/cached_products.h"
#include "cpu/features.h"
#include "cpu/passes.h"

namespace jax_flashattn::cpu::FLASH_ISA {
namespace {

constexpr int64_t kRowBytes = 4096;  // of one position, wanted for a task: whole pages of memory
constexpr int64_t kTaskRows = 64;    // query rows of a task, unless one head has more

// The shape of the work: fixed by sizes, never by threads.
struct Plan {
  int64_t rows;    // of one key head: r * sq
  int64_t heads;   // key heads of a task
  int64_t groups;  // tasks that share a sequence and a part
  Plan(const Sizes& n, int64_t element) {
    rows = n.r * n.sq;
    const int64_t wanted = min64(kRowBytes / (n.d * element), kTaskRows / (rows > 0 ? rows : 1));
    heads = clamp<int64_t>(wanted, 1, n.g > 0 ? n.g : 1);
    groups = ceil_div(n.g, heads);
  }
};

// Unfinished results of one part, in scratch [b, parts, g * r * sq, padded + 2]: sums of p v, then
// the maximum and the sum of p.
template <class Acc>
struct Partials {
  Acc* data;
  int64_t parts, rows, width;
  explicit Partials(const CachedParams& p)
      : data(static_cast<Acc*>(p.scratch)),
        parts(p.parts),
        rows(p.n.g * p.n.r * p.n.sq),
        width(cached_columns(p.n.dv) + 2) {}
  Acc* row(int64_t b, int64_t part, int64_t row) const {
    return data + ((b * parts + part) * rows + row) * width;
  }
};

template <class Storage>
struct Task {
  using P = Products<Storage>;
  using Acc = typename P::Acc;
  using T = typename P::T;
  using Weight = typename P::Weight;
  static constexpr int64_t kKeys = P::kKeys, kPitch = P::kQueryPitch;

  const CachedParams& p;
  const Plan& plan;
  int64_t b, first_head, heads;
  int64_t d, dv;  // padded
  int64_t from, to;
  // Of the thread. Rows are [heads][r][sq].
  T* query;
  Acc *score, *out, *max, *sum;  // sum: one of each lane
  Weight* weight;
  struct Places {
    int64_t *key, *value;  // [kKeys], offsets of this task's heads
  } here, next;
  Interval* limits;  // [sq]

  Task(Arena& a, const CachedParams& p, const Plan& plan)
      : p(p), plan(plan), d(P::padded(p.n.d)), dv(P::padded(p.n.dv)) {
    const int64_t rows = plan.heads * plan.rows;
    query = a.take<T>(rows * kPitch);
    score = a.take<Acc>(rows * kKeys);
    out = a.take<Acc>(rows * dv);
    max = a.take<Acc>(rows);
    sum = a.take<Acc>(rows * kLanes<Acc>);
    weight = a.take<Weight>(rows * kKeys);
    for (Places* places : {&here, &next}) {
      places->key = a.take<int64_t>(kKeys);
      places->value = a.take<int64_t>(kKeys);
    }
    limits = a.take<Interval>(p.n.sq);
  }

  int64_t rows() const { return heads * plan.rows; }
  int64_t row_of(int64_t row) const { return row % p.n.sq; }
  int64_t head_of(int64_t row) const { return first_head * p.n.r + row / p.n.sq; }  // query head

  // What the rows of a part see together.
  TileLimits find_limits() {
    TileLimits all = no_rows();
    for (int64_t i = 0; i < p.n.sq; ++i) {
      limits[i] = row_interval(p.mask, p.n, b, static_cast<int32_t>(i));
      all = add_row(all, limits[i]);
    }
    return all;
  }

  void start() {
    const auto* q = static_cast<const Storage*>(p.q);
    for (int64_t row = 0; row < rows(); ++row) {
      const int64_t at = (b * p.n.sq + row_of(row)) * p.n.g * p.n.r + head_of(row);
      for (int64_t c = 0; c < d; ++c)
        query[row * kPitch + c] = c < p.n.d ? as_operand<Storage, T>(q[at * p.n.d + c]) : T(0);
    }
    fill(out, rows() * dv, Acc(0));
    fill(max, rows(), -std::numeric_limits<Acc>::infinity());
    fill(sum, rows() * kLanes<Acc>, Acc(0));
  }

  // Where the keys of a tile lie; behind its end the last one again. Ids out of range are clamped.
  void locate(int64_t j0, Places* places) {
    int64_t row = 0, left = 0;  // of the cache; of its block
    for (int64_t j = 0; j < kKeys; ++j, ++row, --left) {
      const int64_t at = j0 + j;
      if (at >= to) {
        --row;
      } else if (left == 0) {
        const int64_t block = clamp<int64_t>(p.pages.block(b, at), 0, p.pages.blocks - 1);
        left = p.pages.size - at % p.pages.size;
        row = (block + 1) * p.pages.size - left;
      }
      places->key[j] = (row * p.n.g + first_head) * p.n.d;
      places->value[j] = (row * p.n.g + first_head) * p.n.dv;
    }
  }

  // Raw products of all rows; key by key, because the heads of one key are neighbours.
  void multiply_keys(int64_t count) {
    const auto* k = static_cast<const Storage*>(p.k);
    auto values = stream(p.v, here.value, count, p.n.dv);
    for (int64_t j = 0; j < count; j += P::kBlock)
      for (int64_t h = 0; h < heads; ++h)
        P::scores(query + h * plan.rows * kPitch, plan.rows, k + h * p.n.d, here.key + j, p.n.d,
                  score + h * plan.rows * kKeys + j, values);
  }

  typename P::Stream stream(const void* base, const int64_t* at, int64_t count, int64_t width) {
    const auto bytes = static_cast<int64_t>(heads * width * sizeof(Storage));
    return {base, at, count, bytes};
  }

  // S8: products become scores; then weights, relative to the row's largest score so far.
  void softmax(int64_t row, int64_t j0, int64_t begin, int64_t end) {
    constexpr int L = kLanes<Acc>;
    constexpr Acc kInf = std::numeric_limits<Acc>::infinity();
    using Int = std::conditional_t<sizeof(Acc) == 8, int64_t, int32_t>;
    using Ints = LaneInts<Acc>;
    const Features& f = p.features;
    const int64_t head = b * p.n.g * p.n.r + head_of(row);
    const Acc scale = static_cast<Acc>(p.scale * kLog2e);
    const Acc cap_in = static_cast<Acc>(2 / f.softcap),
              cap_out = static_cast<Acc>(f.softcap * kLog2e);
    Vec<Acc>* const no_derivative = nullptr;
    const Acc slope = f.slopes ? static_cast<Acc>(f.slopes[head] * kLog2e) : Acc(0);
    const int32_t position =
        f.slopes ? aligned_position(f, p.mask, p.n, b, static_cast<int32_t>(row_of(row))) : 0;
    const KeyCoordinates keys = key_coordinates(f, b);
    Ints lane;
    for (int l = 0; l < L; ++l) lane[l] = l;
    Acc* const s = score + row * kKeys;
    Vec<Acc> largest = splat(max[row]);
    for (int64_t j = begin / L * L; j < end; j += L) {
      Vec<Acc> x = load(s + j) * scale;
      if (f.softcap > 0)
        x = tanh_of_exponent<P::kExpTerms, Acc>(x * cap_in, no_derivative) * cap_out;
      if (f.slopes) {
        Ints away;
        for (int l = 0; l < L; ++l) away[l] = key_distance(position, keys.at(j0 + j + l));
        x -= slope * __builtin_convertvector(away, Vec<Acc>);
      }
      const Ints visible =
          (lane >= static_cast<Int>(begin - j)) & (lane < static_cast<Int>(end - j));
      x = visible ? x : splat(-kInf);
      store(s + j, x);
      largest = FLASH_ISA::max(largest, x);
    }
    Acc reference = largest_lane<Acc>(largest, std::make_integer_sequence<int, L>{});
    const Acc before = max[row];
    max[row] = reference;
    if (reference == -kInf) reference = 0;
    if (before != max[row]) {
      const Acc correction = before == -kInf ? Acc(0) : exp2_of(before - reference);
      store(sum + row * L, load(sum + row * L) * correction);
      for (int64_t c = 0; c < dv; c += L)
        store(out + row * dv + c, load(out + row * dv + c) * correction);
    }
    Vec<Acc> total = load(sum + row * L);
    for (int64_t j = begin / L * L; j < end; j += L) {
      const Vec<Acc> x = exp2<P::kExpTerms>(load(s + j) - reference);
      total += x;
      store_narrow(weight + row * kKeys + j, x);
    }
    store(sum + row * L, total);
  }

  // S5: all rows of a tile at once if all see all of it, else each row what it sees.
  void add_tile(int64_t j0, int64_t count, bool full) {
    std::swap(here, next);
    locate(j0 + kKeys < to ? j0 + kKeys : j0, &next);
    multiply_keys(count);
    const auto* v = static_cast<const Storage*>(p.v);
    auto keys = stream(p.k, next.key, min64(kKeys, to - j0 - count), p.n.d);
    const auto clipped = [&](int32_t j) { return clamp<int64_t>(j - j0, 0, count); };
    for (int64_t row = 0; row < rows(); ++row) {
      const Interval seen = limits[row_of(row)];
      const int64_t begin = full ? 0 : clipped(seen.lo), end = full ? count : clipped(seen.hi);
      if (begin >= end) continue;
      softmax(row, j0, begin, end);
      if (full) continue;
      P::add_values(weight + row * kKeys + begin, 1, v + row / plan.rows * p.n.dv,
                    here.value + begin, end - begin, p.n.dv, out + row * dv, dv, keys);
    }
    if (!full) return;
    for (int64_t h = 0; h < heads; ++h)
      P::add_values(weight + h * plan.rows * kKeys, plan.rows, v + h * p.n.dv, here.value, count,
                    p.n.dv, out + h * plan.rows * dv, dv, keys);
  }

  void run(int64_t task) {
    const int64_t group = task % plan.groups, part = task / plan.groups % p.parts;
    b = task / plan.groups / p.parts;
    first_head = group * plan.heads;
    heads = min64(plan.heads, p.n.g - first_head);
    const TileLimits all = find_limits();
    const int64_t length = all.max_hi > all.min_lo ? all.max_hi - all.min_lo : 0;
    const int64_t share = ceil_div(ceil_div(length, p.parts), kKeys) * kKeys;
    from = all.min_lo + part * share;
    to = min64(all.max_hi, from + share);
    if (length > 0 && from < to) {
      start();
      locate(from, &next);
    }
    for (int64_t j0 = from; length > 0 && j0 < to; j0 += kKeys) {
      const int64_t count = min64(kKeys, to - j0);
      add_tile(j0, count, classify(all, j0, j0 + count) == TileClass::kFull);
    }
    const Partials<Acc> partials(p);
    for (int64_t row = 0; row < rows(); ++row) {
      Acc* const to_row = partials.row(b, part, first_head * plan.rows + row);
      Acc* const statistics = to_row + partials.width - 2;
      const bool none = length == 0 || from >= to;
      if (!none) std::memcpy(to_row, out + row * dv, dv * sizeof(Acc));
      statistics[0] = none ? -std::numeric_limits<Acc>::infinity() : max[row];
      statistics[1] = 0;
      for (int l = 0; l < kLanes<Acc> && !none; ++l) statistics[1] += sum[row * kLanes<Acc> + l];
    }
  }
};

// Parts of one row in order, its sink, and the results.
template <class Storage>
void merge_row(const CachedParams& p, int64_t index) {
  using P = Products<Storage>;
  using Acc = typename P::Acc;
  constexpr Acc kInf = std::numeric_limits<Acc>::infinity();
  const Sizes& n = p.n;
  const int64_t columns = cached_columns(n.dv), used = P::padded(n.dv);
  const Partials<Acc> partials(p);
  const int64_t b = index / partials.rows, row = index % partials.rows;
  const int64_t head = row / n.sq, i = row % n.sq;
  Acc max = -kInf, sum = 0, rescale = 1;
  alignas(64) Acc out[kMaxHeadDim + 32] = {};
  for (int64_t part = 0; part < partials.parts; ++part)
    max = max > partials.row(b, part, row)[columns] ? max : partials.row(b, part, row)[columns];
  for (int64_t part = 0; part < partials.parts; ++part) {
    const Acc* const from = partials.row(b, part, row);
    if (from[columns] == -kInf) continue;
    const Acc weight = exp2_of(from[columns] - max);
    sum += weight * from[columns + 1];
    for (int64_t c = 0; c < used; ++c) out[c] += weight * from[c];
  }
  const bool nothing = empty(row_interval(p.mask, n, b, static_cast<int32_t>(i)));  // S11
  const auto* const sinks = static_cast<const Acc*>(p.features.sinks);
  if (sinks && !nothing) add_sink(sinks[b * n.g * n.r + head], &max, &sum, &rescale);
  const Acc factor = nothing ? Acc(0) : rescale / sum;
  auto* const to = static_cast<Storage*>(p.out) + ((b * n.sq + i) * n.g * n.r + head) * n.dv;
  for (int64_t c = 0; c < n.dv; ++c) round_to(out[P::column(c)] * factor, to + c);
  static_cast<Acc*>(p.lse)[(b * n.g * n.r + head) * n.sq + i] =
      nothing ? -kInf : max * Acc(kLn2) + log_of(sum);  // S10
}

template <class Storage>
void cached_typed(const CachedParams& p, Executor& executor) {
  struct Context {
    const CachedParams& p;
    Plan plan;
  } x{p, Plan(p.n, sizeof(Storage))};
  executor.run(
      p.n.b * p.parts * x.plan.groups, 2 * score_work(p.n),
      [](void* data, int64_t index) {
        const auto& x = *static_cast<const Context*>(data);
        Arena count{nullptr};
        Task<Storage>(count, x.p, x.plan);
        Arena arena{static_cast<char*>(thread_buffer(count.used))};
        Task<Storage>(arena, x.p, x.plan).run(index);
      },
      &x);
  const int64_t rows = p.n.b * p.n.g * p.n.r * p.n.sq;
  executor.run(
      rows, static_cast<double>(rows) * p.parts * p.n.dv,
      [](void* data, int64_t index) {
        merge_row<Storage>(static_cast<const Context*>(data)->p, index);
      },
      &x);
}

}  // namespace

void cached(const CachedParams& p, Executor& executor) {
  with_element(p.dtype, [&](auto element) { return cached_typed<decltype(element)>(p, executor); });
}

}  // namespace jax_flashattn::cpu::FLASH_ISA
