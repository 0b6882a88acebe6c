// The server's flags, by their environment twins (on the command line Abseil ends the
// process itself): what ReadConfig takes is what its errors say is allowed. A line an
// assignment, as in "listen=127.0.0.1:50051".
#include "server/config.h"

#include <cstdlib>
#include <string>
#include <vector>

#include "absl/flags/reflection.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace {

void Check(bool holds) {
  if (!holds) std::abort();
}

void CheckAccepted(const normd::Config& config) {
  Check(!config.listen.empty() && !config.state_dir.empty());
  Check(config.threads >= 0 && config.threads <= 1024);
  Check(config.max_message_bytes >= 1024 && config.max_message_bytes <= int64_t{1} << 30);
  Check(config.memory_budget > 0 && config.context_budget > 0);
  Check(config.max_instances >= 1 && config.keep_checkpoints >= 1);
  Check(config.checkpoint_interval >= absl::Milliseconds(100) &&
        config.checkpoint_interval < absl::InfiniteDuration());
  Check(config.keepalive_time >= absl::Milliseconds(100) &&
        absl::ToInt64Milliseconds(config.keepalive_time) < int64_t{1} << 31);
  Check(config.tls.cert.empty() == config.tls.key.empty());
  const bool guarded =
      !config.tls.cert.empty() && !(config.auth_file.empty() && config.tls.client_ca.empty());
  if (guarded || config.insecure) return;
  for (const std::string& address : config.listen) {
    Check(absl::StartsWith(address, "unix:") || absl::StartsWith(address, "127.") ||
          absl::StartsWith(address, "localhost:") || absl::StartsWith(address, "[::1]:") ||
          absl::StartsWith(address, "::1:"));
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::FlagSaver flags;
  clearenv();
  const absl::string_view text(reinterpret_cast<const char*>(data), size);
  std::vector<std::string> assignments;
  for (const absl::string_view line : absl::StrSplit(text, '\n')) {
    const std::pair<absl::string_view, absl::string_view> parts =
        absl::StrSplit(line, absl::MaxSplits('=', 1));
    // putenv keeps the string; one without a value takes its variable out.
    assignments.push_back(
        absl::StrCat("NORMD_", absl::AsciiStrToUpper(parts.first), "=", parts.second));
  }
  for (std::string& assignment : assignments) putenv(assignment.data());
  char program[] = "normd";
  char* arguments[] = {program, nullptr};
  const auto config = normd::ReadConfig(1, arguments);
  clearenv();
  if (!config.ok()) {
    Check(absl::IsInvalidArgument(config.status()));
    return 0;
  }
  CheckAccepted(*config);
  return 0;
}
