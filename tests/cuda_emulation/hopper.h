// What compute capability 9.0 adds, emulated: mbarriers, TMA and warpgroups, for cuda/sm90/ptx.h.
#pragma once

#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cuda/sm90/tensor_map.h"
#include "fibers.h"

namespace emulation {

constexpr int kWarpgroupThreads = 128;
constexpr uint32_t kInFlight = 0x7fadcba9;  // accumulators in flight: a NaN that arithmetic changes

struct Mbarrier {
  uint32_t arrivals;    // of a phase
  uint32_t pending;     // of this one
  int64_t bytes = 0;    // still to come in this one
  uint32_t parity = 0;  // of this one
  Fiber* made_by = nullptr;
  bool proxied = false;  // a fence of that thread has told TMA that it exists
  std::vector<Fiber*> waiting;

  // What orders accesses: what this phase's arrivals know, what those of the last phases of both
  // parities knew, the loads' slot, and the phases that are over.
  Publication published;
  Moment known[2];
  uint32_t slot = 0, over = 0;
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
  // A collective at which some threads have arrived.
  const char* name = nullptr;
  int arrived = 0;
  void* threads[kWarpgroupThreads];
  Fiber* members[kWarpgroupThreads];
  std::vector<Fiber*> waiting;

  bool fenced = false;
  bool late = false;                   // the open group's products
  uint32_t slot = kNoSlot, ended = 0;  // in races.h: the products', and groups that have ended
  uint64_t issued = 0;
  std::deque<std::vector<Product>> groups;  // committed, oldest first; the last one is open
  // Results that no wait has made visible yet: the accumulators of thread i, by their address in
  // thread 0.
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
  touch(block.shared + address, 8, false);  // ordered after its initialisation
  return found->second;
}

inline void end_phase_if_complete(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  if (options.races) {
    barrier.published.add(barrier.slot, ++barrier.over);
    barrier.known[barrier.parity] = barrier.published.take();
  }
  barrier.pending = barrier.arrivals;
  barrier.parity ^= 1;
  for (Fiber* fiber : barrier.waiting) wake(fiber);
  barrier.waiting.clear();
}

inline void arrive_at(uint32_t address, uint32_t bytes) {
  Mbarrier& barrier = mbarrier_at(*current->block, address);
  if (barrier.pending == 0) fail("more arrivals at an mbarrier than it waits for");
  if (barrier.bytes + bytes >= 1 << 20) fail("an mbarrier cannot count as many bytes");
  if (options.races) barrier.published.add(*current);
  barrier.bytes += bytes;
  --barrier.pending;
  end_phase_if_complete(barrier);
}

// Returns the address that a 128-byte-swizzled access to `address` reaches: in every 1024 bytes,
// 16-byte chunk c of 128-byte row r is exchanged with chunk c ^ r.
UNREPORTED inline uint32_t swizzled_128(uint32_t address) {
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
UNREPORTED inline void copy_box(Block* block, uint32_t to, const cptool::cuda::TensorMap& map,
                                int32_t x, int32_t y, int32_t z, uint32_t begin, uint32_t end) {
  uint8_t* const proxy = hopper(*block).proxy.data();
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
      std::memcpy(proxy + at, &element, 2);
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
  group.members[thread % kWarpgroupThreads] = current;
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

}  // namespace emulation
