// Forward and Backward of tensors in chunks: for what one message cannot hold, and for what no
// memory should.
#ifndef NORMD_CLIENT_INTERNAL_TENSOR_STREAM_H_
#define NORMD_CLIENT_INTERNAL_TENSOR_STREAM_H_

#include <optional>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/internal/connection.h"
#include "client/normd_client.h"
#include "normd/v1/norm_service.pb.h"

namespace normd::inline client::internal {

using Progress = std::function<void(int64_t received, int64_t total)>;

// With `source` and `sink` the bytes come from and go there, and `input` has none.
absl::StatusOr<ForwardResult> StreamForward(Connection& connection, v1::ForwardRequest request,
                                            const Tensor& input,
                                            const std::optional<Tensor>& residual,
                                            absl::Time deadline, const Progress& progress,
                                            const TensorSource* source = nullptr,
                                            const TensorSink* sink = nullptr);

absl::StatusOr<BackwardResult> StreamBackward(Connection& connection, v1::BackwardRequest request,
                                              const Tensor& grad_output,
                                              const std::optional<Tensor>& input,
                                              absl::Time deadline, const Progress& progress);

}  // namespace normd::inline client::internal

#endif  // NORMD_CLIENT_INTERNAL_TENSOR_STREAM_H_
