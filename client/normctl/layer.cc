#include "client/normctl/layer.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "client/normctl/flags.h"
#include "client/normctl/output.h"
#include "client/normctl/usage_error.h"

namespace normd::normctl {
namespace {

// --- names and fields ---

struct LayerFacts {
  const char* word;  // of --layer
  const char* type;  // in torch.nn
  Layer (*make)();   // with its defaults
};

// In the order of Layer's alternatives.
constexpr LayerFacts kLayers[] = {
    {"batch_norm_2d", "BatchNorm2d", [] { return Layer(BatchNorm2d()); }},
    {"batch_norm_1d", "BatchNorm1d", [] { return Layer(BatchNorm1d()); }},
    {"batch_norm_3d", "BatchNorm3d", [] { return Layer(BatchNorm3d()); }},
    {"layer_norm", "LayerNorm", [] { return Layer(LayerNorm()); }},
    {"group_norm", "GroupNorm", [] { return Layer(GroupNorm()); }},
    {"instance_norm_2d", "InstanceNorm2d", [] { return Layer(InstanceNorm2d()); }},
    {"rms_norm", "RMSNorm", [] { return Layer(RmsNorm()); }},
};
static_assert(std::size(kLayers) == std::variant_size_v<Layer>);

const LayerFacts& FactsOf(const Layer& layer) { return kLayers[layer.index()]; }

// visit(name, field) for each field that the layer has, in the order of PyTorch's
// arguments. This is where texts, JSON and flags come from.
template <class Visit>
void ForEachField(auto& layer, Visit visit) {
  if constexpr (requires { layer.num_features; }) visit("num_features", layer.num_features);
  if constexpr (requires { layer.normalized_shape; }) {
    visit("normalized_shape", layer.normalized_shape);
  }
  if constexpr (requires { layer.num_groups; }) visit("num_groups", layer.num_groups);
  if constexpr (requires { layer.num_channels; }) visit("num_channels", layer.num_channels);
  if constexpr (requires { layer.eps; }) visit("eps", layer.eps);
  if constexpr (requires { layer.momentum; }) visit("momentum", layer.momentum);
  if constexpr (requires { layer.affine; }) visit("affine", layer.affine);
  if constexpr (requires { layer.elementwise_affine; }) {
    visit("elementwise_affine", layer.elementwise_affine);
  }
  if constexpr (requires { layer.bias; }) visit("bias", layer.bias);
  if constexpr (requires { layer.track_running_stats; }) {
    visit("track_running_stats", layer.track_running_stats);
  }
}

template <class Visit>
void VisitFields(auto& layer, Visit visit) {
  std::visit([&](auto& each) { ForEachField(each, visit); }, layer);
}

// What has no default: sizes.
bool IsRequired(const int64_t&) { return true; }
bool IsRequired(const std::vector<int64_t>&) { return true; }
template <class T>
bool IsRequired(const T&) {
  return false;
}

// --- fields as text, in Python's notation ---

std::string Text(int64_t value) { return absl::StrCat(value); }
std::string Text(double value) { return absl::StrCat(value); }
std::string Text(bool value) { return value ? "True" : "False"; }
std::string Text(const std::vector<int64_t>& value) { return HumanShape(value); }
std::string Text(const std::optional<double>& value) { return value ? Text(*value) : "None"; }

std::string Described(const Layer& layer, bool brief) {
  std::vector<std::string> arguments;
  VisitFields(layer, [&](const char* name, const auto& value) {
    if (IsRequired(value)) {
      arguments.push_back(Text(value));
    } else if (!brief) {
      arguments.push_back(absl::StrCat(name, "=", Text(value)));
    }
  });
  return absl::StrCat(FactsOf(layer).type, "(", absl::StrJoin(arguments, ", "), ")");
}

// --- fields from text; what was wanted, where the text is none ---

using Wanted = std::optional<const char*>;

Wanted Parse(const std::string& text, int64_t* value) {
  if (absl::SimpleAtoi(text, value)) return std::nullopt;
  return "no whole number";
}
Wanted Parse(const std::string& text, double* value) {
  if (absl::SimpleAtod(text, value)) return std::nullopt;
  return "no number";
}
Wanted Parse(const std::string& text, bool* value) {
  *value = text == "true";
  return std::nullopt;
}
Wanted Parse(const std::string& text, std::optional<double>* value) {
  double number = 0;
  if (text == "none" || text == "None") {
    *value = std::nullopt;
  } else if (absl::SimpleAtod(text, &number)) {
    *value = number;
  } else {
    return "neither a number nor none";
  }
  return std::nullopt;
}
Wanted Parse(const std::string& text, std::vector<int64_t>* value) {
  for (const absl::string_view part : absl::StrSplit(text, ',')) {
    int64_t size = 0;
    if (!absl::SimpleAtoi(part, &size)) return "no sizes such as 768 or 3,224,224";
    value->push_back(size);
  }
  return std::nullopt;
}

// The flags given, as texts by the fields' names.
using Given = std::map<std::string, std::string>;

absl::StatusOr<Layer> LayerOf(Layer layer, Given given) {
  std::string problem;
  std::vector<std::string> flags;
  VisitFields(layer, [&](const char* name, auto& value) {
    flags.push_back(absl::StrCat("--", name));
    const auto flag = given.find(name);
    if (flag == given.end()) {
      if (IsRequired(value) && problem.empty()) {
        problem = absl::StrCat("--", name, " is required for a ", FactsOf(layer).type);
      }
      return;
    }
    const Wanted wanted = Parse(flag->second, &value);
    if (wanted) problem = absl::StrCat("--", name, ": '", flag->second, "' is ", *wanted);
    given.erase(flag);
  });
  if (!given.empty()) {
    const auto& [name, text] = *given.begin();
    const bool negated = text == "false";
    problem = absl::StrCat("a ", FactsOf(layer).type, " has no --", negated ? "no_" : "", name,
                           "; it has ", absl::StrJoin(flags, ", "));
  }
  if (!problem.empty()) {
    return UsageError(absl::StrCat(problem, "\nSee: normctl create --help"));
  }
  return layer;
}

// --- what a layer normalizes over ---

struct Picture {
  struct Dimension {
    std::string name;
    bool reduced;
  };
  std::vector<Dimension> dimensions;
  std::string rows, columns;       // of the grid
  int64_t groups;                  // sets a row
  int64_t group_size;              // columns a set
  bool across_rows;                // sets take in all rows
  std::vector<std::string> notes;  // a sentence each
};

std::string RunningNote(bool tracked) {
  return tracked ? "In eval mode the running statistics serve instead."
                 : "There are no running statistics: eval mode does as train mode.";
}

template <int kDimensions>
Picture PictureOf(const BatchNorm<kDimensions>& norm) {
  Picture picture = {
      .dimensions = {{"N", true}, {"C", false}},
      .rows = "N",
      .columns = "C",
      .groups = norm.num_features,
      .group_size = 1,
      .across_rows = true,
      .notes = {"One mean and variance a channel, over the whole batch: the samples depend on one "
                "another.",
                RunningNote(norm.track_running_stats)}};
  const std::vector<std::string> space[] = {{"L"}, {"H", "W"}, {"D", "H", "W"}};
  for (const std::string& name : space[kDimensions - 1]) {
    picture.dimensions.push_back({name, true});
  }
  if (kDimensions == 1) picture.notes.push_back("(N, C) does as well: there is no L then.");
  return picture;
}

Picture PictureOf(const InstanceNorm2d& norm) {
  return {.dimensions = {{"N", false}, {"C", false}, {"H", true}, {"W", true}},
          .rows = "N",
          .columns = "C",
          .groups = norm.num_features,
          .group_size = 1,
          .across_rows = false,
          .notes = {"One mean and variance for each sample's channel.",
                    RunningNote(norm.track_running_stats),
                    "(C, H, W) does as well: it is one sample."}};
}

Picture PictureOf(const GroupNorm& norm) {
  const int64_t size = norm.num_channels / std::max<int64_t>(norm.num_groups, 1);
  return {.dimensions = {{"N", false}, {"G", false}, {"C/G", true}, {"*", true}},
          .rows = "N",
          .columns = "C",
          .groups = norm.num_groups,
          .group_size = size,
          .across_rows = false,
          .notes = {absl::StrCat("One mean and variance for each sample's group of channels: G = ",
                                 norm.num_groups, " groups of C/G = ", size, "."),
                    "Train and eval mode do the same."}};
}

Picture PictureOfRows(const std::vector<int64_t>& shape, const std::string& note) {
  Picture picture = {
      .dimensions = {{"*", false}},
      .rows = "*",
      .columns = absl::StrJoin(shape, " x "),
      .groups = 1,
      .group_size = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>()),
      .across_rows = false,
      .notes = {note, "Train and eval mode do the same."}};
  for (const int64_t size : shape) picture.dimensions.push_back({absl::StrCat(size), true});
  return picture;
}
Picture PictureOf(const LayerNorm& norm) {
  return PictureOfRows(norm.normalized_shape, "One mean and variance a row, whatever * is.");
}
Picture PictureOf(const RmsNorm& norm) {
  return PictureOfRows(norm.normalized_shape,
                       "One mean square a row, whatever * is; no mean is taken off.");
}

Picture PictureOf(const Layer& layer) {
  return std::visit([](const auto& norm) { return PictureOf(norm); }, layer);
}

// "(N, C, H, W)" and below it a ^ for each letter that is reduced.
std::string Axes(const Picture& picture) {
  std::string names = "(", marks = " ";
  for (const auto& [name, reduced] : picture.dimensions) {
    if (names.size() > 1) {
      names += ", ";
      marks += "  ";
    }
    names += name;
    marks.append(name.size(), reduced ? '^' : ' ');
  }
  while (marks.back() == ' ') marks.pop_back();
  return absl::StrCat("  ", names, ")\n  ", marks, "  normalized over\n");
}

// Some rows and columns of the values; those with the same letter are one set.
std::string Grid(const Picture& picture) {
  constexpr int64_t kRows = 3, kColumns = 8;
  const int64_t in_set = std::min<int64_t>(picture.group_size, picture.groups > 1 ? 2 : kColumns);
  const int64_t sets = std::min<int64_t>(picture.groups, picture.across_rows ? kColumns : 4);
  const bool whole = sets == picture.groups && in_set == picture.group_size;
  std::string text = absl::StrCat("  ", std::string(picture.rows.size() + 1, ' '), picture.columns);
  for (int64_t row = 0; row < kRows; ++row) {
    absl::StrAppend(&text, "\n  ", row == 0 ? picture.rows : std::string(picture.rows.size(), ' '));
    for (int64_t set = 0; set < sets; ++set) {
      const auto letter = static_cast<char>('a' + (picture.across_rows ? set : row * sets + set));
      for (int64_t column = 0; column < in_set; ++column) {
        absl::StrAppend(&text, " ", std::string(1, letter));
      }
    }
    if (!whole) text += " ..";
  }
  return absl::StrCat(text, "   the same letter: the same statistics\n");
}

}  // namespace

std::string HumanLayer(const Layer& layer) { return Described(layer, false); }
std::string BriefLayer(const Layer& layer) { return Described(layer, true); }

Json JsonLayer(const Layer& layer) {
  Json json = {{"type", FactsOf(layer).type}};
  VisitFields(layer, [&]<class T>(const char* name, const T& value) {
    if constexpr (std::is_same_v<T, std::optional<double>>) {
      json[name] = value ? Json(*value) : Json(nullptr);
    } else {
      json[name] = value;
    }
  });
  return json;
}

std::string Drawing(const Layer& layer) {
  const Picture picture = PictureOf(layer);
  return absl::StrCat(Axes(picture), "\n", Grid(picture), "\n  ",
                      absl::StrJoin(picture.notes, "\n  "), "\n");
}

Json JsonNormalizes(const Layer& layer) {
  Json json = {{"dimensions", Json::array()}, {"reduced", Json::array()}};
  for (const auto& [name, reduced] : PictureOf(layer).dimensions) {
    json["dimensions"].push_back(name);
    if (reduced) json["reduced"].push_back(name);
  }
  return json;
}

std::function<absl::StatusOr<Layer>()> AddLayerFlags(CLI::App& app) {
  auto layer = Shared(&kLayers[0]);
  std::vector<std::pair<std::string, const LayerFacts*>> layers;
  for (const LayerFacts& facts : kLayers) layers.emplace_back(facts.word, &facts);
  AddChoice<const LayerFacts*>(app, "--layer", layers, "Of torch.nn [batch_norm_2d]",
                               [layer](const LayerFacts* const& value) { *layer = value; });

  auto given = Shared<Given>();
  const auto add = [&](const std::string& name, const char* type, const char* help) {
    app.add_option_function<std::string>(
           "--" + name, [given, name](const std::string& text) { (*given)[name] = text; }, help)
        ->type_name(type);
  };
  add("num_features", "C", "Batch and instance norms: channels");
  add("normalized_shape", "SIZE[,SIZE...]", "layer_norm, rms_norm: the last dimensions");
  add("num_groups", "G", "group_norm: groups of channels");
  add("num_channels", "C", "group_norm: channels");
  add("eps", "FLOAT", "Added before the square root [1e-5; rms_norm: of the input's dtype]");
  add("momentum", "FLOAT|none",
      "Share of the newest batch in the running statistics; none: their plain average [0.1]");

  const auto add_switch = [&](const std::string& name, const char* on, const char* off) {
    app.add_flag_callback(
        "--" + name, [given, name] { (*given)[name] = "true"; }, on);
    app.add_flag_callback(
        "--no_" + name, [given, name] { (*given)[name] = "false"; }, off);
  };
  add_switch("affine", "With weight and bias [except instance_norm_2d]", "Without them");
  add_switch("elementwise_affine", "layer_norm, rms_norm: with a weight [yes]", "Without it");
  add_switch("bias", "layer_norm: with a bias beside the weight [yes]", "Without it");
  add_switch("track_running_stats", "With running statistics [except instance_norm_2d]",
             "Without them: the batch's serve in both modes");
  return [layer, given] { return LayerOf((*layer)->make(), *given); };
}

}  // namespace normd::normctl
