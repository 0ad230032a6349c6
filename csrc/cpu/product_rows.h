// Rows of a matrix in any type that is stored, widened for products of many rows, which pack them.
// Unnamed namespace: see isa.h.
#pragma once

#include "cpu/widening.h"

namespace cptool::cpu {
namespace {

inline int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }

// Points `rows` at elements [begin, begin + depth) of `count` rows of the matrix from `first` on,
// widened into `widened`, kStride elements from row to row, unless they are float32 as they lie.
// Rows that do not exist repeat the first.
template <int kRows, int64_t kStride>
void widened_rows(const StoredMatrix& w, int64_t first, int count, int64_t begin, int64_t depth,
                  float* widened, const float* (&rows)[kRows]) {
  const auto* const at = static_cast<const uint8_t*>(w.at);
  if (w.encoding == Encoding::kFloat32) {
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + (r < count ? r : 0);
      rows[r] = reinterpret_cast<const float*>(at + row * w.stride) + begin;
    }
    return;
  }
  for (int r = 0; r < kRows; ++r) rows[r] = widened + (r < count ? r : 0) * kStride;
  with_block(w.encoding, [&](auto block) {
    for (int r = 0; r < count; ++r) {
      const uint8_t* from =
          at + row_of(w, first + r) * w.stride + begin / block.kWeights * block.kBytes;
      float* to = widened + r * kStride;
      for (int64_t k = 0; k < depth; from += block.kBytes) {
        block.begin(from);
        for (int run = 0; run < block.kWeights / block.kRun; ++run) {
#pragma GCC unroll 8
          for (int part = 0; part < block.kRun / kPart; ++part, k += kPart, to += kPart) {
            Vector weights[kPartVectors];
            block.widen(run, part, weights);
            for (int v = 0; v < kPartVectors; ++v) store(weights[v], to + v * kLanes);
          }
        }
      }
    }
  });
}

}  // namespace
}  // namespace cptool::cpu
