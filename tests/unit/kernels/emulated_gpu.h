// A GPU played by the host, so that the kernels' own source is tested where there is no
// device: blocks run one after another, those of a cooperative launch in turns from barrier
// to barrier; the threads of a block as fibers that change at __syncthreads() and nowhere
// else, every other block in reverse order. A barrier that some threads of a block miss
// ends the process.
#ifndef NORMD_TESTS_UNIT_KERNELS_EMULATED_GPU_H_
#define NORMD_TESTS_UNIT_KERNELS_EMULATED_GPU_H_

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

#include "kernels/cuda/residence.h"

namespace normd::emulated {

struct Index {
  unsigned x = 0, y = 0;
};

inline thread_local Index thread_index, block_index, block_dim, grid_dim;

// Runs `thread` once for each of the threads of each block.
void RunGrid(int64_t blocks, int64_t blocks_y, int threads, int64_t shared_bytes,
             const std::function<void()>& thread);
void RunTogether(int64_t blocks, int threads, int64_t shared_bytes,
                 const std::function<void()>& thread);
void SyncThreads();
void Meet(unsigned* arrived, unsigned parts);
unsigned char* SharedMemory();

// Ends the process where a launch asks for more than the device has.
struct Launch {
  cuda::Limits of_device;
  std::atomic<int>* kernels;
  std::atomic<int>* cooperative_kernels;

  const cuda::Limits& limits() const { return of_device; }

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int64_t blocks_y, int threads,
                  int64_t shared_bytes, Arguments... arguments) const {
    Check(threads <= 1024 && shared_bytes <= of_device.shared_bytes);
    ++*kernels;
    RunGrid(blocks, blocks_y, threads, shared_bytes, [&] { kernel(arguments...); });
  }

  template <class... Parameters, class... Arguments>
  void Cooperative(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
                   Arguments... arguments) const {
    Check(threads <= 1024 && shared_bytes <= of_device.shared_bytes);
    Check(of_device.cooperative && blocks <= of_device.multiprocessors);
    ++*kernels;
    ++*cooperative_kernels;
    RunTogether(blocks, threads, shared_bytes, [&] { kernel(arguments...); });
  }

  void Zero(void* memory, size_t bytes) const { std::memset(memory, 0, bytes); }

 private:
  static void Check(bool fits) {
    if (fits) return;
    std::fprintf(stderr, "a launch does not fit the device\n");
    std::abort();
  }
};

}  // namespace normd::emulated

// The words of CUDA that the kernels use.
#define threadIdx ::normd::emulated::thread_index
#define blockIdx ::normd::emulated::block_index
#define blockDim ::normd::emulated::block_dim
#define gridDim ::normd::emulated::grid_dim
#define __syncthreads ::normd::emulated::SyncThreads
#define MeetBlocks ::normd::emulated::Meet
#define NORMD_SHARED(name) unsigned char* const name = ::normd::emulated::SharedMemory()

#endif  // NORMD_TESTS_UNIT_KERNELS_EMULATED_GPU_H_
