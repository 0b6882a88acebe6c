#include "server/service/tensor_call.h"

#include <array>
#include <memory>
#include <stop_token>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/error/error.h"
#include "server/service/backward.h"
#include "server/service/forward.h"
#include "server/service/rpc.h"
#include "server/service/shared_tensors.h"
#include "server/wire/message.h"

namespace normd {
namespace {

// One call from its message to its answer. Deletes itself when gRPC is done.
template <class Method>
class TensorCall final : public grpc::ServerUnaryReactor {
 public:
  TensorCall(Core& core, grpc::CallbackServerContext* context, const grpc::ByteBuffer* message,
             grpc::ByteBuffer* response)
      : core_(core), rpc_(core, Method::kName, context), message_(message), response_(response) {}

  void Start() {
    if (!rpc_.admitted().ok()) return Answer(rpc_.admitted());
    bytes_in_ = static_cast<int64_t>(message_->Length());
    if (bytes_in_ > core_.limits.max_message_bytes) {
      return Answer(LimitExceeded("request", absl::StrCat("a message of ", bytes_in_, " bytes"),
                                  core_.limits.max_message_bytes, "--max_message_bytes"));
    }
    auto slot = core_.concurrency->Enter();
    if (!slot.ok()) return Answer(slot.status());
    slot_ = *std::move(slot);
    if (bytes_in_ <= kLargestInline) return Serve();
    elsewhere_ = true;
    core_.executor->Enqueue([this] { Serve(); });
  }

  void OnCancel() override { stop_.request_stop(); }
  void OnDone() override { delete this; }

 private:
  using Response = typename Method::Response;

  void Serve() {
    if (stop_.stop_requested()) return Answer(ToStatus(Outcome::kStopped));
    // The message itself, and what it is gathered into.
    auto claim = core_.memory->Claim(2 * bytes_in_);
    if (!claim.ok()) return Answer(claim.status());
    claim_ = *std::move(claim);
    std::array<TensorField, Method::kTensorFields.size()> fields;
    for (size_t i = 0; i < fields.size(); ++i) {
      fields[i] = {Method::kTensorFields[i], &payloads_[i]};
    }
    const absl::Status parsed = ParseMessage(*message_, fields, *core_.pool, request_);
    if (!parsed.ok()) return Answer(parsed);
    finished_ = Tell(request_);
    if (absl::Status allowed = rpc_.Authorize(request_); !allowed.ok()) return Answer(allowed);
    bool all_gathered = true;
    for (Payload& payload : payloads_) {
      payload.gathered.claim = claim_.Split(static_cast<int64_t>(payload.gathered.buffer.size()));
      all_gathered &= payload.gathered.buffer.size() == payload.size;
    }
    if (all_gathered && bytes_in_ > kLargestInline) {
      // Nothing looks at the message any more. gRPC made it for this call alone; its
      // interface has the const.
      const_cast<grpc::ByteBuffer*>(message_)->Clear();
      claim_ = MemoryClaim();
    }
    absl::Status shared = Method::TakeShared(core_, rpc_.caller(), request_, payloads_, outputs_);
    if (!shared.ok()) return Answer(shared);
    size_t payload_bytes = 0;
    for (const Payload& payload : payloads_) payload_bytes += payload.size;
    if (elsewhere_ || payload_bytes <= kLargestInline) return Compute();
    core_.executor->Enqueue([this] { Compute(); });
  }

  void Compute() {
    Method::Call(core_, rpc_.caller(), request_, payloads_, outputs_, stop_.get_token(),
                 [this](absl::StatusOr<TensorAnswer<Response>> answer) {
                   if (!answer.ok()) return Answer(answer.status());
                   finished_ = Tell(request_, answer->header);
                   finished_.changed = answer->changed;
                   *response_ = WriteMessage(answer->header, std::move(answer->tensors));
                   Answer(absl::OkStatus());
                 });
  }

  void Answer(const absl::Status& status) {
    finished_.bytes_in = bytes_in_;
    finished_.bytes_out = status.ok() ? static_cast<int64_t>(response_->Length()) : 0;
    Finish(rpc_.Finish(status, finished_));
  }

  Core& core_;
  Rpc rpc_;
  const grpc::ByteBuffer* const message_;
  grpc::ByteBuffer* const response_;
  int64_t bytes_in_ = 0;
  ConcurrencySlot slot_;
  MemoryClaim claim_;  // of the message
  typename Method::Request request_;
  std::array<Payload, Method::kTensorFields.size()> payloads_;
  typename Method::Outputs outputs_;
  bool elsewhere_ = false;  // on a compute thread
  Finished finished_;
  std::stop_source stop_;
};

struct ForwardMethod {
  using Request = v1::ForwardRequest;
  using Response = v1::ForwardResponse;
  static constexpr char kName[] = "Forward";
  static constexpr std::array kTensorFields = {Request::kInputFieldNumber,
                                               Request::kResidualFieldNumber};
  using Outputs = SharedBytes;

  static absl::Status TakeShared(Core& core, const Caller& caller, Request& request,
                                 std::array<Payload, 2>& payloads, Outputs& output) {
    absl::Status status =
        normd::TakeShared(core, caller, *request.mutable_input(), "input", payloads[0]);
    if (status.ok() && request.has_residual()) {
      status =
          normd::TakeShared(core, caller, *request.mutable_residual(), "residual", payloads[1]);
    }
    if (!status.ok() || !request.has_output_memory()) return status;
    auto found = FindShared(core, caller, request.output_memory(), "output_memory");
    if (found.ok()) output = *std::move(found);
    request.clear_output_memory();
    return found.status();
  }
  static void Call(Core& core, const Caller& caller, const Request& request,
                   std::array<Payload, 2>& payloads, Outputs& output, std::stop_token stop,
                   ForwardDone done) {
    Forward(core, caller, request, std::move(payloads[0]), std::move(payloads[1]),
            std::move(output), std::move(stop), std::move(done));
  }
};

struct BackwardMethod {
  using Request = v1::BackwardRequest;
  using Response = v1::BackwardResponse;
  static constexpr char kName[] = "Backward";
  static constexpr std::array kTensorFields = {Request::kInputFieldNumber,
                                               Request::kGradOutputFieldNumber};
  using Outputs = BackwardOutputs;

  static absl::Status TakeShared(Core& core, const Caller& caller, Request& request,
                                 std::array<Payload, 2>& payloads, Outputs& outputs) {
    absl::Status status;
    if (request.has_input()) {
      status = normd::TakeShared(core, caller, *request.mutable_input(), "input", payloads[0]);
    }
    if (status.ok()) {
      status = normd::TakeShared(core, caller, *request.mutable_grad_output(), "grad_output",
                                 payloads[1]);
    }
    const auto find = [&](bool given, const v1::SharedMemory& name, const char* field,
                          SharedBytes& into) {
      if (!status.ok() || !given) return;
      auto found = FindShared(core, caller, name, field);
      if (found.ok()) into = *std::move(found);
      status = found.status();
    };
    find(request.has_grad_input_memory(), request.grad_input_memory(), "grad_input_memory",
         outputs.grad_input);
    find(request.has_grad_residual_memory(), request.grad_residual_memory(), "grad_residual_memory",
         outputs.grad_residual);
    request.clear_grad_input_memory();
    request.clear_grad_residual_memory();
    return status;
  }
  static void Call(Core& core, const Caller&, const Request& request,
                   std::array<Payload, 2>& payloads, Outputs& outputs, std::stop_token stop,
                   BackwardDone done) {
    Backward(core, request, std::move(payloads[0]), std::move(payloads[1]), std::move(outputs),
             std::move(stop), std::move(done));
  }
};

template <class Method>
grpc::ServerUnaryReactor* Serve(Core& core, grpc::CallbackServerContext* context,
                                const grpc::ByteBuffer* request, grpc::ByteBuffer* response) {
  auto* call = new TensorCall<Method>(core, context, request, response);
  call->Start();
  return call;
}

}  // namespace

grpc::ServerUnaryReactor* ServeForward(Core& core, grpc::CallbackServerContext* context,
                                       const grpc::ByteBuffer* request,
                                       grpc::ByteBuffer* response) {
  return Serve<ForwardMethod>(core, context, request, response);
}

grpc::ServerUnaryReactor* ServeBackward(Core& core, grpc::CallbackServerContext* context,
                                        const grpc::ByteBuffer* request,
                                        grpc::ByteBuffer* response) {
  return Serve<BackwardMethod>(core, context, request, response);
}

}  // namespace normd
