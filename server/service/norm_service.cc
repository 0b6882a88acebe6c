#include "server/service/norm_service.h"

#include <type_traits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "normd/v1/norm_service.grpc.pb.h"
#include "server/error/error.h"
#include "server/service/handlers.h"
#include "server/service/one_message.h"
#include "server/service/rpc.h"
#include "server/service/tensor_call.h"
#include "server/service/tensor_stream.h"

namespace normd {
namespace {

// One call without tensors, from its message to its answer. The message comes raw:
// gRPC's own parsing answers a malformed one with UNIMPLEMENTED and no reason.
// Deletes itself when gRPC is done.
template <class Request, class Response>
class UnaryCall final : public grpc::ServerUnaryReactor {
 public:
  UnaryCall(Core& core, const char* method, grpc::CallbackServerContext* context,
            const grpc::ByteBuffer* message, grpc::ByteBuffer* answer)
      : rpc_(core, method, context),
        bytes_in_(static_cast<int64_t>(message->Length())),
        message_(*message),
        answer_(answer) {}

  template <class Handler>
  void Start(Core& core, Handler handler) {
    if (!rpc_.admitted().ok()) return Answer(rpc_.admitted());
    if (bytes_in_ > core.limits.max_message_bytes) {
      return Answer(LimitExceeded("request", absl::StrCat("a message of ", bytes_in_, " bytes"),
                                  core.limits.max_message_bytes, "--max_message_bytes"));
    }
    if (!grpc::SerializationTraits<Request>::Deserialize(&message_, &request_).ok()) {
      return Answer(InvalidField("request", absl::StrCat(bytes_in_, " bytes that are none"),
                                 absl::StrCat("a serialized ", request_.GetTypeName())));
    }
    if (absl::Status allowed = rpc_.Authorize(request_); !allowed.ok()) return Answer(allowed);
    Done done = [this](const absl::Status& status) { Answer(status); };
    if constexpr (std::is_invocable_v<Handler, Core&, const Request&, Response&, Done>) {
      handler(core, request_, response_, std::move(done));
    } else {
      handler(core, rpc_.caller(), request_, response_, std::move(done));
    }
  }

  void OnDone() override { delete this; }

 private:
  void Answer(const absl::Status& status) {
    if (status.ok()) {
      bool own = false;
      grpc::SerializationTraits<Response>::Serialize(response_, answer_, &own);
    }
    Finished finished = Tell(request_, response_);
    finished.bytes_in = bytes_in_;
    finished.bytes_out = static_cast<int64_t>(status.ok() ? answer_->Length() : 0);
    Finish(rpc_.Finish(status, finished));
  }

  Rpc rpc_;
  const int64_t bytes_in_;
  grpc::ByteBuffer message_;
  grpc::ByteBuffer* const answer_;
  Request request_;
  Response response_;
};

template <class Request, class Response>
grpc::ServerUnaryReactor* ServeUnary(Core& core, const char* method,
                                     grpc::CallbackServerContext* context,
                                     const grpc::ByteBuffer* message, grpc::ByteBuffer* answer,
                                     void (*handler)(Core&, const Request&, Response&, Done)) {
  auto* call = new UnaryCall<Request, Response>(core, method, context, message, answer);
  call->Start(core, handler);
  return call;
}

// Likewise, for a handler whose answer depends on who asks.
template <class Request, class Response>
grpc::ServerUnaryReactor* ServeUnary(Core& core, const char* method,
                                     grpc::CallbackServerContext* context,
                                     const grpc::ByteBuffer* message, grpc::ByteBuffer* answer,
                                     void (*handler)(Core&, const Caller&, const Request&,
                                                     Response&, Done)) {
  auto* call = new UnaryCall<Request, Response>(core, method, context, message, answer);
  call->Start(core, handler);
  return call;
}

// The service with these methods raw. All must be named: what is left would be of the
// synchronous kind.
template <template <class> class... Methods>
struct WithRawMethods {
  using type = v1::NormService::Service;
};
template <template <class> class First, template <class> class... Rest>
struct WithRawMethods<First, Rest...> {
  using type = First<typename WithRawMethods<Rest...>::type>;
};

using V1 = v1::NormService;
using Base = WithRawMethods<
    V1::WithRawCallbackMethod_CreateInstance, V1::WithRawCallbackMethod_GetInstance,
    V1::WithRawCallbackMethod_ListInstances, V1::WithRawCallbackMethod_DeleteInstance,
    V1::WithRawCallbackMethod_Train, V1::WithRawCallbackMethod_Eval,
    V1::WithRawCallbackMethod_Forward, V1::WithRawCallbackMethod_Backward,
    V1::WithRawCallbackMethod_ForwardStream, V1::WithRawCallbackMethod_BackwardStream,
    V1::WithRawCallbackMethod_FoldConvolution, V1::WithRawCallbackMethod_ZeroGrad,
    V1::WithRawCallbackMethod_Step, V1::WithRawCallbackMethod_GetState,
    V1::WithRawCallbackMethod_SetState, V1::WithRawCallbackMethod_ResetRunningStats,
    V1::WithRawCallbackMethod_ResetParameters, V1::WithRawCallbackMethod_SaveCheckpoint,
    V1::WithRawCallbackMethod_LoadCheckpoint, V1::WithRawCallbackMethod_ListCheckpoints,
    V1::WithRawCallbackMethod_GetServerInfo, V1::WithRawCallbackMethod_RegisterSharedMemory,
    V1::WithRawCallbackMethod_UnregisterSharedMemory,
    V1::WithRawCallbackMethod_GetSharedMemoryStatus>::type;

class NormServiceImpl final : public Base {
 public:
  explicit NormServiceImpl(Core& core) : core_(core) {
    ServeOneMessage("Forward", ServeForward);
    ServeOneMessage("Backward", ServeBackward);
  }

  RawStream* ForwardStream(grpc::CallbackServerContext* context) override {
    return ServeForwardStream(core_, context);
  }
  RawStream* BackwardStream(grpc::CallbackServerContext* context) override {
    return ServeBackwardStream(core_, context);
  }

// The other unary methods differ in nothing but their names.
#define NORMD_UNARY(METHOD)                                                                   \
  grpc::ServerUnaryReactor* METHOD(grpc::CallbackServerContext* context,                      \
                                   const grpc::ByteBuffer* message, grpc::ByteBuffer* answer) \
      override {                                                                              \
    return ServeUnary(core_, #METHOD, context, message, answer, normd::METHOD);               \
  }
  NORMD_UNARY(CreateInstance)
  NORMD_UNARY(GetInstance)
  NORMD_UNARY(ListInstances)
  NORMD_UNARY(DeleteInstance)
  NORMD_UNARY(Train)
  NORMD_UNARY(Eval)
  NORMD_UNARY(FoldConvolution)
  NORMD_UNARY(ZeroGrad)
  NORMD_UNARY(Step)
  NORMD_UNARY(GetState)
  NORMD_UNARY(SetState)
  NORMD_UNARY(ResetRunningStats)
  NORMD_UNARY(ResetParameters)
  NORMD_UNARY(SaveCheckpoint)
  NORMD_UNARY(LoadCheckpoint)
  NORMD_UNARY(ListCheckpoints)
  NORMD_UNARY(GetServerInfo)
  NORMD_UNARY(RegisterSharedMemory)
  NORMD_UNARY(UnregisterSharedMemory)
  NORMD_UNARY(GetSharedMemoryStatus)
#undef NORMD_UNARY

 private:
  // Has gRPC treat a unary method as a stream (see tensor_call.h), which it foresees for
  // "streamed unary" methods; on the wire there is no difference.
  void ServeOneMessage(const char* method, RawCall* (*serve)(Core&, grpc::CallbackServerContext*)) {
    const int index = google::protobuf::DescriptorPool::generated_pool()
                          ->FindServiceByName(V1::service_full_name())
                          ->FindMethodByName(method)
                          ->index();
    using Handler = grpc::internal::CallbackBidiHandler<OneMessage, OneMessage>;
    const auto make = [this, serve] {
      return new Handler(
          [this, serve](grpc::CallbackServerContext* context) { return serve(core_, context); });
    };
    MarkMethodStreamed(index, make());
    MarkMethodRawCallback(index, make());  // marking it streamed made it synchronous
  }

  Core& core_;
};

}  // namespace

std::unique_ptr<grpc::Service> MakeNormService(Core& core) {
  return std::make_unique<NormServiceImpl>(core);
}

}  // namespace normd
