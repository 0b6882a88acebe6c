// longjmp from stack to stack is what fibers are; the checked one takes it for an error.
#undef _FORTIFY_SOURCE
#include "tests/unit/kernels/emulated_gpu.h"

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
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
};

class Block {
 public:
  void Run(int threads, const std::function<void()>& body, bool reverse) {
    while (fibers_.size() < static_cast<size_t>(threads)) {
      fibers_.push_back(std::make_unique<Fiber>());
    }
    body_ = &body;
    for (int t = 0; t < threads; ++t) fibers_[static_cast<size_t>(t)]->done = false;
    for (bool any = true; any;) {
      int done = 0;
      for (int k = 0; k < threads; ++k) {
        const int t = reverse ? threads - 1 - k : k;
        Resume(t);
        done += fibers_[static_cast<size_t>(t)]->done ? 1 : 0;
      }
      if (done != 0 && done != threads) {
        std::fprintf(stderr, "%d of %d threads missed a barrier\n", done, threads);
        std::abort();
      }
      any = done == 0;
    }
  }

  // Back to whoever resumed this fiber.
  void Yield() {
    if (_setjmp(current_->place) == 0) _longjmp(resumer_, 1);
  }

 private:
  static void Main() {
    Block& block = Of();
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
  const std::function<void()>* body_ = nullptr;
  Fiber* current_ = nullptr;
  jmp_buf resumer_;

 public:
  static Block& Of() {
    thread_local Block block;
    return block;
  }
  std::vector<unsigned char> shared;
};

}  // namespace

void SyncThreads() { Block::Of().Yield(); }

unsigned char* SharedMemory() {
  auto* const begin = Block::Of().shared.data();
  return begin + (16 - reinterpret_cast<uintptr_t>(begin) % 16) % 16;
}

void RunGrid(int64_t blocks, int64_t blocks_y, int threads, int64_t shared_bytes,
             const std::function<void()>& thread) {
  Block& block = Block::Of();
  block_dim = {static_cast<unsigned>(threads), 1};
  grid_dim = {static_cast<unsigned>(blocks), static_cast<unsigned>(blocks_y)};
  for (int64_t y = 0; y < blocks_y; ++y) {
    for (int64_t x = 0; x < blocks; ++x) {
      block_index = {static_cast<unsigned>(x), static_cast<unsigned>(y)};
      if (shared_bytes == 0) {  // no barriers either
        for (int t = 0; t < threads; ++t) {
          thread_index = {static_cast<unsigned>(t), 0};
          thread();
        }
        continue;
      }
      block.shared.assign(static_cast<size_t>(shared_bytes) + 16, 0xcd);
      block.Run(threads, thread, x % 2 == 1);
    }
  }
}

}  // namespace normd::emulated
