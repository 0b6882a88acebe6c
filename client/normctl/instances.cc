// create, list, describe, delete, train, eval.
#include "absl/strings/str_cat.h"
#include "client/normctl/command.h"
#include "client/normctl/flags.h"
#include "client/normctl/layer.h"
#include "client/normctl/output.h"

namespace normd::normctl {
namespace {

std::string Describe(const Instance& instance) {
  return Facts({{"name", instance.name},
                {"layer", HumanLayer(instance.config.layer)},
                {"state dtype", std::string(NameOf(instance.config.state_dtype))},
                {"mode", std::string(NameOf(instance.mode))},
                {"version", absl::StrCat(instance.version)},
                {"batches tracked", absl::StrCat(instance.num_batches_tracked)},
                {"gradients", instance.has_gradients ? "accumulated" : "none"},
                {"optimizer", instance.optimizer.empty() ? "none yet" : instance.optimizer},
                {"state", HumanBytes(static_cast<double>(instance.state_bytes))},
                {"created", HumanTime(instance.create_time)},
                {"changed", HumanTime(instance.update_time)},
                {"uid", instance.uid}});
}

Action Create(CLI::App& app) {
  auto name = AddName(app);
  auto layer = AddLayerFlags(app);
  auto state_dtype =
      AddDataType(app, "--state_dtype", {DataType::kFloat32, DataType::kFloat64},
                  "Of parameters and statistics; float64 for float64 inputs [float32]");
  auto mode = AddMode(app, "Mode at birth [train]");
  auto call = Shared<CallOptions>();
  app.add_option("--request_id", call->request_id,
                 "A UUID: the same creation sent again with it is made once")
      ->type_name("UUID");

  return [=](Session& session) -> absl::StatusOr<Report> {
    auto made = layer();
    if (!made.ok()) return made.status();
    const InstanceConfig config = {.layer = *std::move(made),
                                   .state_dtype = state_dtype->value_or(DataType::kFloat32)};
    const auto created =
        session.client.CreateInstance(*name, config, mode->value_or(Mode::kTrain), *call);
    if (!created.ok()) return created.status();
    Json json = JsonInstance(created->instance);
    json["replayed"] = created->replayed;
    return Report{.json = json,
                  .text = absl::StrCat("created ", created->instance.name, ": ",
                                       HumanLayer(created->instance.config.layer), ", ",
                                       HumanVersion(*created), "\n")};
  };
}

Action List(CLI::App& app) {
  auto options = Shared<ListOptions>();
  app.add_option("--prefix", options->name_prefix, "Only names that begin with this")
      ->type_name("TEXT");
  return [=](Session& session) -> absl::StatusOr<Report> {
    std::vector<std::vector<std::string>> rows = {
        {"NAME", "LAYER", "MODE", "VERSION", "BATCHES", "STATE", "CHANGED"}};
    Json instances = Json::array();
    options->page_size = 1000;
    int64_t total = 0;
    do {
      const auto page = session.client.ListInstances(*options);
      if (!page.ok()) return page.status();
      for (const Instance& instance : page->instances) {
        instances.push_back(JsonInstance(instance));
        rows.push_back({instance.name, BriefLayer(instance.config.layer),
                        std::string(NameOf(instance.mode)), absl::StrCat(instance.version),
                        absl::StrCat(instance.num_batches_tracked),
                        HumanBytes(static_cast<double>(instance.state_bytes)),
                        HumanTime(instance.update_time)});
      }
      options->page_token = page->next_page_token;
      total = page->total_count;
    } while (!options->page_token.empty());
    std::string text = Table(rows);
    if (instances.empty()) {
      text = options->name_prefix.empty()
                 ? "no instances yet; make one with: normctl create NAME --num_features=C\n"
                 : absl::StrCat("no instance's name begins with ", options->name_prefix, "\n");
    }
    return Report{.json = {{"instances", instances}, {"total_count", total}}, .text = text};
  };
}

Action DescribeInstance(CLI::App& app) {
  auto name = AddName(app);
  return [=](Session& session) -> absl::StatusOr<Report> {
    const auto instance = session.client.GetInstance(*name);
    if (!instance.ok()) return instance.status();
    Json json = JsonInstance(*instance);
    json["normalizes"] = JsonNormalizes(instance->config.layer);
    return Report{.json = json,
                  .text = absl::StrCat(Describe(*instance), "\n", Drawing(instance->config.layer))};
  };
}

// A command that is one call without further arguments.
template <auto kCall>
Action Change(CLI::App& app, const char* done) {
  auto name = AddName(app);
  auto call = AddChangeFlags(app);
  return [=](Session& session) -> absl::StatusOr<Report> {
    const auto changed = (session.client.*kCall)(*name, *call);
    if (!changed.ok()) return changed.status();
    return ChangeReport(absl::StrCat(*name, " ", done), *changed);
  };
}

constexpr Command kCommands[] = {
    {"create", "Make an instance: a named layer of torch.nn",
     "create net/bn1 --num_features=64 --momentum=0.1", Create},
    {"list", "Show all instances", "list --prefix=net/", List},
    {"describe", "Show one instance, and what it normalizes over", "describe net/bn1",
     DescribeInstance},
    {"delete", "Remove an instance", "delete net/bn1",
     [](CLI::App& app) { return Change<&Client::DeleteInstance>(app, "deleted, last"); }},
    {"train", "Set train mode, as module.train() does", "train net/bn1",
     [](CLI::App& app) { return Change<&Client::Train>(app, "in train mode"); }},
    {"eval", "Set eval mode, as module.eval() does", "eval net/bn1",
     [](CLI::App& app) { return Change<&Client::Eval>(app, "in eval mode"); }},
};

}  // namespace

absl::Span<const Command> InstanceCommands() { return kCommands; }

}  // namespace normd::normctl
