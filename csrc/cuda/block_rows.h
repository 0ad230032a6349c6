// A block's packed query rows (query_blocks.h) on the device: where each row is, how many keys it
// sees, and how its part of the result is written.
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
  int skipped;  // rows of the first token that belong to another block

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

// visible_keys() by a whole warp, in 33 parts per step instead of two, because each step waits for
// memory.
template <class Position>
__device__ inline int64_t visible_keys_by_warp(const int32_t* k_pos, int64_t keys,
                                               Position position) {
  const int lane = threadIdx.x % 32;
  int64_t low = 0, high = keys;  // the count is in [low, high]
  while (low < high) {
    const int64_t step = (high - low + 32) / 33;
    const int64_t probe = low + step * (lane + 1) - 1;
    const bool visible = probe < high && k_pos[probe] <= position;
    const int count = __popc(__ballot_sync(0xffffffffu, visible));  // of the first lanes
    const int64_t first_hidden = low + step * (count + 1) - 1;
    if (count < 32 && first_hidden < high) high = first_hidden;
    low += step * count;
  }
  return low;
}

// How many of `keys` positions from `first` on are at or before `position` if they are consecutive
// numbers, as those of a whole prompt are.
__device__ inline int32_t visible_if_consecutive(int32_t first, int32_t keys, int32_t position) {
  const int64_t count = static_cast<int64_t>(position) - first + 1;
  return count < 0 ? 0 : count > keys ? keys : static_cast<int32_t>(count);
}

// Returns whether `count` of `keys` > 0 ascending positions are at or before `position`. Its two
// loads do not wait for each other.
__device__ inline bool is_visible_count(const int32_t* k_pos, int32_t keys, int32_t position,
                                        int32_t count) {
  const int32_t seen = k_pos[count > 0 ? count - 1 : 0];
  const int32_t hidden = k_pos[count < keys ? count : keys - 1];
  return (count == 0 || seen <= position) & (count == keys || hidden > position);
}

// Counts the keys of the sequence at or before a row's position less `back`, of the block's first
// row in warp `first_warp` and of its last row in the next one. Called by these two warps.
template <class Back>
__device__ __forceinline__ void count_at_ends(const AttentionArgs& args, const BlockRows& rows,
                                              const int32_t* k_pos, int64_t keys, Back back,
                                              int first_warp, int* counts) {
  const int warp = threadIdx.x / 32;
  const int last = rows.rows - 1;
  const int row = warp == first_warp ? 0 : last;
  const int64_t found = visible_keys_by_warp(k_pos, keys, args.q_pos[rows.token(row)] - back);
  // A single row needs only the first warp's search.
  if (threadIdx.x % 32 == 0 && (warp == first_warp || last > 0)) {
    counts[row] = static_cast<int>(found);
  }
}

// Counts them for all other rows, whose counts are between these two because positions ascend; 0
// for rows that do not exist. Called by all threads of the block, after a barrier.
template <int kRows, class Back>
__device__ void count_between(const AttentionArgs& args, const BlockRows& rows,
                              const int32_t* k_pos, Back back, int* counts) {
  static_assert(kRows >= 2);
  const int last = rows.rows - 1;
  const int fewest = counts[0], most = counts[last];
  for (int row = 1 + static_cast<int>(threadIdx.x); row < kRows; row += blockDim.x) {
    if (row == last) continue;
    counts[row] = row > last
                      ? 0
                      : fewest + static_cast<int>(visible_keys(k_pos + fewest, most - fewest,
                                                               args.q_pos[rows.token(row)] - back));
  }
}

// Writes limits[row], how many keys of the sequence are at or before a row's position: without a
// window, how many it sees; 0 for rows that do not exist. All threads of the block, at least two
// warps, must call it, and pass a barrier before reading limits.
template <int kRows>
__device__ void find_limits(const AttentionArgs& args, const BlockRows& rows, const int32_t* k_pos,
                            int64_t keys, int* limits) {
  if (threadIdx.x / 32 < 2) count_at_ends(args, rows, k_pos, keys, 0, 0, limits);
  __syncthreads();
  count_between<kRows>(args, rows, k_pos, 0, limits);
}

// Also writes firsts[row], how many keys are ahead of a row's window: it sees keys firsts[row] to
// limits[row] - 1. At least four warps, whose searches wait for memory at the same time.
template <int kRows>
__device__ void find_ranges(const AttentionArgs& args, const BlockRows& rows, const int32_t* k_pos,
                            int64_t keys, int* firsts, int* limits) {
  const int warp = threadIdx.x / 32;
  const int64_t window = args.window;
  if (warp < 2) {
    count_at_ends(args, rows, k_pos, keys, 0, 0, limits);
  } else if (warp < 4 && window > 0) {
    count_at_ends(args, rows, k_pos, keys, window, 2, firsts);
  }
  __syncthreads();
  count_between<kRows>(args, rows, k_pos, 0, limits);
  if (window > 0) {
    count_between<kRows>(args, rows, k_pos, window, firsts);
  } else {
    for (int row = static_cast<int>(threadIdx.x); row < kRows; row += blockDim.x) firsts[row] = 0;
  }
}

// Where a block's rows are written: the result, or the partial of one piece of the keys.
struct Target {
  void* out;  // [rows, head_dim]
  float* lse;
  ScalarType dtype;  // float32, or the dtype of the inputs
  bool accumulate;
};

// How a row's accumulators, with the softmax state `ours`, are combined with what its target holds.
struct RowResult {
  int64_t at;  // the row in the target
  float keep, add, lse;
  bool written, merged;

  // All threads of the row must have constructed this before any of them calls store_lse().
  __device__ RowResult(const Target& target, int64_t at, bool held, const SoftmaxState& ours)
      : at(at) {
    SoftmaxState total;
    if (held && target.accumulate) total = SoftmaxState::of_lse(target.lse[at]);
    merged = !total.empty();                      // otherwise the target may hold anything
    written = held && !(merged && ours.empty());  // if both are empty, out is 0
    total.merge(ours, keep, add);
    const float divisor = total.empty() ? 1.0f : total.sum;
    keep /= divisor;
    add = total.empty() ? 0.0f : add / divisor;
    lse = total.lse();
  }

  __device__ void store_lse(const Target& target) const {
    if (written) target.lse[at] = lse;
  }

  // Stores columns `column`, which is even, and `column` + 1.
  template <class T>
  __device__ void store(const Target& target, int head_dim, int column, float x, float y) const {
    if (!written) return;
    const int64_t index = at * head_dim + column;
    x = add == 0.0f ? 0.0f : x * add;  // if the row saw no key, x may be anything
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
