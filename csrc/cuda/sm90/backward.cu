// Instances of the backward kernels and their launch; compiled once per head dim (SM90_HEAD_DIM).
#include <string>

#include "cuda/sm90/backward.cuh"
#include "cuda/sm90/backward_edges.cuh"
#include "cuda/sm90/backward_wide.cuh"
#include "cuda/sm90/launch.h"

namespace jax_flashattn::cuda::sm90 {
namespace {

// Rows and keys of a tile.
template <class T, int kD, bool kInTurn, Extent kExtent>
using TunedBackward =
    BackwardShape<T, kD, kD == 64 ? 128 : 64, kD <= 128 ? 128 : 64, kInTurn, kExtent>;

// The kernel of a shape and its shared memory.
template <class S, bool kWide = (S::kD > 128)>
struct Kernel {
  static constexpr auto kFunction = backward_kernel<S>;
  using Smem = NarrowSmem<S>;
};
template <class S>
struct Kernel<S, true> {
  static constexpr auto kFunction = backward_wide_kernel<S>;
  using Smem = WideSmem<S>;
};

// Key heads that are worked on together. Where every row sees every key one at a time, so that its
// Q, dO and dQ stay in L2. Where rows see less, tiles of all lengths must be in flight to balance,
// so as many as L2 holds, and no fewer than are worked on at once anyway; then as many more as make
// sections equal, because a last one of few heads would leave most of the GPU without work.
int section(const BackwardParams& p, int64_t key_tiles, const Device& device) {
  constexpr int64_t kL2Bytes = 32 << 20;
  const Sizes& n = p.n;
  const MaskSource& m = p.mask;
  if (!m.lo && !m.lengths && m.left == kUnbounded && m.right == kUnbounded) return 1;
  const int64_t all = n.b * n.g, head_bytes = n.r * n.sq * ((n.d + n.dv) * 2 + padded_width(n) * 4);
  const int64_t at_once = (device.multiprocessors + key_tiles - 1) / key_tiles;
  const int64_t least = clamp<int64_t>(kL2Bytes / head_bytes, at_once, all);
  int64_t heads = least;
  while (heads < 2 * least && all % heads != 0) ++heads;
  if (all % heads != 0) heads = least;
  return static_cast<int>(heads < all ? heads : all);
}

template <class S>
std::string launch(const BackwardParams& p, const Device& device, cudaStream_t stream) {
  using T = typename S::T;
  const Sizes& n = p.n;
  BackwardMaps maps;
  const int64_t hq = n.g * n.r;
  const bool mapped = make_tensor_map(&maps.query, p.q, p.dtype, n.b, n.sq, hq, n.d, S::kRows) &&
                      make_tensor_map(&maps.key, p.k, p.dtype, n.b, n.sk, n.g, n.d, S::kKeys) &&
                      make_tensor_map(&maps.value, p.v, p.dtype, n.b, n.sk, n.g, n.dv, S::kKeys) &&
                      make_tensor_map(&maps.dout, p.dout, p.dtype, n.b, n.sq, hq, n.dv, S::kRows) &&
                      make_tensor_map(&maps.dk, p.dk, p.dtype, n.b, n.sk, n.g, n.d, S::kKeys) &&
                      make_tensor_map(&maps.dv, p.dv, p.dtype, n.b, n.sk, n.g, n.dv, S::kKeys);
  if (!mapped) return "the driver refused a tensor map";
  const BackwardWorkspace w(p.scratch, n);
  if (cudaMemsetAsync(w.claimed, 0, w.counters_bytes(), stream) != cudaSuccess)
    return "the counters could not be reset";
  const int tiles = static_cast<int>((n.sq + S::kRows - 1) / S::kRows);
  const int key_tiles = static_cast<int>((n.sk + S::kKeys - 1) / S::kKeys);
  const int64_t row_tiles = n.b * tiles, pieces = row_tiles * hq * S::kPieces;
  const dim3 prepare_grid(static_cast<unsigned>(row_tiles),
                          static_cast<unsigned>(hq < 16 ? hq : 16));
  std::string error =
      launch_kernel("sm90 backward prepare", prepare_backward_kernel<S::kRows, S::kWidth, S::kKeys>,
                    prepare_grid, kPrepareThreads, 0, device, stream, p, w, tiles, key_tiles);
  if (!error.empty()) return error;
  const KeyTileOrder order{static_cast<int>(n.g), static_cast<int>(n.b), key_tiles,
                           section(p, key_tiles, device),
                           S::kDeterministic && (p.mask.lo || p.mask.right != kUnbounded)};
  constexpr int kBytes = sizeof(typename Kernel<S>::Smem);
  static_assert(kBytes <= 232448, "more shared memory than a block has");
  const int64_t claims = n.g * n.b * key_tiles;
  const int blocks =
      static_cast<int>(claims < device.multiprocessors ? claims : device.multiprocessors);
  error = launch_kernel("sm90 backward", Kernel<S>::kFunction, blocks, S::kThreads, kBytes, device,
                        stream, maps, p, w, order, ScoreShape(p.scale, p.features.softcap),
                        KeepBits(p.features.keep_threshold));
  if (!error.empty()) return error;
  return launch_kernel("sm90 backward finish", finish_backward_kernel<T, S::kRows, S::kWidth>,
                       static_cast<int>(pieces), 128, 0, device, stream, p, w, tiles);
}

template <class T, bool kInTurn>
std::string launch_extent(const BackwardParams& p, const Device& device, cudaStream_t stream) {
  constexpr int kD = SM90_HEAD_DIM;
  switch (extent(p)) {
    case Extent::kPlain:
      return launch<TunedBackward<T, kD, kInTurn, Extent::kPlain>>(p, device, stream);
    case Extent::kDistances:
      return launch<TunedBackward<T, kD, kInTurn, Extent::kDistances>>(p, device, stream);
    case Extent::kScores:
      return launch<TunedBackward<T, kD, kInTurn, Extent::kScores>>(p, device, stream);
    default:
      if (p.features.softcap == 0 && !p.features.slopes)
        return launch<TunedBackward<T, kD, kInTurn, Extent::kDropoutAlone>>(p, device, stream);
      return launch<TunedBackward<T, kD, kInTurn, Extent::kDropout>>(p, device, stream);
  }
}

template <class T>
std::string launch_typed(const BackwardParams& p, const Device& device, cudaStream_t stream) {
  return p.deterministic ? launch_extent<T, true>(p, device, stream)
                         : launch_extent<T, false>(p, device, stream);
}

}  // namespace

template <>
std::string backward<SM90_HEAD_DIM>(const BackwardParams& p, const Device& device,
                                    cudaStream_t stream) {
  return p.dtype == DType::kBF16 ? launch_typed<__nv_bfloat16>(p, device, stream)
                                 : launch_typed<__half>(p, device, stream);
}

}  // namespace jax_flashattn::cuda::sm90
