#include "ffi/decode.h"

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

// An optional int32 operand [b, 1 or g, width or 0]: null when its last dimension is 0.
ffi::Error optional_rows(const char* name, ffi::AnyBuffer buffer, const Sizes& n, int64_t width,
                         const int32_t** data, int64_t* pitch) {
  const auto dims = buffer.dimensions();
  const bool ok = dims.size() == 3 && dims[0] == n.b && (dims[1] == 1 || dims[1] == n.g) &&
                  (dims[2] == width || dims[2] == 0) &&
                  buffer.element_type() == ffi::DataType::S32;
  if (!ok)
    return invalid(std::string(name) + " has shape " + shape_text(dims) + ", expected int32 " +
                   shape_text(std::initializer_list<int64_t>{n.b, 1, width}) +
                   " or an empty last dimension");
  const bool given = dims[2] == width && width > 0;
  *data = given ? buffer.typed_data<int32_t>() : nullptr;
  if (given) *pitch = dims[1] * width;
  return ffi::Error::Success();
}

template <class Params>
ffi::Error decode_inputs(const CallInputs& in, Params* p) {
  const auto q = in.q.dimensions(), k = in.k.dimensions(), v = in.v.dimensions();
  if (q.size() != 5 || k.size() != 4 || v.size() != 4)
    return invalid("query, key and value have shapes " + shape_text(q) + ", " + shape_text(k) +
                   ", " + shape_text(v) + ", expected ranks 5, 4 and 4");
  p->n = Sizes{q[0], q[1], q[2], q[3], k[2], q[4], v[3]};
  const Sizes& n = p->n;
  if (!to_dtype(in.q.element_type(), &p->dtype))
    return invalid("query must be float16, bfloat16, float32 or float64");
  const auto type = in.q.element_type();
  if (auto e = expect("key", in.k, {n.b, n.g, n.sk, n.d}, type); e.failure()) return e;
  if (auto e = expect("value", in.v, {n.b, n.g, n.sk, n.dv}, type); e.failure()) return e;
  if (n.d < 1 || n.d > kMaxHeadDim || n.dv < 1 || n.dv > kMaxHeadDim)
    return invalid("head dims " + std::to_string(n.d) + " and " + std::to_string(n.dv) +
                   " must be 1 to " + std::to_string(kMaxHeadDim));
  if (n.sq > INT32_MAX || n.sk > INT32_MAX)
    return invalid("sequence lengths must fit int32, got " + std::to_string(n.sq) + " and " +
                   std::to_string(n.sk));
  p->mask = MaskSource{in.left, in.right, nullptr, nullptr, nullptr, 0, 0};
  MaskSource& m = p->mask;
  if (auto e = optional_rows("lengths", in.lengths, n, 2, &m.lengths, &m.lengths_pitch);
      e.failure())
    return e;
  if (auto e = optional_rows("lo", in.lo, n, n.sq, &m.lo, &m.limits_pitch); e.failure()) return e;
  if (auto e = optional_rows("hi", in.hi, n, n.sq, &m.hi, &m.limits_pitch); e.failure()) return e;
  if ((m.lo == nullptr) != (m.hi == nullptr))
    return invalid("lo and hi must be given together");
  p->scale = in.scale;
  p->q = in.q.untyped_data();
  p->k = in.k.untyped_data();
  p->v = in.v.untyped_data();
  return ffi::Error::Success();
}

}  // namespace

ffi::Error expect(const char* name, ffi::AnyBuffer buffer, std::initializer_list<int64_t> dims,
                  ffi::DataType dtype) {
  const auto have = buffer.dimensions();
  bool same = have.size() == dims.size() && buffer.element_type() == dtype;
  size_t axis = 0;
  for (int64_t d : dims) same = same && have[axis++] == d;
  if (same) return ffi::Error::Success();
  return invalid(std::string(name) + " has shape " + shape_text(have) + " and type " +
                 std::to_string(static_cast<int>(buffer.element_type())) + ", expected " +
                 shape_text(dims) + " and type " + std::to_string(static_cast<int>(dtype)));
}

ffi::DataType statistics_type(DType dtype) {
  return dtype == DType::kF64 ? ffi::DataType::F64 : ffi::DataType::F32;
}

ffi::Error decode_forward(const CallInputs& in, ffi::AnyBuffer out, ffi::AnyBuffer lse,
                          ForwardParams* p) {
  if (auto e = decode_inputs(in, p); e.failure()) return e;
  const Sizes& n = p->n;
  if (auto e = expect("out", out, {n.b, n.g, n.r, n.sq, n.dv}, in.q.element_type()); e.failure())
    return e;
  if (auto e = expect("lse", lse, {n.b, n.g, n.r, n.sq}, statistics_type(p->dtype)); e.failure())
    return e;
  p->out = out.untyped_data();
  p->lse = lse.untyped_data();
  return ffi::Error::Success();
}

ffi::Error decode_backward(const CallInputs& in, const BackwardBuffersIn& given,
                           const BackwardBuffersOut& out, BackwardParams* p) {
  if (auto e = decode_inputs(in, p); e.failure()) return e;
  const Sizes& n = p->n;
  const auto type = in.q.element_type(), statistics = statistics_type(p->dtype);
  if (auto e = expect("dout", given.dout, {n.b, n.g, n.r, n.sq, n.dv}, type); e.failure())
    return e;
  if (auto e = expect("lse", given.lse, {n.b, n.g, n.r, n.sq}, statistics); e.failure()) return e;
  if (auto e = expect("delta", given.delta, {n.b, n.g, n.r, n.sq}, statistics); e.failure())
    return e;
  if (auto e = expect("dq", out.dq, {n.b, n.g, n.r, n.sq, n.d}, type); e.failure()) return e;
  if (auto e = expect("dk", out.dk, {n.b, n.g, n.sk, n.d}, type); e.failure()) return e;
  if (auto e = expect("dv", out.dv, {n.b, n.g, n.sk, n.dv}, type); e.failure()) return e;
  p->dout = given.dout.untyped_data();
  p->lse = given.lse.untyped_data();
  p->delta = given.delta.untyped_data();
  p->dq = out.dq.untyped_data();
  p->dk = out.dk.untyped_data();
  p->dv = out.dv.untyped_data();
  return ffi::Error::Success();
}

}  // namespace jax_flashattn
