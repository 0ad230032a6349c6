// In the place of csrc/cuda/sm90/ptx.h: mbarriers, TMA, wgmma and the fences between them, after
// the PTX ISA manual and apart from what the kernel knows of layouts.
//
// What is asynchronous happens at a random moment between its issue and the wait for it. Until then
// what it writes is NaN: the destination of a copy, the accumulators of products. Operands are read
// at that moment: shared memory that is filled anew too early, or a fragment that is overwritten
// while in flight, shows. TMA and wgmma see shared memory through a proxy of their own, kept here
// as a second copy: what threads write reaches it with their fence.proxy.async alone.
#pragma once

#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cuda/ptx.h"
#include "cuda/sm90/tensor_map.h"
#include "fibers.h"

namespace emulation {

constexpr int kWarpgroupThreads = 128;
constexpr uint32_t kInFlight = 0x7fadcba9;  // accumulators in flight: a NaN that arithmetic changes

struct Mbarrier {
  uint32_t arrivals;     // of a phase
  uint32_t pending;      // of this one
  int64_t bytes = 0;     // still to come in this one
  uint32_t parity = 0;   // of this one
  bool proxied = false;  // a fence has told TMA that it exists
  std::vector<Fiber*> waiting;
};

// One wgmma.mma_async of a warpgroup.
struct Product {
  int columns;
  float (*decode)(uint16_t);
  uint64_t a, b;  // descriptors
  bool a_in_registers, accumulate, transposed;
  float* d[kWarpgroupThreads];  // each thread's accumulators
  const uint32_t* fragments[kWarpgroupThreads];
  uint64_t number;
  bool done = false;
};

struct Warpgroup {
  // A collective that some threads have arrived at.
  const char* name = nullptr;
  int arrived = 0;
  void* threads[kWarpgroupThreads];
  std::vector<Fiber*> waiting;

  bool fenced = false;
  bool late = false;  // the open group's products
  uint64_t issued = 0;
  std::deque<std::vector<Product>> groups;  // committed, oldest first; the last one is open
  // Results that no wait has shown yet: the accumulators of thread i, by their place in thread 0.
  std::map<float*, std::vector<float>> results;

  Warpgroup() : groups(1) {}
};

struct Hopper {
  std::map<uint32_t, Mbarrier> mbarriers;
  std::vector<uint8_t> proxy;  // shared memory as TMA and wgmma see it
  std::map<int, Warpgroup> warpgroups;
};

inline Hopper& hopper(Block& block) {
  if (block.extension == nullptr) {
    auto made = std::make_shared<Hopper>();
    made->proxy.assign(block.shared_bytes, 0xff);
    block.extension = made;
  }
  return *static_cast<Hopper*>(block.extension.get());
}

inline Mbarrier& mbarrier_at(Block& block, uint32_t address) {
  auto& all = hopper(block).mbarriers;
  const auto found = all.find(address);
  if (found == all.end()) fail("no mbarrier is initialised at " + std::to_string(address));
  return found->second;
}

inline void end_phase_if_complete(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.arrivals;
  barrier.parity ^= 1;
  for (Fiber* fiber : barrier.waiting) wake(fiber);
  barrier.waiting.clear();
}

inline void arrive_at(uint32_t address, uint32_t bytes) {
  Mbarrier& barrier = mbarrier_at(*current->block, address);
  if (barrier.pending == 0) fail("more arrivals at an mbarrier than it waits for");
  barrier.bytes += bytes;
  --barrier.pending;
  end_phase_if_complete(barrier);
}

// The address at which a 128-byte-swizzled access to `address` ends: in every 1024 bytes, the
// 16-byte chunk of a 128-byte row is exchanged for that whose number differs by the row's.
inline uint32_t swizzled_128(uint32_t address) {
  const uint32_t row = address / 128 % 8, chunk = address / 16 % 8;
  return address / 128 * 128 + (row ^ chunk) * 16 + address % 16;
}

// Runs `action` later, on average after `patience` times as long as later() would.
inline void much_later(uint64_t patience, std::function<void()> action) {
  later([=] {
    if (random_bits() % patience) return much_later(patience, action);
    action();
  });
}

// Copies rows [begin, end) of a box, a row being the `columns` of one head of one token.
inline void copy_box(Block* block, uint32_t to, const cptool::cuda::TensorMap& map, int32_t x,
                     int32_t y, int32_t z, uint32_t begin, uint32_t end) {
  for (uint32_t row = begin; row < end; ++row) {
    const int64_t head = y + row % map.box[1], token = z + row / map.box[1];
    for (uint32_t c = 0; c < map.box[0]; ++c) {
      const int64_t column = x + static_cast<int64_t>(c);
      const bool inside = column >= 0 && column < static_cast<int64_t>(map.sizes[0]) && head >= 0 &&
                          head < static_cast<int64_t>(map.sizes[1]) && token >= 0 &&
                          token < static_cast<int64_t>(map.sizes[2]);
      uint16_t element = 0;
      if (inside) {
        std::memcpy(&element,
                    map.tensor + 2 * column + head * map.strides[1] + token * map.strides[2], 2);
      }
      const uint32_t at = swizzled_128(to + row * 128 + 2 * c);
      std::memcpy(block->shared + at, &element, 2);
      std::memcpy(hopper(*block).proxy.data() + at, &element, 2);
    }
  }
}

// All 128 threads of the warpgroup meet; the last one runs `run`.
inline void warpgroup_collective(void (*run)(Block&, Warpgroup&), void* mine, const char* name) {
  const int thread = static_cast<int>(current->thread.x);
  Warpgroup& group = hopper(*current->block).warpgroups[thread / kWarpgroupThreads];
  if (group.arrived > 0 && std::strcmp(group.name, name) != 0) {
    fail(std::string(name) + ": other threads of the warpgroup are at " + group.name);
  }
  group.name = name;
  group.threads[thread % kWarpgroupThreads] = mine;
  if (++group.arrived < kWarpgroupThreads) {
    group.waiting.push_back(current);
    return wait(name);
  }
  run(*current->block, group);
  ++counters.collectives;
  group.arrived = 0;
  for (Fiber* fiber : group.waiting) wake(fiber);
  group.waiting.clear();
  yield();
}

struct MatrixDescriptor {
  uint32_t start, leading, stride, base_offset, swizzle;

  explicit MatrixDescriptor(uint64_t bits)
      : start((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4),
        base_offset(bits >> 49 & 7),
        swizzle(bits >> 62) {
    if (swizzle != 1) fail("wgmma: the emulation knows the 128-byte swizzle alone");
    // The pattern must start where the operand does, on a multiple of 1024 bytes.
    if (base_offset != 0 || start / 128 % 8 != 0) fail("wgmma: the swizzle is out of step");
  }

  // The element in row `row` along M or N and column `k` of the sum.
  uint16_t element(const std::vector<uint8_t>& memory, int row, int k, bool transposed) const {
    const uint32_t offset = transposed
                                ? row / 64 * leading + row % 64 * 2 + k / 8 * stride + k % 8 * 128
                                : row / 8 * stride + row % 8 * 128 + k * 2;
    const uint32_t at = swizzled_128(start + offset);
    if (at + 2 > memory.size()) fail("wgmma: reads beyond shared memory");
    uint16_t element;
    std::memcpy(&element, memory.data() + at, 2);
    return element;
  }
};

inline void execute(Block& block, Warpgroup& group, Product& product) {
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
  std::vector<float>& result = group.results.at(product.d[0]);
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

// Ends all but the newest `pending` committed groups and shows the results that nothing in flight
// still adds to.
inline void end_groups(Block& block, Warpgroup& group, size_t pending) {
  if (!group.groups.back().empty()) fail("wgmma.wait_group: products were not committed");
  while (group.groups.size() - 1 > pending) {
    for (Product& product : group.groups.front()) execute(block, group, product);
    std::vector<Product> ended = std::move(group.groups.front());
    group.groups.pop_front();
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
  group.fenced = false;
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

namespace cptool::cuda::ptx {

inline void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  emulation::shared_pointer(barrier, 8, 8);
  emulation::Mbarrier made = {};
  made.arrivals = made.pending = arrivals;
  emulation::hopper(*emulation::current->block).mbarriers[barrier] = made;
}

inline void fence_mbarrier_init() {
  for (auto& barrier : emulation::hopper(*emulation::current->block).mbarriers) {
    barrier.second.proxied = true;
  }
}

inline void fence_proxy_async() {
  emulation::Block& block = *emulation::current->block;
  std::memcpy(emulation::hopper(block).proxy.data(), block.shared, block.shared_bytes);
}

inline void mbarrier_arrive(uint32_t barrier) { emulation::arrive_at(barrier, 0); }

inline void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  emulation::arrive_at(barrier, bytes);
}

inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  using namespace emulation;
  Mbarrier& waited = mbarrier_at(*current->block, barrier);
  while (waited.parity == parity) {
    waited.waiting.push_back(current);
    wait("an mbarrier");
  }
}

inline void barrier_sync(uint32_t id, uint32_t threads) {
  emulation::barrier(static_cast<int>(id), static_cast<int>(threads), true);
}
inline void barrier_arrive(uint32_t id, uint32_t threads) {
  emulation::barrier(static_cast<int>(id), static_cast<int>(threads), false);
}

template <int kRegisters>
void registers_shrink() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}
template <int kRegisters>
void registers_grow() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}

inline void prefetch(const TensorMap&) {}

inline void load_box(uint32_t to, const TensorMap& map, int32_t x, int32_t y, int32_t z,
                     uint32_t barrier) {
  using namespace emulation;
  Block* const block = current->block;
  const uint32_t rows = map.box[1] * map.box[2];
  uint8_t* const there = shared_pointer(to, rows * 128, 128);
  if (!mbarrier_at(*block, barrier).proxied)
    fail("TMA: no fence since its mbarrier was initialised");
  check_unread(*block, to, to + rows * 128);
  std::memset(there, 0xff, rows * 128);
  std::memset(hopper(*block).proxy.data() + to, 0xff, rows * 128);
  const TensorMap copy = map;
  const uint64_t patience = random_bits() % 2 ? 1 : 100;
  for (int half = 0; half < 2; ++half) {
    const uint32_t begin = half == 0 ? 0 : rows / 2, end = half == 0 ? rows / 2 : rows;
    if (begin == end) continue;
    much_later(patience, [=] {
      copy_box(block, to, copy, x, y, z, begin, end);
      Mbarrier& waiting = mbarrier_at(*block, barrier);
      waiting.bytes -= (end - begin) * 128;
      if (waiting.bytes < 0) fail("TMA: more bytes than the mbarrier expects");
      end_phase_if_complete(waiting);
    });
  }
}

inline void wgmma_fence() {
  char nothing;
  emulation::warpgroup_collective(
      [](emulation::Block&, emulation::Warpgroup& group) { group.fenced = true; }, &nothing,
      "wgmma.fence");
}

inline void wgmma_commit() {
  char nothing;
  emulation::warpgroup_collective(
      [](emulation::Block&, emulation::Warpgroup& group) { group.groups.emplace_back(); }, &nothing,
      "wgmma.commit_group");
}

template <int kPending>
void wgmma_wait() {
  char nothing;
  emulation::warpgroup_collective(
      [](emulation::Block& block, emulation::Warpgroup& group) {
        emulation::end_groups(block, group, kPending);
      },
      &nothing, "wgmma.wait_group");
}

template <class Register, int kCount>
void keep_in_place(Register (&)[kCount]) {}

template <class T>
float decode(uint16_t bits) {
  return element<T>(bits, 0);
}

template <class T>
void wgmma_shared(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  emulation::IssuedProduct mine = {};
  mine.product.columns = 128;
  mine.product.decode = decode<T>;
  mine.product.a = a;
  mine.product.b = b;
  mine.product.accumulate = accumulate;
  mine.product.d[0] = d;
  emulation::warpgroup_collective(emulation::IssuedProduct::run, &mine, "wgmma.mma_async");
}

template <class T, int kCount>
void wgmma_registers(float (&d)[kCount], const uint32_t* a, uint64_t b) {
  emulation::IssuedProduct mine = {};
  mine.product.columns = 2 * kCount;
  mine.product.decode = decode<T>;
  mine.product.b = b;
  mine.product.a_in_registers = mine.product.accumulate = mine.product.transposed = true;
  mine.product.d[0] = d;
  mine.product.fragments[0] = a;
  emulation::warpgroup_collective(emulation::IssuedProduct::run, &mine, "wgmma.mma_async");
}

}  // namespace cptool::cuda::ptx
