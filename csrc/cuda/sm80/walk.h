// Which tiles of keys a block walks. Host and device.
//
// Tiles are counted for keys and values alike: tile 2 i holds keys, tile 2 i + 1 their values. Keys
// are of the block's piece, from `begin` to `end` - 1, and `begin` is a multiple of kKeys. A block
// has two walks: one of the tiles that it loads, and behind it one of those that it computes with.
#pragma once

#include "cuda/query_blocks.h"
#include "cuda/sm80/plan.h"

namespace cptool::cuda::sm80 {
namespace {

// Without a window some row sees the last key, hence every tile.
struct WholeWalk {
  int begin, tiles;

  CPTOOL_HOST_DEVICE WholeWalk(int begin, int end)
      : begin(begin), tiles(begin < end ? 2 * ((end - begin + kKeys - 1) / kKeys) : 0) {}

  CPTOOL_HOST_DEVICE bool has(int tile) const { return tile < tiles; }
  CPTOOL_HOST_DEVICE int first_key(int tile) const { return begin + tile / 2 * kKeys; }
  CPTOOL_HOST_DEVICE void pass(int) const {}
};

// With one, row r of `rows` sees keys firsts[r] to limits[r] - 1. Both ascend, so the first row
// sees the first tiles and the last row the last ones. If their positions are further apart than
// the window, there is a gap between the two, in which tiles that no row sees are skipped. `begin`
// is at or behind the first tile that holds key firsts[0].
struct WindowWalk {
  const int *firsts, *limits;
  int rows, end, gap_begin, gap_end, key;

  CPTOOL_HOST_DEVICE WindowWalk(const int* firsts, const int* limits, int rows, int begin, int end)
      : firsts(firsts), limits(limits), rows(rows), end(end) {
    const int last = rows - 1;
    gap_begin = firsts[0] < limits[0] ? limits[0] : 0;
    gap_end = firsts[last] < limits[last] ? firsts[last] / kKeys * kKeys : end;
    key = seen_from(begin);
  }

  CPTOOL_HOST_DEVICE bool has(int) const { return key < end; }
  CPTOOL_HOST_DEVICE int first_key(int) const { return key; }
  CPTOOL_HOST_DEVICE void pass(int tile) {
    if (tile % 2 == 1) key = seen_from(key + kKeys);
  }

  // Returns the first key of the first tile from that of key `at` on of which some row sees a key;
  // `end` or more if there is none.
  CPTOOL_HOST_DEVICE int seen_from(int at) const {
    if (at < gap_begin || at >= gap_end) return at;
    while (true) {
      const int row = visible_keys(limits, rows, at);  // the first whose keys end behind `at`
      if (row == rows) return end;
      if (firsts[row] <= at) return at / kKeys * kKeys;
      at = firsts[row];  // which this row need not see: it may see nothing at all
    }
  }
};

}  // namespace
}  // namespace cptool::cuda::sm80
