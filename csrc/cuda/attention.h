// The CUDA backend's interface: what csrc/ffi calls.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "semantics/params.h"

namespace jax_flashattn::cuda {

// Enqueue one pass on `stream`; they never synchronise or allocate. The result is empty, or says
// what could not be launched.
std::string forward(const ForwardParams& p, cudaStream_t stream);
std::string backward(const BackwardParams& p, cudaStream_t stream);
std::string tangent(const TangentParams& p, cudaStream_t stream);

}  // namespace jax_flashattn::cuda
