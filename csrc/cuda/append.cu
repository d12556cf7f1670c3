// Appends to a cache: copies bytes, whatever their type.
#include "cuda/append.h"

namespace jax_flashattn::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMostBlocks = 65535;

// Grid: up to kMostBlocks blocks that take turns. One block copies the bytes of one position, by
// units of T, to the one place that append_offset names. Shared memory: none.
template <class T>
__global__ void __launch_bounds__(kThreads) append_kernel(AppendParams p) {
  const int64_t units = p.bytes / static_cast<int64_t>(sizeof(T));
  for (int64_t row = blockIdx.x; row < p.b * p.n; row += gridDim.x) {
    const int64_t to = append_offset(p, row / p.n, row % p.n);
    if (to < 0) continue;
    const T* source = reinterpret_cast<const T*>(p.fresh + row * p.bytes);
    T* target = reinterpret_cast<T*>(p.cache + to);
    for (int64_t x = threadIdx.x; x < units; x += kThreads) target[x] = source[x];
  }
}

}  // namespace

std::string append(const AppendParams& p, cudaStream_t stream) {
  const int64_t rows = p.b * p.n;
  if (rows == 0 || p.bytes == 0) return "";
  const auto blocks = static_cast<unsigned>(rows < kMostBlocks ? rows : kMostBlocks);
  const auto address = reinterpret_cast<uintptr_t>(p.fresh) | reinterpret_cast<uintptr_t>(p.cache) |
                       static_cast<uintptr_t>(p.bytes);
  if (address % sizeof(int4) == 0)
    append_kernel<int4><<<blocks, kThreads, 0, stream>>>(p);
  else
    append_kernel<char><<<blocks, kThreads, 0, stream>>>(p);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? "" : std::string("append: ") + cudaGetErrorString(error);
}

}  // namespace jax_flashattn::cuda
