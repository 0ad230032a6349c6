// The tile products of the AMX kernel (amx_kernel.h), as steps that its softmax is interleaved
// with. Unnamed namespace: see isa.h.
#pragma once

#include "cpu/amx_math.h"
#include "cpu/panel.h"

namespace cptool::cpu {
namespace {

template <class Math>
class AmxProducts {
 public:
  static constexpr int kPanel = 32;  // rows: two tiles side by side
  static constexpr int kRows = Math::kPanels * kPanel;
  static constexpr int kKeys = 128;

  static size_t scratch_bytes(const AttentionArgs& args) {
    const size_t dims = padded(args.head_dim);
    return sizeof(Fixed) + kRows * dims * sizeof(float) +
           (kRows * Math::kRight + 2 * kKeys * Math::kLeft) * dims * sizeof(BFloat16);
  }

 protected:
  static constexpr int kScoreLanes = 2 * kLanes;  // from one key's scores to the next key's
  static constexpr int64_t kScoreStride = kScoreLanes * sizeof(float);

  struct Fixed {
    RowStates<kRows> rows;
    // Scores of two strips, one computed while the other is read: [2 halves of the rows][32 keys]
    // [2 strips][16 rows]. Lines of the two alternate, so that no line of one is a multiple of 4 KB
    // from a line of the other: such a load would wait for the store.
    alignas(64) float scores[2 * kStrip * kPanel];
    // Weights of two panels, one computed while tile products read the other: tiles [keys / 32]
    // [pieces][2 halves of the rows], each [16 key pairs][16 rows][2].
    alignas(64) BFloat16 weights[2][kKeys * kPanel * Math::kRight];
  };

  // 32 query rows, and how much of a tile of keys they see.
  struct Panel {
    int row = 0;
    int strips = 0;   // of 32 keys; 0: no panel
    int weights = 0;  // which buffer holds its weights
  };

  // The tile products to interleave with the softmax of one strip, in steps of four products: first
  // the scores of the next strip, then a share of the weighted values of the previous panel. Both
  // keep a distance between a store and the load that reads it: the processor does not forward a
  // tile store to a load, so the data must have reached the cache.
  struct TileSteps {
    int scores_of = -1;  // row of the panel; -1: no scores
    int strip = 0;
    int into = 0;                  // which buffer of scores
    Panel weighed;                 // the previous panel
    int group = 0, group_end = 0;  // of 32 dimensions
  };

  AmxProducts(int64_t head_dim, void* scratch)
      : dims_(padded(head_dim)),
        fixed_(*static_cast<Fixed*>(scratch)),
        acc_(static_cast<char*>(scratch) + sizeof(Fixed)),
        q_(acc_ + kRows * dims_ * sizeof(float)),
        k_(q_ + kRows * dims_ * Math::kRight * sizeof(BFloat16)),
        v_(k_ + kKeys * dims_ * Math::kLeft * sizeof(BFloat16)) {}

  // Returns the tiles of weights of 32 keys by 32 rows: two per piece.
  char* weight_tiles(const Panel& panel, int strip) const {
    return reinterpret_cast<char*>(fixed_.weights[panel.weights]) +
           strip * Math::kRight * 2 * kTileBytes;
  }

  // Returns the tiles of a panel's queries, [dims / 32][pieces][2].
  char* query_tiles(int row) const { return q_ + row * dims_ * Math::kRight * sizeof(BFloat16); }

  float* accumulator(int row) const { return reinterpret_cast<float*>(acc_) + row * dims_; }

  int count(const TileSteps& steps) const {
    return score_steps(steps) +
           (steps.group_end - steps.group) * steps.weighed.strips * Math::kSteps;
  }

  void multiply(const TileSteps& steps) {
    const int n = count(steps);
    for (int i = 0; i < n; ++i) step(steps, i);
  }

  void step(const TileSteps& steps, int i) {
    const int scores = score_steps(steps);
    if (i < scores) return score_step(steps, i, i == scores - 1);
    i -= scores;
    const int of_group = steps.weighed.strips * Math::kSteps;
    value_step(steps.weighed, steps.group + i / of_group, i % of_group);
  }

  const int64_t dims_;  // head_dim, padded with zeros to whole tiles
  Fixed& fixed_;
  char* acc_;  // tiles [rows / 16][dims / 16], each [16 dims][16 rows] of float32
  char* q_;
  char* k_;
  char* v_;

 private:
  static int64_t padded(int64_t head_dim) { return (head_dim + kStrip - 1) / kStrip * kStrip; }

  int score_steps(const TileSteps& steps) const {
    return steps.scores_of < 0 ? 0 : static_cast<int>(dims_ / kStrip) * Math::kSteps;
  }

  // Carries out step i of the scores of 32 keys by 32 rows: some of the products over dimensions
  // [32 c, 32 c + 32).
  void score_step(const TileSteps& steps, int i, bool last) {
    if (i == 0) {
      zero_tile<0>();
      zero_tile<1>();
      zero_tile<2>();
      zero_tile<3>();
    }
    const int64_t c = i / Math::kSteps, strip = dims_ / kStrip;
    Math::multiply(k_ + (steps.strip * strip + c) * Math::kLeft * 2 * kTileBytes,
                   query_tiles(steps.scores_of) + c * Math::kRight * 2 * kTileBytes,
                   i % Math::kSteps);
    if (last) {
      float* to = fixed_.scores + steps.into * kLanes;
      store_tile<0>(to, kScoreStride);
      store_tile<1>(to + kStrip * kScoreLanes, kScoreStride);
      store_tile<2>(to + kLanes * kScoreLanes, kScoreStride);
      store_tile<3>(to + (kStrip + kLanes) * kScoreLanes, kScoreStride);
    }
  }

  // Carries out step i of adding the weighted values to dimensions [32 group, 32 group + 32) of 32
  // rows: some of the products over 32 keys.
  void value_step(const Panel& panel, int group, int i) {
    char* acc = reinterpret_cast<char*>(accumulator(panel.row)) + group * 2 * kTileBytes;
    const int64_t next_rows = kLanes * dims_ * sizeof(float);
    if (i == 0) {
      load_tile<0>(acc);
      load_tile<1>(acc + next_rows);
      load_tile<2>(acc + kTileBytes);
      load_tile<3>(acc + kTileBytes + next_rows);
    }
    const int strip = i / Math::kSteps;
    Math::multiply(v_ + (group * (kKeys / kStrip) + strip) * Math::kLeft * 2 * kTileBytes,
                   weight_tiles(panel, strip), i % Math::kSteps);
    if (i == panel.strips * Math::kSteps - 1) {
      store_tile<0>(acc);
      store_tile<1>(acc + next_rows);
      store_tile<2>(acc + kTileBytes);
      store_tile<3>(acc + kTileBytes + next_rows);
    }
  }
};

}  // namespace
}  // namespace cptool::cpu
