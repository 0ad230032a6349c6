// Fails unless the pieces of csrc/cuda/splits.h hold every key exactly once; unless there is one
// piece where blocks fill the device and more where they do not; and unless csrc/cuda/sm80/plan.h
// chooses well for the shapes that matter.
#include <algorithm>
#include <cstdio>
#include <random>

#include "cuda/sm80/plan.h"
#include "cuda/splits.h"

using namespace cptool;
using namespace cptool::cuda;

namespace {

bool pieces_cover(std::mt19937& random) {
  const int64_t keys = random() % 3 == 0 ? random() % 3 : random() % 5000;
  const int64_t tile = 1 << random() % 9;
  const int pieces = 1 + random() % kMaxSplits;
  int64_t next = 0;
  for (int piece = 0; piece < pieces; ++piece) {
    const KeyRange range = key_range(keys, tile, pieces, piece);
    if (range.begin != next || range.end < range.begin) return false;
    if (range.begin < range.end && range.begin % tile != 0) return false;
    next = range.end;
  }
  return next == keys;
}

bool counts_make_sense(std::mt19937& random) {
  const int64_t blocks = 1 + random() % 600, resident = 1 + random() % 400;
  const int64_t keys = random() % 200000, tile = 64;
  const int pieces = split_count(blocks, keys, tile, resident);
  if (pieces < 1 || pieces > kMaxSplits) return false;
  if (pieces > 1 && keys / pieces < tile) return false;
  // Pieces are workspace: of a few times the blocks that run at a time.
  if (pieces > 1 && blocks * pieces > kMaxRounds * resident) return false;
  // A piece more than the device holds at once, in several rounds, repays for a tail alone.
  if (blocks % resident == 0 && pieces != 1) return false;
  return !(keys >= 16384 && 4 * blocks <= resident && pieces < 2);
}

AttentionArgs decode(int64_t batch, int64_t keys, int64_t tokens = 1) {
  AttentionArgs args = {};
  args.batch = batch;
  args.q_tokens = batch * tokens;
  args.k_tokens = batch * keys;
  args.q_heads = 32;
  args.kv_heads = 8;
  args.head_dim = 128;
  return args;
}

bool plans_make_sense() {
  const Device h100 = {90, 132, 228 * 1024}, a100 = {80, 108, 164 * 1024};
  for (const Device& device : {h100, a100}) {
    // Decoding one sequence fills the device; a large batch does so without pieces.
    const sm80::Plan one = sm80::plan(decode(1, 65536), device);
    if (!one.few_rows || one.pieces * 8 < device.multiprocessors) return false;
    if (sm80::plan(decode(256, 4096), device).pieces != 1) return false;
    // A few keys are not worth a second launch.
    if (sm80::plan(decode(1, 256), device).pieces != 1) return false;
    // A long prompt's blocks are many.
    const sm80::Plan prompt = sm80::plan(decode(1, 32768, 32768), device);
    if (prompt.few_rows || prompt.few_queries() || prompt.pieces != 1) return false;
    // A short one over a long cache is cut too.
    const sm80::Plan chunk = sm80::plan(decode(1, 131072, 64), device);
    if (chunk.few_rows || !chunk.few_queries() || chunk.pieces < 2) return false;
    // Blocks that fill the device, but for the last round, are no reason for another kernel.
    const int64_t tokens = device.multiprocessors * 9;
    if (sm80::plan(decode(1, 131072, tokens), device).few_queries()) return false;
  }
  return true;
}

// Pieces are of the keys that a block sees.
bool windows_count() {
  const Device a100 = {80, 108, 164 * 1024};
  for (int64_t tokens : {1, 5, 64, 2000}) {
    const auto pieces = [&](int64_t keys, int64_t window, float cap) {
      AttentionArgs args = decode(1, keys, tokens);
      args.window = window;
      args.cap = cap;
      return sm80::plan(args, a100).pieces;
    };
    // One as long as the keys, or longer than any number, changes nothing.
    for (int64_t window : {int64_t{65536}, int64_t{1} << 40, INT64_MAX}) {
      if (pieces(65536, window, 0.0f) != pieces(65536, 0, 2.0f)) return false;
    }
    // Tokens of 4 rows each: a block of 16 rows holds up to 4 of them, one of 128 rows up to 32.
    const int64_t together = tokens <= 8 ? std::min<int64_t>(tokens, 4) : 32;
    for (int64_t window : {1, 200, 4096, 20000}) {
      if (pieces(65536, window, 0.0f) != pieces(window + together - 1, 0, 2.0f)) return false;
    }
    if (pieces(65536, 200, 0.0f) != 1) return false;
  }
  return true;
}

}  // namespace

int main() {
  std::mt19937 random(1);
  for (int trial = 0; trial < 3000; ++trial) {
    if (!pieces_cover(random)) return std::puts("keys missed or repeated"), 1;
    if (!counts_make_sense(random)) return std::puts("a strange number of pieces"), 1;
  }
  if (!plans_make_sense()) return std::puts("a strange plan"), 1;
  if (!windows_count()) return std::puts("pieces of keys ahead of the window"), 1;
}
