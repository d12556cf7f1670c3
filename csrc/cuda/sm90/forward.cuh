// Forward pass for sm_90a: persistent, warp-specialised, TMA and wgmma (docs/kernels.md).
//
// Block: one producer warpgroup and kGroups consumer warpgroups of 64 query rows. A tile is kRows
// query rows of one head; its visible keys come in blocks of kKeys. Of the producers, a warp for
// each 64 rows computes the limits of the tile's rows (scout) and one keeps the copy engine busy
// (load); both run a tile ahead, the scouts more where tiles are short. Two consumer
// warpgroups overlap the softmax of one block with the products of its neighbours; three leave that
// to each other.
//
// Barriers (mbarriers, one per stage; "full" by the copy engine, "empty" by consumers):
//   info_full/info_empty     TileInfo and row limits, by the scout; emptied when the tile is done
//   query_full/query_empty   Q tile; emptied when the tile's output has left through it, or
//                            (!kStaged) when its last scores are there
//   key_full/key_empty, value_full/value_empty   K and V blocks, each in its own ring
// Every consumer warp waits for and releases every block in order, also those it skips: a parity
// wait cannot tell use u from u + 2, so no warp may fall two uses behind.
#pragma once

#include "cuda/sm90/forward_dropout.cuh"
#include "cuda/sm90/forward_rows.cuh"

namespace jax_flashattn::cuda::sm90 {

// Zeros for the rows of a tile of which this warpgroup sees nothing (S11).
template <class S>
__device__ void write_nothing(const ForwardParams& p, const TilePlace& at, int group) {
  const int64_t heads = p.n.g * p.n.r;
  const int first = at.row + 64 * group, last = min(int64_t(first) + 64, p.n.sq);
  if (first < 0) return;
  for (int row = first + threadIdx.x % 128 / 32; row < last; row += 4) {
    auto* out =
        static_cast<uint32_t*>(p.out) + ((at.b * p.n.sq + row) * heads + at.head) * p.n.dv / 2;
    for (int i = threadIdx.x % 32; i < p.n.dv / 2; i += 32) out[i] = 0;
  }
}

// What a warpgroup keeps of the tile it works on; the rest stays in TileInfo.
struct Tile {
  int group;               // 64 of its rows are this warpgroup's
  int first_key;           // blocks start at first_key + n * kStep
  int begin, end;          // those that this warpgroup's rows see
  int full_from, full_to;  // every row sees every key of blocks that start here
  int end_key;             // no row of the tile sees a key from here on
  // kInProduct: of this warpgroup's rows, and whether all coordinates are far from wrapping around.
  int min_position, max_position;
  bool ordinary;
};

// On which side of all rows of a tile the keys of a block lie, and its place among
// ForwardExtra::distance.
enum Side { kBelow, kAbove, kNeither };
template <class S>
__device__ __forceinline__ bool are_ordinary(const KeyCoordinates& keys, const Tile& tile) {
  constexpr int64_t kFar = 1 << 29;
  const int64_t start = static_cast<int>(keys.start), stride = static_cast<int>(keys.stride);
  const int64_t first = start + stride * tile.first_key,
                last = start + stride * (tile.first_key + (tile.end + 1) * S::kStep);
  return -kFar < tile.min_position && tile.max_position < kFar && -kFar < min(first, last) &&
         max(first, last) < kFar;
}
template <class S>
__device__ __forceinline__ Side side_of(const KeyCoordinates& keys, const Tile& tile, int block) {
  const int first = tile.first_key + block * S::kStep;
  const int from = keys.at(first), to = keys.at(first + S::kKeys - 1);
  if (!tile.ordinary) return kNeither;
  if (max(from, to) <= tile.min_position) return kBelow;
  return min(from, to) >= tile.max_position ? kAbove : kNeither;
}

template <class S>
__device__ void consume(const ForwardMaps& maps, const ForwardParams& p, ScoreScale scale,
                        ForwardSmem<S>& smem, int warpgroup) {
  const int thread = threadIdx.x % 128;
  const bool leader = thread == 0;
  const float scale_ln = scale.exponent * 0.6931471805599453f;
  Ring<S::kTiles> place;
  Ring<S::kQueries> query;
  Ring<S::kStages> key, value;
  Rows<S> rows;
  Tile tile;
  // Each warpgroup takes another group of rows of each tile: under a causal mask the last see most.
  tile.group = warpgroup;
  [[maybe_unused]] int owed = -1;  // query buffer whose output store has not been waited for

  const auto release_query = [&] {
    if constexpr (S::kStaged) {
      if (leader && owed >= 0) {
        ptx::tma_wait_read();
        ptx::barrier_arrive(&smem.query_empty[owed]);
      }
      owed = -1;
    } else {
      if (thread % 32 == 0) ptx::barrier_arrive(&smem.query_empty[query.index()]);
    }
  };
  const auto release_info = [&](int i) {
    __syncwarp();
    if (thread % 32 == 0) ptx::barrier_arrive(&smem.info_empty[i]);
  };
  const auto release_key = [&] {
    if (thread % 32 == 0) ptx::barrier_arrive(&smem.key_empty[key.index()]);
    key.next();
  };
  const auto release_value = [&](int i) {
    if (thread % 32 == 0) ptx::barrier_arrive(&smem.value_empty[i]);
  };
  const auto skip = [&](int count) {
#pragma unroll 1
    for (int n = 0; n < count; ++n) {
      ptx::barrier_wait(&smem.key_full[key.index()], key.parity());
      release_key();
      ptx::barrier_wait(&smem.value_full[value.index()], value.parity());
      release_value(value.index());
      value.next();
    }
  };

  const auto next_tile = [&] {
    place.next();
    query.next();
  };
  // The tile at `place`; false when there are no more.
  const auto take_tile = [&] {
    const int i = place.index();
    ptx::barrier_wait(&smem.info_full[i], place.parity());
    const TileInfo& info = smem.info[i];
    if (info.blocks == kNoMoreTiles) return false;
    const int group = tile.group = tile.group + 1 == S::kGroups ? 0 : tile.group + 1;
    ptx::barrier_wait(&smem.query_full[query.index()], query.parity());
    tile.first_key = info.first_key;
    tile.full_from = info.max_lo[group];
    tile.full_to = info.min_hi[group] - S::kKeys;
    tile.end_key = info.end_key;
    // ptxas must see that lanes leave the loops between these together: otherwise it brings them
    // together again in every turn, with a YIELD and per-lane counters.
    block_range<S>(info, group, &tile.begin, &tile.end);
    tile.begin = ptx::uniform(tile.begin);
    tile.end = ptx::uniform(tile.end);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      rows.largest[h] = -INFINITY;
      rows.sum[h] = 0;
    }
    if constexpr (S::kShaped) {
      rows.slope = info.slope;
      rows.keys = key_coordinates(p.features, info.at.b);
    }
    if constexpr (S::kInProduct) {
      tile.min_position = info.min_position[group];
      tile.max_position = info.max_position[group];
      tile.ordinary = fabsf(scale.sign) == 1 && are_ordinary<S>(rows.keys, tile);
    }
    return true;
  };
  // From a tile that was taken or not (`more`) to one of which these rows see something.
  const auto find_tile = [&](bool more) {
    while (more && tile.begin >= tile.end) {
      const TileInfo& info = smem.info[place.index()];
      float factor[2];
      finish_rows<S>(p, rows, smem.rows[place.index()], info.at, tile.group, scale_ln, factor);
      write_nothing<S>(p, info.at, tile.group);
      skip(info.blocks);
      release_query();
      if constexpr (S::kStaged) {
        owed = query.index();
        release_query();
      }
      release_info(place.index());
      next_tile();
      more = take_tile();
    }
    return more;
  };

  const auto wait_for_key = [&] { ptx::barrier_wait(&smem.key_full[key.index()], key.parity()); };
  const auto wait_for_value = [&] {
    ptx::barrier_wait(&smem.value_full[value.index()], value.parity());
  };
  constexpr int kPlaceBytes = sizeof smem.key[0];
  const ptx::Operand first_key = ptx::operand(smem.key[0]),
                     first_value = ptx::operand(smem.value[0], S::kKeys * 128);
  const auto query_operand = [&] {
    return ptx::operand(smem.query[query.index()] + 64 * tile.group * kChunk);
  };
  ptx::Operand query_rows;  // kAdvances: of this tile
  Side side = kNeither;     // of the block whose scores were asked for last
  struct ScoreOperands {
    ptx::Operand query, key, side, distance;
  };
  const auto score_operands = [&](int block) -> ScoreOperands {
    ScoreOperands operands;
    if constexpr (S::kAdvances)
      operands = {query_rows, ptx::advanced(first_key, key.index() * kPlaceBytes)};
    else
      operands = {query_operand(), ptx::operand(smem.key[key.index()])};
    if constexpr (S::kInProduct) {
      side = side_of<S>(rows.keys, tile, block);
      operands.side = ptx::operand(smem.side + 16 * side);
      operands.distance = ptx::operand(smem.distance + 16 * place.index());
    }
    return operands;
  };
  const auto scores = [&](const ScoreOperands& operands) {
    ptx::pin(rows.score);
    ptx::wgmma_fence();
    issue_scores<S>(rows.score, operands.query, operands.key);
    if constexpr (S::kInProduct)
      ptx::WgmmaShared<__nv_bfloat16, S::kKeys, 0, 0>::issue(rows.score, operands.side,
                                                             operands.distance, 1);
    ptx::wgmma_commit();
  };
  // A tile's first; no product is in flight.
  const auto first_scores = [&] {
    if constexpr (S::kAdvances) query_rows = query_operand();
    skip(tile.begin);
    wait_for_key();
    scores(score_operands(tile.begin));
  };
  const auto scores_done = [&] {
    ptx::pin(rows.score);
    release_key();
  };
  // Registers that a product reads may not be written while it is in flight, so exponentials are
  // rounded into others as they come. `zero` hides from ptxas that these are copies: it would
  // merge both, and the product in flight would read the next block's numbers. That it comes from a
  // reduction keeps the copies behind the scores' product, which starts at once; without, ptxas
  // puts them between its instructions. kSerial: none is in flight.
  Probabilities<S> probability, rounded;
  [[maybe_unused]] Probabilities<S>& newest = S::kSerial ? probability : rounded;
  [[maybe_unused]] Ring<kFlagStages> flags;
  const auto take_flags = [&] {
    if constexpr (S::kDropout) {
      ptx::barrier_wait(&smem.flags_full[warpgroup][flags.index()], flags.parity());
      rows.flags = smem.flags[warpgroup][flags.index()];
    }
  };
  const auto release_flags = [&] {
    if constexpr (S::kDropout) {
      __syncwarp();
      if (thread % 32 == 0) ptx::barrier_arrive(&smem.flags_empty[warpgroup][flags.index()]);
      flags.next();
    }
  };
  const auto take_probabilities = [&] {
    if constexpr (S::kRoundsEarly) {
      const uint32_t zero = __reduce_or_sync(0xffffffffu, scale.zero);
#pragma unroll
      for (int k = 0; k < S::kKeys / 16; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) probability[k][i] = rounded[k][i] ^ zero;
      }
    } else if constexpr (!S::kSerial) {
      take_flags();
      round_probabilities<S>(rows, probability);
      release_flags();
    }
  };
  // `last`: of its tile. Only that block may hold keys that no row sees, or walked down the first.
  // Where a softcap leaves no room for kQuick it costs nothing to look, and saves spills.
  const auto outputs = [&](auto last, int block) {
    const ptx::Operand values = S::kAdvances
                                    ? ptx::advanced(first_value, value.index() * kPlaceBytes)
                                    : ptx::operand(smem.value[value.index()], S::kKeys * 128);
    if constexpr (last.value || S::kStep < 0 || (S::kCapped && !S::kQuick)) {
      const int first = tile.first_key + block * S::kStep;
      if (__any_sync(0xffffffffu, first + S::kKeys > tile.end_key)) {
        zero_values<S>(smem.value[value.index()], tile.end_key - first);
        ptx::named_sync(1 + warpgroup, 128);
      }
    }
    ptx::pin(rows.out);
    ptx::pin(probability);
    ptx::wgmma_fence();
    issue_output<S>(rows.out, probability, values);
    value.next();
  };
  // The wait for a product stands at the top of the next turn, unless kSerial: within one stretch
  // of code ptxas moves it in front of the softmax, and with it the overlap away.
  const auto outputs_done = [&](bool issued) {
    ptx::wgmma_wait<0>();
    ptx::pin(rows.out);
    ptx::pin(probability);
    if (issued) release_value((value.uses - 1) % S::kStages);
  };
  // kInTurn: while the other warpgroup's warp on the same tensor core issues products, this one
  // does not, so that one's come while the other works on its scores. No lock: both may pass at
  // once, and nobody waits for long. What else must be waited for has come.
  const auto begin_products = [&] {
    if constexpr (S::kInTurn) {
      constexpr int kLooks = 200;
      ptx::wait_while_set(&smem.issuing[1 - warpgroup][thread / 32], kLooks);
      ptx::set_word(&smem.issuing[warpgroup][thread / 32], 1);
    }
  };
  const auto end_products = [&] {
    if constexpr (S::kInTurn) ptx::set_word(&smem.issuing[warpgroup][thread / 32], 0);
  };
  // What is known of a block before its scores are there.
  bool special = false;  // more is to be done than the softmax
  // kQuick: all rows have a reference, and the last search for maxima left it as it was. With a
  // softcap, too, no block of the tile that was tried without a search had to be searched after
  // all.
  [[maybe_unused]] bool steady = false, hopeful = true;
  bool busy = false;  // special or, if kQuick, not steady
  const auto prepare = [&](int block) {
    const int first = tile.first_key + block * S::kStep;
    bool rare = first < tile.full_from || first > tile.full_to || scale.sign != 1;
    if constexpr (S::kInProduct) {
      rare |= side == kNeither;
      const int* position = smem.rows[place.index()].position;
      const int from = rows.keys.at(first);
      const float slope = side == kNeither ? 0.0f : side == kBelow ? rows.slope : -rows.slope;
#pragma unroll
      for (int h = 0; h < 2; ++h)
        rows.offset[h] = slope * static_cast<float>(from - position[row_of_thread(tile.group, h)]);
    } else if constexpr (S::kShaped) {
      rare |= rows.slope != 0;
    }
    special = __any_sync(0xffffffffu, rare);
    busy = S::kQuick ? __any_sync(0xffffffffu, rare || !steady) : special;
  };
  float correction[2];
  const auto cap = [&] {
    if constexpr (S::kCapped) {
      if (scale.capped) cap_scores<S>(rows, scale.factor);
    }
  };
  // What a block that is busy needs before its exponentials.
  const auto shape = [&](int block) {
    if constexpr (S::kPolynomial) cap();
    if (scale.sign != 1) apply_sign<S>(rows, scale.sign);
    if (special) {
      const int first = tile.first_key + block * S::kStep;
      const TileRows<S>& limits = smem.rows[place.index()];
      if constexpr (S::kShaped) {
        if (rows.slope != 0 && side == kNeither) {
          int position[2];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int row = row_of_thread(tile.group, h);
            if constexpr (S::kPositioned)
              position[h] = limits.position[row];
            else
              position[h] = position_of(p, smem.info[place.index()].at, row);
          }
          subtract_distances<S>(rows, position, first);
        }
      }
      if (__any_sync(0xffffffffu, first < tile.full_from || first > tile.full_to))
        apply_mask<S>(rows, limits, tile.group, first);
    }
  };
  const auto exponentials = [&](int block) {
    if (!S::kStaged && block == tile.end - 1) release_query();
    if constexpr (S::kRoundsEarly) take_flags();
    if constexpr (!S::kPolynomial) cap();
    bool quick = S::kQuick;
    if (__builtin_expect(busy, false)) {
      shape(block);
      quick = steady && !S::kPolynomial;
    }
    if constexpr (S::kQuick) {
      if (quick) {
        if (__builtin_expect(quick_softmax<S>(rows, scale, newest), true)) {
          rows.moved = false;
          release_flags();
          ptx::pin(newest);
          return;
        }
        if constexpr (S::kPolynomial) cap();
        hopeful = !S::kPolynomial;
      }
    }
    softmax<S>(rows, scale.exponent, correction);
    if constexpr (S::kQuick)
      steady = hopeful && (block == tile.begin || !rows.moved) &&
               __all_sync(0xffffffffu, fminf(rows.largest[0], rows.largest[1]) > -INFINITY);
    if constexpr (S::kRoundsEarly || S::kSerial) {
      round_probabilities<S>(rows, newest);
      release_flags();
      ptx::pin(newest);
    }
  };
  // From the scores of a tile's first block to the issue of its last product.
  const auto work = [&] {
    exponentials(tile.begin);
    if constexpr (S::kStaged) release_query();
#pragma unroll
    for (int i = 0; i < S::kD / 2; ++i) rows.out[i] = 0;
    for (int n = tile.begin + 1; n < tile.end; ++n) {
      const bool key_here = ptx::barrier_test(&smem.key_full[key.index()], key.parity());
      const bool value_here = ptx::barrier_test(&smem.value_full[value.index()], value.parity());
      const ScoreOperands operands = score_operands(n);  // early, for their latency
      if constexpr (!S::kSerial) outputs_done(n > tile.begin + 1);
      if constexpr (!S::kRoundsEarly) take_probabilities();
      if (__any_sync(0xffffffffu, !key_here || !value_here)) {
        wait_for_key();
        wait_for_value();
      }
      begin_products();
      scores(operands);
      if (rows.moved) scale_output<S>(rows, correction);
      if constexpr (S::kRoundsEarly) take_probabilities();
      outputs(std::false_type(), n - 1);
      end_products();
      prepare(n);
      if constexpr (S::kSerial)
        outputs_done(true);
      else
        ptx::wgmma_wait<1>();
      scores_done();
      exponentials(n);
    }
    if constexpr (!S::kSerial) outputs_done(tile.end > tile.begin + 1);
    wait_for_value();
    take_probabilities();
    if (rows.moved) scale_output<S>(rows, correction);
    outputs(std::true_type(), tile.end - 1);
  };

  float factor[2];
  // Output of the tile at `i`, whose queries were in `buffer`.
  const auto write = [&](int i, int group, int buffer) {
    normalise_output<S>(rows, factor);
    if constexpr (S::kStaged) {
      owed = buffer;
      stage_output<S>(maps, rows, p.n.dv, smem.info[i].at, group, smem.query[owed], 1 + warpgroup);
    } else {
      store_output<S>(p, rows, smem.info[i].at, group);
    }
    release_info(i);
  };

  bool more = find_tile(take_tile());
  while (more) {
    first_scores();
    int done, group, buffer;  // of the tile whose output is to be written
    bool taken;               // the tile behind it
    for (;;) {
      steady = false;
      hopeful = true;
      prepare(tile.begin);
      ptx::wgmma_wait<0>();
      scores_done();
      work();
      done = place.index();
      group = tile.group;
      buffer = query.index();
      finish_rows<S>(p, rows, smem.rows[done], smem.info[done].at, group, scale_ln, factor);
      const int unseen = smem.info[done].blocks - tile.end;
      next_tile();
      // The loader comes to the next tile's queries with at most kStages values behind this one.
      const bool early = unseen < S::kStages;
      if (early) more = take_tile();
      outputs_done(true);
      skip(unseen);
      taken = early;
      if (!early || !more || tile.begin >= tile.end) break;
      // The next tile's first scores come before this one's output.
      first_scores();
      write(done, group, buffer);
    }
    write(done, group, buffer);
    if (!taken) more = take_tile();
    more = find_tile(more);
  }
  if constexpr (S::kStaged) {
    release_query();
    if (leader) ptx::tma_wait();
  }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    forward_kernel(const __grid_constant__ ForwardMaps maps, const ForwardParams p,
                   const ScoreScale scale, const TileOrder order, const KeepBits keep) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& smem = *reinterpret_cast<ForwardSmem<S>*>(raw);
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kQueries; ++i) {
      ptx::barrier_init(&smem.query_full[i], 1);
      ptx::barrier_init(&smem.query_empty[i], S::kStaged ? S::kGroups : 4 * S::kGroups);
    }
    for (int i = 0; i < S::kTiles; ++i) {
      ptx::barrier_init(&smem.info_full[i], 1);
      ptx::barrier_init(&smem.info_empty[i], 4 * (S::kGroups + S::kDropout) + 1);
    }
    for (int i = 0; i < S::kStages; ++i) {
      ptx::barrier_init(&smem.key_full[i], 1);
      ptx::barrier_init(&smem.key_empty[i], 4 * S::kGroups);
      ptx::barrier_init(&smem.value_full[i], 1);
      ptx::barrier_init(&smem.value_empty[i], 4 * S::kGroups);
    }
    if constexpr (S::kDropout) {
      for (int i = 0; i < S::kGroups * kFlagStages; ++i) {
        ptx::barrier_init(&smem.flags_full[0][i], 2);
        ptx::barrier_init(&smem.flags_empty[0][i], 4);
      }
    }
    ptx::barrier_init_fence();
  }
  if constexpr (S::kInProduct) init_distances<S>(smem);
  if (S::kInTurn && threadIdx.x < 8) smem.issuing[threadIdx.x / 4][threadIdx.x % 4] = 0;
  __syncthreads();
  const int warpgroup = ptx::uniform(threadIdx.x / 128);
  if (warpgroup == 0) {
    ptx::release_registers<S::kProducerRegisters>();
    const int group = ptx::uniform(threadIdx.x / 32) - 1;
    if (group < 0) load<S>(maps, static_cast<int>(p.n.r), smem);
    if (0 <= group && group < S::kGroups) scout<S>(p, order, scale, smem, group);
  } else if (warpgroup <= S::kGroups) {
    ptx::take_registers<S::kConsumerRegisters>();
    consume<S>(maps, p, scale, smem, warpgroup - 1);
  } else if constexpr (S::kDropout) {
    ptx::release_registers<S::kFlagRegisters>();
    make_flags<S>(p, keep, smem);
  }
}

}  // namespace jax_flashattn::cuda::sm90
