// Attention partials with Hopper's TMA and wgmma.
//
// A persistent kernel with one thread block per multiprocessor: a producer warpgroup (producer.h)
// and two consumer warpgroups (consumer.h), three for head_dim up to 64, with 64 packed query rows
// each, which share every tile of 128 keys. The producer gives registers to the consumers.
//
// The cost of one tile, in cycles of one multiprocessor of an H100, which in a cycle computes 4096
// FLOP of 16-bit products and 16 exponentials, issues 4 instructions and moves 128 bytes of shared
// memory. Instructions are those of the compiled loop (nvcc 13.0): 430 per warp, 410 at head_dim
// 64; 140 more in a masked tile, and up to 64 more until the maxima have settled.
//
//                                   head_dim 128, 128 rows             head_dim 64, 192 rows
//   products                        4 x 128^3 / 4096         = 2048    4 x 192 128 64 / 4096 = 1536
//   exponentials                    128^2 / 16               = 1024    192 128 / 16          = 1536
//   instructions                    8 warps 430 / 4          =  860    12 warps 410 / 4      = 1230
//   shared memory, read by wgmma    2 (32 + 32 KiB)          = 1024    3 (8 + 16 + 16 KiB)   =  960
//   and written by TMA              64 KiB                   =  512    32 KiB                =  256
//
// The tensor cores are therefore the limit at head_dim 128, and together with the exponentials
// at 64. A job of n tiles takes about n + 1.3 of
// these times: 0.93 of the steady rate for causal attention over 8K tokens, 0.965 at 16K. The
// authors of the schedule reach 0.8 of the rate of a large matrix product with it, which power
// limits as well: with that, docs/gpu.md predicts what is to be measured. Not measured.
//
// A second instance of each kernel computes calls with a window or a soft cap, so that plain ones
// pay nothing for them; it has two consumer warpgroups for every head_dim. Its loop has 450
// instructions per warp and 205 more in a tile that a window's end or its beginning cuts. A soft
// cap takes 580 more, with which 8 warps issue for 2050 cycles, as long as the products take at
// head_dim 128. Where a score exceeds 0.625 of the cap it takes 450 instead, but three exponentials
// or reciprocals a score, hence 3072 cycles.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <stdexcept>

#include "cuda/device.h"
#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/merge.h"
#include "cuda/query_blocks.h"
#include "cuda/sm90/consumer.h"
#include "cuda/sm90/pieces.h"
#include "cuda/sm90/producer.h"
#include "cuda/sm90/ptx.h"
#include "cuda/sm90/shared.h"
#include "cuda/sm90/tensor_map.h"

namespace cptool::cuda {
namespace sm90 {
namespace {

constexpr double kLog2E = 1.4426950408889634;

template <class T, class Plan>
__global__ void __launch_bounds__(Plan::kThreads, 1)
    attention_kernel(const __grid_constant__ Launch launch) {
  Shared<Plan>& shared = *reinterpret_cast<Shared<Plan>*>(dynamic_shared());
  if (threadIdx.x == 0) init_barriers(shared);
  clear_unfilled_rows(launch, shared);
  __syncthreads();
  // This shows the compiler that the value is uniform in the warp, so that it keeps descriptors in
  // uniform registers, where wgmma reads them.
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarp, 0);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (warp < kWarpgroup / kWarp) {
    ptx::registers_shrink<Plan::kProducerRegisters>();
    if (warp == 0) schedule(launch, shared, lane);
    if (warp == 1 && lane == 0) load(launch, shared);
    if (warp == 2) clean(shared, lane);
  } else {
    ptx::registers_grow<Plan::kConsumerRegisters>();
    const int first_row = (warp - kWarpgroup / kWarp) * 16 + lane / 4;
    Consumer<T, Plan>{shared, warp / 4 - 1, lane, first_row, {}, {}}.run(launch);
  }
}

int64_t l2_bytes() {
  int device, bytes;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device), "cudaDeviceGetAttribute");
  return bytes;
}

// Makes a map of q, k or v. The stride of a dimension of size 1 is arbitrary and is set to one that
// TMA accepts.
TensorMap map_of(const AttentionArgs& args, const void* tensor, int64_t tokens,
                 int64_t token_stride, int64_t heads, int64_t head_stride, int32_t box_heads,
                 int32_t box_tokens) {
  const int64_t row_bytes = args.head_dim * 2;
  // Without tokens nothing is loaded, but an empty map is not valid.
  if (tokens == 0) return map_of(args, args.q, 1, 0, 1, 0, box_heads, box_tokens);
  const int64_t head_bytes = heads == 1 ? row_bytes : 2 * head_stride;
  return tensor_map(args.dtype, tensor, tokens, tokens == 1 ? heads * head_bytes : 2 * token_stride,
                    heads, head_bytes, args.head_dim, kPanelColumns,
                    static_cast<uint32_t>(box_heads), static_cast<uint32_t>(box_tokens));
}

// Those that the call may fill.
int32_t free_multiprocessors(const AttentionArgs& args, const Device& device) {
  const int32_t left = device.multiprocessors - args.sm_margin;
  return left > 0 ? left : 1;
}

// The most keys that a job sees, if its queries' positions are consecutive.
int64_t most_keys(const AttentionArgs& args, int64_t block_tokens) {
  const int64_t keys = args.k_tokens / args.batch;
  return args.window > 0 && args.window < keys ? std::min(keys, args.window + block_tokens - 1)
                                               : keys;
}

// In how many pieces the keys of each job are computed. Assumes sequences of equal length.
template <class Plan>
int key_pieces(const AttentionArgs& args, int32_t multiprocessors) {
  const int64_t group = args.q_heads / args.kv_heads;
  const int64_t tokens = ceil_divide(args.q_tokens, args.batch);
  const int64_t block_tokens = Plan::kRows / group;
  return pieces_of(
      {ceil_divide(tokens, block_tokens) * args.batch * args.kv_heads, args.k_tokens / args.batch,
       tokens, args.q_tokens * args.q_heads * args.head_dim, most_keys(args, block_tokens)},
      multiprocessors);
}

template <class T, class Plan>
void launch_kernel(const AttentionArgs& args, void* workspace, cudaStream_t stream) {
  static_assert(sizeof(Shared<Plan>) <= 227 * 1024);
  Launch launch = {};
  launch.args = args;
  launch.group = static_cast<int32_t>(args.q_heads / args.kv_heads);
  launch.block_tokens = Plan::kRows / launch.group;
  launch.cap_scale = args.cap > 0.0f ? args.scale / args.cap : 0.0f;
  launch.scale_log2 =
      static_cast<float>(static_cast<double>(args.cap > 0.0f ? args.cap : args.scale) * kLog2E);
  const int32_t multiprocessors = free_multiprocessors(args, current_device());
  // K and V of a job in an average sequence: only the device knows the length of each.
  const int64_t head_bytes = most_keys(args, launch.block_tokens) * args.head_dim * 2 * 2;
  const int32_t kv_heads = static_cast<int32_t>(args.kv_heads);
  const int pieces = key_pieces<Plan>(args, multiprocessors);
  launch.jobs = {static_cast<int32_t>(query_block_count(args, launch.block_tokens * launch.group)),
                 kv_heads, heads_together(l2_bytes(), head_bytes, kv_heads, multiprocessors),
                 pieces};
  launch.target = {args.out, args.lse, args.out_dtype, args.accumulate};
  float* const partials = pieces == 1 ? nullptr : static_cast<float*>(workspace) + 4;
  if (partials != nullptr) {
    const int64_t rows = args.q_tokens * args.q_heads;
    launch.target = {partials, partials + pieces * rows * args.head_dim, ScalarType::kFloat32,
                     false};
  }
  const int32_t jobs = launch.jobs.count();
  const int32_t blocks = jobs < multiprocessors ? jobs : multiprocessors;
  launch.placed = args.sm_margin > 0 ? 0 : kPlacedJobs;
  if (jobs > launch.placed * blocks) {
    launch.taken = static_cast<int32_t*>(workspace);
    check(cudaMemsetAsync(workspace, 0, sizeof(int32_t), stream), "attention_partial");
  }
  launch.q = map_of(args, args.q, args.q_tokens, args.q_token_stride, args.q_heads,
                    args.q_head_stride, launch.group, launch.block_tokens);
  launch.k = map_of(args, args.k, args.k_tokens, args.k_token_stride, args.kv_heads,
                    args.k_head_stride, 1, kKeys);
  launch.v = map_of(args, args.v, args.k_tokens, args.v_token_stride, args.kv_heads,
                    args.v_head_stride, 1, kKeys);
  cuda::launch("attention_partial", attention_kernel<T, Plan>, dim3(static_cast<unsigned>(blocks)),
               dim3(Plan::kThreads), sizeof(Shared<Plan>), stream, launch);
  if (partials != nullptr) merge_pieces(args, partials, pieces, stream);
}

// Calls `with` with the Sizes of the kernel that runs the call.
template <bool kPlain, class Function>
auto with_sizes(int64_t head_dim, Function with) {
  if (head_dim <= 64) return with(Sizes<64, kPlain>{});
  if (head_dim <= 96) return with(Sizes<96, kPlain>{});
  return with(Sizes<128, kPlain>{});
}
template <class Function>
auto with_sizes(const AttentionArgs& args, Function with) {
  return is_plain(args) ? with_sizes<true>(args.head_dim, with)
                        : with_sizes<false>(args.head_dim, with);
}

template <class T>
void launch_for(const AttentionArgs& args, void* workspace, cudaStream_t stream) {
  with_sizes(args, [&](auto sizes) { launch_kernel<T, decltype(sizes)>(args, workspace, stream); });
}

// Requirements of TMA: addresses and strides in multiples of 16 bytes, strides below 2^40 bytes.
// The stride of a dimension of size 1 does not matter.
bool aligned(const void* tensor) { return reinterpret_cast<uintptr_t>(tensor) % 16 == 0; }
bool aligned(int64_t size, int64_t stride) {
  return size <= 1 || (stride > 0 && stride % 8 == 0 && stride < (int64_t{1} << 39));
}

}  // namespace
}  // namespace sm90

bool sm90_handles(const AttentionArgs& args) {
  using sm90::aligned;
  if (kind(args) != Kind::kSoftmax || args.dtype == ScalarType::kFloat32 || args.head_dim <= 0 ||
      args.head_dim % 8 != 0 || args.head_dim > 128 || args.batch < 1) {
    return false;
  }
  // Maxima are taken of scores before scaling.
  if (!(args.scale > 0.0f) || !std::isfinite(args.scale)) return false;
  const float cap_scale = args.scale / args.cap;
  if (args.cap > 0.0f &&
      !(cap_scale >= FLT_MIN && cap_scale <= FLT_MAX && args.cap <= FLT_MAX / 2)) {
    return false;
  }
  const int64_t group = args.q_heads / args.kv_heads;
  if (group > 2 * sm90::kWarpgroupRows) return false;  // the rows of a job hold whole tokens
  // Coordinates, rows and jobs are counted in 32 bits.
  constexpr int64_t kMost = INT32_MAX / 2;
  if (args.k_tokens > kMost || args.q_tokens > kMost / group || args.batch > kMost ||
      (args.q_tokens * group / sm90::kWarpgroupRows + args.batch) > kMost / args.kv_heads) {
    return false;
  }
  return aligned(args.q) && aligned(args.out) &&
         (args.k_tokens == 0 || (aligned(args.k) && aligned(args.v))) &&
         // In a tensor map, the stride of tokens is at least as many bytes as there are heads.
         (args.q_tokens <= 1 || 2 * args.q_token_stride >= args.q_heads) &&
         (args.k_tokens <= 1 || 2 * args.k_token_stride >= args.kv_heads) &&
         (args.k_tokens <= 1 || 2 * args.v_token_stride >= args.kv_heads) &&
         aligned(args.q_tokens, args.q_token_stride) && aligned(args.q_heads, args.q_head_stride) &&
         aligned(args.k_tokens, args.k_token_stride) &&
         aligned(args.kv_heads, args.k_head_stride) &&
         aligned(args.k_tokens, args.v_token_stride) && aligned(args.kv_heads, args.v_head_stride);
}

int64_t sm90_workspace(const AttentionArgs& args, const Device& device) {
  const int32_t multiprocessors = sm90::free_multiprocessors(args, device);
  const int pieces = sm90::with_sizes(
      args, [&](auto sizes) { return sm90::key_pieces<decltype(sizes)>(args, multiprocessors); });
  return 16 + (pieces == 1 ? 0 : pieces_bytes(args, pieces));
}

void attention_partial_sm90(const AttentionArgs& args, void* workspace, cudaStream_t stream) {
  if (workspace == nullptr) {
    // For example if another thread has just forced another kernel.
    throw std::invalid_argument("attention_partial on CUDA needs a workspace for this call");
  }
  if (args.dtype == ScalarType::kBFloat16) {
    sm90::launch_for<__nv_bfloat16>(args, workspace, stream);
  } else {
    sm90::launch_for<__half>(args, workspace, stream);
  }
}

}  // namespace cptool::cuda
