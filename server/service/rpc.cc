#include "server/service/rpc.h"

#include <utility>

#include "server/auth/audit_log.h"
#include "server/auth/authenticator.h"
#include "server/error/error.h"
#include "spdlog/spdlog.h"

namespace normd {
namespace {

constexpr char kDetailKey[] = "normd-error-detail-bin";

// Metadata beyond a few KiB is refused by many clients.
constexpr size_t kLongestMessage = 2048;

}  // namespace

Rpc::Rpc(Core& core, const char* method, grpc::CallbackServerContext* context)
    : core_(core), method_(method), context_(context), permission_(FindPermission(method)) {
  auto caller = core.authenticator->Authenticate(PresentedBy(*context));
  if (!caller.ok()) {
    admitted_ = caller.status();
    return;
  }
  caller_ = *std::move(caller);
  admitted_ = CheckRole(*caller_, permission_);
  if (!admitted_.ok()) return;
  admitted_ = core.gate->Enter();
  inside_ = admitted_.ok();
}

Rpc::~Rpc() {
  if (inside_) core_.gate->Leave();
}

grpc::Status Rpc::Finish(const absl::Status& status, const Finished& finished) {
  const double ms = absl::ToDoubleMilliseconds(SteadyNow() - start_);
  const bool own_fault = absl::IsInternal(status) || absl::IsDataLoss(status);
  const auto level = own_fault ? spdlog::level::err : spdlog::level::debug;
  // Asked first: what the line says is not free to find out.
  if (spdlog::should_log(level)) {
    spdlog::log(level, "{} instance={} status={} ms={:.3f} bytes_in={} bytes_out={} peer={}{}{}",
                method_, finished.instance.empty() ? "-" : finished.instance,
                absl::StatusCodeToString(status.code()), ms, finished.bytes_in, finished.bytes_out,
                context_->peer(), status.ok() ? "" : " error=", std::string(status.message()));
  }
  Audit(status, finished);
  if (status.ok()) return grpc::Status::OK;
  context_->AddTrailingMetadata(kDetailKey, DetailOf(status).SerializeAsString());
  return {static_cast<grpc::StatusCode>(status.code()),
          std::string(status.message().substr(0, kLongestMessage))};
}

void Rpc::Audit(const absl::Status& status, const Finished& finished) const {
  const bool refused = absl::IsUnauthenticated(status) || absl::IsPermissionDenied(status);
  const bool changes = finished.changed || (permission_ != nullptr && permission_->changes);
  if (!refused && !changes) return;
  core_.audit_log->Write({.who = caller_ == nullptr ? "" : caller_->name(),
                          .peer = context_->peer(),
                          .method = method_,
                          .instance = finished.instance,
                          .request_id = finished.request_id,
                          .outcome = status.code(),
                          .version = finished.version,
                          .replayed = finished.replayed});
}

}  // namespace normd
