// Backward pass for sm_90a, head dims 129 to 256 (docs/kernels.md).
//
// dK and dV of 64 keys fill the accumulators of one warpgroup each, so the two consumer warpgroups
// share the work by product instead of by key. The first makes S^T, P^T and dV += P^T dO and hands
// P^T on through shared memory; the second makes dP^T, dS^T and dK += dS^T Q and hands dS^T on.
// Both make pieces of dQ = dS K, a step later: 64 columns with the update of that step, and 64
// while the next step's scores are turned into probabilities.
//
// Further barriers: probability_full/probability_empty, P^T of one step, filled by the first
// warpgroup's warps, emptied by the second's.
#pragma once

#include "cuda/sm90/backward_dropout.cuh"
#include "cuda/sm90/backward_load.cuh"

namespace jax_flashattn::cuda::sm90 {

template <class S>
struct WideSmem : BackwardSmem<S> {
  // A fragment in registers' order: a thread of one warpgroup reads what its twin has written. In
  // half precision whatever the element type: P is at most 1, and dS^T keeps three more of its bits
  // than bfloat16 has.
  uint4 probability[2][S::kRows / 16][128];
  uint64_t probability_full[2], probability_empty[2];
  // Dropout's flags for a warp of 16 keys lie where it puts its P^T when it has read them.
  __device__ uint32_t* flags(int buffer, int warp) {
    return reinterpret_cast<uint32_t*>(probability[buffer][0] + 32 * warp);
  }
};

template <class S, bool kScores>
__device__ void consume_wide(const BackwardParams& p, const BackwardWorkspace& w,
                             const ScoreShape& shape, WideSmem<S>& smem) {
  using T = typename S::T;
  static_assert(S::kRows == 64 && S::kKeys == 64);
  constexpr int kGroup = kScores ? 0 : 1;
  constexpr bool kTwoPieces = kGroup + 2 < S::kChunks;
  const int thread = threadIdx.x % 128, lane = thread % 32;
  float factor = kScores ? 1.0f : static_cast<float>(p.scale);  // of the gradient
  if constexpr (S::kDropout)
    factor *= kScores ? static_cast<float>(kept_scale(p.features)) : gradient_scale(p.features);
  const int key_of_tile = thread / 32 * 16 + lane / 4;
  KeyCoordinates key_coordinate{};
  const int tiles = static_cast<int>((p.n.sq + S::kRows - 1) / S::kRows);
  Ring<S::kStages> ring;
  Ring<S::kKeyStages> key_ring;
  float gradient[S::kD / 2];  // dV or dK
  float x[32];                // S^T, then P^T; or dP^T, then dS^T
  float dq[32];
  uint32_t packed[4][4];
  int place;  // of the key tile in shared memory
  ptx::Operand keys;
  const auto issue_products = [&] {  // S^T = K Q^T, or dP^T = V dO^T
    const int s = ring.index();
    if constexpr (!kScores) ptx::barrier_wait(&smem.dout_full[s], ring.parity());
    ptx::pin_dead(x);
    ptx::wgmma_fence();
    issue_dot<S, 64>(x, keys, 64, ptx::operand(kScores ? smem.query[s] : smem.dout[s]), 64);
  };
  const auto issue_dq = [&](int turn, int chunk) {
    const ptx::Operand dscore = ptx::operand(smem.dscore[turn & 1]);
    const ptx::Operand columns = ptx::operand(smem.key[place] + chunk * S::kKeys * kChunk);
    ptx::pin_dead(dq);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < S::kKeys / 16; ++k)
      ptx::WgmmaShared<T, 64, 1, 1>::issue(dq, ptx::advanced(dscore, k * 16 * 128),
                                           ptx::advanced(columns, k * 16 * 128), k > 0);
    ptx::wgmma_commit();
  };
  int turn = 0, turns = 0;  // steps, pieces of dQ
  const auto add_dq = [&](int64_t tile, int chunk) {
    add_piece<S>(w, tile * S::kPieces + chunk, dq, smem, kGroup, turns, thread);
  };
  const auto release_dscore = [&](int turn) {
    if (lane == 0) ptx::barrier_arrive(&smem.dscore_empty[turn & 1]);
  };

  Step step = wait_for_step<S>(smem, ring, kGroup);
  while (step.row != kNoMoreSteps) {
    const int4 key_range = w.key_range[step.at.b];  // early, for its latency
    const int first = turn, key = step.at.key + key_of_tile;
    if constexpr (S::kShaped) key_coordinate = key_coordinates(p.features, step.at.b);
#pragma unroll
    for (int i = 0; i < S::kD / 2; ++i) gradient[i] = 0;
    place = key_ring.index();
    ptx::barrier_wait(&smem.key_full[place], key_ring.parity());
    ptx::barrier_wait(&smem.value_full[place], key_ring.parity());
    zero_unseen_keys<S>(key_range, step.at.key, smem.key[place], kGroup);
    keys = ptx::operand(kScores ? smem.key[place] : smem.value[place]);

    // Tiles of this step and the two before it.
    int64_t tile = row_tile<S>(step, tiles), previous = 0, last = 0;
    Step next;
    issue_products();
    ptx::wgmma_commit();  // in place of a second piece of dQ
    for (;; ++turn) {
      const int s = ring.index(), half = turn & 1, parity = turn >> 1 & 1;
      ptx::wgmma_wait<1>();
      ptx::pin(x);
      const RowsInPlace<float> lse(smem.statistics[s][0], thread);
      const RowsInPlace<int> positions(smem.limits[s][S::kLimits - 1], thread);
      const auto distances = distances_of(step, key_coordinate, key, positions);
      if constexpr (kScores) {
        make_probabilities<S>(x, shape, distances, lse, smem, s, step, key, [] {});
        if constexpr (S::kDropout) {  // what is dropped goes on with a minus
          uint32_t keep[1];
          ptx::barrier_wait(&smem.flags_full[s], ring.parity());
          read_flags(keep, smem.flags(s, thread / 32), key % 32);
          __syncwarp();
#pragma unroll
          for (int i = 0; i < 32; ++i)
            if (!stays(keep, i)) x[i] = -x[i];
        }
        round_fragment<__half>(x, packed);
        ptx::barrier_wait(&smem.probability_empty[half], parity ^ 1);
#pragma unroll
        for (int k = 0; k < 4; ++k)
          smem.probability[half][k][thread] =
              make_uint4(packed[k][0], packed[k][1], packed[k][2], packed[k][3]);
        __syncwarp();
        if (lane == 0) {
          ptx::barrier_arrive(&smem.probability_full[half]);
          ptx::barrier_arrive(&smem.query_empty[s]);
        }
        round_elements<T>([&](int i) { return S::kDropout ? fmaxf(x[i], 0.0f) : x[i]; }, packed);
      } else {
        if (lane == 0) ptx::barrier_arrive(&smem.dout_empty[s]);
        ptx::barrier_wait(&smem.probability_full[half], parity);
        uint4 probability[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) probability[k] = smem.probability[half][k][thread];
        const auto* pairs = reinterpret_cast<const uint32_t*>(probability);
        const auto sent = [&](int i) { return ptx::unpack(pairs[i / 2], i % 2, __half()); };
        const auto sent_size = [&](int i) { return S::kDropout ? fabsf(sent(i)) : sent(i); };
        score_gradients<S>(
            x, sent_size, [&](int i) { return !signbit(sent(i)); },
            RowsInPlace<float>(smem.statistics[s][1], thread), step.partial);
        if constexpr (S::kCapped) softcap_gradients(x, sent_size, lse, shape, distances);
        __syncwarp();
        if (lane == 0) ptx::barrier_arrive(&smem.probability_empty[half]);
        round_fragment<T>(x, packed);
      }
      // The second piece of the step before the previous one.
      ptx::wgmma_wait<0>();
      ptx::pin(dq);
      if (turn > first + 1) {
        release_dscore(turn);
        if constexpr (kTwoPieces) add_dq(last, kGroup + 2);
      }
      if constexpr (!kScores) {
        ptx::barrier_wait(&smem.dscore_empty[half], parity ^ 1);
        store_fragment<S::kKeys>(smem.dscore[half], 0, packed, thread);
        ptx::proxy_fence();
        __syncwarp();
        if (lane == 0) ptx::barrier_arrive(&smem.dscore_full[half]);
      } else {
        ptx::barrier_wait(&smem.dout_full[s], ring.parity());
      }
      // In a tile's first turn dQ is of whatever lies there, for nobody.
      if (turn > first) ptx::barrier_wait(&smem.dscore_full[half ^ 1], (turn - 1) >> 1 & 1);
      ptx::pin(gradient);
      ptx::pin(packed);
      ptx::wgmma_fence();
      issue_update<S>(gradient, packed,
                      ptx::operand(kScores ? smem.dout[s] : smem.query[s], S::kRows * 128));
      issue_dq(turn - 1, kGroup);
      ring.next();
      next = wait_for_step<S>(smem, ring, kGroup);
      ptx::wgmma_wait<0>();
      ptx::pin(gradient);
      ptx::pin(packed);
      ptx::pin(dq);
      if (lane == 0) ptx::barrier_arrive(kScores ? &smem.dout_empty[s] : &smem.query_empty[s]);
      if (turn > first) add_dq(previous, kGroup);
      if (next.opens || next.row == kNoMoreSteps) break;
      issue_products();
      if constexpr (kTwoPieces)
        issue_dq(turn - 1, kGroup + 2);
      else
        ptx::wgmma_commit();
      step = next;
      last = previous;
      previous = tile;
      tile = row_tile<S>(step, tiles);
    }
    // What is left: the second piece of the previous step, and all of the last one.
    const auto finish_piece = [&](int turn, int64_t tile, int chunk) {
      issue_dq(turn, chunk);
      ptx::wgmma_wait<0>();
      ptx::pin(dq);
      add_dq(tile, chunk);
    };
    if (turn > first) {
      if constexpr (kTwoPieces) finish_piece(turn - 1, previous, kGroup + 2);
      release_dscore(turn - 1);
    }
    ptx::barrier_wait(&smem.dscore_full[turn & 1], turn >> 1 & 1);
    finish_piece(turn, tile, kGroup);
    if constexpr (kTwoPieces) finish_piece(turn, tile, kGroup + 2);
    release_dscore(turn);
    ptx::named_sync(kBoth, 256);  // nobody reads K or V any more

#pragma unroll
    for (int i = 0; i < S::kD / 2; ++i) gradient[i] *= factor;
    uint32_t rounded[S::kD / 16][4];
    round_fragment<T>(gradient, rounded);
    store_fragment<S::kKeys>(kScores ? smem.value[place] : smem.key[place], 0, rounded, thread);
    ptx::proxy_fence();
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(&smem.gradient_full[place]);
    key_ring.next();
    step = next;
    ++turn;
  }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    backward_wide_kernel(const __grid_constant__ BackwardMaps maps, const BackwardParams p,
                         const BackwardWorkspace w, const KeyTileOrder order,
                         const ScoreShape shape, const KeepBits keep) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& smem = *reinterpret_cast<WideSmem<S>*>(raw);
  if (threadIdx.x == 0) {
    init_barriers<S>(smem, 4);
    for (int i = 0; i < 2; ++i) {
      ptx::barrier_init(&smem.probability_full[i], 4);
      ptx::barrier_init(&smem.probability_empty[i], 4);
    }
    ptx::barrier_init_fence();
  }
  __syncthreads();
  const int warpgroup = ptx::uniform(threadIdx.x / 128);
  if (warpgroup == 0) {
    ptx::release_registers<S::kProducerRegisters>();
    if (ptx::uniform(threadIdx.x / 32) == 0) load<S>(maps, p, w, order, smem);
    if (ptx::uniform(threadIdx.x / 32) == 3) zero_dq<S>(p, w);
    if (S::kDeterministic && (threadIdx.x == 32 || threadIdx.x == 64))
      keep_turns<S>(p, w, smem, threadIdx.x / 32 - 1);
    if constexpr (S::kDropout) {
      if (threadIdx.x / 32 >= 4 - S::kFlagWarps)
        make_flags<S>(keep, smem, smem.probability_empty, [&](int s, int n, int row, uint32_t x) {
          smem.flags(s, 2 * n)[row] = smem.flags(s, 2 * n + 1)[row] = x;
        });
    }
  } else {
    ptx::take_registers<S::kConsumerRegisters>();
    if (warpgroup == 1)
      consume_wide<S, true>(p, w, shape, smem);
    else
      consume_wide<S, false>(p, w, shape, smem);
  }
}

}  // namespace jax_flashattn::cuda::sm90
