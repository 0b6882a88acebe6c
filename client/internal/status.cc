#include "client/internal/status.h"

#include "absl/strings/cord.h"
#include "client/normd_client.h"
#include "normd/v1/error.pb.h"

namespace normd::inline client {
namespace {

constexpr char kMetadataKey[] = "normd-error-detail-bin";
constexpr char kPayloadUrl[] = "type.googleapis.com/normd.v1.ErrorDetail";

}  // namespace

absl::Status internal::ToAbsl(const grpc::Status& status, const grpc::ClientContext& context) {
  if (status.ok()) return absl::OkStatus();
  absl::Status result(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
  const auto& metadata = context.GetServerTrailingMetadata();
  const auto detail = metadata.find(kMetadataKey);
  if (detail != metadata.end()) {
    result.SetPayload(kPayloadUrl,
                      absl::Cord(std::string(detail->second.data(), detail->second.size())));
  }
  return result;
}

ErrorDetail DetailOf(const absl::Status& status) {
  const auto payload = status.GetPayload(kPayloadUrl);
  v1::ErrorDetail wire;
  // A payload that cannot be read is as good as none.
  if (!payload || !wire.ParseFromString(std::string(*payload))) return {};
  return {.field = wire.field(),
          .value = wire.value(),
          .allowed = wire.allowed(),
          .limit = wire.limit(),
          .flag = wire.flag(),
          .retry_delay = absl::Milliseconds(wire.retry_delay_ms()),
          .current_version = wire.current_version()};
}

}  // namespace normd::inline client
