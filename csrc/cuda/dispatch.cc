// Which kernel runs: the one table of architecture, dtype, head dims and features.
#include <mutex>
#include <type_traits>
#include <vector>

#include "cuda/attention.h"
#include "cuda/plain/attention.h"
#include "cuda/sm90/backward_workspace.h"
#include "cuda/sm90/launch.h"

namespace jax_flashattn::cuda {
namespace {

struct DeviceFacts {
  bool known = false;
  int major = 0, minor = 0, multiprocessors = 0;
};

// Facts of the current device, asked once per device.
bool current_device(DeviceFacts* facts, int* index) {
  static std::mutex mutex;
  static std::vector<DeviceFacts> all;
  if (cudaGetDevice(index) != cudaSuccess) return false;
  std::lock_guard<std::mutex> lock(mutex);
  if (static_cast<int>(all.size()) <= *index) all.resize(*index + 1);
  DeviceFacts& f = all[*index];
  if (!f.known) {
    f.known = cudaDeviceGetAttribute(&f.major, cudaDevAttrComputeCapabilityMajor, *index) ==
                  cudaSuccess &&
              cudaDeviceGetAttribute(&f.minor, cudaDevAttrComputeCapabilityMinor, *index) ==
                  cudaSuccess &&
              cudaDeviceGetAttribute(&f.multiprocessors, cudaDevAttrMultiProcessorCount, *index) ==
                  cudaSuccess;
  }
  *facts = f;
  return f.known;
}

// The copy engine wants 16-byte rows and something to copy; tile numbers are 32-bit.
bool fits_sm90(const Sizes& n) {
  return n.d % 8 == 0 && n.dv % 8 == 0 && n.sk > 0 &&
         n.b * n.g * n.r * ((n.sq + 63) / 64) < INT32_MAX &&
         n.b * n.g * ((n.sk + 63) / 64) < INT32_MAX;
}

// Dropout counts keys from 0 there; elsewhere they may start anywhere.
template <class Params>
bool knows_features(const Params& p) {
  return !p.features.bias.data && !(p.features.dropout && p.features.keys);
}

// Calls `launch` with the smallest head dim that has an instance for d.
template <class Launch>
std::string sm90_instance(const Sizes& n, Launch launch) {
  const int64_t d = n.d > n.dv ? n.d : n.dv;
  if (d <= 64) return launch(std::integral_constant<int, 64>());
  if (d <= 96) return launch(std::integral_constant<int, 96>());
  if (d <= 128) return launch(std::integral_constant<int, 128>());
  if (d <= 192) return launch(std::integral_constant<int, 192>());
  return launch(std::integral_constant<int, 256>());
}

}  // namespace

std::string forward(const ForwardParams& p, cudaStream_t stream) {
  if (p.n.b * p.n.g * p.n.r * p.n.sq == 0) return "";
  DeviceFacts facts;
  int index = 0;
  if (!current_device(&facts, &index)) return "the current CUDA device could not be queried";
  if (facts.major == 9 && facts.minor == 0 && fits_sm90(p.n) && knows_features(p))
    return sm90_instance(
        p.n, [&](auto d) { return sm90::forward<d()>(p, {index, facts.multiprocessors}, stream); });
  return plain::forward(p, stream);
}

std::string backward(const BackwardParams& p, cudaStream_t stream) {
  if (p.n.b * p.n.g == 0) return "";
  DeviceFacts facts;
  int index = 0;
  if (!current_device(&facts, &index)) return "the current CUDA device could not be queried";
  if (facts.major == 9 && facts.minor == 0 && fits_sm90(p.n) && p.n.r * p.n.sq > 0 &&
      sm90::worth_tiles(p.n) && knows_features(p))
    return sm90_instance(p.n, [&](auto d) {
      return sm90::backward<d()>(p, {index, facts.multiprocessors}, stream);
    });
  return plain::backward(p, stream);
}

std::string tangent(const TangentParams& p, cudaStream_t stream) {
  return plain::tangent(p, stream);
}

}  // namespace jax_flashattn::cuda
