// Products of few rows with a matrix on the CPU: few_rows_kernel.h compiled for each instruction
// set.
#pragma once

#include "tokenwise.h"

namespace cptool::cpu {

// Results depend neither on `threads` nor on the other rows of a call.
void linear(const LinearArgs& args, int threads);

// The instruction set whose kernel `linear` runs for this type.
const char* linear_isa(ScalarType dtype);

struct FewRowsKernel {
  int64_t (*packed_row_bytes)(const LinearArgs& args);
  void (*pack)(const LinearArgs& args, void* packed);  // x, in the order that `columns` reads it
  void (*columns)(const LinearArgs& args, const void* packed, int64_t begin, int64_t end);
};

FewRowsKernel few_rows_portable();
FewRowsKernel few_rows_avx2();
FewRowsKernel few_rows_avx512();
FewRowsKernel few_rows_avx512bf16();  // bfloat16 alone

}  // namespace cptool::cpu
