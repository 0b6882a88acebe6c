// Forward and Backward between the client's types and the wire's, for every way that tensors
// take: in the message, in a stream, in shared memory, on the server's GPU.
#ifndef NORMD_CLIENT_INTERNAL_CALLS_H_
#define NORMD_CLIENT_INTERNAL_CALLS_H_

#include <optional>
#include <string_view>

#include "client/normd_client.h"
#include "normd/v1/norm_service.pb.h"

namespace normd::inline client::internal {

inline constexpr char kForward[] = "/normd.v1.NormService/Forward";
inline constexpr char kForwardStream[] = "/normd.v1.NormService/ForwardStream";
inline constexpr char kBackward[] = "/normd.v1.NormService/Backward";
inline constexpr char kBackwardStream[] = "/normd.v1.NormService/BackwardStream";

// Requests without their tensors, and with a request_id.
v1::ForwardRequest ForwardHeader(std::string_view name, const ForwardOptions& options,
                                 const CallOptions& call);
v1::BackwardRequest BackwardHeader(std::string_view name, const BackwardOptions& options,
                                   const CallOptions& call);

// Results with tensors that have come in whatever way.
ForwardResult ResultOf(v1::ForwardResponse&& response, Tensor output);
BackwardResult ResultOf(v1::BackwardResponse&& response, std::optional<Tensor> grad_input,
                        std::optional<Tensor> grad_residual);

}  // namespace normd::inline client::internal

#endif  // NORMD_CLIENT_INTERNAL_CALLS_H_
