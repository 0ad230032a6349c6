#include "races.h"

#include <algorithm>

#include "fibers.h"

namespace emulation {

std::vector<std::pair<const uint8_t*, const uint8_t*>> watched;

namespace {

std::vector<Shadow> global_shadows;  // of `watched`

// Where accesses of the running thread are looked at: almost all are to its stack.
struct Window {
  uintptr_t begin = 0, bytes = 0;
} shared_window, global_window;

bool within(const Window& window, const void* at) {
  return reinterpret_cast<uintptr_t>(at) - window.begin < window.bytes;
}

uint32_t known(const Times& times, uint32_t slot) { return slot < times.size() ? times[slot] : 0; }

bool published(const Access& access, const Knowledge& to) {
  return to.others != nullptr && access.time <= known(*to.others, access.slot);
}

// Whether the running thread, or anything that it begins now, comes after an access.
bool follows(const Fiber& fiber, const Access& access) {
  if (access.time == 0) return true;
  if (access.block != fiber.block->races->block) return false;
  const Knowledge& mine = fiber.knows;
  if (access.slot == mine.slot) return true;
  if (access.slot == mine.copies_slot) return access.time <= mine.copies_done;
  return published(access, mine);
}

std::string name_of(const Access& access, const Fiber& fiber) {
  const Races& races = *fiber.block->races;
  if (access.block != races.block) return "another thread block";
  return races.slots[access.slot];
}

[[noreturn]] void report(const Shadow& shadow, const Cell& cell, const char* now,
                         const Access& before, const char* then, const Fiber& fiber) {
  const size_t offset = 4 * (&cell - shadow.cells.data());
  fail("race at " + std::string(shadow.shared ? "shared" : "global") + " offset " +
       std::to_string(offset) + ": " + now + ", and nothing orders it after the " + then + " of " +
       name_of(before, fiber));
}

void check_written(const Shadow& shadow, const Cell& cell, const char* now, const Fiber& fiber) {
  if (!follows(fiber, cell.written)) report(shadow, cell, now, cell.written, "write", fiber);
}

// A write must follow the last write and all reads since.
void begin_write(Shadow& shadow, Cell& cell, const char* now, const Fiber& fiber) {
  check_written(shadow, cell, now, fiber);
  if (!follows(fiber, cell.read)) report(shadow, cell, now, cell.read, "read", fiber);
  if (cell.readers != 0) {
    std::vector<Access>& list = shadow.lists[cell.readers - 1];
    for (const Access& read : list) {
      if (!follows(fiber, read)) report(shadow, cell, now, read, "read", fiber);
    }
    list.clear();
    shadow.unused_lists.push_back(cell.readers);
    cell.readers = 0;
  }
  cell.read = {};
}

bool same(const Access& a, const Access& b) {
  return a.time == b.time && a.slot == b.slot && a.block == b.block;
}

// `replaces`: whether the only earlier reader need not be remembered.
void add_reader(Shadow& shadow, Cell& cell, const Access& access, bool replaces) {
  if (cell.readers == 0) {
    if (replaces) {
      cell.read = access;
      return;
    }
    if (shadow.unused_lists.empty()) {
      shadow.lists.emplace_back();
      shadow.unused_lists.push_back(shadow.lists.size());
    }
    cell.readers = shadow.unused_lists.back();
    shadow.unused_lists.pop_back();
    shadow.lists[cell.readers - 1].push_back(cell.read);
    cell.read = {};
  }
  std::vector<Access>& list = shadow.lists[cell.readers - 1];
  for (Access& other : list) {
    if (other.slot == access.slot && other.block == access.block) {
      other.time = access.time;
      return;
    }
  }
  list.push_back(access);
}

void read(Shadow& shadow, Cell& cell, const Access& access, const Fiber& fiber) {
  if (same(cell.read, access)) return;
  check_written(shadow, cell, "a read", fiber);
  add_reader(shadow, cell, access, follows(fiber, cell.read));
}

void write(Shadow& shadow, Cell& cell, const Access& access, const Fiber& fiber) {
  if (same(cell.written, access) && cell.read.time == 0 && cell.readers == 0) return;
  begin_write(shadow, cell, "a write", fiber);
  cell.written = access;
}

// Notes that TMA and wgmma do not see yet what a thread has written.
void keep_unfenced(Races& races, Cell& cell, uint32_t thread) {
  if (cell.unfenced == thread + 1) return;
  cell.unfenced = thread + 1;
  std::vector<uint32_t>& mine = races.unfenced[thread];
  std::vector<Cell>& cells = races.shadow.cells;
  if (mine.size() >= 2 * cells.size()) {  // others have overwritten most of it
    std::sort(mine.begin(), mine.end());
    mine.erase(std::unique(mine.begin(), mine.end()), mine.end());
    mine.erase(std::remove_if(mine.begin(), mine.end(),
                              [&](uint32_t i) { return cells[i].unfenced != thread + 1; }),
               mine.end());
  }
  mine.push_back(static_cast<uint32_t>(&cell - cells.data()));
}

template <class Each>
void each_cell(Shadow& shadow, uintptr_t at, size_t bytes, Each each) {
  const size_t begin = (at - shadow.begin) / 4, end = (at - shadow.begin + bytes + 3) / 4;
  for (size_t i = begin; i < end && i < shadow.cells.size(); ++i) each(shadow.cells[i]);
}

void check_fenced(const Shadow& shadow, const Cell& cell, const char* now) {
  if (cell.unfenced == 0) return;
  fail("race at shared offset " + std::to_string(4 * (&cell - shadow.cells.data())) + ": " + now +
       " of what thread " + std::to_string(cell.unfenced - 1) +
       " has written without a fence.proxy.async of its own");
}

}  // namespace

void Publication::add(Fiber& from) {
  Knowledge& knows = from.knows;
  if (knows.others != nullptr && knows.others != last_) {
    last_ = knows.others;
    if (times_.size() < last_->size()) times_.resize(last_->size());
    for (size_t i = 0; i < last_->size(); ++i) times_[i] = std::max(times_[i], (*last_)[i]);
  }
  add(knows.slot, knows.now);
  if (knows.copies_slot != kNoSlot) add(knows.copies_slot, knows.copies_done);
  ++knows.now;
}

void Publication::add(uint32_t slot, uint32_t time) {
  if (times_.size() <= slot) times_.resize(slot + 1);
  times_[slot] = std::max(times_[slot], time);
}

Moment Publication::take() {
  last_ = nullptr;
  Moment taken = std::make_shared<const Times>(std::move(times_));
  times_ = {};
  return taken;
}

void learn(Fiber& fiber, const Moment& moment) {
  Moment& others = fiber.knows.others;
  if (moment == nullptr || moment == others) return;
  if (others == nullptr) {
    others = moment;
    return;
  }
  // Threads that know the same and learn the same go on sharing it.
  Races& races = *fiber.block->races;
  for (const auto& entry : races.joined) {
    if (entry.first.first == others && entry.first.second == moment) {
      others = Moment(entry.second);
      return;
    }
  }
  Times all = *moment;
  if (all.size() < others->size()) all.resize(others->size());
  for (size_t i = 0; i < others->size(); ++i) all[i] = std::max(all[i], (*others)[i]);
  const Moment both = all == *moment ? moment : std::make_shared<const Times>(std::move(all));
  constexpr size_t kKept = 16;
  if (races.joined.size() < kKept) races.joined.resize(kKept);
  races.joined[races.next_joined++ % kKept] = {{others, moment}, both};
  others = both;
}

void meet(uint32_t mask) {
  if (!options.races) return;
  Publication all;
  for (int i = 0; i < kWarp; ++i)
    if (mask >> i & 1) all.add(*current->warp->lanes[i]);
  const Moment moment = all.take();
  for (int i = 0; i < kWarp; ++i)
    if (mask >> i & 1) learn(*current->warp->lanes[i], moment);
}

Shadow::Shadow(const void* begin, size_t bytes, bool shared)
    : begin(reinterpret_cast<uintptr_t>(begin)), cells((bytes + 3) / 4), shared(shared) {}

Races::Races(uint32_t block, const void* shared, size_t bytes, unsigned threads)
    : block(block), shadow(shared, bytes, true), unfenced(threads) {
  for (unsigned i = 0; i < threads; ++i) slots.push_back("thread " + std::to_string(i));
}

void watch_launch() {
  global_shadows.clear();
  global_window = {};
  if (watched.empty() || !options.races) return;
  uintptr_t begin = UINTPTR_MAX, end = 0;
  for (const auto& range : watched) {
    global_shadows.emplace_back(range.first, range.second - range.first, false);
    begin = std::min(begin, reinterpret_cast<uintptr_t>(range.first));
    end = std::max(end, reinterpret_cast<uintptr_t>(range.second));
  }
  global_window = {begin, end - begin};
}

void watch_thread(Block* running) {
  shared_window = {};
  if (running == nullptr) return;
  shared_window = {reinterpret_cast<uintptr_t>(running->shared), running->shared_bytes};
}

uint32_t new_slot(Block& block, const std::string& name) {
  block.races->slots.push_back(name);
  return static_cast<uint32_t>(block.races->slots.size() - 1);
}

void asynchronous_write(uint32_t offset, uint32_t bytes, Access as) {
  if (!options.races) return;
  Races& races = *current->block->races;
  const std::string now = "a write of " + races.slots[as.slot];
  as.block = races.block;
  each_cell(races.shadow, races.shadow.begin + offset, bytes, [&](Cell& cell) {
    begin_write(races.shadow, cell, now.c_str(), *current);
    check_fenced(races.shadow, cell, now.c_str());
    cell.written = as;
  });
}

void asynchronous_read(const std::vector<uint32_t>& offsets, uint32_t bytes, Access as,
                       Fiber* const* threads, int count) {
  if (!options.races) return;
  Races& races = *current->block->races;
  const std::string now = "a read of " + races.slots[as.slot];
  as.block = races.block;
  // What several threads share must hold what each of them did itself; see follows() for the rest.
  std::vector<std::pair<const Fiber*, bool>> groups;  // one thread, whether there are others
  for (int i = 0; i < count; ++i) {
    const auto like = std::find_if(groups.begin(), groups.end(), [&](const auto& group) {
      return group.first->knows.others == threads[i]->knows.others;
    });
    if (like == groups.end()) {
      groups.push_back({threads[i], false});
    } else {
      like->second = true;
    }
  }
  for (uint32_t offset : offsets) {
    each_cell(races.shadow, races.shadow.begin + offset, bytes, [&](Cell& cell) {
      if (same(cell.read, as)) return;
      for (const auto& group : groups) {
        const bool ordered =
            group.second ? cell.written.time == 0 || published(cell.written, group.first->knows)
                         : follows(*group.first, cell.written);
        if (!ordered) {
          report(races.shadow, cell, now.c_str(), cell.written, "write", *group.first);
        }
      }
      check_fenced(races.shadow, cell, now.c_str());
      add_reader(races.shadow, cell, as, cell.read.slot == as.slot || cell.read.time == 0);
    });
  }
}

void copy_begins(uint32_t offset, uint32_t bytes, int group) {
  if (!options.races) return;
  Knowledge& mine = current->knows;
  if (mine.copies_slot == kNoSlot) {
    mine.copies_slot = new_slot(*current->block, "cp.async of thread " + std::to_string(mine.slot));
  }
  asynchronous_write(offset, bytes, {0, mine.copies_slot, static_cast<uint32_t>(group + 1)});
}

void copies_end(int group) {
  Knowledge& mine = current->knows;
  if (group > 0) mine.copies_done = std::max(mine.copies_done, static_cast<uint32_t>(group));
}

void touch(const void* at, size_t bytes, bool write_there) {
  Fiber* const fiber = current;
  if (fiber == nullptr) return;  // the scheduler's
  Races& races = *fiber->block->races;
  const uintptr_t address = reinterpret_cast<uintptr_t>(at);
  const Access access = {races.block, fiber->knows.slot, fiber->knows.now};
  if (within(shared_window, at)) {
    each_cell(races.shadow, address, bytes, [&](Cell& cell) {
      if (options.races) (write_there ? write : read)(races.shadow, cell, access, *fiber);
      if (write_there) keep_unfenced(races, cell, fiber->knows.slot);
    });
    return;
  }
  for (Shadow& shadow : global_shadows) {
    if (address - shadow.begin >= 4 * shadow.cells.size()) continue;
    each_cell(shadow, address, bytes,
              [&](Cell& cell) { (write_there ? write : read)(shadow, cell, access, *fiber); });
    return;
  }
}

namespace {

inline void looked_at(const void* at, size_t bytes, bool write) {
  if (within(shared_window, at) || within(global_window, at)) touch(at, bytes, write);
}

}  // namespace

std::vector<uint32_t> take_unfenced() {
  Races& races = *current->block->races;
  const uint32_t thread = current->knows.slot;
  std::vector<uint32_t> offsets;
  for (uint32_t i : races.unfenced[thread]) {
    Cell& cell = races.shadow.cells[i];
    if (cell.unfenced != thread + 1) continue;
    cell.unfenced = 0;
    offsets.push_back(4 * i);
  }
  races.unfenced[thread].clear();
  return offsets;
}

}  // namespace emulation

// What -fsanitize=thread calls. Hidden, so that a sanitizer in the same process stays apart.
#define CALLED extern "C" __attribute__((visibility("hidden"))) void
#define ACCESSES(bytes)                                                                     \
  CALLED __tsan_read##bytes(void* at) { emulation::looked_at(at, bytes, false); }           \
  CALLED __tsan_write##bytes(void* at) { emulation::looked_at(at, bytes, true); }           \
  CALLED __tsan_unaligned_read##bytes(void* at) { emulation::looked_at(at, bytes, false); } \
  CALLED __tsan_unaligned_write##bytes(void* at) { emulation::looked_at(at, bytes, true); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
CALLED __tsan_read_range(void* at, size_t bytes) { emulation::looked_at(at, bytes, false); }
CALLED __tsan_write_range(void* at, size_t bytes) { emulation::looked_at(at, bytes, true); }
CALLED __tsan_init() {}
CALLED __tsan_func_entry(void*) {}
CALLED __tsan_func_exit() {}
CALLED __tsan_vptr_update(void*, void*) {}
CALLED __tsan_vptr_read(void*) {}

// Atomics of the host's code: one CPU thread runs everything.
#define ATOMICS(bits)                                                                              \
  extern "C" __attribute__((visibility("hidden"))) uint##bits##_t __tsan_atomic##bits##_load(      \
      const volatile uint##bits##_t* from, int) {                                                  \
    return *from;                                                                                  \
  }                                                                                                \
  CALLED __tsan_atomic##bits##_store(volatile uint##bits##_t* to, uint##bits##_t value, int) {     \
    *to = value;                                                                                   \
  }                                                                                                \
  extern "C" __attribute__((visibility("hidden"))) uint##bits##_t __tsan_atomic##bits##_fetch_add( \
      volatile uint##bits##_t* to, uint##bits##_t value, int) {                                    \
    const uint##bits##_t old = *to;                                                                \
    *to = old + value;                                                                             \
    return old;                                                                                    \
  }
ATOMICS(8)
ATOMICS(32)
ATOMICS(64)
