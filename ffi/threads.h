// SPDX-License-Identifier: Apache-2.0
//
// Fork and join over somebody else's thread pool (XLA's). The caller takes part and never waits
// for a task that has not begun, so nested and concurrent use cannot deadlock.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace jaxwin {

// XLA runs its programs with denormals flushed (FTZ, DAZ), but its pool's threads need not be in
// that mode: set it for the duration of a task, so that no bit depends on which thread ran it.
class FlushDenormals {
 public:
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040U); }
  ~FlushDenormals() { _mm_setcsr(saved_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  unsigned int saved_;
};

class Threads {
 public:
  // `schedule` queues a function on the pool; `count` is how many threads may work at a time,
  // the caller included.
  using Schedule = std::function<void(std::function<void()>)>;
  Threads(Schedule schedule, int64_t count) : schedule_(std::move(schedule)), count_(count) {}

  int64_t count() const { return count_; }

  // The same pool, at most `n` threads of it.
  Threads limited(int64_t n) const { return {schedule_, n < count_ ? n : count_}; }

  // Calls body(task, worker) once for every task in [0, tasks); no two calls with the same worker
  // number, in [0, count()), run at the same time.
  template <typename Body>
  void run(int64_t tasks, const Body& body) const {
    if (tasks <= 0) return;
    const int64_t helpers = (tasks < count_ ? tasks : count_) - 1;
    if (helpers <= 0) {
      const FlushDenormals mode;
      for (int64_t t = 0; t < tasks; ++t) body(t, int64_t{0});
      return;
    }
    struct Shared {
      std::atomic<int64_t> next{0};
      std::atomic<int64_t> worker{0};
      std::atomic<int64_t> done{0};
      std::mutex mutex;
      std::condition_variable all_done;
    };
    auto shared = std::make_shared<Shared>();
    // A helper that starts after the last task was claimed touches `shared` only, never `body`.
    auto work = [shared, tasks, &body](int64_t worker) {
      const FlushDenormals mode;
      int64_t finished = 0;
      for (int64_t t = shared->next.fetch_add(1); t < tasks; t = shared->next.fetch_add(1)) {
        body(t, worker);
        ++finished;
      }
      if (finished > 0 && shared->done.fetch_add(finished) + finished == tasks) {
        const std::lock_guard<std::mutex> lock(shared->mutex);
        shared->all_done.notify_all();
      }
    };
    for (int64_t h = 0; h < helpers; ++h) {
      schedule_([shared, work] { work(shared->worker.fetch_add(1) + 1); });
    }
    using Clock = std::chrono::steady_clock;
    const Clock::time_point begin = Clock::now();
    work(0);
    // Sleeping costs a wake-up, which on a virtual machine may take as long as a convolution, and
    // the system may then put both threads on one CPU: wait awake, but no longer than the work
    // took.
    const Clock::time_point end = Clock::now();
    const Clock::time_point patience =
        end + std::clamp<Clock::duration>(end - begin, kLeast, kMost);
    while (shared->done.load() != tasks && Clock::now() < patience) {
      for (int spin = 0; spin < 16; ++spin) _mm_pause();
    }
    if (shared->done.load() == tasks) return;
    std::unique_lock<std::mutex> lock(shared->mutex);
    shared->all_done.wait(lock, [&] { return shared->done.load() == tasks; });
  }

 private:
  static constexpr std::chrono::microseconds kLeast{100};
  static constexpr std::chrono::milliseconds kMost{5};
  Schedule schedule_;
  int64_t count_;
};

}  // namespace jaxwin
