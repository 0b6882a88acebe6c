#include "kernels/cuda/lane.h"

#include <algorithm>
#include <cstring>

namespace normd::cuda {
namespace {

// Calls move(host, chunk, bytes) for each piece of a segment in the parcel's bytes
// [begin, begin + kChunkBytes).
template <class Move>
void ForEachPiece(const Parcel& parcel, size_t begin, std::byte* chunk, Move move) {
  const size_t end = begin + Lane::kChunkBytes;
  for (const Parcel::Segment& segment : parcel.segments()) {
    const size_t from = std::max(segment.offset, begin);
    const size_t to = std::min(segment.offset + segment.bytes, end);
    if (from >= to) continue;
    move(static_cast<std::byte*>(segment.host) + (from - segment.offset), chunk + (from - begin),
         to - from);
  }
}

size_t Chunks(const Parcel& parcel) {
  return (parcel.bytes() + Lane::kChunkBytes - 1) / Lane::kChunkBytes;
}

size_t BytesOfChunk(const Parcel& parcel, size_t number) {
  return std::min(Lane::kChunkBytes, parcel.bytes() - number * Lane::kChunkBytes);
}

}  // namespace

Lane::~Lane() {
  WaitForAll();
  for (auto& stream : streams_) stream.reset();
  Release();
  if (pinned_ != nullptr) device_.FreePinned(pinned_);
}

void Lane::Release() {
  if (memory_ != nullptr) device_.Free(memory_);
  memory_ = nullptr;
  memory_bytes_ = 0;
}

Outcome Lane::Prepare(size_t device_bytes) {
  if (stream(0) == nullptr) return Outcome::kDeviceFailed;
  if (pinned_ == nullptr) {
    const Outcome outcome = device_.AllocatePinned(kSlots * kChunkBytes, &pinned_);
    if (outcome != Outcome::kOk) return outcome;
  }
  if (device_bytes <= memory_bytes_) return Outcome::kOk;
  Release();
  const Outcome outcome = device_.Allocate(device_bytes, &memory_);
  if (outcome == Outcome::kOk) memory_bytes_ = device_bytes;
  return outcome;
}

Stream* Lane::stream(size_t slot) {
  if (streams_[slot] == nullptr) streams_[slot] = device_.NewStream();
  return streams_[slot].get();
}

bool Lane::WaitForAll() {
  bool well = true;
  for (const auto& stream : streams_) {
    if (stream != nullptr && stream->Wait() != Outcome::kOk) well = false;
  }
  return well;
}

Outcome Lane::Stopped() {
  const Outcome outcome = stream().Wait();
  return outcome == Outcome::kOk ? Outcome::kStopped : outcome;
}

Outcome Lane::In(const Parcel& parcel, std::byte* device, const std::stop_token& stop) {
  for (size_t k = 0; k < Chunks(parcel); ++k) {
    if (stop.stop_requested()) return Stopped();
    const int mark = static_cast<int>(k % Stream::kMarks);
    Outcome outcome = Outcome::kOk;
    if (k >= Stream::kMarks) outcome = stream().WaitFor(mark);
    if (outcome != Outcome::kOk) return outcome;
    ForEachPiece(
        parcel, k * kChunkBytes, chunk(k),
        [](std::byte* host, std::byte* pinned, size_t bytes) { std::memcpy(pinned, host, bytes); });
    outcome = stream().CopyIn(device + k * kChunkBytes, chunk(k), BytesOfChunk(parcel, k));
    if (outcome == Outcome::kOk) outcome = stream().Mark(mark);
    if (outcome != Outcome::kOk) return outcome;
  }
  return Outcome::kOk;
}

Outcome Lane::Out(const Parcel& parcel, const std::byte* device, const std::stop_token& stop) {
  const size_t chunks = Chunks(parcel);
  const auto start = [&](size_t k) {
    const Outcome outcome =
        stream().CopyOut(chunk(k), device + k * kChunkBytes, BytesOfChunk(parcel, k));
    return outcome == Outcome::kOk ? stream().Mark(static_cast<int>(k % Stream::kMarks)) : outcome;
  };
  // The stream's order keeps these behind the copies in that still read a chunk.
  for (size_t k = 0; k < std::min<size_t>(chunks, Stream::kMarks); ++k) {
    if (const Outcome outcome = start(k); outcome != Outcome::kOk) return outcome;
  }
  for (size_t k = 0; k < chunks; ++k) {
    if (stop.stop_requested()) return Stopped();
    Outcome outcome = stream().WaitFor(static_cast<int>(k % Stream::kMarks));
    if (outcome != Outcome::kOk) return outcome;
    ForEachPiece(
        parcel, k * kChunkBytes, chunk(k),
        [](std::byte* host, std::byte* pinned, size_t bytes) { std::memcpy(host, pinned, bytes); });
    if (k + Stream::kMarks < chunks) outcome = start(k + Stream::kMarks);
    if (outcome != Outcome::kOk) return outcome;
  }
  return stream().Wait();
}

}  // namespace normd::cuda
