// The token-wise steps of a Llama forward, each in one pass over memory; the contract is
// csrc/tokenwise.h. All are bound by memory bandwidth in a prefill and by launches in a decode
// step, where one kernel replaces three to eight.
#include <cmath>

#include "cuda/device.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace cptool::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// kCount elements that are read or written together. kAligned: at a multiple of their size.
template <class T, int kCount, bool kAligned>
struct alignas(kAligned ? (kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) : alignof(T)) Pack {
  T element[kCount];
};

template <class T, int kCount, bool kAligned>
__device__ Pack<T, kCount, kAligned> load_pack(const void* from, int64_t index) {
  using Packed = Pack<T, kCount, kAligned>;
  return *reinterpret_cast<const Packed*>(static_cast<const T*>(from) + index);
}

template <class T, int kCount, bool kAligned>
__device__ void store_pack(void* to, int64_t index, const Pack<T, kCount, kAligned>& pack) {
  *reinterpret_cast<Pack<T, kCount, kAligned>*>(static_cast<T*>(to) + index) = pack;
}

template <class T>
__device__ float rounded(float value) {
  return to_float(from_float<T>(value));
}

// One block per row. A thread keeps the elements of its first kKept packs between the two passes
// and reads those of wider rows again.
constexpr int kColumns = 8;
constexpr int kKept = 8;

// Adds `added`, if there is one, to eight elements of the row `hidden`, adds their squares to
// *squares, and returns them.
template <class T, bool kAligned>
__device__ Pack<T, kColumns, kAligned> add_pack(const RmsNormArgs& args, T* hidden, int64_t row,
                                                int pack, float* squares) {
  const int64_t column = int64_t{pack} * kColumns;
  auto values = load_pack<T, kColumns, kAligned>(hidden, column);
  if (args.added != nullptr) {
    const auto added = load_pack<T, kColumns, kAligned>(args.added, row * args.width + column);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      values.element[c] = from_float<T>(to_float(values.element[c]) + to_float(added.element[c]));
    }
    store_pack(hidden, column, values);
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const float value = to_float(values.element[c]);
    *squares += value * value;
  }
  return values;
}

template <class T, bool kAligned>
__device__ void norm_pack(const RmsNormArgs& args, Pack<T, kColumns, kAligned> values, float scale,
                          T* out, int pack) {
  const int64_t column = int64_t{pack} * kColumns;
  const auto weight = load_pack<T, kColumns, kAligned>(args.weight, column);
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    values.element[c] = from_float<T>(rounded<T>(to_float(values.element[c]) * scale) *
                                      to_float(weight.element[c]));
  }
  store_pack(out, column, values);
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(const __grid_constant__ RmsNormArgs args) {
  using Packed = Pack<T, kColumns, kAligned>;
  const int64_t row = blockIdx.x;
  const int packs = static_cast<int>(args.width / kColumns);
  const int thread = static_cast<int>(threadIdx.x);
  T* hidden = static_cast<T*>(args.hidden) + row * args.hidden_stride;

  Packed kept[kKept];
  float squares = 0.0f;
#pragma unroll
  for (int slot = 0; slot < kKept; ++slot) {
    const int pack = thread + slot * kThreads;
    if (pack < packs) kept[slot] = add_pack<T, kAligned>(args, hidden, row, pack, &squares);
  }
  for (int pack = thread + kKept * kThreads; pack < packs; pack += kThreads) {
    add_pack<T, kAligned>(args, hidden, row, pack, &squares);
  }
  if (args.out == nullptr) return;

  // Sums over the block in a fixed order.
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    squares += __shfl_xor_sync(0xffffffffu, squares, lanes);
  }
  float* sums = reinterpret_cast<float*>(dynamic_shared());
  if (thread % kWarp == 0) sums[thread / kWarp] = squares;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) total += sums[warp];
  const float scale = 1.0f / sqrtf(total / static_cast<float>(args.width) + args.eps);

  T* out = static_cast<T*>(args.out) + row * args.width;
#pragma unroll
  for (int slot = 0; slot < kKept; ++slot) {
    const int pack = thread + slot * kThreads;
    if (pack < packs) norm_pack<T, kAligned>(args, kept[slot], scale, out, pack);
  }
  for (int pack = thread + kKept * kThreads; pack < packs; pack += kThreads) {
    norm_pack<T, kAligned>(args, load_pack<T, kColumns, kAligned>(hidden, int64_t{pack} * kColumns),
                           scale, out, pack);
  }
}

// A thread rotates kPairs pairs of a head.
constexpr int kPairs = 4;

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads) rotate_kernel(const __grid_constant__ RotateArgs args) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t half = args.head_dim / 2, pieces = half / kPairs;
  const int64_t pair = index % pieces * kPairs, head = index / pieces % args.num_heads;
  const int64_t token = index / pieces / args.num_heads;
  if (token >= args.tokens) return;
  T* first = static_cast<T*>(args.heads) + token * args.token_stride + head * args.head_stride;
  auto a = load_pack<T, kPairs, kAligned>(first, pair);
  auto b = load_pack<T, kPairs, kAligned>(first, half + pair);
  const auto cos = load_pack<float, kPairs, kAligned>(args.cos, token * half + pair);
  const auto sin = load_pack<float, kPairs, kAligned>(args.sin, token * half + pair);
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const float x = to_float(a.element[i]), y = to_float(b.element[i]);
    a.element[i] = from_float<T>(x * cos.element[i] - y * sin.element[i]);
    b.element[i] = from_float<T>(y * cos.element[i] + x * sin.element[i]);
  }
  store_pack(first, pair, a);
  store_pack(first, half + pair, b);
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads) swiglu_kernel(const __grid_constant__ SwigluArgs args) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t packs = args.width / kColumns;
  const int64_t row = index / packs, column = index % packs * kColumns;
  if (row >= args.rows) return;
  auto gate = load_pack<T, kColumns, kAligned>(args.gate, row * args.gate_stride + column);
  const auto up = load_pack<T, kColumns, kAligned>(args.up, row * args.up_stride + column);
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const float g = to_float(gate.element[c]);
    gate.element[c] = from_float<T>(rounded<T>(g / (1.0f + expf(-g))) * to_float(up.element[c]));
  }
  store_pack(args.gate, row * args.gate_stride + column, gate);
}

// Returns whether rows that begin `stride` elements apart all begin at multiples of `bytes`.
bool aligned_rows(const void* base, int64_t stride, ScalarType dtype, int64_t bytes) {
  const int64_t size = dtype == ScalarType::kFloat32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(base) % bytes == 0 && stride * size % bytes == 0;
}

unsigned blocks_for(const char* what, int64_t threads) {
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  if (blocks > INT32_MAX) {
    throw std::invalid_argument(std::string(what) + " on CUDA would need " +
                                std::to_string(blocks) + " thread blocks; the limit is 2147483647");
  }
  return static_cast<unsigned>(blocks);
}

void check_multiple(const char* what, const char* name, int64_t value) {
  if (value % 8 != 0) {
    throw std::invalid_argument(std::string(what) + " on CUDA takes a " + name +
                                " that is a multiple of 8; it is " + std::to_string(value));
  }
}

template <class Args>
using Kernel = void (*)(Args);

template <class Args>
void launch_by_dtype(const char* what, ScalarType dtype, Kernel<Args> float32,
                     Kernel<Args> bfloat16, Kernel<Args> float16, unsigned blocks, size_t shared,
                     uintptr_t stream, const Args& args) {
  Kernel<Args> kernel = float32;
  if (dtype == ScalarType::kBFloat16) kernel = bfloat16;
  if (dtype == ScalarType::kFloat16) kernel = float16;
  launch(what, kernel, blocks, kThreads, shared, reinterpret_cast<cudaStream_t>(stream), args);
}

template <bool kAligned>
void launch_rms_norm(const RmsNormArgs& args, uintptr_t stream) {
  launch_by_dtype<RmsNormArgs>(
      "rms_norm", args.dtype, rms_norm_kernel<float, kAligned>,
      rms_norm_kernel<__nv_bfloat16, kAligned>, rms_norm_kernel<__half, kAligned>,
      blocks_for("rms_norm", args.rows * kThreads), kWarps * sizeof(float), stream, args);
}

template <bool kAligned>
void launch_rotate(const RotateArgs& args, uintptr_t stream) {
  const int64_t threads = args.tokens * args.num_heads * (args.head_dim / 2 / kPairs);
  launch_by_dtype<RotateArgs>(
      "rotate", args.dtype, rotate_kernel<float, kAligned>, rotate_kernel<__nv_bfloat16, kAligned>,
      rotate_kernel<__half, kAligned>, blocks_for("rotate", threads), 0, stream, args);
}

template <bool kAligned>
void launch_swiglu(const SwigluArgs& args, uintptr_t stream) {
  launch_by_dtype<SwigluArgs>(
      "swiglu", args.dtype, swiglu_kernel<float, kAligned>, swiglu_kernel<__nv_bfloat16, kAligned>,
      swiglu_kernel<__half, kAligned>, blocks_for("swiglu", args.rows * (args.width / kColumns)), 0,
      stream, args);
}

}  // namespace

void rms_norm(const RmsNormArgs& args, uintptr_t stream) {
  check_multiple("rms_norm", "width", args.width);
  if (args.rows == 0 || args.width == 0) return;
  const bool aligned = aligned_rows(args.hidden, args.hidden_stride, args.dtype, 16) &&
                       aligned_rows(args.added, args.width, args.dtype, 16) &&
                       aligned_rows(args.weight, 0, args.dtype, 16) &&
                       aligned_rows(args.out, args.width, args.dtype, 16);
  aligned ? launch_rms_norm<true>(args, stream) : launch_rms_norm<false>(args, stream);
}

void rotate(const RotateArgs& args, uintptr_t stream) {
  check_multiple("rotate", "head dimension", args.head_dim);
  if (args.tokens == 0 || args.num_heads == 0 || args.head_dim == 0) return;
  const bool aligned = aligned_rows(args.heads, args.token_stride, args.dtype, 16) &&
                       aligned_rows(args.heads, args.head_stride, args.dtype, 16) &&
                       aligned_rows(args.heads, args.head_dim / 2, args.dtype, 8) &&
                       aligned_rows(args.cos, args.head_dim / 2, ScalarType::kFloat32, 16) &&
                       aligned_rows(args.sin, args.head_dim / 2, ScalarType::kFloat32, 16);
  aligned ? launch_rotate<true>(args, stream) : launch_rotate<false>(args, stream);
}

void swiglu(const SwigluArgs& args, uintptr_t stream) {
  check_multiple("swiglu", "width", args.width);
  if (args.rows == 0 || args.width == 0) return;
  const bool aligned = aligned_rows(args.gate, args.gate_stride, args.dtype, 16) &&
                       aligned_rows(args.up, args.up_stride, args.dtype, 16);
  aligned ? launch_swiglu<true>(args, stream) : launch_swiglu<false>(args, stream);
}

}  // namespace cptool::cuda
