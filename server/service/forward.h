// Forward: normalize, and fold the batch into the running statistics.
#ifndef NORMD_SERVER_SERVICE_FORWARD_H_
#define NORMD_SERVER_SERVICE_FORWARD_H_

#include <optional>
#include <stop_token>

#include "absl/functional/any_invocable.h"
#include "absl/status/statusor.h"
#include "normd/v1/norm_service.pb.h"
#include "server/auth/caller.h"
#include "server/service/core.h"
#include "server/service/tensor_answer.h"
#include "server/service/validate.h"
#include "server/wire/message.h"

namespace normd {

// What a ForwardRequest says, checked but for the tensors' bytes.
struct ForwardSpec {
  ChangeOptions options;
  std::optional<Mode> mode;
  Activation activation = Activation::kNone;
  TensorSpec input;  // and the residual's, where there is one
};
absl::StatusOr<ForwardSpec> ToForwardSpec(const v1::ForwardRequest& request);

// A Forward that changes nothing and keeps nothing is for any reader of the instance, the
// others for its users: PERMISSION_DENIED.
absl::Status CheckMayForward(const Caller& caller, const v1::ForwardRequest& request, bool folds);

using ForwardDone = absl::AnyInvocable<void(absl::StatusOr<TensorAnswer<v1::ForwardResponse>>)>;

// Serves one Forward, from the unary call and the stream alike: `request` without
// the tensors' data, which are `input` and `residual` (empty where the request has
// none), and without its output_memory, which is `output` (likewise). `done` is called before
// this returns or later, when the change is durable; `request` and `caller` are used until then.
// `spare`: memory that is claimed already for what this allocates.
void Forward(Core& core, const Caller& caller, const v1::ForwardRequest& request, Payload input,
             Payload residual, SharedBytes output, MemoryClaim spare, std::stop_token stop,
             ForwardDone done);

}  // namespace normd

#endif  // NORMD_SERVER_SERVICE_FORWARD_H_
