// How a call with few queries is spread over a GPU: its keys are divided into pieces, each block
// writes the partial of one piece, and a second launch merges them in order. The number of pieces
// depends on shapes alone; which keys belong to a piece is computed on the device from the number
// of visible keys. A CUDA graph can therefore be replayed for any number of keys up to its
// capacity. Host and device.
#pragma once

#include <cstdint>

#include "softmax_state.h"

namespace cptool::cuda {
namespace {

// Costs in the model of split_count(), in units of the time that a block takes per key.
constexpr int64_t kStartKeys = 128;   // before a block's first tile has arrived
constexpr int64_t kMergeKeys = 2;     // to merge one more piece
constexpr int64_t kLaunchKeys = 256;  // a second launch
constexpr int kMaxSplits = 128;       // the most that one merge handles
// More rounds hardly shorten the last one, and each needs as much workspace again.
constexpr int64_t kMaxRounds = 4;

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Returns the number of pieces that finishes first: `blocks` blocks with `keys` keys each, of which
// the device runs `resident` concurrently, take ceil(blocks pieces / resident) rounds of keys /
// pieces keys. `tile`: the fewest keys of a piece. The gain must be at least a tenth, because
// rounds are a coarse model of blocks that share the memory bandwidth.
inline int split_count(int64_t blocks, int64_t keys, int64_t tile, int64_t resident) {
  int best = 1;
  int64_t least = ceil_divide(blocks, resident) * (keys + kStartKeys) * 9 / 10;
  const int64_t most = keys / tile < kMaxSplits ? keys / tile : kMaxSplits;
  for (int pieces = 2; pieces <= most; ++pieces) {
    const int64_t rounds = ceil_divide(blocks * pieces, resident);
    if (rounds > kMaxRounds) break;
    const int64_t time =
        rounds * (ceil_divide(keys, pieces) + kStartKeys) + kLaunchKeys + pieces * kMergeKeys;
    if (time < least) {
      least = time;
      best = pieces;
    }
  }
  return best;
}

struct KeyRange {
  int64_t begin, end;
};

// Piece `piece` of `pieces` of the keys [0, keys): whole tiles, except for the last one. Later
// pieces are empty if there are too few tiles.
CPTOOL_HOST_DEVICE inline KeyRange key_range(int64_t keys, int64_t tile, int pieces, int piece) {
  const int64_t tiles = (keys + tile - 1) / tile;
  const int64_t each = (tiles + pieces - 1) / pieces * tile;
  const int64_t begin = piece * each, end = begin + each;
  return {begin < keys ? begin : keys, end < keys ? end : keys};
}

}  // namespace
}  // namespace cptool::cuda
