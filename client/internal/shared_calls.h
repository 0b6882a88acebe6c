// Forward and Backward of tensors in memory that client and server share.
#ifndef NORMD_CLIENT_INTERNAL_SHARED_CALLS_H_
#define NORMD_CLIENT_INTERNAL_SHARED_CALLS_H_

#include <optional>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/internal/connection.h"
#include "client/normd_client.h"
#include "normd/v1/norm_service.pb.h"

namespace normd::inline client::internal {

// How a call through shared memory ended: nothing where it could not be made, and is to be
// made another way.
template <class Result>
using Tried = absl::StatusOr<std::optional<Result>>;

// `again`: once more where the server has lost the memory that it lent.
Tried<ForwardResult> SharedForward(Connection& connection, v1::ForwardRequest request,
                                   const Tensor& input, const std::optional<Tensor>& residual,
                                   absl::Time deadline, bool again = true);
Tried<BackwardResult> SharedBackward(Connection& connection, v1::BackwardRequest request,
                                     const Tensor& grad_output, const std::optional<Tensor>& input,
                                     absl::Time deadline, bool again = true);

}  // namespace normd::inline client::internal

#endif  // NORMD_CLIENT_INTERNAL_SHARED_CALLS_H_
