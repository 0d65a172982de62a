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
#include <vector>

namespace uniflow_cpu {

class Threads {
 public:
  Threads()
      : start_(reinterpret_cast<Start>(dlsym(RTLD_DEFAULT, "GOMP_parallel"))),
        number_(reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"))) {
    pthread_atfork(nullptr, nullptr, [] { forked().store(true); });
  }

  bool found() const { return start_ != nullptr && number_ != nullptr; }

  // How many threads share `units` of which at least `least` are worth one.
  int share(int threads, int64_t units, int64_t least) const {
    if (!found() || forked().load(std::memory_order_relaxed)) return 1;
    return static_cast<int>(std::clamp<int64_t>(units / std::max<int64_t>(1, least), 1, std::max(1, threads)));
  }

  // Call work(begin, end, thread) for runs of units, on as many threads as `share` said.
  template <class Work>
  void run(int threads, int64_t units, const Work& work) const {
    if (threads <= 1) {
      work(0, units, 0);
      return;
    }
    Shared<Work> shared(work, threads, units, number_);
    start_(&Shared<Work>::take, &shared, static_cast<unsigned>(threads), 0);
  }

 private:
  using Start = void (*)(void (*)(void*), void*, unsigned, unsigned);
  using Number = int (*)();

  // Each thread has a part of its own, the same in every call of as many units, so that it finds in its cache what it wrote
  // there before; it takes it in four runs, and then what is left of the others', so that one that is late keeps nobody.
  template <class Work>
  struct Shared {
    struct alignas(64) Part {
      std::atomic<int64_t> next;
      int64_t end;
    };

    const Work& work;
    const int64_t run;
    const Number number;
    std::vector<Part> parts;

    Shared(const Work& work, int threads, int64_t units, Number number)
        : work(work), run((units + 4 * threads - 1) / (4 * threads)), number(number), parts(threads) {
      for (int i = 0; i < threads; ++i) {
        parts[i].next.store(units * i / threads, std::memory_order_relaxed);
        parts[i].end = units * (i + 1) / threads;
      }
    }

    static void take(void* data) {
      auto& shared = *static_cast<Shared*>(data);
      const int own = shared.number(), threads = static_cast<int>(shared.parts.size());
      for (int turn = 0; turn < threads; ++turn) {
        Part& part = shared.parts[(own + turn) % threads];
        for (int64_t begin; (begin = part.next.fetch_add(shared.run)) < part.end;)
          shared.work(begin, std::min(begin + shared.run, part.end), own);
      }
    }
  };

  static std::atomic<bool>& forked() {
    static std::atomic<bool> value{false};
    return value;
  }

  Start start_;
  Number number_;
};

}  // namespace uniflow_cpu
