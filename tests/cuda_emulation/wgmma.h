// The products of a warpgroup (wgmma), emulated, for cuda/sm90/ptx.h.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "cuda/ptx.h"
#include "hopper.h"

namespace emulation {

struct MatrixDescriptor {
  uint32_t start, leading, stride, base_offset, swizzle;

  UNREPORTED explicit MatrixDescriptor(uint64_t bits)
      : start((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4),
        base_offset(bits >> 49 & 7),
        swizzle(bits >> 62) {
    if (swizzle != 1) fail("wgmma: the emulation knows the 128-byte swizzle alone");
    // The swizzle pattern must start where the operand does, at a multiple of 1024 bytes.
    if (base_offset != 0 || start / 128 % 8 != 0) fail("wgmma: the swizzle is out of step");
  }

  // Where the element in row `row` along M or N and column `k` of the sum is.
  UNREPORTED uint32_t place(int row, int k, bool transposed) const {
    const uint32_t offset = transposed
                                ? row / 64 * leading + row % 64 * 2 + k / 8 * stride + k % 8 * 128
                                : row / 8 * stride + row % 8 * 128 + k * 2;
    return swizzled_128(start + offset);
  }

  UNREPORTED uint16_t element(const std::vector<uint8_t>& memory, int row, int k,
                              bool transposed) const {
    const uint32_t at = place(row, k, transposed);
    if (at + 2 > memory.size()) fail("wgmma: reads beyond shared memory");
    uint16_t element;
    std::memcpy(&element, memory.data() + at, 2);
    return element;
  }
};

UNREPORTED inline void execute(Block& block, Warpgroup& group, Product& product) {
  if (product.done) return;
  product.done = true;
  const std::vector<uint8_t>& memory = hopper(block).proxy;
  static float a[64][16], b[16][256], d[64][256];
  const int columns = product.columns;
  if (!product.a_in_registers) {
    const MatrixDescriptor from(product.a);
    for (int m = 0; m < 64; ++m)
      for (int k = 0; k < 16; ++k) a[m][k] = product.decode(from.element(memory, m, k, false));
  }
  const MatrixDescriptor from(product.b);
  for (int k = 0; k < 16; ++k)
    for (int n = 0; n < columns; ++n)
      b[k][n] = product.decode(from.element(memory, n, k, product.transposed));
  float* const result = group.results.at(product.d[0]).data();
  for (int i = 0; i < kWarpgroupThreads; ++i) {
    const int row = i / 32 * 16 + i % 32 / 4, t = i % 4;
    for (int half = 0; half < 2; ++half) {
      for (int n = 0; n < columns / 8; ++n)
        for (int e = 0; e < 2; ++e)
          d[row + 8 * half][8 * n + 2 * t + e] =
              product.accumulate ? result[i * columns / 2 + 4 * n + 2 * half + e] : 0.0f;
      if (!product.a_in_registers) continue;
      for (int upper = 0; upper < 2; ++upper) {  // columns 8 to 15
        const uint32_t both = product.fragments[i][half + 2 * upper];
        a[row + 8 * half][8 * upper + 2 * t] = product.decode(both & 0xffff);
        a[row + 8 * half][8 * upper + 2 * t + 1] = product.decode(both >> 16);
      }
    }
  }
  for (int m = 0; m < 64; ++m)
    for (int k = 0; k < 16; ++k) {
      const float factor = a[m][k];
      for (int n = 0; n < columns; ++n) d[m][n] += factor * b[k][n];
    }
  for (int i = 0; i < kWarpgroupThreads; ++i) {
    const int row = i / 32 * 16 + i % 32 / 4, t = i % 4;
    for (int half = 0; half < 2; ++half)
      for (int n = 0; n < columns / 8; ++n)
        for (int e = 0; e < 2; ++e)
          result[i * columns / 2 + 4 * n + 2 * half + e] = d[row + 8 * half][8 * n + 2 * t + e];
  }
}

// Fails if a product in flight has an operand that starts in these bytes.
inline void check_unread(Block& block, uint32_t begin, uint32_t end) {
  for (const auto& entry : hopper(block).warpgroups)
    for (const auto& products : entry.second.groups)
      for (const Product& product : products) {
        if (product.done) continue;
        const uint32_t a = (product.a & 0x3fff) << 4, b = (product.b & 0x3fff) << 4;
        const bool reads_a = !product.a_in_registers && a >= begin && a < end;
        if (reads_a || (b >= begin && b < end)) {
          fail("TMA: overwrites what a product in flight has yet to read");
        }
      }
}

// Executes all products up to number `last`: they run in the order of their issue.
inline void execute_up_to(Block& block, Warpgroup& group, uint64_t last) {
  for (auto& products : group.groups)
    for (Product& product : products)
      if (product.number <= last) execute(block, group, product);
}

// Ends all but the newest `pending` committed groups, and makes the results visible to which no
// product in flight adds.
UNREPORTED inline void end_groups(Block& block, Warpgroup& group, size_t pending) {
  if (!group.groups.back().empty()) fail("wgmma.wait_group: products were not committed");
  while (group.groups.size() - 1 > pending) {
    for (Product& product : group.groups.front()) execute(block, group, product);
    std::vector<Product> ended = std::move(group.groups.front());
    group.groups.pop_front();
    ++group.ended;
    for (const Product& product : ended) {
      const auto result = group.results.find(product.d[0]);
      bool in_flight = result == group.results.end();
      for (const auto& products : group.groups)
        for (const Product& other : products) in_flight |= other.d[0] == product.d[0];
      if (in_flight) continue;
      const int count = product.columns / 2;
      for (int i = 0; i < kWarpgroupThreads; ++i) {
        for (int j = 0; j < count; ++j) {
          if (__float_as_uint(product.d[i][j]) != kInFlight) {
            fail("wgmma: accumulators were written while in flight");
          }
          product.d[i][j] = result->second[i * count + j];
        }
      }
      group.results.erase(result);
    }
  }
  if (options.races && group.slot != kNoSlot) {
    Publication ended;
    ended.add(group.slot, group.ended);
    const Moment all = ended.take();
    for (Fiber* fiber : group.members) learn(*fiber, all);
  }
  group.fenced = false;
}

// Notes which chunks of shared memory a product reads.
inline void note_reads(Block& block, Warpgroup& group, const Product& product) {
  if (!options.races) return;
  if (group.slot == kNoSlot) {
    const int number = static_cast<int>(current->thread.x) / kWarpgroupThreads;
    group.slot = new_slot(block, "wgmma of warpgroup " + std::to_string(number));
  }
  std::vector<uint32_t> chunks;
  const auto add = [&](uint64_t descriptor, int rows, bool transposed) {
    const MatrixDescriptor from(descriptor);
    for (int row = 0; row < rows; row += transposed ? 8 : 1)
      for (int k = 0; k < 16; k += transposed ? 1 : 8)
        chunks.push_back(from.place(row, k, transposed));
  };
  if (!product.a_in_registers) add(product.a, 64, false);
  add(product.b, product.columns, product.transposed);
  const uint32_t number = group.ended + static_cast<uint32_t>(group.groups.size());
  asynchronous_read(chunks, 16, {0, group.slot, number}, group.members, kWarpgroupThreads);
}

struct IssuedProduct {
  Product product;  // d[0] and fragments[0] are this thread's

  static void run(Block& block, Warpgroup& group) {
    if (!group.fenced) fail("wgmma.mma_async: no wgmma.fence since the registers were last free");
    Product product = static_cast<IssuedProduct*>(group.threads[0])->product;
    for (int i = 0; i < kWarpgroupThreads; ++i) {
      const Product& mine = static_cast<IssuedProduct*>(group.threads[i])->product;
      if (mine.a != product.a || mine.b != product.b || mine.accumulate != product.accumulate) {
        fail("wgmma.mma_async: threads of a warpgroup disagree");
      }
      product.d[i] = mine.d[0];
      product.fragments[i] = mine.fragments[0];
    }
    note_reads(block, group, product);
    const int count = product.columns / 2;
    auto& result = group.results[product.d[0]];
    if (result.empty()) {
      result.resize(kWarpgroupThreads * count);
      for (int i = 0; i < kWarpgroupThreads; ++i) {
        std::memcpy(&result[i * count], product.d[i], count * sizeof(float));
        std::fill(product.d[i], product.d[i] + count, __uint_as_float(kInFlight));
      }
    }
    // Half of the groups are as late as the wait for them.
    if (group.groups.back().empty()) group.late = random_bits() % 2;
    const uint64_t number = product.number = group.issued++;
    group.groups.back().push_back(product);
    if (group.late) return;
    Block* const at = &block;
    Warpgroup* const of = &group;
    later([=] { execute_up_to(*at, *of, number); });
  }
};

}  // namespace emulation
