// Whether the processor has what the AVX-512 files are compiled for (CMakeLists.txt).
#pragma once

namespace cptool::cpu {
namespace {

inline bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

inline bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Whether dot products of bfloat16 pairs multiply faster than float32 multiply-adds. Processors of
// AMD start one of 64 FLOPs per cycle where they start 32 of float32; those of Intel start one in
// two cycles where they start 128 (measured on an Emerald Rapids: 86 against 176 GFLOP/s per core).
inline bool has_fast_bfloat16_dots() { return !__builtin_cpu_is("intel"); }

}  // namespace
}  // namespace cptool::cpu
