// token new.
#include <array>
#include <cerrno>
#include <cstring>
#include <string>
#include <vector>

#include <fcntl.h>
#include <openssl/rand.h>
#include <openssl/sha.h>
#include <unistd.h>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "client/normctl/command.h"
#include "client/normctl/flags.h"
#include "client/normctl/usage_error.h"

namespace normd::normctl {
namespace {

constexpr size_t kTokenBytes = 32;

// For its owner alone, and never over another secret.
absl::Status WriteSecret(const std::string& path, const std::string& text) {
  const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (file < 0) {
    return UsageError(absl::StrCat("cannot make --output=", path, ": ", std::strerror(errno)));
  }
  const bool written = write(file, text.data(), text.size()) == static_cast<ssize_t>(text.size());
  const int error = errno;
  if (close(file) != 0 || !written) {
    unlink(path.c_str());
    return UsageError(absl::StrCat("cannot write --output=", path, ": ", std::strerror(error)));
  }
  return absl::OkStatus();
}

Action NewToken(CLI::App& app) {
  auto name = Shared<std::string>();
  auto role = Shared<std::string>();
  auto prefixes = Shared<std::vector<std::string>>();
  auto output = Shared<std::string>();
  app.add_option("--name", *name, "Of the caller, for the server's logs")
      ->required()
      ->type_name("NAME");
  AddChoice<std::string>(
      app, "--role", {{"reader", "reader"}, {"user", "user"}, {"admin", "admin"}},
      "What the token's owner may do", [role](const std::string& value) { *role = value; })
      ->required();
  app.add_option("--prefix", *prefixes,
                 "On instances whose names begin so; may be repeated; default: on all")
      ->delimiter(',')
      ->type_name("PREFIX");
  app.add_option("--output", *output, "File that gets the token, for its owner alone")
      ->required()
      ->type_name("FILE");
  return [=](Session&) -> absl::StatusOr<Report> {
    std::array<unsigned char, kTokenBytes> secret;
    if (RAND_bytes(secret.data(), secret.size()) != 1) {
      return absl::InternalError("the system gives no random bytes");
    }
    // The prefix lets a secret scanner find a token that leaked.
    std::string text;
    absl::WebSafeBase64Escape(
        absl::string_view(reinterpret_cast<const char*>(secret.data()), secret.size()), &text);
    const std::string token = absl::StrCat("normd_", text);
    if (absl::Status s = WriteSecret(*output, token + "\n"); !s.ok()) return s;

    std::array<unsigned char, SHA256_DIGEST_LENGTH> digest;
    SHA256(reinterpret_cast<const unsigned char*>(token.data()), token.size(), digest.data());
    const std::string line = absl::StrCat(
        "sha256:",
        absl::BytesToHexString(
            absl::string_view(reinterpret_cast<const char*>(digest.data()), digest.size())),
        " ", *name, " ", *role, " ", prefixes->empty() ? "*" : absl::StrJoin(*prefixes, ","));
    return Report{.json = {{"line", line}, {"output", *output}}, .text = line + "\n"};
  };
}

constexpr Command kCommands[] = {
    {"token new", "Make a token, and print its line for the server's --auth_file",
     "token new --name=trainer --role=user --prefix=net/ --output=trainer.token >> auth", NewToken},
};

}  // namespace

absl::Span<const Command> TokenCommands() { return kCommands; }

}  // namespace normd::normctl
