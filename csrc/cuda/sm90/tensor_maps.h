// Tensor maps for the copy engine, rebuilt from the buffer pointers on every call (about 50 ns
// each) and passed to kernels by value: nothing is cached, so nothing can be stale.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "semantics/params.h"

namespace jax_flashattn::cuda {

constexpr int kChunk = 64;  // elements of a shared-memory row: 128 bytes, the swizzle's width

// A [b, s, h, d] array of 16-bit elements, read or written in boxes of `rows` x kChunk of one head.
// False if the driver refuses (for example d not a multiple of 8).
bool make_tensor_map(CUtensorMap* map, const void* data, DType dtype, int64_t b, int64_t s,
                     int64_t h, int64_t d, int rows);

}  // namespace jax_flashattn::cuda
