// The portable kernels, compiled for AVX2 and FMA.
#include "cpu/few_rows_kernel.h"
#include "cpu/isa.h"
#include "cpu/merge_kernel.h"
#include "cpu/portable_kernel.h"
#include "cpu/tokenwise_kernel.h"

namespace cptool::cpu {
namespace {

bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool handles(ScalarType, int64_t) { return true; }

}  // namespace

extern constexpr Isa isa_avx2 = {"avx2",           supported, {handles, run_portable_kernel},
                                 run_merge_kernel, kFewRows,  kTokenwise};

}  // namespace cptool::cpu
