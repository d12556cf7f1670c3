// The CUDA extension module: the same two handlers as cpu_module.cc, on a stream.
//
// It links cudart statically and no libcuda: it imports on a machine without a driver.
#include <pybind11/pybind11.h>

#include "cuda/attention.h"
#include "cuda/sm90/backward_workspace.h"
#include "ffi/decode.h"

namespace jax_flashattn {
namespace {

namespace ffi = xla::ffi;
using ffi::AnyBuffer;
using Result = ffi::Result<AnyBuffer>;
using Stream = ffi::PlatformStream<cudaStream_t>;

ffi::Error launched(const std::string& error) {
  if (error.empty()) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kInternal, "jax_flashattn: " + error);
}

ffi::Error forward(cudaStream_t stream, double scale, int64_t left, int64_t right, bool,
                   AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer lengths, AnyBuffer lo,
                   AnyBuffer hi, Result out, Result lse, Result counter) {
  ForwardParams p;
  const CallInputs in{q, k, v, lengths, lo, hi, scale, left, right};
  if (auto e = decode_forward(in, *out, *lse, &p); e.failure()) return e;
  if (auto e = expect("counter", *counter, {p.n.b, p.n.g, 1}, ffi::DataType::S32); e.failure())
    return e;
  p.scratch = counter->untyped_data();
  return launched(cuda::forward(p, stream));
}

ffi::Error backward(cudaStream_t stream, double scale, int64_t left, int64_t right,
                    bool deterministic, AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer lengths,
                    AnyBuffer lo, AnyBuffer hi, AnyBuffer dout, AnyBuffer lse, AnyBuffer delta,
                    Result dq, Result dk, Result dv, Result workspace) {
  BackwardParams p;
  const CallInputs in{q, k, v, lengths, lo, hi, scale, left, right};
  if (auto e = decode_backward(in, {dout, lse, delta}, {*dq, *dk, *dv}, &p); e.failure()) return e;
  if (auto e = expect("workspace", *workspace, {p.n.b, p.n.g, cuda::sm90::workspace_floats(p.n)},
                      ffi::DataType::F32);
      e.failure())
    return e;
  p.deterministic = deterministic;
  p.scratch = workspace->untyped_data();
  return launched(cuda::backward(p, stream));
}

XLA_FFI_DEFINE_HANDLER(kForward, forward,
                       ffi::Ffi::Bind()
                           .Ctx<Stream>()
                           .Attr<double>("scale")
                           .Attr<int64_t>("left")
                           .Attr<int64_t>("right")
                           .Attr<bool>("deterministic")
                           .Arg<AnyBuffer>()   // query
                           .Arg<AnyBuffer>()   // key
                           .Arg<AnyBuffer>()   // value
                           .Arg<AnyBuffer>()   // lengths
                           .Arg<AnyBuffer>()   // lo
                           .Arg<AnyBuffer>()   // hi
                           .Ret<AnyBuffer>()   // out
                           .Ret<AnyBuffer>()   // lse
                           .Ret<AnyBuffer>(),  // tile counter [b, g, 1]
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER(kBackward, backward,
                       ffi::Ffi::Bind()
                           .Ctx<Stream>()
                           .Attr<double>("scale")
                           .Attr<int64_t>("left")
                           .Attr<int64_t>("right")
                           .Attr<bool>("deterministic")
                           .Arg<AnyBuffer>()   // query
                           .Arg<AnyBuffer>()   // key
                           .Arg<AnyBuffer>()   // value
                           .Arg<AnyBuffer>()   // lengths
                           .Arg<AnyBuffer>()   // lo
                           .Arg<AnyBuffer>()   // hi
                           .Arg<AnyBuffer>()   // dout
                           .Arg<AnyBuffer>()   // lse
                           .Arg<AnyBuffer>()   // delta
                           .Ret<AnyBuffer>()   // dq
                           .Ret<AnyBuffer>()   // dk
                           .Ret<AnyBuffer>()   // dv
                           .Ret<AnyBuffer>(),  // workspace [b, g, workspace_floats]
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.def("forward", [] { return pybind11::capsule(reinterpret_cast<void*>(kForward)); });
  m.def("backward", [] { return pybind11::capsule(reinterpret_cast<void*>(kBackward)); });
}

}  // namespace jax_flashattn
