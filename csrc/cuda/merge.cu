// Merges partials: out = sum_i w_i outs[i] / sum_i w_i with w_i = exp(lses[i] - max_i lses[i]),
// lse = max_i lses[i] + log(sum_i w_i). One warp a row; every sum runs in the order of the
// partials, so a result does not depend on the launch.
#include <cmath>

#include "cuda/device.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "softmax_state.h"

namespace cptool::cuda {
namespace {

constexpr int kRowsPerBlock = 8;
constexpr int kThreadColumns = 4;  // columns of a row that a thread holds at a time
constexpr int kMaxPartials = 128;

// A kernel's parameters: pointers by value, for the host arrays may be gone when it runs. More
// partials than fit (4 KiB is what every device takes) are merged in several launches, through out
// and lse; a 16-bit out is then rounded by each.
struct MergeLaunch {
  const void* outs[kMaxPartials];
  const float* lses[kMaxPartials];
  int partials;
  bool running;  // out and lse hold the merge of earlier partials
  int64_t rows, head_dim;
  ScalarType out_dtype;
  void* out;
  float* lse;
};
static_assert(sizeof(MergeLaunch) <= 4096);

__device__ float load_float(const void* from, ScalarType dtype, int64_t index) {
  switch (dtype) {
    case ScalarType::kBFloat16:
      return to_float(static_cast<const __nv_bfloat16*>(from)[index]);
    case ScalarType::kFloat16:
      return to_float(static_cast<const __half*>(from)[index]);
    default:
      return static_cast<const float*>(from)[index];
  }
}

template <class T>
__global__ void __launch_bounds__(kWarp* kRowsPerBlock)
    merge_kernel(const __grid_constant__ MergeLaunch launch) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp;
  if (row >= launch.rows) return;

  const float before = launch.running ? launch.lse[row] : -INFINITY;
  SoftmaxState total;
  total.max = before;
  for (int i = 0; i < launch.partials; ++i) {
    const float lse = launch.lses[i][row];
    total.max = lse > total.max ? lse : total.max;
  }
  const float base = total.max == -INFINITY ? 0.0f : total.max;
  const float weight_before = expf(before - base);
  total.sum = weight_before;
  for (int i = 0; i < launch.partials; ++i) total.sum += expf(launch.lses[i][row] - base);
  const float divisor = total.empty() ? 1.0f : total.sum;

  const int64_t first = row * launch.head_dim;
  for (int64_t column = lane; column < launch.head_dim; column += kThreadColumns * kWarp) {
    float acc[kThreadColumns] = {};
    if (before != -INFINITY) {
#pragma unroll
      for (int c = 0; c < kThreadColumns; ++c) {
        const int64_t at = column + c * kWarp;
        if (at >= launch.head_dim) continue;
        acc[c] = weight_before * load_float(launch.out, launch.out_dtype, first + at);
      }
    }
    for (int i = 0; i < launch.partials; ++i) {
      const float lse = launch.lses[i][row];
      if (lse == -INFINITY) continue;  // its out is ignored, whatever it holds
      const float weight = expf(lse - base);
      const T* from = static_cast<const T*>(launch.outs[i]) + first;
#pragma unroll
      for (int c = 0; c < kThreadColumns; ++c) {
        const int64_t at = column + c * kWarp;
        if (at < launch.head_dim) acc[c] += weight * to_float(from[at]);
      }
    }
#pragma unroll
    for (int c = 0; c < kThreadColumns; ++c) {
      const int64_t at = column + c * kWarp;
      if (at >= launch.head_dim) continue;
      store_float(launch.out, launch.out_dtype, first + at, acc[c] / divisor);
    }
  }
  __syncwarp();  // every thread has read the running lse before one of them writes it
  if (lane == 0) launch.lse[row] = total.lse();
}

}  // namespace

void merge_partials(const MergeArgs& args, uintptr_t stream) {
  if (args.rows == 0) return;
  const int64_t blocks = (args.rows + kRowsPerBlock - 1) / kRowsPerBlock;
  if (blocks > INT32_MAX) {
    throw std::invalid_argument("merge_partials on CUDA would need " + std::to_string(blocks) +
                                " thread blocks; the limit is 2147483647");
  }
  const dim3 grid(static_cast<unsigned>(blocks));
  const dim3 block(kWarp * kRowsPerBlock);
  const cudaStream_t on = reinterpret_cast<cudaStream_t>(stream);
  for (int64_t begin = 0; begin < args.partials; begin += kMaxPartials) {
    MergeLaunch merge = {};
    for (int64_t i = begin; i < args.partials && merge.partials < kMaxPartials; ++i) {
      merge.outs[merge.partials] = args.outs[i];
      merge.lses[merge.partials] = args.lses[i];
      ++merge.partials;
    }
    merge.running = begin > 0;
    merge.rows = args.rows;
    merge.head_dim = args.head_dim;
    merge.out_dtype = args.out_dtype;
    merge.out = args.out;
    merge.lse = args.lse;
    switch (args.dtype) {
      case ScalarType::kFloat32:
        launch("merge_partials", merge_kernel<float>, grid, block, 0, on, merge);
        break;
      case ScalarType::kBFloat16:
        launch("merge_partials", merge_kernel<__nv_bfloat16>, grid, block, 0, on, merge);
        break;
      case ScalarType::kFloat16:
        launch("merge_partials", merge_kernel<__half>, grid, block, 0, on, merge);
        break;
    }
  }
}

}  // namespace cptool::cuda
