// The manifest of a checkpoint: which files make it up, and what they must be.
//
// Lines of text: a JSON object about the generation, one for each file, and the
// SHA-256 of all bytes before it, in hexadecimal:
//
//   {"format":"normd-checkpoint","version":1,"id":"00000042-manual",
//    "create_time":"2030-01-01T00:00:00.123456789Z","reason":"manual","files":1}
//   {"file":"instances/net%2Fbn1.safetensors","instance":"net/bn1","bytes":1744,
//    "sha256":"<64 digits>"}
//   <64 digits>
//
// (each object on one line). Files are in the order of their instances' names.
#ifndef NORMD_SERVER_STATE_MANIFEST_H_
#define NORMD_SERVER_STATE_MANIFEST_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace normd {

struct ManifestFile {
  std::string file;  // in instances/, without the folder
  std::string instance;
  int64_t bytes = 0;
  std::string sha256;

  bool operator==(const ManifestFile&) const = default;
};

struct Manifest {
  std::string id;
  absl::Time create_time;
  std::string reason;
  std::vector<ManifestFile> files;

  bool operator==(const Manifest&) const = default;
};

// Where a file lies in its generation.
inline constexpr char kInstancesFolder[] = "instances";

std::string WriteManifest(const Manifest& manifest);

// DataLoss, saying what is wrong, for anything that WriteManifest cannot have
// written; what it returns names only files directly inside instances/.
absl::StatusOr<Manifest> ParseManifest(std::string_view text);

// The file of an instance: its name with '/' as %2F; past 255 bytes the beginning
// of that, '~' (which no name has) and the SHA-256 of the name.
std::string InstanceFileName(std::string_view instance);

// A generation's id: a number of 8 to 18 digits, '-' and the reason.
std::string MakeGenerationId(uint64_t number, std::string_view reason);
// None: `id` is of no such form, and is never to reach the file system.
bool ParseGenerationId(std::string_view id, uint64_t* number);
// 1 to 32 of [a-z0-9_].
bool ValidReason(std::string_view reason);

}  // namespace normd

#endif  // NORMD_SERVER_STATE_MANIFEST_H_
