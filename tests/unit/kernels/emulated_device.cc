#include "tests/unit/kernels/emulated_device.h"

#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <utility>

#include <sys/mman.h>
#include <unistd.h>

#include "tests/unit/kernels/emulated_gpu.h"
// After the GPU that it runs on.
#include "kernels/cuda/passes-inl.h"

namespace normd {
namespace {

// Memory whose end is the end of a page, with no page after it: who reads or writes
// past it dies.
class GuardedMemory {
 public:
  void* Get(size_t bytes) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t rounded = (bytes + 15) / 16 * 16;
    const size_t usable = (rounded + page - 1) / page * page;
    void* const all = mmap(nullptr, usable + page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) return nullptr;
    mprotect(all, usable, PROT_READ | PROT_WRITE);
    void* const memory = static_cast<char*>(all) + (usable - rounded);
    std::memset(memory, 0x5a, rounded);
    const std::lock_guard lock(mutex_);
    blocks_[memory] = {all, usable + page, bytes};
    return memory;
  }

  // Bytes it had.
  size_t Put(void* memory) {
    const std::lock_guard lock(mutex_);
    const auto at = blocks_.find(memory);
    const Block block = at->second;
    blocks_.erase(at);
    munmap(block.all, block.mapped);
    return block.bytes;
  }

 private:
  struct Block {
    void* all;
    size_t mapped;
    size_t bytes;
  };
  std::mutex mutex_;
  std::map<void*, Block> blocks_;
};

// Does nothing before it is waited for: who forgets to wait finds nothing done.
class EmulatedStream final : public cuda::Stream {
 public:
  explicit EmulatedStream(EmulatedState& state) : state_(state) { ++state_.streams; }
  ~EmulatedStream() override { --state_.streams; }

  Outcome CopyIn(void* device, const void* pinned, size_t bytes) override {
    state_.bytes_in += static_cast<int64_t>(bytes);
    return Enqueue([=] { std::memcpy(device, pinned, bytes); });
  }
  Outcome CopyOut(void* pinned, const void* device, size_t bytes) override {
    return Enqueue([=] { std::memcpy(pinned, device, bytes); });
  }
  Outcome CopyWithin(void* to, const void* from, size_t bytes) override {
    return Enqueue([=] { std::memcpy(to, from, bytes); });
  }
  Outcome Forward(const cuda::ForwardWork& work) override { return Launch(work); }
  Outcome Backward(const cuda::BackwardWork& work) override { return Launch(work); }
  Outcome Mark(int mark) override {
    marks_[mark] = done_ + static_cast<int64_t>(pending_.size());
    return state();
  }
  Outcome WaitFor(int mark) override { return DoUntil(marks_[mark]); }
  Outcome Wait() override { return DoUntil(done_ + static_cast<int64_t>(pending_.size())); }

 private:
  Outcome state() const { return state_.fail ? Outcome::kDeviceFailed : Outcome::kOk; }

  Outcome Enqueue(std::function<void()> work) {
    if (state_.fail) return Outcome::kDeviceFailed;
    pending_.push_back(std::move(work));
    return Outcome::kOk;
  }

  Outcome DoUntil(int64_t count) {
    for (; done_ < count; ++done_) {
      pending_.front()();
      pending_.pop_front();
    }
    return state();
  }

  template <class Work>
  Outcome Launch(const Work& work) {
    ++state_.launches;
    if (state_.on_launch) state_.on_launch();
    return Enqueue([this, work] { cuda::Run(emulated::Launch{&state_.kernels}, work); });
  }

  EmulatedState& state_;
  std::deque<std::function<void()>> pending_;
  int64_t done_ = 0;  // of all so far
  int64_t marks_[kMarks] = {};
};

class EmulatedDevice final : public cuda::Device {
 public:
  explicit EmulatedDevice(std::shared_ptr<EmulatedState> state) : state_(std::move(state)) {}

  DeviceInfo info() const override {
    return {.name = "emulated", .memory_bytes = state_->memory_bytes};
  }
  Outcome Allocate(size_t bytes, void** memory) override {
    const auto wanted = static_cast<int64_t>(bytes);
    if (state_->bytes_in_use.fetch_add(wanted) + wanted > state_->memory_bytes) {
      state_->bytes_in_use -= wanted;
      return Outcome::kOutOfMemory;
    }
    *memory = memory_.Get(bytes);
    return Outcome::kOk;
  }
  void Free(void* memory) override {
    state_->bytes_in_use -= static_cast<int64_t>(memory_.Put(memory));
  }
  Outcome AllocatePinned(size_t bytes, void** memory) override {
    *memory = memory_.Get(bytes);
    state_->pinned_bytes += static_cast<int64_t>(bytes);
    return Outcome::kOk;
  }
  void FreePinned(void* memory) override {
    state_->pinned_bytes -= static_cast<int64_t>(memory_.Put(memory));
  }
  Outcome OpenShared(const DeviceHandle& handle, void** memory, size_t* bytes) override {
    const auto found = state_->shared.find(handle);
    if (found == state_->shared.end()) return Outcome::kRefused;
    ++state_->shared_open;
    *memory = found->second.data();
    *bytes = found->second.size();
    return Outcome::kOk;
  }
  void CloseShared(void*) override { --state_->shared_open; }
  std::unique_ptr<cuda::Stream> NewStream() override {
    return std::make_unique<EmulatedStream>(*state_);
  }
  size_t ScratchBytes(const cuda::ForwardWork& work) const override {
    return cuda::ScratchBytesOf<emulated::Launch>(work);
  }
  size_t ScratchBytes(const cuda::BackwardWork& work) const override {
    return cuda::ScratchBytesOf<emulated::Launch>(work);
  }

 private:
  const std::shared_ptr<EmulatedState> state_;
  GuardedMemory memory_;
};

}  // namespace

std::unique_ptr<cuda::Device> MakeEmulatedDevice(std::shared_ptr<EmulatedState> state) {
  return std::make_unique<EmulatedDevice>(std::move(state));
}

}  // namespace normd
