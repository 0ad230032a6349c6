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
    for (int row = 0; row < block.rows; row += kPanel) {
      prefetch_keys(args_, block, key + kKeys + row / kPanel * share, share);
      const Visible visible(fixed_.rows, row, row + kPanel - 1, key, keys);
      if (visible.keys == 0) continue;
      const int strips = (visible.keys + kStrip - 1) / kStrip;
      // The first strip that some row doesn't see in full.
      const int64_t seen_by_all = fixed_.rows.limit[row] - key;
      const int dense = seen_by_all < 0 ? 0 : static_cast<int>(seen_by_all / kStrip);
      score_alone(row);
      for (int strip = 0; strip < strips; ++strip) {
        if (strip < dense) {
          weigh<false>(row, strip, strips, key);
        } else {
          weigh<true>(row, strip, strips, key);
        }
      }
      for (int64_t d = 0; d < dims_; d += kStrip) accumulate(row, d, strips);
    }
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
  struct Fixed {
    RowStates<kRows> rows;
    // Two strips, so that one is computed while the other is read: tiles [2 of keys][2 of rows],
    // each [16 keys][16 rows].
    alignas(64) float scores[2][kStrip * kPanel];
    alignas(64) BFloat16
        weights[kKeys * kPanel];  // tiles [keys / 32][2 of rows], each [16 key pairs][16 rows][2]
  };

  static int64_t padded(int64_t head_dim) { return (head_dim + kStrip - 1) / kStrip * kStrip; }

  // The two tiles of weights of 32 keys by 32 rows.
  char* weight_tiles(int strip) const {
    return reinterpret_cast<char*>(fixed_.weights) + strip * 2 * kTileBytes;
  }

  float* accumulator(int row) const { return reinterpret_cast<float*>(acc_) + row * dims_; }

  // One step of the scores of 32 keys by 32 rows: 32 dimensions, the c-th.
  void score_step(int row, int strip, int64_t c) {
    const char* k = k_ + strip * kStrip * dims_ * 2 + c * kTileBytes;
    const char* q = q_ + row * dims_ * 2 + c * kTileBytes;
    const int64_t next = kLanes * dims_ * 2;  // bytes from 16 keys or rows to the next 16
    load_tile<4>(k);
    load_tile<6>(q);
    load_tile<7>(q + next);
    multiply_tiles<0, 4, 6>();
    multiply_tiles<1, 4, 7>();
    load_tile<5>(k + next);
    multiply_tiles<2, 5, 6>();
    multiply_tiles<3, 5, 7>();
  }

  static void begin_scores() {
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
  }

  void end_scores(int strip) {
    float* to = fixed_.scores[strip % 2];
    store_tile<0>(to);
    store_tile<1>(to + 256);
    store_tile<2>(to + 512);
    store_tile<3>(to + 768);
  }

  void score_alone(int row) {
    begin_scores();
    for (int64_t c = 0; c < dims_ / kStrip; ++c) score_step(row, 0, c);
    end_scores(0);
  }

  // Turns the scores of a strip into weights, while the tiles compute the scores of the next strip.
  template <bool masked>
  void weigh(int row, int strip, int strips, int64_t key) {
    RowStates<kRows>& rows = fixed_.rows;
    const float* scores = fixed_.scores[strip % 2];
    auto score_at = [&](int half, int j) {
      return _mm512_load_ps(scores + j / kLanes * 512 + half * 256 + j % kLanes * kLanes);
    };
    const __m512i first_key = _mm512_set1_epi32(static_cast<int32_t>(key + strip * kStrip));
    const __m512i left[2] = {
        _mm512_sub_epi32(_mm512_load_si512(rows.limit + row), first_key),
        _mm512_sub_epi32(_mm512_load_si512(rows.limit + row + kLanes), first_key)};
    auto visible = [&](int half, int j) {
      return _mm512_cmpgt_epi32_mask(left[half], _mm512_set1_epi32(j));
    };

    const __m512 scale = _mm512_set1_ps(scale_log2_);
    __m512 base[2];
    for (int half = 0; half < 2; ++half) {
      __m512 most[4];
      for (int i = 0; i < 4; ++i) most[i] = _mm512_set1_ps(-INFINITY);
#pragma GCC unroll 8
      for (int j = 0; j < kStrip; j += 4) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          most[i] = masked ? _mm512_mask_max_ps(most[i], visible(half, j + i), most[i],
                                                score_at(half, j + i))
                           : _mm512_max_ps(most[i], score_at(half, j + i));
        }
      }
      const __m512 top = _mm512_mul_ps(
          _mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3])), scale);
      base[half] = _mm512_load_ps(rows.max + row + half * kLanes);
      if (_mm512_cmp_ps_mask(top, _mm512_add_ps(base[half], _mm512_set1_ps(kSlack)), _CMP_GT_OQ)) {
        base[half] = raise(row, half, strip, top);
      }
    }

    __m512 total[2] = {_mm512_load_ps(rows.sum + row), _mm512_load_ps(rows.sum + row + kLanes)};
    char* to = weight_tiles(strip);
    auto weigh_pairs = [&](int begin, int end) {
      for (int pair = begin; pair < end; ++pair) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          __m512i weight[2];
#pragma GCC unroll 2
          for (int i = 0; i < 2; ++i) {
            __m512 w = exp2_cubic(_mm512_fmsub_ps(score_at(half, 2 * pair + i), scale, base[half]));
            if (masked) w = _mm512_maskz_mov_ps(visible(half, 2 * pair + i), w);
            weight[i] = round_bits(w);
          }
          total[half] = _mm512_add_ps(total[half], _mm512_add_ps(_mm512_castsi512_ps(weight[0]),
                                                                 _mm512_castsi512_ps(weight[1])));
          _mm512_store_si512(to + half * kTileBytes + pair * 64, pair_up(weight[0], weight[1]));
        }
      }
    };
    if (strip + 1 < strips) {
      const int steps = static_cast<int>(dims_ / kStrip);
      begin_scores();
      for (int c = 0; c < steps; ++c) {
        score_step(row, strip + 1, c);
        weigh_pairs(kLanes * c / steps, kLanes * (c + 1) / steps);
      }
      end_scores(strip + 1);
    } else {
      weigh_pairs(0, kLanes);
    }
    _mm512_store_ps(rows.sum + row, total[0]);
    _mm512_store_ps(rows.sum + row + kLanes, total[1]);
  }

  // Raises the maxima of 16 rows to at least `top`, with all that was computed against the old
  // ones; returns them.
  __attribute__((noinline)) __m512 raise(int row, int half, int strip, __m512 top) {
    RowStates<kRows>& rows = fixed_.rows;
    row += half * kLanes;
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
        char* at = weight_tiles(s) + half * kTileBytes + pair * 64;
        const __m512i both = _mm512_load_si512(at);
        const __m512 even = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), keep);
        const __m512 odd =
            _mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(both, high_half)), keep);
        _mm512_store_si512(at, pair_up(round_bits(even), round_bits(odd)));
      }
    }
    return base;
  }

  // Adds the weighted values to 32 dimensions by 32 rows.
  void accumulate(int row, int64_t d, int strips) {
    char* acc = reinterpret_cast<char*>(accumulator(row)) + d / kLanes * kTileBytes;
    const int64_t next_rows = kLanes * dims_ * sizeof(float);
    load_tile<0>(acc);
    load_tile<1>(acc + next_rows);
    load_tile<2>(acc + kTileBytes);
    load_tile<3>(acc + kTileBytes + next_rows);
    const char* v = v_ + d / kLanes * (kKeys / kStrip) * kTileBytes;
    for (int strip = 0; strip < strips; ++strip) {
      load_tile<4>(v + strip * kTileBytes);
      load_tile<6>(weight_tiles(strip));
      load_tile<7>(weight_tiles(strip) + kTileBytes);
      multiply_tiles<0, 4, 6>();
      multiply_tiles<1, 4, 7>();
      load_tile<5>(v + (kKeys / kStrip + strip) * kTileBytes);
      multiply_tiles<2, 5, 6>();
      multiply_tiles<3, 5, 7>();
    }
    store_tile<0>(acc);
    store_tile<1>(acc + next_rows);
    store_tile<2>(acc + kTileBytes);
    store_tile<3>(acc + kTileBytes + next_rows);
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
  constexpr int kFewRows = 8;  // at most half a tile
  if (few_rows(args, kFewRows)) return run_stream<BFloat16Math>(args, threads);
  run<AmxKernel>(args, threads);
}

}  // namespace cptool::cpu
