// What a subcommand is, and what it works with.
#ifndef NORMD_CLIENT_NORMCTL_COMMAND_H_
#define NORMD_CLIENT_NORMCTL_COMMAND_H_

#include <functional>
#include <string>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "client/normctl/progress.h"
#include "client/normd_client.h"

namespace normd::normctl {

using Json = nlohmann::ordered_json;

// What a command answers, for programs and for people; one of the two is printed.
struct Report {
  Json json;
  std::string text;  // whole lines
  int exit_code = 0;
};

// What a running command has at hand.
struct Session {
  const Client& client;
  const CLI::App& root;  // all commands and flags, for help and completion
  Progress& progress;    // on the terminal, if there is one
  SharedMemory shared_memory = SharedMemory::kAuto;  // the client's
};

using Action = std::function<absl::StatusOr<Report>(Session&)>;

// A row of the table of commands. To add a command, add a row to the table of its
// file; to add a file, add its table to the list in normctl.cc.
struct Command {
  const char* words;    // "state get"
  const char* summary;  // a line for the list of commands
  const char* example;  // what follows "normctl ", shown by --help
  // Declares flags and arguments, and answers what to do once they are parsed.
  Action (*declare)(CLI::App& app);
};

absl::Span<const Command> InstanceCommands();    // create, list, describe, delete, train, eval
absl::Span<const Command> ComputeCommands();     // forward, backward, fold
absl::Span<const Command> LearningCommands();    // zero-grad, step
absl::Span<const Command> StateCommands();       // state get, state set, reset-...
absl::Span<const Command> CheckpointCommands();  // checkpoint save, load, list
absl::Span<const Command> ServerCommands();      // info, health
absl::Span<const Command> TokenCommands();       // token new
absl::Span<const Command> BenchCommands();       // bench
absl::Span<const Command> ShellCommands();       // completion, version

}  // namespace normd::normctl

#endif  // NORMD_CLIENT_NORMCTL_COMMAND_H_
