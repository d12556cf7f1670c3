// What softcap, ALiBi, bias and dropout do to a tile of transposed scores (docs/semantics.md S8,
// S9, S12). Calls without features never come here.
#pragma once

#include "cpu/tile.h"
#include "semantics/philox.h"

namespace jax_flashattn::cpu::FLASH_ISA {
namespace {

// What features need of one tile of rows, lane by lane.
template <class Acc>
struct RowFeatures {
  using Int = std::conditional_t<sizeof(Acc) == 8, int64_t, int32_t>;
  Int position[kRows];
  Acc slope[kRows];
  uint32_t counter[kRows], stream[4][kRows];  // of Philox
};

template <class Acc>
inline void find_row_features(const Features& f, const MaskSource& mask, const Sizes& n,
                              const Rows& rows, int64_t b, int64_t g, RowFeatures<Acc>* to) {
  for (int l = 0; l < kRows; ++l) {
    const bool real = rows.head[l] >= 0;
    const int64_t head = (b * n.g + g) * n.r + (real ? rows.head[l] : 0);
    const int32_t position =
        real ? aligned_position(f, mask, n, b, static_cast<int32_t>(rows.i[l])) : 0;
    to->position[l] = position;
    to->slope[l] = real && f.slopes ? static_cast<Acc>(f.slopes[head] * kLog2e) : Acc(0);
    to->counter[l] = static_cast<uint32_t>(position);
    for (int w = 0; w < 4; ++w) to->stream[w][l] = real && f.dropout ? f.dropout[head * 4 + w] : 0;
  }
}

// One tile of rows and keys [j0, j0 + count).
template <class Acc>
struct TileFeatures {
  const Features& f;
  const RowFeatures<Acc>& rows;
  KeyCoordinates keys;
  int64_t j0, count;
  Acc scale;       // of raw scores: scores are in units of log2
  Acc* bias;       // [kTileKeys][kRows], times log2(e)
  uint64_t* keep;  // [kTileKeys], bit l for row l
};

// `count` biases of one row as accumulators.
template <class Acc, class Storage>
inline Vec<Acc> load_bias(const Storage* p, int64_t stride, int64_t count) {
  if constexpr (sizeof(Acc) == sizeof(float) || sizeof(Storage) == sizeof(Acc))
    if (stride == 1 && count >= kLanes<Acc>) return load_wide(p);
  Vec<Acc> v{};
  for (int64_t j = 0; j < min64(count, kLanes<Acc>); ++j) v[j] = to_float(p[j * stride]);
  return v;
}

template <class Storage, class Acc>
inline void pack_bias_of(const TileFeatures<Acc>& t, const Bias& bias, Acc factor, const Rows& rows,
                         int64_t b, int64_t g, Acc* to) {
  constexpr int L = kLanes<Acc>;
  const auto* data = static_cast<const Storage*>(bias.data) + b * bias.b + g * bias.g;
  for (int l0 = 0; l0 < rows.count; l0 += L) {
    for (int64_t j = 0; j < t.count; j += L) {
      Vec<Acc> square[L];
      for (int l = 0; l < L; ++l) {
        const int64_t head = rows.head[l0 + l];
        const auto* row = data + head * bias.r + rows.i[l0 + l] * bias.i + (t.j0 + j) * bias.j;
        square[l] = head < 0 ? Vec<Acc>{} : load_bias<Acc>(row, bias.j, t.count - j);
      }
      transpose<Acc>(square);
      for (int u = 0; u < min64(L, t.count - j); ++u)
        store(to + (j + u) * kRows + l0, square[u] * factor);
    }
  }
}

// Asks for the part of a bias that rows of one head need of keys [j0, j0 + count).
template <class Storage>
inline void want_bias(const Bias& bias, const Rows& rows, int64_t b, int64_t g, int64_t j0,
                      int64_t count, Ahead* ahead) {
  if (!bias.data || bias.j != 1 || count <= 0) return;
  if (rows.count == 0 || rows.head[0] != rows.head[rows.count - 1]) return;
  const int64_t bytes = bias.dtype == DType::kF32 ? 4 : sizeof(Storage);
  const int64_t first =
      b * bias.b + g * bias.g + rows.head[0] * bias.r + rows.i[0] * bias.i + j0 * bias.j;
  ahead->want(static_cast<const char*>(bias.data) + first * bytes, bias.i ? rows.count : 1,
              count * bytes, bias.i * bytes);
}

// The tile's part of a bias or its tangent, transposed, times a factor, to [kTileKeys][kRows].
template <class Storage, class Acc>
inline void pack_bias(const TileFeatures<Acc>& t, const Bias& bias, Acc factor, const Rows& rows,
                      int64_t b, int64_t g, Acc* to) {
  if (bias.dtype == DType::kF32) return pack_bias_of<float>(t, bias, factor, rows, b, g, to);
  pack_bias_of<Storage>(t, bias, factor, rows, b, g, to);
}

// The calls of a vector of rows; even and odd rows go separately.
struct RowCalls {
  const uint32_t* counter;
  const uint32_t* stream[4];

  void operator()(uint32_t call, Vec<uint32_t> (&words)[4]) const {
    Vec<uint64_t> half[2][4];
    for (int odd = 0; odd < 2; ++odd) {
      const auto lanes = [&](const uint32_t* p) { return (Vec<uint64_t>)load(p) >> 32 * odd; };
      Vec<uint64_t>(&x)[4] = half[odd];
      x[0] = lanes(counter);
      x[1] = Vec<uint64_t>{} + call;
      x[2] = lanes(stream[2]);
      x[3] = lanes(stream[3]);
      philox(x, lanes(stream[0]), lanes(stream[1]), MultiplyLanes{});
    }
    for (int w = 0; w < 4; ++w)
      words[w] = (Vec<uint32_t>)((half[0][w] & 0xffffffffu) | (half[1][w] << 32));
  }
};

// S12: which scores of the tile stay.
template <class Acc>
inline void draw_keep(const TileFeatures<Acc>& t, int rows) {
  constexpr int L = kLanes<uint32_t>;
  const KeepBits keep(t.f.keep_threshold);
  if (!keep.some) return fill(t.keep, t.count, ~uint64_t(0));
  fill(t.keep, t.count, uint64_t(0));
  for (int l0 = 0; l0 < rows; l0 += L) {
    const RowCalls calls{t.rows.counter + l0,
                         {t.rows.stream[0] + l0, t.rows.stream[1] + l0, t.rows.stream[2] + l0,
                          t.rows.stream[3] + l0}};
    Vec<uint32_t> own[4], dropped;  // of the columns last drawn
    SharedBits<Vec<uint32_t>> shared;
    uint64_t shared_at = ~uint64_t(0), own_at = ~uint64_t(0), word_at = ~uint64_t(0);
    for (int64_t j = 0; j < t.count; ++j) {
      const auto column = static_cast<uint32_t>(t.keys.at(t.j0 + j));
      if (word_at != column / kDropoutWord) {
        word_at = column / kDropoutWord;
        if (shared_at != column / kDropoutShared) {
          shared_at = column / kDropoutShared;
          Vec<uint32_t> first[4], second[4];
          calls(shared_counter(column, 0), first);
          calls(shared_counter(column, 1), second);
          take_shared(first, second, keep, &shared);
        }
        if (own_at != column / kDropoutOwn) {
          own_at = column / kDropoutOwn;
          calls(own_counter(column), own);
        }
        dropped = dropped_word(own[word_at % 4], shared, keep);
      }
      const Vec<uint32_t> flag = ~dropped << (31 - column % kDropoutWord);
      const uint64_t kept = lane_signs((Vec<int32_t>)flag);
      t.keep[j] |= kept << l0;
    }
  }
}

// Everything that a tile needs before its scores are touched.
template <class Storage, class Acc>
inline void prepare_tile(const TileFeatures<Acc>& t, const Rows& rows, int64_t b, int64_t g) {
  if (t.f.bias.data) pack_bias<Storage>(t, t.f.bias, Acc(kLog2e), rows, b, g, t.bias);
  if (t.f.dropout) draw_keep(t, rows.count);
}

// One vector of rows of the tile.
template <class M>
class LaneFeatures {
  using Acc = typename M::Acc;
  using Ints = LaneInts<Acc>;
  static constexpr int L = kLanes<Acc>;

 public:
  LaneFeatures() = default;
  LaneFeatures(const TileFeatures<Acc>& t, int vector)
      : t_(&t),
        at_(vector * L),
        cap_in_(t.f.softcap > 0 ? static_cast<Acc>(2 * t.scale / t.f.softcap) : Acc(0)),
        cap_out_(static_cast<Acc>(t.f.softcap * kLog2e)),
        kept_scale_(static_cast<Acc>(kept_scale(t.f))),
        slope_(load(t.rows.slope + at_)),
        position_(load(t.rows.position + at_)) {
    for (int l = 0; l < L; ++l) bit_[l] = int64_t(1) << l;
  }

  // S8: the score of a raw product; `steepness` gets the derivative of the softcap.
  Vec<Acc> score(Vec<Acc> raw, int64_t j, Vec<Acc>* steepness = nullptr) const {
    Vec<Acc> x = raw * t_->scale;
    if (t_->f.softcap > 0) {
      x = tanh_of_exponent<M::kExpTerms, Acc>(raw * cap_in_, steepness) * cap_out_;
    } else if (steepness) {
      *steepness = splat(Acc(1));
    }
    if (t_->f.slopes) {
      const Ints away = position_ - t_->keys.at(t_->j0 + j);
      x -= slope_ * __builtin_convertvector(away < 0 ? -away : away, Vec<Acc>);
    }
    if (t_->f.bias.data) x += load(t_->bias + j * kRows + at_);
    return x;
  }

  // S12: x times the scale where the score is kept, 0 elsewhere.
  Vec<Acc> kept(Vec<Acc> x, int64_t j) const {
    if (t_->f.dropout == nullptr) return x;
    using Int = std::remove_reference_t<decltype(bit_[0])>;
    const Ints bits = Ints{} + static_cast<Int>(t_->keep[j] >> at_);
    return (bits & bit_) != 0 ? x : Vec<Acc>{};
  }
  Vec<Acc> kept_and_scaled(Vec<Acc> x, int64_t j) const {
    return t_->f.dropout ? kept(x * kept_scale_, j) : x;
  }

 private:
  const TileFeatures<Acc>* t_;
  int at_;
  Acc cap_in_, cap_out_, kept_scale_;
  Vec<Acc> slope_;
  Ints position_, bit_{};
};

// S15: a sink joins the sum, and maybe raises the maximum; `max` is in units of log2.
template <class Acc>
inline void add_sink(Acc sink, Acc* max, Acc* sum, Acc* rescale) {
  const Acc before = *max;
  sink *= Acc(kLog2e);
  *max = before > sink ? before : sink;
  *rescale = before > sink ? Acc(1) : exp2_of(before - *max);
  *sum = *sum * *rescale + exp2_of(sink - *max);
}

}  // namespace
}  // namespace jax_flashattn::cpu::FLASH_ISA
