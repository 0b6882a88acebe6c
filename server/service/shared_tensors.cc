#include "server/service/shared_tensors.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/error/error.h"
#include "server/service/tensor_answer.h"

namespace normd {
namespace {

absl::Status NotAllowed(absl::string_view field, absl::string_view flag, absl::string_view what) {
  v1::ErrorDetail detail;
  detail.set_field(std::string(field));
  detail.set_flag(std::string(flag));
  absl::Status status = absl::FailedPreconditionError(
      absl::StrCat("the server runs without ", what, "; ", flag, "=on allows it"));
  SetDetail(status, detail);
  return status;
}

}  // namespace

absl::Status NoSharedMemory(absl::string_view field) {
  return NotAllowed(field, "--shared_memory", "shared memory");
}

absl::Status NoCudaIpc(absl::string_view field) {
  return NotAllowed(field, "--cuda_ipc", "shared memory on the GPU");
}

absl::StatusOr<SharedBytes> FindShared(Core& core, const Caller& caller,
                                       const v1::SharedMemory& name, absl::string_view field) {
  if (core.regions == nullptr) return NoSharedMemory(field);
  return core.regions->Find(name, caller.name(), field);
}

absl::Status TakeShared(Core& core, const Caller& caller, v1::Tensor& tensor,
                        absl::string_view field, Payload& payload) {
  if (!tensor.has_shared_memory()) return absl::OkStatus();
  const std::string name = absl::StrCat(field, ".shared_memory");
  if (payload.size > 0) {
    return InvalidField(name, "given beside data", "either data or shared_memory");
  }
  auto shared = FindShared(core, caller, tensor.shared_memory(), name);
  if (!shared.ok()) return shared.status();
  tensor.clear_shared_memory();
  payload.data = shared->data;
  payload.size = shared->size;
  payload.on_device = shared->on_device();
  payload.keep = std::move(shared->region);
  return absl::OkStatus();
}

absl::Status CheckOutput(const SharedBytes& output, absl::string_view field, int64_t bytes,
                         const Payload& input) {
  if (output.region == nullptr) return absl::OkStatus();
  if (output.size != static_cast<size_t>(bytes)) {
    return InvalidField(absl::StrCat(field, ".length"), absl::StrCat(output.size),
                        absl::StrCat(bytes, ", the tensor's bytes"));
  }
  // Pointers into different regions have an order too, by std::less.
  const std::less<const char*> before;
  const bool apart = !before(output.data, input.data + input.size) ||
                     !before(input.data, output.data + output.size);
  const bool same = output.data == input.data && output.size == input.size;
  if (apart || same) return absl::OkStatus();
  return InvalidField(field, absl::StrCat("offset ", output.name.offset(), ", amid a tensor"),
                      "memory apart from the request's tensors, or all of one's");
}

absl::Status MoveOutOf(Core& core, const SharedBytes& output, absl::string_view field,
                       Payload& payload) {
  if (output.region == nullptr || payload.size == 0 || payload.data != output.data) {
    return absl::OkStatus();
  }
  if (payload.on_device) {
    return InvalidField(field, "the memory of a tensor that is read",
                        "memory of its own, for a change with tensors on the GPU");
  }
  MemoryClaim none;
  auto memory = GetBuffer(core, static_cast<int64_t>(payload.size), none);
  if (!memory.ok()) return memory.status();
  payload.gathered = *std::move(memory);
  std::memcpy(payload.gathered.buffer.data(), payload.data, payload.size);
  payload.data = payload.gathered.buffer.data();
  return absl::OkStatus();
}

absl::StatusOr<Place> CommonPlace(std::initializer_list<TensorPlace> tensors) {
  const auto on_device = [](const TensorPlace& tensor) { return tensor.on_device; };
  if (std::none_of(tensors.begin(), tensors.end(), on_device)) return Place::kHost;
  const auto elsewhere = std::find_if_not(tensors.begin(), tensors.end(), on_device);
  if (elsewhere == tensors.end()) return Place::kDevice;
  return InvalidField(elsewhere->field, "on the host",
                      "memory on the GPU, where another tensor of the call is");
}

}  // namespace normd
