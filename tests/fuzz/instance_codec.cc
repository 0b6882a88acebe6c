// DecodeInstance accepts nothing but what EncodeInstance writes, and DecodeRecord nothing but
// what EncodeRecord does: what they accept comes through another round the same.
#include "server/state/instance_codec.h"

#include <cstdlib>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  if (normd::IsRecord(bytes)) {
    const auto decoded = normd::DecodeRecord(bytes);
    if (!decoded.ok() && !absl::IsDataLoss(decoded.status())) std::abort();
    if (decoded.ok()) {
      const auto again = normd::DecodeRecord(normd::EncodeRecord(**decoded));
      if (!again.ok() || !normd::SameState(**again, **decoded)) std::abort();
    }
    return 0;
  }
  const auto decoded = normd::DecodeInstance(bytes);
  if (!decoded.ok()) {
    if (!absl::IsDataLoss(decoded.status())) std::abort();
    return 0;
  }
  const auto again = normd::DecodeInstance(normd::EncodeInstance(*decoded));
  if (!again.ok() || !normd::SameState(*again->state, *decoded->state) ||
      again->requests != decoded->requests) {
    std::abort();
  }
  return 0;
}
