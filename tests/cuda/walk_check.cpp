// Fails unless the walks of csrc/cuda/sm80/walk.h pass exactly the tiles of a piece of which some
// row sees a key, in order, for any ascending ranges of keys; and unless they end, within the
// piece, for numbers that do not ascend.
#include <algorithm>
#include <cstdio>
#include <random>
#include <vector>

#include "cuda/sm80/walk.h"

using namespace cptool::cuda::sm80;

namespace {

// The first keys of the tiles that a walk passes.
template <class Walk>
std::vector<int> passed(Walk walk) {
  std::vector<int> tiles;
  for (int tile = 0; walk.has(tile) && tiles.size() < 1000; tile += 2) {
    tiles.push_back(walk.first_key(tile));
    walk.pass(tile);
    if (!walk.has(tile + 1) || walk.first_key(tile + 1) != tiles.back()) return {-1};
    walk.pass(tile + 1);
  }
  return tiles;
}

struct Rows {
  std::vector<int> firsts, limits;

  bool see(int key) const {
    for (size_t row = 0; row < limits.size(); ++row) {
      if (firsts[row] <= key && key < limits[row]) return true;
    }
    return false;
  }
};

// Those of queries at random positions with a window over random keys.
Rows rows_of(std::mt19937& random) {
  std::vector<int> keys(random() % 900);
  int position = 0;
  for (int& key : keys) key = position += random() % 50 == 0 ? random() % 400 : random() % 2;
  const int window = 1 + random() % 300;
  Rows rows;
  rows.firsts.resize(1 + random() % 40);
  rows.limits.resize(rows.firsts.size());
  int query = random() % 500;
  for (size_t row = 0; row < rows.limits.size(); ++row) {
    query += random() % 12 == 0 ? random() % 600 : random() % 2;
    const auto count = [&](int last) {
      return static_cast<int>(std::upper_bound(keys.begin(), keys.end(), last) - keys.begin());
    };
    rows.limits[row] = count(query);
    rows.firsts[row] = count(query - window);
  }
  return rows;
}

bool exact(std::mt19937& random) {
  const Rows rows = rows_of(random);
  const int count = static_cast<int>(rows.limits.size());
  const int origin = rows.firsts[0] / kKeys * kKeys, last = rows.limits.back();
  const int begin = origin + static_cast<int>(random() % 5) * kKeys;
  const int end = std::min(last, begin + static_cast<int>(random() % 12) * kKeys);
  std::vector<int> expected;
  for (int tile = begin; tile < end; tile += kKeys) {
    bool seen = false;
    for (int key = tile; key < std::min(tile + kKeys, last); ++key) seen |= rows.see(key);
    if (seen) expected.push_back(tile);
  }
  return passed(WindowWalk(rows.firsts.data(), rows.limits.data(), count, begin, end)) == expected;
}

bool whole(std::mt19937& random) {
  const int begin = static_cast<int>(random() % 5) * kKeys, end = random() % 600;
  std::vector<int> expected;
  for (int tile = begin; tile < end; tile += kKeys) expected.push_back(tile);
  return passed(WholeWalk(begin, end)) == expected;
}

bool ends(std::mt19937& random) {
  Rows rows;
  for (int row = 1 + random() % 20; row > 0; --row) {
    rows.firsts.push_back(random() % 1000);
    rows.limits.push_back(random() % 1000);
  }
  const int begin = static_cast<int>(random() % 10) * kKeys, end = random() % 1000;
  const int count = static_cast<int>(rows.limits.size());
  int before = begin - kKeys;
  for (int key : passed(WindowWalk(rows.firsts.data(), rows.limits.data(), count, begin, end))) {
    if (key < before + kKeys || key >= end || key % kKeys != 0) return false;
    before = key;
  }
  return true;
}

}  // namespace

int main() {
  std::mt19937 random(1);
  for (int trial = 0; trial < 30000; ++trial) {
    if (!exact(random)) return std::puts("a tile missed, or one too many"), 1;
    if (!whole(random)) return std::puts("not all tiles"), 1;
    if (!ends(random)) return std::puts("a walk outside its piece"), 1;
  }
}
