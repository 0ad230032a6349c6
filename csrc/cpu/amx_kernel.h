// Attention with AMX, in the arithmetic that `Math` names (amx_math.h): both products are tile
// products with float32 accumulation, the softmax is AVX-512.
//
// Transposed like all panels (panel.h), scores^T = K Q^T and out^T = V^T weights^T, so that
// - K is the row-major operand of its product and only copied into tiles; V is transposed once per
//   tile of keys;
// - two consecutive keys' weights, interleaved, are what the second product takes as its
//   pair-interleaved operand;
// - the softmax is vertical.
//
// What 32 rows by 32 keys of head_dim 128 cost in float32: 192 tile products of 16 cycles, which
// take 20 where the data are not zeros (3840), or half as many with bfloat16 k and v; 64 vectors of
// softmax of 23 instructions on the two ports of which tile products occupy one (850 alone); 112
// loads of tiles, 37 bytes per cycle, in the order in which they lie, which the level-2 cache
// delivers. Measured on a quiet core: products alone 1605 ns, with softmax 1765, with packing and
// reading k and v 2130, in blocks of 1024 rows, which gain 4 to 9% over 512. Attention as a whole
// runs at 1.5 times the rate of AVX-512 in float32, and 2.1 times with bfloat16 k and v; where
// other programs share the core, tile loads are several times slower, and so is this.
//
// Unnamed namespace: see isa.h.
#pragma once

#include <cstring>

#include "cpu/amx_products.h"

namespace cptool::cpu {
namespace {

template <class Math>
class AmxKernel : AmxProducts<Math> {
  using T = typename Math::Input;
  using Products = AmxProducts<Math>;
  using Products::acc_, Products::dims_, Products::fixed_, Products::k_, Products::v_;
  using Products::accumulator, Products::query_tiles, Products::weight_tiles;
  using Products::count, Products::multiply, Products::step;
  using Products::kPanel, Products::kScoreLanes;
  using typename Products::Panel;
  using typename Products::TileSteps;

 public:
  static constexpr Kind kKind = Kind::kSoftmax;
  using Products::kKeys, Products::kRows;
  using Products::scratch_bytes;

  static int heads(const AttentionArgs&) { return 1; }

  AmxKernel(const AttentionArgs& args, void* scratch)
      : Products(args.head_dim, scratch),
        args_(args),
        scores_(args.scale < 0 ? -args.scale : args.scale, args.cap) {}

  void begin(const RowBlock<kRows>& block) {
    const int rows = round_up(block.rows, kPanel);
    fixed_.rows.begin(block, rows);
    for (int row = 0; row < rows; row += kLanes) {
      Math::pack_queries(block.q + row, args_.q_dtype, block.rows - row, args_.head_dim,
                         args_.scale < 0,
                         query_tiles(row / kPanel * kPanel) + row % kPanel / kLanes * kTileBytes);
    }
    std::memset(acc_, 0, rows * dims_ * sizeof(float));
  }

  template <bool masked>
  void tile(const RowBlock<kRows>& block, int64_t key, int keys) {
    const T* k = static_cast<const T*>(block.k) + key * args_.k_token_stride;
    const T* v = static_cast<const T*>(block.v) + key * args_.v_token_stride;
    Math::pack_keys(k, args_.k_token_stride, keys, args_.head_dim, k_);
    Math::template pack_values<kKeys>(v, args_.v_token_stride, keys, args_.head_dim, v_);
    const int share = kKeys / ((block.rows + kPanel - 1) / kPanel);
    const int groups = static_cast<int>(dims_ / kStrip);
    Panel weighed;    // the previous panel, whose weights are not yet multiplied with the values
    int buffer = 0;   // which holds the scores of the current strip
    int scored = -1;  // the row whose first strip's scores it holds
    for (int row = 0; row < block.rows; row += kPanel) {
      prefetch_keys(args_, block, key + kKeys + row / kPanel * share, share);
      const Visible visible(fixed_.rows, row, row + kPanel - 1, key, keys);
      if (visible.empty()) continue;
      const Panel panel{row, (visible.end + kStrip - 1) / kStrip, 1 - weighed.weights};
      // The first strip that some row does not see in full, after those ahead of a window.
      const int dense = visible.dense_end < 0 ? 0 : static_cast<int>(visible.dense_end / kStrip);
      if (scored != row) {  // the first, or after panels that see nothing of the tile
        TileSteps alone;
        alone.scores_of = row;
        alone.into = buffer;
        multiply(alone);
      }
      for (int strip = 0; strip < panel.strips; ++strip, buffer = 1 - buffer) {
        TileSteps beside;
        beside.into = 1 - buffer;
        if (strip + 1 < panel.strips) {
          beside.scores_of = row;
          beside.strip = strip + 1;
        } else if (row + kPanel < block.rows) {  // most often the next that sees keys
          beside.scores_of = row + kPanel;
        }
        beside.weighed = weighed;
        beside.group = groups * strip / panel.strips;
        beside.group_end = groups * (strip + 1) / panel.strips;
        if (scores_.capped) cap(buffer);
        if (strip < dense && visible.dense_begin <= strip * kStrip) {
          weigh<false>(panel, strip, key, buffer, beside);
        } else {
          weigh<true>(panel, strip, key, buffer, beside);
        }
      }
      weighed = panel;
      scored = row + kPanel;
    }
    TileSteps last;
    last.weighed = weighed;
    last.group_end = groups;
    multiply(last);
  }

  // Transposes the accumulator of every 16 rows, tiles [dim][row], into 16 rows, in place.
  void finish(const RowBlock<kRows>& block) {
    float* rows = reinterpret_cast<float*>(k_);  // the keys are no longer needed
    for (int row = 0; row < block.rows; row += kLanes) {
      float* acc = accumulator(row);
      for (int64_t d = 0; d < dims_; d += kLanes) {
        __m512 r[kLanes];
        for (int i = 0; i < kLanes; ++i) r[i] = _mm512_load_ps(acc + (d + i) * kLanes);
        transpose(r);
        for (int i = 0; i < kLanes; ++i) _mm512_store_ps(rows + i * dims_ + d, r[i]);
      }
      std::memcpy(acc, rows, kLanes * dims_ * sizeof(float));
    }
  }

  const float* acc(int row) const { return accumulator(0) + row * dims_; }
  SoftmaxState state(int row) const { return fixed_.rows.state(row); }

 private:
  // Replaces the products of a strip, which are all computed, by scores under a soft cap.
  __attribute__((noinline)) void cap(int buffer) {
    float* scores = fixed_.scores + buffer * kLanes;
    const __m512 scale = _mm512_set1_ps(scores_.cap_scale);
    for (int i = 0; i < 2 * kStrip; ++i, scores += kScoreLanes) {
      _mm512_store_ps(scores, hyperbolic_tangent(_mm512_mul_ps(_mm512_load_ps(scores), scale)));
    }
  }

  // Turns the scores of a strip into weights, interleaved with the tile products `beside`. The
  // weights are computed relative to the previous maxima, so that nothing waits for new ones. If
  // those turn out to be too low, which is rare, they are raised and the weights computed again.
  template <bool masked>
  void weigh(const Panel& panel, int strip, int64_t key, int buffer, const TileSteps& beside) {
    RowStates<kRows>& rows = fixed_.rows;
    const float* scores = fixed_.scores + buffer * kLanes;
    const __m512i first_key = _mm512_set1_epi32(static_cast<int32_t>(key + strip * kStrip));
    const __m512i left[2] = {
        _mm512_sub_epi32(_mm512_load_si512(rows.limit + panel.row), first_key),
        _mm512_sub_epi32(_mm512_load_si512(rows.limit + panel.row + kLanes), first_key)};
    const __m512i before[2] = {
        _mm512_sub_epi32(_mm512_load_si512(rows.first + panel.row), first_key),
        _mm512_sub_epi32(_mm512_load_si512(rows.first + panel.row + kLanes), first_key)};
    const __m512 scale = _mm512_set1_ps(scores_.factor);
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
    // Tile products of float32 are also issued between the halves, because the processor looks
    // ahead for two or three products only.
    constexpr int kPlaces = Math::kSteps > 1 ? 2 : 1;
    auto weigh_pairs = [&](int steps) __attribute__((always_inline)) {
      int done = 0, due = kPlaces * kLanes - 1;
      for (int pair = 0; pair < kLanes; ++pair) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          if (half < kPlaces) {
            due += steps;
            for (; done < due / (kPlaces * kLanes); ++done) step(beside, done);
          }
          Vector weight[2];
#pragma GCC unroll 2
          for (int i = 0; i < 2; ++i) {
            const int j = 2 * pair + i;
            const __m512 score = _mm512_load_ps(scores + (half * kStrip + j) * kScoreLanes);
            __m512 w = Math::exp2(_mm512_fmsub_ps(score, scale, base[half]));
            if (masked) {
              const __m512i number = _mm512_set1_epi32(j);
              const __mmask16 visible = _mm512_mask_cmple_epi32_mask(
                  _mm512_cmpgt_epi32_mask(left[half], number), before[half], number);
              w = _mm512_maskz_mov_ps(visible, w);
              most[half] = _mm512_mask_max_ps(most[half], visible, most[half], score);
            } else {
              most[half] = _mm512_max_ps(most[half], score);
            }
            weight[i] = w;
          }
          char* const at = to + half * kTileBytes + pair * kTileStride;
          total[half] = _mm512_add_ps(total[half], Math::store_weights(weight, at));
        }
      }
    };
    begin();
    weigh_pairs(count(beside));
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
      weigh_pairs(0);
    }
    _mm512_store_ps(rows.sum + panel.row, total[0]);
    _mm512_store_ps(rows.sum + panel.row + kLanes, total[1]);
  }

  // Raises the maxima of 16 rows to at least `top`, and rescales everything that was computed
  // relative to the old ones.
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
    for (int s = 0; s < strip; ++s) {  // weights that are not accumulated yet
      for (int pair = 0; pair < kLanes; ++pair) {
        char* const at = weight_tiles(panel, s) + half * kTileBytes + pair * kTileStride;
        Vector weights[2];
        Math::load_weights(at, weights);
        for (Vector& w : weights) w = _mm512_mul_ps(w, keep);
        Math::store_weights(weights, at);
      }
    }
  }

  FlushSubnormals flush_;
  const AttentionArgs& args_;
  TileConfig config_;
  const Scores scores_;
};

}  // namespace
}  // namespace cptool::cpu
