// A block's packed query rows (query_blocks.h) on the device: where each lies, how many keys it
// sees, and how its share of the result is written. For kernels of any kind.
#pragma once

#include <cmath>
#include <cstdint>

#include "attention.h"
#include "cuda/ptx.h"
#include "cuda/query_blocks.h"
#include "softmax_state.h"

namespace cptool::cuda {
namespace {

struct BlockRows {
  int64_t first_token;
  int rows, group, first_head;
  int skipped;  // rows of the first token that are another block's

  __device__ BlockRows(const AttentionArgs& args, const QueryBlock& block, int kv_head)
      : rows(static_cast<int>(block.rows)),
        group(static_cast<int>(args.q_heads / args.kv_heads)),
        first_head(kv_head * group) {
    const int64_t token = block.first_row / group;
    first_token = block.first_token + token;
    skipped = static_cast<int>(block.first_row - token * group);
  }

  __device__ int64_t token(int row) const {
    return first_token + static_cast<unsigned>(skipped + row) / static_cast<unsigned>(group);
  }
  __device__ int head(int row) const {
    return first_head +
           static_cast<int>(static_cast<unsigned>(skipped + row) % static_cast<unsigned>(group));
  }
};

// visible_keys() by a whole warp: 33 parts a step instead of two, for each step waits for memory.
__device__ inline int64_t visible_keys_by_warp(const int32_t* k_pos, int64_t keys,
                                               int32_t position) {
  const int lane = threadIdx.x % 32;
  int64_t low = 0, high = keys;  // the count is from low to high
  while (low < high) {
    const int64_t step = (high - low + 32) / 33;
    const int64_t probe = low + step * (lane + 1) - 1;
    const bool visible = probe < high && k_pos[probe] <= position;
    const int count = __popc(__ballot_sync(0xffffffffu, visible));  // the first ones
    const int64_t first_hidden = low + step * (count + 1) - 1;
    if (count < 32 && first_hidden < high) high = first_hidden;
    low += step * count;
  }
  return low;
}

// Writes limits[row], how many keys of the sequence a row sees; 0 for rows that the block lacks.
// For at least two warps; all threads must call it, and meet at a barrier before they read limits.
template <int kRows>
__device__ void find_limits(const AttentionArgs& args, const BlockRows& rows, const int32_t* k_pos,
                            int64_t keys, int* limits) {
  static_assert(kRows >= 2);
  const int warp = threadIdx.x / 32;
  const int last = rows.rows - 1;
  if (warp < 2) {
    const int row = warp == 0 ? 0 : last;
    const int64_t found = visible_keys_by_warp(k_pos, keys, args.q_pos[rows.token(row)]);
    // One row alone: the first warp's search is enough.
    if (threadIdx.x % 32 == 0 && (warp == 0 || last > 0)) limits[row] = static_cast<int>(found);
  }
  __syncthreads();
  // Positions ascend: the rows between see as many keys as these two, or between them.
  const int fewest = limits[0], most = limits[last];
  for (int row = 1 + static_cast<int>(threadIdx.x); row < kRows; row += blockDim.x) {
    if (row == last) continue;
    limits[row] = row > last ? 0
                             : fewest + static_cast<int>(visible_keys(k_pos + fewest, most - fewest,
                                                                      args.q_pos[rows.token(row)]));
  }
}

// Where a block's rows go: the result, or the partial of one piece of the keys.
struct Target {
  void* out;  // [rows, head_dim]
  float* lse;
  ScalarType dtype;  // float32 or the kernel's
  bool accumulate;
};

// How a row's accumulators, with the softmax state `ours`, enter what its target holds.
struct RowResult {
  int64_t at;  // the row in the target
  float keep, add, lse;
  bool written, merged;

  // Before any thread of the row calls store_lse(), all of them must have made this.
  __device__ RowResult(const Target& target, int64_t at, bool held, const SoftmaxState& ours)
      : at(at) {
    SoftmaxState total;
    if (held && target.accumulate) total = SoftmaxState::of_lse(target.lse[at]);
    merged = !total.empty();                      // else what is there is ignored, whatever it is
    written = held && !(merged && ours.empty());  // of two empty ones out is 0
    total.merge(ours, keep, add);
    const float divisor = total.empty() ? 1.0f : total.sum;
    keep /= divisor;
    add = total.empty() ? 0.0f : add / divisor;
    lse = total.lse();
  }

  __device__ void store_lse(const Target& target) const {
    if (written) target.lse[at] = lse;
  }

  // Columns `column` and the next, an even one and an odd one.
  template <class T>
  __device__ void store(const Target& target, int head_dim, int column, float x, float y) const {
    if (!written) return;
    const int64_t index = at * head_dim + column;
    x = add == 0.0f ? 0.0f : x * add;  // of a row that saw no key, whatever acc holds
    y = add == 0.0f ? 0.0f : y * add;
    if (merged) {
      const float2 there =
          *reinterpret_cast<const float2*>(static_cast<const float*>(target.out) + index);
      x += there.x * keep;
      y += there.y * keep;
    }
    if (target.dtype == ScalarType::kFloat32) {
      *reinterpret_cast<float2*>(static_cast<float*>(target.out) + index) = make_float2(x, y);
    } else {
      *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(target.out) + index) = ptx::pack<T>(x, y);
    }
  }
};

}  // namespace
}  // namespace cptool::cuda
