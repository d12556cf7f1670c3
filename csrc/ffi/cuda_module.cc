// The CUDA extension module: the handlers of cpu_module.cc, on a stream.
//
// It links cudart statically and no libcuda: it imports on a machine without a driver.
#include <pybind11/pybind11.h>

#include "cuda/append.h"
#include "cuda/attention.h"
#include "cuda/sm90/backward_workspace.h"
#include "ffi/decode.h"

namespace jax_flashattn {
namespace {

namespace ffi = xla::ffi;
using Stream = ffi::PlatformStream<cudaStream_t>;

ffi::Error launched(const std::string& error) {
  if (error.empty()) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kInternal, "jax_flashattn: " + error);
}

ffi::Error no_bias() {  // jax_flashattn/_lowering.py refuses it before
  return ffi::Error(ffi::ErrorCode::kUnimplemented, "jax_flashattn: no bias on CUDA");
}

ffi::Error forward(cudaStream_t stream, ffi::Dictionary attributes, ffi::RemainingArgs operands,
                   ffi::RemainingRets results) {
  ForwardParams p;
  const Call call{attributes, operands, results};
  if (auto e = decode_forward(call, &p); e.failure()) return e;
  const auto counter = result(call, kForwardResults);  // of tiles, [b, g, 1]
  if (counter.has_error()) return counter.error();
  if (auto e = expect("counter", *counter, {p.n.b, p.n.g, 1}, ffi::DataType::S32); e.failure())
    return e;
  p.scratch = counter->untyped_data();
  if (p.features.bias.data) return no_bias();
  return launched(cuda::forward(p, stream));
}

ffi::Error backward(cudaStream_t stream, ffi::Dictionary attributes, ffi::RemainingArgs operands,
                    ffi::RemainingRets results) {
  BackwardParams p;
  const Call call{attributes, operands, results};
  if (auto e = decode_backward(call, &p); e.failure()) return e;
  const auto workspace = result(call, kBackwardResults);
  if (workspace.has_error()) return workspace.error();
  if (auto e = expect("workspace", *workspace, {p.n.b, p.n.g, cuda::sm90::workspace_floats(p.n)},
                      ffi::DataType::F32);
      e.failure())
    return e;
  p.scratch = workspace->untyped_data();
  if (p.features.bias.data) return no_bias();
  return launched(cuda::backward(p, stream));
}

ffi::Error tangent(cudaStream_t stream, ffi::Dictionary attributes, ffi::RemainingArgs operands,
                   ffi::RemainingRets results) {
  TangentParams p;
  if (auto e = decode_tangent({attributes, operands, results}, &p); e.failure()) return e;
  if (p.features.bias.data) return no_bias();
  return launched(cuda::tangent(p, stream));
}

ffi::Error append(cudaStream_t stream, ffi::Dictionary attributes, ffi::RemainingArgs operands,
                  ffi::RemainingRets results) {
  AppendParams p;
  if (auto e = decode_append({attributes, operands, results}, &p); e.failure()) return e;
  return launched(cuda::append(p, stream));
}

XLA_FFI_DEFINE_HANDLER(kForward, forward,
                       ffi::Ffi::Bind().Ctx<Stream>().Attrs().RemainingArgs().RemainingRets(),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER(kBackward, backward,
                       ffi::Ffi::Bind().Ctx<Stream>().Attrs().RemainingArgs().RemainingRets(),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER(kTangent, tangent,
                       ffi::Ffi::Bind().Ctx<Stream>().Attrs().RemainingArgs().RemainingRets(),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER(kAppend, append,
                       ffi::Ffi::Bind().Ctx<Stream>().Attrs().RemainingArgs().RemainingRets(),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.def("forward", [] { return pybind11::capsule(reinterpret_cast<void*>(kForward)); });
  m.def("backward", [] { return pybind11::capsule(reinterpret_cast<void*>(kBackward)); });
  m.def("tangent", [] { return pybind11::capsule(reinterpret_cast<void*>(kTangent)); });
  m.def("append", [] { return pybind11::capsule(reinterpret_cast<void*>(kAppend)); });
}

}  // namespace jax_flashattn
