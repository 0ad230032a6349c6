// Which memory of a call the emulation watches for races: all that its kernels write.
#pragma once

#include "attention.h"
#include "races.h"

namespace emulation {

inline void watch(const void* begin, int64_t bytes) {
  const uint8_t* const first = static_cast<const uint8_t*>(begin);
  if (bytes > 0) watched.push_back({first, first + bytes});
}

inline int64_t element_bytes(cptool::ScalarType dtype) {
  return dtype == cptool::ScalarType::kFloat32 ? 4 : 2;
}

inline void watch_results(const cptool::AttentionArgs& args, const void* workspace, int64_t bytes) {
  const int64_t rows = args.q_tokens * args.q_heads;
  watched.clear();
  watch(args.out, rows * args.head_dim * element_bytes(args.out_dtype));
  watch(args.lse, 4 * rows);
  watch(workspace, bytes);
}

inline void watch_results(const cptool::MergeArgs& args) {
  watched.clear();
  watch(args.out, args.rows * args.head_dim * element_bytes(args.out_dtype));
  watch(args.lse, 4 * args.rows);
}

}  // namespace emulation
