// Kernels without tensor cores, for any GPU and any head dim; see attention.cu.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "semantics/params.h"

namespace jax_flashattn::cuda::plain {

std::string forward(const ForwardParams& p, cudaStream_t stream);
std::string backward(const BackwardParams& p, cudaStream_t stream);
std::string tangent(const TangentParams& p, cudaStream_t stream);

}  // namespace jax_flashattn::cuda::plain
