// How the work of one attention call is divided into items that threads take in turn.
#pragma once

#include <cstdint>

#include "attention.h"

namespace cptool::cpu {

// A block of query rows and a range of keys, of one or more KV heads of one sequence. A KV head has
// one row for each query token of the sequence and each of the G = q_heads / kv_heads query heads
// that share it, token-major: row r is token r / G, head kv_head * G + r % G.
struct WorkItem {
  int32_t sequence;
  int32_t kv_head;     // the first
  int32_t kv_heads;    // at least 1
  int64_t row_begin;   // first packed row, within the sequence
  int32_t rows;        // of each head, at least 1
  int32_t split;       // the group of items that share these rows, each with some keys; -1: none
  int64_t key_begin;   // within the sequence; a multiple of 128
  int64_t key_end;     // at most the largest limit of the rows
  float* partial_out;  // [kv_heads * rows, head_dim] of an item of a group, else null
  float* partial_lse;  // [kv_heads * rows]
};

// Where the calling thread's attention calls report and are told to stop, in memory that another
// process may share. Both words are accessed atomically; either may be null.
struct Watch {
  int64_t* pairs = nullptr;  // grows by the pairs (query head's row, visible key) computed
  const int64_t* cancelled =
      nullptr;  // once nonzero, no further item begins: results are undefined
};

// Sets it for the calling thread, whose calls pass it on to the threads that help with them.
void watch_attention(const Watch& watch);

// The work items of one call, longest first. They depend on the shapes and positions alone, not on
// the number of threads, and therefore so do the results.
class Schedule {
 public:
  // `block_rows`: packed rows of each KV head of a full item; `block_heads`: its KV heads.
  Schedule(const AttentionArgs& args, int block_rows, int block_heads);
  ~Schedule();
  Schedule(const Schedule&) = delete;
  Schedule& operator=(const Schedule&) = delete;

  // Returns the next item for the calling thread, or null when none is left or the call was
  // cancelled. Thread-safe.
  const WorkItem* next();
  // Adds the visible pairs of `item`, which has been computed, to the watch. Thread-safe.
  void count(const AttentionArgs& args, const WorkItem& item) const;
  // Records that the partial of `item`, one of a group, is written. Returns true for the last item
  // of the group, whose caller then merges the group.
  bool complete(const WorkItem& item);
  // Returns the items of the group, in the order of their keys.
  const WorkItem* group(int32_t split, int32_t* count) const;
  // [q_tokens]: each query token sees keys firsts() to limits() - 1 of its sequence, because
  // positions ascend. firsts() is null if they are all 0: there is no window.
  const int64_t* firsts() const;
  const int64_t* limits() const;
  // Returns how many of `threads` threads are worth waking.
  int useful_threads(int threads) const;

 private:
  struct State;
  State* state_;
};

}  // namespace cptool::cpu
