#include "kernels/cuda/chunked_forward.h"

#include <algorithm>
#include <cstring>

#include "kernels/dtype.h"

namespace normd::cuda {
namespace {

constexpr int64_t kMaskWord = 64;  // elements

constexpr size_t Padded(size_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

void KeepTouchedSamples(ForwardWork& work) {
  NormProblem& problem = work.problem;
  if (problem.reduction != Reduction::kPerSampleGroup) return;
  const int64_t sample = problem.channels * problem.positions;
  const int64_t before = work.first / sample;
  work.first -= before * sample;
  problem.batch = (work.first + work.count + sample - 1) / sample;
  if (work.statistics.mean != nullptr) work.statistics.mean += before * problem.groups;
  work.statistics.var += before * problem.groups;
}

ChunkedForward::ChunkedForward(const ForwardWork& work)
    : host_(work), element_(SizeOf(work.problem.dtype)) {
  const size_t tensors = work.epilogue.residual == nullptr ? 1 : 2;
  // A word of the mask for each of its elements' words, and the tensors' padding.
  const size_t word = kMaskWord * element_ * tensors + sizeof(uint64_t);
  chunk_ = static_cast<int64_t>((Lane::kChunkBytes - 1024) / word) * kMaskWord;
}

size_t ChunkedForward::TensorBytes() const {
  return Padded(static_cast<size_t>(chunk_) * element_);
}

size_t ChunkedForward::SlotBytes() const {
  return MaskAt() + Padded(static_cast<size_t>(ReluMaskBytes(chunk_)));
}

size_t ChunkedForward::ScratchBytes(const Device& device) const {
  ForwardWork work = host_;
  if (work.problem.reduction == Reduction::kPerSampleGroup) {
    // As many samples as a chunk may touch.
    const int64_t sample = work.problem.channels * work.problem.positions;
    work.problem.batch = std::min(work.problem.batch, chunk_ / sample + 2);
  }
  return Padded(device.ScratchBytes(work));
}

size_t ChunkedForward::DeviceBytes(const Device& device) const {
  return kSlots * (SlotBytes() + ScratchBytes(device));
}

int64_t ChunkedForward::CountOf(int64_t first) const {
  return std::min(chunk_, host_.count - first);
}

Outcome ChunkedForward::Start(Lane& lane, size_t slot, int64_t first, const ForwardWork& on_device,
                              size_t scratch_bytes) const {
  Stream* const stream = lane.stream(slot);
  if (stream == nullptr) return Outcome::kDeviceFailed;
  const int64_t count = CountOf(first);
  const size_t before = static_cast<size_t>(first) * element_;
  const size_t bytes = static_cast<size_t>(count) * element_;
  std::byte* const staging = lane.staging(slot);
  auto* const scratch =
      static_cast<std::byte*>(on_device.scratch) + slot * (SlotBytes() + scratch_bytes);
  std::byte* const memory = scratch + scratch_bytes;

  ForwardWork work = on_device;
  if (host_.epilogue.residual != nullptr) {
    std::memcpy(staging, static_cast<const std::byte*>(host_.epilogue.residual) + before, bytes);
    work.epilogue.residual = memory;
  }
  std::memcpy(staging + XAt(), static_cast<const std::byte*>(host_.x) + before, bytes);
  if (host_.epilogue.relu_mask != nullptr) {
    work.epilogue.relu_mask = reinterpret_cast<uint8_t*>(memory + MaskAt());
  }
  work.first += first;
  work.count = count;
  work.x = memory + XAt();
  work.y = memory + XAt();
  work.scratch = scratch;
  KeepTouchedSamples(work);
  Outcome outcome = stream->CopyIn(memory, staging, XAt() + bytes);
  if (outcome == Outcome::kOk) outcome = stream->Forward(work);
  if (outcome != Outcome::kOk) return outcome;
  const size_t end = host_.epilogue.relu_mask == nullptr ? XAt() + bytes : SlotBytes();
  return stream->CopyOut(staging + XAt(), memory + XAt(), end - XAt());
}

Outcome ChunkedForward::Finish(Lane& lane, size_t slot, int64_t first) const {
  const Outcome outcome = lane.stream(slot)->Wait();
  if (outcome != Outcome::kOk) return outcome;
  const std::byte* const staging = lane.staging(slot);
  const int64_t count = CountOf(first);
  std::memcpy(static_cast<std::byte*>(host_.y) + static_cast<size_t>(first) * element_,
              staging + XAt(), static_cast<size_t>(count) * element_);
  if (host_.epilogue.relu_mask != nullptr) {
    std::memcpy(host_.epilogue.relu_mask + first / 8, staging + MaskAt(),
                static_cast<size_t>((count + 7) / 8));
  }
  return Outcome::kOk;
}

Outcome ChunkedForward::Run(Lane& lane, const ForwardWork& on_device,
                            const std::stop_token& stop) const {
  const auto chunks = static_cast<size_t>((host_.count + chunk_ - 1) / chunk_);
  const size_t scratch_bytes = ScratchBytes(lane.device());
  // For parameters and statistics, which the other slots' streams read too.
  Outcome outcome = lane.stream().Wait();
  for (size_t k = 0; k < chunks + kSlots && outcome == Outcome::kOk; ++k) {
    const size_t slot = k % kSlots;
    if (k >= kSlots) outcome = Finish(lane, slot, static_cast<int64_t>(k - kSlots) * chunk_);
    if (k >= chunks || outcome != Outcome::kOk) continue;
    outcome = stop.stop_requested()
                  ? Outcome::kStopped
                  : Start(lane, slot, static_cast<int64_t>(k) * chunk_, on_device, scratch_bytes);
  }
  // Staging is the next call's.
  if (outcome == Outcome::kStopped && !lane.WaitForAll()) outcome = Outcome::kDeviceFailed;
  return outcome;
}

}  // namespace normd::cuda
