#include "server/service/arriving.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/error/error.h"
#include "server/service/tensor_answer.h"

namespace normd {
namespace {

// Claims are made in steps of this; what is no larger is claimed at once, and comes from
// the pool. Two huge pages: the system gives out no less.
constexpr size_t kStep = size_t{4} << 20;

}  // namespace

absl::Status ArrivingBytes::Grow(Core& core, size_t count) {
  if (size_ <= kStep) {
    if (memory_.buffer.data() != nullptr) return absl::OkStatus();
    MemoryClaim none;
    auto memory = GetBuffer(core, static_cast<int64_t>(size_), none);
    if (memory.ok()) memory_ = *std::move(memory);
    return memory.status();
  }
  if (memory_.buffer.data() == nullptr) {
    // Memory that is there already costs no page faults. It is claimed as a whole, so where
    // the budget has no room for that, or the pool has none, it is taken as it is needed.
    if (Buffer idle = core.pool->GetIdle(size_); idle.data() != nullptr) {
      auto claim = core.memory->Claim(static_cast<int64_t>(size_));
      if (claim.ok()) memory_ = {std::move(idle), *std::move(claim)};
    }
  }
  const auto claimed = static_cast<size_t>(memory_.claim.bytes());
  const size_t wanted = received_ + count;
  if (wanted > claimed) {
    const size_t bytes = std::min(size_, (wanted + kStep - 1) / kStep * kStep);
    auto claim = core.memory->Claim(static_cast<int64_t>(bytes - claimed));
    if (!claim.ok()) return claim.status();
    memory_.claim.Merge(*std::move(claim));
    core.pool->MakeRoom();
  }
  if (memory_.buffer.data() != nullptr) return absl::OkStatus();
  memory_.buffer = core.pool->GetUntouched(size_);
  return memory_.buffer.data() != nullptr ? absl::OkStatus() : NoSystemMemory();
}

absl::Status ArrivingBytes::Add(Core& core, const Chunk& chunk, size_t from, size_t count) {
  if (count == 0) return absl::OkStatus();
  if (absl::Status grown = Grow(core, count); !grown.ok()) return grown;
  chunk.Copy(from, count, memory_.buffer.data() + received_);
  received_ += count;
  return absl::OkStatus();
}

absl::Status ArrivingTensor::Begin(const v1::Tensor& header, absl::string_view field) {
  field_ = std::string(field);
  if (!header.data().empty()) {
    return InvalidField(absl::StrCat("header.", field, ".data"),
                        absl::StrCat(header.data().size(), " bytes"),
                        "nothing: the bytes follow in chunks");
  }
  const auto spec = ToTensorSpec(header, field);
  if (!spec.ok()) return spec.status();
  size_ = static_cast<size_t>(spec->bytes());
  return absl::OkStatus();
}

absl::Status ArrivingTensor::CheckFits(Core& core) const {
  const auto bytes = static_cast<int64_t>(size_);
  if (bytes <= core.memory->limit()) return absl::OkStatus();
  return ForField(core.memory->Claim(bytes).status(), absl::StrCat(field_, ".shape"));
}

absl::Status ArrivingTensor::Take(size_t bytes) {
  if (bytes > size_ - received_) return WrongSize(absl::StrCat("more than ", size_, " bytes"));
  received_ += bytes;
  return absl::OkStatus();
}

absl::Status ArrivingTensor::End() const {
  return received_ == size_ ? absl::OkStatus() : WrongSize(absl::StrCat(received_, " bytes"));
}

absl::Status ArrivingTensor::WrongSize(absl::string_view found) const {
  return InvalidField(
      absl::StrCat(field_, ".data"), found,
      absl::StrCat("chunks of ", size_, " bytes in all, as the header's shape says"));
}

}  // namespace normd
