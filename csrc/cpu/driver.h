// The structure that every CPU kernel shares: blocks of packed query rows walk their keys in tiles;
// positions say which tiles no row sees (skipped), which need no mask (dense), and which are cut by
// the end of some row's keys or, with a window, by their beginning (masked); the epilogue writes or
// merges.
//
// A kernel is a class, one object per thread:
//
//   static constexpr Kind kKind;
//     Of the partials that it computes.
//   static constexpr int kRows, kKeys;
//     Rows of a full block and keys of a full tile; kKeys divides 128.
//   static int heads(const AttentionArgs&);
//     KV heads of a full block, which holds at most kRows / heads rows of each.
//   static size_t scratch_bytes(const AttentionArgs&);
//   Kernel(const AttentionArgs&, void* scratch, const Context&...);
//   void begin(const RowBlock<kRows>&);
//     Loads the queries and resets the state of the previous block.
//   template <bool masked> void tile(const RowBlock<kRows>&, int64_t key, int keys);
//     Processes keys [key, key + keys) of the sequence, 1 <= keys <= kKeys. If masked, row r sees
//     only keys from block.first[r] to below block.limit[r], possibly none; otherwise every row
//     sees all of them.
//   void finish(const RowBlock<kRows>&);
//     Arranges the accumulators as rows.
//   const float* acc(int row);
//     [head_dim], not yet divided by the sum or, for SiLU attention, max_len.
//   SoftmaxState state(int row);
//     In natural units. Softmax attention alone has it.
//
// Tiles begin at multiples of kKeys, so that a row's result does not depend on where the windows of
// other rows begin. Some row sees the last key of a tile or a later one, so keys beyond all rows
// are never read. Unnamed namespace: see isa.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/scalar.h"
#include "cpu/schedule.h"
#include "cpu/thread_pool.h"
#include "softmax_state.h"

namespace cptool::cpu {
namespace {

inline size_t element_size(ScalarType dtype) { return dtype == ScalarType::kFloat32 ? 4 : 2; }

// How a kernel turns a product q k into weights: 2^(score * factor - maximum), with the score the
// product or, if there is a soft cap, tanh(product * cap_scale).
struct Scores {
  Scores(float scale, float cap)
      : capped(cap > 0),
        cap_scale(capped ? scale / cap : 0.0f),
        factor((capped ? cap : scale) * 1.44269504088896341f) {}

  bool capped;
  float cap_scale, factor;
};

template <int kRows>
struct RowBlock {
  int rows;                // of all its KV heads: the first head's, then the next head's
  int heads;               // consecutive KV heads, each with the same number of rows
  const void* q[kRows];    // the row's query vector
  int64_t out_row[kRows];  // token * q_heads + head: its place in out and lse
  int64_t first[kRows];    // the row sees keys first to limit - 1: both ascend within a head
  int64_t limit[kRows];
  const void* k;  // key 0 of the sequence, first head; key j is k_token_stride * j further
  const void* v;
};

template <int kRows>
inline void load_block(const AttentionArgs& args, const Schedule& schedule, const WorkItem& item,
                       RowBlock<kRows>& block) {
  const int64_t group = args.q_heads / args.kv_heads;
  const int64_t q_size = static_cast<int64_t>(element_size(args.q_dtype));
  const int64_t size = static_cast<int64_t>(element_size(args.dtype));
  block.rows = item.rows * item.kv_heads;
  block.heads = item.kv_heads;
  for (int r = 0; r < block.rows; ++r) {
    const int64_t packed = item.row_begin + r % item.rows;
    const int64_t token = args.cu_q[item.sequence] + packed / group;
    const int64_t head = (item.kv_head + r / item.rows) * group + packed % group;
    block.q[r] = static_cast<const char*>(args.q) +
                 (token * args.q_token_stride + head * args.q_head_stride) * q_size;
    block.out_row[r] = token * args.q_heads + head;
    block.first[r] = schedule.firsts() == nullptr ? 0 : schedule.firsts()[token];
    block.limit[r] = schedule.limits()[token];
  }
  const int64_t first = args.cu_k[item.sequence];
  block.k = static_cast<const char*>(args.k) +
            (first * args.k_token_stride + item.kv_head * args.k_head_stride) * size;
  block.v = static_cast<const char*>(args.v) +
            (first * args.v_token_stride + item.kv_head * args.v_head_stride) * size;
}

// Writes the result of one row: acc / sum, or 0 if it saw no key (acc may then hold anything).
template <class T>
inline void write_out(const float* acc, const SoftmaxState& state, int64_t head_dim, T* out) {
  if (state.empty()) {
    for (int64_t d = 0; d < head_dim; ++d) out[d] = T{};
    return;
  }
  const float factor = 1.0f / state.sum;
#pragma omp simd
  for (int64_t d = 0; d < head_dim; ++d) from_float(acc[d] * factor, out[d]);
}

// Writes one row of the result, or merges it into the existing one. Where neither has seen a key
// the row becomes 0, because the existing memory may hold anything. Not inlined, so that every row
// gets the same instructions: what is contracted to one rounding might differ.
__attribute__((noinline)) inline void write_row(const AttentionArgs& args, int64_t row,
                                                const float* acc, SoftmaxState state) {
  const int64_t head_dim = args.head_dim;
  const int64_t at = row * head_dim;
  if (args.accumulate) {
    SoftmaxState total = SoftmaxState::of_lse(args.lse[row]);
    float* out = static_cast<float*>(args.out) + at;
    if (!total.empty()) {  // otherwise out may hold anything and is ignored
      if (state.empty()) return;
      float keep, add;
      total.merge(state, keep, add);
      keep /= total.sum;
      add /= total.sum;
#pragma omp simd
      for (int64_t d = 0; d < head_dim; ++d) out[d] = out[d] * keep + acc[d] * add;
      args.lse[row] = total.lse();
      return;
    }
  }
  args.lse[row] = state.lse();
  switch (args.out_dtype) {
    case ScalarType::kFloat32:
      return write_out(acc, state, head_dim, static_cast<float*>(args.out) + at);
    case ScalarType::kBFloat16:
      return write_out(acc, state, head_dim, static_cast<BFloat16*>(args.out) + at);
    case ScalarType::kFloat16:
      return write_out(acc, state, head_dim, static_cast<Float16*>(args.out) + at);
  }
}

// The same for a row of SiLU attention, whose partials add up.
__attribute__((noinline)) inline void write_sum(const AttentionArgs& args, int64_t row,
                                                const float* acc) {
  const int64_t head_dim = args.head_dim;
  const auto write = [&](auto* out) __attribute__((always_inline)) {
#pragma omp simd
    for (int64_t d = 0; d < head_dim; ++d) from_float(acc[d] / args.max_len, out[d]);
  };
  if (args.accumulate) {
    float* out = static_cast<float*>(args.out) + row * head_dim;
#pragma omp simd
    for (int64_t d = 0; d < head_dim; ++d) out[d] += acc[d] / args.max_len;
    return;
  }
  with_type(args.out_dtype, [&](auto element) {
    write(static_cast<decltype(element)*>(args.out) + row * head_dim);
  });
}

// Merges the partials of a group of items that cut the keys of the same rows, in the order of their
// keys.
template <int kRows>
inline void merge_group(const AttentionArgs& args, const Schedule& schedule, int32_t split,
                        const RowBlock<kRows>& block, float* acc) {
  int32_t count;
  const WorkItem* items = schedule.group(split, &count);
  for (int r = 0; r < block.rows; ++r) {
    SoftmaxState total;
    for (int64_t d = 0; d < args.head_dim; ++d) acc[d] = 0.0f;
    for (int32_t i = 0; i < count; ++i) {
      const float* out = items[i].partial_out + r * args.head_dim;
      float keep, add;
      total.merge(SoftmaxState::of_lse(items[i].partial_lse[r]), keep, add);
#pragma omp simd
      for (int64_t d = 0; d < args.head_dim; ++d) acc[d] = acc[d] * keep + out[d] * add;
    }
    write_row(args, block.out_row[r], acc, total);
  }
}

// The same for SiLU attention.
template <int kRows>
inline void add_group(const AttentionArgs& args, const Schedule& schedule, int32_t split,
                      const RowBlock<kRows>& block, float* acc) {
  int32_t count;
  const WorkItem* items = schedule.group(split, &count);
  for (int r = 0; r < block.rows; ++r) {
    for (int64_t d = 0; d < args.head_dim; ++d) acc[d] = 0.0f;
    for (int32_t i = 0; i < count; ++i) {
      const float* out = items[i].partial_out + r * args.head_dim;
#pragma omp simd
      for (int64_t d = 0; d < args.head_dim; ++d) acc[d] += out[d];
    }
    write_sum(args, block.out_row[r], acc);
  }
}

// Returns the first key at or after `key`, both at tile borders, of a tile in which some row sees a
// key, or one from which on no row does. `row`: a row before which none sees `key`; raised
// likewise.
template <int kRows>
inline int64_t next_seen(const RowBlock<kRows>& block, int tile_keys, int64_t key, int& row) {
  const int rows = block.rows / block.heads;
  while (row < rows && block.limit[row] <= key) ++row;
  if (row == rows || block.first[row] < key + tile_keys) return key;
  return block.first[row] / tile_keys * tile_keys;
}

// The epilogue of an item of SiLU attention.
template <class Kernel>
inline void write_sums(const AttentionArgs& args, Schedule& schedule, const WorkItem& item,
                       Kernel& kernel, const RowBlock<Kernel::kRows>& block, float* row) {
  for (int r = 0; r < block.rows; ++r) {
    if (item.split < 0) {
      write_sum(args, block.out_row[r], kernel.acc(r));
    } else {
      std::memcpy(item.partial_out + r * args.head_dim, kernel.acc(r),
                  static_cast<size_t>(args.head_dim) * sizeof(float));
    }
  }
  if (item.split >= 0 && schedule.complete(item)) {
    add_group(args, schedule, item.split, block, row);
  }
}

template <class Kernel>
inline void run_item(const AttentionArgs& args, Schedule& schedule, const WorkItem& item,
                     Kernel& kernel, RowBlock<Kernel::kRows>& block, float* row) {
  load_block(args, schedule, item, block);
  kernel.begin(block);
  // A head's rows ascend in position, so the first row has the smallest limit. key_end is at most
  // the largest.
  const int64_t dense_begin = block.first[block.rows - 1], dense_end = block.limit[0];
  int row_seen = 0;
  for (int64_t key = item.key_begin; key < item.key_end; key += Kernel::kKeys) {
    if (key < dense_begin) {
      key = next_seen(block, Kernel::kKeys, key, row_seen);
      if (key >= item.key_end) break;
    }
    const int64_t left = item.key_end - key;
    const int keys = left < Kernel::kKeys ? static_cast<int>(left) : Kernel::kKeys;
    if (key >= dense_begin && key + keys <= dense_end) {
      kernel.template tile<false>(block, key, keys);
    } else {
      kernel.template tile<true>(block, key, keys);
    }
  }
  kernel.finish(block);
  if constexpr (Kernel::kKind == Kind::kSilu) {
    return write_sums(args, schedule, item, kernel, block, row);
  }
  if (item.split < 0) {
    for (int r = 0; r < block.rows; ++r) {
      const SoftmaxState state = kernel.state(r);
      if (!args.accumulate) {
        write_row(args, block.out_row[r], kernel.acc(r), state);
        continue;
      }
      // In the form in which the partials of a group are merged, so that a row that goes with rows
      // that see further keys has the same bits.
      write_out(kernel.acc(r), state, args.head_dim, row);
      write_row(args, block.out_row[r], row, SoftmaxState::of_lse(state.lse()));
    }
    return;
  }
  for (int r = 0; r < block.rows; ++r) {
    const SoftmaxState state = kernel.state(r);
    item.partial_lse[r] = state.lse();
    write_out(kernel.acc(r), state, args.head_dim, item.partial_out + r * args.head_dim);
  }
  if (schedule.complete(item)) merge_group(args, schedule, item.split, block, row);
}

// Computes the whole call on up to `threads` threads. `context` is passed to the constructor of
// each thread's kernel.
template <class Kernel, class... Context>
inline void run(const AttentionArgs& args, int threads, const Context&... context) {
  const int heads = Kernel::heads(args);
  Schedule schedule(args, Kernel::kRows / heads, heads);
  auto body = [&](int) {
    const size_t row_bytes = (static_cast<size_t>(args.head_dim) * sizeof(float) + 63) / 64 * 64;
    char* scratch = static_cast<char*>(thread_scratch(row_bytes + Kernel::scratch_bytes(args)));
    Kernel kernel(args, scratch + row_bytes, context...);
    RowBlock<Kernel::kRows> block;
    while (const WorkItem* item = schedule.next()) {
      run_item(args, schedule, *item, kernel, block, reinterpret_cast<float*>(scratch));
      schedule.count(args, *item);
    }
  };
  using Body = decltype(body);
  run_parallel(
      schedule.useful_threads(threads),
      [](void* self, int thread) { (*static_cast<Body*>(self))(thread); }, &body);
}

}  // namespace
}  // namespace cptool::cpu
