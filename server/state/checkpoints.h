// Checkpoints: generations of all instances, exported as files to carry away.
//
//   DIRECTORY/00000042-manual/
//     instances/<percent-encoded name>.safetensors   one an instance (instance_codec)
//     manifest.json   lines of JSON: format, create time and reason, then for each
//                     file its name, instance, bytes and SHA-256; the SHA-256 of all
//                     that on the last line (manifest.h)
//
// A generation is written under a temporary name, each file and directory is
// fsynced, and the directory is renamed into place: it is there whole or not at
// all. Ids sort by age.
#ifndef NORMD_SERVER_STATE_CHECKPOINTS_H_
#define NORMD_SERVER_STATE_CHECKPOINTS_H_

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "server/state/state_store.h"

namespace normd {

struct CheckpointInfo {
  std::string id;
  absl::Time create_time;
  std::string reason;  // "manual", "interval", "shutdown"
  int64_t instance_count = 0;
  int64_t total_bytes = 0;
  bool sound = true;
  std::string problem;  // what is wrong when not sound, naming the file
};

struct LoadedCheckpoint {
  CheckpointInfo info;
  std::vector<StoredInstance> instances;  // in the order of their names
  std::vector<CheckpointInfo> damaged;    // newer ones that were passed over
};

// Thread-safe; saves wait for each other.
class Checkpoints {
 public:
  // Makes the directory where it is missing, and removes what an interrupted
  // save left. `keep`: generations that stay, 1 or more; the oldest go first.
  // Locks the directory: FailedPrecondition when another Checkpoints has it.
  static absl::StatusOr<std::unique_ptr<Checkpoints>> Open(const std::string& directory, int keep);
  virtual ~Checkpoints() = default;

  // Writes a generation. RESOURCE_EXHAUSTED when the disk is full; nothing of a
  // failed save stays.
  virtual absl::StatusOr<CheckpointInfo> Save(std::string_view reason,
                                              absl::Span<const StoredInstance> instances) = 0;

  // Reads a generation and verifies every checksum. `id` empty: the newest sound
  // one. `names` empty: all. InvalidArgument for an id that is no generation's
  // form (it never leaves the directory); NotFound for a generation or name that
  // is not there; DataLoss naming the damaged file.
  virtual absl::StatusOr<LoadedCheckpoint> Load(std::string_view id,
                                                absl::Span<const std::string> names) = 0;

  // Newest first. Reads manifests and sizes, not the files.
  virtual absl::StatusOr<std::vector<CheckpointInfo>> List() = 0;
};

}  // namespace normd

#endif  // NORMD_SERVER_STATE_CHECKPOINTS_H_
