#include "cpu/schedule.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

namespace cptool::cpu {
namespace {

// If a call has fewer items than this, their keys are divided too, into ranges of at least
// kKeyRange keys, so that decoding one token against a long cache still has work for many threads.
// These are constants because results must not depend on the machine.
constexpr int64_t kWantedItems = 64;
constexpr int64_t kKeyRange = 1024;

// Every kernel's tiles are as long or a part of it.
constexpr int64_t kLongestTile = 128;

// A call with at most this many query tokens per sequence always divides its keys, at places that
// depend on the number of the key alone: a query's result must not depend on the queries and
// sequences that go with it. Ranges are kKeyRange keys, and twice as long each time that the number
// of keys before them doubles beyond kWantedItems of them.
constexpr int64_t kFewTokens = 64;

// Multiply-adds that justify waking a thread, roughly 20 microseconds' worth. A block of few rows
// is bound by reading its keys and counts as kBusyRows.
constexpr int64_t kThreadWork = 1 << 19;
constexpr int64_t kBusyRows = 8;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where the range that has `key` ends.
int64_t fixed_end(int64_t key) {
  int64_t range = kKeyRange;
  while (2 * kWantedItems * range <= key) range *= 2;
  return (key / range + 1) * range;
}

bool few_tokens(const AttentionArgs& args) {
  for (int64_t b = 0; b < args.batch; ++b) {
    if (args.cu_q[b + 1] - args.cu_q[b] > kFewTokens) return false;
  }
  return true;
}

thread_local Watch thread_watch;

struct Group {
  std::vector<WorkItem> items;
  std::atomic<int32_t> pending{0};
};

// Finds, for each query of one sequence, the number of keys at or before its position less `back`.
// Both ascend, so each search starts where the last one ended and doubles its step: constant time
// per query when queries and keys advance together.
void find_limits(const int32_t* q_pos, int64_t queries, const int32_t* k_pos, int64_t keys,
                 int64_t back, int64_t* limits) {
  int64_t low = 0;
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t position = q_pos[i] - back;
    int64_t high = low;
    for (int64_t step = 1; high < keys && k_pos[high] <= position; step *= 2) {
      low = high + 1;
      high = low + step;
    }
    low = std::upper_bound(k_pos + low, k_pos + std::min(high, keys), position) - k_pos;
    limits[i] = low;
  }
}

}  // namespace

void watch_attention(const Watch& watch) { thread_watch = watch; }

struct Schedule::State {
  Watch watch = thread_watch;           // of the thread that makes the call
  std::vector<int64_t> firsts, limits;  // firsts: empty without a window
  std::vector<WorkItem> items;
  std::unique_ptr<Group[]> groups;
  std::unique_ptr<float[]> partials;
  std::atomic<size_t> next{0};
  int64_t work = 0;

  int64_t cut_rows(const AttentionArgs& args, int block_rows, int block_heads);
  void cut_keys(const AttentionArgs& args, int64_t ranges_wanted);
  void place_partials(const AttentionArgs& args, int32_t cut_items);
  void sort();
};

// Makes one item per block of rows and KV heads. Returns how many of them have keys.
int64_t Schedule::State::cut_rows(const AttentionArgs& args, int block_rows, int block_heads) {
  limits.resize(static_cast<size_t>(args.q_tokens));
  if (args.window > 0) firsts.resize(static_cast<size_t>(args.q_tokens));
  const int64_t group = args.q_heads / args.kv_heads;
  int64_t working = 0;
  for (int64_t b = 0; b < args.batch; ++b) {
    const int64_t first = args.cu_q[b];
    const int64_t tokens = args.cu_q[b + 1] - first;
    const int32_t* k_pos = args.k_pos + args.cu_k[b];
    const int64_t sequence_keys = args.cu_k[b + 1] - args.cu_k[b];
    int64_t* seen = limits.data() + first;
    find_limits(args.q_pos + first, tokens, k_pos, sequence_keys, 0, seen);
    if (args.window > 0) {
      find_limits(args.q_pos + first, tokens, k_pos, sequence_keys, args.window,
                  firsts.data() + first);
    }
    for (int64_t row = 0; row < tokens * group; row += block_rows) {
      const int64_t rows = std::min<int64_t>(block_rows, tokens * group - row);
      const int64_t keys = seen[(row + rows - 1) / group];
      const int64_t begin =
          args.window > 0 ? firsts[first + row / group] / kLongestTile * kLongestTile : 0;
      for (int64_t head = 0; head < args.kv_heads; head += block_heads) {
        const int64_t heads = std::min<int64_t>(block_heads, args.kv_heads - head);
        working += keys > begin;
        items.push_back({static_cast<int32_t>(b), static_cast<int32_t>(head),
                         static_cast<int32_t>(heads), row, static_cast<int32_t>(rows), -1, begin,
                         keys, nullptr, nullptr});
      }
    }
  }
  return working;
}

// Cuts the keys of every item into about `ranges_wanted` ranges, an item each; or into those of
// fixed_end if it is 0.
void Schedule::State::cut_keys(const AttentionArgs& args, int64_t ranges_wanted) {
  std::vector<WorkItem> whole;
  whole.swap(items);
  groups.reset(new Group[whole.size()]);
  int32_t cut_items = 0;
  for (WorkItem item : whole) {
    const int64_t begin = item.key_begin, end = item.key_end;
    const int64_t even =
        ranges_wanted == 0
            ? 0
            : divide_up(divide_up(end - begin, ranges_wanted), kKeyRange) * kKeyRange;
    const auto range_end = [=](int64_t key) { return even == 0 ? fixed_end(key) : key + even; };
    if (end <= range_end(begin)) {
      items.push_back(item);
      continue;
    }
    Group& group = groups[cut_items];
    item.split = cut_items++;
    for (item.key_begin = begin; item.key_begin < end; item.key_begin = item.key_end) {
      item.key_end = std::min(range_end(item.key_begin), end);
      group.items.push_back(item);
    }
    group.pending = static_cast<int32_t>(group.items.size());
  }
  place_partials(args, cut_items);
}

// Gives each item of the first `cut_items` groups memory for its partial, and appends it to
// `items`.
void Schedule::State::place_partials(const AttentionArgs& args, int32_t cut_items) {
  int64_t rows = 0;
  for (int32_t g = 0; g < cut_items; ++g) {
    for (const WorkItem& item : groups[g].items) rows += item.kv_heads * item.rows;
  }
  partials.reset(new float[static_cast<size_t>(rows * (args.head_dim + 1))]);
  float* free = partials.get();
  for (int32_t g = 0; g < cut_items; ++g) {
    for (WorkItem& item : groups[g].items) {
      const int64_t item_rows = item.kv_heads * item.rows;
      item.partial_out = free;
      item.partial_lse = free + item_rows * args.head_dim;
      free += item_rows * (args.head_dim + 1);
      items.push_back(item);
    }
  }
}

void Schedule::State::sort() {
  std::stable_sort(items.begin(), items.end(), [](const WorkItem& a, const WorkItem& b) {
    return a.kv_heads * a.rows * (a.key_end - a.key_begin) >
           b.kv_heads * b.rows * (b.key_end - b.key_begin);
  });
}

Schedule::Schedule(const AttentionArgs& args, int block_rows, int block_heads) : state_(new State) {
  const int64_t working = state_->cut_rows(args, block_rows, block_heads);
  if (few_tokens(args)) {
    state_->cut_keys(args, 0);
  } else if (working > 0 && working < kWantedItems) {
    state_->cut_keys(args, divide_up(kWantedItems, working));
  }
  for (const WorkItem& item : state_->items) {
    state_->work += item.kv_heads * std::max<int64_t>(item.rows, kBusyRows) *
                    (item.key_end - item.key_begin) * args.head_dim;
  }
  state_->sort();
}

Schedule::~Schedule() { delete state_; }

const WorkItem* Schedule::next() {
  const int64_t* cancelled = state_->watch.cancelled;
  if (cancelled != nullptr && __atomic_load_n(cancelled, __ATOMIC_RELAXED) != 0) return nullptr;
  const size_t index = state_->next.fetch_add(1, std::memory_order_relaxed);
  return index < state_->items.size() ? &state_->items[index] : nullptr;
}

void Schedule::count(const AttentionArgs& args, const WorkItem& item) const {
  if (state_->watch.pairs == nullptr) return;
  const int64_t group = args.q_heads / args.kv_heads;
  const int64_t first = args.cu_q[item.sequence];
  int64_t pairs = 0;
  for (int64_t row = item.row_begin; row < item.row_begin + item.rows; ++row) {
    const int64_t token = first + row / group;
    const int64_t begin = firsts() == nullptr ? 0 : firsts()[token];
    pairs += std::max<int64_t>(
        0, std::min(limits()[token], item.key_end) - std::max(begin, item.key_begin));
  }
  __atomic_fetch_add(state_->watch.pairs, pairs * item.kv_heads, __ATOMIC_RELAXED);
}

bool Schedule::complete(const WorkItem& item) {
  return state_->groups[item.split].pending.fetch_sub(1, std::memory_order_acq_rel) == 1;
}

const WorkItem* Schedule::group(int32_t split, int32_t* count) const {
  const std::vector<WorkItem>& items = state_->groups[split].items;
  *count = static_cast<int32_t>(items.size());
  return items.data();
}

const int64_t* Schedule::firsts() const {
  return state_->firsts.empty() ? nullptr : state_->firsts.data();
}

const int64_t* Schedule::limits() const { return state_->limits.data(); }

int Schedule::useful_threads(int threads) const {
  const int64_t useful =
      std::min<int64_t>(static_cast<int64_t>(state_->items.size()), 1 + state_->work / kThreadWork);
  return static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(useful, 1)));
}

}  // namespace cptool::cpu
