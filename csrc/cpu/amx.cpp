// attention_partial for bfloat16 with AMX: both products are tile products with float32
// accumulation, the softmax is AVX-512.
//
// Transposed like all panels (avx512_panel.h), scores^T = K Q^T and out^T = V^T weights^T, so that
// - K is the row-major operand of its product and only copied into tiles; V is transposed once per
//   tile of keys;
// - two consecutive keys' weights, interleaved, are what the second product takes as its
//   pair-interleaved operand;
// - the softmax is vertical.
// The weights are rounded to bfloat16; their sum is taken of the rounded values, so that weights
// add up to one and an error common to all cancels.
#include <cstring>

#include "cpu/amx_pack.h"
#include "cpu/avx512_stream.h"
#include "cpu/avx512bf16_math.h"

namespace cptool::cpu {
namespace {

constexpr int kPanel = 32;  // rows: two tiles side by side

class AmxKernel {
 public:
  static constexpr int kRows = 16 * kPanel;
  static constexpr int kKeys = 128;

  static int heads(const AttentionArgs&) { return 1; }

  static size_t scratch_bytes(const AttentionArgs& args) {
    const size_t dims = padded(args.head_dim);
    return sizeof(Fixed) + (kRows + 2 * kKeys) * dims * sizeof(BFloat16) +
           kRows * dims * sizeof(float);
  }

  AmxKernel(const AttentionArgs& args, void* scratch)
      : args_(args),
        dims_(padded(args.head_dim)),
        fixed_(*static_cast<Fixed*>(scratch)),
        acc_(static_cast<char*>(scratch) + sizeof(Fixed)),
        q_(acc_ + kRows * dims_ * sizeof(float)),
        k_(q_ + kRows * dims_ * sizeof(BFloat16)),
        v_(k_ + kKeys * dims_ * sizeof(BFloat16)),
        scale_log2_((args.scale < 0 ? -args.scale : args.scale) * kLog2E) {}

  void begin(const RowBlock<kRows>& block) {
    const int rows = round_up(block.rows, kPanel);
    fixed_.rows.begin(block, rows);
    for (int row = 0; row < rows; row += kLanes) {
      pack_queries(block.q + row, block.rows - row, args_.head_dim, args_.scale < 0,
                   q_ + row * dims_ * sizeof(BFloat16));
    }
    std::memset(acc_, 0, rows * dims_ * sizeof(float));
  }

  template <bool masked>
  void tile(const RowBlock<kRows>& block, int64_t key, int keys) {
    const BFloat16* k = static_cast<const BFloat16*>(block.k) + key * args_.k_token_stride;
    const BFloat16* v = static_cast<const BFloat16*>(block.v) + key * args_.v_token_stride;
    pack_keys(k, args_.k_token_stride, keys, args_.head_dim, k_);
    pack_values<kKeys>(v, args_.v_token_stride, keys, args_.head_dim, v_);
    const int share = kKeys / ((block.rows + kPanel - 1) / kPanel);
    const int groups = static_cast<int>(dims_ / kStrip);
    Panel weighed;   // the last panel, whose weights still wait for the values
    int buffer = 0;  // of the scores in hand
    for (int row = 0; row < block.rows; row += kPanel) {
      prefetch_keys(args_, block, key + kKeys + row / kPanel * share, share);
      const Visible visible(fixed_.rows, row, row + kPanel - 1, key, keys);
      if (visible.keys == 0) continue;
      const Panel panel{row, (visible.keys + kStrip - 1) / kStrip, 1 - weighed.weights};
      // The first strip that some row doesn't see in full.
      const int64_t seen_by_all = fixed_.rows.limit[row] - key;
      const int dense = seen_by_all < 0 ? 0 : static_cast<int>(seen_by_all / kStrip);
      if (weighed.strips == 0) {  // the first
        TileSteps alone;
        alone.scores_of = row;
        multiply(alone);
      }
      for (int strip = 0; strip < panel.strips; ++strip, buffer = 1 - buffer) {
        TileSteps beside;
        beside.into = 1 - buffer;
        if (strip + 1 < panel.strips) {
          beside.scores_of = row;
          beside.strip = strip + 1;
        } else if (row + kPanel < block.rows) {  // it sees no less than this one
          beside.scores_of = row + kPanel;
        }
        beside.weighed = weighed;
        beside.group = groups * strip / panel.strips;
        beside.group_end = groups * (strip + 1) / panel.strips;
        if (strip < dense) {
          weigh<false>(panel, strip, key, buffer, beside);
        } else {
          weigh<true>(panel, strip, key, buffer, beside);
        }
      }
      weighed = panel;
    }
    TileSteps last;
    last.weighed = weighed;
    last.group_end = groups;
    multiply(last);
  }

  // Turns the accumulator of every 16 rows, tiles [dim][row], into 16 rows, in place.
  void finish(const RowBlock<kRows>& block) {
    float* rows = reinterpret_cast<float*>(k_);  // not needed any more
    for (int row = 0; row < block.rows; row += kLanes) {
      float* acc = accumulator(row);
      for (int64_t d = 0; d < dims_; d += kLanes) {
        __m512 r[kLanes];
        for (int i = 0; i < kLanes; ++i) r[i] = _mm512_load_ps(acc + (d + i) * kLanes);
        transpose16(r);
        for (int i = 0; i < kLanes; ++i) _mm512_store_ps(rows + i * dims_ + d, r[i]);
      }
      std::memcpy(acc, rows, kLanes * dims_ * sizeof(float));
    }
  }

  const float* acc(int row) const { return accumulator(0) + row * dims_; }
  SoftmaxState state(int row) const { return fixed_.rows.state(row); }

 private:
  static constexpr int kScoreLanes = 2 * kLanes;  // from a key's scores to the next one's
  static constexpr int64_t kScoreStride = kScoreLanes * sizeof(float);

  struct Fixed {
    RowStates<kRows> rows;
    // Two strips, so that one is computed while the other is read: [2 of rows][32 keys][2 strips]
    // [16 rows]. Lines of the two alternate, so that no line of one lies a multiple of 4 KB from a
    // line of the other: a load would wait for such a store.
    alignas(64) float scores[2 * kStrip * kPanel];
    // Of two panels, so that the tiles read one's while the other's are computed: tiles [keys /
    // 32][2 of rows], each [16 key pairs][16 rows][2].
    alignas(64) BFloat16 weights[2][kKeys * kPanel];
  };

  // 32 rows and what they see of a tile of keys.
  struct Panel {
    int row = 0;
    int strips = 0;   // of 32 keys; 0: no panel
    int weights = 0;  // which buffer holds its weights
  };

  // Tile products that run beside the softmax of a strip, in steps of four: first the scores of the
  // strip that is next, whose stores have then reached the cache when its softmax loads them
  // (nothing forwards a tile's store to a load); then a share of the values of the panel before,
  // whose weights have, too.
  struct TileSteps {
    int scores_of = -1;  // row of the panel; -1: no scores
    int strip = 0;
    int into = 0;  // which buffer of scores
    Panel weighed;
    int group = 0, group_end = 0;  // of 32 dimensions
  };

  static int64_t padded(int64_t head_dim) { return (head_dim + kStrip - 1) / kStrip * kStrip; }

  // The two tiles of weights of 32 keys by 32 rows.
  char* weight_tiles(const Panel& panel, int strip) const {
    return reinterpret_cast<char*>(fixed_.weights[panel.weights]) + strip * 2 * kTileBytes;
  }

  float* accumulator(int row) const { return reinterpret_cast<float*>(acc_) + row * dims_; }

  int score_steps(const TileSteps& steps) const {
    return steps.scores_of < 0 ? 0 : static_cast<int>(dims_ / kStrip);
  }

  int count(const TileSteps& steps) const {
    return score_steps(steps) + (steps.group_end - steps.group) * steps.weighed.strips;
  }

  void multiply(const TileSteps& steps) {
    const int n = count(steps);
    for (int i = 0; i < n; ++i) step(steps, i);
  }

  void step(const TileSteps& steps, int i) {
    const int scores = score_steps(steps);
    if (i < scores) return score_step(steps, i, i == scores - 1);
    i -= scores;
    value_step(steps.weighed, steps.group + i / steps.weighed.strips, i % steps.weighed.strips);
  }

  // Adds 32 dimensions, the c-th, to the scores of 32 keys by 32 rows.
  void score_step(const TileSteps& steps, int c, bool last) {
    const char* k = k_ + steps.strip * kStrip * dims_ * 2 + c * kTileBytes;
    const char* q = q_ + steps.scores_of * dims_ * 2 + c * kTileBytes;
    const int64_t next = kLanes * dims_ * 2;  // bytes from 16 keys or rows to the next 16
    if (c == 0) {
      zero_tile<0>();
      zero_tile<1>();
      zero_tile<2>();
      zero_tile<3>();
    }
    load_tile<4>(k);
    load_tile<6>(q);
    load_tile<7>(q + next);
    multiply_tiles<0, 4, 6>();
    multiply_tiles<1, 4, 7>();
    load_tile<5>(k + next);
    multiply_tiles<2, 5, 6>();
    multiply_tiles<3, 5, 7>();
    if (last) {
      float* to = fixed_.scores + steps.into * kLanes;
      store_tile<0>(to, kScoreStride);
      store_tile<1>(to + kStrip * kScoreLanes, kScoreStride);
      store_tile<2>(to + kLanes * kScoreLanes, kScoreStride);
      store_tile<3>(to + (kStrip + kLanes) * kScoreLanes, kScoreStride);
    }
  }

  // Adds the weighted values of 32 keys to 32 dimensions, the group-th, by 32 rows.
  void value_step(const Panel& panel, int group, int strip) {
    char* acc = reinterpret_cast<char*>(accumulator(panel.row)) + group * 2 * kTileBytes;
    const int64_t next_rows = kLanes * dims_ * sizeof(float);
    if (strip == 0) {
      load_tile<0>(acc);
      load_tile<1>(acc + next_rows);
      load_tile<2>(acc + kTileBytes);
      load_tile<3>(acc + kTileBytes + next_rows);
    }
    constexpr int kStrips = kKeys / kStrip;
    const char* v = v_ + (group * 2 * kStrips + strip) * kTileBytes;
    load_tile<4>(v);
    load_tile<6>(weight_tiles(panel, strip));
    load_tile<7>(weight_tiles(panel, strip) + kTileBytes);
    multiply_tiles<0, 4, 6>();
    multiply_tiles<1, 4, 7>();
    load_tile<5>(v + kStrips * kTileBytes);
    multiply_tiles<2, 5, 6>();
    multiply_tiles<3, 5, 7>();
    if (strip == panel.strips - 1) {
      store_tile<0>(acc);
      store_tile<1>(acc + next_rows);
      store_tile<2>(acc + kTileBytes);
      store_tile<3>(acc + kTileBytes + next_rows);
    }
  }

  // Turns the scores of a strip into weights, while the tiles do `beside`. The weights are computed
  // against the maxima of before, so that nothing waits for new ones; where those turn out to be
  // too far below, which is seldom, they are raised and the weights computed again.
  template <bool masked>
  void weigh(const Panel& panel, int strip, int64_t key, int buffer, const TileSteps& beside) {
    RowStates<kRows>& rows = fixed_.rows;
    const float* scores = fixed_.scores + buffer * kLanes;
    const __m512i first_key = _mm512_set1_epi32(static_cast<int32_t>(key + strip * kStrip));
    const __m512i left[2] = {
        _mm512_sub_epi32(_mm512_load_si512(rows.limit + panel.row), first_key),
        _mm512_sub_epi32(_mm512_load_si512(rows.limit + panel.row + kLanes), first_key)};
    const __m512 scale = _mm512_set1_ps(scale_log2_);
    char* to = weight_tiles(panel, strip);
    __m512 base[2], total[2], most[2];
    auto begin = [&] {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        base[half] = _mm512_load_ps(rows.max + panel.row + half * kLanes);
        total[half] = _mm512_load_ps(rows.sum + panel.row + half * kLanes);
        most[half] = _mm512_set1_ps(-INFINITY);
      }
    };
    auto weigh_pairs = [&](int first, int end) {
      for (int pair = first; pair < end; ++pair) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          __m512i weight[2];
#pragma GCC unroll 2
          for (int i = 0; i < 2; ++i) {
            const int j = 2 * pair + i;
            const __m512 score = _mm512_load_ps(scores + (half * kStrip + j) * kScoreLanes);
            __m512 w = exp2_cubic(_mm512_fmsub_ps(score, scale, base[half]));
            if (masked) {
              const __mmask16 visible = _mm512_cmpgt_epi32_mask(left[half], _mm512_set1_epi32(j));
              w = _mm512_maskz_mov_ps(visible, w);
              most[half] = _mm512_mask_max_ps(most[half], visible, most[half], score);
            } else {
              most[half] = _mm512_max_ps(most[half], score);
            }
            weight[i] = round_bits(w);
          }
          total[half] = _mm512_add_ps(total[half], _mm512_add_ps(_mm512_castsi512_ps(weight[0]),
                                                                 _mm512_castsi512_ps(weight[1])));
          _mm512_store_si512(to + half * kTileBytes + pair * 64, pair_up(weight[0], weight[1]));
        }
      }
    };
    begin();
    const int steps = count(beside);
    for (int i = 0; i < steps; ++i) {
      step(beside, i);
      weigh_pairs(kLanes * i / steps, kLanes * (i + 1) / steps);
    }
    if (steps == 0) weigh_pairs(0, kLanes);
    __mmask16 exceeded = 0;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      most[half] = _mm512_mul_ps(most[half], scale);
      exceeded |= _mm512_cmp_ps_mask(most[half], _mm512_add_ps(base[half], _mm512_set1_ps(kSlack)),
                                     _CMP_GT_OQ);
    }
    if (exceeded) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) raise(panel, half, strip, most[half]);
      begin();
      weigh_pairs(0, kLanes);
    }
    _mm512_store_ps(rows.sum + panel.row, total[0]);
    _mm512_store_ps(rows.sum + panel.row + kLanes, total[1]);
  }

  // Raises the maxima of 16 rows to at least `top`, with all that was computed against the old
  // ones.
  __attribute__((noinline)) void raise(const Panel& panel, int half, int strip, __m512 top) {
    RowStates<kRows>& rows = fixed_.rows;
    const int row = panel.row + half * kLanes;
    const __m512 old = _mm512_load_ps(rows.max + row);
    const __m512 base = _mm512_max_ps(old, top);
    const __m512 keep = exp2_full(_mm512_sub_ps(old, base));
    _mm512_store_ps(rows.max + row, base);
    _mm512_store_ps(rows.sum + row, _mm512_mul_ps(_mm512_load_ps(rows.sum + row), keep));
    float* acc = accumulator(row);
    for (int64_t d = 0; d < dims_; ++d)
      _mm512_store_ps(acc + d * kLanes, _mm512_mul_ps(_mm512_load_ps(acc + d * kLanes), keep));
    const __m512i high_half = _mm512_set1_epi32(-0x10000);
    for (int s = 0; s < strip; ++s) {  // the weights that are not accumulated yet
      for (int pair = 0; pair < kLanes; ++pair) {
        char* at = weight_tiles(panel, s) + half * kTileBytes + pair * 64;
        const __m512i both = _mm512_load_si512(at);
        const __m512 even = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), keep);
        const __m512 odd =
            _mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(both, high_half)), keep);
        _mm512_store_si512(at, pair_up(round_bits(even), round_bits(odd)));
      }
    }
  }

  FlushSubnormals flush_;
  const AttentionArgs& args_;
  const int64_t dims_;  // head_dim, padded with zeros to whole tiles
  TileConfig config_;
  Fixed& fixed_;
  char* acc_;  // tiles [rows / 16][dims / 16], each [16 dims][16 rows] of float32
  char* q_;
  char* k_;
  char* v_;
  float scale_log2_;
};

}  // namespace

bool amx_supported() {
  static const bool supported =
      avx512_supported() && __builtin_cpu_supports("avx512bf16") && tiles_available();
  return supported;
}

bool amx_handles(ScalarType dtype, int64_t head_dim) {
  return dtype == ScalarType::kBFloat16 && head_dim % kLanes == 0;
}

void attention_partial_amx(const AttentionArgs& args, int threads) {
  if (few_rows(args, kAmxStreamRows)) return run_stream<BFloat16Math>(args, threads);
  run<AmxKernel>(args, threads);
}

}  // namespace cptool::cpu
