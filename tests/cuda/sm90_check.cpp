// Compares the sm_90a kernel's arithmetic of places, tiles, turns and descriptors
// (csrc/cuda/sm90/schedule.h and descriptors.h) with plain counting. Fails where they differ.
#include <algorithm>
#include <cstdio>
#include <functional>
#include <queue>
#include <random>
#include <utility>
#include <vector>

#include "cuda/sm90/descriptors.h"
#include "cuda/sm90/pieces.h"
#include "cuda/sm90/schedule.h"

using namespace cptool::cuda;
using namespace cptool::cuda::sm90;

namespace {

// A thread block's jobs and when it ends, if a job takes `cost(entry)`: the placed ones, then
// whatever comes next in the list each time that a job is done.
struct Worker {
  std::vector<JobList::Entry> jobs;
  size_t begun = 0;
  double end = 0;
};

template <class Cost>
std::vector<Worker> deal(const JobList& list, int32_t thread_blocks, Cost cost) {
  std::vector<Worker> workers(static_cast<size_t>(thread_blocks));
  int32_t next = std::min(list.count(), kPlacedJobs * thread_blocks);
  for (int32_t i = 0; i < thread_blocks; ++i) {
    for (int32_t n = 0; n < kPlacedJobs; ++n) {
      const int32_t place = job_place(i, thread_blocks, n);
      if (place < list.count()) workers[i].jobs.push_back(list.at(place));
    }
  }
  using Event = std::pair<double, size_t>;  // when who is free
  std::priority_queue<Event, std::vector<Event>, std::greater<Event>> free;
  const auto begin = [&](double now, size_t i) {
    Worker& worker = workers[i];
    if (worker.begun == worker.jobs.size()) return;
    worker.end = now + cost(worker.jobs[worker.begun++]);
    free.push({worker.end, i});
  };
  for (size_t i = 0; i < workers.size(); ++i) begin(0, i);
  while (!free.empty()) {
    const auto [now, i] = free.top();
    free.pop();
    if (next < list.count()) workers[i].jobs.push_back(list.at(next++));
    begin(now, i);
  }
  return workers;
}

// Every query block of every KV head is one job of one thread block.
bool jobs_are_dealt_once(const JobList& list, int32_t thread_blocks) {
  std::vector<int> times(static_cast<size_t>(list.count()));
  for (const Worker& worker : deal(list, thread_blocks, [](auto) { return 1; })) {
    for (const JobList::Entry& entry : worker.jobs) {
      if (entry.block < 0 || entry.block >= list.blocks || entry.kv_head < 0 ||
          entry.kv_head >= list.kv_heads) {
        return false;
      }
      if (entry.piece < 0 || entry.piece >= list.pieces) return false;
      ++times[(entry.block * list.kv_heads + entry.kv_head) * list.pieces + entry.piece];
    }
  }
  return std::all_of(times.begin(), times.end(), [](int count) { return count == 1; });
}

// At most `heads_together` heads are worked on at a time, each from its last block to its first.
bool longest_come_first(const JobList& list) {
  for (int32_t place = 1; place < list.count(); ++place) {
    const JobList::Entry before = list.at(place - 1), entry = list.at(place);
    const bool same = before.kv_head / list.heads_together == entry.kv_head / list.heads_together;
    if (same ? entry.block > before.block : entry.block != list.blocks - 1) return false;
  }
  return true;
}

// When the last thread block ends over the mean of all, for a batch of equal prompts and causal
// attention. A job costs its tiles and as much as one more to begin and end.
double imbalance(int32_t prompts, int32_t tokens, int32_t block_tokens, int32_t kv_heads,
                 int32_t heads_together, int32_t thread_blocks) {
  const int32_t blocks = tokens / block_tokens;
  const JobList list = {prompts * blocks, kv_heads, heads_together};
  double most = 0, all = 0;
  const auto cost = [&](const JobList::Entry& entry) {
    return 1 + tile_count((entry.block % blocks + 1) * block_tokens);
  };
  for (const Worker& worker : deal(list, thread_blocks, cost)) {
    most = std::max(most, worker.end);
    all += worker.end;
  }
  return most / (all / thread_blocks);
}

// Counts pieces of jobs of equal length for the 132 multiprocessors of an H100, against dealing
// them out one by one.
bool pieces_save_rounds() {
  const auto jobs_of = [](int64_t jobs, int64_t keys, int64_t tokens) {
    return JobSizes{jobs, keys, tokens, jobs * 128 * 128, keys};
  };
  // Whole rounds, many rounds, few keys, and causal attention over all keys stay whole.
  for (const JobSizes& whole :
       {jobs_of(132, 131072, 1024), jobs_of(264, 131072, 2048), jobs_of(1000, 131072, 4096),
        jobs_of(140, 1024, 16), jobs_of(1024, 8192, 8192), jobs_of(0, 1000, 0)}) {
    if (pieces_of(whole, 132) != 1) return false;
  }
  for (int64_t jobs : {67, 80, 100, 133, 140, 180}) {
    const int pieces = pieces_of(jobs_of(jobs, 126976, 1024), 132);
    const double rounds = static_cast<double>(ceil_divide(jobs * pieces, 132)) / pieces;
    // At most a fifth above the even share, from up to twice as much.
    if (pieces == 1 || rounds > 1.2 * static_cast<double>(jobs) / 132) return false;
  }
  // Through a window of 1,024, jobs see few keys of many.
  JobSizes windowed = jobs_of(80, 126976, 1024);
  windowed.most_keys = 1151;
  return pieces_of(windowed, 132) == 1;
}

// The tiles of a random list of runs, in pieces, against the list written out.
bool runs_are_walked(std::mt19937& random) {
  std::vector<TileRun> runs;
  std::vector<int32_t> tiles;
  for (int32_t end = 0; runs.size() < random() % 6;) {
    const int32_t begin = end + static_cast<int32_t>(random() % 9);
    end = begin + 1 + static_cast<int32_t>(random() % 9);
    runs.push_back({begin, end});
    for (int32_t tile = begin; tile < end; ++tile) tiles.push_back(tile);
  }
  const int pieces = 1 + static_cast<int>(random() % 7);
  size_t done = 0;
  for (int i = 0; i < pieces; ++i) {
    const TilePiece piece = tile_piece(runs.data(), static_cast<int32_t>(runs.size()), pieces, i);
    auto walk = TileWalk<false>::of(piece.tiles, piece.tile, runs.data() + piece.run);
    for (int32_t n = piece.tiles; n > 0; --n, walk.next()) {
      if (walk.done() || walk.tile != tiles.at(done + static_cast<size_t>(n) - 1)) return false;
    }
    if (!walk.done()) return false;
    done += static_cast<size_t>(piece.tiles);
  }
  return done == tiles.size();
}

bool tiles_are_classed(int32_t keys, int32_t dense_keys) {
  const int32_t tiles = tile_count(keys);
  if ((keys + kKeys - 1) / kKeys != tiles) return false;
  for (int32_t tile = 0; tile < tiles; ++tile) {
    const bool dense = (tile + 1) * kKeys <= dense_keys;
    if (tile_is_masked(tile, dense_keys) == dense) return false;
    for (int32_t begin : {0, 1, kKeys, kKeys + 1, dense_keys}) {
      const bool all = dense && tile * kKeys >= begin;
      if (tile_is_masked(tile, begin, dense_keys) == all) return false;
    }
  }
  return unseen_rows(keys) == tiles * kKeys - keys;
}

template <int kStages>
bool turns_go_round() {
  // Around the end of the count as well.
  for (uint32_t start : {0u, UINT32_MAX - 4 * kStages + 1}) {
    Turn<kStages> turn = {start};
    uint32_t parity = 0;
    for (int n = 0; n < 8 * kStages; ++n) {
      if (turn.stage() != n % kStages || turn.parity() != parity) return false;
      Turn<kStages> next = turn;
      next.next();
      if (next.previous().count != turn.count) return false;
      turn = next;
      if (n % kStages == kStages - 1) parity ^= 1;
    }
  }
  return true;
}

// Where TMA puts the element of a tile with 128-byte rows: its 16-byte chunk is exchanged within
// the row, by the number of the row.
uint32_t stored_at(uint32_t tile, uint32_t panel_bytes, int row, int column) {
  return tile + column / 64 * panel_bytes + row * 128 + ((column % 64 / 8) ^ (row % 8)) * 16 +
         column % 8 * 2;
}

uint32_t field(uint64_t descriptor, int first, int bits) {
  return static_cast<uint32_t>(descriptor >> first & ((1u << bits) - 1));
}

// Where wgmma looks for an element of an operand, after the manual's canonical layouts.
uint32_t read_at(uint64_t descriptor, int row, int k, bool transposed) {
  const uint32_t start = field(descriptor, 0, 14) << 4, leading = field(descriptor, 16, 14) << 4,
                 stride = field(descriptor, 32, 14) << 4;
  const uint32_t at =
      start + (transposed ? row / 64 * leading + row % 64 * 2 + k / 8 * stride + k % 8 * 128
                          : row / 8 * stride + row % 8 * 128 + k * 2);
  return at ^ (at >> 7 & 7) << 4;
}

bool descriptors_find_what_tma_stored() {
  for (uint32_t tile : {0u, 1024u, 196608u}) {
    constexpr uint32_t kPanelBytes = 128 * kRowBytes;
    const uint64_t rows = rows_descriptor(tile), columns = columns_descriptor(tile, kPanelBytes);
    for (uint64_t descriptor : {rows, columns}) {
      if (field(descriptor, 62, 2) != 1 || field(descriptor, 49, 3) != 0) return false;
    }
    for (int step = 0; step < 8; ++step) {
      const uint64_t along = advance(rows, step_along_rows(step, kPanelBytes));
      const uint64_t across = advance(columns, step_across_rows(step));
      for (int row = 0; row < 128; ++row) {
        for (int k = 0; k < kDepth; ++k) {
          const int depth = step * kDepth + k;
          if (read_at(along, row, k, false) != stored_at(tile, kPanelBytes, row, depth) ||
              read_at(across, row, k, true) != stored_at(tile, kPanelBytes, depth, row)) {
            return false;
          }
        }
      }
    }
  }
  return true;
}

// What CUTLASS (7107b05) encodes for tiles of 128 rows at address 0, step by step: with it, and not
// only with our reading of the manual, the descriptors have to agree.
bool descriptors_are_those_of_cutlass() {
  constexpr uint64_t kRows = 0x4000004000010000, kColumns = 0x4000004004000000;
  constexpr uint64_t kAlong[8] = {0, 2, 4, 6, 0x400, 0x402, 0x404, 0x406};
  constexpr uint32_t kPanelBytes = 128 * kRowBytes;
  for (int step = 0; step < 8; ++step) {
    if (advance(rows_descriptor(0), step_along_rows(step, kPanelBytes)) != kRows + kAlong[step] ||
        advance(columns_descriptor(0, kPanelBytes), step_across_rows(step)) !=
            kColumns + 0x80u * step) {
      return false;
    }
  }
  return true;
}

int complain(const char* what) {
  std::puts(what);
  return 1;
}

}  // namespace

int main() {
  std::mt19937 random(1);
  for (int trial = 0; trial < 2000; ++trial) {
    const int32_t kv_heads = 1 + random() % 9;
    const JobList list = {static_cast<int32_t>(1 + random() % 40), kv_heads,
                          static_cast<int32_t>(1 + random() % kv_heads),
                          static_cast<int32_t>(1 + random() % 5)};
    if (!jobs_are_dealt_once(list, 1 + random() % 140)) return complain("jobs missed or repeated");
    if (!longest_come_first(list)) return complain("a longer job after a shorter one");
    const int32_t keys = random() % 1000, dense_keys = random() % (keys + 1);
    if (!tiles_are_classed(keys, dense_keys)) return complain("a tile in the wrong class");
    if (!runs_are_walked(random)) return complain("a tile out of its run");
  }
  if (heads_together(1000, 100, 8, 16) != 5 || heads_together(1000, 100, 8, 48) != 6 ||
      heads_together(1000, 5000, 8, 7) != 1 || heads_together(1000, 1, 8, 48) != 8 ||
      heads_together(1000, 0, 8, 48) != 8) {
    return complain("wrong count of heads together");
  }
  if (!turns_go_round<1>() || !turns_go_round<2>() || !turns_go_round<4>()) {
    return complain("a buffer out of turn");
  }
  if (!descriptors_are_those_of_cutlass()) return complain("a descriptor unlike CUTLASS's");
  if (!pieces_save_rounds()) return complain("a strange number of pieces");
  if (!descriptors_find_what_tma_stored()) return complain("a descriptor leads elsewhere");
  // On the 132 multiprocessors of an H100: what is lost at the end.
  struct {
    int32_t prompts, tokens, block_tokens, kv_heads, together;
    double allowed;
  } const cases[] = {
      {1, 8192, 128, 16, 16, 1.05},  {1, 16384, 128, 16, 16, 1.05}, {1, 16384, 128, 128, 16, 1.05},
      {1, 32768, 128, 32, 16, 1.05}, {1, 8192, 8, 1, 1, 1.05},      {2, 8192, 128, 8, 8, 1.05},
      {8, 2048, 128, 16, 16, 1.1},   {1, 4096, 128, 16, 16, 1.1},   {1, 2048, 128, 16, 16, 1.1},
  };
  for (const auto& c : cases) {
    const double found =
        imbalance(c.prompts, c.tokens, c.block_tokens, c.kv_heads, c.together, 132);
    std::printf("%d x %d tokens, %d a job, %d KV heads, %d together: last over mean %.3f\n",
                c.prompts, c.tokens, c.block_tokens, c.kv_heads, c.together, found);
    if (found > c.allowed) return complain("thread blocks wait too long for the last one");
  }
}
