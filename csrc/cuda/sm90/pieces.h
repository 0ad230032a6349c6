// In how many pieces the keys of the sm_90a kernel's jobs are computed. Jobs of one length take
// whole rounds of the multiprocessors: 140 jobs take as long as 264 on 132 of them, and 80 as long
// as 132. Pieces of their keys are more and shorter jobs, whose partials a second launch merges.
// Host only. Depends on shapes and the device, never on the content of device memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/sm90/schedule.h"
#include "cuda/splits.h"

namespace cptool::cuda::sm90 {
namespace {

// Costs in units of the time that a multiprocessor takes per key of a job, 9 ns on an H100 by the
// count in attention.cu.
constexpr int64_t kJobKeys = 170;           // to begin and end a job
constexpr int64_t kSecondLaunchKeys = 440;  // 4 microseconds
constexpr int64_t kMergedElements = 3400;   // of a piece that are written and read per unit
constexpr int64_t kMostJobRounds = 8;       // with more, the workspace outgrows the gain
constexpr int64_t kMostPieces = 64;

struct JobSizes {
  int64_t jobs, keys, tokens;  // `keys` and `tokens` of a sequence
  int64_t elements;            // of the result
  int64_t most_keys;           // that a job sees
};

// Returns when the last of `thread_blocks` ends. The longest of the `jobs` comes first and has
// `most` keys, the last one `least`, others lie evenly between.
inline int64_t last_end(int64_t jobs, int64_t most, int64_t least, int64_t thread_blocks) {
  const int64_t rounds = ceil_divide(jobs, thread_blocks);
  // Of the last round's longest job and those before it in the same thread block, none is shorter.
  const int64_t last = most - (most - least) * ((rounds - 1) * thread_blocks) / jobs;
  return std::max({most, rounds * last, jobs * ((most + least) / 2) / thread_blocks});
}

// Positions are on the device: the queries are taken for the last tokens of their sequence, so that
// the first one sees all keys but `tokens`. The gain must be a tenth.
inline int pieces_of(const JobSizes& sizes, int64_t thread_blocks) {
  const int64_t keys = sizes.most_keys;
  const int64_t least_keys = std::min(keys, std::max<int64_t>(0, sizes.keys - sizes.tokens));
  int best = 1;
  if (sizes.jobs == 0) return best;
  int64_t least = last_end(sizes.jobs, keys + kJobKeys, least_keys + kJobKeys, thread_blocks);
  least = least * 9 / 10;
  const int64_t most = std::min(kMostPieces, keys / (4 * kKeys));
  for (int64_t pieces = 2; pieces <= most; ++pieces) {
    if (sizes.jobs * pieces > kMostJobRounds * thread_blocks) break;
    const int64_t piece = ceil_divide(ceil_divide(keys, kKeys), pieces) * kKeys;
    const int64_t time = last_end(sizes.jobs * pieces, piece + kJobKeys,
                                  least_keys / pieces + kJobKeys, thread_blocks) +
                         kSecondLaunchKeys + pieces * (sizes.elements / kMergedElements);
    if (time < least) {
      least = time;
      best = static_cast<int>(pieces);
    }
  }
  return best;
}

}  // namespace
}  // namespace cptool::cuda::sm90
