// longjmp from stack to stack is what fibers are; the checked one takes it for an error.
#undef _FORTIFY_SOURCE
#include "tests/unit/kernels/emulated_gpu.h"

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include <ucontext.h>

namespace normd::emulated {
namespace {

constexpr size_t kStackBytes = size_t{256} << 10;

// A thread of a block: runs the body of each block it is given, for ever.
struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  ucontext_t start;
  jmp_buf place;
  bool started = false;
  bool done = false;
  size_t exchanges = 0;
  unsigned char exchanged[2][64];
};

class Block {
 public:
  void Begin(Index index, int threads, int64_t shared_bytes, const std::function<void()>& body) {
    while (fibers_.size() < static_cast<size_t>(threads)) {
      fibers_.push_back(std::make_unique<Fiber>());
    }
    index_ = index;
    threads_ = threads;
    body_ = &body;
    shared_bytes_ = static_cast<size_t>(shared_bytes);
    shared_.assign(shared_bytes_ + 16 + kGuard, kUntouched);
    for (int t = 0; t < threads; ++t) {
      fibers_[static_cast<size_t>(t)]->done = false;
      fibers_[static_cast<size_t>(t)]->exchanges = 0;
    }
  }

  // To the next barrier; whether there was one.
  bool Step() {
    running = this;
    block_index = index_;
    int done = 0;
    for (int k = 0; k < threads_; ++k) {
      const int t = index_.x % 2 == 1 ? threads_ - 1 - k : k;
      Resume(t);
      done += fibers_[static_cast<size_t>(t)]->done ? 1 : 0;
    }
    if (done != 0 && done != threads_) {
      std::fprintf(stderr, "%d of %d threads missed a barrier\n", done, threads_);
      std::abort();
    }
    if (done != 0 && std::any_of(shared() + shared_bytes_, shared() + shared_bytes_ + kGuard,
                                 [](unsigned char byte) { return byte != kUntouched; })) {
      std::fprintf(stderr, "a block wrote past its shared memory\n");
      std::abort();
    }
    return done == 0;
  }

  // Back to whoever resumed this fiber.
  void Yield() {
    if (_setjmp(current_->place) == 0) _longjmp(resumer_, 1);
  }

  // Each thread's value for that of another lane of its warp.
  void Exchange(void* value, size_t bytes, int lane_mask) {
    const size_t thread = thread_index.x;
    Fiber& ours = *fibers_[thread];
    // By turns: who comes first to the next exchange leaves what others read of this one.
    const size_t turn = ours.exchanges++ % 2;
    std::memcpy(ours.exchanged[turn], value, bytes);
    Yield();
    const Fiber& other = *fibers_[thread ^ static_cast<size_t>(lane_mask)];
    std::memcpy(value, other.exchanged[turn], bytes);
  }

  unsigned char* shared() {
    auto* const begin = shared_.data();
    return begin + (16 - reinterpret_cast<uintptr_t>(begin) % 16) % 16;
  }

  static thread_local Block* running;

 private:
  static constexpr size_t kGuard = 256;
  static constexpr unsigned char kUntouched = 0xcd;

  static void Main() {
    Block& block = *running;
    for (;;) {
      (*block.body_)();
      block.current_->done = true;
      block.Yield();
    }
  }

  void Resume(int thread) {
    current_ = fibers_[static_cast<size_t>(thread)].get();
    thread_index = {static_cast<unsigned>(thread), 0};
    if (_setjmp(resumer_) != 0) return;
    if (current_->started) _longjmp(current_->place, 1);
    current_->started = true;
    getcontext(&current_->start);
    current_->start.uc_stack.ss_sp = current_->stack.get();
    current_->start.uc_stack.ss_size = kStackBytes;
    current_->start.uc_link = nullptr;
    makecontext(&current_->start, &Block::Main, 0);
    setcontext(&current_->start);
  }

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<unsigned char> shared_;
  size_t shared_bytes_ = 0;
  Index index_;
  int threads_ = 0;
  const std::function<void()>* body_ = nullptr;
  Fiber* current_ = nullptr;
  jmp_buf resumer_;
};

thread_local Block* Block::running = nullptr;

}  // namespace

void SyncThreads() { Block::running->Yield(); }

void Exchange(void* value, size_t bytes, int lane_mask) {
  Block::running->Exchange(value, bytes, lane_mask);
}

unsigned char* SharedMemory() { return Block::running->shared(); }

void RunGrid(int64_t blocks, int64_t blocks_y, int threads, int64_t shared_bytes,
             const std::function<void()>& thread) {
  thread_local Block block;  // kept for the next launch
  block_dim = {static_cast<unsigned>(threads), 1};
  grid_dim = {static_cast<unsigned>(blocks), static_cast<unsigned>(blocks_y)};
  for (int64_t y = 0; y < blocks_y; ++y) {
    for (int64_t x = 0; x < blocks; ++x) {
      const Index index = {static_cast<unsigned>(x), static_cast<unsigned>(y)};
      if (shared_bytes == 0) {  // no barriers either
        block_index = index;
        for (int t = 0; t < threads; ++t) {
          thread_index = {static_cast<unsigned>(t), 0};
          thread();
        }
        continue;
      }
      block.Begin(index, threads, shared_bytes, thread);
      while (block.Step()) {
      }
    }
  }
}

}  // namespace normd::emulated
