// Threads that share the work of one call.

#pragma once

#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace jaxllm {

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The calling thread and helpers, which claim pieces of its work one by one. A decode step is hundreds of small calls:
// waking a thread for each, some 50 microseconds, would cost more than it brings, so a helper looks out for the next
// call for a while before it sleeps. Where another thread has the team, or the work is small, the caller works alone.
class Team {
 public:
  explicit Team(int helpers) {
    for (int i = 0; i < helpers; ++i) threads_.emplace_back([this] { help(); });
  }

  int size() const { return static_cast<int>(threads_.size()) + 1; }

  // Calls work(piece) for each piece in [0, pieces), and returns when all are done.
  template <typename Work>
  void run(int64_t pieces, const Work& work) {
    if (threads_.empty() || pieces < 2 || !caller_.try_lock()) {
      for (int64_t piece = 0; piece < pieces; ++piece) work(piece);
      return;
    }
    work_ = [](const void* of, int64_t piece) { (*static_cast<const Work*>(of))(piece); };
    of_ = &work;
    pieces_ = pieces;
    next_.store(0);
    open_.store(true);
    epoch_.fetch_add(1);
    if (sleeping_.load() > 0) {
      { std::lock_guard<std::mutex> lock(sleep_mutex_); }
      wake_.notify_all();
    }
    claim();
    open_.store(false);
    while (helping_.load() > 0) pause();
    caller_.unlock();
  }

 private:
  static constexpr int kLooks = 20000;  // some hundreds of microseconds of looking out
  static constexpr int kYield = 64;     // looks between offers of the core to whoever else wants it

  void claim() {
    for (;;) {
      const int64_t piece = next_.fetch_add(1);
      if (piece >= pieces_) return;
      work_(of_, piece);
    }
  }

  [[noreturn]] void help() {
    uint64_t seen = 0;
    for (int looks = 0;;) {
      if (epoch_.load() == seen) {
        if (++looks < kLooks) {
          looks % kYield == 0 ? static_cast<void>(sched_yield()) : pause();
          continue;
        }
        std::unique_lock<std::mutex> lock(sleep_mutex_);
        sleeping_.fetch_add(1);
        wake_.wait(lock, [&] { return epoch_.load() != seen; });
        sleeping_.fetch_sub(1);
      }
      seen = epoch_.load();
      looks = 0;
      helping_.fetch_add(1);  // before looking whether it is open: the caller closes first and then waits
      if (open_.load()) claim();
      helping_.fetch_sub(1);
    }
  }

  std::vector<std::thread> threads_;
  std::mutex caller_;
  void (*work_)(const void*, int64_t) = nullptr;
  const void* of_ = nullptr;
  int64_t pieces_ = 0;
  // What helpers write and what they only watch are on cache lines of their own.
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int> helping_{0};
  alignas(64) std::atomic<bool> open_{false};
  std::atomic<int> sleeping_{0};
  std::atomic<uint64_t> epoch_{0};
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
};

}  // namespace jaxllm
