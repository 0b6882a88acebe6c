// AuthFile::Parse takes no line that grants what its words do not: whoever may do
// something is named by the file, and nobody else is known.
#include "server/auth/auth_file.h"

#include <cstdlib>
#include <string>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/string_view.h"
#include "server/auth/permissions.h"
#include "server/state/sha256.h"

namespace {

void Check(bool holds) {
  if (!holds) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  const auto parsed = normd::AuthFile::Parse(text, "auth");
  if (!parsed.ok()) {
    Check(absl::IsInvalidArgument(parsed.status()));
    return 0;
  }
  for (const absl::string_view token : {"", "token", "normd_", "other"}) {
    const auto caller = parsed->FindToken(token);
    if (caller == nullptr) continue;
    Check(absl::StrContains(text, caller->name()));
    const std::string digest = normd::Sha256Hex({token.data(), token.size()});
    Check(absl::StrContains(absl::AsciiStrToLower(text), "sha256:" + digest));
    if (caller->May(normd::Role::kAdmin, "net/bn")) Check(absl::StrContains(text, "admin"));
    if (caller->MayOnAll(normd::Role::kReader)) Check(absl::StrContains(text, "*"));
  }
  const auto caller = parsed->FindCertificate({"ops", ""}, {"eval.example.org"});
  if (caller != nullptr) {
    Check(absl::StrContains(text, "cn:") || absl::StrContains(text, "san:"));
  }
  return 0;
}
