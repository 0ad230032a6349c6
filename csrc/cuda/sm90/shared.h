// The sizes of the sm_90a kernel, its launch parameters, and what a thread block holds in shared
// memory.
#pragma once

#include <cstdint>

#include "attention.h"
#include "cuda/block_rows.h"
#include "cuda/sm90/descriptors.h"
#include "cuda/sm90/ptx.h"
#include "cuda/sm90/schedule.h"

namespace cptool::cuda::sm90 {
namespace {

constexpr int kWarpgroup = 128;
constexpr int kWarpgroupRows = 64;  // rows in the products of one warpgroup
constexpr int kJobs = 2;            // scheduled ahead

// kHeadDim 64, 96 or 128: the tensors' head_dim, rounded up; TMA fills with zeros. kPlain: whether
// the call has neither window nor soft cap.
template <int kPaddedHeadDim, bool kIsPlain>
struct Sizes {
  static constexpr int kHeadDim = kPaddedHeadDim;
  static constexpr bool kPlain = kIsPlain;
  static constexpr int kPanels = (kHeadDim + kPanelColumns - 1) / kPanelColumns;
  // Columns of out in registers. Panels are whole: the manual describes no product of half a
  // swizzle.
  static constexpr int kColumns = kPanels * kPanelColumns;
  // Consumer warpgroups. A third one's accumulators of 128 columns would not fit in the registers,
  // nor would what windows and soft caps need in the producer or the consumers.
  static constexpr int kConsumers = kPanels == 1 && kPlain ? 3 : 2;
  static constexpr int kRows = kConsumers * kWarpgroupRows;
  static constexpr int kStages = kPanels == 1 ? 4 : 2;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  // A launch gives each thread 65536 / kThreads registers, rounded down to a multiple of 8; the
  // warpgroups then redistribute them. For head_dim 128 a consumer thread holds 64 scores, 32
  // weights, 64 elements of out and 32 registers of Q, and uses 224 registers in all, 229 unless
  // the call is plain; for plain calls of head_dim 64 it is 64, 32, 32, none of Q, for which 160
  // registers have no room, and 152.
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 40;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 232;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
                (1 + kConsumers) * kLaunchRegisters);
  // Whether consumers keep Q in registers, so that products of scores read K alone from shared
  // memory, which is otherwise at its limit meanwhile.
  static constexpr bool kHoldsQ = kConsumers == 2;
  static constexpr int kQPanelBytes = kRows * kRowBytes;
  static constexpr int kPanelBytes = kKeys * kRowBytes;  // of K and V
};

// A job, as the scheduler passes it to the other warps.
struct Job {
  int32_t rows;  // packed rows; negative: there are no more jobs
  int32_t kv_head = 0, piece = 0;
  int32_t q_token = 0;     // the first one, in q
  int32_t first_key = 0;   // of the piece, in k
  int32_t keys = 0;        // of the piece that the last row, and therefore any row, sees
  int32_t dense_keys = 0;  // that the first row, and therefore every row, sees
  int32_t tiles = 0;       // of the piece
  // Unless the call is plain. Keys and tiles are then counted from the sequence's first key on, and
  // `keys` ends with the piece's last tile at the latest.
  int32_t dense_begin = 0;         // every row sees the keys from here to dense_keys
  int32_t run = 0, last_tile = 0;  // the piece's last tile, and which run it is in
};

// The kernel's parameter, from which TMA reads the maps.
struct Launch {
  TensorMap q, k, v;
  AttentionArgs args;
  Target target;  // the result; of several pieces the partials, as merge_pieces() has them
  JobList jobs;
  int32_t placed;  // jobs that each thread block begins with
  int32_t* taken;  // counter of jobs beyond the placed ones, 0 at first; null if there are none
  int32_t group;   // query heads of a KV head
  int32_t block_tokens;  // query tokens of a job; times `group`, the packed rows
  // scale log2 e: exp(scale s) = 2^(scale_log2 s); with a soft cap, cap log2 e, because scores are
  // then replaced by tanh(cap_scale s), cap_scale = scale / cap.
  float scale_log2;
  float cap_scale;  // 0: no cap
};

// In KiB for head_dim 128: Q 32, K and V 2 x 2 x 32, the rest 5 (0.8 of it padding), in all 165.
// For 64: Q 24, K and V 4 x 2 x 16, the rest 7, in all 159. A block may have 227.
template <class Plan>  // Sizes
struct Shared {
  alignas(kSwizzleBytes) uint8_t q[Plan::kPanels][Plan::kQPanelBytes];
  alignas(kSwizzleBytes) uint8_t k[Plan::kStages][Plan::kPanels][Plan::kPanelBytes];
  alignas(kSwizzleBytes) uint8_t v[Plan::kStages][Plan::kPanels][Plan::kPanelBytes];
  Job jobs[kJobs];
  int32_t limits[kJobs][Plan::kRows];  // keys of the piece that each row of the job sees
  // Unless the call is plain: the keys ahead of each row's window, the job's tiles, and which of
  // them are in the buffers of K.
  int32_t firsts[kJobs][Plan::kRows];
  TileRun runs[kJobs][Plan::kRows];
  int32_t k_tiles[Plan::kStages];
  // mbarriers. "full": a load has arrived; "empty": its last reader is done.
  uint64_t job_full[kJobs], limits_full[kJobs], job_empty[kJobs];
  uint64_t q_full, q_empty;
  uint64_t k_full[Plan::kStages], k_empty[Plan::kStages];
  uint64_t v_full[Plan::kStages], v_empty[Plan::kStages];
  uint64_t v_arrived[Plan::kStages];  // a last tile has arrived; its unseen rows must be cleared
};

template <class Plan>
__device__ void init_barriers(Shared<Plan>& shared) {
  constexpr uint32_t kConsumerWarps = Plan::kConsumers * 4;
  const auto init = [](uint64_t& barrier, uint32_t arrivals) {
    ptx::mbarrier_init(ptx::shared_address(&barrier), arrivals);
  };
  for (int i = 0; i < kJobs; ++i) {
    init(shared.job_full[i], 1);
    init(shared.limits_full[i], 1);
    init(shared.job_empty[i], kConsumerWarps + 2);  // with the loader and the cleaner
  }
  init(shared.q_full, 1);
  init(shared.q_empty, kConsumerWarps);
  for (int i = 0; i < Plan::kStages; ++i) {
    init(shared.k_full[i], 1);
    init(shared.k_empty[i], kConsumerWarps);
    init(shared.v_full[i], 1);
    init(shared.v_empty[i], kConsumerWarps);
    init(shared.v_arrived[i], 1);
  }
  ptx::fence_mbarrier_init();
}

// Clears the rows of Q that no load fills, because block_tokens tokens do not fill a block: their
// scores are then 0 and their maxima settle like those of other rows. Called by all threads, which
// must pass a barrier afterwards.
template <class Plan>
__device__ void clear_unfilled_rows(const Launch& launch, Shared<Plan>& shared) {
  constexpr int kChunks = kRowBytes / 16;  // the swizzle moves them only within a row
  const int filled = launch.block_tokens * launch.group * kChunks;
  for (int p = 0; p < Plan::kPanels; ++p) {
    uint4* const panel = reinterpret_cast<uint4*>(shared.q[p]);
    for (int i = filled + static_cast<int>(threadIdx.x); i < Plan::kRows * kChunks;
         i += Plan::kThreads) {
      panel[i] = make_uint4(0, 0, 0, 0);
    }
  }
  ptx::fence_proxy_async();
}

// Waits for the next job. The caller arrives at job_empty when its warp no longer needs it.
template <class Plan>
__device__ __forceinline__ const Job& next_job(const Shared<Plan>& shared,
                                               const Turn<kJobs>& turn) {
  ptx::mbarrier_wait(ptx::shared_address(&shared.job_full[turn.stage()]), turn.parity());
  return shared.jobs[turn.stage()];
}

}  // namespace
}  // namespace cptool::cuda::sm90
