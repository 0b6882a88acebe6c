#include "server/service/tensor_call.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <stop_token>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "grpcpp/alarm.h"
#include "server/error/error.h"
#include "server/service/backward.h"
#include "server/service/forward.h"
#include "server/service/rpc.h"
#include "server/service/shared_tensors.h"
#include "server/wire/message.h"

namespace normd {
namespace {

constexpr char kMessageBytesKey[] = "normd-message-bytes";

// What the caller says of the message's length; nothing where it says nothing.
absl::StatusOr<std::optional<int64_t>> AnnouncedBytes(const grpc::CallbackServerContext& context) {
  const auto& metadata = context.client_metadata();
  const auto found = metadata.find(kMessageBytesKey);
  if (found == metadata.end()) return std::nullopt;
  const absl::string_view text(found->second.data(), found->second.size());
  int64_t bytes = 0;
  if (absl::SimpleAtoi(text, &bytes) && bytes >= 0) return bytes;
  return InvalidField(kMessageBytesKey, text, "the bytes of the message, in decimal");
}

// A message that was announced, and has memory claimed for it, must come: cancels the call
// where it has not, so that nobody holds the budget by announcements.
class Patience {
 public:
  Patience(grpc::CallbackServerContext* context, int64_t bytes)
      : waited_for_(std::make_shared<WaitedFor>(context)) {
    alarm_.Set(absl::ToChronoTime(absl::Now() + absl::Seconds(10 + bytes / kSlowest)),
               [waited_for = waited_for_](bool late) {
                 absl::MutexLock lock(&waited_for->mutex);
                 if (late && waited_for->context != nullptr) waited_for->context->TryCancel();
               });
  }
  void Arrived() {
    absl::MutexLock lock(&waited_for_->mutex);
    waited_for_->context = nullptr;
  }

 private:
  // Bytes a second that a client must send at least.
  static constexpr int64_t kSlowest = int64_t{64} << 10;

  // Outlives the call where the alarm goes off as it ends.
  struct WaitedFor {
    explicit WaitedFor(grpc::CallbackServerContext* context) : context(context) {}

    absl::Mutex mutex;
    grpc::CallbackServerContext* context ABSL_GUARDED_BY(mutex);  // null: not any more
  };
  const std::shared_ptr<WaitedFor> waited_for_;
  grpc::Alarm alarm_;
};

// One call from its headers to its answer. Deletes itself when gRPC is done.
template <class Method>
class TensorCall final : public RawCall {
 public:
  TensorCall(Core& core, grpc::CallbackServerContext* context)
      : core_(core), rpc_(core, Method::kName, context), context_(context) {}

  void Start() {
    if (!rpc_.admitted().ok()) return Answer(rpc_.admitted());
    const auto announced = AnnouncedBytes(*context_);
    if (!announced.ok()) return Answer(announced.status());
    announced_ = *announced;
    if (!announced_.has_value()) return StartRead(&message_);
    Admit(*announced_, [this] {
      patience_.emplace(context_, *announced_);
      StartRead(&message_);
    });
  }

  void OnReadDone(bool ok) override {
    if (patience_.has_value()) patience_->Arrived();
    // gRPC itself ends a call whose message it does not take, before this is seen.
    if (!ok) {
      return Answer(context_->IsCancelled() ? ToStatus(Outcome::kStopped)
                                            : InvalidField("request", "no message", "one"));
    }
    bytes_in_ = static_cast<int64_t>(message_.Length());
    if (!announced_.has_value()) return Admit(bytes_in_, [this] { BeginToServe(); });
    if (bytes_in_ > *announced_) {
      return Answer(InvalidField(kMessageBytesKey, absl::StrCat(*announced_),
                                 absl::StrCat("the message's length, which is ", bytes_in_)));
    }
    BeginToServe();
  }

  void OnCancel() override { stop_.request_stop(); }
  void OnDone() override { delete this; }

 private:
  using Response = typename Method::Response;

  // Claims what a message of so many bytes needs, all at once so that nobody holds a part
  // and waits for the rest: itself, and what it is gathered into; the message's part is the
  // output's later. Then goes on.
  template <class GoOn>
  void Admit(int64_t bytes, GoOn go_on) {
    if (bytes > core_.limits.max_message_bytes) {
      return Answer(LimitExceeded("request", absl::StrCat("a message of ", bytes, " bytes"),
                                  core_.limits.max_message_bytes, "--max_message_bytes"));
    }
    core_.admission->Admit(2 * bytes, stop_.get_token(),
                           [this, go_on](absl::StatusOr<Admission> admission) {
                             if (!admission.ok()) return Answer(admission.status());
                             admission_ = *std::move(admission);
                             go_on();
                           });
  }

  void BeginToServe() {
    if (bytes_in_ <= kLargestInline) return Serve();
    elsewhere_ = true;
    core_.executor->Enqueue([this] { Serve(); });
  }

  void Serve() {
    if (stop_.stop_requested()) return Answer(ToStatus(Outcome::kStopped));
    std::array<TensorField, Method::kTensorFields.size()> fields;
    for (size_t i = 0; i < fields.size(); ++i) {
      fields[i] = {Method::kTensorFields[i], &payloads_[i]};
    }
    const absl::Status parsed =
        ParseMessage(message_, fields, *core_.pool, *core_.executor, request_);
    if (!parsed.ok()) return Answer(parsed);
    finished_ = Tell(request_);
    if (absl::Status allowed = rpc_.Authorize(request_); !allowed.ok()) return Answer(allowed);
    MemoryClaim spare = std::move(admission_.claim);
    bool is_kept = false;
    for (Payload& payload : payloads_) {
      payload.gathered.claim = spare.Split(static_cast<int64_t>(payload.gathered.buffer.size()));
      is_kept |= payload.gathered.buffer.size() != payload.size;
    }
    if (is_kept) admission_.claim = spare.Split(std::min(spare.bytes(), bytes_in_));
    if (bytes_in_ > kLargestInline) core_.pool->GiveBackFreed();
    spare_ = std::move(spare);
    absl::Status shared = Method::TakeShared(core_, rpc_.caller(), request_, payloads_, outputs_);
    if (!shared.ok()) return Answer(shared);
    size_t payload_bytes = 0;
    for (const Payload& payload : payloads_) payload_bytes += payload.size;
    if (elsewhere_ || payload_bytes <= kLargestInline) return Compute();
    core_.executor->Enqueue([this] { Compute(); });
  }

  void Compute() {
    Method::Call(core_, rpc_.caller(), request_, payloads_, outputs_, std::move(spare_),
                 stop_.get_token(), [this](absl::StatusOr<TensorAnswer<Response>> answer) {
                   if (!answer.ok()) return Answer(answer.status());
                   finished_ = Tell(request_, answer->header);
                   finished_.changed = answer->changed;
                   // Swapped, as gRPC's own move copies.
                   WriteMessage(answer->header, std::move(answer->tensors)).Swap(&response_);
                   Answer(absl::OkStatus());
                 });
  }

  void Answer(const absl::Status& status) {
    finished_.bytes_in = bytes_in_;
    finished_.bytes_out = status.ok() ? static_cast<int64_t>(response_.Length()) : 0;
    const grpc::Status sent = rpc_.Finish(status, finished_);
    if (!sent.ok()) return Finish(sent);
    StartWriteAndFinish(&response_, grpc::WriteOptions(), sent);
  }

  Core& core_;
  Rpc rpc_;
  grpc::CallbackServerContext* const context_;
  std::optional<int64_t> announced_;
  std::optional<Patience> patience_;  // while the announced message is on its way
  grpc::ByteBuffer message_;
  int64_t bytes_in_ = 0;
  // Of the message, while any of it is here.
  Admission admission_;
  grpc::ByteBuffer response_;
  typename Method::Request request_;
  std::array<Payload, Method::kTensorFields.size()> payloads_;
  typename Method::Outputs outputs_;
  MemoryClaim spare_;       // what the claim has left, for what is allocated later
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
                   std::array<Payload, 2>& payloads, Outputs& output, MemoryClaim spare,
                   std::stop_token stop, ForwardDone done) {
    Forward(core, caller, request, std::move(payloads[0]), std::move(payloads[1]),
            std::move(output), std::move(spare), std::move(stop), std::move(done));
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
                   std::array<Payload, 2>& payloads, Outputs& outputs, MemoryClaim spare,
                   std::stop_token stop, BackwardDone done) {
    Backward(core, request, std::move(payloads[0]), std::move(payloads[1]), std::move(outputs),
             std::move(spare), std::move(stop), std::move(done));
  }
};

template <class Method>
RawCall* Serve(Core& core, grpc::CallbackServerContext* context) {
  auto* call = new TensorCall<Method>(core, context);
  call->Start();
  return call;
}

}  // namespace

RawCall* ServeForward(Core& core, grpc::CallbackServerContext* context) {
  return Serve<ForwardMethod>(core, context);
}

RawCall* ServeBackward(Core& core, grpc::CallbackServerContext* context) {
  return Serve<BackwardMethod>(core, context);
}

}  // namespace normd
