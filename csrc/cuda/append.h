// Appending to a cache, on a stream.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "semantics/pages.h"

namespace jax_flashattn::cuda {

// Enqueues; the result is empty, or says what could not be launched.
std::string append(const AppendParams& p, cudaStream_t stream);

}  // namespace jax_flashattn::cuda
