// How a call with few queries is spread over a GPU: its keys are cut into pieces, each block writes
// the partial of one piece, and a second launch merges them in order. The number of pieces depends
// on shapes alone; which keys are whose is computed on the device from how many there are to see.
// So a CUDA graph replays for any number of keys up to its capacity. Host and device.
#pragma once

#include <cstdint>

#include "softmax_state.h"

namespace cptool::cuda {
namespace {

// Figures of the model of split_count(), in the time that a block takes for one key.
constexpr int64_t kStartKeys = 128;   // before a block's first tile is there
constexpr int64_t kMergeKeys = 2;     // to merge one piece more
constexpr int64_t kLaunchKeys = 256;  // a second launch
constexpr int kMaxSplits = 128;       // what one merge takes
// More rounds even out the last one by little, and each is as much workspace again.
constexpr int64_t kMaxRounds = 4;

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The number of pieces that ends first: `blocks` blocks with `keys` keys each, of which the device
// runs `resident` at a time, take ceil(blocks pieces / resident) rounds of keys / pieces keys.
// `tile`: keys that a piece has at least. Pieces have to gain a tenth: rounds are a coarse picture
// of blocks that share the memory's bandwidth.
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

// Piece `piece` of `pieces` of the keys 0 to `keys`: whole tiles, but for the last key's. The later
// pieces are empty where there are too few tiles.
CPTOOL_HOST_DEVICE inline KeyRange key_range(int64_t keys, int64_t tile, int pieces, int piece) {
  const int64_t tiles = (keys + tile - 1) / tile;
  const int64_t each = (tiles + pieces - 1) / pieces * tile;
  const int64_t begin = piece * each, end = begin + each;
  return {begin < keys ? begin : keys, end < keys ? end : keys};
}

}  // namespace
}  // namespace cptool::cuda
