// Work on torch's own threads. A runtime of our own beside torch's would fight with it: after each of torch's loops its
// threads spin on the cores for a while, waiting for the next. torch makes its OpenMP runtime's names global, so it is
// found where torch was imported before, and serves under the interface of gcc, which clang's and Intel's have as well.
// Where there is none, and in a child of fork, where its threads are gone, one thread does all.
#pragma once

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace uniflow_cpu {

class Threads {
 public:
  Threads() : start_(reinterpret_cast<Start>(dlsym(RTLD_DEFAULT, "GOMP_parallel"))) {
    pthread_atfork(nullptr, nullptr, [] { forked().store(true); });
  }

  bool found() const { return start_ != nullptr; }

  // How many threads share `units` of which at least `least` are worth one.
  int share(int threads, int64_t units, int64_t least) const {
    if (start_ == nullptr || forked().load(std::memory_order_relaxed)) return 1;
    return static_cast<int>(std::clamp<int64_t>(units / std::max<int64_t>(1, least), 1, std::max(1, threads)));
  }

  // Call work(begin, end, thread) for runs of units, on as many threads as `share` said.
  template <class Work>
  void run(int threads, int64_t units, const Work& work) const {
    if (threads <= 1) {
      work(0, units, 0);
      return;
    }
    // four runs a thread, so that one that is late does not keep the others
    Shared<Work> shared{work, units, (units + 4 * threads - 1) / (4 * threads)};
    start_(&Shared<Work>::take, &shared, static_cast<unsigned>(threads), 0);
  }

 private:
  using Start = void (*)(void (*)(void*), void*, unsigned, unsigned);

  template <class Work>
  struct Shared {
    const Work& work;
    int64_t units, run;
    std::atomic<int64_t> next{0};
    std::atomic<int> thread{0};

    static void take(void* data) {
      auto& shared = *static_cast<Shared*>(data);
      const int thread = shared.thread.fetch_add(1);
      for (int64_t begin; (begin = shared.next.fetch_add(shared.run)) < shared.units;)
        shared.work(begin, std::min(begin + shared.run, shared.units), thread);
    }
  };

  static std::atomic<bool>& forked() {
    static std::atomic<bool> value{false};
    return value;
  }

  Start start_;
};

}  // namespace uniflow_cpu
