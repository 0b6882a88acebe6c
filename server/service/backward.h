// Backward: the gradients of a Forward, and their accumulation.
#ifndef NORMD_SERVER_SERVICE_BACKWARD_H_
#define NORMD_SERVER_SERVICE_BACKWARD_H_

#include <stop_token>

#include "absl/functional/any_invocable.h"
#include "absl/status/statusor.h"
#include "normd/v1/norm_service.pb.h"
#include "server/service/core.h"
#include "server/service/tensor_answer.h"
#include "server/wire/message.h"

namespace normd {

// Where the gradients go, if the request says.
struct BackwardOutputs {
  SharedBytes grad_input = {};
  SharedBytes grad_residual = {};
};

using BackwardDone = absl::AnyInvocable<void(absl::StatusOr<TensorAnswer<v1::BackwardResponse>>)>;

// Serves one Backward, from the unary call and the stream alike: `request`
// without the tensors' data, which are `input` (empty with a context) and
// `grad_output`, and without the memory for its answer, which is `outputs`. All are used
// only until this returns; `done` is called then or later, when the change is durable.
// `spare`: memory that is claimed already for what this allocates.
void Backward(Core& core, const v1::BackwardRequest& request, Payload input, Payload grad_output,
              BackwardOutputs outputs, MemoryClaim spare, std::stop_token stop, BackwardDone done);

}  // namespace normd

#endif  // NORMD_SERVER_SERVICE_BACKWARD_H_
