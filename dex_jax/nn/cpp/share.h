// Work in pieces on all threads, and how operands with leading dimensions are found.

#ifndef DEX_JAX_SHARE_H_
#define DEX_JAX_SHARE_H_

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <utility>

namespace dex_jax {

// Pieces of work: each thread has a row of neighbours, as memory is read fastest from front to back, and takes others' when
// it has done its own. The caller works too, and then waits only for pieces that some thread is at work on: it cannot wait
// for a thread that never comes.
class Pieces {
 public:
  using Worker = std::function<void(int64_t)>;

  Pieces(int64_t count, int64_t threads, std::function<Worker()> begin)
      : count_(count), threads_(threads), begin_(std::move(begin)), next_(new Next[threads]) {
    for (int64_t t = 0; t < threads; ++t) next_[t].piece = EndOf(t - 1);
  }

  void Work() {
    const int64_t own = arrived_.fetch_add(1);
    Worker work;
    for (int64_t t = own; t < own + threads_; ++t) {
      const int64_t row = t % threads_, end = EndOf(row);
      for (int64_t piece; (piece = next_[row].piece.fetch_add(1)) < end;) {
        if (!work) work = begin_();
        work(piece);
        done_.fetch_add(1, std::memory_order_release);
      }
    }
  }

  void Wait() const {
    for (int spins = 0; done_.load(std::memory_order_acquire) < count_; ++spins)
      if (spins > 1000) std::this_thread::yield();
  }

 private:
  struct alignas(64) Next {  // a cache line each
    std::atomic<int64_t> piece;
  };

  int64_t EndOf(int64_t row) const { return (row + 1) * count_ / threads_; }

  const int64_t count_, threads_;
  const std::function<Worker()> begin_;
  const std::unique_ptr<Next[]> next_;
  std::atomic<int64_t> arrived_{0}, done_{0};
};

// Threads that have helped and wait a moment for more to do: a step is hundreds of short products, and to
// wake a thread for each takes as long as a small one.
class Crew {
 public:
  // Gives work to a thread that waits; false where none does.
  bool Take(const std::shared_ptr<Pieces>& pieces) {
    for (auto& seat : seats_) {
      const Work* waiting = &kWaiting;
      if (seat.load(std::memory_order_relaxed) != waiting) continue;
      const Work* const work = new Work(pieces);
      if (seat.compare_exchange_strong(waiting, work)) return true;
      delete work;
    }
    return false;
  }

  // Works, and then on what comes within kPatience.
  void Help(std::shared_ptr<Pieces> pieces) {
    pieces->Work();
    pieces.reset();
    for (auto& seat : seats_) {
      const Work* empty = nullptr;
      if (!seat.compare_exchange_strong(empty, &kWaiting)) continue;
      while (const Work* const work = Await(seat)) {
        (*work)->Work();
        delete work;
        seat.store(&kWaiting);
      }
      return;
    }
  }

 private:
  using Work = std::shared_ptr<Pieces>;
  static constexpr std::chrono::microseconds kPatience{30};

  // Waits for work at a seat; returns null, and leaves the seat empty, if none comes.
  static const Work* Await(std::atomic<const Work*>& seat) {
    const auto end = std::chrono::steady_clock::now() + kPatience;
    for (int spins = 0; seat.load(std::memory_order_acquire) == &kWaiting; ++spins) {
      if (spins % 256 != 255) continue;
      const Work* waiting = &kWaiting;
      if (std::chrono::steady_clock::now() > end && seat.compare_exchange_strong(waiting, nullptr)) return nullptr;
      std::this_thread::yield();  // to whoever has something to do
    }
    return seat.load(std::memory_order_acquire);
  }

  static inline const Work kWaiting;
  std::atomic<const Work*> seats_[32] = {};
};

// Does pieces 0..count-1 on all threads, each with a worker of its own that begin() gives.
template <typename Threads>
void Share(const Threads& threads, int64_t count, const std::function<Pieces::Worker()>& begin) {
  const int64_t helpers = std::min<int64_t>(threads.num_threads(), count) - 1;
  if (helpers < 0) return;
  if (helpers == 0) {
    const Pieces::Worker work = begin();
    for (int64_t piece = 0; piece < count; ++piece) work(piece);
    return;
  }
  // A helper that comes late finds no piece left and touches nothing but these, which it shares.
  const auto pieces = std::make_shared<Pieces>(count, helpers + 1, [&begin] { return begin(); });
  static Crew crew;
  for (int64_t helper = 0; helper < helpers; ++helper)
    if (!crew.Take(pieces)) threads.Schedule([pieces] { crew.Help(pieces); });
  pieces->Work();
  pieces->Wait();
}

inline int64_t Quotient(int64_t count, int64_t by) { return (count + by - 1) / by; }  // rounded up

// Dimensions are anything with size() and [].
template <typename Dimensions>
int64_t SizeOf(const Dimensions& shape, size_t begin, size_t end) {
  int64_t size = 1;
  for (size_t d = begin; d < end; ++d) size *= shape[d];
  return size;
}

// Returns which of an operand's blocks belongs to block `index` of the result. The first `leading` dimensions number blocks:
// each is the same in both, or 1 in the operand.
template <typename Dimensions>
int64_t BlockOf(int64_t index, const Dimensions& operand, const Dimensions& result, size_t leading) {
  int64_t block = 0, step = 1;
  for (size_t d = leading; d-- > 0; index /= result[d]) {
    if (operand[d] > 1) block += index % result[d] * step;
    step *= operand[d];
  }
  return block;
}

}  // namespace dex_jax

#endif  // DEX_JAX_SHARE_H_
