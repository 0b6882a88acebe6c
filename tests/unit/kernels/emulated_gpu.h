// A GPU played by the host, so that the kernels' own source is tested where there is no
// device: blocks run one after another; the threads of a block as fibers that change at
// __syncthreads() and nowhere else, every other block in reverse order. A barrier that some threads
// of a block miss ends the process.
#ifndef NORMD_TESTS_UNIT_KERNELS_EMULATED_GPU_H_
#define NORMD_TESTS_UNIT_KERNELS_EMULATED_GPU_H_

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

namespace normd::emulated {

struct Index {
  unsigned x = 0, y = 0;
};

inline thread_local Index thread_index, block_index, block_dim, grid_dim;

// Runs `thread` once for each of the threads of each block.
void RunGrid(int64_t blocks, int64_t blocks_y, int threads, int64_t shared_bytes,
             const std::function<void()>& thread);
void SyncThreads();
// Of at most 64 bytes.
void Exchange(void* value, size_t bytes, int lane_mask);
unsigned char* SharedMemory();

// Ends the process where a launch asks for more than a device need have.
struct Launch {
  std::atomic<int>* kernels;

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int64_t blocks_y, int threads,
                  int64_t shared_bytes, Arguments... arguments) const {
    Check(threads <= 1024 && shared_bytes <= kMostShared);
    ++*kernels;
    RunGrid(blocks, blocks_y, threads, shared_bytes, [&] { kernel(arguments...); });
  }

 private:
  static constexpr int64_t kMostShared = int64_t{48} << 10;

  static void Check(bool fits) {
    if (fits) return;
    std::fprintf(stderr, "a launch does not fit the device\n");
    std::abort();
  }
};

}  // namespace normd::emulated

namespace normd::cuda {

template <class V>
V FromOtherLane(V value, int mask) {
  emulated::Exchange(&value, sizeof(V), mask);
  return value;
}

}  // namespace normd::cuda

// The words of CUDA that the kernels use.
#define threadIdx ::normd::emulated::thread_index
#define blockIdx ::normd::emulated::block_index
#define blockDim ::normd::emulated::block_dim
#define gridDim ::normd::emulated::grid_dim
#define __syncthreads ::normd::emulated::SyncThreads
#define NORMD_SHARED(name) unsigned char* const name = ::normd::emulated::SharedMemory()

#endif  // NORMD_TESTS_UNIT_KERNELS_EMULATED_GPU_H_
