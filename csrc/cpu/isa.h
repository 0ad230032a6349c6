// What an instruction set offers: the kernels that are compiled for it.
//
// Each instruction set is one translation unit, NAME.cpp, with one line in CMakeLists.txt that
// gives its name and compiler flags. It defines `isa_NAME` and keeps everything else in an unnamed
// namespace. It must not instantiate anything of the standard library that is not inlined
// (containers, algorithms, std::function): the linker keeps one copy of such a function for the
// whole extension, and that copy may hold instructions that the machine lacks.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention.h"
#include "stored.h"
#include "tokenwise.h"

namespace cptool::cpu {

struct AttentionKernel {
  // q_dtype: of q; dtype: of k and v. head_dim: even, at most 256.
  bool (*handles)(ScalarType q_dtype, ScalarType dtype, int64_t head_dim) = nullptr;
  // Results do not depend on `threads`.
  void (*attention_partial)(const AttentionArgs& args, int threads) = nullptr;
  // Up to how many query rows per KV head it reads keys and values in place instead of packing them
  // first. Null: it has one way to read them.
  int (*stream_rows)(ScalarType q_dtype, ScalarType dtype) = nullptr;
  // SiLU attention of what it handles. Null: a lower set's runs.
  void (*silu_partial)(const AttentionArgs& args, int threads) = nullptr;
};

// Products of few rows x with the rows of a matrix w. A result depends on its own row of x and of w
// alone, not on which rows or columns are computed with it.
struct FewRowsKernel {
  bool (*handles)(ScalarType dtype) = nullptr;
  int64_t (*packed_row_bytes)(const LinearArgs& args) = nullptr;
  // Writes x in the order in which `columns` reads it.
  void (*pack)(const LinearArgs& args, void* packed) = nullptr;
  // Computes the columns [begin, end) of all rows.
  void (*columns)(const LinearArgs& args, const void* packed, int64_t begin, int64_t end) = nullptr;
};

// Weights in the type in which they are stored.
struct StoredKernels {
  // Whether its products of few rows are the fastest way; if not, a lower set's are used.
  bool (*handles)(Encoding encoding) = nullptr;
  // Up to how many rows it is the fastest way to widen weights in registers. A result of these has
  // the same bits for any number of rows: those of the few-row product with the widened weights,
  // if more than these go to it.
  int (*most_rows)(Encoding encoding) = nullptr;
  int64_t (*packed_bytes)(const StoredLinearArgs& args) = nullptr;
  // Writes x in the order in which `columns` reads it.
  void (*pack)(const StoredLinearArgs& args, void* packed) = nullptr;
  // Computes the columns that the rows [begin, end) of the file make.
  void (*columns)(const StoredLinearArgs& args, const void* packed, int64_t begin,
                  int64_t end) = nullptr;
  // Computes [begin, end) of the rows that are wanted.
  void (*widen)(const WidenArgs& args, int64_t begin, int64_t end) = nullptr;
};

struct ProductPiece {
  int64_t row, rows, column, columns;
};

// Products of many rows with a matrix that is packed first.
struct ProductKernel {
  size_t scratch_bytes = 0;
  // Of a piece: the most rows and columns that it may have; what its rows are a multiple of, unless
  // they are the last; and the fewest of both for which packing them pays.
  int64_t most_rows = 0, most_columns = 0, row_grain = 1, least_rows = 1, least_columns = 1;
  void (*compute)(const StoredLinearArgs& args, const ProductPiece& piece, void* scratch) = nullptr;
};

// Each function computes [begin, end) of the rows or tokens.
struct TokenwiseKernels {
  void (*rms_norm)(const RmsNormArgs& args, int64_t begin, int64_t end) = nullptr;
  void (*rotate)(const RotateArgs& args, int64_t begin, int64_t end) = nullptr;
  void (*swiglu)(const SwigluArgs& args, int64_t begin, int64_t end) = nullptr;
};

// A null member means that the instruction set has no kernel of its own for that work: the fastest
// lower one that has one runs instead.
struct Isa {
  const char* name;
  bool (*supported)();  // by this processor and operating system
  AttentionKernel attention = {};
  void (*merge_partials)(const MergeArgs& args, int threads) = nullptr;
  FewRowsKernel few_rows = {};
  TokenwiseKernels tokenwise = {};
  StoredKernels stored = {};
  ProductKernel product = {};
  // Whether its kernels are faster on this processor than those of lower sets; null: they are. If
  // not, they run only where it is asked for by name.
  bool (*preferred)() = nullptr;
};

}  // namespace cptool::cpu
