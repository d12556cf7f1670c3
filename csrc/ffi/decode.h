// XLA FFI buffers and attributes to kernel parameters: the only reader of a call's layout.
//
// Shapes are checked again here: a wrong one is an error that names both shapes, never an access.
#pragma once

#include <string>
#include <vector>

#include "semantics/pages.h"
#include "semantics/params.h"
#include "xla/ffi/api/ffi.h"

namespace jax_flashattn {

// A custom call as XLA hands it over. Operands and results come in the order of
// jax_flashattn/_primitives.py; a backend's scratch follows the results that both have.
struct Call {
  const xla::ffi::Dictionary& attributes;
  const xla::ffi::RemainingArgs& operands;
  const xla::ffi::RemainingRets& results;
};
constexpr size_t kForwardResults = 2;   // out, lse
constexpr size_t kBackwardResults = 4;  // dq, dk, dv, dbias
constexpr size_t kTangentResults = 2;   // dout, dlse

xla::ffi::Error decode_forward(const Call& call, ForwardParams* p);
xla::ffi::Error decode_backward(const Call& call, BackwardParams* p);
xla::ffi::Error decode_tangent(const Call& call, TangentParams* p);
xla::ffi::Error decode_cached(const Call& call, CachedParams* p);
xla::ffi::Error decode_append(const Call& call, AppendParams* p);

// The blocks of a cache [blocks, size, ...] that a table [b, columns or 0] names.
xla::ffi::Error decode_pages(xla::ffi::AnyBuffer cache, xla::ffi::AnyBuffer table, int64_t b,
                             Pages* pages);

// A wrong call, in words.
xla::ffi::Error invalid(const std::string& text);

// The result at this position; fails if the call has fewer.
xla::ffi::ErrorOr<xla::ffi::AnyBuffer> result(const Call& call, size_t index);

// Fails, naming both shapes, unless `buffer` has these dimensions and element type.
xla::ffi::Error expect(const char* name, xla::ffi::AnyBuffer buffer,
                       const std::vector<int64_t>& dims, xla::ffi::DataType dtype);

// The type of lse, delta and accumulators.
xla::ffi::DataType statistics_type(DType dtype);

}  // namespace jax_flashattn
