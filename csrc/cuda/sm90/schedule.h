// The jobs of the sm_90a kernel, their order, and the order of their keys. Host and device.
//
// A job is a block of packed query rows (query_blocks.h) of one KV head and, where jobs would leave
// multiprocessors idle, one of several pieces of its keys (pieces.h). There are as many thread
// blocks as multiprocessors, and all take their jobs from one list. Blocks later in a sequence see
// more keys, or with a window as many, and therefore come first in the list.
#pragma once

#include <cstdint>

#include "cuda/query_blocks.h"
#include "cuda/splits.h"
#include "softmax_state.h"

namespace cptool::cuda::sm90 {
namespace {

constexpr int kKeys = 128;  // per tile

// The list: KV heads in groups that L2 serves together, for each group all query blocks from the
// last to the first, for each of them the pieces of its keys, for each of these the heads of the
// group.
struct JobList {
  int32_t blocks, kv_heads, heads_together;
  int32_t pieces = 1;

  CPTOOL_HOST_DEVICE constexpr int32_t count() const { return blocks * kv_heads * pieces; }

  struct Entry {
    int32_t block, kv_head, piece;
  };
  CPTOOL_HOST_DEVICE constexpr Entry at(int32_t place) const {
    const int32_t group_jobs = blocks * heads_together * pieces;
    const int32_t first_head = place / group_jobs * heads_together;
    const int32_t heads =
        kv_heads - first_head < heads_together ? kv_heads - first_head : heads_together;
    const int32_t within = place % group_jobs;
    return {blocks - 1 - within / (heads * pieces), first_head + within % heads,
            within / heads % pieces};
  }
};

// The number of heads whose K and V, `head_bytes` each, fit into half of L2; the other half is for
// Q and out. More if a head would otherwise have more than kSharers thread blocks: these read its
// tiles at about the same time, hence only an eighth of them from memory, which is little enough.
constexpr int32_t heads_together(int64_t l2_bytes, int64_t head_bytes, int32_t kv_heads,
                                 int32_t thread_blocks) {
  constexpr int32_t kSharers = 8;
  const int64_t fitting = head_bytes > 0 ? l2_bytes / 2 / head_bytes : kv_heads;
  const int64_t sharing = thread_blocks / kSharers;
  const int64_t heads = fitting > sharing ? fitting : sharing;
  return heads < 1 ? 1 : heads < kv_heads ? static_cast<int32_t>(heads) : kv_heads;
}

// The places in the list of a thread block's first two jobs, in forward and then in reverse order,
// so that the block with the longest first job has the shortest second one. The remaining jobs go
// to blocks as they finish a job, while their next one already runs. In a model of causal attention
// that counts tiles, the last thread block finishes 0 to 6% after the mean, for single long prompts
// and for batches. Alternating for all jobs, which would need no counter, leaves 10 to 60% on
// batches.
//
// While transfers take some multiprocessors, blocks start late by an unknown time, and no job is
// placed: one that is would wait for its block.
constexpr int32_t kPlacedJobs = 2;
CPTOOL_HOST_DEVICE constexpr int32_t job_place(int32_t thread_block, int32_t thread_blocks,
                                               int32_t n) {
  return n * thread_blocks + (n % 2 == 0 ? thread_block : thread_blocks - 1 - thread_block);
}

// Tiles are processed from the last to the first: those with masked or missing keys come first, and
// the rest needs no branch.
CPTOOL_HOST_DEVICE constexpr int32_t tile_count(int32_t keys) {
  return keys <= 0 ? 0 : (keys - 1) / kKeys + 1;
}

// Returns whether some row does not see all of the tile. `dense_keys`: the keys that every row
// sees; with a window from `dense_begin` on.
CPTOOL_HOST_DEVICE constexpr bool tile_is_masked(int32_t tile, int32_t dense_keys) {
  return tile >= dense_keys / kKeys;
}
CPTOOL_HOST_DEVICE constexpr bool tile_is_masked(int32_t tile, int32_t dense_begin,
                                                 int32_t dense_keys) {
  return tile_is_masked(tile, dense_keys) || tile * kKeys < dense_begin;
}

// Rows of the last tile beyond the `keys` that any row of the job sees.
CPTOOL_HOST_DEVICE constexpr int32_t unseen_rows(int32_t keys) {
  return tile_count(keys) * kKeys - keys;
}

// With a window, a job's tiles are those of one or more runs [begin, end), in which every tile has
// a key that some row sees: where the positions of neighbouring rows are further apart than the
// window, it leaves out what lies between.
struct TileRun {
  int32_t begin, end;

  CPTOOL_HOST_DEVICE constexpr int32_t size() const { return end - begin; }
};

// The piece of a job's tiles that one of `pieces` has: how many there are, and of the last one,
// which is processed first, the run and the tile itself.
struct TilePiece {
  int32_t tiles, run, tile;
};
CPTOOL_HOST_DEVICE inline TilePiece tile_piece(const TileRun* runs, int32_t count, int pieces,
                                               int piece) {
  int32_t tiles = 0;
  for (int32_t i = 0; i < count; ++i) tiles += runs[i].size();
  const KeyRange range = key_range(tiles, 1, pieces, piece);
  const int32_t held = static_cast<int32_t>(range.end - range.begin);
  if (held == 0) return {0, 0, 0};
  int32_t run = 0, tile = static_cast<int32_t>(range.end) - 1;
  for (; tile >= runs[run].size(); ++run) tile -= runs[run].size();
  return {held, run, runs[run].begin + tile};
}

// A job's tiles in the order in which they are processed.
template <bool kPlain>
struct TileWalk;

template <>
struct TileWalk<true> {
  int32_t tile;

  CPTOOL_HOST_DEVICE static constexpr TileWalk of(int32_t tiles, int32_t, const TileRun*) {
    return {tiles - 1};
  }
  CPTOOL_HOST_DEVICE constexpr bool done() const { return tile < 0; }
  CPTOOL_HOST_DEVICE constexpr bool is_last() const { return tile == 0; }
  CPTOOL_HOST_DEVICE constexpr void next() { --tile; }
};

template <>
struct TileWalk<false> {
  int32_t tile, left;
  const TileRun* run;

  // `tile`: the first one of the walk, in `run`.
  CPTOOL_HOST_DEVICE static constexpr TileWalk of(int32_t tiles, int32_t tile, const TileRun* run) {
    return {tile, tiles, run};
  }
  CPTOOL_HOST_DEVICE constexpr bool done() const { return left == 0; }
  CPTOOL_HOST_DEVICE constexpr bool is_last() const { return left == 1; }
  CPTOOL_HOST_DEVICE constexpr void next() {
    if (--left == 0) return;
    if (tile > run->begin) {
      --tile;
    } else {
      tile = (--run)->end - 1;
    }
  }
};

// A use of a ring of kStages buffers, counted from 0: which buffer it is, and the parity of the
// mbarrier phase that ends when that is full; the phase before, of the other parity, ended when it
// was empty.
template <int kStages>
struct Turn {
  static_assert((kStages & (kStages - 1)) == 0, "the count wraps around");
  uint32_t count = 0;

  CPTOOL_HOST_DEVICE constexpr int stage() const { return static_cast<int>(count % kStages); }
  CPTOOL_HOST_DEVICE constexpr uint32_t parity() const { return count / kStages % 2; }
  CPTOOL_HOST_DEVICE constexpr Turn previous() const { return {count - 1}; }
  CPTOOL_HOST_DEVICE constexpr Turn following() const { return {count + 1}; }
  CPTOOL_HOST_DEVICE constexpr void next() { ++count; }
};

}  // namespace
}  // namespace cptool::cuda::sm90
