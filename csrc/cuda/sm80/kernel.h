// The kernel for compute capability 8.0 and above: bfloat16 and float16 on the tensor cores through
// mma.sync, fed by cp.async.
//
// FlashAttention-2's schedule (Dao, 2023). A block holds kRows packed query rows (query_blocks.h)
// in shared memory and walks the keys that its last row sees. Tiles of kKeys keys and of their
// values alternate in a ring of kStages slots: while one is multiplied the next ones are in flight,
// and one barrier per tile means both that the tile has arrived and that the slot of the previous
// one is free.
//
// The rows are divided over kRowWarps warps. If there are few rows, the keys of every tile are also
// divided, over kKeyWarps warps, each with its own softmax state; these are merged at the end
// through shared memory.
//
// Positions ascend, so a tile is one of three kinds by the limits of the first and the last row:
// beyond all that a warp sees (skipped), seen by all its rows (dense) or masked. Rows of a tile
// from the last limit on are not read and count as zeros. With a window a row's keys also have a
// beginning, ahead of which tiles are masked and skipped in the same way; walk.h says which tiles a
// block loads at all.
//
// A kernel with a window or a soft cap, of which one may be missing, is compiled apart, so that the
// plain one has neither the instructions nor the registers for them.
#pragma once

#include <cstdint>

#include "cuda/block_rows.h"
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/sm80/plan.h"
#include "cuda/sm80/tile.h"
#include "cuda/sm80/walk.h"
#include "cuda/sm80/warp.h"
#include "cuda/splits.h"

namespace cptool::cuda::sm80 {
namespace {

template <class T_, int kHeadDim_, class Shape, bool kPlain_>
struct Config : Shape {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kPlain = kPlain_;  // neither window nor cap
  static constexpr int kThreads = 32 * Shape::kRowWarps * Shape::kKeyWarps;
  static constexpr int kWarpRows = 16 * Shape::kRowTiles;
  static constexpr int kRows = block_rows<Shape>();
  static constexpr int kWarpKeys = kKeys / Shape::kKeyWarps;
  using Warp = WarpAttention<T, kHeadDim, Shape::kRowTiles, kWarpKeys>;
  static constexpr int kTileBytes = kKeys * Layout<kHeadDim>::kRowBytes;
  static constexpr int kQueryBytes = kRows * Layout<kHeadDim>::kRowBytes;
  static constexpr int kSharedBytes = shared_bytes<Shape>(kHeadDim, kPlain);
};

// What warps with the same rows exchange at the end, in the memory of the slots.
template <class C>
struct WarpPartials {
  static constexpr int kPadding = 8;  // so that the rows of a store lie in different banks

  float acc[C::kKeyWarps][C::kRows][C::kHeadDim + kPadding];
  float max[C::kKeyWarps][C::kRows];  // in powers of two
  float sum[C::kKeyWarps][C::kRows];
};

// Returns the keys of the piece and, within them, the walk of a block whose rows see keys firsts[r]
// to limits[r] - 1; with kPlain, 0 to limits[r] - 1.
template <class C>
__device__ __forceinline__ auto walk_of_piece(const int* firsts, const int* limits, int rows,
                                              int* end) {
  const int pieces = static_cast<int>(gridDim.z), piece = static_cast<int>(blockIdx.z);
  if constexpr (C::kPlain) {
    const KeyRange range = key_range(limits[rows - 1], kKeys, pieces, piece);
    *end = static_cast<int>(range.end);
    return WholeWalk(static_cast<int>(range.begin), *end);
  } else {
    const int origin = firsts[0] / kKeys * kKeys;
    const KeyRange range = key_range(max(limits[rows - 1] - origin, 0), kKeys, pieces, piece);
    *end = origin + static_cast<int>(range.end);
    return WindowWalk(firsts, limits, rows, origin + static_cast<int>(range.begin), *end);
  }
}

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

inline __device__ SoftmaxState natural(float max2, float sum) {
  SoftmaxState state;
  state.max = max2 * kLn2;
  state.sum = sum;
  return state;
}

// Writes the rows of warps that have seen all keys of their rows.
template <class C, class RowAt>
__device__ void finish_rows(const typename C::Warp& mine, const Target& target, int first_row,
                            int rows, RowAt row_at) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + 16 * m + 8 * half + lane / 4;
      const bool held = row < rows;
      const RowResult result(target, held ? row_at(row) : 0, held,
                             natural(mine.max[m][half], mine.sum[m][half]));
      __syncwarp();  // every lane of the row has read its lse
      if (lane % 4 == 0) result.store_lse(target);
#pragma unroll
      for (int c = 0; c < C::Warp::kColumnTiles; ++c) {
        result.template store<typename C::T>(target, C::kHeadDim, 8 * c + lane % 4 * 2,
                                             mine.acc[m][c][2 * half],
                                             mine.acc[m][c][2 * half + 1]);
      }
    }
  }
}

// Merges the results of warps with the same rows, in order, and writes them.
template <class C, class RowAt>
__device__ void merge_warps(const typename C::Warp& mine, WarpPartials<C>& shared,
                            const Target& target, int rows, RowAt row_at) {
  static_assert(C::kRowWarps == 1 && C::kRowTiles == 1);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = 8 * half + lane / 4;
    if (lane % 4 == 0) {
      shared.max[warp][row] = mine.max[0][half];
      shared.sum[warp][row] = mine.sum[0][half];
    }
#pragma unroll
    for (int c = 0; c < C::Warp::kColumnTiles; ++c) {
      *reinterpret_cast<float2*>(&shared.acc[warp][row][8 * c + lane % 4 * 2]) =
          make_float2(mine.acc[0][c][2 * half], mine.acc[0][c][2 * half + 1]);
    }
  }
  __syncthreads();

  constexpr int kRowThreads = C::kThreads / C::kRows;
  static_assert(32 % kRowThreads == 0 && C::kHeadDim % (2 * kRowThreads) == 0);
  const int row = threadIdx.x / kRowThreads;
  const bool held = row < rows;
  float max2 = -INFINITY;
  for (int w = 0; w < C::kKeyWarps; ++w) max2 = fmaxf(max2, shared.max[w][row]);
  const float base = max2 == -INFINITY ? 0.0f : max2;
  float weight[C::kKeyWarps], sum = 0.0f;
#pragma unroll
  for (int w = 0; w < C::kKeyWarps; ++w) {
    weight[w] = ptx::exp2_approx(shared.max[w][row] - base);
    sum += shared.sum[w][row] * weight[w];
  }
  const RowResult result(target, held ? row_at(row) : 0, held, natural(max2, sum));
  __syncwarp();
  if (threadIdx.x % kRowThreads == 0) result.store_lse(target);
#pragma unroll
  for (int c = 0; c < C::kHeadDim / (2 * kRowThreads); ++c) {
    const int column = 2 * (c * kRowThreads + static_cast<int>(threadIdx.x) % kRowThreads);
    float2 total = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int w = 0; w < C::kKeyWarps; ++w) {
      const float2 part = *reinterpret_cast<const float2*>(&shared.acc[w][row][column]);
      total.x += part.x * weight[w];
      total.y += part.y * weight[w];
    }
    result.template store<typename C::T>(target, C::kHeadDim, column, total.x, total.y);
  }
}

// `partials`: null, or where the gridDim.z pieces are written: [pieces, q_tokens, q_heads,
// head_dim], then the lse of each, [pieces, q_tokens, q_heads].
template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kResident)
    attention_kernel(const __grid_constant__ AttentionArgs args, float* partials) {
  unsigned char* memory = dynamic_shared();
  const uint32_t q_tile = ptx::shared_address(memory);
  const uint32_t slots = q_tile + C::kQueryBytes;
  int* limits = reinterpret_cast<int*>(memory + C::kQueryBytes + C::kStages * C::kTileBytes);
  int* firsts = limits + C::kRows;  // unless kPlain
  const int warp = threadIdx.x / 32;
  const int row_warp = warp / C::kKeyWarps, key_warp = warp % C::kKeyWarps;

  // The last queries see the most keys and therefore start first.
  const QueryBlock block = query_block(args, C::kRows, gridDim.x - 1 - blockIdx.x);
  if (block.rows <= 0) return;
  const int64_t kv_head = blockIdx.y;
  const BlockRows rows(args, block, static_cast<int>(kv_head));
  load_tile<C::kHeadDim, C::kRows, C::kThreads>(q_tile, rows.rows, [&](int row) {
    return static_cast<const uint16_t*>(args.q) + rows.token(row) * args.q_token_stride +
           rows.head(row) * args.q_head_stride;
  });

  const int64_t first_key = offset_at(args.cu_k, block.sequence, args.k_tokens);
  const int64_t keys = offset_at(args.cu_k, block.sequence + 1, args.k_tokens) - first_key;
  if constexpr (C::kPlain) {
    find_limits<C::kRows>(args, rows, args.k_pos + first_key, keys, limits);
  } else {
    find_ranges<C::kRows>(args, rows, args.k_pos + first_key, keys, firsts, limits);
  }
  __syncthreads();
  int end;
  auto computed = walk_of_piece<C>(firsts, limits, rows.rows, &end);
  auto loaded = computed;

  // Rows of this warp see keys from warp_begin to warp_end - 1, all of them those from dense_begin
  // to dense_end - 1.
  const int warp_row = row_warp * C::kWarpRows;
  const int last_row = min(warp_row + C::kWarpRows, rows.rows) - 1;
  const int dense_end = last_row < warp_row ? 0 : limits[warp_row];
  const int warp_end = last_row < warp_row ? 0 : limits[last_row];
  int warp_begin = 0, dense_begin = 0;
  if constexpr (!C::kPlain) {
    warp_begin = last_row < warp_row ? 0 : firsts[warp_row];
    dense_begin = last_row < warp_row ? 0 : firsts[last_row];
  }

  const uint16_t* k = static_cast<const uint16_t*>(args.k) + first_key * args.k_token_stride +
                      kv_head * args.k_head_stride;
  const uint16_t* v = static_cast<const uint16_t*>(args.v) + first_key * args.v_token_stride +
                      kv_head * args.v_head_stride;
  const auto load = [&](int tile) {
    if (loaded.has(tile)) {
      const int first = loaded.first_key(tile);
      const uint16_t* from = tile % 2 == 0 ? k : v;
      const int64_t stride = tile % 2 == 0 ? args.k_token_stride : args.v_token_stride;
      load_tile<C::kHeadDim, kKeys, C::kThreads>(
          slots + tile % C::kStages * C::kTileBytes, end - first,
          [&](int row) { return from + (first + row) * stride; });
      loaded.pass(tile);
    }
    ptx::cp_async_commit();  // even if empty: there is one group per tile
  };
  // Waits until tile `tile` has arrived and every warp is done with the previous one, whose slot
  // the next copy uses. Groups 0 to tile + kStages - 2 are committed, so all but the last kStages -
  // 2 must have arrived.
  const auto advance = [&](int tile) {
    ptx::cp_async_wait<C::kStages - 2>();
    __syncthreads();
    load(tile + C::kStages - 1);
    return slots + tile % C::kStages * C::kTileBytes +
           key_warp * C::kWarpKeys * Layout<C::kHeadDim>::kRowBytes;
  };

  typename C::Warp mine;
  const bool capped = !C::kPlain && args.cap > 0.0f;
  const float cap_scale = capped ? args.scale / args.cap : 0.0f;
  const float scale2 = (capped ? args.cap : args.scale) * kLog2E;
#pragma unroll
  for (int tile = 0; tile < C::kStages - 1; ++tile) load(tile);
  for (int tile = 0; computed.has(tile); tile += 2) {
    const int first = computed.first_key(tile) + key_warp * C::kWarpKeys;
    const bool seen = first < warp_end && (C::kPlain || first + C::kWarpKeys > warp_begin);
    const uint32_t k_tile = advance(tile);
    if (seen) {
      mine.multiply_keys(q_tile + warp_row * Layout<C::kHeadDim>::kRowBytes, k_tile);
      if (capped) mine.cap(cap_scale);
      if (first + C::kWarpKeys > dense_end) mine.mask(limits + warp_row, first);
      if (!C::kPlain && first < dense_begin) mine.mask_ahead(firsts + warp_row, first);
      mine.softmax(scale2);
    }
    const uint32_t v_tile = advance(tile + 1);
    if (seen) mine.multiply_values(v_tile);
    computed.pass(tile + 1);
  }
  ptx::cp_async_wait<0>();
  mine.finish_sums();

  const int64_t result_rows = args.q_tokens * args.q_heads;
  Target target = {args.out, args.lse, args.out_dtype, args.accumulate};
  if (partials != nullptr) {
    target.out = partials + blockIdx.z * result_rows * C::kHeadDim;
    target.lse = partials + gridDim.z * result_rows * C::kHeadDim + blockIdx.z * result_rows;
    target.dtype = ScalarType::kFloat32;
    target.accumulate = false;
  }
  const auto row_at = [&](int row) { return rows.token(row) * args.q_heads + rows.head(row); };
  if constexpr (C::kKeyWarps == 1) {
    finish_rows<C>(mine, target, warp_row, rows.rows, row_at);
  } else {
    static_assert(sizeof(WarpPartials<C>) <= C::kStages * C::kTileBytes);
    __syncthreads();  // every warp is done with the slots
    merge_warps<C>(mine, *reinterpret_cast<WarpPartials<C>*>(memory + C::kQueryBytes), target,
                   rows.rows, row_at);
  }
}

template <class C>
void launch_config(const AttentionArgs& args, int pieces, float* partials, cudaStream_t stream) {
  const int64_t blocks = query_block_count(args, C::kRows);
  check_grid(blocks, args.kv_heads);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(args.kv_heads),
                  static_cast<unsigned>(pieces));
  launch("attention_partial", attention_kernel<C>, grid, C::kThreads, C::kSharedBytes, stream, args,
         partials);
}

template <class T, class Shape, bool kPlain>
void launch_dtype(const AttentionArgs& args, int pieces, float* partials, cudaStream_t stream) {
  switch (args.head_dim) {
    case 64:
      return launch_config<Config<T, 64, Shape, kPlain>>(args, pieces, partials, stream);
    case 80:
      return launch_config<Config<T, 80, Shape, kPlain>>(args, pieces, partials, stream);
    case 96:
      return launch_config<Config<T, 96, Shape, kPlain>>(args, pieces, partials, stream);
    default:
      return launch_config<Config<T, 128, Shape, kPlain>>(args, pieces, partials, stream);
  }
}

template <class Shape, bool kPlain>
void launch_shape(const AttentionArgs& args, int pieces, float* partials, cudaStream_t stream) {
  if (args.dtype == ScalarType::kBFloat16) {
    launch_dtype<__nv_bfloat16, Shape, kPlain>(args, pieces, partials, stream);
  } else {
    launch_dtype<__half, Shape, kPlain>(args, pieces, partials, stream);
  }
}

}  // namespace
}  // namespace cptool::cuda::sm80
