// Which kernels of the token-wise steps run, and on how many threads.
#include <algorithm>
#include <atomic>

#include "cpu/dispatch.h"
#include "cpu/scalar.h"
#include "cpu/thread_pool.h"
#include "cpu/tokenwise_dispatch.h"

namespace cptool::cpu {
namespace {

// Bytes read and written that repay waking a thread: about 20 microseconds of them.
constexpr int64_t kThreadBytes = 1 << 19;
constexpr int64_t kPieceBytes = 1 << 16;

TokenwiseKernels kernels() {
#if defined(CPTOOL_HAS_AVX512)
  if (allows_isa("avx512")) return tokenwise_avx512();
#endif
#if defined(CPTOOL_HAS_AVX2)
  if (allows_isa("avx2")) return tokenwise_avx2();
#endif
  return tokenwise_portable();
}

int64_t size_of(ScalarType dtype) { return dtype == ScalarType::kFloat32 ? 4 : 2; }

// Calls run(begin, end) for pieces of [0, count), each of which costs `bytes` a unit.
template <class Run>
void in_pieces(int64_t count, int64_t bytes, int threads, const Run& run) {
  const int64_t useful = std::min<int64_t>(threads, 1 + count * bytes / kThreadBytes);
  if (useful <= 1) return run(0, count);
  const int64_t piece = std::max<int64_t>(1, kPieceBytes / std::max<int64_t>(bytes, 1));
  std::atomic<int64_t> next{0};
  auto body = [&] {
    for (;;) {
      const int64_t begin = next.fetch_add(piece, std::memory_order_relaxed);
      if (begin >= count) return;
      run(begin, std::min(begin + piece, count));
    }
  };
  run_parallel(
      static_cast<int>(useful), [](void* self, int) { (*static_cast<decltype(body)*>(self))(); },
      &body);
}

template <class T>
void to_floats(const LinearArgs& args, float* to) {
  for (int64_t row = 0; row < args.rows; ++row) {
    const T* from = static_cast<const T*>(args.x) + row * args.x_stride;
#pragma omp simd
    for (int64_t k = 0; k < args.depth; ++k) to[row * args.depth + k] = to_float(from[k]);
  }
}

}  // namespace

void linear(const LinearArgs& args, int threads) {
  // The caller's scratch, read by all threads until the call has ended.
  const size_t bytes = static_cast<size_t>(args.rows * args.depth) * sizeof(float);
  float* x = static_cast<float*>(thread_scratch(std::max<size_t>(bytes, 1)));
  switch (args.dtype) {
    case ScalarType::kBFloat16:
      to_floats<BFloat16>(args, x);
      break;
    case ScalarType::kFloat16:
      to_floats<Float16>(args, x);
      break;
    default:
      to_floats<float>(args, x);
  }
  const TokenwiseKernels chosen = kernels();
  in_pieces(args.columns, args.depth * size_of(args.dtype), threads,
            [&](int64_t begin, int64_t end) { chosen.linear(args, x, begin, end); });
}

void rms_norm(const RmsNormArgs& args, int threads) {
  const TokenwiseKernels chosen = kernels();
  in_pieces(args.rows, 3 * args.width * size_of(args.dtype), threads,
            [&](int64_t begin, int64_t end) { chosen.rms_norm(args, begin, end); });
}

void rotate(const RotateArgs& args, int threads) {
  const TokenwiseKernels chosen = kernels();
  in_pieces(args.tokens, 2 * args.num_heads * args.head_dim * size_of(args.dtype), threads,
            [&](int64_t begin, int64_t end) { chosen.rotate(args, begin, end); });
}

void swiglu(const SwigluArgs& args, int threads) {
  const TokenwiseKernels chosen = kernels();
  in_pieces(args.rows, 3 * args.width * size_of(args.dtype), threads,
            [&](int64_t begin, int64_t end) { chosen.swiglu(args, begin, end); });
}

}  // namespace cptool::cpu
