// Which CPU kernel runs, and how its work is cut up.
//
// One translation unit per instruction set (portable.cpp, avx2.cpp, avx512.cpp, avx512bf16.cpp,
// amx.cpp), compiled with flags of its own. Each defines the functions of its name below and
// keeps all else in an unnamed namespace. It must instantiate nothing of the standard library that
// is not inlined (containers, algorithms, std::function): the linker keeps one copy of such a
// function for the whole extension, and that copy may hold instructions that the machine lacks.
#pragma once

#include <cstdint>

#include "attention.h"

namespace cptool::cpu {

// Chooses the kernel, checks offsets and positions (std::invalid_argument), runs. Results do not
// depend on `threads`.
void attention_partial(const AttentionArgs& args, int threads);
void merge_partials(const MergeArgs& args, int threads);

// Rows of a KV head up to which keys and values are read as they lie (avx512_stream.h), which is
// faster than packing them for products of many rows. Measured over 2K to 32K keys in all types:
// 1.1 to 2.5 times at 9 to 24 rows; at 32 up to 1.4 times, but level where keys lie in a cache
// (bfloat16: a fifth slower).
constexpr int kStreamRows = 32;
constexpr int kAmxStreamRows = 8;  // at most half a tile

struct Isa {
  const char* name;
  bool (*supported)();                                  // by this processor and operating system
  bool (*handles)(ScalarType dtype, int64_t head_dim);  // head_dim: a multiple of 8 up to 256
  void (*attention_partial)(const AttentionArgs& args, int threads);
  void (*merge_partials)(const MergeArgs& args, int threads);
  int stream_rows;  // 0: it has one way to read keys
};

// Compiled in, slowest first. A kernel takes a call if it is supported, handles it, and no later
// one does.
const Isa* isas(int* count);
// The kernel for such a call, at most the forced one. Never null: "portable" handles everything.
const Isa* select_isa(ScalarType dtype, int64_t head_dim);
// Caps the choice at the kernel of this name; null lifts the cap. False if it isn't compiled in or
// isn't supported here.
bool force_isa(const char* name);
// Whether the machine has the instruction set of this name and the cap, if any, allows it.
bool allows_isa(const char* name);

bool portable_supported();
bool portable_handles(ScalarType dtype, int64_t head_dim);
void attention_partial_portable(const AttentionArgs& args, int threads);
void merge_partials_portable(const MergeArgs& args, int threads);

bool avx2_supported();
bool avx2_handles(ScalarType dtype, int64_t head_dim);
void attention_partial_avx2(const AttentionArgs& args, int threads);
void merge_partials_avx2(const MergeArgs& args, int threads);

bool avx512_supported();
bool avx512_handles(ScalarType dtype, int64_t head_dim);
void attention_partial_avx512(const AttentionArgs& args, int threads);
void merge_partials_avx512(const MergeArgs& args, int threads);

bool avx512bf16_supported();
bool avx512bf16_handles(ScalarType dtype, int64_t head_dim);
void attention_partial_avx512bf16(const AttentionArgs& args, int threads);

bool amx_supported();
bool amx_handles(ScalarType dtype, int64_t head_dim);
void attention_partial_amx(const AttentionArgs& args, int threads);

// A block of query rows against a range of keys of one or more KV heads of one sequence. The rows
// of a KV head are its sequence's query tokens times the G = q_heads / kv_heads query heads that
// share it, token-major: row r is token r / G, head kv_head * G + r % G.
struct WorkItem {
  int32_t sequence;
  int32_t kv_head;     // the first
  int32_t kv_heads;    // at least 1
  int64_t row_begin;   // first packed row, within the sequence
  int32_t rows;        // of each head, at least 1
  int32_t split;       // the group of items that cut the keys of these rows; -1: not cut
  int64_t key_begin;   // within the sequence; a multiple of 1024
  int64_t key_end;     // at most the largest limit of the rows
  float* partial_out;  // [kv_heads * rows, head_dim] of a cut item, else null
  float* partial_lse;  // [kv_heads * rows]
};

// The work items of one call, longest first. How they are cut depends on the shapes and positions
// alone, never on the number of threads, so neither do the results.
class Schedule {
 public:
  // `block_rows`: packed rows of each KV head of a full item; `block_heads`: its KV heads.
  Schedule(const AttentionArgs& args, int block_rows, int block_heads);
  ~Schedule();
  Schedule(const Schedule&) = delete;
  Schedule& operator=(const Schedule&) = delete;

  // The next item for the calling thread, null when none is left. Safe from many threads at once.
  const WorkItem* next();
  // Tells that `item`, one of a group, has its partial written. True for the last of the group: the
  // caller then merges it.
  bool complete(const WorkItem& item);
  // The items of the group, in the order of their keys.
  const WorkItem* group(int32_t split, int32_t* count) const;
  // [q_tokens]: how many keys of its sequence each query token sees. They are the first ones, for
  // positions ascend.
  const int64_t* limits() const;
  // How many of `threads` repay their waking.
  int useful_threads(int threads) const;

 private:
  struct State;
  State* state_;
};

}  // namespace cptool::cpu
