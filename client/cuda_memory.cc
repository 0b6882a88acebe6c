// Forward and Backward of tensors on the server's GPU.
#include <optional>
#include <string>
#include <utility>

#include "client/internal/calls.h"
#include "client/internal/connection.h"
#include "client/internal/convert.h"
#include "client/internal/shared_memory.h"
#include "client/internal/wire_format.h"
#include "client/normd_client.h"

namespace normd::inline client {
namespace {

using internal::BackwardHeader;
using internal::Connection;
using internal::ForwardHeader;
using internal::HeaderOf;
using internal::ResultOf;

// The tensor's type and shape, with nothing on the host.
Tensor Described(const CudaTensor& tensor) {
  return Tensor::Borrow(tensor.dtype, tensor.shape, "", tensor.format);
}

v1::SharedMemory NameOf(const CudaTensor& tensor, const std::string& region) {
  v1::SharedMemory name;
  name.set_region(region);
  name.set_offset(static_cast<uint64_t>(tensor.offset));
  name.set_length(static_cast<uint64_t>(Described(tensor).num_elements()) * SizeOf(tensor.dtype));
  return name;
}

v1::Tensor ToWire(const CudaTensor& tensor, const std::string& region) {
  v1::Tensor wire = HeaderOf(Described(tensor));
  *wire.mutable_shared_memory() = NameOf(tensor, region);
  return wire;
}

// Another attempt would read what the one before has written.
bool IsInPlace(const v1::SharedMemory& output, const v1::Tensor& input) {
  return output.region() == input.shared_memory().region() &&
         output.offset() == input.shared_memory().offset();
}

template <class Response>
absl::Status CallOnGpu(Connection& connection, const char* method,
                       const google::protobuf::MessageLite& request, bool in_place,
                       absl::Time deadline, Response* response) {
  const grpc::ByteBuffer message = internal::MessageOf(request);
  absl::Status status = in_place ? connection.RunOnce(deadline,
                                                      [&](grpc::ClientContext* context) {
                                                        return connection.CallRawOnce(
                                                            context, method, message, response);
                                                      })
                                 : connection.CallRaw(method, message, response, deadline);
  connection.shared_memory().ForgetIfLost(status);
  return status;
}

}  // namespace

std::string CudaMemory::region() const { return region_ == nullptr ? "" : region_->name(); }

absl::StatusOr<CudaMemory> Client::RegisterCudaMemory(std::string_view ipc_handle, int64_t bytes,
                                                      const CallOptions& call) const {
  auto region = connection_->shared_memory().RegisterCuda(connection_, ipc_handle, bytes,
                                                          connection_->DeadlineOf(call));
  if (!region.ok()) return region.status();
  CudaMemory memory;
  memory.size_ = bytes;
  memory.region_ = *std::move(region);
  return memory;
}

absl::StatusOr<ForwardResult> Client::Forward(std::string_view name, const CudaTensor& input,
                                              const CudaTensor& output,
                                              const ForwardOptions& options,
                                              const CallOptions& call) const {
  v1::ForwardRequest request = ForwardHeader(name, options, call);
  if (options.residual) *request.mutable_residual() = internal::ToWire(*options.residual);
  *request.mutable_input() = ToWire(input, input.memory.region());
  *request.mutable_output_memory() = NameOf(output, output.memory.region());
  v1::ForwardResponse response;
  absl::Status status = CallOnGpu(*connection_, internal::kForward, request,
                                  IsInPlace(request.output_memory(), request.input()),
                                  connection_->DeadlineOf(call), &response);
  if (!status.ok()) return status;
  return ResultOf(std::move(response), Tensor());
}

absl::StatusOr<BackwardResult> Client::Backward(std::string_view name,
                                                const CudaTensor& grad_output,
                                                const CudaTensor& input,
                                                const std::optional<CudaTensor>& grad_input,
                                                const BackwardOptions& options,
                                                const CallOptions& call) const {
  v1::BackwardRequest request = BackwardHeader(name, options, call);
  *request.mutable_grad_output() = ToWire(grad_output, grad_output.memory.region());
  *request.mutable_input() = ToWire(input, input.memory.region());
  request.set_skip_grad_input(!grad_input.has_value());
  bool in_place = false;
  if (grad_input) {
    *request.mutable_grad_input_memory() = NameOf(*grad_input, grad_input->memory.region());
    in_place = IsInPlace(request.grad_input_memory(), request.grad_output()) ||
               IsInPlace(request.grad_input_memory(), request.input());
  }
  v1::BackwardResponse response;
  absl::Status status = CallOnGpu(*connection_, internal::kBackward, request, in_place,
                                  connection_->DeadlineOf(call), &response);
  if (!status.ok()) return status;
  return ResultOf(std::move(response), std::nullopt, std::nullopt);
}

}  // namespace normd::inline client
