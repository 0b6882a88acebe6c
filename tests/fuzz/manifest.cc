// ParseManifest, behind its checksum: the input is what the checksum is of. No
// file that it names leads out of the folder of instances.
#include "server/state/manifest.h"

#include <cstdlib>

#include "server/state/sha256.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string text(reinterpret_cast<const char*>(data), size);
  if (normd::ParseManifest(text).ok()) std::abort();  // a checksum cannot be guessed
  text += normd::Sha256Hex(text);
  text += '\n';
  const auto parsed = normd::ParseManifest(text);
  if (!parsed.ok()) {
    if (!absl::IsDataLoss(parsed.status())) std::abort();
    return 0;
  }
  for (const normd::ManifestFile& file : parsed->files) {
    if (file.file.empty() || file.file == "." || file.file == ".." ||
        file.file.find('/') != std::string::npos || file.bytes < 0) {
      std::abort();
    }
  }
  const auto again = normd::ParseManifest(normd::WriteManifest(*parsed));
  if (!again.ok() || *again != *parsed) std::abort();
  return 0;
}
