// Merges partials: out = sum_i w_i outs[i] / sum_i w_i with w_i = exp(lses[i] - max_i lses[i]),
// lse = max_i lses[i] + log(sum_i w_i). Every sum runs in the order of the partials, so a result
// does not depend on the launch.
//
// Memory bandwidth is the limit: a thread holds eight columns of one row, loads 16 bytes at a time,
// and issues the loads of kLoads partials before it uses the first. Rows that are no multiple of
// eight are held in twos. A partial that saw no key is
// not read. If there are many partials of few rows, as after decoding in pieces, groups of a
// block's threads each merge some of the partials and then add up their sums through shared memory,
// in order.
#include "cuda/merge.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cuda/device.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "softmax_state.h"

namespace cptool::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWide = 8, kNarrow = 2;  // columns per thread
constexpr int kLoads = 4;              // per thread, in flight together
constexpr int kMaxPartials = 128;
// With fewer threads, one for each chunk of a row, the latency of the loads is not hidden.
constexpr int64_t kFewThreads = 1 << 16;

// The kernel's parameters. They hold the pointers by value, because the host arrays may be gone
// when the kernel runs. Parameters are limited to 4 KiB; more partials than fit are merged in
// several launches, through out and lse, and each launch rounds a 16-bit out.
struct MergeLaunch {
  const void* outs[kMaxPartials];
  const float* lses[kMaxPartials];
  int partials;
  bool running;  // out and lse hold the merge of earlier partials
  int64_t rows;
  int row_threads, block_rows, groups;  // per block; their product is the number of threads in use
  ScalarType out_dtype;
  void* out;
  float* lse;
};
static_assert(sizeof(MergeLaunch) <= 4096);

template <int kColumns>
struct Columns {
  float value[kColumns];
};

// Loads kColumns elements from `index`, a multiple of them, on. kAligned: eight, at a multiple of
// 16 bytes.
template <class T, int kColumns, bool kAligned>
__device__ Columns<kColumns> load_columns(const void* from, int64_t index) {
  struct alignas(kAligned ? 16 : alignof(T)) Elements {
    T element[kColumns];
  };
  const Elements read = *reinterpret_cast<const Elements*>(static_cast<const T*>(from) + index);
  Columns<kColumns> columns;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) columns.value[c] = to_float(read.element[c]);
  return columns;
}

template <class T, int kColumns, bool kAligned>
__device__ void store_columns(void* to, int64_t index, const Columns<kColumns>& columns) {
  struct alignas(kAligned ? 16 : alignof(T)) Elements {
    T element[kColumns];
  };
  Elements written;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) written.element[c] = from_float<T>(columns.value[c]);
  *reinterpret_cast<Elements*>(static_cast<T*>(to) + index) = written;
}

template <int kColumns, bool kAligned>
__device__ Columns<kColumns> load_columns(const void* from, ScalarType dtype, int64_t index) {
  switch (dtype) {
    case ScalarType::kBFloat16:
      return load_columns<__nv_bfloat16, kColumns, kAligned>(from, index);
    case ScalarType::kFloat16:
      return load_columns<__half, kColumns, kAligned>(from, index);
    default:
      return load_columns<float, kColumns, kAligned>(from, index);
  }
}

template <int kColumns, bool kAligned>
__device__ void store_columns(void* to, ScalarType dtype, int64_t index,
                              const Columns<kColumns>& columns) {
  switch (dtype) {
    case ScalarType::kBFloat16:
      return store_columns<__nv_bfloat16, kColumns, kAligned>(to, index, columns);
    case ScalarType::kFloat16:
      return store_columns<__half, kColumns, kAligned>(to, index, columns);
    default:
      return store_columns<float, kColumns, kAligned>(to, index, columns);
  }
}

template <class T, int kColumns, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    merge_kernel(const __grid_constant__ MergeLaunch launch) {
  constexpr int kTogether = kAligned ? kLoads : 1;
  // One block computes the whole row, so that a barrier can separate the last read of its lse from
  // the write.
  const int thread = static_cast<int>(threadIdx.x);
  const int chunk = thread % launch.row_threads;
  const int block_row = thread / launch.row_threads % launch.block_rows;
  const int group = thread / (launch.row_threads * launch.block_rows);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * launch.block_rows + block_row;
  const bool held = group < launch.groups && row < launch.rows;
  // For each group and row: the largest lse, the sum of weights, the weighted columns.
  float* shared_max = reinterpret_cast<float*>(dynamic_shared());
  float* shared_sum = shared_max + launch.groups * launch.block_rows;
  float* shared_acc = shared_sum + launch.groups * launch.block_rows;
  const int place = group * launch.block_rows + block_row;

  SoftmaxState total;
  float before = -INFINITY;
  if (held) {
    if (launch.running && group == 0) before = launch.lse[row];
    total.max = before;
#pragma unroll 4
    for (int i = group; i < launch.partials; i += launch.groups) {
      total.max = fmaxf(total.max, launch.lses[i][row]);
    }
  }
  if (launch.groups > 1) {
    if (held && chunk == 0) shared_max[place] = total.max;
    __syncthreads();
    for (int g = 0; held && g < launch.groups; ++g) {
      total.max = fmaxf(total.max, shared_max[g * launch.block_rows + block_row]);
    }
  }

  const float base = total.max == -INFINITY ? 0.0f : total.max;
  const int64_t index = (row * launch.row_threads + chunk) * kColumns;
  Columns<kColumns> acc = {};
  if (held) {
    if (before != -INFINITY) {
      total.sum = expf(before - base);
      acc = load_columns<kColumns, kAligned>(launch.out, launch.out_dtype, index);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) acc.value[c] *= total.sum;
    }
    for (int first = group; first < launch.partials; first += kTogether * launch.groups) {
      Columns<kColumns> columns[kTogether] = {};
      float weight[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const int i = first + j * launch.groups;
        weight[j] = i < launch.partials ? expf(launch.lses[i][row] - base) : 0.0f;
        if (weight[j] != 0.0f) {  // otherwise its out may hold anything and is ignored
          columns[j] = load_columns<T, kColumns, kAligned>(launch.outs[i], index);
        }
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        total.sum += weight[j];
#pragma unroll
        for (int c = 0; c < kColumns; ++c) acc.value[c] += weight[j] * columns[j].value[c];
      }
    }
    if (launch.groups > 1) {
      if (chunk == 0) shared_sum[place] = total.sum;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        shared_acc[(place * launch.row_threads + chunk) * kColumns + c] = acc.value[c];
      }
    }
  }
  __syncthreads();
  if (!held || group != 0) return;
  for (int g = 1; g < launch.groups; ++g) {
    const int there = g * launch.block_rows + block_row;
    total.sum += shared_sum[there];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      acc.value[c] += shared_acc[(there * launch.row_threads + chunk) * kColumns + c];
    }
  }
  const float divisor = total.empty() ? 1.0f : total.sum;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) acc.value[c] /= divisor;
  store_columns<kColumns, kAligned>(launch.out, launch.out_dtype, index, acc);
  if (chunk == 0) launch.lse[row] = total.lse();
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <class T>
void launch_merge(const MergeLaunch& merge, int columns, bool aligned, unsigned blocks,
                  cudaStream_t stream) {
  const size_t shared = merge.groups == 1 ? 0
                                          : sizeof(float) * merge.groups * merge.block_rows *
                                                (2 + merge.row_threads * columns);
  const auto kernel = columns == kNarrow ? merge_kernel<T, kNarrow, false>
                      : aligned          ? merge_kernel<T, kWide, true>
                                         : merge_kernel<T, kWide, false>;
  launch("merge_partials", kernel, blocks, kThreads, shared, stream, merge);
}

}  // namespace

void merge(const MergeArgs& args, bool running, cudaStream_t stream) {
  if (args.rows == 0) return;
  MergeLaunch merge = {};
  merge.running = running;
  merge.rows = args.rows;
  const int columns = args.head_dim % kWide == 0 ? kWide : kNarrow;
  merge.row_threads = static_cast<int>(args.head_dim / columns);
  merge.groups = 1;
  if (args.partials >= 2 * kLoads && args.rows * merge.row_threads < kFewThreads) {
    const int64_t most = std::min<int64_t>(args.partials, kMaxPartials) / kLoads;
    merge.groups = static_cast<int>(std::min<int64_t>(kThreads / merge.row_threads, most));
  }
  merge.block_rows = kThreads / (merge.row_threads * merge.groups);
  merge.out_dtype = args.out_dtype;
  merge.out = args.out;
  merge.lse = args.lse;
  const int64_t blocks = (args.rows + merge.block_rows - 1) / merge.block_rows;
  if (blocks > INT32_MAX) {
    throw std::invalid_argument("merge_partials on CUDA would need " + std::to_string(blocks) +
                                " thread blocks; the limit is 2147483647");
  }
  for (int64_t begin = 0; begin < args.partials; begin += kMaxPartials) {
    bool aligned = is_aligned(args.out);
    merge.partials = 0;
    for (int64_t i = begin; i < args.partials && merge.partials < kMaxPartials; ++i) {
      merge.outs[merge.partials] = args.outs[i];
      merge.lses[merge.partials] = args.lses[i];
      aligned = aligned && is_aligned(args.outs[i]);
      ++merge.partials;
    }
    const unsigned grid = static_cast<unsigned>(blocks);
    switch (args.dtype) {
      case ScalarType::kFloat32:
        launch_merge<float>(merge, columns, aligned, grid, stream);
        break;
      case ScalarType::kBFloat16:
        launch_merge<__nv_bfloat16>(merge, columns, aligned, grid, stream);
        break;
      case ScalarType::kFloat16:
        launch_merge<__half>(merge, columns, aligned, grid, stream);
        break;
    }
    merge.running = true;
  }
}

int64_t pieces_bytes(const AttentionArgs& args, int pieces) {
  return 4 * pieces * args.q_tokens * args.q_heads * (args.head_dim + 1);
}

void merge_pieces(const AttentionArgs& args, const float* partials, int pieces,
                  cudaStream_t stream) {
  const int64_t rows = args.q_tokens * args.q_heads;
  std::vector<const void*> outs;
  std::vector<const float*> lses;
  for (int64_t piece = 0; piece < pieces; ++piece) {
    outs.push_back(partials + piece * rows * args.head_dim);
    lses.push_back(partials + pieces * rows * args.head_dim + piece * rows);
  }
  MergeArgs all;
  all.outs = outs.data();
  all.lses = lses.data();
  all.partials = pieces;
  all.rows = rows;
  all.head_dim = args.head_dim;
  all.dtype = ScalarType::kFloat32;
  all.out_dtype = args.out_dtype;
  all.out = args.out;
  all.lse = args.lse;
  merge(all, args.accumulate, stream);
}

void merge_partials(const MergeArgs& args, uintptr_t stream) {
  merge(args, false, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace cptool::cuda
