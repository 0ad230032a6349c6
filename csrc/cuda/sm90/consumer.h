// A consumer warpgroup of the sm_90a kernel, which computes 64 of a job's rows.
//
// Tensor cores and softmax overlap in two ways (Shah et al., FlashAttention-3, 2024). Within a
// warpgroup, the scores of the next tile and the weighted values of this one are in flight while
// the softmax of the next is computed. Between warpgroups, a token is passed round: the holder
// issues its products, so that the softmax of one warpgroup runs during the products of the others.
#pragma once

#include <cstdint>

#include "cuda/sm90/descriptors.h"
#include "cuda/sm90/ptx.h"
#include "cuda/sm90/schedule.h"
#include "cuda/sm90/shared.h"
#include "cuda/sm90/softmax.h"

namespace cptool::cuda::sm90 {
namespace {

// A thread's part of the scores, and of the weights as fragments.
using Scores = float[kKeys / 2];
using Weights = uint32_t[kKeys / 4];

template <class T, class Plan>
struct Consumer {
  static constexpr int kHeadDim = Plan::kHeadDim;
  static constexpr bool kPlain = Plan::kPlain;
  using Out = float[Plan::kColumns / 2];
  // A thread's part of Q as fragments, four registers for each 16 columns; unused without kHoldsQ.
  using Queries = uint32_t[Plan::kHoldsQ ? kHeadDim / 4 : 4];

  Shared<Plan>& shared;
  const int warpgroup, lane;
  const int first_row;       // the first of the thread's two rows in the job; the other is 8 below
  Turn<Plan::kStages> turn;  // of the next tile's K; values are one tile behind the scores
  Turn<1> q_turn;

  __device__ __forceinline__ static uint32_t address(const uint64_t& barrier) {
    return ptx::shared_address(&barrier);
  }

  // One arrival per warp: all its threads have waited for its products, which have read the buffer.
  __device__ __forceinline__ void release(const uint64_t& barrier) const {
    if (lane == 0) ptx::mbarrier_arrive(address(barrier));
  }

  // Warpgroup w takes the token at named barrier 1 + w; half of the arrivals there are the giver's.
  __device__ __forceinline__ void take_token() const {
    ptx::barrier_sync(1 + warpgroup, 2 * kWarpgroup);
  }
  __device__ __forceinline__ void give_token() const {
    ptx::barrier_arrive(1 + (warpgroup + 1) % Plan::kConsumers, 2 * kWarpgroup);
  }

  // Waits for the K of a tile.
  __device__ __forceinline__ void wait_for_keys(Turn<Plan::kStages> of) const {
    ptx::mbarrier_wait(address(shared.k_full[of.stage()]), of.parity());
  }

  // Reads the warp's 16 rows of Q as fragments: rows 0 to 7 and 8 to 15 of a step's lower 16 bytes,
  // then of the upper ones, where the swizzle has put them.
  __device__ __forceinline__ void load_queries(Queries& queries) const {
    const int row = first_row - lane / 4 + lane % 16;
    const uint32_t start = ptx::shared_address(shared.q) + row * kRowBytes;
#pragma unroll
    for (int step = 0; step < kHeadDim / kDepth; ++step) {
      constexpr int kSteps = kPanelColumns / kDepth;
      const int chunk = (2 * (step % kSteps) + lane / 16) ^ (row % 8);
      uint32_t four[4];
      ptx::ldmatrix_x4(four, start + step / kSteps * Plan::kQPanelBytes + chunk * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) queries[4 * step + i] = four[i];
    }
  }

  // Issues scores = Q K^T of the next tile.
  __device__ __forceinline__ void issue_scores(Scores& scores, const Queries& queries) const {
    const uint64_t q =
        rows_descriptor(ptx::shared_address(shared.q) + warpgroup * kWarpgroupRows * kRowBytes);
    const uint64_t k = rows_descriptor(ptx::shared_address(shared.k[turn.stage()]));
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kHeadDim / kDepth; ++step) {
      const uint64_t keys = advance(k, step_along_rows(step, Plan::kPanelBytes));
      if constexpr (Plan::kHoldsQ) {
        ptx::wgmma_registers_rows<T>(scores, queries + 4 * step, keys, step > 0);
      } else {
        ptx::wgmma_shared<T>(scores, advance(q, step_along_rows(step, Plan::kQPanelBytes)), keys,
                             step > 0);
      }
    }
    ptx::wgmma_commit();
  }

  // Call after waiting for the scores: K has been read, and Q in shared memory for the last time if
  // this was the tile that begins the keys.
  __device__ __forceinline__ void scores_done(Scores& scores, Queries& queries, int32_t left) {
    ptx::keep_in_place(scores);
    if constexpr (Plan::kHoldsQ) ptx::keep_in_place(queries);
    release(shared.k_empty[turn.stage()]);
    if (!Plan::kHoldsQ && left == 0) {
      release(shared.q_empty);
      q_turn.next();
    }
  }

  // Waits for the V of the previous tile, and issues out += weights V.
  __device__ __forceinline__ void issue_values(const Weights& weights, Out& out) const {
    const Turn<Plan::kStages> before = turn.previous();
    ptx::mbarrier_wait(address(shared.v_full[before.stage()]), before.parity());
    const uint64_t v =
        columns_descriptor(ptx::shared_address(shared.v[before.stage()]), Plan::kPanelBytes);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kKeys / kDepth; ++step) {
      ptx::wgmma_registers<T>(out, weights + 4 * step, advance(v, step_across_rows(step)));
    }
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void values_done(Weights& weights, Out& out) const {
    ptx::keep_in_place(out);
    ptx::keep_in_place(weights);
    release(shared.v_empty[turn.previous().stage()]);
  }

  // Returns which tile of the job has its K in the buffer. Call before scores_done().
  __device__ __forceinline__ int32_t tile_of_keys(int32_t left) const {
    if constexpr (kPlain) return left;
    const int32_t tile = shared.k_tiles[turn.stage()];
    __syncwarp();  // every lane has read it
    return tile;
  }

  // Makes of the sums of products of a tile what softmax takes.
  __device__ __forceinline__ void cap_and_mask(Scores& scores, const Job& job, Turn<kJobs> job_turn,
                                               int32_t tile, float cap_scale) const {
    if constexpr (!kPlain) {
      if (cap_scale > 0.0f) cap(scores, cap_scale);
      if (!tile_is_masked(tile, job.dense_begin, job.dense_keys)) return;
    }
    ptx::mbarrier_wait(address(shared.limits_full[job_turn.stage()]), job_turn.parity());
    const int32_t* const limits = shared.limits[job_turn.stage()];
    const int32_t* const firsts = shared.firsts[job_turn.stage()];
    int32_t begins[2] = {}, ends[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (!kPlain) begins[i] = firsts[first_row + 8 * i] - tile * kKeys;
      ends[i] = limits[first_row + 8 * i] - tile * kKeys;
    }
    mask<!kPlain>(scores, begins, ends, lane);
  }

  // Computes all tiles of a job.
  __device__ __forceinline__ void attend(const Job& job, Turn<kJobs> job_turn, const Launch& launch,
                                         RowPair& rows, Out& out) {
    Scores scores;    // of a tile, then its weights
    Weights weights;  // of the previous tile
    float keep[2];
    const float scale_log2 = launch.scale_log2;
    const int32_t dense_keys = job.dense_keys;
    const auto mask_tile = [&](int32_t tile) {
      if (kPlain && !tile_is_masked(tile, dense_keys)) return;
      cap_and_mask(scores, job, job_turn, tile, launch.cap_scale);
    };
    int32_t left = job.tiles - 1;  // after this one
    int32_t tile;
    Queries queries;
    ptx::mbarrier_wait(address(shared.q_full), q_turn.parity());
    if constexpr (Plan::kHoldsQ) {  // the next job's Q may come while this one is computed
      load_queries(queries);
      __syncwarp();  // every lane has read
      release(shared.q_empty);
      q_turn.next();
    }
    wait_for_keys(turn);
    issue_scores(scores, queries);
    ptx::wgmma_wait<0>();
    tile = tile_of_keys(left);
    scores_done(scores, queries, left);
    mask_tile(tile);
    rows.absorb(scores, scale_log2, keep);
    pack_weights<T>(scores, weights);
    turn.next();
    if (left > 0) wait_for_keys(turn);

    for (--left; left >= 0; --left) {
      take_token();
      issue_scores(scores, queries);
      issue_values(weights, out);
      give_token();
      ptx::wgmma_wait<1>();
      tile = tile_of_keys(left);
      scores_done(scores, queries, left);
      mask_tile(tile);
      rows.absorb(scores, scale_log2, keep);
      // The assembler may move the wait for the values before the softmax, and does so unless there
      // is a branch between them that depends on the sums. The sums are never negative.
      if (left > 0 || rows.sum[0] + rows.sum[1] < 0.0f) wait_for_keys(turn.following());
      ptx::wgmma_wait<0>();
      values_done(weights, out);
      pack_weights<T>(scores, weights);
      // Maxima settle after a few tiles; from then on nothing needs rescaling.
      if (__any_sync(kWholeWarp, keep[0] != 1.0f || keep[1] != 1.0f)) {
#pragma unroll
        for (int i = 0; i < Plan::kColumns / 2; ++i) out[i] *= keep[i / 2 % 2];
      }
      turn.next();
    }
    issue_values(weights, out);
    ptx::wgmma_wait<0>();
    values_done(weights, out);
  }

  __device__ __forceinline__ void run(const Launch& launch) {
    if (warpgroup == Plan::kConsumers - 1) give_token();  // for the first warpgroup
    for (Turn<kJobs> job_turn;; job_turn.next()) {
      const Job& job = next_job(shared, job_turn);
      if (job.rows < 0) break;
      RowPair rows;
      Out out = {};
      if (job.tiles > 0) {
        attend(job, job_turn, launch, rows, out);
      }
      int64_t at[2];
      bool held[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int32_t row = first_row + 8 * i;
        // From the first row of the piece's partial on.
        const int64_t token = job.piece * launch.args.q_tokens + job.q_token + row / launch.group;
        at[i] = token * launch.args.q_heads + job.kv_head * launch.group + row % launch.group;
        held[i] = row < job.rows;
      }
      __syncwarp();  // all lanes are done reading the job
      release(shared.job_empty[job_turn.stage()]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        finish_row<T>(launch.target, static_cast<int>(launch.args.head_dim), rows.state(i), out, i,
                      at[i], held[i], lane);
      }
    }
    if (warpgroup == 0) take_token();  // from the last warpgroup, so that no arrival is left over
  }
};

}  // namespace
}  // namespace cptool::cuda::sm90
