// Tensors of a request that lie in regions: from what the message says of them to memory.
#ifndef NORMD_SERVER_SERVICE_SHARED_TENSORS_H_
#define NORMD_SERVER_SERVICE_SHARED_TENSORS_H_

#include <initializer_list>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/backend.h"
#include "normd/v1/tensor.pb.h"
#include "server/auth/caller.h"
#include "server/service/core.h"
#include "server/service/validate.h"
#include "server/shared_memory/regions.h"
#include "server/wire/message.h"

namespace normd {

// FAILED_PRECONDITION: the server runs without shared memory, which `field` needs.
absl::Status NoSharedMemory(absl::string_view field);
// Likewise, without memory of the GPU.
absl::Status NoCudaIpc(absl::string_view field);

// Takes `shared_memory` out of a request's tensor, if it has one: `payload` is what lies
// there, and keeps it mapped. `field` names the tensor.
absl::Status TakeShared(Core& core, const Caller& caller, v1::Tensor& tensor,
                        absl::string_view field, Payload& payload);

// The memory that `name`, the request's `field`, says an answer's tensor is to go to.
absl::StatusOr<SharedBytes> FindShared(Core& core, const Caller& caller,
                                       const v1::SharedMemory& name, absl::string_view field);

// Whether `output`, the request's `field`, may receive a tensor of `bytes` while `input` is
// read: INVALID_ARGUMENT where it has another size or holds a part of the input.
absl::Status CheckOutput(const SharedBytes& output, absl::string_view field, int64_t bytes,
                         const Payload& input);

// Moves `payload` into memory of its own if `output`, the request's `field`, is where it lies:
// for calls that may read their input once more after they have written. INVALID_ARGUMENT
// where that is on a device.
absl::Status MoveOutOf(Core& core, const SharedBytes& output, absl::string_view field,
                       Payload& payload);

// A tensor of a call, as a request's field names it.
struct TensorPlace {
  absl::string_view field;
  bool on_device;
};

// Where the tensors of a call lie: INVALID_ARGUMENT names the first that is on the host while
// another is on the device.
absl::StatusOr<Place> CommonPlace(std::initializer_list<TensorPlace> tensors);

}  // namespace normd

#endif  // NORMD_SERVER_SERVICE_SHARED_TENSORS_H_
