// Every PTX instruction that the kernels for compute capability 8.0 and above use, one wrapper
// each, with the section of the PTX ISA manual (9.0) that defines it.
// tests/cuda_emulation/cuda/ptx.h has the same wrappers for the CPU.
//
// A shared address is a 32-bit address of the shared state space (shared_address()).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace cptool::cuda::ptx {
namespace {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// cp.async (9.7.9.25.3.1): copies 16 bytes from global to shared memory asynchronously, bypassing
// L1. With `held` false it reads nothing and writes zeros. Both addresses are multiples of 16.
__device__ __forceinline__ void cp_async_16(uint32_t to, const void* from, bool held) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(held ? 16 : 0)
               : "memory");
}

// cp.async.commit_group (9.7.9.25.3.2): makes a group of the thread's copies since the last group.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// cp.async.wait_group (9.7.9.25.3.3): waits until at most `kPending` of the thread's newest groups
// are in flight. Other threads see what was copied only after a barrier.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ldmatrix (9.7.14.5.15), x4: four 8 x 8 matrices of 16-bit elements. Lane i gives the address of
// row i % 8 of matrix i / 8, 16 bytes on a multiple of 16. Of matrix j it receives in to[j]
// elements 2 (i % 4) and 2 (i % 4) + 1 of row i / 4.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

// The same with each matrix transposed: lane i receives in to[j] elements i / 4 of rows 2 (i % 4)
// and 2 (i % 4) + 1.
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

// mma.m16n8k16 (9.7.14.5.8): d += a b, a [16, 16] and b [16, 8] of T, d [16, 8] float32. With
// g = lane / 4 and t = lane % 4, each register holding two elements, the lower column (of b: row)
// in the lower half:
//   a[0]: row g,     columns 2 t, 2 t + 1    a[2]: row g,     columns 2 t + 8, 2 t + 9
//   a[1]: row g + 8, columns 2 t, 2 t + 1    a[3]: row g + 8, columns 2 t + 8, 2 t + 9
//   b0: rows 2 t, 2 t + 1 of column g        b1: rows 2 t + 8, 2 t + 9 of column g
//   d[0], d[1]: row g, columns 2 t, 2 t + 1  d[2], d[3]: row g + 8, the same columns
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(std::is_same_v<T, __half>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// cvt.rn.{bf16x2,f16x2}.f32 (9.7.9.21): two floats, each rounded to nearest even, as one register.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t both;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  } else {
    static_assert(std::is_same_v<T, __half>);
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  }
  return both;
}

// ex2.approx.ftz.f32 (9.7.3.21): 2^x within 2 units in the last place; 0 for -inf.
__device__ __forceinline__ float exp2_approx(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// rcp.approx.ftz.f32 (9.7.3, rcp): 1 / x within 1 unit in the last place.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(x));
  return reciprocal;
}

}  // namespace
}  // namespace cptool::cuda::ptx
