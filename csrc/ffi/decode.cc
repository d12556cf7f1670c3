#include "ffi/decode.h"

#include <algorithm>
#include <sstream>

namespace jax_flashattn {
namespace {

namespace ffi = xla::ffi;

template <class Dims>
std::string shape_text(const Dims& dims) {
  std::ostringstream text;
  text << "[";
  const char* separator = "";
  for (int64_t d : dims) {
    text << separator << d;
    separator = ", ";
  }
  text << "]";
  return text.str();
}

bool to_dtype(ffi::DataType type, DType* out) {
  switch (type) {
    case ffi::DataType::F16:
      *out = DType::kF16;
      return true;
    case ffi::DataType::BF16:
      *out = DType::kBF16;
      return true;
    case ffi::DataType::F32:
      *out = DType::kF32;
      return true;
    case ffi::DataType::F64:
      *out = DType::kF64;
      return true;
    default:
      return false;
  }
}

using Dims = std::vector<int64_t>;

// Operands that all passes share. Behind them the backward has dout, lse, delta; the tangent out,
// lse, dq, dk, dv, dbias, dsink.
enum Operand : size_t {
  kQuery,
  kKey,
  kValue,
  kLengths,
  kLo,
  kHi,
  kPosition,
  kKeyCoordinates,
  kSlopes,
  kSinks,
  kDropout,
  kBias,
  kOperands,
};

ffi::AnyBuffer operand(const Call& call, size_t index) {  // the count is checked before
  return *call.operands.get<ffi::AnyBuffer>(index);
}

// The two forms of a call (jax_flashattn/_partition.py): the user's shapes, or logical shapes that
// start with (b, g). The bytes are the same.
struct Form {
  Sizes n;
  bool logical;
  const Pages* pages;  // of keys and values, or null
  Dims rows(int64_t width) const {
    return logical ? Dims{n.b, n.g, n.r, n.sq, width} : Dims{n.b, n.sq, n.g * n.r, width};
  }
  Dims keys(int64_t width) const {
    if (pages) return {pages->blocks, pages->size, n.g, width};
    return logical ? Dims{n.b, n.g, n.sk, width} : Dims{n.b, n.sk, n.g, width};
  }
  Dims statistic() const {
    return logical ? Dims{n.b, n.g, n.r, n.sq} : Dims{n.b, n.g * n.r, n.sq};
  }
  // In the logical form every head of a batch holds the same, `pitch` elements in all.
  Dims batches(int64_t width) const { return logical ? Dims{n.b, n.g, width} : Dims{n.b, width}; }
  int64_t pitch(int64_t width) const { return logical ? n.g * width : width; }
  Dims heads() const { return logical ? Dims{n.b, n.g, n.r} : Dims{n.b, n.g * n.r}; }
  Dims heads(int64_t width) const {
    Dims dims = heads();
    dims.push_back(width);
    return dims;
  }
};

bool absent(ffi::AnyBuffer buffer) {
  const auto dims = buffer.dimensions();
  return dims.size() > 0 && dims[dims.size() - 1] == 0;
}

// An operand that may be absent: then its last dimension is 0, and `data` null.
template <class T>
ffi::Error optional(const char* name, ffi::AnyBuffer buffer, const Dims& dims, ffi::DataType type,
                    const T** data) {
  *data = nullptr;
  if (absent(buffer)) return ffi::Error::Success();
  if (auto e = expect(name, buffer, dims, type); e.failure()) return e;
  *data = static_cast<const T*>(buffer.untyped_data());
  return ffi::Error::Success();
}

// Sizes from the shapes of query, key and value; false unless they fit one form.
bool read_form(const Call& call, Form* form) {
  const auto qb = operand(call, kQuery), kb = operand(call, kKey), vb = operand(call, kValue);
  const auto q = qb.dimensions(), k = kb.dimensions(), v = vb.dimensions();
  if ((q.size() != 4 && q.size() != 5) || k.size() != 4 || v.size() != 4) return false;
  form->logical = q.size() == 5;
  if (form->logical && form->pages) return false;
  if (form->logical) {
    form->n = Sizes{q[0], q[1], q[2], q[3], k[2], q[4], v[3]};
  } else {
    const int64_t heads = k[2];
    if (heads > 0 ? q[2] % heads != 0 : q[2] != 0) return false;
    const int64_t keys = form->pages ? form->pages->capacity() : k[1];
    form->n = Sizes{q[0], heads, heads > 0 ? q[2] / heads : 0, q[1], keys, q[3], v[3]};
  }
  return true;
}

// Strides of a bias [b or 1, hq or 1, sq or 1, sk or 1], logical [b, g, r or 1, sq or 1, sk or 1].
ffi::Error decode_bias(ffi::AnyBuffer buffer, const Form& form, ffi::DataType type, Bias* bias) {
  *bias = Bias{};
  if (absent(buffer)) return ffi::Error::Success();
  const Sizes& n = form.n;
  const auto have = buffer.dimensions();
  const Dims full =
      form.logical ? Dims{n.b, n.g, n.r, n.sq, n.sk} : Dims{n.b, n.g * n.r, n.sq, n.sk};
  bool fits = have.size() == full.size();
  for (size_t a = 0; fits && a < full.size(); ++a) fits = have[a] == full[a] || have[a] == 1;
  const auto given = buffer.element_type();
  if (!fits || (given != type && given != ffi::DataType::F32) || !to_dtype(given, &bias->dtype))
    return invalid("bias has shape " + shape_text(have) + ", expected " + shape_text(full) +
                   " with 1 where it is the same for all, of the type of query or float32");
  Dims stride(full.size());
  int64_t step = 1;
  for (size_t a = full.size(); a-- > 0; step *= have[a]) stride[a] = have[a] == 1 ? 0 : step;
  bias->data = buffer.untyped_data();
  bias->b = stride[0];
  bias->g = form.logical ? stride[1] : stride[1] * n.r;
  bias->r = form.logical ? stride[2] : stride[1];
  bias->i = stride[full.size() - 2];
  bias->j = stride[full.size() - 1];
  return ffi::Error::Success();
}

ffi::Error decode_features(const Call& call, const Form& form, Features* f) {
  const Sizes& n = form.n;
  const auto type = operand(call, kQuery).element_type();
  DType dtype;
  to_dtype(type, &dtype);
  const auto softcap = call.attributes.get<double>("softcap");
  const auto threshold = call.attributes.get<int64_t>("keep_threshold");
  if (!softcap.has_value() || !threshold.has_value())
    return invalid("the attributes are scale, left, right, softcap, keep_threshold");
  f->softcap = *softcap;
  f->keep_threshold = static_cast<uint32_t>(clamp<int64_t>(*threshold, 0, 65536));
  f->position_pitch = form.pitch(n.sq);
  f->keys_pitch = form.pitch(2);
  const auto get = [&](Operand index, const char* name, const Dims& dims, ffi::DataType type,
                       auto data) {
    return optional(name, operand(call, index), dims, type, data);
  };
  constexpr auto kInt = ffi::DataType::S32;
  if (auto e = get(kPosition, "position", form.batches(n.sq), kInt, &f->position); e.failure())
    return e;
  if (auto e = get(kKeyCoordinates, "key_coordinates", form.batches(2), kInt, &f->keys);
      e.failure())
    return e;
  if (auto e = get(kSlopes, "alibi_slopes", form.heads(), ffi::DataType::F32, &f->slopes);
      e.failure())
    return e;
  if (auto e = get(kSinks, "sinks", form.heads(), statistics_type(dtype), &f->sinks); e.failure())
    return e;
  if (auto e = get(kDropout, "dropout", form.heads(4), ffi::DataType::U32, &f->dropout);
      e.failure())
    return e;
  return decode_bias(operand(call, kBias), form, type, &f->bias);
}

ffi::Error decode_mask(const Call& call, const Form& form, MaskSource* m) {
  const auto left = call.attributes.get<int64_t>("left");
  const auto right = call.attributes.get<int64_t>("right");
  if (!left.has_value() || !right.has_value()) return invalid("left or right is missing");
  const auto side = [](int64_t x) {
    return static_cast<int32_t>(clamp<int64_t>(x, kUnbounded, kMaxLength));
  };
  const int64_t sq = form.n.sq;
  *m = MaskSource{side(*left), side(*right),  nullptr,       nullptr,
                  nullptr,     form.pitch(2), form.pitch(sq)};
  const auto get = [&](Operand index, const char* name, int64_t width, const int32_t** data) {
    return optional(name, operand(call, index), form.batches(width), ffi::DataType::S32, data);
  };
  if (auto e = get(kLengths, "lengths", 2, &m->lengths); e.failure()) return e;
  if (auto e = get(kLo, "lo", sq, &m->lo); e.failure()) return e;
  if (auto e = get(kHi, "hi", sq, &m->hi); e.failure()) return e;
  if ((m->lo == nullptr) != (m->hi == nullptr)) return invalid("lo and hi must be given together");
  return ffi::Error::Success();
}

// Everything all passes have, and how many operands one has besides.
template <class Params>
ffi::Error decode_operands(const Call& call, size_t more, size_t results, Params* p, Form* form) {
  if (call.operands.size() != kOperands + more || call.results.size() < results)
    return invalid(std::to_string(call.operands.size()) + " operands and " +
                   std::to_string(call.results.size()) + " results, expected " +
                   std::to_string(kOperands + more) + " and " + std::to_string(results));
  const auto q = operand(call, kQuery), k = operand(call, kKey), v = operand(call, kValue);
  if (!read_form(call, form))
    return invalid(
        "query, key and value have shapes " + shape_text(q.dimensions()) + ", " +
        shape_text(k.dimensions()) + ", " + shape_text(v.dimensions()) +
        ", expected [b, sq, hq, d], [b, sk, hk, d], [b, sk, hk, dv] with hk dividing hq");
  p->n = form->n;
  const Sizes& n = p->n;
  const auto type = q.element_type();
  if (!to_dtype(type, &p->dtype))
    return invalid("query must be float16, bfloat16, float32 or float64");
  if (auto e = expect("key", k, form->keys(n.d), type); e.failure()) return e;
  if (auto e = expect("value", v, form->keys(n.dv), type); e.failure()) return e;
  if (n.d < 1 || n.d > kMaxHeadDim || n.dv < 1 || n.dv > kMaxHeadDim)
    return invalid("head dims " + std::to_string(n.d) + " and " + std::to_string(n.dv) +
                   " must be 1 to " + std::to_string(kMaxHeadDim));
  if (n.sq >= kMaxLength || n.sk >= kMaxLength)
    return invalid("sequence lengths must be below 2^30, got " + std::to_string(n.sq) + " and " +
                   std::to_string(n.sk));
  if (auto e = decode_mask(call, *form, &p->mask); e.failure()) return e;
  if (auto e = decode_features(call, *form, &p->features); e.failure()) return e;
  const auto scale = call.attributes.get<double>("scale");
  if (!scale.has_value()) return invalid("scale is missing");
  p->scale = *scale;
  p->q = q.untyped_data();
  p->k = k.untyped_data();
  p->v = v.untyped_data();
  return ffi::Error::Success();
}

// A result both backends have: of these dimensions and this type.
ffi::Error output(const Call& call, size_t index, const char* name, const Dims& dims,
                  ffi::DataType type, void** data) {
  const ffi::AnyBuffer buffer = **call.results.get<ffi::AnyBuffer>(index);
  if (auto e = expect(name, buffer, dims, type); e.failure()) return e;
  *data = buffer.untyped_data();
  return ffi::Error::Success();
}

}  // namespace

ffi::Error invalid(const std::string& text) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "jax_flashattn: " + text);
}

ffi::Error expect(const char* name, ffi::AnyBuffer buffer, const std::vector<int64_t>& dims,
                  ffi::DataType dtype) {
  const auto have = buffer.dimensions();
  if (have.size() == dims.size() && std::equal(dims.begin(), dims.end(), have.begin()) &&
      buffer.element_type() == dtype)
    return ffi::Error::Success();
  return invalid(std::string(name) + " has shape " + shape_text(have) + " and XLA type " +
                 std::to_string(static_cast<int>(buffer.element_type())) + ", expected " +
                 shape_text(dims) + " and type " + std::to_string(static_cast<int>(dtype)));
}

ffi::DataType statistics_type(DType dtype) {
  return dtype == DType::kF64 ? ffi::DataType::F64 : ffi::DataType::F32;
}

ffi::ErrorOr<ffi::AnyBuffer> result(const Call& call, size_t index) {
  if (index >= call.results.size())
    return ffi::Unexpected(invalid("result " + std::to_string(index) + " is missing"));
  return **call.results.get<ffi::AnyBuffer>(index);
}

ffi::Error decode_pages(ffi::AnyBuffer cache, ffi::AnyBuffer table, int64_t b, Pages* pages) {
  const auto blocks = cache.dimensions();
  const bool given = !absent(table);
  pages->columns = given ? table.dimensions()[table.dimensions().size() - 1] : 1;
  pages->blocks = blocks[0];
  pages->size = blocks[1];
  pages->table = nullptr;
  if (!given) return ffi::Error::Success();
  if (auto e = expect("table", table, {b, pages->columns}, ffi::DataType::S32); e.failure())
    return e;
  pages->table = static_cast<const int32_t*>(table.untyped_data());
  return ffi::Error::Success();
}

ffi::Error decode_forward(const Call& call, ForwardParams* p) {
  Form form{};
  if (auto e = decode_operands(call, 0, kForwardResults, p, &form); e.failure()) return e;
  const auto type = operand(call, kQuery).element_type();
  if (auto e = output(call, 0, "out", form.rows(p->n.dv), type, &p->out); e.failure()) return e;
  return output(call, 1, "lse", form.statistic(), statistics_type(p->dtype), &p->lse);
}

ffi::Error decode_cached(const Call& call, CachedParams* p) {
  if (call.operands.size() != kOperands + 1)
    return invalid(std::to_string(call.operands.size()) + " operands, expected " +
                   std::to_string(kOperands + 1));
  const auto q = operand(call, kQuery), k = operand(call, kKey), table = operand(call, kOperands);
  if (q.dimensions().size() != 4 || k.dimensions().size() != 4 || table.dimensions().size() != 2)
    return invalid("query, key and table have shapes " + shape_text(q.dimensions()) + ", " +
                   shape_text(k.dimensions()) + ", " + shape_text(table.dimensions()) +
                   ", expected [b, sq, hq, d], [blocks, size, hk, d], [b, columns or 0]");
  if (auto e = decode_pages(k, table, q.dimensions()[0], &p->pages); e.failure()) return e;
  Form form{{}, false, &p->pages};
  if (auto e = decode_operands(call, 1, kForwardResults, p, &form); e.failure()) return e;
  if (p->features.bias.data || p->features.dropout)
    return invalid("a cached forward has no bias and no dropout");
  if (!p->pages.table && p->pages.blocks < p->n.b)
    return invalid("query has " + std::to_string(p->n.b) + " rows, the cache " +
                   std::to_string(p->pages.blocks));
  if (p->pages.blocks == 0) p->pages.columns = p->n.sk = 0;  // then there is nothing to see
  const auto type = q.element_type();
  if (auto e = output(call, 0, "out", form.rows(p->n.dv), type, &p->out); e.failure()) return e;
  return output(call, 1, "lse", form.statistic(), statistics_type(p->dtype), &p->lse);
}

ffi::Error decode_backward(const Call& call, BackwardParams* p) {
  Form form{};
  if (auto e = decode_operands(call, 3, kBackwardResults, p, &form); e.failure()) return e;
  const Sizes& n = p->n;
  const auto type = operand(call, kQuery).element_type(), statistics = statistics_type(p->dtype);
  const auto dout = operand(call, kOperands), lse = operand(call, kOperands + 1),
             delta = operand(call, kOperands + 2), bias = operand(call, kBias);
  if (auto e = expect("dout", dout, form.rows(n.dv), type); e.failure()) return e;
  if (auto e = expect("lse", lse, form.statistic(), statistics); e.failure()) return e;
  if (auto e = expect("delta", delta, form.statistic(), statistics); e.failure()) return e;
  if (auto e = output(call, 0, "dq", form.rows(n.d), type, &p->dq); e.failure()) return e;
  if (auto e = output(call, 1, "dk", form.keys(n.d), type, &p->dk); e.failure()) return e;
  if (auto e = output(call, 2, "dv", form.keys(n.dv), type, &p->dv); e.failure()) return e;
  const auto bias_dims = bias.dimensions();
  if (auto e = output(call, 3, "dbias", Dims(bias_dims.begin(), bias_dims.end()),
                      bias.element_type(), &p->dbias);
      e.failure())
    return e;
  const auto deterministic = call.attributes.get<bool>("deterministic");
  if (!deterministic.has_value()) return invalid("the attribute deterministic is missing");
  p->deterministic = *deterministic;
  p->dout = dout.untyped_data();
  p->lse = lse.untyped_data();
  p->delta = delta.untyped_data();
  return ffi::Error::Success();
}

ffi::Error decode_tangent(const Call& call, TangentParams* p) {
  Form form{};
  if (auto e = decode_operands(call, 7, kTangentResults, p, &form); e.failure()) return e;
  const Sizes& n = p->n;
  const auto type = operand(call, kQuery).element_type(), statistics = statistics_type(p->dtype);
  const struct {
    const char* name;
    size_t index;
    Dims dims;
    ffi::DataType type;
    const void** data;
  } inputs[] = {
      {"out", kOperands, form.rows(n.dv), type, &p->out},
      {"lse", kOperands + 1, form.statistic(), statistics, &p->lse},
      {"dq", kOperands + 2, form.rows(n.d), type, &p->dq},
      {"dk", kOperands + 3, form.keys(n.d), type, &p->dk},
      {"dv", kOperands + 4, form.keys(n.dv), type, &p->dv},
      {"dsink", kOperands + 6, form.statistic(), statistics, &p->dsink},
  };
  for (const auto& input : inputs) {
    const auto buffer = operand(call, input.index);
    if (auto e = expect(input.name, buffer, input.dims, input.type); e.failure()) return e;
    *input.data = buffer.untyped_data();
  }
  const auto dbias = operand(call, kOperands + 5);
  if (absent(dbias) != absent(operand(call, kBias)))
    return invalid("bias and its tangent must be given together");
  if (auto e = decode_bias(dbias, form, type, &p->dbias); e.failure()) return e;
  if (auto e = output(call, 0, "dout", form.rows(n.dv), type, &p->dout); e.failure()) return e;
  return output(call, 1, "dlse", form.statistic(), statistics, &p->dlse);
}

}  // namespace jax_flashattn
