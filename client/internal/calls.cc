#include "client/internal/calls.h"

#include <string>
#include <utility>

#include "client/internal/change.h"
#include "client/internal/convert.h"

namespace normd::inline client::internal {

v1::ForwardRequest ForwardHeader(std::string_view name, const ForwardOptions& options,
                                 const CallOptions& call) {
  v1::ForwardRequest request;
  request.set_name(std::string(name));
  if (options.mode) request.set_mode(ToWire(*options.mode));
  request.set_save_for_backward(options.save_for_backward);
  request.set_return_batch_statistics(options.return_batch_statistics);
  if (options.activation == Activation::kRelu) request.set_activation(v1::ACTIVATION_RELU);
  MarkChange(call, &request);
  return request;
}

v1::BackwardRequest BackwardHeader(std::string_view name, const BackwardOptions& options,
                                   const CallOptions& call) {
  v1::BackwardRequest request;
  request.set_name(std::string(name));
  request.set_context_id(options.context_id);
  if (options.mode) request.set_mode(ToWire(*options.mode));
  if (options.batch_statistics) {
    *request.mutable_batch_statistics() = ToWire(*options.batch_statistics);
  }
  request.set_accumulate(options.accumulate);
  request.set_retain_context(options.retain_context);
  request.set_skip_grad_input(options.skip_grad_input);
  MarkChange(call, &request);
  return request;
}

ForwardResult ResultOf(v1::ForwardResponse&& response, Tensor output) {
  ForwardResult result;
  result.version = response.version();
  result.replayed = response.replayed();
  result.output = std::move(output);
  result.mode = FromWire(response.mode());
  result.num_batches_tracked = response.num_batches_tracked();
  result.context_id = response.context_id();
  if (response.has_batch_statistics()) {
    result.batch_statistics = FromWire(response.batch_statistics());
  }
  return result;
}

BackwardResult ResultOf(v1::BackwardResponse&& response, std::optional<Tensor> grad_input,
                        std::optional<Tensor> grad_residual) {
  BackwardResult result;
  result.version = response.version();
  result.replayed = response.replayed();
  result.grad_input = std::move(grad_input);
  result.grad_residual = std::move(grad_residual);
  if (response.has_grad_weight()) {
    result.grad_weight = FromWire(std::move(*response.mutable_grad_weight()));
  }
  if (response.has_grad_bias()) {
    result.grad_bias = FromWire(std::move(*response.mutable_grad_bias()));
  }
  return result;
}

}  // namespace normd::inline client::internal
