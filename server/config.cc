#include "server/config.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <utility>

#include <arpa/inet.h>

#include "absl/container/btree_map.h"
#include "absl/flags/commandlineflag.h"
#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/flags/reflection.h"
#include "absl/flags/usage.h"
#include "absl/flags/usage_config.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "server/admission/memory_budget.h"
#include "server/error/error.h"

ABSL_FLAG(std::string, listen, "127.0.0.1:50051",
          "Addresses to serve on, separated by commas: HOST:PORT (port 0: any free one) or "
          "unix:/PATH");
ABSL_FLAG(std::string, port_file, "",
          "File to write when serving begins: the addresses served on, one a line");
ABSL_FLAG(std::string, state_dir, "normd-state",
          "Directory for the instances' state and the checkpoints; made where it is missing");
ABSL_FLAG(std::string, backend, "auto",
          "What computes: auto (cuda where there is a device), cpu, cuda");
ABSL_FLAG(std::string, cuda_devices, "",
          "GPUs that compute, by CUDA's numbers, separated by commas: 0,1; empty: all");
ABSL_FLAG(int64_t, device_memory_budget, 0,
          "Bytes of each GPU's memory that requests under way and what is kept for them may take; "
          "0: half of it");
ABSL_FLAG(int32_t, threads, 0, "Threads that compute; 0: one for each core");
ABSL_FLAG(bool, deterministic, false,
          "Results that do not depend on the number of threads, bit for bit");
ABSL_FLAG(
    std::string, durability, "interval",
    "When a change is on disk: interval (at most --checkpoint_interval later), update (before "
    "its answer), none (only in checkpoints that are asked for)");
ABSL_FLAG(absl::Duration, checkpoint_interval, absl::Minutes(1),
          "Time between automatic checkpoints, and the longest that a change waits for the disk "
          "with --durability=interval; 100ms or more");
ABSL_FLAG(int32_t, keep_checkpoints, 5, "Checkpoints that are kept; older ones are removed");
ABSL_FLAG(
    int64_t, max_message_bytes, int64_t{256} << 20,
    "Largest request in one message, in bytes, at most 1 GiB; larger tensors come in streams");
ABSL_FLAG(int64_t, max_instances, 1'000'000, "Instances at most");
ABSL_FLAG(int64_t, max_features, 1 << 20, "Channels of an instance at most");
ABSL_FLAG(int64_t, max_concurrent_requests, 0,
          "Forward and Backward calls, streams included, under way at once; 0: any number");
ABSL_FLAG(absl::Duration, admission_queue_timeout, absl::ZeroDuration(),
          "How long a Forward or Backward waits where --memory_budget or "
          "--max_concurrent_requests has no room for it, before it is refused; 0: not at all");
ABSL_FLAG(int64_t, memory_budget, 0,
          "Bytes that requests under way may take together; 0: half of the machine's or control "
          "group's memory");
ABSL_FLAG(int64_t, context_budget, 0,
          "Bytes that contexts saved for Backward may take; 0: an eighth of the machine's or "
          "control group's memory");
ABSL_FLAG(absl::Duration, context_ttl, absl::Minutes(10), "How long a saved context is kept");
ABSL_FLAG(std::string, shared_memory, "off",
          "on: clients on this host may hand tensors over in shared memory, without sending them");
ABSL_FLAG(std::string, shared_memory_socket, "",
          "Path of the Unix socket through which they get it; empty: shared-memory.sock in "
          "--state_dir");
ABSL_FLAG(int64_t, shared_memory_budget, 0,
          "Bytes of shared memory at most, which count in --memory_budget too; 0: half of that");
ABSL_FLAG(int64_t, max_region_bytes, int64_t{4} << 30,
          "Largest piece of shared memory that a client may ask for, in bytes");
ABSL_FLAG(int64_t, max_regions, 64, "Pieces of shared memory that one client may have");
ABSL_FLAG(std::string, cuda_ipc, "off",
          "on: clients with --shared_memory=on may also hand over memory that they have on the "
          "GPU, by CUDA's IPC handles; they are trusted to keep it while it is used");
ABSL_FLAG(absl::Duration, drain_timeout, absl::Seconds(30),
          "How long calls under way may take after SIGTERM or SIGINT");
ABSL_FLAG(std::string, tls_cert, "",
          "File of the server's certificate and those that lead to its root, in PEM: all TCP "
          "addresses speak TLS. Read again when it changes");
ABSL_FLAG(std::string, tls_key, "", "File of the private key of --tls_cert, in PEM");
ABSL_FLAG(std::string, tls_client_ca, "",
          "File of root certificates, in PEM: only clients whose certificate they vouch for may "
          "connect by TCP");
ABSL_FLAG(std::string, auth_file, "",
          "File that says which tokens and client certificates may do what (normctl token new "
          "makes its lines); read again when it changes. Without it whoever can connect may do "
          "all");
ABSL_FLAG(bool, insecure, false,
          "Serve on addresses that other machines reach though there is no TLS or nobody is asked "
          "for credentials");
ABSL_FLAG(std::string, audit_log, "",
          "File to append a line of JSON to for every change and every refused call");
ABSL_FLAG(absl::Duration, handshake_timeout, absl::Seconds(10),
          "How long a new connection may take to complete its TLS and HTTP/2 handshakes");
ABSL_FLAG(absl::Duration, keepalive_time, absl::Seconds(30),
          "A connection that is silent for so long is asked whether it still lives");
ABSL_FLAG(absl::Duration, keepalive_timeout, absl::Seconds(10),
          "and closed when it does not answer for so long");
ABSL_FLAG(absl::Duration, max_connection_idle, absl::Minutes(10),
          "A connection without calls for so long is closed; clients connect again when they "
          "need to");
ABSL_FLAG(absl::Duration, max_connection_age, absl::Hours(1),
          "A connection as old as this is closed once its calls are done, so that new "
          "certificates and addresses come into force");
ABSL_FLAG(absl::Duration, max_connection_age_grace, absl::Minutes(5),
          "How long calls on such a connection may go on");
ABSL_FLAG(int32_t, max_concurrent_streams, 1000, "Calls under way on one connection at most");
ABSL_FLAG(int32_t, max_metadata_bytes, 8192, "Bytes of a call's metadata at most");
ABSL_FLAG(std::string, log_level, "info",
          "trace, debug (a line a request), info, warn, error, off");
ABSL_FLAG(std::string, log_format, "text", "text, or json (an object a line)");

namespace normd {
namespace {

constexpr char kPrefix[] = "NORMD_";

bool IsOurs(absl::string_view file) { return absl::EndsWith(file, "server/config.cc"); }

// Gives each of our flags the value of its environment twin.
absl::Status ReadEnvironment() {
  for (const auto& [name, flag] : absl::GetAllFlags()) {
    if (!IsOurs(flag->Filename())) continue;
    const std::string twin = absl::StrCat(kPrefix, absl::AsciiStrToUpper(name));
    const char* value = std::getenv(twin.c_str());
    std::string error;
    if (value != nullptr && !flag->ParseFrom(value, &error)) {
      return absl::InvalidArgumentError(absl::StrCat("the environment's ", twin, "=", value,
                                                     " is no value for --", name, ": ",
                                                     error.empty() ? flag->Help() : error));
    }
  }
  return absl::OkStatus();
}

absl::Status BadFlag(absl::string_view flag, absl::string_view value, absl::string_view allowed) {
  return InvalidField(absl::StrCat("--", flag), value, allowed);
}

template <class Value>
absl::Status CheckRange(absl::string_view flag, Value value, Value least, Value most) {
  if (value >= least && value <= most) return absl::OkStatus();
  return BadFlag(flag, absl::StrCat(value), absl::StrCat(least, " to ", most));
}

absl::Status CheckAtLeast(absl::string_view flag, absl::Duration value, absl::Duration least) {
  if (value >= least && value < absl::InfiniteDuration()) return absl::OkStatus();
  return BadFlag(flag, absl::FormatDuration(value),
                 absl::StrCat(absl::FormatDuration(least), " or more, like 500ms, 30s, 10m"));
}

// What gRPC counts in 32-bit milliseconds.
absl::Status CheckTimer(absl::string_view flag, absl::Duration value) {
  if (value >= absl::Milliseconds(100) && value <= absl::Hours(24 * 24)) return absl::OkStatus();
  return BadFlag(flag, absl::FormatDuration(value), "100ms to 576h, like 10s, 5m");
}

absl::Status CheckOneOf(absl::string_view flag, const std::string& value,
                        const std::vector<std::string>& allowed) {
  if (std::find(allowed.begin(), allowed.end(), value) != allowed.end()) return absl::OkStatus();
  return BadFlag(flag, value, absl::StrJoin(allowed, ", "));
}

absl::Status ReadCudaDevices(const std::string& text, std::vector<int>& devices) {
  for (const absl::string_view part : absl::StrSplit(text, ',', absl::SkipWhitespace())) {
    int number = -1;
    if (!absl::SimpleAtoi(part, &number) || number < 0 || number > 1023 ||
        std::find(devices.begin(), devices.end(), number) != devices.end()) {
      return BadFlag("cuda_devices", text, "numbers of 0 to 1023, each once, like 0,1");
    }
    devices.push_back(number);
  }
  return absl::OkStatus();
}

absl::Status CheckListen(const std::vector<std::string>& addresses) {
  for (const std::string& address : addresses) {
    const size_t colon = address.rfind(':');
    const bool unix_socket = absl::StartsWith(address, "unix:") && address.size() > 5;
    int port = -1;
    const bool tcp = colon != std::string::npos && colon > 0 &&
                     absl::SimpleAtoi(address.substr(colon + 1), &port) && port >= 0 &&
                     port <= 65535;
    if (!unix_socket && !tcp) {
      return BadFlag("listen", address, "HOST:PORT with a port of 0 to 65535, or unix:/PATH");
    }
  }
  return absl::OkStatus();
}

// Whether only this machine reaches the address. A name counts by what it says, not by
// what it resolves to today.
bool IsLocal(absl::string_view address) {
  if (absl::StartsWith(address, "unix:")) return true;
  const absl::string_view host = address.substr(0, address.rfind(':'));
  in_addr ipv4;
  if (inet_pton(AF_INET, std::string(host).c_str(), &ipv4) == 1) {
    return (ntohl(ipv4.s_addr) >> 24) == 127;
  }
  return host == "[::1]" || host == "::1" || host == "localhost";
}

absl::Status CheckSecurity(const Config& config) {
  if (config.tls.cert.empty() != config.tls.key.empty()) {
    return BadFlag(config.tls.cert.empty() ? "tls_cert" : "tls_key", "",
                   "--tls_cert and --tls_key together");
  }
  const bool tls = !config.tls.cert.empty();
  if (!tls && !config.tls.client_ca.empty()) {
    return BadFlag("tls_client_ca", config.tls.client_ca,
                   "nothing without --tls_cert and --tls_key");
  }
  const bool asks = !config.auth_file.empty() || !config.tls.client_ca.empty();
  if (config.insecure || (tls && asks)) return absl::OkStatus();
  for (const std::string& address : config.listen) {
    if (IsLocal(address)) continue;
    return BadFlag(
        "listen", address,
        absl::StrCat("127.0.0.0/8, [::1], localhost or unix:/PATH, since ",
                     tls    ? "nobody is asked for credentials: give --auth_file (normctl token "
                              "new makes its lines) or --tls_client_ca"
                     : asks ? "there is no TLS: give --tls_cert and --tls_key"
                            : "there is neither TLS nor anyone asked for credentials: give "
                              "--tls_cert and --tls_key, and --auth_file (normctl token new makes "
                              "its lines) or --tls_client_ca",
                     "; or, where only those reach the address who may do all, --insecure"));
  }
  return absl::OkStatus();
}

// Abseil's own --help ends with 1, as if it were an error.
bool AsksForHelp(int argc, char** argv) {
  return std::any_of(argv + 1, argv + argc, [](absl::string_view argument) {
    return argument == "--help" || argument == "-help" || argument == "-h";
  });
}

std::string HelpText() {
  std::string text = absl::StrCat(absl::ProgramUsageMessage(), "\n");
  absl::btree_map<absl::string_view, absl::CommandLineFlag*> flags;
  for (const auto& [name, flag] : absl::GetAllFlags()) {
    if (IsOurs(flag->Filename())) flags.emplace(name, flag);
  }
  for (const auto& [name, flag] : flags) {
    absl::StrAppend(&text, "\n  --", name, "=", flag->DefaultValue(), "\n      ", flag->Help(),
                    "\n");
  }
  return text;
}

std::string VersionText() { return absl::StrCat("normd ", NORMD_VERSION, "\n"); }

}  // namespace

absl::StatusOr<Config> ReadConfig(int argc, char** argv) {
  // Abseil takes it once a process.
  static const bool described [[maybe_unused]] = [] {
    absl::SetProgramUsageMessage(
        "serves named normalization layers with PyTorch's semantics over gRPC.\n"
        "Every flag has an environment twin: NORMD_LISTEN for --listen.\n"
        "Usage: normd [--listen=127.0.0.1:50051] [--state_dir=DIR] ...");
    return true;
  }();
  absl::FlagsUsageConfig usage;
  usage.contains_help_flags = IsOurs;
  usage.contains_helpshort_flags = IsOurs;
  usage.version_string = VersionText;
  absl::SetFlagsUsageConfig(usage);

  if (AsksForHelp(argc, argv)) {
    std::cout << HelpText();
    std::exit(0);
  }
  if (absl::Status read = ReadEnvironment(); !read.ok()) return read;
  const std::vector<char*> rest = absl::ParseCommandLine(argc, argv);
  if (rest.size() > 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("normd takes flags alone, not \"", rest[1], "\"; see normd --help"));
  }

  Config config;
  config.listen = absl::StrSplit(absl::GetFlag(FLAGS_listen), ',', absl::SkipWhitespace());
  config.port_file = absl::GetFlag(FLAGS_port_file);
  config.state_dir = absl::GetFlag(FLAGS_state_dir);
  config.backend = absl::GetFlag(FLAGS_backend);
  const std::string cuda_devices = absl::GetFlag(FLAGS_cuda_devices);
  config.device_memory_budget = absl::GetFlag(FLAGS_device_memory_budget);
  config.threads = absl::GetFlag(FLAGS_threads);
  config.deterministic = absl::GetFlag(FLAGS_deterministic);
  config.checkpoint_interval = absl::GetFlag(FLAGS_checkpoint_interval);
  config.keep_checkpoints = absl::GetFlag(FLAGS_keep_checkpoints);
  config.max_message_bytes = absl::GetFlag(FLAGS_max_message_bytes);
  config.max_instances = absl::GetFlag(FLAGS_max_instances);
  config.max_features = absl::GetFlag(FLAGS_max_features);
  config.max_concurrent_requests = absl::GetFlag(FLAGS_max_concurrent_requests);
  config.admission_queue_timeout = absl::GetFlag(FLAGS_admission_queue_timeout);
  config.memory_budget = absl::GetFlag(FLAGS_memory_budget);
  config.context_budget = absl::GetFlag(FLAGS_context_budget);
  config.context_ttl = absl::GetFlag(FLAGS_context_ttl);
  config.drain_timeout = absl::GetFlag(FLAGS_drain_timeout);
  const std::string shared_memory = absl::GetFlag(FLAGS_shared_memory);
  config.shared_memory = shared_memory == "on";
  config.shared_memory_socket = absl::GetFlag(FLAGS_shared_memory_socket);
  config.shared_memory_budget = absl::GetFlag(FLAGS_shared_memory_budget);
  config.max_region_bytes = absl::GetFlag(FLAGS_max_region_bytes);
  config.max_regions = absl::GetFlag(FLAGS_max_regions);
  const std::string cuda_ipc = absl::GetFlag(FLAGS_cuda_ipc);
  config.cuda_ipc = cuda_ipc == "on";
  config.tls = {.cert = absl::GetFlag(FLAGS_tls_cert),
                .key = absl::GetFlag(FLAGS_tls_key),
                .client_ca = absl::GetFlag(FLAGS_tls_client_ca)};
  config.auth_file = absl::GetFlag(FLAGS_auth_file);
  config.insecure = absl::GetFlag(FLAGS_insecure);
  config.audit_log = absl::GetFlag(FLAGS_audit_log);
  config.handshake_timeout = absl::GetFlag(FLAGS_handshake_timeout);
  config.keepalive_time = absl::GetFlag(FLAGS_keepalive_time);
  config.keepalive_timeout = absl::GetFlag(FLAGS_keepalive_timeout);
  config.max_connection_idle = absl::GetFlag(FLAGS_max_connection_idle);
  config.max_connection_age = absl::GetFlag(FLAGS_max_connection_age);
  config.max_connection_age_grace = absl::GetFlag(FLAGS_max_connection_age_grace);
  config.max_concurrent_streams = absl::GetFlag(FLAGS_max_concurrent_streams);
  config.max_metadata_bytes = absl::GetFlag(FLAGS_max_metadata_bytes);
  config.log_level = absl::GetFlag(FLAGS_log_level);
  const std::string durability = absl::GetFlag(FLAGS_durability);
  const std::string log_format = absl::GetFlag(FLAGS_log_format);

  if (config.listen.empty()) return BadFlag("listen", "", "HOST:PORT or unix:/PATH");
  constexpr int64_t kMost = int64_t{1} << 50;
  for (const absl::Status& check : {
           CheckListen(config.listen),
           config.state_dir.empty() ? BadFlag("state_dir", "", "a directory") : absl::OkStatus(),
           CheckOneOf("backend", config.backend, {"auto", "cpu", "cuda"}),
           ReadCudaDevices(cuda_devices, config.cuda_devices),
           CheckRange<int64_t>("device_memory_budget", config.device_memory_budget, 0, kMost),
           CheckRange("threads", config.threads, 0, 1024),
           CheckOneOf("durability", durability, {"interval", "update", "none"}),
           CheckAtLeast("checkpoint_interval", config.checkpoint_interval, absl::Milliseconds(100)),
           CheckRange("keep_checkpoints", config.keep_checkpoints, 1, 1'000'000),
           CheckRange<int64_t>("max_message_bytes", config.max_message_bytes, 1024,
                               int64_t{1} << 30),
           CheckRange<int64_t>("max_instances", config.max_instances, 1, 1'000'000'000),
           CheckRange<int64_t>("max_features", config.max_features, 1, 1 << 26),
           CheckRange<int64_t>("max_concurrent_requests", config.max_concurrent_requests, 0,
                               1'000'000),
           CheckAtLeast("admission_queue_timeout", config.admission_queue_timeout,
                        absl::ZeroDuration()),
           CheckRange<int64_t>("memory_budget", config.memory_budget, 0, kMost),
           CheckRange<int64_t>("context_budget", config.context_budget, 0, kMost),
           CheckAtLeast("context_ttl", config.context_ttl, absl::Milliseconds(1)),
           CheckAtLeast("drain_timeout", config.drain_timeout, absl::ZeroDuration()),
           CheckOneOf("shared_memory", shared_memory, {"on", "off"}),
           CheckRange<int64_t>("shared_memory_budget", config.shared_memory_budget, 0, kMost),
           CheckRange<int64_t>("max_region_bytes", config.max_region_bytes, 1, kMost),
           CheckRange<int64_t>("max_regions", config.max_regions, 1, 100'000),
           CheckOneOf("cuda_ipc", cuda_ipc, {"on", "off"}),
           config.cuda_ipc && !config.shared_memory
               ? BadFlag("cuda_ipc", cuda_ipc, "off without --shared_memory=on")
               : absl::OkStatus(),
           CheckTimer("handshake_timeout", config.handshake_timeout),
           CheckTimer("keepalive_time", config.keepalive_time),
           CheckTimer("keepalive_timeout", config.keepalive_timeout),
           CheckTimer("max_connection_idle", config.max_connection_idle),
           CheckTimer("max_connection_age", config.max_connection_age),
           CheckTimer("max_connection_age_grace", config.max_connection_age_grace),
           CheckRange("max_concurrent_streams", config.max_concurrent_streams, 1, 1'000'000),
           CheckRange("max_metadata_bytes", config.max_metadata_bytes, 1024, 1 << 20),
           CheckSecurity(config),
           CheckOneOf("log_level", config.log_level,
                      {"trace", "debug", "info", "warn", "error", "off"}),
           CheckOneOf("log_format", log_format, {"text", "json"}),
       }) {
    if (!check.ok()) return check;
  }
  config.durability = durability == "interval" ? Durability::kInterval
                      : durability == "update" ? Durability::kUpdate
                                               : Durability::kNone;
  config.log_format = log_format == "json" ? LogFormat::kJson : LogFormat::kText;
  if (config.memory_budget == 0) config.memory_budget = MachineMemoryBytes() / 2;
  if (config.shared_memory_budget == 0) config.shared_memory_budget = config.memory_budget / 2;
  if (config.shared_memory_socket.empty()) {
    config.shared_memory_socket = config.state_dir + "/shared-memory.sock";
  }
  // Clients, who are told it, have directories of their own.
  config.shared_memory_socket = std::filesystem::absolute(config.shared_memory_socket);
  if (config.context_budget == 0) config.context_budget = MachineMemoryBytes() / 8;
  return config;
}

}  // namespace normd
