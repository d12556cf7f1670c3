// Instances of the forward kernel and their launch; compiled once per head dim (SM90_HEAD_DIM).
#include <cstdlib>
#include <string>

#include "cuda/sm90/forward.cuh"
#include "cuda/sm90/launch.h"

namespace jax_flashattn::cuda::sm90 {
namespace {

// Row groups, key block, query buffers, key stages: what fits 227 KB and the registers.
template <class T, int kD>
struct Tuned;
template <class T>
struct Tuned<T, 64> : ForwardShape<T, 64, 3, 128, 2, 4> {};
template <class T>
struct Tuned<T, 96> : ForwardShape<T, 96, 2, 128, 2, 2> {};
template <class T>
struct Tuned<T, 128> : ForwardShape<T, 128, 2, 128, 2, 2> {};
template <class T>
struct Tuned<T, 192> : ForwardShape<T, 192, 2, 96, 1, 2> {};
template <class T>
struct Tuned<T, 256> : ForwardShape<T, 256, 2, 80, 1, 2> {};

template <class S>
std::string launch(const ForwardParams& p, const Device& device, cudaStream_t stream) {
  const Sizes& n = p.n;
  ForwardMaps maps;
  const bool mapped =
      make_tensor_map(&maps.query, p.q, p.dtype, n.b, n.sq, n.g * n.r, n.d, S::kRows) &&
      make_tensor_map(&maps.key, p.k, p.dtype, n.b, n.sk, n.g, n.d, S::kKeys) &&
      make_tensor_map(&maps.value, p.v, p.dtype, n.b, n.sk, n.g, n.dv, S::kKeys) &&
      make_tensor_map(&maps.out, p.out, p.dtype, n.b, n.sq, n.g * n.r, n.dv, 64);
  if (!mapped) return "the driver refused a tensor map";
  constexpr int kBytes = sizeof(ForwardSmem<S>);
  static_assert(kBytes <= 232448, "more shared memory than a block has");
  const TileOrder order{static_cast<int>(n.g * n.r), static_cast<int>(n.b),
                        static_cast<int>((n.sq + S::kRows - 1) / S::kRows), std::getenv("SECTION") ? atoi(std::getenv("SECTION")) : 1};
  const int64_t tiles = int64_t(order.heads) * order.batches * order.row_tiles;
  const int blocks =
      static_cast<int>(tiles < device.multiprocessors ? tiles : device.multiprocessors);
  return launch_kernel("sm90 forward", forward_kernel<S>, blocks, S::kThreads, kBytes, device,
                       stream, maps, p, ScoreScale(p.scale), order);
}

}  // namespace

template <>
std::string forward<SM90_HEAD_DIM>(const ForwardParams& p, const Device& device,
                                   cudaStream_t stream) {
  if (p.dtype == DType::kBF16)
    return launch<Tuned<__nv_bfloat16, SM90_HEAD_DIM>>(p, device, stream);
  return launch<Tuned<__half, SM90_HEAD_DIM>>(p, device, stream);
}

}  // namespace jax_flashattn::cuda::sm90
