#include "server/auth/auth_file.h"

#include <algorithm>
#include <optional>
#include <utility>

#include <openssl/crypto.h>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "server/error/error.h"
#include "server/state/sha256.h"

namespace normd {
namespace {

constexpr absl::string_view kToken = "sha256:";
constexpr absl::string_view kCommonName = "cn:";
constexpr absl::string_view kAlternativeName = "san:";
constexpr size_t kDigestDigits = 64;
constexpr size_t kLongestName = 64;
constexpr size_t kLongestPrefix = 255;

bool AllOf(absl::string_view text, absl::string_view others) {
  return std::all_of(text.begin(), text.end(), [&](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) ||
           others.find(c) != absl::string_view::npos;
  });
}

std::optional<Role> ToRole(absl::string_view word) {
  for (const Role role : {Role::kReader, Role::kUser, Role::kAdmin}) {
    if (word == NameOf(role)) return role;
  }
  return std::nullopt;
}

bool ValidCredential(absl::string_view credential) {
  if (absl::ConsumePrefix(&credential, kToken)) {
    return credential.size() == kDigestDigits &&
           std::all_of(credential.begin(), credential.end(),
                       [](char c) { return absl::ascii_isxdigit(static_cast<unsigned char>(c)); });
  }
  return (absl::ConsumePrefix(&credential, kCommonName) ||
          absl::ConsumePrefix(&credential, kAlternativeName)) &&
         !credential.empty();
}

}  // namespace

absl::StatusOr<AuthFile> AuthFile::Parse(absl::string_view text, absl::string_view path) {
  AuthFile file;
  int number = 0;
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    ++number;
    const std::vector<std::string> words =
        absl::StrSplit(line.substr(0, line.find('#')), absl::ByAnyChar(" \t\r"), absl::SkipEmpty());
    if (words.empty()) continue;
    const auto refuse = [&](absl::string_view column, absl::string_view value,
                            absl::string_view allowed) {
      return InvalidField(absl::StrCat(path, ":", number, ": ", column), value, allowed);
    };
    if (words.size() != 4) {
      return refuse("the line", absl::StrCat("of ", words.size(), " words"),
                    "CREDENTIAL NAME ROLE NAMES");
    }
    std::string credential = words[0];
    if (!ValidCredential(credential)) {
      return refuse("CREDENTIAL", credential,
                    "sha256: and 64 hexadecimal digits, cn: or san: and a certificate's name");
    }
    if (absl::StartsWith(credential, kToken)) absl::AsciiStrToLower(&credential);
    const std::string& name = words[1];
    if (name.size() > kLongestName || !AllOf(name, "._@-")) {
      return refuse("NAME", name, "1 to 64 of [A-Za-z0-9._@-]");
    }
    const std::optional<Role> role = ToRole(words[2]);
    if (!role.has_value()) return refuse("ROLE", words[2], "reader, user, admin");

    Entry& entry = file.callers_[credential];
    if (!entry.name.empty() && entry.name != name) {
      return refuse("NAME", name, absl::StrCat(entry.name, ", as the credential's line before"));
    }
    entry.name = name;
    for (absl::string_view prefix : absl::StrSplit(words[3], ',')) {
      if (prefix.empty() || prefix.size() > kLongestPrefix ||
          (prefix != "*" && !AllOf(prefix, "._/-"))) {
        return refuse("NAMES", prefix,
                      "*, or prefixes of 1 to 255 of [A-Za-z0-9._/-], separated by commas");
      }
      entry.grants.push_back({*role, prefix == "*" ? std::string() : std::string(prefix)});
    }
  }
  for (const auto& [credential, entry] : file.callers_) {
    absl::string_view digest = credential;
    if (!absl::ConsumePrefix(&digest, kToken)) continue;
    file.tokens_.emplace_back(digest, std::make_shared<const Caller>(entry.name, entry.grants));
  }
  return file;
}

std::shared_ptr<const Caller> AuthFile::FindToken(absl::string_view token) const {
  const std::string digest = Sha256Hex({token.data(), token.size()});
  std::shared_ptr<const Caller> found;
  // All of them, each in constant time: how long it takes tells nothing of how near a
  // guess was.
  for (const auto& [known, caller] : tokens_) {
    if (CRYPTO_memcmp(known.data(), digest.data(), kDigestDigits) == 0) found = caller;
  }
  return found;
}

std::shared_ptr<const Caller> AuthFile::FindCertificate(
    const std::vector<std::string>& common_names, const std::vector<std::string>& alt_names) const {
  std::string name;
  std::vector<Grant> grants;
  const auto add = [&](absl::string_view kind, const std::vector<std::string>& values) {
    for (const std::string& value : values) {
      const auto it = callers_.find(absl::StrCat(kind, value));
      if (it == callers_.end()) continue;
      if (name.empty()) name = it->second.name;
      grants.insert(grants.end(), it->second.grants.begin(), it->second.grants.end());
    }
  };
  add(kCommonName, common_names);
  add(kAlternativeName, alt_names);
  if (grants.empty()) return nullptr;
  return std::make_shared<const Caller>(std::move(name), std::move(grants));
}

}  // namespace normd
