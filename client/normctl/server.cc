// info, health.
#include "absl/strings/str_cat.h"
#include "client/normctl/command.h"
#include "client/normctl/flags.h"
#include "client/normctl/output.h"

namespace normd::normctl {
namespace {

std::string Limit(int64_t bytes) {
  return bytes == 0 ? "none" : HumanBytes(static_cast<double>(bytes));
}

Action Info(CLI::App&) {
  return [](Session& session) -> absl::StatusOr<Report> {
    const auto info = session.client.GetServerInfo();
    if (!info.ok()) return info.status();
    // A server of before has none.
    const auto shared = session.client.GetSharedMemoryStatus();
    if (!shared.ok() && !absl::IsUnimplemented(shared.status())) return shared.status();
    const ServerInfo::Limits& limits = info->limits;
    Json devices = Json::array();
    std::vector<std::pair<std::string, std::string>> facts = {
        {"version", info->version},
        {"backend", info->backend_reason.empty()
                        ? info->backend
                        : absl::StrCat(info->backend, " (", info->backend_reason, ")")},
        {"started", HumanTime(info->start_time)},
        {"durability", info->durability},
        {"instances", absl::StrCat(info->instance_count, " of ", limits.max_instances)},
        {"memory in use", absl::StrCat(HumanBytes(static_cast<double>(info->memory_in_use)), " of ",
                                       Limit(limits.memory_budget))},
        {"saved contexts", absl::StrCat("up to ", Limit(limits.context_budget), " for ",
                                        absl::FormatDuration(limits.context_ttl))},
        {"longest message", Limit(limits.max_message_bytes)},
        {"most channels", absl::StrCat(limits.max_features)}};
    Json shared_memory;  // null: off
    if (shared.ok() && shared->enabled) {
      shared_memory = {{"socket", shared->socket},
                       {"connections", shared->connections},
                       {"regions", shared->regions},
                       {"bytes_in_use", shared->bytes_in_use},
                       {"shared_memory_budget", shared->shared_memory_budget},
                       {"max_region_bytes", shared->max_region_bytes},
                       {"max_regions", shared->max_regions},
                       {"cuda_ipc", shared->cuda_ipc}};
      facts.push_back(
          {"shared memory", absl::StrCat(HumanBytes(static_cast<double>(shared->bytes_in_use)),
                                         " of ", Limit(shared->shared_memory_budget), ", of ",
                                         shared->connections, " connections at ", shared->socket)});
    }
    for (const ServerInfo::Device& device : info->devices) {
      devices.push_back({{"name", device.name},
                         {"parallelism", device.parallelism},
                         {"memory_bytes", device.memory_bytes},
                         {"healthy", device.healthy},
                         {"memory_budget", device.memory_budget},
                         {"memory_in_use", device.memory_in_use}});
      const std::string in_use =
          device.memory_budget == 0
              ? ""
              : absl::StrCat(" (", HumanBytes(static_cast<double>(device.memory_in_use)),
                             " in use of ", Limit(device.memory_budget), ")");
      facts.push_back(
          {"device", absl::StrCat(device.name, ", parallelism ", device.parallelism, ", ",
                                  HumanBytes(static_cast<double>(device.memory_bytes)), in_use,
                                  device.healthy ? "" : ", UNHEALTHY")});
    }
    return Report{.json = {{"version", info->version},
                           {"backend", info->backend},
                           {"backend_reason", info->backend_reason},
                           {"devices", devices},
                           {"limits",
                            {{"max_message_bytes", limits.max_message_bytes},
                             {"max_instances", limits.max_instances},
                             {"max_features", limits.max_features},
                             {"memory_budget", limits.memory_budget},
                             {"context_budget", limits.context_budget},
                             {"context_ttl_ms", absl::ToInt64Milliseconds(limits.context_ttl)}}},
                           {"start_time", JsonTime(info->start_time)},
                           {"instance_count", info->instance_count},
                           {"memory_in_use", info->memory_in_use},
                           {"shared_memory", shared_memory},
                           {"durability", info->durability}},
                  .text = Facts(facts)};
  };
}

std::string NameOfHealth(Health health) {
  switch (health) {
    case Health::kServing: return "SERVING";
    case Health::kNotServing: return "NOT_SERVING";
    case Health::kServiceUnknown: return "SERVICE_UNKNOWN";
    case Health::kUnknown: break;
  }
  return "UNKNOWN";
}

Action CheckHealth(CLI::App& app) {
  auto service = Shared<std::string>();
  app.add_option("--service", *service, "Of this service; default: of the whole server")
      ->type_name("NAME");
  return [=](Session& session) -> absl::StatusOr<Report> {
    const auto health = session.client.CheckHealth(*service);
    if (!health.ok()) return health.status();
    const std::string name = NameOfHealth(*health);
    return Report{.json = {{"status", name}},
                  .text = name + "\n",
                  .exit_code = *health == Health::kServing ? 0 : 1};
  };
}

constexpr Command kCommands[] = {
    {"info", "Show the server's version, devices and limits", "info", Info},
    {"health", "Ask whether the server serves; exit code 1 if not",
     "health --service=normd.v1.NormService", CheckHealth},
};

}  // namespace

absl::Span<const Command> ServerCommands() { return kCommands; }

}  // namespace normd::normctl
