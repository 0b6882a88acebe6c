#include "client/normctl/normctl.h"

#include <algorithm>
#include <optional>
#include <utility>

#include <CLI/CLI.hpp>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "client/normctl/command.h"
#include "client/normctl/errors.h"
#include "client/normctl/flags.h"
#include "client/normctl/suggest.h"
#include "client/normctl/usage_error.h"

namespace normd::normctl {
namespace {

constexpr absl::Span<const Command> (*kTables[])() = {
    InstanceCommands, ComputeCommands, LearningCommands, StateCommands, CheckpointCommands,
    ServerCommands,   TokenCommands,   BenchCommands,    ShellCommands,
};

// Enough to outlast a server's restart, and not so many that a wrong address takes
// long to be told.
constexpr int kAttempts = 5;

// All flags are declared with underscores, as the server's are; a dash does too.
std::string WithUnderscores(const std::string& argument) {
  if (!absl::StartsWith(argument, "--") || argument.size() == 2) return argument;
  std::string result = argument;
  const size_t end = std::min(result.find('='), result.size());
  std::replace(result.begin() + 2, result.begin() + static_cast<ptrdiff_t>(end), '-', '_');
  return result;
}

// Commands of two words, by the first.
std::string SummaryOf(const std::string& group) {
  if (group == "state") return "An instance's tensors: get, set";
  if (group == "token") return "Tokens that let callers in: new";
  if (group == "checkpoint") return "Checkpoints of all instances: save, load, list";
  return "";
}

struct Options {
  std::string server = "127.0.0.1:50051";
  std::string tls_ca;
  std::string tls_cert;
  std::string tls_key;
  std::string token_file;
  SharedMemory shared_memory = SharedMemory::kAuto;
  bool json = false;
  absl::Duration timeout = absl::Seconds(60);
};

// All of normctl as CLI11 has it: commands, groups of commands ("state"), and flags.
class Parser {
 public:
  Parser()
      : root_("normctl drives a normd server: named normalization layers over gRPC.", "normctl") {
    root_.fallthrough();
    root_.failure_message(CLI::FailureMessage::simple);
    root_.add_option("--server", options_.server, "Address of the server")
        ->envname("NORMD_SERVER")
        ->capture_default_str()
        ->type_name("HOST:PORT|unix:PATH");
    // Not the server's own NORMD_TLS_CERT, which is in the environment of a container.
    const auto add_file = [&](const char* flag, std::string& value, const char* twin,
                              const char* help) {
      root_.add_option(flag, value, help)->envname(twin)->type_name("FILE");
    };
    add_file("--tls_ca", options_.tls_ca, "NORMD_CLIENT_TLS_CA",
             "Speak TLS, and believe the certificates that these roots (PEM) vouch for");
    add_file("--tls_cert", options_.tls_cert, "NORMD_CLIENT_TLS_CERT",
             "Certificate to show to the server, in PEM");
    add_file("--tls_key", options_.tls_key, "NORMD_CLIENT_TLS_KEY", "Its private key, in PEM");
    add_file("--token_file", options_.token_file, "NORMD_CLIENT_TOKEN_FILE",
             "Token to show to the server, as token new wrote it");
    AddChoice<SharedMemory>(
        root_, "--shared_memory",
        {{"auto", SharedMemory::kAuto}, {"on", SharedMemory::kOn}, {"off", SharedMemory::kOff}},
        "Hand tensors over in memory, without sending them: auto where the server is on this "
        "host and allows it",
        [this](const SharedMemory& use) { options_.shared_memory = use; });
    root_.add_flag("--json", options_.json, "Print JSON, errors too");
    AddDuration(root_, "--timeout", &options_.timeout, "For a call with all its retries");
    root_.footer(
        "normctl COMMAND --help tells about one. Exit codes: 0 done, 1 the server said no, "
        "2 usage.");
    for (const auto& table : kTables) {
      for (const Command& command : table()) Add(command);
    }
  }

  // Throws CLI::ParseError.
  void Parse(std::vector<std::string> arguments) {
    std::reverse(arguments.begin(), arguments.end());  // as CLI11 wants them
    root_.parse(std::move(arguments));
  }

  const CLI::App& root() const { return root_; }
  const Options& options() const { return options_; }
  // Of the command that was parsed.
  const Action& action() const { return *chosen_; }

  // The command that the arguments have come to.
  const CLI::App& Deepest() const {
    const CLI::App* app = &root_;
    while (!app->get_subcommands().empty()) app = app->get_subcommands().front();
    return *app;
  }

  // What is wrong with the arguments, and what may have been meant.
  std::string Explain(const CLI::ParseError& error) const {
    const CLI::App& app = Deepest();
    const std::vector<std::string> unknown = root_.remaining(true);
    const std::string where = CommandLine(app);
    std::string text;
    if (unknown.empty() && !CommandsOf(app).empty()) {
      text = absl::StrCat("give a command: ", absl::StrJoin(CommandsOf(app), ", "));
    } else if (unknown.empty()) {
      text = error.what();
    } else if (absl::StartsWith(unknown[0], "-")) {
      const std::string flag = unknown[0].substr(0, unknown[0].find('='));
      text = absl::StrCat("there is no flag ", flag, Suggestion(flag, FlagsOf(app)));
    } else if (!CommandsOf(app).empty()) {
      text =
          absl::StrCat("there is no command ", unknown[0], Suggestion(unknown[0], CommandsOf(app)));
    } else {
      text = absl::StrCat("one argument too many: ", unknown[0]);
    }
    return absl::StrCat(where, where.empty() ? "" : ": ", text, "\nSee: normctl ", where,
                        where.empty() ? "" : " ", "--help");
  }

 private:
  void Add(const Command& command) {
    CLI::App* app = &root_;
    for (const absl::string_view word : absl::StrSplit(command.words, ' ')) {
      app->require_subcommand(1);
      app = Child(app, std::string(word));
    }
    app->description(command.summary);
    app->footer(absl::StrCat("Example:\n  normctl ", command.example));
    app->callback([this, action = command.declare(*app)] { chosen_ = &action; });
  }

  // The command `word` below `app`, made where there is none yet.
  static CLI::App* Child(CLI::App* app, const std::string& word) {
    for (CLI::App* child : app->get_subcommands([](const CLI::App*) { return true; })) {
      if (child->get_name() == word) return child;
    }
    return app->add_subcommand(word, SummaryOf(word));
  }

  // The words after normctl that lead to `app`.
  static std::string CommandLine(const CLI::App& app) {
    const CLI::App* parent = app.get_parent();
    if (parent == nullptr) return "";
    const std::string before = CommandLine(*parent);
    return absl::StrCat(before, before.empty() ? "" : " ", app.get_name());
  }

  static std::vector<std::string> FlagsOf(const CLI::App& app) {
    std::vector<std::string> flags;
    for (const CLI::App* at = &app; at != nullptr; at = at->get_parent()) {
      for (const CLI::Option* option : at->get_options()) {
        for (const std::string& name : option->get_lnames()) {
          flags.push_back(absl::StrCat("--", name));
        }
      }
    }
    return flags;
  }

  static std::vector<std::string> CommandsOf(const CLI::App& app) {
    std::vector<std::string> commands;
    for (const CLI::App* command : app.get_subcommands({})) commands.push_back(command->get_name());
    return commands;
  }

  static std::string Suggestion(const std::string& word,
                                const std::vector<std::string>& candidates) {
    const std::string nearest = Nearest(word, candidates);
    return nearest.empty() ? "" : absl::StrCat("; did you mean ", nearest, "?");
  }

  CLI::App root_;
  Options options_;
  const Action* chosen_ = nullptr;
};

absl::StatusOr<Report> RunAction(const Parser& parser, Progress& progress) {
  const Options& options = parser.options();
  auto client =
      Client::Connect(options.server, {.timeout = options.timeout,
                                       .retry = {.max_attempts = kAttempts},
                                       .shared_memory = options.shared_memory,
                                       .tls_ca = options.tls_ca,
                                       .tls_cert = options.tls_cert,
                                       .tls_key = options.tls_key,
                                       .token_file = options.token_file,
                                       .user_agent = absl::StrCat("normctl/", NORMD_VERSION)});
  if (!client.ok()) return UsageError(client.status().message());
  Session session = {.client = *client,
                     .root = parser.root(),
                     .progress = progress,
                     .shared_memory = options.shared_memory};
  return parser.action()(session);
}

}  // namespace

int Run(std::vector<std::string> arguments, std::ostream& out, std::ostream& err,
        bool err_is_terminal) {
  // "normctl help state get" is "normctl state get --help".
  if (!arguments.empty() && arguments[0] == "help") {
    arguments.erase(arguments.begin());
    arguments.push_back("--help");
  }
  std::transform(arguments.begin(), arguments.end(), arguments.begin(), WithUnderscores);

  Parser parser;
  const bool bare = arguments.empty();
  try {
    parser.Parse(std::move(arguments));
  } catch (const CLI::CallForHelp&) {
    out << parser.root().help();  // of the deepest command that was named
    return kDone;
  } catch (const CLI::ParseError& error) {
    if (bare) {
      err << parser.root().help();
      return kUsage;
    }
    const absl::Status status = UsageError(parser.Explain(error));
    if (parser.options().json) {
      err << JsonError(status).dump(2) << "\n";
    } else {
      err << HumanError(status, parser.options().server);
    }
    return kUsage;
  }

  Progress progress(err, err_is_terminal);
  const auto report = RunAction(parser, progress);
  progress.Clear();
  if (!report.ok()) {
    if (parser.options().json) {
      err << JsonError(report.status()).dump(2) << "\n";
    } else {
      err << HumanError(report.status(), parser.options().server);
    }
    return IsUsageError(report.status()) ? kUsage : kRefused;
  }
  if (parser.options().json) {
    out << report->json.dump(2) << "\n";
  } else {
    out << report->text;
  }
  out.flush();
  return report->exit_code;
}

}  // namespace normd::normctl
