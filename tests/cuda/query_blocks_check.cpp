// Covers batches of every small shape with the blocks of csrc/cuda/query_blocks.h. Fails unless
// each packed row is in exactly one block, for any group and block size, and unless blocks stay
// within the tensors for invalid offsets.
#include <cstdio>
#include <random>
#include <vector>

#include "cuda/query_blocks.h"

using namespace cptool;
using namespace cptool::cuda;

namespace {

AttentionArgs batch_of(const std::vector<int32_t>& cu_q, int64_t tokens, int64_t group) {
  AttentionArgs args = {};
  args.cu_q = cu_q.data();
  args.batch = static_cast<int64_t>(cu_q.size()) - 1;
  args.q_tokens = tokens;
  args.q_heads = 3 * group;
  args.kv_heads = 3;
  return args;
}

bool covers(const std::vector<int32_t>& cu_q, int64_t group, int64_t block_rows) {
  const AttentionArgs args = batch_of(cu_q, cu_q.back(), group);
  std::vector<int> times(static_cast<size_t>(args.q_tokens * group));
  for (int64_t i = 0; i < query_block_count(args, block_rows); ++i) {
    const QueryBlock block = query_block(args, block_rows, i);
    for (int64_t row = block.first_row; row < block.first_row + block.rows; ++row) {
      const int64_t token = block.first_token + row / group;
      if (token >= cu_q[block.sequence + 1]) return false;
      ++times[token * group + row % group];
    }
  }
  for (int count : times) {
    if (count != 1) return false;
  }
  return true;
}

bool stays_within(const std::vector<int32_t>& cu_q, int64_t tokens, int64_t group,
                  int64_t block_rows) {
  const AttentionArgs args = batch_of(cu_q, tokens, group);
  for (int64_t i = 0; i < query_block_count(args, block_rows); ++i) {
    const QueryBlock block = query_block(args, block_rows, i);
    if (block.rows <= 0) continue;
    const int64_t last = block.first_token + (block.first_row + block.rows - 1) / group;
    if (block.rows > block_rows || block.first_row < 0 || block.first_token < 0 || last >= tokens ||
        block.sequence < 0 || block.sequence >= args.batch) {
      return false;
    }
  }
  return true;
}

bool counts_visible_keys(std::mt19937& random) {
  std::vector<int32_t> positions(random() % 20);
  int32_t position = 0;
  for (int32_t& p : positions) p = position += random() % 3;
  for (int32_t query = -1; query <= position + 1; ++query) {
    int64_t expected = 0;
    for (int32_t p : positions) expected += p <= query;
    const int64_t keys = static_cast<int64_t>(positions.size());
    if (visible_keys(positions.data(), keys, query) != expected) return false;
  }
  return visible_keys(nullptr, -5, 3) == 0;
}

}  // namespace

int main() {
  std::mt19937 random(1);
  for (int trial = 0; trial < 3000; ++trial) {
    const int64_t group = 1 + random() % 16;
    const int64_t block_rows = 1 << random() % 7;
    const size_t batch = 1 + random() % 6;
    std::vector<int32_t> lengths = {0}, nonsense;
    for (size_t b = 0; b < batch; ++b) {
      const int32_t length = random() % 3 == 0 ? 0 : random() % 40;
      lengths.push_back(lengths.back() + length);
    }
    for (size_t b = 0; b <= batch; ++b) {
      nonsense.push_back(static_cast<int32_t>(trial % 2 ? random() : random() % 80) - 20);
    }
    if (!covers(lengths, group, block_rows)) return std::puts("rows missed or repeated"), 1;
    if (!stays_within(nonsense, 1 + random() % 50, group, block_rows)) {
      return std::puts("a block outside the tensors"), 1;
    }
    if (!counts_visible_keys(random)) return std::puts("wrong count of visible keys"), 1;
  }
}
