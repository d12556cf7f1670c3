// XLA FFI buffers and attributes to kernel parameters: the only reader of a call's layout.
//
// Shapes are checked again here: a wrong one is an error that names both shapes, never an access.
#pragma once

#include <string>
#include <vector>

#include "semantics/params.h"
#include "xla/ffi/api/ffi.h"

namespace jax_flashattn {

// The operands and attributes both passes share.
struct CallInputs {
  xla::ffi::AnyBuffer q, k, v, lengths, lo, hi;
  double scale;
  int64_t left, right;
};

xla::ffi::Error decode_forward(const CallInputs& in, xla::ffi::AnyBuffer out,
                               xla::ffi::AnyBuffer lse, ForwardParams* p);

struct BackwardBuffersIn {
  xla::ffi::AnyBuffer dout, lse, delta;
};
struct BackwardBuffersOut {
  xla::ffi::AnyBuffer dq, dk, dv;
};
xla::ffi::Error decode_backward(const CallInputs& in, const BackwardBuffersIn& given,
                                const BackwardBuffersOut& out, BackwardParams* p);

// Fails, naming both shapes, unless `buffer` has these dimensions and element type.
xla::ffi::Error expect(const char* name, xla::ffi::AnyBuffer buffer,
                       const std::vector<int64_t>& dims, xla::ffi::DataType dtype);

// The type of lse, delta and accumulators.
xla::ffi::DataType statistics_type(DType dtype);

}  // namespace jax_flashattn
