#include "absl/time/time.h"
#include "server/service/handlers.h"

namespace normd {

void GetServerInfo(Core& core, const v1::GetServerInfoRequest&, v1::GetServerInfoResponse& response,
                   Done done) {
  response.set_version(kVersion);
  response.set_backend(std::string(core.backend->name()));
  response.set_backend_reason(core.backend_reason);
  for (const DeviceInfo& info : core.backend->devices()) {
    v1::Device& device = *response.add_devices();
    device.set_name(info.name);
    device.set_parallelism(info.parallelism);
    device.set_memory_bytes(info.memory_bytes);
    device.set_healthy(info.healthy);
    device.set_memory_budget(info.memory_budget);
    device.set_memory_in_use(info.memory_in_use);
  }
  v1::Limits& limits = *response.mutable_limits();
  limits.set_max_message_bytes(core.limits.max_message_bytes);
  limits.set_max_instances(core.limits.max_instances);
  limits.set_max_features(core.limits.max_features);
  limits.set_memory_budget(core.limits.memory_budget);
  limits.set_context_budget(core.limits.context_budget);
  limits.set_context_ttl_ms(absl::ToInt64Milliseconds(core.limits.context_ttl));
  response.mutable_start_time()->set_seconds(absl::ToUnixSeconds(core.start_time));
  response.set_instance_count(core.registry->size());
  response.set_memory_in_use(core.memory->in_use() + core.context_memory->in_use());
  response.set_durability(core.durability);
  done(absl::OkStatus());
}

}  // namespace normd
