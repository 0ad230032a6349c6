// Merges partials: out = sum_i w_i outs[i] / sum_i w_i with w_i = exp(lses[i] - max_i lses[i]),
// lse = max_i lses[i] + log(sum_i w_i). Every sum runs in the order of the partials, so a result
// does not depend on the launch.
//
// Bound by bandwidth: a thread holds eight columns of one row, loads 16 bytes at a time, and those of
// kTogether partials before it uses the first. A partial that saw nothing is not read.
#include "cuda/merge.h"

#include <cmath>

#include "cuda/device.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "softmax_state.h"

namespace cptool::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 8;  // of a thread
constexpr int kTogether = 4;
constexpr int kMaxPartials = 128;

// A kernel's parameters: pointers by value, for the host arrays may be gone when it runs. More
// partials than fit (4 KiB is what every device takes) are merged in several launches, through out
// and lse; a 16-bit out is then rounded by each.
struct MergeLaunch {
  const void* outs[kMaxPartials];
  const float* lses[kMaxPartials];
  int partials;
  bool running;  // out and lse hold the merge of earlier partials
  int64_t rows;
  int row_threads, block_rows;
  ScalarType out_dtype;
  void* out;
  float* lse;
};
static_assert(sizeof(MergeLaunch) <= 4096);

struct Columns {
  float value[kColumns];
};

// Eight elements from `index`, a multiple of 8, on. kAligned: at a multiple of 16 bytes.
template <class T, bool kAligned>
__device__ Columns load_columns(const void* from, int64_t index) {
  struct alignas(kAligned ? 16 : alignof(T)) Elements {
    T element[kColumns];
  };
  const Elements read = *reinterpret_cast<const Elements*>(static_cast<const T*>(from) + index);
  Columns columns;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) columns.value[c] = to_float(read.element[c]);
  return columns;
}

template <class T, bool kAligned>
__device__ void store_columns(void* to, int64_t index, const Columns& columns) {
  struct alignas(kAligned ? 16 : alignof(T)) Elements {
    T element[kColumns];
  };
  Elements written;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) written.element[c] = from_float<T>(columns.value[c]);
  *reinterpret_cast<Elements*>(static_cast<T*>(to) + index) = written;
}

template <bool kAligned>
__device__ Columns load_columns(const void* from, ScalarType dtype, int64_t index) {
  switch (dtype) {
    case ScalarType::kBFloat16:
      return load_columns<__nv_bfloat16, kAligned>(from, index);
    case ScalarType::kFloat16:
      return load_columns<__half, kAligned>(from, index);
    default:
      return load_columns<float, kAligned>(from, index);
  }
}

template <bool kAligned>
__device__ void store_columns(void* to, ScalarType dtype, int64_t index, const Columns& columns) {
  switch (dtype) {
    case ScalarType::kBFloat16:
      return store_columns<__nv_bfloat16, kAligned>(to, index, columns);
    case ScalarType::kFloat16:
      return store_columns<__half, kAligned>(to, index, columns);
    default:
      return store_columns<float, kAligned>(to, index, columns);
  }
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    merge_kernel(const __grid_constant__ MergeLaunch launch) {
  // A row is one block's, so that a barrier lies between the last read of its lse and its write.
  const int block_row = static_cast<int>(threadIdx.x) / launch.row_threads;
  const int chunk = static_cast<int>(threadIdx.x) % launch.row_threads;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * launch.block_rows + block_row;
  const bool held = block_row < launch.block_rows && row < launch.rows;

  SoftmaxState total;
  if (held) {
    const float before = launch.running ? launch.lse[row] : -INFINITY;
    total.max = before;
    for (int i = 0; i < launch.partials; ++i) {
      const float lse = launch.lses[i][row];
      total.max = lse > total.max ? lse : total.max;
    }
    const float base = total.max == -INFINITY ? 0.0f : total.max;
    const int64_t index = (row * launch.row_threads + chunk) * kColumns;
    Columns acc = {};
    if (before != -INFINITY) {
      const float weight = expf(before - base);
      total.sum = weight;
      acc = load_columns<kAligned>(launch.out, launch.out_dtype, index);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) acc.value[c] *= weight;
    }
    for (int i = 0; i < launch.partials; i += kTogether) {
      Columns columns[kTogether] = {};
      float weight[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        weight[j] = i + j < launch.partials ? expf(launch.lses[i + j][row] - base) : 0.0f;
        if (weight[j] != 0.0f) {  // else its out is ignored, whatever it holds
          columns[j] = load_columns<T, kAligned>(launch.outs[i + j], index);
        }
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        total.sum += weight[j];
#pragma unroll
        for (int c = 0; c < kColumns; ++c) acc.value[c] += weight[j] * columns[j].value[c];
      }
    }
    const float divisor = total.empty() ? 1.0f : total.sum;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) acc.value[c] /= divisor;
    store_columns<kAligned>(launch.out, launch.out_dtype, index, acc);
  }
  __syncthreads();
  if (held && chunk == 0) launch.lse[row] = total.lse();
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <class T>
void launch_merge(const MergeLaunch& merge, bool aligned, unsigned blocks, cudaStream_t stream) {
  if (aligned) {
    launch("merge_partials", merge_kernel<T, true>, blocks, kThreads, 0, stream, merge);
  } else {
    launch("merge_partials", merge_kernel<T, false>, blocks, kThreads, 0, stream, merge);
  }
}

}  // namespace

void merge(const MergeArgs& args, bool running, cudaStream_t stream) {
  if (args.rows == 0) return;
  MergeLaunch merge = {};
  merge.running = running;
  merge.rows = args.rows;
  merge.row_threads = static_cast<int>(args.head_dim / kColumns);
  merge.block_rows = kThreads / merge.row_threads;
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
        launch_merge<float>(merge, aligned, grid, stream);
        break;
      case ScalarType::kBFloat16:
        launch_merge<__nv_bfloat16>(merge, aligned, grid, stream);
        break;
      case ScalarType::kFloat16:
        launch_merge<__half>(merge, aligned, grid, stream);
        break;
    }
    merge.running = true;
  }
}

void merge_partials(const MergeArgs& args, uintptr_t stream) {
  merge(args, false, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace cptool::cuda
