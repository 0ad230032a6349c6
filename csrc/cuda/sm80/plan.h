// Which shape of the kernel runs a call, and in how many pieces. Host only. Depends on shapes and
// the device, never on the content of device memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention.h"
#include "cuda/dispatch.h"
#include "cuda/splits.h"

namespace cptool::cuda::sm80 {

constexpr int kKeys = 64;  // per tile

// Blocks of one tile of rows, whose warps divide the keys of every tile: for decoding.
struct FewRows {
  static constexpr int kRowTiles = 1, kRowWarps = 1, kKeyWarps = 4, kStages = 4, kResident = 3;
};
// Blocks whose warps each hold 32 rows, so that a K or V fragment is used in two products.
struct ManyRows {
  static constexpr int kRowTiles = 2, kRowWarps = 4, kKeyWarps = 1, kStages = 3, kResident = 2;
};

template <class Shape>
constexpr int block_rows() {
  return 16 * Shape::kRowTiles * Shape::kRowWarps;
}

// The block's queries, the ring of tiles and where its rows' keys end; unless the call is plain
// also where they begin.
template <class Shape>
constexpr int shared_bytes(int head_dim, bool plain) {
  return 2 * head_dim * (block_rows<Shape>() + Shape::kStages * kKeys) +
         (plain ? 4 : 8) * block_rows<Shape>();
}

struct Plan {
  bool few_rows;
  int64_t blocks;    // of one piece
  int64_t resident;  // blocks that the device runs concurrently
  int pieces;

  // The call has few rows, or too few blocks of many rows to fill the device.
  bool few_queries() const { return few_rows || (pieces > 1 && 4 * blocks <= resident); }
};

// Returns how many of a sequence's keys a block of rows may see: with a window, those of as many
// successive positions as its tokens see together.
template <class Shape>
int64_t block_keys(const AttentionArgs& args, int64_t rows) {
  const int64_t keys = args.k_tokens / args.batch;
  if (args.window == 0) return keys;
  const int64_t group = args.q_heads / args.kv_heads;
  const int64_t tokens = ceil_divide(std::min<int64_t>(rows, block_rows<Shape>()), group);
  return std::min(keys, std::min(keys, args.window) + tokens - 1);
}

template <class Shape>
Plan plan_shape(const AttentionArgs& args, int64_t rows, const Device& device, bool few_rows) {
  // A multiprocessor reserves 1 KiB of shared memory per block.
  const int fit = device.shared_bytes /
                  (shared_bytes<Shape>(static_cast<int>(args.head_dim), is_plain(args)) + 1024);
  const int64_t resident =
      static_cast<int64_t>(device.multiprocessors) * std::max(1, std::min(fit, Shape::kResident));
  const int64_t blocks = args.batch * args.kv_heads * ceil_divide(rows, block_rows<Shape>());
  return {few_rows, blocks, resident,
          split_count(blocks, block_keys<Shape>(args, rows), 4 * kKeys, resident)};
}

// Assumes sequences of equal length: each has its share of the tokens of q and k.
inline Plan plan(const AttentionArgs& args, const Device& device) {
  const int64_t group = args.q_heads / args.kv_heads;
  const int64_t rows = ceil_divide(args.q_tokens, args.batch) * group;
  if (rows <= 2 * block_rows<FewRows>()) return plan_shape<FewRows>(args, rows, device, true);
  return plan_shape<ManyRows>(args, rows, device, false);
}

// The two shapes of kernel.h, plain and with a window or a soft cap, one translation unit each.
// `partials`: see there.
using Attention = void(const AttentionArgs& args, int pieces, float* partials, cudaStream_t stream);
Attention attention_few_rows, attention_many_rows;
Attention attention_few_rows_general, attention_many_rows_general;

}  // namespace cptool::cuda::sm80
