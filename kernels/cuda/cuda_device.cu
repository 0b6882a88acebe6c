// The devices of this machine, by the CUDA runtime.
#include <cstring>
#include <string>
#include <utility>

#include <cuda.h>
#include <cuda_runtime.h>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/passes-inl.h"

namespace normd::cuda {
namespace {

// An error of memory or of arguments is the call's; any other has spoiled the context.
Outcome ToOutcome(cudaError_t error) {
  if (error == cudaSuccess) return Outcome::kOk;
  // Else the next call would report it again.
  (void)cudaGetLastError();
  return error == cudaErrorMemoryAllocation ? Outcome::kOutOfMemory : Outcome::kDeviceFailed;
}

struct CudaLaunch {
  cudaStream_t stream;
  bool can_launch_early;
  Outcome* outcome;

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int64_t blocks_y, int threads,
                  int64_t shared_bytes, Arguments... arguments) const {
    if (*outcome != Outcome::kOk) return;
    constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;
    if (blocks > kMostBlocks || blocks_y > 65535) {
      *outcome = Outcome::kOutOfMemory;  // more sets than a grid has blocks
      return;
    }
    // Launched while the kernel before runs, for which it waits (AwaitKernelBefore).
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(blocks_y));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = can_launch_early ? 1 : 0;
    *outcome =
        ToOutcome(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
  }
};

class CudaStream final : public Stream {
 public:
  CudaStream(int device, bool can_launch_early)
      : device_(device), can_launch_early_(can_launch_early) {}
  ~CudaStream() override {
    (void)cudaSetDevice(device_);
    for (cudaEvent_t mark : marks_) {
      if (mark != nullptr) (void)cudaEventDestroy(mark);
    }
    if (stream_ != nullptr) (void)cudaStreamDestroy(stream_);
  }

  bool Open() {
    if (cudaSetDevice(device_) != cudaSuccess) return false;
    if (cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking) != cudaSuccess) return false;
    for (cudaEvent_t& mark : marks_) {
      if (cudaEventCreateWithFlags(&mark, cudaEventDisableTiming) != cudaSuccess) return false;
    }
    return true;
  }

  Outcome CopyIn(void* device, const void* pinned, size_t bytes) override {
    return Do(
        [&] { return cudaMemcpyAsync(device, pinned, bytes, cudaMemcpyHostToDevice, stream_); });
  }
  Outcome CopyOut(void* pinned, const void* device, size_t bytes) override {
    return Do(
        [&] { return cudaMemcpyAsync(pinned, device, bytes, cudaMemcpyDeviceToHost, stream_); });
  }
  Outcome CopyWithin(void* to, const void* from, size_t bytes) override {
    return Do([&] { return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_); });
  }
  Outcome Forward(const ForwardWork& work) override { return Enqueue(work); }
  Outcome Backward(const BackwardWork& work) override { return Enqueue(work); }
  Outcome Mark(int mark) override {
    return Do([&] { return cudaEventRecord(marks_[mark], stream_); });
  }
  Outcome WaitFor(int mark) override {
    return Do([&] { return cudaEventSynchronize(marks_[mark]); });
  }
  Outcome Wait() override {
    return Do([&] { return cudaStreamSynchronize(stream_); });
  }

 private:
  // The current device is the thread's; another call may have left another.
  template <class Call>
  Outcome Do(Call call) {
    const cudaError_t error = cudaSetDevice(device_);
    return ToOutcome(error == cudaSuccess ? call() : error);
  }

  template <class Work>
  Outcome Enqueue(const Work& work) {
    Outcome outcome = ToOutcome(cudaSetDevice(device_));
    Run(CudaLaunch{stream_, can_launch_early_, &outcome}, work);
    return outcome;
  }

  const int device_;
  const bool can_launch_early_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t marks_[kMarks] = {};
};

class CudaDevice final : public Device {
 public:
  CudaDevice(int number, const cudaDeviceProp& properties)
      : number_(number),
        info_{.name = std::string(properties.name) + " (cuda:" + std::to_string(number) + ")",
              .parallelism = properties.multiProcessorCount,
              .memory_bytes = static_cast<int64_t>(properties.totalGlobalMem)},
        can_launch_early_(properties.major >= 9) {}

  DeviceInfo info() const override { return info_; }
  Outcome Allocate(size_t bytes, void** memory) override {
    const cudaError_t error = cudaSetDevice(number_);
    return ToOutcome(error == cudaSuccess ? cudaMalloc(memory, bytes) : error);
  }
  void Free(void* memory) override {
    (void)cudaSetDevice(number_);
    (void)cudaFree(memory);
  }
  Outcome AllocatePinned(size_t bytes, void** memory) override {
    const cudaError_t error = cudaSetDevice(number_);
    return ToOutcome(error == cudaSuccess ? cudaMallocHost(memory, bytes) : error);
  }
  void FreePinned(void* memory) override {
    (void)cudaSetDevice(number_);
    (void)cudaFreeHost(memory);
  }
  Outcome OpenShared(const DeviceHandle& handle, void** memory, size_t* bytes) override {
    static_assert(sizeof(handle) == sizeof(cudaIpcMemHandle_t));
    cudaIpcMemHandle_t opaque;
    std::memcpy(&opaque, handle.data(), sizeof(opaque));
    if (cudaSetDevice(number_) != cudaSuccess) return Outcome::kDeviceFailed;
    // Whatever is wrong with a handle, that is for its sender to know: it spoils nothing here.
    const cudaError_t opened = cudaIpcOpenMemHandle(memory, opaque, cudaIpcMemLazyEnablePeerAccess);
    if (opened != cudaSuccess) {
      (void)cudaGetLastError();
      return opened == cudaErrorMemoryAllocation ? Outcome::kOutOfMemory : Outcome::kRefused;
    }
    if (IsHere(*memory) && BytesFrom(*memory, bytes)) return Outcome::kOk;
    (void)cudaGetLastError();
    (void)cudaIpcCloseMemHandle(*memory);
    return Outcome::kRefused;
  }
  void CloseShared(void* memory) override {
    (void)cudaSetDevice(number_);
    (void)cudaIpcCloseMemHandle(memory);
  }
  std::unique_ptr<Stream> NewStream() override {
    auto stream = std::make_unique<CudaStream>(number_, can_launch_early_);
    if (!stream->Open()) return nullptr;
    return stream;
  }
  size_t ScratchBytes(const ForwardWork& work) const override {
    return ScratchBytesOf<CudaLaunch>(work);
  }
  size_t ScratchBytes(const BackwardWork& work) const override {
    return ScratchBytesOf<CudaLaunch>(work);
  }

 private:
  // A handle may name another device's memory, which this one would reach over the bus.
  bool IsHere(const void* memory) const {
    cudaPointerAttributes attributes;
    return cudaPointerGetAttributes(&attributes, memory) == cudaSuccess &&
           attributes.type == cudaMemoryTypeDevice && attributes.device == number_;
  }

  // The bytes from `memory` to the end of its allocation, as the driver has it: the runtime
  // does not tell, and the driver's library is not linked.
  static bool BytesFrom(const void* memory, size_t* bytes) {
    void* symbol = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuMemGetAddressRange", &symbol,
                                                               3020, cudaEnableDefault, &found);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuMemGetAddressRange", &symbol, cudaEnableDefault, &found);
#endif
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess || symbol == nullptr) {
      return false;
    }
    using AddressRange = CUresult (*)(CUdeviceptr*, size_t*, CUdeviceptr);
    const auto at = reinterpret_cast<CUdeviceptr>(memory);
    CUdeviceptr begin = 0;
    size_t size = 0;
    if (reinterpret_cast<AddressRange>(symbol)(&begin, &size, at) != CUDA_SUCCESS) return false;
    *bytes = size - (at - begin);
    return true;
  }

  const int number_;
  const DeviceInfo info_;
  const bool can_launch_early_;
};

// Whether this build has kernels for the device, too.
cudaError_t Probe(int number, cudaDeviceProp& properties) {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaSetDevice(number);
  if (error == cudaSuccess) error = cudaGetDeviceProperties(&properties, number);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, PrepareSets<float>);
  return error;
}

}  // namespace

std::vector<std::unique_ptr<Device>> OpenDevices(const std::vector<int>& numbers,
                                                 std::string* why) {
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess) {
    *why = std::string("no CUDA device can be used: ") + cudaGetErrorString(error);
    return {};
  }
  std::vector<int> wanted = numbers;
  if (wanted.empty()) {
    for (int number = 0; number < count; ++number) wanted.push_back(number);
  }
  if (wanted.empty()) *why = "this machine has no CUDA device";
  std::vector<std::unique_ptr<Device>> devices;
  for (const int number : wanted) {
    cudaDeviceProp properties;
    const cudaError_t error =
        number < 0 || number >= count ? cudaErrorInvalidDevice : Probe(number, properties);
    if (error != cudaSuccess) {
      *why = "CUDA device " + std::to_string(number) +
             " cannot be used: " + cudaGetErrorString(error) + "; there are " +
             std::to_string(count);
      return {};
    }
    devices.push_back(std::make_unique<CudaDevice>(number, properties));
  }
  return devices;
}

}  // namespace normd::cuda
