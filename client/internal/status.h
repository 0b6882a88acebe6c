// gRPC's statuses as Abseil's.
#ifndef NORMD_CLIENT_INTERNAL_STATUS_H_
#define NORMD_CLIENT_INTERNAL_STATUS_H_

#include <grpcpp/grpcpp.h>

#include "absl/status/status.h"

namespace normd::inline client::internal {

// The same code and message, and the ErrorDetail of the call's trailing metadata
// as a payload for DetailOf().
absl::Status ToAbsl(const grpc::Status& status, const grpc::ClientContext& context);

}  // namespace normd::inline client::internal

#endif  // NORMD_CLIENT_INTERNAL_STATUS_H_
