// Products of few rows with the integers of blocks, whose scales are taken out of the sums:
//
//   x . w = sum over groups of scale * (sum of x * integer) + shift * (sum of x)
//
// A group of 32 weights takes one multiplication for its scale instead of four, and 256 weights one
// for all shifts. All is float32, so the result is that of the widened weights to the rounding of
// float32 sums; for types with a shift, of a sum of |x| (|scale * integer| + |shift|). x is packed
// once per call, in the order in which the integers come (block_groups.h).
//
// Each result is one chain of sums, which depends on its own row of x and of w alone. Up to four
// rows of x are multiplied with four rows of w, a quarter of the piece apart as in
// few_rows_kernel.h. Unnamed namespace: see isa.h.
#pragma once

#include "cpu/block_groups.h"
#include "cpu/few_rows_kernel.h"  // kColumns, sums_of
#include "cpu/isa.h"
#include "cpu/stored_kernel.h"

namespace cptool::cpu {
namespace {

constexpr int kGroupRows = 4;
constexpr int kChunkWeights = kChunkGroups * kGroupWeights;

// Adds one group to acc[r][c], for kRows rows of packed x and kColumns rows of w.
template <class Type, int kRows>
__attribute__((always_inline)) inline void add_group(const uint8_t* w, int64_t gap, const float* x,
                                                     int step, int i,
                                                     const float (&scales)[kColumns][Type::kScales],
                                                     Vector (&acc)[kRows][kColumns]) {
  constexpr int kTogether = kRows == 1 ? 1 : 2;  // columns that share the loads of x
#pragma GCC unroll 4
  for (int first = 0; first < kColumns; first += kTogether) {
    typename Type::Bits bits[kTogether];
    Vector part[kTogether][kRows];
#pragma GCC unroll 2
    for (int c = 0; c < kTogether; ++c) bits[c] = Type::bits(w + (first + c) * gap, step, i);
#pragma GCC unroll 4
    for (int v = 0; v < kGroupVectors; ++v) {
      Vector integers[kTogether];
#pragma GCC unroll 2
      for (int c = 0; c < kTogether; ++c) integers[c] = Type::integers(bits[c], i, v);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const Vector values = load(x + r * kGroupWeights + v * kLanes);
#pragma GCC unroll 2
        for (int c = 0; c < kTogether; ++c) {
          part[c][r] =
              v == 0 ? integers[c] * values : multiply_add(integers[c], values, part[c][r]);
        }
      }
    }
#pragma GCC unroll 2
    for (int c = 0; c < kTogether; ++c) {
      const Vector scale = Type::scale(scales[first + c], step * Type::kStep + i);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        acc[r][first + c] = multiply_add(scale, part[c][r], acc[r][first + c]);
      }
    }
  }
}

// sums[r][c] = x[r] . w[c] for kRows rows of packed x and kColumns rows of w, `gap` bytes apart.
template <class Type, int kRows>
void group_products(const uint8_t* w, int64_t gap, const float* x, int64_t groups,
                    float (&sums)[kGroupRows][kColumns]) {
  Vector acc[kRows][kColumns] = {};
  alignas(32) float scales[kColumns][Type::kScales];
  for (; groups > 0; groups -= kChunkGroups, w += Type::kBlocks * Type::kBytes) {
    const int count = groups < kChunkGroups ? static_cast<int>(groups) : kChunkGroups;
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      Vector shifts;
      Type::scales(w + c * gap, count, scales[c], &shifts);
      if constexpr (Type::kShifted) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          acc[r][c] = multiply_add(shifts, load(x + r * kLanes), acc[r][c]);
        }
      }
    }
    if constexpr (Type::kShifted) x += kRows * kLanes;
    for (int step = 0; step < count / Type::kStep; ++step) {
#pragma GCC unroll 8
      for (int i = 0; i < Type::kStep; ++i, x += kRows * kGroupWeights) {
        add_group<Type, kRows>(w, gap, x, step, i, scales, acc);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sums_of(acc[r], sums[r]);
}

// Rows of x for which the integers of a chunk are widened once, to memory of level 1.
constexpr int kMostGroupRows = 16;

// A chunk of four rows of w, widened: its integers, their scales and shifts.
template <class Type>
struct WidenedChunk {
  alignas(32) float integers[kChunkGroups][kColumns][kGroupWeights];
  alignas(32) float scales[kColumns][Type::kScales];
  Vector shifts[kColumns];
  int groups;

  WidenedChunk(const uint8_t* w, int64_t gap, int count) : groups(count) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      Type::scales(w + c * gap, count, scales[c], &shifts[c]);
      for (int step = 0; step < count / Type::kStep; ++step) {
#pragma GCC unroll 8
        for (int i = 0; i < Type::kStep; ++i) {
          const auto bits = Type::bits(w + c * gap, step, i);
          float* const to = integers[step * Type::kStep + i][c];
#pragma GCC unroll 4
          for (int v = 0; v < kGroupVectors; ++v) {
            store(Type::integers(bits, i, v), to + v * kLanes);
          }
        }
      }
    }
  }
};

// Adds a chunk to acc[r][c] for kRows rows of packed x, as add_group adds each of its groups.
template <class Type, int kRows>
inline void add_chunk(const WidenedChunk<Type>& chunk, const float* x, Vector (*acc)[kColumns]) {
  if constexpr (Type::kShifted) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vector sums = load(x + r * kLanes);
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) {
        acc[r][c] = multiply_add(chunk.shifts[c], sums, acc[r][c]);
      }
    }
    x += kRows * kLanes;
  }
  for (int group = 0; group < chunk.groups; ++group, x += kRows * kGroupWeights) {
#pragma GCC unroll 2
    for (int first = 0; first < kColumns; first += 2) {
      Vector part[2][kRows];
#pragma GCC unroll 4
      for (int v = 0; v < kGroupVectors; ++v) {
        const Vector low = load(chunk.integers[group][first] + v * kLanes);
        const Vector high = load(chunk.integers[group][first + 1] + v * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const Vector values = load(x + r * kGroupWeights + v * kLanes);
          part[0][r] = v == 0 ? low * values : multiply_add(low, values, part[0][r]);
          part[1][r] = v == 0 ? high * values : multiply_add(high, values, part[1][r]);
        }
      }
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) {
        const Vector scale = Type::scale(chunk.scales[first + c], group);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          acc[r][first + c] = multiply_add(scale, part[c][r], acc[r][first + c]);
        }
      }
    }
  }
}

template <class Type>
struct GroupColumns {
  static constexpr int64_t kChunkFloats = kChunkWeights + (Type::kShifted ? kLanes : 0);

  // Floats of a packed row.
  static int64_t row_floats(int64_t depth) {
    return (depth + kChunkWeights - 1) / kChunkWeights * kChunkFloats;
  }

  // Calls run(first row, rows) for as few groups of rows as there can be.
  template <class Run>
  static void in_groups(int64_t rows, const Run& run) {
    for (int64_t row = 0; row < rows; row += kGroupRows) {
      run(row, rows - row < kGroupRows ? rows - row : kGroupRows);
    }
  }

  // Packs kGroupRows rows together: for each chunk, the sums of each row's groups if there are
  // shifts, then each group as [row][its vectors].
  static void pack(const StoredLinearArgs& args, float* to) {
    const int64_t depth = args.w.depth;
    in_groups(args.rows, [&](int64_t first, int64_t rows) {
      float* at = to + first * row_floats(depth);
      for (int64_t begin = 0; begin < depth; begin += kChunkWeights) {
        const int64_t left = depth - begin < kChunkWeights ? depth - begin : kChunkWeights;
        const int count = static_cast<int>(left) / kGroupWeights;
        const float* const x = args.x + first * args.x_stride + begin;
        if constexpr (Type::kShifted) {
          for (int64_t r = 0; r < rows; ++r, at += kLanes)
            pack_sums(x + r * args.x_stride, count, at);
        }
        for (int group = 0; group < count; ++group) {
          for (int64_t r = 0; r < rows; ++r, at += kGroupWeights) {
            pack_group(x + r * args.x_stride + group * kGroupWeights, group % Type::kStep, at);
          }
        }
      }
    });
  }

  static void pack_group(const float* x, int i, float* to) {
    for (int v = 0; v < kGroupVectors; ++v) {
      const float factor = Type::factor(i, v);
      for (int lane = 0; lane < kLanes; ++lane) {
        to[v * kLanes + lane] = factor * x[Type::weight(v, lane)];
      }
    }
  }

  static void pack_sums(const float* x, int count, float* to) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const int group = Type::shift_of(lane);
      if (group >= count) {
        to[lane] = 0;
        continue;
      }
      const float* const from = x + group * kGroupWeights;
      to[lane] = Type::kSign * sum(load(from) + load(from + kLanes) + load(from + 2 * kLanes) +
                                   load(from + 3 * kLanes));
    }
  }

  // Computes the columns that four rows of the file make, `apart` rows from each other, of more
  // rows of x than are multiplied at a time.
  static void columns_of_many(const StoredLinearArgs& args, const float* packed, int64_t column,
                              int64_t apart) {
    const uint8_t* w = static_cast<const uint8_t*>(args.w.at) + column * args.w.stride;
    const int64_t gap = apart * args.w.stride, depth = args.w.depth;
    Vector acc[kMostGroupRows][kColumns] = {};
    for (int64_t begin = 0; begin < depth; begin += kChunkWeights) {
      const int64_t left = depth - begin < kChunkWeights ? depth - begin : kChunkWeights;
      const WidenedChunk<Type> chunk(w, gap, static_cast<int>(left) / kGroupWeights);
      in_groups(args.rows, [&](int64_t first, int64_t rows) {
        const float* x =
            packed + first * row_floats(depth) + begin / kChunkWeights * rows * kChunkFloats;
        switch (rows) {
          case 1:
            return add_chunk<Type, 1>(chunk, x, acc + first);
          case 2:
            return add_chunk<Type, 2>(chunk, x, acc + first);
          case 3:
            return add_chunk<Type, 3>(chunk, x, acc + first);
          default:
            return add_chunk<Type, 4>(chunk, x, acc + first);
        }
      });
      w += Type::kBlocks * Type::kBytes;
    }
    for (int64_t r = 0; r < args.rows; ++r) {
      float sums[kColumns];
      sums_of(acc[r], sums);
      put_columns(args, r, sums, column, apart);
    }
  }

  // Computes the columns that four rows of the file make, `apart` rows from each other.
  static void columns(const StoredLinearArgs& args, const float* packed, int64_t column,
                      int64_t apart) {
    if (args.rows > kGroupRows && args.rows <= kMostGroupRows) {
      return columns_of_many(args, packed, column, apart);
    }
    const uint8_t* w = static_cast<const uint8_t*>(args.w.at) + column * args.w.stride;
    const int64_t gap = apart * args.w.stride, groups = args.w.depth / kGroupWeights;
    in_groups(args.rows, [&](int64_t first, int64_t rows) {
      const float* x = packed + first * row_floats(args.w.depth);
      float sums[kGroupRows][kColumns];
      switch (rows) {
        case 1:
          group_products<Type, 1>(w, gap, x, groups, sums);
          break;
        case 2:
          group_products<Type, 2>(w, gap, x, groups, sums);
          break;
        case 3:
          group_products<Type, 3>(w, gap, x, groups, sums);
          break;
        default:
          group_products<Type, 4>(w, gap, x, groups, sums);
      }
      for (int64_t r = 0; r < rows; ++r) put_columns(args, first + r, sums[r], column, apart);
    });
  }
};

// Returns run(GroupColumns) for the encoding, or else() if it has no groups.
template <class Run, class Else>
inline auto with_groups(Encoding encoding, const Run& run, const Else& otherwise) {
  switch (encoding) {
    case Encoding::kQ4_0:
      return run(GroupColumns<TableGroups<kFromMinusEight>>{});
    case Encoding::kQ4_1:
      return run(GroupColumns<Q41Groups>{});
    case Encoding::kQ5_0:
      return run(GroupColumns<Q50Groups>{});
    case Encoding::kQ5_1:
      return run(GroupColumns<Q51Groups>{});
    case Encoding::kQ8_0:
      return run(GroupColumns<Q8Groups>{});
    case Encoding::kQ4_K:
      return run(GroupColumns<Q4KGroups>{});
    case Encoding::kQ5_K:
      return run(GroupColumns<Q5KGroups>{});
    case Encoding::kQ6_K:
      return run(GroupColumns<Q6KGroups>{});
    case Encoding::kIQ4_NL:
      return run(GroupColumns<TableGroups<kUneven>>{});
    case Encoding::kIQ4_XS:
      return run(GroupColumns<IQ4XSGroups>{});
    default:
      return otherwise();
  }
}

constexpr StoredKernels kStoredGroups = {
    [](Encoding) { return true; },
    [](Encoding encoding) {
      return with_groups(
          encoding, [](auto) { return kMostGroupRows; },
          [=] { return kStored.most_rows(encoding); });
    },
    [](const StoredLinearArgs& args) -> int64_t {
      return with_groups(
          args.w.encoding,
          [&](auto columns) -> int64_t { return args.rows * columns.row_floats(args.w.depth) * 4; },
          []() -> int64_t { return 0; });
    },
    [](const StoredLinearArgs& args, void* packed) {
      with_groups(
          args.w.encoding, [&](auto columns) { columns.pack(args, static_cast<float*>(packed)); },
          [] {});
    },
    [](const StoredLinearArgs& args, const void* packed, int64_t begin, int64_t end) {
      with_groups(
          args.w.encoding,
          [&](auto columns) {
            const float* const x = static_cast<const float*>(packed);
            const int64_t apart = (end - begin) / kColumns;
            for (int64_t n = begin; n < begin + apart; ++n) columns.columns(args, x, n, apart);
            for (int64_t n = begin + kColumns * apart; n < end; ++n) columns.columns(args, x, n, 0);
          },
          [&] { kStored.columns(args, packed, begin, end); });
    },
    kStored.widen,
};

}  // namespace
}  // namespace cptool::cpu
