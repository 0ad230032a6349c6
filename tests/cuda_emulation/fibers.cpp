#include "fibers.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "switch.h"

namespace emulation {

Options options;
Counters counters;
Fiber* current = nullptr;
dim3 grid_size, block_size;
std::vector<std::pair<const uint8_t*, const uint8_t*>> readable;

namespace {

const std::function<void()>* kernel_now = nullptr;
std::string failure;
std::vector<Fiber*> ready;
std::vector<std::function<void()>> actions;
uint64_t random_state = 1;
uint32_t blocks_begun = 0;  // in this launch

void thread_main() {
  (*kernel_now)();
  if (!current->copies.empty()) fail("a thread ends while its cp.async are under way");
  --current->block->running;
  leave(*current);
  __builtin_unreachable();
}

// A resident block with its threads.
struct Resident {
  Block block;
  std::vector<uint8_t> memory;
  std::deque<Fiber> fibers;

  Resident(uint3 index, size_t shared_bytes) {
    const unsigned threads = block_size.x * block_size.y * block_size.z;
    memory.assign(shared_bytes + 1024, 0xff);  // NaN, as shared memory may be at first
    const uintptr_t base = reinterpret_cast<uintptr_t>(memory.data());
    block.index = index;
    block.threads = block.running = threads;
    block.shared = memory.data() + (1024 - base % 1024) % 1024;
    block.shared_bytes = shared_bytes;
    block.races = std::make_unique<Races>(++blocks_begun, block.shared, shared_bytes, threads);
    block.warps.resize((threads + kWarp - 1) / kWarp);
    for (unsigned i = 0; i < threads; ++i) {
      fibers.emplace_back();
      Fiber& fiber = fibers.back();
      fiber.block = &block;
      fiber.warp = &block.warps[i / kWarp];
      fiber.lane = i % kWarp;
      fiber.warp->lanes[fiber.lane] = &fiber;
      fiber.thread = {i % block_size.x, i / block_size.x % block_size.y,
                      i / (block_size.x * block_size.y)};
      fiber.knows.slot = i;
      fiber.stack = stacks.take();
      prepare(fiber);
      ready.push_back(&fiber);
    }
    ++counters.blocks;
  }

  ~Resident() {
    for (Fiber& fiber : fibers) {
      stacks.unused.push_back(fiber.stack);
#if !defined(__x86_64__)
      delete static_cast<ucontext_t*>(fiber.stack_pointer);
#endif
    }
  }
};

std::string deadlock(const std::vector<std::unique_ptr<Resident>>& residents) {
  std::string message = "deadlock:";
  for (const auto& resident : residents) {
    for (const Fiber& fiber : resident->fibers) {
      if (fiber.waits_for == nullptr) continue;
      message += " block (" + std::to_string(fiber.block->index.x) + ", " +
                 std::to_string(fiber.block->index.y) + ") thread " +
                 std::to_string(fiber.thread.x) + " waits for " + fiber.waits_for + ";";
      if (message.size() > 1500) return message + " ...";
    }
  }
  return message;
}

template <class T>
T take_any(std::vector<T>& from) {
  const size_t i = random_bits() % from.size();
  T taken = std::move(from[i]);
  from[i] = std::move(from.back());
  from.pop_back();
  return taken;
}

void run_one(const std::vector<std::unique_ptr<Resident>>& residents) {
  const size_t choices = ready.size() + actions.size();
  if (choices == 0) throw std::runtime_error(deadlock(residents));
  if (random_bits() % choices >= ready.size()) {
    take_any(actions)();
  } else {
    current = take_any(ready);
    current->waits_for = nullptr;
    ++counters.switches;
    watch_thread(current->block);
    enter(*current);
    watch_thread(nullptr);
    current = nullptr;
  }
  if (!failure.empty()) throw std::runtime_error(failure);
}

}  // namespace

uint64_t random_bits() {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return (random_state * 0x2545f4914f6cdd1dull) >> 16;
}

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  grid_size = grid;
  block_size = block;
  kernel_now = &kernel;
  random_state = (options.seed + 1) * 0x9e3779b97f4a7c15ull;
  ready.clear();
  actions.clear();
  failure.clear();
  blocks_begun = 0;
  watch_launch();
  std::vector<uint3> waiting;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) waiting.push_back({x, y, z});
  std::vector<std::unique_ptr<Resident>> residents;
  while (!waiting.empty() || !residents.empty()) {
    while (!waiting.empty() && residents.size() < std::max(1u, options.resident)) {
      residents.push_back(std::make_unique<Resident>(take_any(waiting), shared_bytes));
    }
    run_one(residents);
    for (size_t i = 0; i < residents.size(); ++i) {
      if (residents[i]->block.running != 0) continue;
      // Pending asynchronous copies of the block may still access its memory.
      while (!actions.empty()) take_any(actions)();
      residents.erase(residents.begin() + i);
      break;
    }
  }
  if (!failure.empty()) throw std::runtime_error(failure);
}

void fail(const std::string& message) {
  if (current == nullptr) throw std::runtime_error(message);
  failure = "block (" + std::to_string(current->block->index.x) + ", " +
            std::to_string(current->block->index.y) + ") thread " +
            std::to_string(current->thread.x) + ": " + message;
  leave(*current);  // an exception cannot pass from one stack to another
  __builtin_unreachable();
}

void yield() {
  ready.push_back(current);
  leave(*current);
}

void wait(const char* waits_for) {
  current->waits_for = waits_for;
  leave(*current);
}

void wake(Fiber* fiber) { ready.push_back(fiber); }

void later(std::function<void()> action) { actions.push_back(std::move(action)); }

void barrier(int id, int threads, bool wait_there) {
  static const char* const kNames[kBarriers] = {
      "barrier 0",  "barrier 1",  "barrier 2",  "barrier 3", "barrier 4",  "barrier 5",
      "barrier 6",  "barrier 7",  "barrier 8",  "barrier 9", "barrier 10", "barrier 11",
      "barrier 12", "barrier 13", "barrier 14", "barrier 15"};
  if (id < 0 || id >= kBarriers || threads <= 0 || threads % kWarp != 0) {
    fail("barrier " + std::to_string(id) + " of " + std::to_string(threads) + " threads");
  }
  Barrier& there = current->block->barriers[id];
  if (there.arrived == 0) there.expected = threads;
  if (there.expected != threads) {
    fail(kNames[id] + (" of " + std::to_string(threads)) + " threads, where others expect " +
         std::to_string(there.expected));
  }
  ++there.arrived;
  if (options.races) there.published.add(*current);
  if (there.arrived == there.expected) {
    const Moment all = there.published.take();
    if (wait_there) learn(*current, all);
    for (Fiber* fiber : there.waiting) {
      learn(*fiber, all);
      wake(fiber);
    }
    there.waiting.clear();
    there.arrived = 0;
    if (wait_there) yield();
    return;
  }
  if (!wait_there) return;
  there.waiting.push_back(current);
  wait(kNames[id]);
}

void warp_collective(uint32_t mask, Collective run, void* mine, const char* name) {
  const int lane = current->lane;
  if (!(mask >> lane & 1)) fail(std::string(name) + ": the mask lacks the calling lane");
  std::vector<Pending>& pending = current->warp->pending;
  auto here = pending.begin();
  while (here != pending.end() && !(here->mask & mask)) ++here;
  if (here == pending.end()) {
    pending.push_back({mask, 0, run, name, {}});
    here = pending.end() - 1;
  }
  if (here->mask != mask || here->run != run) {
    fail(std::string(name) + ": other lanes of the warp are at " + here->name);
  }
  here->arrived |= 1u << lane;
  here->lanes[lane] = mine;
  if (here->arrived != mask) return wait(name);
  run(here->lanes);
  ++counters.collectives;
  pending.erase(here);
  for (int i = 0; i < kWarp; ++i) {
    if (mask >> i & 1 && i != lane) wake(current->warp->lanes[i]);
  }
  yield();
}

uint32_t shared_address(const void* pointer) {
  const Block& block = *current->block;
  const int64_t offset = static_cast<const uint8_t*>(pointer) - block.shared;
  if (offset < 0 || offset > static_cast<int64_t>(block.shared_bytes)) {
    fail("a shared address outside the block's dynamic shared memory");
  }
  return static_cast<uint32_t>(offset);
}

uint8_t* shared_pointer(uint32_t address, size_t bytes, size_t alignment) {
  const Block& block = *current->block;
  if (address + bytes > block.shared_bytes) {
    fail("shared address " + std::to_string(address) + " + " + std::to_string(bytes) +
         " is beyond the " + std::to_string(block.shared_bytes) + " bytes of the block");
  }
  if (address % alignment != 0) {
    fail("shared address " + std::to_string(address) + " is not aligned to " +
         std::to_string(alignment) + " bytes");
  }
  return block.shared + address;
}

void check_readable(const void* from, size_t bytes, size_t alignment) {
  const uint8_t* begin = static_cast<const uint8_t*>(from);
  if (reinterpret_cast<uintptr_t>(from) % alignment != 0) {
    fail("a global address that is not aligned to " + std::to_string(alignment) + " bytes");
  }
  if (readable.empty()) return;
  for (const auto& range : readable) {
    if (begin >= range.first && begin + bytes <= range.second) return;
  }
  fail("reads global memory that it must not read");
}

void drop(const Copy& copy) {
  std::memcpy(copy.to, copy.from, copy.bytes);
  std::memset(copy.to + copy.bytes, 0, copy.zeros);
}

void drop_copies(int group) {
  std::deque<Copy>& copies = current->copies;
  std::vector<Copy> due;
  while (!copies.empty() && copies.front().group < group) {
    due.push_back(copies.front());
    copies.pop_front();
  }
  copies_end(group);
  while (!due.empty()) drop(take_any(due));
}

}  // namespace emulation
