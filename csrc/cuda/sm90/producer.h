// The producer warpgroup of the sm_90a kernel. Its warps work ahead of the consumers, each with its
// own task: the scheduler finds jobs, the loader fetches their tiles, the cleaner clears values
// that no row may see. All process the same jobs in the same order.
#pragma once

#include <cstdint>

#include "cuda/block_rows.h"
#include "cuda/device.h"
#include "cuda/query_blocks.h"
#include "cuda/sm90/ptx.h"
#include "cuda/sm90/schedule.h"
#include "cuda/sm90/shared.h"
#include "cuda/splits.h"

namespace cptool::cuda::sm90 {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

// Takes the next unassigned job and returns its index in the list. Called by a whole warp.
__device__ inline int32_t take_job(const Launch& launch, int lane) {
  const int32_t placed = launch.placed * static_cast<int32_t>(gridDim.x);
  if (placed >= launch.jobs.count()) return placed;  // all jobs are placed: there is no counter
  int32_t taken = 0;
  if (lane == 0) taken = atomicAdd(launch.taken, 1);
  return placed + __shfl_sync(kAllLanes, taken, 0);
}

// Returns how many of `keys` ascending positions are at or before `position`; `first`: k_pos[0].
// Called by a whole warp.
__device__ inline int32_t find_visible(const int32_t* k_pos, int32_t keys, int32_t first,
                                       int32_t position) {
  if (keys == 0) return 0;
  const int32_t guess = visible_if_consecutive(first, keys, position);
  if (is_visible_count(k_pos, keys, position, guess)) return guess;
  return static_cast<int32_t>(visible_keys_by_warp(k_pos, keys, position));
}

// Returns how many keys are at or before `position`, which is at least `least` and at most `most`.
__device__ inline int32_t find_between(const int32_t* k_pos, int32_t least, int32_t most,
                                       int32_t position) {
  if (least >= most) return least;
  k_pos += least;
  most -= least;
  const int32_t guess = visible_if_consecutive(k_pos[0], most, position);
  if (is_visible_count(k_pos, most, position, guess)) return least + guess;
  return least + visible_keys<int32_t>(k_pos, most, position);
}

// Computes which keys of its piece each row of a job sees. Called by a whole warp.
template <class Plan>
__device__ void find_row_limits(const Launch& launch, const Job& job, int32_t* limits, int lane) {
  const AttentionArgs& args = launch.args;
#pragma unroll 1  // to save registers
  for (int32_t row = lane; row < Plan::kRows; row += kWarp) {
    int32_t limit = 0;
    if (row < job.rows) {
      limit = find_between(args.k_pos + job.first_key, job.dense_keys, job.keys,
                           args.q_pos[job.q_token + row / launch.group]);
    }
    limits[row] = limit;
  }
}

// Returns how many of the first `most` keys are ahead of the window of a query at `position`.
// Called by a whole warp.
__device__ inline int32_t find_hidden(const AttentionArgs& args, const int32_t* k_pos, int32_t most,
                                      int32_t position) {
  const int64_t last = position - args.window;
  if (args.window == 0 || last < INT32_MIN || most == 0) return 0;
  return find_visible(k_pos, most, k_pos[0], static_cast<int32_t>(last));
}

// Computes how many keys are ahead of each row's window; rows see the keys from there to their
// limit. Called by a whole warp.
template <class Plan>
__device__ void find_row_firsts(const Launch& launch, Job& job, int32_t* firsts, int lane) {
  const AttentionArgs& args = launch.args;
  const int32_t* const k_pos = args.k_pos + job.first_key;
  const int32_t* const q_pos = args.q_pos + job.q_token;
  // Rows ascend in position, and therefore in the first key that they see.
  const int32_t begin = find_hidden(args, k_pos, job.dense_keys, q_pos[0]);
  job.dense_begin = find_hidden(args, k_pos, job.keys, q_pos[(job.rows - 1) / launch.group]);
#pragma unroll 1  // to save registers
  for (int32_t row = lane; row < Plan::kRows; row += kWarp) {
    int32_t first = begin;
    if (row < job.rows) {
      const int64_t last = q_pos[row / launch.group] - args.window;
      if (args.window > 0 && last >= INT32_MIN) {
        first = find_between(k_pos, begin, job.dense_begin, static_cast<int32_t>(last));
      }
    }
    firsts[row] = first;
  }
}

// Finds the runs of a job's tiles, and returns how many there are; sets job.keys to the end of the
// last key that some row sees. Called by a whole warp; each lane reads what it has written.
template <class Plan>
__device__ int32_t find_runs(Job& job, const int32_t* firsts, const int32_t* limits, TileRun* runs,
                             int lane) {
  int32_t count = 0;  // of runs that have begun
  int32_t seen = 0;   // the end of the last key that any row so far sees
#pragma unroll 1
  for (int32_t row = lane; row < Plan::kRows; row += kWarp) {
    const int32_t first = firsts[row], limit = limits[row];
    // What this row and those before it see ends here. A maximum, although limits ascend: a run has
    // tiles even if positions that do not ascend break the contract.
    int32_t end = first < limit ? limit : 0;
#pragma unroll
    for (int lanes = 1; lanes < kWarp; lanes *= 2) {
      const int32_t other = __shfl_up_sync(kAllLanes, end, lanes);
      if (lane >= lanes && other > end) end = other;
    }
    if (seen > end) end = seen;
    int32_t before = __shfl_up_sync(kAllLanes, end, 1);
    if (lane == 0) before = seen;
    const bool begins = first < limit && (before == 0 || first / kKeys > tile_count(before));
    const unsigned all = __ballot_sync(kAllLanes, begins);
    if (begins) {
      const int32_t run = count + __popc(all & ((1u << lane) - 1));
      runs[run].begin = first / kKeys;
      if (run > 0) runs[run - 1].end = tile_count(before);
    }
    count += __popc(all);
    seen = __shfl_sync(kAllLanes, end, kWarp - 1);
  }
  if (lane == 0 && count > 0) runs[count - 1].end = tile_count(seen);
  job.keys = seen;
  __syncwarp();  // every lane may read the runs
  return count;
}

// Makes a job of an entry of the list. Its rows are 0 or less if the entry is of no sequence.
// Unless the call is plain, its keys are all of the sequence that a query at the last row's
// position would see without a window, and the piece is yet to be found.
template <class Plan>
__device__ Job make_job(const Launch& launch, const JobList::Entry& entry) {
  const AttentionArgs& args = launch.args;
  const QueryBlock block =
      query_block<int32_t>(args, launch.block_tokens * launch.group, entry.block);
  Job job = {static_cast<int32_t>(block.rows), entry.kv_head, entry.piece};
  if (job.rows <= 0) return job;
  job.q_token = static_cast<int32_t>(block.first_token + block.first_row / launch.group);
  job.first_key = static_cast<int32_t>(offset_at(args.cu_k, block.sequence, args.k_tokens));
  const int32_t end = static_cast<int32_t>(offset_at(args.cu_k, block.sequence + 1, args.k_tokens));
  // Rows ascend in position, so the last row sees the most keys and the first one the fewest.
  const int32_t last = args.q_pos[job.q_token + (job.rows - 1) / launch.group];
  const int32_t* k_pos = args.k_pos + job.first_key;
  const int32_t held = end > job.first_key ? end - job.first_key : 0;
  const int32_t first = held > 0 ? k_pos[0] : 0;
  job.keys = find_visible(k_pos, held, first, last);
  job.dense_keys = find_visible(k_pos, job.keys, first, args.q_pos[job.q_token]);
  if (Plan::kPlain && launch.jobs.pieces > 1) {
    const KeyRange range = key_range(job.keys, kKeys, launch.jobs.pieces, entry.piece);
    const int32_t begin = static_cast<int32_t>(range.begin);
    job.first_key += begin;
    job.keys = static_cast<int32_t>(range.end) - begin;
    job.dense_keys = job.dense_keys < begin              ? 0
                     : job.dense_keys - begin < job.keys ? job.dense_keys - begin
                                                         : job.keys;
  }
  job.tiles = tile_count(job.keys);
  return job;
}

// Gives a job the keys that its rows' windows and its piece leave to it. Called by a whole warp.
template <class Plan>
__device__ void apply_windows(const Launch& launch, Shared<Plan>& shared, Job& job, int stage,
                              int lane) {
  find_row_limits<Plan>(launch, job, shared.limits[stage], lane);
  find_row_firsts<Plan>(launch, job, shared.firsts[stage], lane);
  const int32_t count =
      find_runs<Plan>(job, shared.firsts[stage], shared.limits[stage], shared.runs[stage], lane);
  const TilePiece piece = tile_piece(shared.runs[stage], count, launch.jobs.pieces, job.piece);
  job.tiles = piece.tiles;
  job.run = piece.run;
  job.last_tile = piece.tile;
  const int32_t end = piece.tiles > 0 ? (piece.tile + 1) * kKeys : 0;
  if (job.keys > end) job.keys = end;
}

// Finds the thread block's jobs and which keys the rows of each see, from the positions and offsets
// in device memory. Other warps may begin a plain job before the limits of its rows are known.
template <class Plan>
__device__ void schedule(const Launch& launch, Shared<Plan>& shared, int lane) {
  const auto address = [](const uint64_t& barrier) { return ptx::shared_address(&barrier); };
  Turn<kJobs> turn;
  for (int32_t n = 0;; ++n) {
    // A job is taken only when the one before the last is done, because another thread block may be
    // free sooner.
    ptx::mbarrier_wait(address(shared.job_empty[turn.stage()]), turn.parity() ^ 1);
    const int32_t place = n < launch.placed ? job_place(static_cast<int32_t>(blockIdx.x),
                                                        static_cast<int32_t>(gridDim.x), n)
                                            : take_job(launch, lane);
    const bool none = place >= launch.jobs.count();
    Job job = {-1};
    if (!none) {
      job = make_job<Plan>(launch, launch.jobs.at(place));
      if (job.rows <= 0) continue;
      if constexpr (!Plan::kPlain) apply_windows(launch, shared, job, turn.stage(), lane);
    }
    if (lane == 0) {
      shared.jobs[turn.stage()] = job;
      ptx::mbarrier_arrive(address(shared.job_full[turn.stage()]));
    }
    if (none) return;
    if constexpr (Plan::kPlain) {
      find_row_limits<Plan>(launch, job, shared.limits[turn.stage()], lane);
    }
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(address(shared.limits_full[turn.stage()]));
    turn.next();
  }
}

// Makes TMA fetch Q once per job and K and V tile by tile, as buffers become empty. Run by one
// thread. The V of a tile is requested after the K of the next, which is the order of their use.
template <class Plan>
__device__ void load(const Launch& launch, Shared<Plan>& shared) {
  const auto address = [](const auto& object) { return ptx::shared_address(&object); };
  ptx::prefetch(launch.q);
  ptx::prefetch(launch.k);
  ptx::prefetch(launch.v);
  // A block's queries are read once, its keys and values by every block of their head.
  const uint64_t once = ptx::evict_first(), often = ptx::evict_last();
  Turn<kJobs> job_turn;
  Turn<1> q_turn;
  Turn<Plan::kStages> k_turn, v_turn;
  for (;; job_turn.next()) {
    const Job job = next_job(shared, job_turn);
    if (job.rows < 0) return;
    const TileRun* const run = &shared.runs[job_turn.stage()][job.run];
    auto k_tiles = TileWalk<Plan::kPlain>::of(job.tiles, job.last_tile, run), v_tiles = k_tiles;
    for (int32_t i = 0; !v_tiles.done(); ++i) {
      if (!k_tiles.done()) {
        const int32_t token = job.first_key + k_tiles.tile * kKeys;
        const uint32_t full = address(shared.k_full[k_turn.stage()]);
        ptx::mbarrier_wait(address(shared.k_empty[k_turn.stage()]), k_turn.parity() ^ 1);
        if constexpr (!Plan::kPlain) shared.k_tiles[k_turn.stage()] = k_tiles.tile;
        ptx::mbarrier_arrive_expect(full, Plan::kPanels * Plan::kPanelBytes);
        for (int p = 0; p < Plan::kPanels; ++p) {
          ptx::load_box(address(shared.k[k_turn.stage()][p]), launch.k, p * kPanelColumns,
                        job.kv_head, token, full, often);
        }
        k_turn.next();
        k_tiles.next();
      }
      if (i == 0) {
        const uint32_t full = address(shared.q_full);
        ptx::mbarrier_wait(address(shared.q_empty), q_turn.parity() ^ 1);
        ptx::mbarrier_arrive_expect(full,
                                    Plan::kPanels * launch.block_tokens * launch.group * kRowBytes);
        for (int p = 0; p < Plan::kPanels; ++p) {
          ptx::load_box(address(shared.q[p]), launch.q, p * kPanelColumns,
                        job.kv_head * launch.group, job.q_token, full, once);
        }
        q_turn.next();
      } else {
        const int32_t token = job.first_key + v_tiles.tile * kKeys;
        const bool unclean = i == 1 && unseen_rows(job.keys) > 0;
        const uint32_t full =
            address(unclean ? shared.v_arrived[v_turn.stage()] : shared.v_full[v_turn.stage()]);
        ptx::mbarrier_wait(address(shared.v_empty[v_turn.stage()]), v_turn.parity() ^ 1);
        ptx::mbarrier_arrive_expect(full, Plan::kPanels * Plan::kPanelBytes);
        for (int p = 0; p < Plan::kPanels; ++p) {
          ptx::load_box(address(shared.v[v_turn.stage()][p]), launch.v, p * kPanelColumns,
                        job.kv_head, token, full, often);
        }
        v_turn.next();
        v_tiles.next();
      }
    }
    // The runs of the job have been read.
    ptx::mbarrier_arrive(address(shared.job_empty[job_turn.stage()]));
  }
}

// Keys that no row of the job sees have weight 0, but their slots of V may hold infinity or NaN,
// and 0 times that is NaN. This clears them in a job's last tile, between TMA and the consumers.
// The slots of K do not matter, because masks replace those scores.
template <class Plan>
__device__ void clean(Shared<Plan>& shared, int lane) {
  Turn<kJobs> job_turn;
  uint32_t parities = 0;       // of v_arrived, one bit each; only last tiles use them
  Turn<Plan::kStages> v_turn;  // of the job's first tile
  for (;; job_turn.next()) {
    const Job job = next_job(shared, job_turn);
    __syncwarp();  // all lanes have read the job
    if (lane == 0) {
      ptx::mbarrier_arrive(ptx::shared_address(&shared.job_empty[job_turn.stage()]));
    }
    if (job.rows < 0) return;
    const int32_t unseen = unseen_rows(job.keys);
    if (unseen > 0) {
      const int stage = v_turn.stage();
      ptx::mbarrier_wait(ptx::shared_address(&shared.v_arrived[stage]), parities >> stage & 1);
      parities ^= 1u << stage;
      // The swizzle moves chunks only within a row.
      for (int p = 0; p < Plan::kPanels; ++p) {
        uint4* const panel = reinterpret_cast<uint4*>(shared.v[stage][p]);
        for (int i = (kKeys - unseen) * (kRowBytes / 16) + lane; i < kKeys * (kRowBytes / 16);
             i += kWarp) {
          panel[i] = make_uint4(0, 0, 0, 0);
        }
      }
      ptx::fence_proxy_async();
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(ptx::shared_address(&shared.v_full[stage]));
    }
    v_turn.count += static_cast<uint32_t>(job.tiles);
  }
}

}  // namespace
}  // namespace cptool::cuda::sm90
