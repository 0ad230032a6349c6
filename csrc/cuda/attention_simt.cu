// The reference kernel: attention partials of both kinds in float32 arithmetic on the CUDA cores,
// for every dtype and head_dim.
//
// FlashAttention's schedule (Dao et al., 2022; 2023). A block of 256 threads holds kRows packed
// query rows (query_blocks.h) and walks the keys that its rows see, a tile at a time:
// S = scale Q K^T in registers, online softmax, P through shared memory, acc = acc keep + P V in
// registers. Thread (x, y) of 16 x 16 owns kThreadRows consecutive rows from y kThreadRows, and of
// those rows the scores x, x + 16 and the columns 2 x + 32 c, 2 x + 32 c + 1. The 16 threads of a
// row are half a warp. There is one kernel for each padded head_dim and kind; SiLU attention keeps
// no state of a row.
#include <cmath>

#include "cuda/device.h"
#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/query_blocks.h"
#include "cuda/tiles.h"
#include "softmax_state.h"

namespace cptool::cuda {
namespace {

constexpr unsigned kWholeWarp = 0xffffffffu;

__device__ float row_max(float value) {
  for (int lane = kThreadsX / 2; lane > 0; lane /= 2)
    value = fmaxf(value, __shfl_xor_sync(kWholeWarp, value, lane));
  return value;
}

__device__ float row_sum(float value) {
  for (int lane = kThreadsX / 2; lane > 0; lane /= 2)
    value += __shfl_xor_sync(kWholeWarp, value, lane);
  return value;
}

__device__ float silu(float x) { return x / (1.0f + expf(-x)); }

// One thread's share of the block's rows.
template <int kHeadDim, Kind kKind>
struct ThreadRows {
  using Shared = Tiles<kHeadDim>;
  static constexpr int kThreadRows = Shared::kThreadRows;
  static constexpr int kThreadKeys = Shared::kThreadKeys;
  static constexpr int kChunks = kHeadDim / (2 * kThreadsX);

  SoftmaxState state[kThreadRows];  // max of the row; sum, until finish(), of this thread's keys
  float2 acc[kThreadRows][kChunks] = {};

  // Computes the scores of the keys in shared.kv, of which `key` is the first, and leaves their
  // weights in shared.p.
  __device__ void scores(Shared& shared, int x, int y, const AttentionArgs& args, int64_t key,
                         bool masked) {
    const int head_dim = static_cast<int>(args.head_dim);
    float score[kThreadRows][kThreadKeys] = {};
    for (int column = 0; column < head_dim; column += 4) {
      float4 keys[kThreadKeys];
#pragma unroll
      for (int j = 0; j < kThreadKeys; ++j) {
        keys[j] = *reinterpret_cast<const float4*>(&shared.kv[x + kThreadsX * j][column]);
      }
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) {
        const float4 query =
            *reinterpret_cast<const float4*>(&shared.q[y * kThreadRows + i][column]);
#pragma unroll
        for (int j = 0; j < kThreadKeys; ++j) {
          score[i][j] += query.x * keys[j].x;
          score[i][j] += query.y * keys[j].y;
          score[i][j] += query.z * keys[j].z;
          score[i][j] += query.w * keys[j].w;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      const int row = y * kThreadRows + i;
      float largest = -INFINITY;
#pragma unroll
      for (int j = 0; j < kThreadKeys; ++j) {
        const int64_t at = key + x + kThreadsX * j;
        const bool hidden = masked && (at >= shared.limits[row] || at < shared.firsts[row]);
        const float scaled = score[i][j] * args.scale;
        if constexpr (kKind == Kind::kSilu) {
          shared.p[row][x + kThreadsX * j] = hidden ? 0.0f : silu(scaled);
          continue;
        }
        const float capped = args.cap > 0.0f ? args.cap * tanhf(scaled / args.cap) : scaled;
        score[i][j] = hidden ? -INFINITY : capped;
        largest = fmaxf(largest, score[i][j]);
      }
      if constexpr (kKind == Kind::kSilu) continue;
      // The tile's state is relative to the maximum of all keys so far, so that merge() need not
      // rescale its weights.
      SoftmaxState tile;
      tile.max = fmaxf(state[i].max, row_max(largest));
      const float base = tile.max == -INFINITY ? 0.0f : tile.max;  // -inf - -inf would be NaN
#pragma unroll
      for (int j = 0; j < kThreadKeys; ++j) {
        const float weight = expf(score[i][j] - base);
        tile.sum += weight;
        shared.p[row][x + kThreadsX * j] = weight;
      }
      float keep, add;
      state[i].merge(tile, keep, add);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        acc[i][c].x *= keep;
        acc[i][c].y *= keep;
      }
    }
  }

  // acc += P V, with the values in shared.kv.
  __device__ void values(const Shared& shared, int x, int y) {
#pragma unroll 1
    for (int key = 0; key < Shared::kKeys; key += 4) {
      alignas(16) float weight[kThreadRows][4];  // written as float4
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) {
        *reinterpret_cast<float4*>(weight[i]) =
            *reinterpret_cast<const float4*>(&shared.p[y * kThreadRows + i][key]);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          const float2 value =
              *reinterpret_cast<const float2*>(&shared.kv[key + j][2 * (x + kThreadsX * c)]);
#pragma unroll
          for (int i = 0; i < kThreadRows; ++i) {
            acc[i][c].x += weight[i][j] * value.x;
            acc[i][c].y += weight[i][j] * value.y;
          }
        }
      }
    }
  }

  // Writes the rows of SiLU attention, or adds them to the existing ones. `result_row` as in
  // finish.
  template <class ResultRow>
  __device__ void finish_sums(const AttentionArgs& args, int x, int y, int rows,
                              ResultRow result_row) {
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      const int row = y * kThreadRows + i;
      if (row >= rows) continue;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int column = 2 * (x + kThreadsX * c);
        if (column >= args.head_dim) continue;
        const int64_t index = result_row(row) * args.head_dim + column;
        float2 out = make_float2(acc[i][c].x / args.max_len, acc[i][c].y / args.max_len);
        if (args.accumulate) {
          const float* there = static_cast<const float*>(args.out) + index;
          out.x += there[0];
          out.y += there[1];
        }
        store_float(args.out, args.out_dtype, index, out.x);
        store_float(args.out, args.out_dtype, index + 1, out.y);
      }
    }
  }

  // Writes the rows of the result, or merges them into the existing ones. `result_row(row)`: the
  // index of a row in out and lse.
  template <class ResultRow>
  __device__ void finish(const AttentionArgs& args, int x, int y, int rows, ResultRow result_row) {
    SoftmaxState before[kThreadRows];
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      const int row = y * kThreadRows + i;
      state[i].sum = row_sum(state[i].sum);
      if (args.accumulate && row < rows) {
        before[i] = SoftmaxState::of_lse(args.lse[result_row(row)]);
      }
    }
    __syncwarp();  // every thread of a row has read its lse before one of them writes it
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      const int row = y * kThreadRows + i;
      if (row >= rows || (!before[i].empty() && state[i].empty())) continue;
      SoftmaxState total = before[i];
      float keep, add;
      total.merge(state[i], keep, add);
      const float divisor = total.empty() ? 1.0f : total.sum;
      keep /= divisor;
      add /= divisor;
      const int64_t at = result_row(row);
      if (x == 0) args.lse[at] = total.lse();
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int column = 2 * (x + kThreadsX * c);
        if (column >= args.head_dim) continue;
        const int64_t index = at * args.head_dim + column;
        float2 out = make_float2(0.0f, 0.0f);  // for a row that saw no key; acc may hold anything
        if (!total.empty()) out = make_float2(acc[i][c].x * add, acc[i][c].y * add);
        if (!before[i].empty()) {  // otherwise the existing row may hold anything and is ignored
          const float* there = static_cast<const float*>(args.out) + index;
          out.x += there[0] * keep;
          out.y += there[1] * keep;
        }
        store_float(args.out, args.out_dtype, index, out.x);
        store_float(args.out, args.out_dtype, index + 1, out.y);
      }
    }
  }
};

// At least two blocks per multiprocessor, hence at most 128 registers per thread.
template <int kHeadDim, Kind kKind>
__global__ void __launch_bounds__(kThreads, 2) attention_kernel(const AttentionArgs args) {
  using Shared = Tiles<kHeadDim>;
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const int x = threadIdx.x % kThreadsX;
  const int y = threadIdx.x / kThreadsX;
  const int head_dim = static_cast<int>(args.head_dim);

  // The last queries see the most keys and therefore start first.
  const QueryBlock block = query_block(args, Shared::kRows, gridDim.x - 1 - blockIdx.x);
  if (block.rows <= 0) return;
  const int rows = static_cast<int>(block.rows);
  const int64_t group = args.q_heads / args.kv_heads;
  const int64_t kv_head = blockIdx.y;
  const auto token = [&](int row) { return block.first_token + (block.first_row + row) / group; };
  const auto head = [&](int row) { return kv_head * group + (block.first_row + row) % group; };

  const int64_t first_key = offset_at(args.cu_k, block.sequence, args.k_tokens);
  const int64_t keys = offset_at(args.cu_k, block.sequence + 1, args.k_tokens) - first_key;
  if (threadIdx.x < Shared::kRows) {
    const int row = threadIdx.x;
    const int32_t* k_pos = args.k_pos + first_key;
    shared.limits[row] = row < rows ? visible_keys(k_pos, keys, args.q_pos[token(row)]) : 0;
    shared.firsts[row] = row < rows && args.window > 0
                             ? visible_keys(k_pos, keys, args.q_pos[token(row)] - args.window)
                             : 0;
  }
  const auto query_at = [&](int row) {
    return token(row) * args.q_token_stride + head(row) * args.q_head_stride;
  };
  load_tile(args.dtype, args.q, query_at, rows, head_dim, shared.q);
  __syncthreads();
  // Rows ascend in position, so the first row sees the fewest keys and the last one the most.
  const int64_t dense_begin = shared.firsts[rows - 1], dense_end = shared.limits[0];
  const int64_t key_end = shared.limits[rows - 1];

  ThreadRows<kHeadDim, kKind> mine;
  int seen = 0;  // no row before this one sees the keys that are left
  for (int64_t key = 0; key < key_end; key += Shared::kKeys) {
    if (key < dense_begin) {  // tiles that no row sees are skipped
      while (shared.limits[seen] <= key) ++seen;
      const int64_t next = shared.firsts[seen] / Shared::kKeys * Shared::kKeys;
      key = next > key ? next : key;
      if (key >= key_end) break;
    }
    const int64_t left = key_end - key;
    const int held = left < Shared::kKeys ? static_cast<int>(left) : Shared::kKeys;
    const int64_t first = first_key + key;
    const auto key_at = [&](int j) {
      return (first + j) * args.k_token_stride + kv_head * args.k_head_stride;
    };
    load_tile(args.dtype, args.k, key_at, held, head_dim, shared.kv);
    __syncthreads();
    mine.scores(shared, x, y, args, key, key < dense_begin || key + Shared::kKeys > dense_end);
    __syncthreads();
    const auto value_at = [&](int j) {
      return (first + j) * args.v_token_stride + kv_head * args.v_head_stride;
    };
    load_tile(args.dtype, args.v, value_at, held, head_dim, shared.kv);
    __syncthreads();
    mine.values(shared, x, y);
    __syncthreads();
  }
  const auto result_row = [&](int row) { return token(row) * args.q_heads + head(row); };
  if constexpr (kKind == Kind::kSilu) {
    mine.finish_sums(args, x, y, rows, result_row);
  } else {
    mine.finish(args, x, y, rows, result_row);
  }
}

template <int kHeadDim, Kind kKind>
void launch_kind(const AttentionArgs& args, cudaStream_t stream) {
  using Shared = Tiles<kHeadDim>;
  static_assert(sizeof(Shared) <= 99 * 1024);
  const int64_t blocks = query_block_count(args, Shared::kRows);
  check_grid(blocks, args.kv_heads);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(args.kv_heads));
  launch("attention_partial", attention_kernel<kHeadDim, kKind>, grid, kThreads, sizeof(Shared),
         stream, args);
}

template <int kHeadDim>
void launch_for(const AttentionArgs& args, cudaStream_t stream) {
  if (kind(args) == Kind::kSilu) return launch_kind<kHeadDim, Kind::kSilu>(args, stream);
  launch_kind<kHeadDim, Kind::kSoftmax>(args, stream);
}

}  // namespace

void attention_partial_simt(const AttentionArgs& args, cudaStream_t stream) {
  if (args.head_dim <= 64) return launch_for<64>(args, stream);
  if (args.head_dim <= 96) return launch_for<96>(args, stream);
  if (args.head_dim <= 128) return launch_for<128>(args, stream);
  return launch_for<256>(args, stream);
}

}  // namespace cptool::cuda
