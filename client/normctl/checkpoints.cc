// checkpoint save, checkpoint load, checkpoint list.
#include "absl/strings/str_cat.h"
#include "client/normctl/command.h"
#include "client/normctl/flags.h"
#include "client/normctl/output.h"

namespace normd::normctl {
namespace {

std::string Summary(const Checkpoint& checkpoint) {
  return absl::StrCat(checkpoint.id, " (", checkpoint.instance_count, " instances, ",
                      HumanBytes(static_cast<double>(checkpoint.total_bytes)), ")");
}

Action Save(CLI::App& app) {
  auto call = Shared<CallOptions>();
  app.add_option("--request_id", call->request_id,
                 "A UUID: the same request sent again with it makes one checkpoint")
      ->type_name("UUID");
  return [=](Session& session) -> absl::StatusOr<Report> {
    const auto saved = session.client.SaveCheckpoint(*call);
    if (!saved.ok()) return saved.status();
    Json json = JsonCheckpoint(saved->checkpoint);
    json["replayed"] = saved->replayed;
    return Report{.json = json, .text = absl::StrCat("saved ", Summary(saved->checkpoint), "\n")};
  };
}

Action Load(CLI::App& app) {
  auto id = Shared<std::string>();
  app.add_option("id", *id, "Which; default: the newest sound one")->type_name("ID");
  auto names = Shared<std::vector<std::string>>();
  app.add_option("--names", *names, "Only these instances, separated by commas")
      ->delimiter(',')
      ->type_name("NAME,...");
  return [=](Session& session) -> absl::StatusOr<Report> {
    const auto loaded = session.client.LoadCheckpoint(*id, *names);
    if (!loaded.ok()) return loaded.status();
    Report report;
    report.json = {{"checkpoint", JsonCheckpoint(loaded->checkpoint)},
                   {"instances", Json::array()},
                   {"instance_count", loaded->instance_count},
                   {"damaged", Json::array()}};
    for (const Checkpoint& damaged : loaded->damaged) {
      report.json["damaged"].push_back(JsonCheckpoint(damaged));
      absl::StrAppend(&report.text, "passed over ", damaged.id, ": ", damaged.problem, "\n");
    }
    std::vector<std::vector<std::string>> rows = {{"INSTANCE", "VERSION"}};
    for (const auto& instance : loaded->instances) {
      report.json["instances"].push_back({{"name", instance.name}, {"version", instance.version}});
      rows.push_back({instance.name, absl::StrCat(instance.version)});
    }
    absl::StrAppend(&report.text, "loaded ", loaded->instance_count, " instances of ",
                    loaded->checkpoint.id, "\n", Table(rows));
    return report;
  };
}

Action List(CLI::App&) {
  return [](Session& session) -> absl::StatusOr<Report> {
    std::vector<std::vector<std::string>> rows = {
        {"ID", "CREATED", "REASON", "INSTANCES", "SIZE", "STATE"}};
    Json checkpoints = Json::array();
    std::string token;
    do {
      const auto page = session.client.ListCheckpoints(1000, token);
      if (!page.ok()) return page.status();
      for (const Checkpoint& checkpoint : page->checkpoints) {
        checkpoints.push_back(JsonCheckpoint(checkpoint));
        rows.push_back(
            {checkpoint.id, HumanTime(checkpoint.create_time), checkpoint.reason,
             absl::StrCat(checkpoint.instance_count),
             HumanBytes(static_cast<double>(checkpoint.total_bytes)),
             checkpoint.sound ? "sound" : absl::StrCat("damaged: ", checkpoint.problem)});
      }
      token = page->next_page_token;
    } while (!token.empty());
    const bool none = checkpoints.empty();
    return Report{.json = {{"checkpoints", std::move(checkpoints)}},
                  .text = none ? "no checkpoints yet; make one with: normctl checkpoint save\n"
                               : Table(rows)};
  };
}

constexpr Command kCommands[] = {
    {"checkpoint save", "Write all instances to stable storage", "checkpoint save", Save},
    {"checkpoint load", "Bring instances back from a checkpoint", "checkpoint load --names=net/bn1",
     Load},
    {"checkpoint list", "Show all checkpoints, newest first", "checkpoint list", List},
};

}  // namespace

absl::Span<const Command> CheckpointCommands() { return kCommands; }

}  // namespace normd::normctl
