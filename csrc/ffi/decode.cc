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

ffi::Error invalid(const std::string& text) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "jax_flashattn: " + text);
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

// The two forms of a call (jax_flashattn/_partition.py): the user's shapes, or logical shapes that
// start with (b, g). The bytes are the same.
struct Form {
  Sizes n;
  bool logical;
  Dims rows(int64_t width) const {
    return logical ? Dims{n.b, n.g, n.r, n.sq, width} : Dims{n.b, n.sq, n.g * n.r, width};
  }
  Dims keys(int64_t width) const {
    return logical ? Dims{n.b, n.g, n.sk, width} : Dims{n.b, n.sk, n.g, width};
  }
  Dims statistic() const {
    return logical ? Dims{n.b, n.g, n.r, n.sq} : Dims{n.b, n.g * n.r, n.sq};
  }
  Dims mask(int64_t width) const { return logical ? Dims{n.b, n.g, width} : Dims{n.b, width}; }
};

// An optional int32 operand of the given width: null when its last dimension is 0.
ffi::Error optional_mask(const char* name, ffi::AnyBuffer buffer, const Form& form, int64_t width,
                         const int32_t** data, int64_t* pitch) {
  const auto dims = buffer.dimensions();
  if (!(dims.size() > 0 && dims[dims.size() - 1] == 0)) {
    if (auto e = expect(name, buffer, form.mask(width), ffi::DataType::S32); e.failure()) return e;
    *data = buffer.typed_data<int32_t>();
    *pitch = form.logical ? form.n.g * width : width;  // every head of a batch holds the same
  }
  return ffi::Error::Success();
}

// Sizes from the shapes of query, key and value; false unless they fit one form.
bool read_form(const CallInputs& in, Form* form) {
  const auto q = in.q.dimensions(), k = in.k.dimensions(), v = in.v.dimensions();
  if ((q.size() != 4 && q.size() != 5) || k.size() != 4 || v.size() != 4) return false;
  form->logical = q.size() == 5;
  if (form->logical) {
    form->n = Sizes{q[0], q[1], q[2], q[3], k[2], q[4], v[3]};
  } else {
    const int64_t heads = k[2];
    if (heads > 0 ? q[2] % heads != 0 : q[2] != 0) return false;
    form->n = Sizes{q[0], heads, heads > 0 ? q[2] / heads : 0, q[1], k[1], q[3], v[3]};
  }
  return true;
}

template <class Params>
ffi::Error decode_inputs(const CallInputs& in, Params* p, Form* form) {
  if (!read_form(in, form))
    return invalid(
        "query, key and value have shapes " + shape_text(in.q.dimensions()) + ", " +
        shape_text(in.k.dimensions()) + ", " + shape_text(in.v.dimensions()) +
        ", expected [b, sq, hq, d], [b, sk, hk, d], [b, sk, hk, dv] with hk dividing hq");
  p->n = form->n;
  const Sizes& n = p->n;
  if (!to_dtype(in.q.element_type(), &p->dtype))
    return invalid("query must be float16, bfloat16, float32 or float64");
  const auto type = in.q.element_type();
  if (auto e = expect("key", in.k, form->keys(n.d), type); e.failure()) return e;
  if (auto e = expect("value", in.v, form->keys(n.dv), type); e.failure()) return e;
  if (n.d < 1 || n.d > kMaxHeadDim || n.dv < 1 || n.dv > kMaxHeadDim)
    return invalid("head dims " + std::to_string(n.d) + " and " + std::to_string(n.dv) +
                   " must be 1 to " + std::to_string(kMaxHeadDim));
  if (n.sq >= kMaxLength || n.sk >= kMaxLength)
    return invalid("sequence lengths must be below 2^30, got " + std::to_string(n.sq) + " and " +
                   std::to_string(n.sk));
  const auto side = [](int64_t x) {
    return static_cast<int32_t>(clamp<int64_t>(x, kUnbounded, kMaxLength));
  };
  p->mask = MaskSource{side(in.left), side(in.right), nullptr, nullptr, nullptr, 0, 0};
  MaskSource& m = p->mask;
  if (auto e = optional_mask("lengths", in.lengths, *form, 2, &m.lengths, &m.lengths_pitch);
      e.failure())
    return e;
  if (auto e = optional_mask("lo", in.lo, *form, n.sq, &m.lo, &m.limits_pitch); e.failure())
    return e;
  if (auto e = optional_mask("hi", in.hi, *form, n.sq, &m.hi, &m.limits_pitch); e.failure())
    return e;
  if ((m.lo == nullptr) != (m.hi == nullptr)) return invalid("lo and hi must be given together");
  p->scale = in.scale;
  p->q = in.q.untyped_data();
  p->k = in.k.untyped_data();
  p->v = in.v.untyped_data();
  return ffi::Error::Success();
}

}  // namespace

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

ffi::Error decode_forward(const CallInputs& in, ffi::AnyBuffer out, ffi::AnyBuffer lse,
                          ForwardParams* p) {
  Form form;
  if (auto e = decode_inputs(in, p, &form); e.failure()) return e;
  if (auto e = expect("out", out, form.rows(p->n.dv), in.q.element_type()); e.failure()) return e;
  if (auto e = expect("lse", lse, form.statistic(), statistics_type(p->dtype)); e.failure())
    return e;
  p->out = out.untyped_data();
  p->lse = lse.untyped_data();
  return ffi::Error::Success();
}

ffi::Error decode_backward(const CallInputs& in, const BackwardBuffersIn& given,
                           const BackwardBuffersOut& out, BackwardParams* p) {
  Form form;
  if (auto e = decode_inputs(in, p, &form); e.failure()) return e;
  const Sizes& n = p->n;
  const auto type = in.q.element_type(), statistics = statistics_type(p->dtype);
  if (auto e = expect("dout", given.dout, form.rows(n.dv), type); e.failure()) return e;
  if (auto e = expect("lse", given.lse, form.statistic(), statistics); e.failure()) return e;
  if (auto e = expect("delta", given.delta, form.statistic(), statistics); e.failure()) return e;
  if (auto e = expect("dq", out.dq, form.rows(n.d), type); e.failure()) return e;
  if (auto e = expect("dk", out.dk, form.keys(n.d), type); e.failure()) return e;
  if (auto e = expect("dv", out.dv, form.keys(n.dv), type); e.failure()) return e;
  p->dout = given.dout.untyped_data();
  p->lse = given.lse.untyped_data();
  p->delta = given.delta.untyped_data();
  p->dq = out.dq.untyped_data();
  p->dk = out.dk.untyped_data();
  p->dv = out.dv.untyped_data();
  return ffi::Error::Success();
}

}  // namespace jax_flashattn
