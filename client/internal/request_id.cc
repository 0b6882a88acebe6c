#include "client/internal/request_id.h"

#include <cstdlib>

#include <sys/random.h>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace normd::inline client::internal {

std::string NewRequestId() {
  unsigned char bytes[16];
  // So few bytes come whole or not at all, and not at all only before the system has booted.
  if (getrandom(bytes, sizeof(bytes), 0) != sizeof(bytes)) std::abort();
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const std::string hex = absl::BytesToHexString(
      absl::string_view(reinterpret_cast<const char*>(bytes), sizeof(bytes)));
  const absl::string_view view = hex;
  return absl::StrCat(view.substr(0, 8), "-", view.substr(8, 4), "-", view.substr(12, 4), "-",
                      view.substr(16, 4), "-", view.substr(20));
}

}  // namespace normd::inline client::internal
