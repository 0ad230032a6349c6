// Threads and their scratch memory for the CPU kernels.
#pragma once

#include <cstddef>

namespace cptool::cpu {

// Runs body(context, 0) ... body(context, threads - 1) at the same time, one of them on the calling thread, and returns when
// all have returned. An exception that a body throws is rethrown here, once all have ended.
void run_parallel(int threads, void (*body)(void* context, int thread), void* context);

// Memory of the calling thread, aligned to 64 bytes, contents undefined, valid until the thread's next call.
void* thread_scratch(size_t bytes);

}  // namespace cptool::cpu
