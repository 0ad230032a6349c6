// The token-wise steps on the CPU: tokenwise_kernel.h compiled for each instruction set.
#pragma once

#include "tokenwise.h"

namespace cptool::cpu {

// Results do not depend on `threads`.
void rms_norm(const RmsNormArgs& args, int threads);
void rotate(const RotateArgs& args, int threads);
void swiglu(const SwigluArgs& args, int threads);

// Each function does [begin, end) of the rows or tokens.
struct TokenwiseKernels {
  void (*rms_norm)(const RmsNormArgs& args, int64_t begin, int64_t end);
  void (*rotate)(const RotateArgs& args, int64_t begin, int64_t end);
  void (*swiglu)(const SwigluArgs& args, int64_t begin, int64_t end);
};

TokenwiseKernels tokenwise_portable();
TokenwiseKernels tokenwise_avx2();
TokenwiseKernels tokenwise_avx512();

}  // namespace cptool::cpu
