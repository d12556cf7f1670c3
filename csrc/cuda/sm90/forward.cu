// Instances of the forward kernel and their launch; compiled once per head dim (SM90_HEAD_DIM).
#include <string>

#include "cuda/sm90/forward.cuh"
#include "cuda/sm90/launch.h"

namespace jax_flashattn::cuda::sm90 {
namespace {

// Row groups, key block, query buffers, key stages: what fits 227 KB and the registers.
template <class T, int kD, Extent kExtent>
struct Tuned;
template <class T, Extent kExtent>
struct Tuned<T, 64, kExtent> : ForwardShape<T, 64, 2, 128, 2, 4, kExtent> {};
template <class T>
struct Tuned<T, 64, Extent::kPlain> : ForwardShape<T, 64, 3, 128, 3, 4, Extent::kPlain> {};
template <class T, Extent kExtent>
struct Tuned<T, 96, kExtent> : ForwardShape<T, 96, 2, 128, 2, 2, kExtent> {};
template <class T, Extent kExtent>
struct Tuned<T, 128, kExtent> : ForwardShape<T, 128, 2, 128, 2, 2, kExtent> {};
template <class T, Extent kExtent>
struct Tuned<T, 192, kExtent> : ForwardShape<T, 192, 2, 96, 1, 2, kExtent> {};
template <class T>
struct Tuned<T, 192, Extent::kDropout> : ForwardShape<T, 192, 2, 64, 1, 2, Extent::kDropout> {};
template <class T, Extent kExtent>
struct Tuned<T, 256, kExtent> : ForwardShape<T, 256, 2, 80, 1, 2, kExtent> {};
template <class T>
struct Tuned<T, 256, Extent::kDistances> : ForwardShape<T, 256, 2, 64, 1, 2, Extent::kDistances> {};
template <class T>
struct Tuned<T, 256, Extent::kDropout> : ForwardShape<T, 256, 2, 64, 1, 2, Extent::kDropout> {};

// Heads that are worked on together. Where every row sees every key, the tiles of one head come one
// after the other and share its keys and values. Where rows see less, tiles of all lengths must be
// in flight to balance, but keys and values must stay in L2 beside what passes through it.
int section(const ForwardParams& p) {
  constexpr int64_t kL2Bytes = 64 << 20, kLeast = 8, kMost = SM90_HEAD_DIM <= 64 ? 96 : 32;
  const Sizes& n = p.n;
  const MaskSource& m = p.mask;
  int64_t heads = n.r;
  if (m.lo)
    heads = n.b * n.g * n.r;
  else if (m.left != kUnbounded || m.right != kUnbounded || m.lengths)
    heads *= clamp<int64_t>(kL2Bytes / (n.sk * (n.d + n.dv) * 2), kLeast, kMost);
  const int64_t all = n.b * n.g * n.r;
  return static_cast<int>(heads < all ? heads : all);  // times row tiles it stays 32-bit
}

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
  if (cudaMemsetAsync(p.scratch, 0, sizeof(int), stream) != cudaSuccess)
    return "the tile counter could not be reset";
  const int heads = static_cast<int>(n.g * n.r);
  const int row_tiles = static_cast<int>((n.sq + S::kRows - 1) / S::kRows);
  const int before = static_cast<int>((row_tiles * S::kRows - n.sq) / 64 * 64);
  const TileOrder order{heads,  static_cast<int>(n.b),       row_tiles, section(p),
                        before, static_cast<int*>(p.scratch)};
  const int64_t tiles = int64_t(order.heads) * order.batches * order.row_tiles;
  const int blocks =
      static_cast<int>(tiles < device.multiprocessors ? tiles : device.multiprocessors);
  return launch_kernel("sm90 forward", forward_kernel<S>, blocks, S::kThreads, kBytes, device,
                       stream, maps, p, ScoreScale(p.scale, p.features), order,
                       KeepBits(p.features.keep_threshold));
}

template <class T>
std::string launch_typed(const ForwardParams& p, const Device& device, cudaStream_t stream) {
  switch (extent(p)) {
    case Extent::kPlain:
      return launch<Tuned<T, SM90_HEAD_DIM, Extent::kPlain>>(p, device, stream);
    case Extent::kDistances:
      return launch<Tuned<T, SM90_HEAD_DIM, Extent::kDistances>>(p, device, stream);
    case Extent::kScores:
      return launch<Tuned<T, SM90_HEAD_DIM, Extent::kScores>>(p, device, stream);
    default:
      return launch<Tuned<T, SM90_HEAD_DIM, Extent::kDropout>>(p, device, stream);
  }
}

}  // namespace

template <>
std::string forward<SM90_HEAD_DIM>(const ForwardParams& p, const Device& device,
                                   cudaStream_t stream) {
  return p.dtype == DType::kBF16 ? launch_typed<__nv_bfloat16>(p, device, stream)
                                 : launch_typed<__half>(p, device, stream);
}

}  // namespace jax_flashattn::cuda::sm90
