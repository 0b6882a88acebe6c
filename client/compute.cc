// Forward and Backward by whichever way their tensors go; FoldConvolution.
#include <algorithm>
#include <limits>
#include <new>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/internal/calls.h"
#include "client/internal/connection.h"
#include "client/internal/convert.h"
#include "client/internal/shared_calls.h"
#include "client/internal/shared_memory.h"
#include "client/internal/tensor_stream.h"
#include "client/internal/wire_format.h"
#include "client/normd_client.h"

namespace normd::inline client {
namespace {

using internal::BackwardHeader;
using internal::Connection;
using internal::ForwardHeader;
using internal::FromWire;
using internal::ResultOf;
using internal::SharedBackward;
using internal::SharedForward;
using internal::StreamBackward;
using internal::StreamForward;
using internal::ToWire;

// Room for all in a message that is no tensor, beside a few numbers a channel.
constexpr int64_t kOverhead = 4096;
// Payloads that any server takes in one message, so that none is asked.
constexpr int64_t kSmall = 1 << 20;
// Protobuf reads no message of 2 GiB or more.
constexpr int64_t kProtobufLimit = std::numeric_limits<int32_t>::max();

// Whether a message with so much tensor must be streamed.
absl::StatusOr<bool> MustStream(Connection& connection, int64_t payload, int64_t channels,
                                absl::Time deadline) {
  if (payload <= kSmall && connection.options().max_message_bytes == 0) return false;
  const auto limit = connection.MaxMessageBytes(deadline);
  if (!limit.ok()) return limit.status();
  // Statistics have two doubles a channel.
  return payload + channels * 16 + kOverhead > std::min(*limit, kProtobufLimit);
}

int64_t ByteCount(const Tensor& tensor) { return static_cast<int64_t>(tensor.bytes().size()); }
int64_t ByteCount(const std::optional<Tensor>& tensor) { return tensor ? ByteCount(*tensor) : 0; }

int64_t Channels(const Tensor& tensor) {
  return tensor.shape().size() < 2 ? 0 : std::max<int64_t>(tensor.shape()[1], 0);
}

// The server found the message too long though the client thought otherwise: it
// has another limit than the one that the client was told.
bool IsTooLong(const absl::Status& status) {
  return absl::IsResourceExhausted(status) && DetailOf(status).flag == "--max_message_bytes";
}

}  // namespace

absl::StatusOr<TensorBuffer> Client::Allocate(size_t bytes, const CallOptions& call) const {
  TensorBuffer buffer;
  buffer.size_ = bytes;
  internal::SharedMemoryPool& pool = connection_->shared_memory();
  if (pool.Wants(bytes)) {
    auto lease = pool.Get(bytes, connection_->DeadlineOf(call));
    if (lease.ok()) {
      buffer.data_ = (*lease)->data();
      buffer.shared_ = true;
      buffer.owner_ = *std::move(lease);
      return buffer;
    }
    if (pool.must()) return lease.status();
  }
  constexpr std::align_val_t kCacheLine{64};
  buffer.data_ = static_cast<char*>(operator new(bytes, kCacheLine, std::nothrow));
  if (buffer.data_ == nullptr) {
    return absl::ResourceExhaustedError(absl::StrCat("no memory for ", bytes, " bytes"));
  }
  buffer.owner_ =
      std::shared_ptr<char>(buffer.data_, [](char* data) { operator delete(data, kCacheLine); });
  return buffer;
}

absl::StatusOr<ForwardResult> Client::Forward(std::string_view name, const Tensor& input,
                                              const ForwardOptions& options,
                                              const CallOptions& call) const {
  const absl::Time deadline = connection_->DeadlineOf(call);
  const int64_t payload = ByteCount(input) + ByteCount(options.residual);
  v1::ForwardRequest request = ForwardHeader(name, options, call);
  if (connection_->shared_memory().Wants(static_cast<size_t>(payload))) {
    auto tried = SharedForward(*connection_, request, input, options.residual, deadline);
    if (!tried.ok()) return tried.status();
    if (tried->has_value()) return **std::move(tried);
  }
  const auto must_stream = MustStream(*connection_, payload, Channels(input), deadline);
  if (!must_stream.ok()) return must_stream.status();

  if (!*must_stream) {
    std::vector<internal::TensorField> tensors;
    if (options.residual) {
      tensors.push_back({v1::ForwardRequest::kResidualFieldNumber, &*options.residual});
    }
    tensors.push_back({v1::ForwardRequest::kInputFieldNumber, &input});
    v1::ForwardResponse response;
    absl::Status status = connection_->CallRaw(
        internal::kForward, internal::MessageWithTensors(request, tensors), &response, deadline);
    if (status.ok()) {
      Tensor output = FromWire(std::move(*response.mutable_output()));
      return ResultOf(std::move(response), std::move(output));
    }
    if (!IsTooLong(status)) return status;
  }
  return StreamForward(*connection_, std::move(request), input, options.residual, deadline,
                       call.progress);
}

absl::StatusOr<ForwardResult> Client::ForwardStream(std::string_view name, const Tensor& input,
                                                    const ForwardOptions& options,
                                                    const CallOptions& call) const {
  return StreamForward(*connection_, ForwardHeader(name, options, call), input, options.residual,
                       connection_->DeadlineOf(call), call.progress);
}

absl::StatusOr<BackwardResult> Client::Backward(std::string_view name, const Tensor& grad_output,
                                                const BackwardOptions& options,
                                                const CallOptions& call) const {
  const absl::Time deadline = connection_->DeadlineOf(call);
  const int64_t payload = ByteCount(grad_output) + ByteCount(options.input);
  v1::BackwardRequest request = BackwardHeader(name, options, call);
  if (connection_->shared_memory().Wants(static_cast<size_t>(payload))) {
    auto tried = SharedBackward(*connection_, request, grad_output, options.input, deadline);
    if (!tried.ok()) return tried.status();
    if (tried->has_value()) return **std::move(tried);
  }
  const auto must_stream = MustStream(*connection_, payload, Channels(grad_output), deadline);
  if (!must_stream.ok()) return must_stream.status();

  if (!*must_stream) {
    std::vector<internal::TensorField> tensors;
    if (options.input) {
      tensors.push_back({v1::BackwardRequest::kInputFieldNumber, &*options.input});
    }
    tensors.push_back({v1::BackwardRequest::kGradOutputFieldNumber, &grad_output});
    v1::BackwardResponse response;
    absl::Status status = connection_->CallRaw(
        internal::kBackward, internal::MessageWithTensors(request, tensors), &response, deadline);
    if (status.ok()) {
      std::optional<Tensor> grad_input;
      if (response.has_grad_input()) {
        grad_input = FromWire(std::move(*response.mutable_grad_input()));
      }
      std::optional<Tensor> grad_residual;
      if (response.has_grad_residual()) {
        grad_residual = FromWire(std::move(*response.mutable_grad_residual()));
      }
      return ResultOf(std::move(response), std::move(grad_input), std::move(grad_residual));
    }
    if (!IsTooLong(status)) return status;
  }
  return StreamBackward(*connection_, std::move(request), grad_output, options.input, deadline,
                        call.progress);
}

absl::StatusOr<ForwardResult> Client::ForwardStream(std::string_view name,
                                                    const TensorSource& input,
                                                    const TensorSink& output,
                                                    const ForwardOptions& options,
                                                    const CallOptions& call) const {
  const Tensor shape = Tensor::Borrow(input.dtype, input.shape, "", input.memory_format);
  return StreamForward(*connection_, ForwardHeader(name, options, call), shape, options.residual,
                       connection_->DeadlineOf(call), call.progress, &input, &output);
}

absl::StatusOr<BackwardResult> Client::BackwardStream(std::string_view name,
                                                      const Tensor& grad_output,
                                                      const BackwardOptions& options,
                                                      const CallOptions& call) const {
  return StreamBackward(*connection_, BackwardHeader(name, options, call), grad_output,
                        options.input, connection_->DeadlineOf(call), call.progress);
}

absl::StatusOr<FoldedConvolution> Client::FoldConvolution(std::string_view name,
                                                          const Tensor& weight,
                                                          const FoldConvolutionOptions& options,
                                                          const CallOptions& call) const {
  v1::FoldConvolutionRequest request;
  request.set_name(std::string(name));
  request.set_transposed(options.transposed);
  request.set_groups(options.groups);
  if (options.bias) *request.mutable_bias() = ToWire(*options.bias);
  *request.mutable_weight() = ToWire(weight);
  auto response =
      connection_->Call(&v1::NormService::StubInterface::FoldConvolution, request, call);
  if (!response.ok()) return response.status();
  return FoldedConvolution{.version = response->version(),
                           .weight = FromWire(std::move(*response->mutable_weight())),
                           .bias = FromWire(std::move(*response->mutable_bias()))};
}

}  // namespace normd::inline client
