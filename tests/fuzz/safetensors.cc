// ParseSafetensors never reads out of bounds, and what it accepts it writes back
// as a file that says the same.
#include "formats/safetensors.h"

#include <cstdlib>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto parsed = normd::ParseSafetensors({reinterpret_cast<const char*>(data), size});
  if (!parsed.ok()) return 0;
  const std::string written = normd::WriteSafetensors(*parsed);
  const auto again = normd::ParseSafetensors(written);
  if (!again.ok() || again->metadata != parsed->metadata ||
      again->tensors.size() != parsed->tensors.size()) {
    std::abort();
  }
  for (size_t i = 0; i < again->tensors.size(); ++i) {
    const normd::SafetensorsEntry& a = again->tensors[i];
    const normd::SafetensorsEntry* b = parsed->Find(a.name);
    if (b == nullptr || a.dtype != b->dtype || a.shape != b->shape || a.data != b->data) {
      std::abort();
    }
  }
  return 0;
}
