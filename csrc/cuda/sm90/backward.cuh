// Backward pass for sm_90a, head dims up to 128 (docs/kernels.md).
//
// Block: a loading warp and two consumer warpgroups of 64 keys each. dK and dV stay in
// registers; P^T and dS^T are register operands of dV += P^T dO and dK += dS^T Q. dS^T also goes to
// shared memory for dQ = dS K, which lags a step behind and is added to global memory from
// registers. What a step needs from shared memory, and leaves there, takes some 200 clocks beside
// the products' operands, so where registers allow it is fetched ahead and stored behind them.
#pragma once

#include "cuda/sm90/backward_dropout.cuh"
#include "cuda/sm90/backward_load.cuh"

namespace jax_flashattn::cuda::sm90 {

template <class S>
struct NarrowSmem : BackwardSmem<S> {
  alignas(16) uint32_t flags[S::kStages][S::kKeys / 32][S::kDropout ? S::kRows : 1];  // dropout's
};

template <class S>
struct KeyRows {
  float dk[S::kD / 2], dv[S::kD / 2];
  float score[S::kRows / 2], dprobability[S::kRows / 2];
  float dq[32];
  uint32_t probability[S::kRows / 16][4], dscore[S::kRows / 16][4];
};

// A warpgroup of 64 keys. It makes one 64 x 64 piece of dQ: half of the columns, or of the rows.
template <class S>
__device__ void consume(const BackwardParams& p, const BackwardWorkspace& w,
                        const ScoreShape& shape, NarrowSmem<S>& smem, int group) {
  using T = typename S::T;
  // Kept in a register, or, where there is none, asked for again in every step.
  const int thread = (S::kCapped ? threadIdx.x : ptx::thread_index()) % 128, lane = thread % 32;
  const float kept_factor = S::kDropout ? static_cast<float>(kept_scale(p.features)) : 1.0f;
  const float dk_factor =
      static_cast<float>(p.scale) * (S::kDropout ? gradient_scale(p.features) : 1.0f);
  const int key_of_tile = 64 * group + thread / 32 * 16 + lane / 4;
  const int tiles = static_cast<int>((p.n.sq + S::kRows - 1) / S::kRows);
  static_assert(S::kPieces == 2 && S::kKeys == 128);
  constexpr bool kAhead = S::kRows == 64;  // where registers allow
  constexpr bool kLoadsAhead = kAhead && !(S::kCapped && S::kDropout);
  Ring<S::kStages> ring;
  Ring<S::kKeyStages> key_ring;
  KeyRows<S> t;
  KeyCoordinates keys{};
  int key;  // this thread's first
  constexpr bool kSplitColumns = S::kRows == 64;
  ptx::Operand key_rows, value_rows, key_columns;
  // Of the first stage; `at` has those of another.
  constexpr int kTileBytes = S::kRows * S::kWidth * 2, kScoreBytes = S::kKeys * S::kRows * 2;
  const ptx::Operand query_rows = ptx::operand(smem.query[0]),
                     query_columns = ptx::operand(smem.query[0], S::kRows * 128),
                     dout_rows = ptx::operand(smem.dout[0]),
                     dout_columns = ptx::operand(smem.dout[0], S::kRows * 128),
                     dscore_rows = ptx::operand(smem.dscore[0] +
                                                (kSplitColumns ? 0 : group * S::kKeys * kChunk));
  const auto at = [](ptx::Operand first, int stage) {
    return ptx::advanced(first, stage * kTileBytes);
  };

  const auto issue_scores = [&] {
    ptx::pin(t.score);
    ptx::wgmma_fence();
    issue_dot<S, S::kRows>(t.score, key_rows, S::kKeys, at(query_rows, ring.index()), S::kRows);
  };

  // dQ lags a step behind: the other warpgroup's part of dS^T is then long there.
  const auto issue_dq = [&](int turn) {
    const ptx::Operand dscore = ptx::advanced(dscore_rows, (turn & 1) * kScoreBytes);
#pragma unroll
    for (int k = 0; k < S::kKeys / 16; ++k)
      ptx::WgmmaShared<T, 64, 1, 1>::issue(t.dq, ptx::advanced(dscore, k * 16 * 128),
                                           ptx::advanced(key_columns, k * 16 * 128), k > 0);
    ptx::wgmma_commit();
  };
  int turn = 0, turns = 0;  // steps, pieces of dQ
  const auto finish_dq = [&](int turn, int64_t tile) {
    if (lane == 0) ptx::barrier_arrive(&smem.dscore_empty[turn & 1]);
    add_piece<S>(w, tile * 2 + group, t.dq, smem, group, turns, thread);
  };
  const auto store_dscore = [&] {
    ptx::barrier_wait(&smem.dscore_empty[turn & 1], (turn >> 1 & 1) ^ 1);
    store_fragment<S::kKeys>(smem.dscore[turn & 1], 64 * group, t.dscore, thread);
    ptx::proxy_fence();
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(&smem.dscore_full[turn & 1]);
  };

  Step step = wait_for_step<S>(smem, ring, group);
  while (step.row != kNoMoreSteps) {
    const int4 key_range = w.key_range[step.at.b];  // early, for its latency
    const int place = key_ring.index(), first = turn;
    key = step.at.key + key_of_tile;
    if constexpr (S::kShaped) keys = key_coordinates(p.features, step.at.b);
#pragma unroll
    for (int i = 0; i < S::kD / 2; ++i) t.dk[i] = t.dv[i] = 0;
    ptx::barrier_wait(&smem.key_full[place], key_ring.parity());
    ptx::barrier_wait(&smem.value_full[place], key_ring.parity());
    zero_unseen_keys<S>(key_range, step.at.key, smem.key[place], group);
    key_rows = ptx::operand(smem.key[place] + 64 * group * kChunk);
    value_rows = ptx::operand(smem.value[place] + 64 * group * kChunk);
    // dQ piece: dS^T chunk and K chunk, both with keys as rows.
    key_columns = ptx::operand(smem.key[place] + (kSplitColumns ? group * S::kKeys * kChunk : 0));

    issue_scores();
    int64_t tile = row_tile<S>(step, tiles), previous = 0;
    Step next;
    for (;; ++turn) {
      const int s = ring.index();
      RowNumbers<kLoadsAhead, float, S::kRows / 2> lse(smem.statistics[s][0], thread),
          delta(smem.statistics[s][1], thread);
      RowNumbers<kLoadsAhead && !S::kCapped, int, S::kRows / 2> positions(
          smem.limits[s][S::kLimits - 1], thread);
      lse.load();
      ptx::barrier_wait(&smem.dout_full[s], ring.parity());
      ptx::pin_dead(t.dprobability);
      ptx::wgmma_fence();
      issue_dot<S, S::kRows>(t.dprobability, value_rows, S::kKeys, at(dout_rows, s), S::kRows);
      [[maybe_unused]] uint32_t keep[S::kRows / 64];
      if constexpr (S::kDropout) {
        ptx::barrier_wait(&smem.flags_full[s], ring.parity());
        read_flags(keep, smem.flags[s][key_of_tile / 32], key_of_tile % 32);
        __syncwarp();
        if (lane == 0) ptx::barrier_arrive(&smem.flags_empty[s]);
      }
      const auto kept = [&](int i) { return !S::kDropout || stays(keep, i); };
      if constexpr (S::kShaped) positions.load();
      const auto distances = distances_of(step, keys, key, positions);
      ptx::wgmma_wait<1>();
      ptx::pin(t.score);
      // The softcap's derivative, where registers allow, in those of a dS^T that is done with.
      constexpr bool kKeepsSteepness = S::kCapped && S::kRows == 64;
      const auto keep_steepness = [&] {
        if constexpr (kKeepsSteepness) {
          if (shape.cap == 0) return;
          const float inverse = 1.0f / shape.cap;
          round_elements<__half>(
              [&](int i) {
                const float tanh = t.score[i] * inverse;
                return 1.0f - tanh * tanh;
              },
              t.dscore);
        }
      };
      make_probabilities<S>(t.score, shape, distances, lse, smem, s, step, key, keep_steepness);
      delta.load();
      ptx::wgmma_wait<0>();
      ptx::pin(t.dprobability);
      const auto probability = [&](int i) { return t.score[i]; };
      score_gradients<S>(t.dprobability, probability, kept, delta, step.partial);
      if constexpr (kKeepsSteepness) {
        if (shape.cap != 0) {
#pragma unroll
          for (int i = 0; i < S::kRows / 2; ++i)
            t.dprobability[i] *= ptx::unpack(t.dscore[i / 8][i % 8 / 2], i % 2, __half());
        }
      } else if constexpr (S::kCapped) {
        softcap_gradients(t.dprobability, probability, lse, shape, distances);
      }
      round_elements<T>([&](int i) { return kept(i) ? t.score[i] : 0.0f; }, t.probability);
      round_fragment<T>(t.dprobability, t.dscore);
      if constexpr (!kAhead) store_dscore();

      // In a tile's first turn dQ is of whatever lies there, for nobody: a product issued under a
      // condition would make ptxas wait for all of them.
      if (turn > first) ptx::barrier_wait(&smem.dscore_full[(turn - 1) & 1], (turn - 1) >> 1 & 1);
      ptx::pin(t.dv);
      ptx::pin(t.probability);
      ptx::pin_dead(t.dq);
      ptx::pin(t.dk);
      ptx::pin(t.dscore);
      ptx::wgmma_fence();
      if constexpr (kAhead) issue_dq(turn - 1);
      issue_update<S>(t.dv, t.probability, at(dout_columns, s));
      if constexpr (!kAhead) issue_dq(turn - 1);
      issue_update<S>(t.dk, t.dscore, at(query_columns, s));
      if constexpr (kAhead) store_dscore();

      ring.next();
      next = wait_for_step<S>(smem, ring, group);
      if constexpr (kAhead) {
        ptx::wgmma_wait<2>();  // dQ is done
        ptx::pin(t.dq);
        if (turn > first) finish_dq(turn - 1, previous);
      }
      ptx::wgmma_wait<1>();  // dV and dQ are done
      ptx::pin(t.dv);
      ptx::pin(t.probability);
      if constexpr (!kAhead) ptx::pin(t.dq);
      if (lane == 0) ptx::barrier_arrive(&smem.dout_empty[s]);
      // The way out has its own wait, in front of the next product: otherwise ptxas serialises all.
      if (next.opens || next.row == kNoMoreSteps) {
        ptx::wgmma_wait<0>();
        ptx::pin(t.dk);
        ptx::pin(t.dscore);
        if (lane == 0) ptx::barrier_arrive(&smem.query_empty[s]);
        break;
      }
      issue_scores();
      if (!kAhead && turn > first) finish_dq(turn - 1, previous);
      ptx::wgmma_wait<1>();  // dK is done
      ptx::pin(t.dk);
      ptx::pin(t.dscore);
      if (lane == 0) ptx::barrier_arrive(&smem.query_empty[s]);
      step = next;
      previous = tile;
      tile = row_tile<S>(step, tiles);
    }
    if (!kAhead && turn > first) finish_dq(turn - 1, previous);
    ptx::barrier_wait(&smem.dscore_full[turn & 1], turn >> 1 & 1);
    ptx::pin_dead(t.dq);
    ptx::wgmma_fence();
    issue_dq(turn);
    const auto hand_on = [&](float(&gradient)[S::kD / 2], float factor, T* to) {
#pragma unroll
      for (int i = 0; i < S::kD / 2; ++i) gradient[i] *= factor;
      uint32_t packed[S::kD / 16][4];
      round_fragment<T>(gradient, packed);
      store_fragment<S::kKeys>(to, 64 * group, packed, thread);
    };
    const auto hand_on_dk = [&](T* to) { hand_on(t.dk, dk_factor, to); };
    const auto hand_on_dv = [&] { hand_on(t.dv, kept_factor, smem.value[place]); };
    const auto arrive = [&](uint64_t* full) {
      ptx::proxy_fence();
      __syncwarp();
      if (lane == 0) ptx::barrier_arrive(full);
    };
    if constexpr (S::kStagesDk) {
      // Nobody reads V any more: both warpgroups have handed on their dS.
      hand_on_dv();
      arrive(&smem.dv_full);
    }
    ptx::wgmma_wait<0>();
    ptx::pin(t.dq);
    if constexpr (S::kStagesDk) {
      if (lane == 0) ptx::barrier_arrive(&smem.key_empty);
    }
    finish_dq(turn, tile);
    if constexpr (S::kStagesDk) {
      ptx::barrier_wait(&smem.dk_empty, key_ring.parity() ^ 1);
      hand_on_dk(smem.staged_dk);
      arrive(&smem.dk_full);
    } else {
      ptx::named_sync(kBoth, 256);  // nobody reads K any more
      hand_on_dk(smem.key[place]);
      hand_on_dv();
      arrive(&smem.gradient_full[place]);
    }
    key_ring.next();
    step = next;
    ++turn;
  }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    backward_kernel(const __grid_constant__ BackwardMaps maps, const BackwardParams p,
                    const BackwardWorkspace w, const KeyTileOrder order, const ScoreShape shape,
                    const KeepBits keep) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& smem = *reinterpret_cast<NarrowSmem<S>*>(raw);
  if (threadIdx.x == 0) {
    init_barriers<S>(smem, 8);
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
        make_flags<S>(keep, smem, smem.flags_empty,
                      [&](int s, int n, int row, uint32_t x) { smem.flags[s][n][row] = x; });
    }
  } else {
    ptx::take_registers<S::kConsumerRegisters>();
    consume<S>(p, w, shape, smem, warpgroup - 1);
  }
}

}  // namespace jax_flashattn::cuda::sm90
