// Which queries a thread block works on and which keys they see, found on the device from the
// offsets and positions, so that a launch does not wait for the device. Host and device.
//
// A block holds up to `block_rows` packed rows of one KV head of one sequence: the sequence's query
// tokens times the G = q_heads / kv_heads query heads that share the KV head, token-major.
//
// How many blocks the sequences before b need is a sum over them. Sequence b starts instead at
//
//     start(b) = floor(cu_q[b] G / block_rows) + b,
//
// counted in blocks, which leaves it at least the ceil(tokens G / block_rows) that it needs, for
// floor(x + y) >= floor(x) + floor(y) and floor(y) + 1 >= ceil(y).
#pragma once

#include <cstdint>

#include "attention.h"
#include "softmax_state.h"

namespace cptool::cuda {
namespace {

// Offset b, clamped to the tensor whatever its value.
CPTOOL_HOST_DEVICE inline int64_t offset_at(const int32_t* offsets, int64_t b, int64_t tokens) {
  const int64_t offset = offsets[b];
  return offset < 0 ? 0 : offset > tokens ? tokens : offset;
}

struct QueryBlock {
  int64_t sequence;
  int64_t first_token;  // of the sequence, in q
  int64_t first_row;    // of the block, among the packed rows of the sequence
  int64_t rows;         // 0 or less: there is nothing to do
};

inline int64_t query_block_count(const AttentionArgs& args, int64_t block_rows) {
  return args.q_tokens * (args.q_heads / args.kv_heads) / block_rows + args.batch;
}

// Index: an integer that counts all packed rows and all blocks.
template <class Index = int64_t>
CPTOOL_HOST_DEVICE inline QueryBlock query_block(const AttentionArgs& args, int64_t block_rows,
                                                 int64_t block) {
  const Index group = static_cast<Index>(args.q_heads) / static_cast<Index>(args.kv_heads);
  const auto start = [&](Index b) {
    const Index token = static_cast<Index>(offset_at(args.cu_q, b, args.q_tokens));
    return token * group / static_cast<Index>(block_rows) + b;
  };
  Index sequence = 0;  // the last one that starts at or before the block
  Index end = static_cast<Index>(args.batch);
  while (end - sequence > 1) {
    const Index middle = sequence + (end - sequence) / 2;
    if (start(middle) <= block) {
      sequence = middle;
    } else {
      end = middle;
    }
  }
  QueryBlock found;
  found.sequence = sequence;
  found.first_token = offset_at(args.cu_q, sequence, args.q_tokens);
  found.first_row = (block - start(sequence)) * block_rows;
  const int64_t tokens = offset_at(args.cu_q, sequence + 1, args.q_tokens) - found.first_token;
  const int64_t rows = tokens * group - found.first_row;
  // Offsets that do not ascend can put the block before the sequence.
  found.rows = found.first_row < 0 ? 0 : rows < block_rows ? rows : block_rows;
  return found;
}

// Returns how many of `keys` ascending positions are at or before `position`.
template <class Index = int64_t, class Position>
CPTOOL_HOST_DEVICE inline Index visible_keys(const int32_t* k_pos, Index keys, Position position) {
  Index low = 0;
  while (low < keys) {
    const Index middle = low + (keys - low) / 2;
    if (k_pos[middle] <= position) {
      low = middle + 1;
    } else {
      keys = middle;
    }
  }
  return low;
}

}  // namespace
}  // namespace cptool::cuda
