// The flags that normctl's commands share, and those of the layers: a line an argument.
// What they make can be shown in every form, and is within what the flags allow.
#include <cstdlib>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "client/normctl/flags.h"
#include "client/normctl/layer.h"
#include "client/normctl/usage_error.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace normd::normctl;
  const absl::string_view text(reinterpret_cast<const char*>(data), size);
  std::vector<std::string> arguments;
  for (const absl::string_view line : absl::StrSplit(text, '\n')) arguments.emplace_back(line);
  std::reverse(arguments.begin(), arguments.end());  // as CLI11 wants them

  CLI::App app("", "normctl");
  const auto name = AddName(app);
  const auto call = AddChangeFlags(app);
  const auto mode = AddMode(app, "");
  const auto dtype = AddDataType(app, "--dtype", InputTypes(), "");
  const auto format = AddMemoryFormat(app);
  absl::Duration timeout = absl::Seconds(1);
  AddDuration(app, "--timeout", &timeout, "");
  const auto made = AddLayerFlags(app);
  try {
    app.parse(std::move(arguments));
  } catch (const CLI::ParseError&) {
    return 0;
  }
  if (timeout <= absl::ZeroDuration()) std::abort();
  const auto layer = made();
  if (!layer.ok()) {
    if (!IsUsageError(layer.status())) std::abort();
    return 0;
  }
  if (HumanLayer(*layer).empty() || BriefLayer(*layer).empty() || Drawing(*layer).empty()) {
    std::abort();
  }
  (void)JsonLayer(*layer).dump(-1, ' ', false, Json::error_handler_t::replace);
  (void)JsonNormalizes(*layer);
  return 0;
}
