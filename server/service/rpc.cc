#include "server/service/rpc.h"

#include "absl/strings/string_view.h"
#include "server/error/error.h"
#include "spdlog/spdlog.h"

namespace normd {
namespace {

constexpr char kDetailKey[] = "normd-error-detail-bin";

// Metadata beyond a few KiB is refused by many clients.
constexpr size_t kLongestMessage = 2048;

}  // namespace

grpc::Status Rpc::Finish(const absl::Status& status, absl::string_view instance, int64_t bytes_in,
                         int64_t bytes_out) {
  const double ms = absl::ToDoubleMilliseconds(absl::Now() - start_);
  const bool own_fault = absl::IsInternal(status) || absl::IsDataLoss(status);
  spdlog::log(own_fault ? spdlog::level::err : spdlog::level::debug,
              "{} instance={} status={} ms={:.3f} bytes_in={} bytes_out={} peer={}{}{}", method_,
              std::string(instance), absl::StatusCodeToString(status.code()), ms, bytes_in,
              bytes_out, context_->peer(),
              status.ok() ? "" : " error=", std::string(status.message()));
  if (status.ok()) return grpc::Status::OK;
  context_->AddTrailingMetadata(kDetailKey, DetailOf(status).SerializeAsString());
  return {static_cast<grpc::StatusCode>(status.code()),
          std::string(status.message().substr(0, kLongestMessage))};
}

}  // namespace normd
