#include "cpu/thread_pool.h"

#include <pthread.h>

#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <utility>

namespace cptool::cpu {
namespace {

class ThreadPool {
 public:
  void run(int threads, void (*body)(void*, int), void* context) {
    std::lock_guard<std::mutex> one_caller(callers_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (; workers_ < threads - 1; ++workers_) std::thread([this] { work(); }).detach();
      body_ = body;
      context_ = context;
      begun_ = 1;
      wanted_ = threads;
    }
    for (int i = 1; i < threads; ++i) wake_.notify_one();
    call(body, context, 0);
    std::unique_lock<std::mutex> lock(mutex_);
    wanted_ = 0;  // workers that wake from now on do not begin
    done_.wait(lock, [this] { return running_ == 0; });
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  void call(void (*body)(void*, int), void* context, int thread) {
    try {
      body(context, thread);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      error_ = std::current_exception();
    }
  }

  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return begun_ < wanted_; });
      const int thread = begun_++;
      ++running_;
      auto* const body = body_;
      void* const context = context_;
      lock.unlock();
      call(body, context, thread);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex callers_;  // held for a whole run
  std::mutex mutex_;    // of all below
  std::condition_variable wake_, done_;
  int workers_ = 0;
  void (*body_)(void*, int) = nullptr;
  void* context_ = nullptr;
  int wanted_ = 0;   // threads of the current run; 0 between runs
  int begun_ = 0;    // of these, including the caller
  int running_ = 0;  // workers inside a body
  std::exception_ptr error_;
};

// Never destroyed: its threads may outlive static destruction.
ThreadPool* pool() {
  static ThreadPool* instance = [] {
    // A forked child has none of its parent's threads and may have inherited a locked mutex, so it
    // starts with a new pool.
    pthread_atfork(nullptr, nullptr, [] { new (pool()) ThreadPool; });
    return new ThreadPool;
  }();
  return instance;
}

struct Scratch {
  void* memory = nullptr;
  size_t size = 0;
  ~Scratch() { std::free(memory); }
};

}  // namespace

void run_parallel(int threads, void (*body)(void*, int), void* context) {
  if (threads <= 1) {
    body(context, 0);
  } else {
    pool()->run(threads, body, context);
  }
}

void* thread_scratch(size_t bytes) {
  static thread_local Scratch scratch;
  if (bytes > scratch.size) {
    std::free(scratch.memory);
    scratch.size = (bytes + 63) / 64 * 64;
    scratch.memory = std::aligned_alloc(64, scratch.size);
    if (scratch.memory == nullptr) {
      scratch.size = 0;
      throw std::bad_alloc();
    }
  }
  return scratch.memory;
}

}  // namespace cptool::cpu
