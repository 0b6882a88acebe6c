// Core: what the handlers of all RPCs share.
#ifndef NORMD_SERVER_SERVICE_CORE_H_
#define NORMD_SERVER_SERVICE_CORE_H_

#include <cstdint>
#include <functional>
#include <string>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/time/time.h"
#include "kernels/backend.h"
#include "kernels/thread_pool.h"
#include "server/admission/admission_queue.h"
#include "server/admission/call_gate.h"
#include "server/admission/memory_budget.h"
#include "server/auth/audit_log.h"
#include "server/auth/authenticator.h"
#include "server/registry/registry.h"
#include "server/registry/saved_contexts.h"
#include "server/service/background.h"
#include "server/service/saved_checkpoints.h"
#include "server/shared_memory/regions.h"
#include "server/state/checkpoints.h"
#include "server/state/persister.h"
#include "server/wire/buffer.h"

namespace normd {

struct Limits {
  int64_t max_message_bytes = 0;
  int64_t max_instances = 0;
  int64_t max_features = 0;
  int64_t memory_budget = 0;
  int64_t context_budget = 0;
  absl::Duration context_ttl;
};

// Owned by the server; everything in it is thread-safe and outlives every call.
struct Core {
  Limits limits;
  std::string durability;  // as --durability says it
  absl::Time start_time;
  ThreadPool* executor = nullptr;
  Backend* backend = nullptr;
  std::string backend_reason;  // why not cuda, where that was for normd to choose
  BufferPool* pool = nullptr;
  AdmissionQueue* admission = nullptr;
  MemoryBudget* memory = nullptr;
  MemoryBudget* context_memory = nullptr;
  Regions* regions = nullptr;             // null: no shared memory
  std::string shared_memory_socket = {};  // where its clients connect
  bool cuda_ipc = false;                  // whether regions may lie on the backend's device
  Persister* persister = nullptr;
  Registry* registry = nullptr;
  SavedContexts* contexts = nullptr;
  Checkpoints* checkpoints = nullptr;  // null: none are kept
  SavedCheckpoints* saved_checkpoints = nullptr;
  Background* background = nullptr;  // for what blocks on files
  CallGate* gate = nullptr;
  Authenticator* authenticator = nullptr;
  AuditLog* audit_log = nullptr;
};

// How a handler answers: called once, on any thread.
using Done = absl::AnyInvocable<void(absl::Status)>;

// The version of this build.
inline constexpr char kVersion[] = NORMD_VERSION;

}  // namespace normd

#endif  // NORMD_SERVER_SERVICE_CORE_H_
