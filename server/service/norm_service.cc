#include "server/service/norm_service.h"

#include "absl/strings/str_cat.h"
#include "normd/v1/norm_service.grpc.pb.h"
#include "server/error/error.h"
#include "server/service/handlers.h"
#include "server/service/rpc.h"
#include "server/service/tensor_call.h"
#include "server/service/tensor_stream.h"

namespace normd {
namespace {

// The instance that a request names, for the log.
template <class Request>
std::string InstanceOf(const Request& request) {
  if constexpr (requires { request.name(); }) {
    return request.name();
  } else {
    return "-";
  }
}

template <class Request, class Response>
grpc::ServerUnaryReactor* ServeUnary(Core& core, const char* method,
                                     grpc::CallbackServerContext* context, const Request* request,
                                     Response* response,
                                     void (*handler)(Core&, const Request&, Response&, Done)) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  const auto bytes = static_cast<int64_t>(request->ByteSizeLong());
  auto done = [rpc = Rpc(method, context), reactor, request, response,
               bytes](const absl::Status& status) mutable {
    const auto bytes_out = static_cast<int64_t>(status.ok() ? response->ByteSizeLong() : 0);
    reactor->Finish(rpc.Finish(status, InstanceOf(*request), bytes, bytes_out));
  };
  if (bytes > core.limits.max_message_bytes) {
    done(LimitExceeded("request", absl::StrCat("a message of ", bytes, " bytes"),
                       core.limits.max_message_bytes, "--max_message_bytes"));
  } else {
    handler(core, *request, *response, std::move(done));
  }
  return reactor;
}

using Base = v1::NormService::WithRawCallbackMethod_Forward<
    v1::NormService::WithRawCallbackMethod_Backward<v1::NormService::CallbackService>>;

class NormServiceImpl final : public Base {
 public:
  explicit NormServiceImpl(Core& core) : core_(core) {}

  grpc::ServerUnaryReactor* Forward(grpc::CallbackServerContext* context,
                                    const grpc::ByteBuffer* request,
                                    grpc::ByteBuffer* response) override {
    return ServeForward(core_, context, request, response);
  }
  grpc::ServerUnaryReactor* Backward(grpc::CallbackServerContext* context,
                                     const grpc::ByteBuffer* request,
                                     grpc::ByteBuffer* response) override {
    return ServeBackward(core_, context, request, response);
  }
  grpc::ServerBidiReactor<v1::ForwardStreamRequest, v1::ForwardStreamResponse>* ForwardStream(
      grpc::CallbackServerContext* context) override {
    return ServeForwardStream(core_, context);
  }
  grpc::ServerBidiReactor<v1::BackwardStreamRequest, v1::BackwardStreamResponse>* BackwardStream(
      grpc::CallbackServerContext* context) override {
    return ServeBackwardStream(core_, context);
  }

// The rest differ in nothing but their names.
#define NORMD_UNARY(METHOD)                                                       \
  grpc::ServerUnaryReactor* METHOD(grpc::CallbackServerContext* context,          \
                                   const v1::METHOD##Request* request,            \
                                   v1::METHOD##Response* response) override {     \
    return ServeUnary(core_, #METHOD, context, request, response, normd::METHOD); \
  }
  NORMD_UNARY(CreateInstance)
  NORMD_UNARY(GetInstance)
  NORMD_UNARY(ListInstances)
  NORMD_UNARY(DeleteInstance)
  NORMD_UNARY(Train)
  NORMD_UNARY(Eval)
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
#undef NORMD_UNARY

 private:
  Core& core_;
};

}  // namespace

std::unique_ptr<grpc::Service> MakeNormService(Core& core) {
  return std::make_unique<NormServiceImpl>(core);
}

}  // namespace normd
