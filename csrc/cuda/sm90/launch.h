// Launching sm_90a kernels: device facts, shared-memory limits, errors in words.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "semantics/params.h"

namespace jax_flashattn::cuda::sm90 {

struct Device {
  int index, multiprocessors;
};

// One instance per head dim, each in its own object (sm90/forward.cu, sm90/backward.cu).
template <int kHeadDim>
std::string forward(const ForwardParams& p, const Device& device, cudaStream_t stream);
template <int kHeadDim>
std::string backward(const BackwardParams& p, const Device& device, cudaStream_t stream);

#ifdef __CUDACC__
template <class... Parameters, class... Arguments>
std::string launch_kernel(const char* name, void (*kernel)(Parameters...), dim3 blocks, int threads,
                          int shared_bytes, const Device& device, cudaStream_t stream,
                          const Arguments&... arguments) {
  // The limit is a property of (kernel, device); setting it twice is harmless, lowering it never
  // happens, so racing threads are safe.
  cudaError_t error =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) {
    kernel<<<blocks, threads, shared_bytes, stream>>>(arguments...);
    error = cudaGetLastError();
  }
  if (error == cudaSuccess) return "";
  return std::string("kernel ") + name + " (grid " + std::to_string(blocks.x) + " x " +
         std::to_string(blocks.y) + ", block " + std::to_string(threads) + ", shared memory " +
         std::to_string(shared_bytes) + ", device " + std::to_string(device.index) +
         ") could not be launched: " + cudaGetErrorString(error);
}
#endif

}  // namespace jax_flashattn::cuda::sm90
