// state get, state set, reset-running-stats, reset-parameters.
#include <algorithm>
#include <cmath>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "client/normctl/command.h"
#include "client/normctl/flags.h"
#include "client/normctl/float_types.h"
#include "client/normctl/output.h"
#include "client/normctl/tensor_file.h"
#include "client/normctl/usage_error.h"

namespace normd::normctl {
namespace {

constexpr char kSafetensors[] = ".safetensors";

// Prefixes of what is beside the state_dict in a file. `state set` passes them
// over, so that what `state get` wrote can be set again.
constexpr char kGradientPrefix[] = "grad.";
constexpr char kOptimizerPrefix[] = "optimizer.";

absl::Status CheckFile(const std::string& path) {
  if (absl::EndsWith(path, kSafetensors)) return absl::OkStatus();
  return UsageError(absl::StrCat("'", path, "' must end in ", kSafetensors,
                                 ": a state_dict has several tensors"));
}

// A tensor's smallest, mean and largest value.
std::string Extent(const Tensor& tensor) {
  if (tensor.bytes().empty()) return "";
  if (tensor.dtype() == DataType::kInt64) return absl::StrCat(tensor.values<int64_t>()[0]);
  const Tensor values = ConvertTo(DataType::kFloat64, tensor);
  double low = INFINITY, high = -INFINITY, sum = 0;
  for (const double value : values.values<double>()) {
    low = std::min(low, value);
    high = std::max(high, value);
    sum += value;
  }
  return absl::StrCat(low, " .. ", high, ", mean ",
                      sum / static_cast<double>(values.values<double>().size()));
}

std::vector<NamedTensor> AllOf(const State& state) {
  std::vector<NamedTensor> all = state.state_dict;
  for (const NamedTensor& named : state.gradients) {
    all.push_back({kGradientPrefix + named.name, named.tensor});
  }
  for (const NamedTensor& named : state.optimizer_state) {
    all.push_back({kOptimizerPrefix + named.name, named.tensor});
  }
  return all;
}

Action Get(CLI::App& app) {
  auto name = AddName(app);
  auto output = Shared<std::string>();
  app.add_option("--output", *output,
                 "Where the tensors go, under PyTorch's keys; without it they are summed up")
      ->type_name("FILE.safetensors");
  auto options = Shared<GetStateOptions>();
  app.add_flag("--gradients", options->include_gradients, "With gradients, as grad.KEY");
  app.add_flag("--optimizer", options->include_optimizer, "With the optimizer's, as optimizer.KEY");
  return [=](Session& session) -> absl::StatusOr<Report> {
    if (!output->empty()) {
      absl::Status status = CheckFile(*output);
      if (!status.ok()) return status;
    }
    const auto state = session.client.GetState(*name, *options);
    if (!state.ok()) return state.status();
    const std::vector<NamedTensor> tensors = AllOf(*state);

    Report report;
    report.json = {{"version", state->version}, {"tensors", Json::object()}};
    std::vector<std::vector<std::string>> rows = {{"KEY", "DTYPE", "SHAPE", "VALUES"}};
    for (const NamedTensor& named : tensors) {
      report.json["tensors"][named.name] = {{"dtype", NameOf(named.tensor.dtype())},
                                            {"shape", named.tensor.shape()}};
      rows.push_back({named.name, std::string(NameOf(named.tensor.dtype())),
                      HumanShape(named.tensor.shape()), Extent(named.tensor)});
    }
    report.text = absl::StrCat(*name, ", version ", state->version, "\n", Table(rows));
    if (!output->empty()) {
      absl::Status status = WriteTensors(
          *output, tensors,
          {{"format", "pt"}, {"instance", *name}, {"version", absl::StrCat(state->version)}});
      if (!status.ok()) return status;
      report.json["file"] = *output;
      absl::StrAppend(&report.text, "-> ", *output, "\n");
    }
    return report;
  };
}

Action Set(CLI::App& app) {
  auto name = AddName(app);
  auto input = Shared<std::string>();
  app.add_option("--input", *input, "A whole state_dict, under PyTorch's keys")
      ->required()
      ->type_name("FILE.safetensors");
  auto call = AddChangeFlags(app);
  return [=](Session& session) -> absl::StatusOr<Report> {
    absl::Status status = CheckFile(*input);
    if (!status.ok()) return status;
    auto tensors = ReadTensors(*input);
    if (!tensors.ok()) return tensors.status();
    std::erase_if(*tensors, [](const NamedTensor& named) {
      return absl::StartsWith(named.name, kGradientPrefix) ||
             absl::StartsWith(named.name, kOptimizerPrefix);
    });
    const auto changed = session.client.SetState(*name, *tensors, *call);
    if (!changed.ok()) return changed.status();
    return ChangeReport(absl::StrCat(*name, " has the state of ", *input), *changed);
  };
}

template <auto kCall>
Action Reset(CLI::App& app, const char* done) {
  auto name = AddName(app);
  auto call = AddChangeFlags(app);
  return [=](Session& session) -> absl::StatusOr<Report> {
    const auto changed = (session.client.*kCall)(*name, *call);
    if (!changed.ok()) return changed.status();
    return ChangeReport(absl::StrCat(*name, " has ", done), *changed);
  };
}

constexpr Command kCommands[] = {
    {"state get", "Show an instance's tensors, or write them to a file",
     "state get net/bn1 --output=bn1.safetensors", Get},
    {"state set", "Replace an instance's tensors, as load_state_dict does",
     "state set net/bn1 --input=bn1.safetensors", Set},
    {"reset-running-stats", "Mean 0, variance 1, no batches", "reset-running-stats net/bn1",
     [](CLI::App& app) {
       return Reset<&Client::ResetRunningStats>(app, "fresh running statistics");
     }},
    {"reset-parameters", "Weight 1, bias 0, and the running statistics", "reset-parameters net/bn1",
     [](CLI::App& app) { return Reset<&Client::ResetParameters>(app, "fresh parameters"); }},
};

}  // namespace

absl::Span<const Command> StateCommands() { return kCommands; }

}  // namespace normd::normctl
