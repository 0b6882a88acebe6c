// ValidInstanceName says of every name what its contract does, and a name that it takes
// is a file's in a checkpoint, of its own.
#include "server/instance/instance_name.h"

#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_split.h"
#include "server/state/manifest.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string name(reinterpret_cast<const char*>(data), size);
  const std::vector<std::string> segments = absl::StrSplit(name, '/');
  const bool expected =
      name.size() <= 255 &&
      std::all_of(name.begin(), name.end(),
                  [](unsigned char c) {
                    return absl::ascii_isalnum(c) || c == '.' || c == '_' || c == '/' || c == '-';
                  }) &&
      std::none_of(segments.begin(), segments.end(), [](const std::string& segment) {
        return segment.empty() || segment == "." || segment == "..";
      });
  if (normd::ValidInstanceName(name) != expected) std::abort();
  if (!expected) return 0;
  const std::string file = normd::InstanceFileName(name);
  if (file.find('/') != std::string::npos || file.size() > 255) std::abort();
  return 0;
}
