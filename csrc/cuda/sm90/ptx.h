// Every PTX instruction of compute capability 9.0a that the attention kernel uses, one wrapper
// each, with the section of the PTX ISA manual that defines it.
// tests/cuda_emulation/cuda/sm90/ptx.h has the same wrappers for the CPU.
//
// A shared address is a 32-bit address of the shared state space. A block without a cluster is a
// cluster of its own, so its addresses are those of shared::cluster as well.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/ptx.h"
#include "cuda/sm90/tensor_map.h"

namespace cptool::cuda::ptx {
namespace {

// mbarrier.init (9.7.13.15.9): a barrier, each phase of which waits for `arrivals` arrivals and for
// the bytes that they announce. A phase has parity 0 or 1, the first one 0.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// fence.mbarrier_init and fence.proxy.async (9.7.13.4): after these and a barrier of the block,
// TMA, which uses the async proxy, sees the barriers that this thread has initialised.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// fence.proxy.async (9.7.13.4): makes this thread's writes to shared memory visible to wgmma.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// mbarrier.arrive (9.7.13.15.13), release: threads that wait see what this thread did before.
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// The same, after raising the bytes that the phase waits for.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// mbarrier.try_wait.parity (9.7.13.15.16), acquire: waits until the phase of this parity is over.
// The instruction may return early, hence the loop. The phase before the first counts as over, with
// parity 1. With CPTOOL_WATCHDOG, a wait of about two seconds, which no kernel here has unless
// an arrival was lost, is an error of the launch instead of a device that hangs. It prints nothing,
// which would be a call among products; even so the assembler spills and serializes products in
// such a build, so that a hang may vanish (docs/gpu.md).
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t over;
#if defined(CPTOOL_WATCHDOG)
  const long long began = clock64();
#endif
  do {
    asm volatile(
        "{\n"
        ".reg .pred over;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
        "selp.u32 %0, 1, 0, over;\n"
        "}"
        : "=r"(over)
        : "r"(barrier), "r"(parity)
        : "memory");
#if defined(CPTOOL_WATCHDOG)
    if (!over && clock64() - began > (1ll << 32)) __trap();
#endif
  } while (!over);
}

// bar.sync and bar.arrive (9.7.13.1) of `threads` threads, whole warps.
__device__ __forceinline__ void barrier_sync(uint32_t id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t id, uint32_t threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// setmaxnreg (9.7.19.5): all warps of a warpgroup return registers to the block's pool, or wait for
// more from it. Multiples of 8 from 24 to 256.
template <int kRegisters>
__device__ __forceinline__ void registers_shrink() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void registers_grow() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// prefetch.tensormap (9.7.9.15).
__device__ __forceinline__ void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// createpolicy (9.7.9.18): how L2 treats what a load brings: as the first or the last to go.
__device__ __forceinline__ uint64_t evict_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ uint64_t evict_last() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// cp.async.bulk.tensor (9.7.9.25.5.2), three dimensions: the box of `map` at column `x`, head `y`
// and token `z`, elements outside the tensor as zeros, to shared memory at a multiple of 128. Its
// bytes count towards the barrier's phase.
__device__ __forceinline__ void load_box(uint32_t to, const TensorMap& map, int32_t x, int32_t y,
                                         int32_t z, uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
      "l"(&map), "r"(x), "r"(y), "r"(z), "r"(barrier), "l"(policy)
      : "memory");
}

// wgmma.fence (9.7.15.7.1): orders a warpgroup's accesses to registers before its next products,
// which use accumulators and fragments in registers.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// wgmma.commit_group (9.7.15.7.2): makes a group of the products since the last group.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// wgmma.wait_group (9.7.15.7.3): waits until at most `kPending` of the newest groups are in flight.
// Until then their accumulators and fragments must not be accessed, nor the shared memory written
// that they read.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of registers that an asynchronous product writes or reads
// across a wait: it assumes that they are written when the product is issued.
template <int kCount>
__device__ __forceinline__ void keep_in_place(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void keep_in_place(uint32_t (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// wgmma.mma_async (9.7.15.5.2), m64nNk16 with float32 accumulators: d = a b, plus d with
// `accumulate`. b is [16, N] in shared memory, given by its descriptor (descriptors.h). Thread i of
// the warpgroup, in warp w = i / 32, with g = i % 32 / 4 and t = i % 4, holds
//   d[4 j + e]:      row 16 w + g,     columns 8 j + 2 t + e, for e = 0, 1
//   d[4 j + 2 + e]:  row 16 w + g + 8, the same columns
// and of an `a` in registers, [64, 16], two elements each, the lower column in the lower half:
//   a[0]: row 16 w + g,      columns 2 t, 2 t + 1
//   a[1]: row 16 w + g + 8,  the same columns
//   a[2]: row 16 w + g,      columns 2 t + 8, 2 t + 9
//   a[3]: row 16 w + g + 8,  those
#define CPTOOL_D8(i)                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define CPTOOL_D32(i) CPTOOL_D8(i), CPTOOL_D8(i + 8), CPTOOL_D8(i + 16), CPTOOL_D8(i + 24)
#define CPTOOL_OPERANDS_0_31                                                    \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, " \
  "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define CPTOOL_OPERANDS_32_63                                                        \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// The same with a in shared memory too; a and b K-major (neither transposed).
#define CPTOOL_WGMMA_SHARED(TYPE)                                                            \
  asm volatile(                                                                              \
      "{\n"                                                                                  \
      ".reg .pred accumulate;\n"                                                             \
      "setp.ne.b32 accumulate, %66, 0;\n"                                                    \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" CPTOOL_OPERANDS_0_31 \
      ", " CPTOOL_OPERANDS_32_63                                                             \
      "}, %64, %65, accumulate, 1, 1, 0, 0;\n"                                               \
      "}"                                                                                    \
      : CPTOOL_D32(0), CPTOOL_D32(32)                                                        \
      : "l"(a), "l"(b), "r"(static_cast<int32_t>(accumulate)))

template <class T>
__device__ __forceinline__ void wgmma_shared(float (&d)[64], uint64_t a, uint64_t b,
                                             bool accumulate) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    CPTOOL_WGMMA_SHARED("bf16");
  } else {
    static_assert(std::is_same_v<T, __half>);
    CPTOOL_WGMMA_SHARED("f16");
  }
}

// The same with a in registers, b K-major.
#define CPTOOL_WGMMA_REGISTERS_ROWS(TYPE)                                                    \
  asm volatile(                                                                              \
      "{\n"                                                                                  \
      ".reg .pred accumulate;\n"                                                             \
      "setp.ne.b32 accumulate, %69, 0;\n"                                                    \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" CPTOOL_OPERANDS_0_31 \
      ", " CPTOOL_OPERANDS_32_63                                                             \
      "}, {%64, %65, %66, %67}, %68, accumulate, 1, 1, 0;\n"                                 \
      "}"                                                                                    \
      : CPTOOL_D32(0), CPTOOL_D32(32)                                                        \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int32_t>(accumulate)))

template <class T>
__device__ __forceinline__ void wgmma_registers_rows(float (&d)[64], const uint32_t* a, uint64_t b,
                                                     bool accumulate) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    CPTOOL_WGMMA_REGISTERS_ROWS("bf16");
  } else {
    static_assert(std::is_same_v<T, __half>);
    CPTOOL_WGMMA_REGISTERS_ROWS("f16");
  }
}

// The same with a in registers, b N-major (transposed), and always d += a b; N is 128 or 64.
#define CPTOOL_WGMMA_REGISTERS_128(TYPE)                                    \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE \
               " {" CPTOOL_OPERANDS_0_31 ", " CPTOOL_OPERANDS_32_63         \
               "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"                \
               : CPTOOL_D32(0), CPTOOL_D32(32)                              \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define CPTOOL_WGMMA_REGISTERS_64(TYPE)                                                \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE             \
               " {" CPTOOL_OPERANDS_0_31 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n" \
               : CPTOOL_D32(0)                                                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

template <class T>
__device__ __forceinline__ void wgmma_registers(float (&d)[64], const uint32_t* a, uint64_t b) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    CPTOOL_WGMMA_REGISTERS_128("bf16");
  } else {
    static_assert(std::is_same_v<T, __half>);
    CPTOOL_WGMMA_REGISTERS_128("f16");
  }
}

template <class T>
__device__ __forceinline__ void wgmma_registers(float (&d)[32], const uint32_t* a, uint64_t b) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    CPTOOL_WGMMA_REGISTERS_64("bf16");
  } else {
    static_assert(std::is_same_v<T, __half>);
    CPTOOL_WGMMA_REGISTERS_64("f16");
  }
}

#undef CPTOOL_D8
#undef CPTOOL_D32
#undef CPTOOL_OPERANDS_0_31
#undef CPTOOL_OPERANDS_32_63
#undef CPTOOL_WGMMA_SHARED
#undef CPTOOL_WGMMA_REGISTERS_ROWS
#undef CPTOOL_WGMMA_REGISTERS_128
#undef CPTOOL_WGMMA_REGISTERS_64

}  // namespace
}  // namespace cptool::cuda::ptx
