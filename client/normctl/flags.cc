#include "client/normctl/flags.h"

#include "absl/time/time.h"

namespace normd::normctl {
std::shared_ptr<std::string> AddName(CLI::App& app) {
  auto name = Shared<std::string>();
  app.add_option("name", *name, "Name of the instance")->required()->type_name("NAME");
  return name;
}

std::shared_ptr<CallOptions> AddChangeFlags(CLI::App& app) {
  auto call = Shared<CallOptions>();
  app.add_option("--expected_version", call->expected_version,
                 "Refuse to change any other version of the instance")
      ->type_name("VERSION");
  app.add_option("--request_id", call->request_id,
                 "A UUID: the same change sent again with it is made once")
      ->type_name("UUID");
  return call;
}

std::shared_ptr<std::optional<Mode>> AddMode(CLI::App& app, const std::string& help) {
  auto mode = Shared<std::optional<Mode>>();
  AddChoice<Mode>(app, "--mode", {{"train", Mode::kTrain}, {"eval", Mode::kEval}}, help,
                  [mode](Mode value) { *mode = value; });
  return mode;
}

std::shared_ptr<std::optional<DataType>> AddDataType(CLI::App& app, const std::string& flag,
                                                     std::vector<DataType> allowed,
                                                     const std::string& help) {
  auto dtype = Shared<std::optional<DataType>>();
  std::vector<std::pair<std::string, DataType>> choices;
  for (const DataType type : allowed) choices.emplace_back(NameOf(type), type);
  AddChoice<DataType>(app, flag, std::move(choices), help,
                      [dtype](DataType value) { *dtype = value; });
  return dtype;
}

std::vector<DataType> InputTypes() {
  return {DataType::kFloat32, DataType::kFloat64, DataType::kFloat16, DataType::kBFloat16};
}

std::shared_ptr<MemoryFormat> AddMemoryFormat(CLI::App& app) {
  auto format = Shared(MemoryFormat::kContiguous);
  AddChoice<MemoryFormat>(
      app, "--memory_format",
      {{"contiguous", MemoryFormat::kContiguous}, {"channels_last", MemoryFormat::kChannelsLast}},
      "How tensors lie in the server's memory; files hold logical NCHW in either",
      [format](MemoryFormat value) { *format = value; });
  return format;
}

CLI::Option* AddDuration(CLI::App& app, const std::string& flag, absl::Duration* value,
                         const std::string& help) {
  return app
      .add_option_function<std::string>(
          flag,
          [flag, value](const std::string& text) {
            if (!absl::ParseDuration(text, value) || *value <= absl::ZeroDuration()) {
              throw CLI::ValidationError(flag, "'" + text + "' is no duration such as 500ms, 10s");
            }
          },
          help)
      ->type_name("DURATION")
      ->default_str(absl::FormatDuration(*value));
}

}  // namespace normd::normctl
