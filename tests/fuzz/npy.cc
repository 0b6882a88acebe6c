// ParseNpy never reads out of bounds, writes back what it accepts, and its shape is one
// that the elements can be put in order by.
#include "formats/npy.h"

#include <cstdlib>

#include "client/normctl/layout.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto parsed = normd::ParseNpy({reinterpret_cast<const char*>(data), size});
  if (!parsed.ok()) {
    if (!absl::IsInvalidArgument(parsed.status())) std::abort();
    return 0;
  }
  const std::string written = normd::NpyHeader(*parsed) + std::string(parsed->data);
  const auto again = normd::ParseNpy(written);
  if (!again.ok() || again->descr != parsed->descr || again->shape != parsed->shape ||
      again->fortran_order != parsed->fortran_order || again->data != parsed->data) {
    std::abort();
  }
  const auto element_size = static_cast<size_t>(std::atoi(parsed->descr.c_str() + 2));
  const std::string ordered =
      normd::normctl::FromFortranOrder(parsed->data, element_size, parsed->shape);
  if (ordered.size() != parsed->data.size()) std::abort();
  return 0;
}
