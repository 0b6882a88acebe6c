// Config: everything that flags and environment say, checked.
#ifndef NORMD_SERVER_CONFIG_H_
#define NORMD_SERVER_CONFIG_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/auth/tls.h"
#include "server/state/persister.h"

namespace normd {

enum class LogFormat : uint8_t { kText, kJson };

struct Config {
  std::vector<std::string> listen;   // "127.0.0.1:50051", "unix:/run/normd.sock"
  std::string port_file;             // empty: none
  std::string state_dir;             // empty with Durability::kNone only
  std::string backend;               // "auto", "cpu", "cuda"
  std::vector<int> cuda_devices;     // empty: all
  int64_t device_memory_budget = 0;  // of each; 0: half of its memory
  int threads = 0;                   // 0: all cores
  bool deterministic = false;
  Durability durability = Durability::kInterval;
  absl::Duration checkpoint_interval;
  int keep_checkpoints = 0;
  int64_t max_message_bytes = 0;
  int64_t max_instances = 0;
  int64_t max_features = 0;
  int64_t max_concurrent_requests = 0;  // 0: any number
  absl::Duration admission_queue_timeout;
  int64_t memory_budget = 0;
  int64_t context_budget = 0;
  absl::Duration context_ttl;
  absl::Duration drain_timeout;
  // Shared memory with clients on this host.
  bool shared_memory = false;
  std::string shared_memory_socket;  // absolute
  int64_t shared_memory_budget = 0;
  int64_t max_region_bytes = 0;
  int64_t max_regions = 0;  // of a connection
  bool cuda_ipc = false;    // also memory that clients have on the GPU
  // Who may connect and what they may do.
  TlsFiles tls;           // without a certificate: no TLS
  std::string auth_file;  // empty: everyone may do all
  bool insecure = false;
  std::string audit_log;  // empty: none
  // How long and how much one connection may ask for.
  absl::Duration handshake_timeout;
  absl::Duration keepalive_time;
  absl::Duration keepalive_timeout;
  absl::Duration max_connection_idle;
  absl::Duration max_connection_age;
  absl::Duration max_connection_age_grace;
  int max_concurrent_streams = 0;
  int max_metadata_bytes = 0;
  std::string log_level;
  LogFormat log_format = LogFormat::kText;
};

// Reads the flags, and for those not given their environment twins (NORMD_LISTEN
// for --listen). INVALID_ARGUMENT names the flag, its value and what is allowed.
// --help and --version print and exit the process.
absl::StatusOr<Config> ReadConfig(int argc, char** argv);

}  // namespace normd

#endif  // NORMD_SERVER_CONFIG_H_
