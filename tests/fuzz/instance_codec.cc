// DecodeInstance accepts nothing but what EncodeInstance writes: what it accepts
// comes through another round the same.
#include "server/state/instance_codec.h"

#include <cstdlib>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto decoded = normd::DecodeInstance({reinterpret_cast<const char*>(data), size});
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
