#include "kernels/cuda/cuda_backend.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <type_traits>
#include <utility>

#include "kernels/cuda/budgeted_device.h"
#include "kernels/cuda/chunked_forward.h"
#include "kernels/cuda/constants.h"
#include "kernels/cuda/lane.h"

namespace normd {
namespace cuda {
namespace {

// Idle lanes that a device keeps, and with them their memory.
constexpr size_t kIdleLanes = 8;
// The part of a device's budget that constants may take.
constexpr int64_t kConstantsShare = 16;

// A device, its lanes and what lasts on it. Thread-safe.
class DeviceState {
 public:
  DeviceState(std::unique_ptr<Device> device, const CudaOptions& options)
      : device_(std::move(device), options.memory_budget, options.claim_pinned),
        constants_(device_, static_cast<size_t>(device_.budget() / kConstantsShare)) {}

  Device& device() { return device_; }
  Constants& constants() { return constants_; }
  bool healthy() const { return healthy_.load(std::memory_order_relaxed); }
  int64_t bytes_under_way() const { return bytes_under_way_.load(std::memory_order_relaxed); }

  DeviceInfo info() const {
    DeviceInfo info = device_.info();
    info.healthy = healthy();
    return info;
  }

  // Whether it was healthy until now.
  bool MarkFailed() { return healthy_.exchange(false, std::memory_order_relaxed); }

  // Runs call(lane) on a lane with so many bytes.
  template <class Call>
  Outcome Run(size_t bytes, Call call) {
    bytes_under_way_ += static_cast<int64_t>(bytes);
    std::unique_ptr<Lane> lane = Take();
    Outcome outcome = lane->Prepare(bytes);
    if (outcome == Outcome::kOutOfMemory) {
      // What is kept for calls to come may be enough.
      DropIdle();
      outcome = lane->Prepare(bytes);
    }
    if (outcome == Outcome::kOutOfMemory) {
      constants_.Release();
      outcome = lane->Prepare(bytes);
    }
    if (outcome == Outcome::kOk) outcome = call(*lane);
    bytes_under_way_ -= static_cast<int64_t>(bytes);
    if (outcome == Outcome::kOk || outcome == Outcome::kStopped) Put(std::move(lane));
    return outcome;
  }

  // Gives up lanes that no call uses.
  void DropIdle() {
    std::vector<std::unique_ptr<Lane>> dropped;
    const std::lock_guard lock(mutex_);
    dropped.swap(idle_);
  }

 private:
  std::unique_ptr<Lane> Take() {
    {
      const std::lock_guard lock(mutex_);
      if (!idle_.empty()) {
        std::unique_ptr<Lane> lane = std::move(idle_.back());
        idle_.pop_back();
        return lane;
      }
    }
    return std::make_unique<Lane>(device_);
  }

  void Put(std::unique_ptr<Lane> lane) {
    const std::lock_guard lock(mutex_);
    if (idle_.size() < kIdleLanes) idle_.push_back(std::move(lane));
  }

  BudgetedDevice device_;
  Constants constants_;
  std::atomic<bool> healthy_ = true;
  std::atomic<int64_t> bytes_under_way_ = 0;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Lane>> idle_;
};

// The parts of a call and where they lie on the device: what goes in, what comes out,
// then scratch.
class Layout {
 public:
  Layout(DeviceState& device, Place place, DType dtype)
      : device_(device), place_(place), octet_bytes_(8 * SizeOf(dtype)) {}

  DeviceState& device() const { return device_; }

  // `pointer` is to host memory until Bind(), to device memory then; a tensor's may be
  // that already.
  template <class T>
  void Input(T*& pointer, size_t bytes, bool tensor) {
    Add(pointer, bytes, tensor, kIn, kRealignedIn);
  }
  template <class T>
  void Output(T*& pointer, size_t bytes, bool tensor) {
    Add(pointer, bytes, tensor, kOut, kRealignedOut);
  }

  // Parameters and statistics: where `block` is on the device, or an input, which stays there
  // if it has a token.
  template <class T>
  void Constant(T*& pointer, const Block& block) {
    if (pointer == nullptr) return;
    if (block.token != nullptr) {
      if (auto slot = device_.constants().Find(block); slot != nullptr) {
        pointer = reinterpret_cast<T*>(slot->memory());
        used_.push_back(std::move(slot));
        return;
      }
      missing_.push_back({block, parcels_[kIn].bytes()});
    }
    Input(pointer, block.bytes, false);
  }

  // Leaves a copy of what was not there, when the stream has come so far.
  Outcome KeepMissing(Stream& stream, const std::byte* memory) {
    for (Missing& missing : missing_) {
      missing.slot = device_.constants().Reserve(missing.block);
      if (missing.slot == nullptr) continue;
      const Outcome outcome =
          stream.CopyWithin(missing.slot->memory(), memory + missing.offset, missing.block.bytes);
      if (outcome != Outcome::kOk) return outcome;
    }
    return Outcome::kOk;
  }
  // The stream has come so far.
  void PublishMissing() {
    for (Missing& missing : missing_) {
      if (missing.slot != nullptr) {
        device_.constants().Publish(missing.block, std::move(missing.slot));
      }
    }
  }

  // Copies tensors of the device that have to lie elsewhere while the kernels run, there and back.
  Outcome CopyRealignedIn(Stream& stream, std::byte* memory) const {
    return ForEachRealigned(kRealignedIn, memory, [&](void* theirs, void* copy, size_t bytes) {
      return stream.CopyWithin(copy, theirs, bytes);
    });
  }
  Outcome CopyRealignedOut(Stream& stream, std::byte* memory) const {
    return ForEachRealigned(kRealignedOut, memory, [&](void* theirs, void* copy, size_t bytes) {
      return stream.CopyWithin(theirs, copy, bytes);
    });
  }

  size_t bytes(size_t scratch) const { return OffsetOf(kScratch) + scratch; }
  const Parcel& in() const { return parcels_[kIn]; }
  const Parcel& out() const { return parcels_[kOut]; }
  std::byte* OutAt(std::byte* memory) const { return memory + OffsetOf(kOut); }

  // Sets the pointers to their places in `memory`; answers where scratch begins.
  std::byte* Bind(std::byte* memory) const {
    for (const Binding& binding : bindings_) {
      binding.set(memory + OffsetOf(binding.part) + binding.offset);
    }
    return memory + OffsetOf(kScratch);
  }

 private:
  // What lies one behind the other: what the host sends and gets, tensors of the device that
  // are copied there and from there, and scratch.
  enum Part : uint8_t { kIn, kOut, kRealignedIn, kRealignedOut, kScratch };
  struct Binding {
    std::function<void(std::byte*)> set;
    Part part;
    size_t offset;
  };

  size_t OffsetOf(Part part) const {
    size_t offset = 0;
    for (int before = kIn; before < part; ++before) offset += parcels_[before].bytes();
    return offset;
  }

  template <class T>
  void Add(T*& pointer, size_t bytes, bool tensor, Part of_host, Part of_device) {
    if (pointer == nullptr) return;
    const bool is_there = tensor && place_ == Place::kDevice;
    // The kernels load 16 bytes at a time, octets to the end. Bytes of a mask may lie anywhere.
    const bool lies_well =
        std::is_same_v<std::remove_const_t<T>, uint8_t> ||
        (reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && bytes % octet_bytes_ == 0);
    if (is_there && lies_well) return;
    const Part part = is_there ? of_device : of_host;
    const size_t offset = parcels_[part].Add(pointer, bytes);
    bindings_.push_back(
        {[&pointer](std::byte* at) { pointer = reinterpret_cast<T*>(at); }, part, offset});
  }

  template <class Copy>
  Outcome ForEachRealigned(Part part, std::byte* memory, Copy copy) const {
    for (const Parcel::Segment& segment : parcels_[part].segments()) {
      const Outcome outcome =
          copy(segment.host, memory + OffsetOf(part) + segment.offset, segment.bytes);
      if (outcome != Outcome::kOk) return outcome;
    }
    return Outcome::kOk;
  }

  struct Missing {
    Block block;
    size_t offset;  // of the copy that travels
    std::shared_ptr<const Slot> slot = nullptr;
  };
  DeviceState& device_;
  const Place place_;
  const size_t octet_bytes_;
  std::vector<std::shared_ptr<const Slot>> used_;
  std::vector<Missing> missing_;
  Parcel parcels_[kScratch];
  std::vector<Binding> bindings_;
};

void ZeroDoubles(double* values, int64_t count) {
  if (values != nullptr) std::fill_n(values, count, 0.0);
}

class CudaBackend final : public Backend {
 public:
  CudaBackend(std::vector<std::unique_ptr<Device>> devices, const CudaOptions& options)
      : on_failure_(options.on_failure) {
    for (auto& device : devices) {
      devices_.push_back(std::make_unique<DeviceState>(std::move(device), options));
    }
  }

  std::string_view name() const override { return "cuda"; }

  std::vector<DeviceInfo> devices() const override {
    std::vector<DeviceInfo> infos;
    for (const auto& device : devices_) infos.push_back(device->info());
    return infos;
  }

  bool Supports(Place place) const override {
    return place == Place::kHost || devices_.size() == 1;
  }

  Outcome OpenShared(const DeviceHandle& handle, std::shared_ptr<void>* memory,
                     int64_t* bytes) override {
    if (!Supports(Place::kDevice)) return Outcome::kRefused;
    DeviceState& device = *devices_.front();
    if (!device.healthy()) return Outcome::kDeviceFailed;
    void* opened = nullptr;
    size_t size = 0;
    const Outcome outcome = device.device().OpenShared(handle, &opened, &size);
    if (outcome != Outcome::kOk) return outcome;
    *memory =
        std::shared_ptr<void>(opened, [&device](void* at) { device.device().CloseShared(at); });
    *bytes = static_cast<int64_t>(size);
    return Outcome::kOk;
  }

  void ReleaseIdle() override {
    for (const auto& device : devices_) device->DropIdle();
  }

  Outcome ForwardByBatch(const NormProblem& problem, const ForwardByBatchArgs& args, Place place,
                         std::stop_token stop) override {
    return Forward({.problem = problem,
                    .count = problem.size(),
                    .x = args.x,
                    .y = args.y,
                    .weight = args.affine.weight,
                    .bias = args.affine.bias,
                    .moments = args.moments,
                    .epilogue = args.epilogue},
                   args.lasting, place, stop);
  }

  Outcome ForwardByStatistics(const NormProblem& problem, const ForwardByStatisticsArgs& args,
                              Place place, std::stop_token stop) override {
    return Forward({.problem = problem,
                    .count = problem.size(),
                    .x = args.x,
                    .y = args.y,
                    .weight = args.affine.weight,
                    .bias = args.affine.bias,
                    .statistics = args.statistics,
                    .epilogue = args.epilogue},
                   args.lasting, place, stop);
  }

  Outcome ForwardRange(const NormProblem& problem, const ForwardRangeArgs& args, Place place,
                       std::stop_token stop) override {
    if (args.count == 0) return Outcome::kOk;
    ForwardWork work{.problem = problem,
                     .first = args.first,
                     .count = args.count,
                     .x = args.x,
                     .y = args.y,
                     .weight = args.affine.weight,
                     .bias = args.affine.bias,
                     .statistics = args.statistics,
                     .statistics_of_batch = args.statistics_of_batch,
                     .epilogue = args.epilogue};
    Lasting lasting = args.lasting;
    // A part of them, then.
    if (problem.reduction == Reduction::kPerSampleGroup) lasting.mean = lasting.var = nullptr;
    KeepTouchedSamples(work);
    return Forward(work, lasting, place, stop);
  }

  Outcome Backward(const NormProblem& problem, const BackwardArgs& args, Place place,
                   std::stop_token stop) override {
    const size_t parameters = ParameterBytes(problem);
    if (problem.size() == 0) {
      for (void* gradient : {args.grad_weight, args.grad_bias}) {
        if (gradient != nullptr) std::memset(gradient, 0, parameters);
      }
      return Outcome::kOk;
    }
    BackwardWork work{.problem = problem, .args = args};
    const size_t tensor = TensorBytes(problem);
    const size_t sets = SetBytes(problem);
    BackwardArgs& on_device = work.args;
    // Gradients by constant statistics have no use for x.
    if (!args.statistics_of_batch && args.grad_weight == nullptr && args.grad_bias == nullptr) {
      on_device.x = nullptr;
    }
    const Block weight{args.lasting.weight, parameters};
    const Block mean{args.lasting.mean, sets};
    const Block var{args.lasting.var, sets};
    DeviceState* const device = Choose({weight, mean, var});
    if (device == nullptr) return Outcome::kDeviceFailed;
    Layout layout(*device, place, problem.dtype);
    layout.Constant(on_device.weight, weight);
    layout.Constant(on_device.statistics.mean, mean);
    layout.Constant(on_device.statistics.var, var);
    layout.Input(on_device.relu_mask, static_cast<size_t>(ReluMaskBytes(problem.size())), true);
    layout.Input(on_device.x, tensor, true);
    layout.Input(on_device.grad_y, tensor, true);
    layout.Output(on_device.grad_weight, parameters, false);
    layout.Output(on_device.grad_bias, parameters, false);
    layout.Output(on_device.grad_x, tensor, true);
    layout.Output(on_device.grad_residual, tensor, true);
    return Run(
        layout, work, stop, [&](const Device& device) { return device.ScratchBytes(work); },
        [&](Lane& lane) { return lane.stream().Backward(work); });
  }

 private:
  static size_t TensorBytes(const NormProblem& problem) {
    return static_cast<size_t>(problem.size()) * SizeOf(problem.dtype);
  }
  static size_t ParameterBytes(const NormProblem& problem) {
    return static_cast<size_t>(problem.channels) * SizeOf(problem.parameter_dtype());
  }
  static size_t SetBytes(const NormProblem& problem) {
    return static_cast<size_t>(problem.num_sets()) * sizeof(double);
  }

  Outcome Forward(ForwardWork work, const Lasting& lasting, Place place,
                  const std::stop_token& stop) {
    const NormProblem& problem = work.problem;
    if (problem.size() == 0) {
      ZeroDoubles(work.moments.mean, problem.num_sets());
      ZeroDoubles(work.moments.m2, problem.num_sets());
      return Outcome::kOk;
    }
    const size_t tensor = static_cast<size_t>(work.count) * SizeOf(problem.dtype);
    const auto mask = static_cast<size_t>(ReluMaskBytes(work.count));
    const size_t parameters = ParameterBytes(problem);
    const size_t sets = SetBytes(problem);
    if (work.y == nullptr) work.epilogue = {};
    const Block weight{lasting.weight, parameters};
    const Block bias{lasting.bias, parameters};
    const Block mean{lasting.mean, sets};
    const Block var{lasting.var, sets};
    DeviceState* const device = Choose({weight, bias, mean, var});
    if (device == nullptr) return Outcome::kDeviceFailed;
    Layout layout(*device, place, problem.dtype);
    layout.Constant(work.weight, weight);
    layout.Constant(work.bias, bias);
    layout.Constant(work.statistics.mean, mean);
    layout.Constant(work.statistics.var, var);
    const ChunkedForward chunked(work);
    if (place == Place::kHost && work.moments.mean == nullptr && chunked.has_chunks()) {
      return Run(
          layout, work, stop, [&](const Device& device) { return chunked.DeviceBytes(device); },
          [&](Lane& lane) { return chunked.Run(lane, work, stop); });
    }
    layout.Input(work.x, tensor, true);
    layout.Input(work.epilogue.residual, tensor, true);
    layout.Output(work.moments.mean, sets, false);
    layout.Output(work.moments.m2, sets, false);
    layout.Output(work.epilogue.relu_mask, mask, true);
    layout.Output(work.y, tensor, true);
    return Run(
        layout, work, stop, [&](const Device& device) { return device.ScratchBytes(work); },
        [&](Lane& lane) { return lane.stream().Forward(work); });
  }

  // The healthy device with the fewest bytes to move, were it to take a call with these
  // blocks; null: none is healthy.
  DeviceState* Choose(std::vector<Block> blocks) const {
    std::erase_if(blocks, [](const Block& block) { return block.token == nullptr; });
    DeviceState* best = nullptr;
    int64_t fewest = 0;
    for (const auto& device : devices_) {
      if (!device->healthy()) continue;
      const int64_t bytes =
          device->bytes_under_way() + static_cast<int64_t>(device->constants().Missing(blocks));
      if (best == nullptr || bytes < fewest) {
        best = device.get();
        fewest = bytes;
      }
    }
    return best;
  }

  // Runs compute(lane) with all of the layout and scratch_bytes(device) where `work` says.
  template <class Work, class ScratchBytes, class Compute>
  Outcome Run(Layout& layout, Work& work, const std::stop_token& stop, ScratchBytes scratch_bytes,
              Compute compute) {
    if (stop.stop_requested()) return Outcome::kStopped;
    DeviceState& device = layout.device();
    const size_t scratch = scratch_bytes(device.device());
    const Outcome outcome = device.Run(layout.bytes(scratch), [&](Lane& lane) {
      std::byte* const memory = lane.memory();
      work.scratch = layout.Bind(memory);
      Outcome outcome = lane.In(layout.in(), memory, stop);
      if (outcome == Outcome::kOk) outcome = layout.KeepMissing(lane.stream(), memory);
      if (outcome == Outcome::kOk) outcome = layout.CopyRealignedIn(lane.stream(), memory);
      if (outcome == Outcome::kOk) outcome = compute(lane);
      if (outcome == Outcome::kOk) outcome = layout.CopyRealignedOut(lane.stream(), memory);
      if (outcome != Outcome::kOk) return outcome;
      return lane.Out(layout.out(), layout.OutAt(memory), stop);
    });
    if (outcome == Outcome::kOk) layout.PublishMissing();
    if (outcome == Outcome::kDeviceFailed && device.MarkFailed() && on_failure_ != nullptr) {
      on_failure_(device.info(), static_cast<int>(std::count_if(
                                     devices_.begin(), devices_.end(),
                                     [](const auto& other) { return other->healthy(); })));
    }
    return outcome;
  }

  const std::function<void(const DeviceInfo&, int)> on_failure_;
  std::vector<std::unique_ptr<DeviceState>> devices_;
};

}  // namespace

std::unique_ptr<Backend> MakeBackend(std::vector<std::unique_ptr<Device>> devices,
                                     const CudaOptions& options) {
  return std::make_unique<CudaBackend>(std::move(devices), options);
}

}  // namespace cuda

std::unique_ptr<Backend> MakeCudaBackend(const CudaOptions& options, std::string* why) {
  auto devices = cuda::OpenDevices(options.devices, why);
  if (devices.empty()) return nullptr;
  return cuda::MakeBackend(std::move(devices), options);
}

}  // namespace normd
