#include "client/internal/shared_calls.h"

#include <memory>
#include <utility>
#include <vector>

#include "client/internal/calls.h"
#include "client/internal/convert.h"
#include "client/internal/retry.h"
#include "client/internal/shared_memory.h"
#include "client/internal/wire_format.h"

namespace normd::inline client::internal {
namespace {

// The server answered for itself, so that it is done with the call's memory.
bool IsOver(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kAborted:
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kResourceExhausted:
    case absl::StatusCode::kPermissionDenied:
    case absl::StatusCode::kUnauthenticated: return true;
    default: return false;
  }
}

// The tensors of one call in shared memory.
class SharedTensors {
 public:
  SharedTensors(Connection& connection, absl::Time deadline)
      : connection_(connection), pool_(connection.shared_memory()), deadline_(deadline) {}

  // Names the memory where `tensor` is, or where it has been copied to.
  absl::Status Put(const Tensor& tensor, v1::Tensor* wire) {
    *wire = HeaderOf(tensor);
    if (tensor.bytes().empty()) return absl::OkStatus();
    if (auto there = pool_.Find(tensor.bytes())) {
      *wire->mutable_shared_memory() = *std::move(there);
      return absl::OkStatus();
    }
    auto lease = pool_.Get(tensor.bytes().size(), deadline_);
    if (!lease.ok()) return lease.status();
    tensor.bytes().copy((*lease)->data(), tensor.bytes().size());
    *wire->mutable_shared_memory() = (*lease)->Name(tensor.bytes().size());
    inputs_.push_back(*std::move(lease));
    return absl::OkStatus();
  }

  // Makes the call with memory of `bytes` for its output, which `name_output` names in the
  // request; 0: none is wanted. Each attempt has memory of its own: the server may still be
  // writing for the one before. False where there is no memory, or the server does not know
  // ours, and the call may be made another way.
  template <class Request, class Response>
  absl::StatusOr<bool> Call(const char* method, Request& request,
                            v1::SharedMemory* (Request::*name_output)(), size_t bytes,
                            Response* response) {
    absl::Status no_memory;
    absl::Status status =
        CallWithRetries(connection_.options().retry, deadline_, [&]() -> absl::Status {
          if (bytes > 0) {
            auto lease = pool_.Get(bytes, deadline_);
            no_memory = lease.status();
            if (!lease.ok()) return absl::InternalError("no memory");
            output_ = *std::move(lease);
            *(request.*name_output)() = output_->Name(bytes);
          }
          const grpc::ByteBuffer message = MessageOf(request);
          absl::Status ended = connection_.RunOnce(deadline_, [&](grpc::ClientContext* context) {
            return connection_.CallRawOnce(context, method, message, response);
          });
          if (!IsOver(ended)) Discard();
          return ended;
        });
    if (!no_memory.ok()) return Unavailable(std::move(no_memory));
    if (status.ok()) return true;
    lost_ = pool_.ForgetIfLost(status);
    if (lost_) return Unavailable(std::move(status));
    return status;
  }

  // Whether the server did not know the memory of the call.
  bool lost() const { return lost_; }

  // Where the call goes without, or why it must not.
  absl::StatusOr<bool> Unavailable(absl::Status why) const {
    if (pool_.must()) return why;
    return false;
  }

  // The answer's tensor where it lies.
  Tensor Output(const v1::Tensor& wire, size_t bytes) const {
    const Tensor header = FromWire(wire, "");
    return Tensor::Share(header.dtype(), header.shape(),
                         {bytes > 0 ? output_->data() : nullptr, bytes}, output_,
                         header.memory_format());
  }

 private:
  void Discard() {
    for (const auto& lease : inputs_) lease->Discard();
    if (output_ != nullptr) output_->Discard();
  }

  Connection& connection_;
  SharedMemoryPool& pool_;
  const absl::Time deadline_;
  std::vector<std::shared_ptr<Lease>> inputs_;
  std::shared_ptr<Lease> output_;
  bool lost_ = false;
};

}  // namespace

Tried<ForwardResult> SharedForward(Connection& connection, v1::ForwardRequest request,
                                   const Tensor& input, const std::optional<Tensor>& residual,
                                   absl::Time deadline, bool again) {
  SharedTensors tensors(connection, deadline);
  absl::Status put = tensors.Put(input, request.mutable_input());
  if (put.ok() && residual) put = tensors.Put(*residual, request.mutable_residual());
  v1::ForwardResponse response;
  const auto made =
      put.ok() ? tensors.Call(kForward, request, &v1::ForwardRequest::mutable_output_memory,
                              input.bytes().size(), &response)
               : tensors.Unavailable(std::move(put));
  // A restarted server has other memory to lend.
  if (tensors.lost() && again) {
    return SharedForward(connection, std::move(request), input, residual, deadline, false);
  }
  if (!made.ok()) return made.status();
  if (!*made) return std::nullopt;
  Tensor output = tensors.Output(response.output(), input.bytes().size());
  return ResultOf(std::move(response), std::move(output));
}

Tried<BackwardResult> SharedBackward(Connection& connection, v1::BackwardRequest request,
                                     const Tensor& grad_output, const std::optional<Tensor>& input,
                                     absl::Time deadline, bool again) {
  SharedTensors tensors(connection, deadline);
  absl::Status put = tensors.Put(grad_output, request.mutable_grad_output());
  if (put.ok() && input) put = tensors.Put(*input, request.mutable_input());
  v1::BackwardResponse response;
  const size_t bytes = request.skip_grad_input() ? 0 : grad_output.bytes().size();
  const auto made =
      put.ok() ? tensors.Call(kBackward, request, &v1::BackwardRequest::mutable_grad_input_memory,
                              bytes, &response)
               : tensors.Unavailable(std::move(put));
  if (tensors.lost() && again) {
    return SharedBackward(connection, std::move(request), grad_output, input, deadline, false);
  }
  if (!made.ok()) return made.status();
  if (!*made) return std::nullopt;
  std::optional<Tensor> grad_input;
  if (response.has_grad_input()) grad_input = tensors.Output(response.grad_input(), bytes);
  // In the message: whether there is one, only the server knows.
  std::optional<Tensor> grad_residual;
  if (response.has_grad_residual()) {
    grad_residual = FromWire(std::move(*response.mutable_grad_residual()));
  }
  return ResultOf(std::move(response), std::move(grad_input), std::move(grad_residual));
}

}  // namespace normd::inline client::internal
