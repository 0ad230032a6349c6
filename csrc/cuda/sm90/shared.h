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

// kHeadDim 64, 96 or 128: the tensors' head_dim, rounded up; TMA fills with zeros.
template <int kHeadDim>
struct Sizes {
  static constexpr int kPanels = (kHeadDim + kPanelColumns - 1) / kPanelColumns;
  // Columns of out in registers. Panels are whole: the manual describes no product of half a
  // swizzle.
  static constexpr int kColumns = kPanels * kPanelColumns;
  // Consumer warpgroups. A third one's accumulators of 128 columns would not fit in the registers.
  static constexpr int kConsumers = kPanels == 1 ? 3 : 2;
  static constexpr int kRows = kConsumers * kWarpgroupRows;
  static constexpr int kStages = kPanels == 1 ? 4 : 2;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  // A launch gives each thread 65536 / kThreads registers, rounded down to a multiple of 8; the
  // warpgroups then redistribute them. For head_dim 128 a consumer thread holds 64 scores, 32
  // weights, 64 elements of out and 32 registers of Q, and uses 220 registers in all; for head_dim
  // 64 it is 64, 32, 32, none of Q, for which 160 registers have no room, and 152.
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
  int32_t kv_head, piece;
  int32_t q_token;     // the first one, in q
  int32_t first_key;   // of the piece, in k
  int32_t keys;        // of the piece that the last row, and therefore any row, sees
  int32_t dense_keys;  // that the first row, and therefore every row, sees
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
  float scale_log2;      // scale log2 e: exp(scale s) = 2^(scale_log2 s)
};

// In KiB for head_dim 128: Q 32, K and V 2 x 2 x 32, the rest 2 (0.8 of it padding), in all 162.
// For 64: Q 24, K and V 4 x 2 x 16, the rest 2, in all 154. A block may have 227.
template <int kHeadDim>
struct Shared {
  using Plan = Sizes<kHeadDim>;
  alignas(kSwizzleBytes) uint8_t q[Plan::kPanels][Plan::kQPanelBytes];
  alignas(kSwizzleBytes) uint8_t k[Plan::kStages][Plan::kPanels][Plan::kPanelBytes];
  alignas(kSwizzleBytes) uint8_t v[Plan::kStages][Plan::kPanels][Plan::kPanelBytes];
  Job jobs[kJobs];
  int32_t limits[kJobs][Plan::kRows];  // keys of the piece that each row of the job sees
  // mbarriers. "full": a load has arrived; "empty": its last reader is done.
  uint64_t job_full[kJobs], limits_full[kJobs], job_empty[kJobs];
  uint64_t q_full, q_empty;
  uint64_t k_full[Plan::kStages], k_empty[Plan::kStages];
  uint64_t v_full[Plan::kStages], v_empty[Plan::kStages];
  uint64_t v_arrived[Plan::kStages];  // a last tile has arrived; its unseen rows must be cleared
};

template <int kHeadDim>
__device__ void init_barriers(Shared<kHeadDim>& shared) {
  constexpr uint32_t kConsumerWarps = Sizes<kHeadDim>::kConsumers * 4;
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
  for (int i = 0; i < Sizes<kHeadDim>::kStages; ++i) {
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
template <int kHeadDim>
__device__ void clear_unfilled_rows(const Launch& launch, Shared<kHeadDim>& shared) {
  using Plan = Sizes<kHeadDim>;
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
template <int kHeadDim>
__device__ __forceinline__ const Job& next_job(const Shared<kHeadDim>& shared,
                                               const Turn<kJobs>& turn) {
  ptx::mbarrier_wait(ptx::shared_address(&shared.job_full[turn.stage()]), turn.parity());
  return shared.jobs[turn.stage()];
}

}  // namespace
}  // namespace cptool::cuda::sm90
