#include "client/internal/credentials.h"

#include <fstream>
#include <iterator>
#include <tuple>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace normd::inline client::internal {
namespace {

absl::StatusOr<std::string> ReadFile(const std::string& path, const char* option) {
  if (path.empty()) return std::string();
  std::ifstream file(path, std::ios::binary);
  std::string bytes{std::istreambuf_iterator<char>(file), {}};
  if (bytes.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(option, " is ", path, ", which cannot be read or is empty"));
  }
  return bytes;
}

}  // namespace

absl::StatusOr<Credentials> ReadCredentials(const std::string& target,
                                            const ClientOptions& options) {
  Credentials credentials = {.channel = grpc::InsecureChannelCredentials(), .authorization = {}};
  auto token = ReadFile(options.token_file, "token_file");
  if (!token.ok()) return token.status();
  absl::StripAsciiWhitespace(&*token);
  for (const char c : *token) {
    if (absl::ascii_isgraph(static_cast<unsigned char>(c))) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("token_file is ", options.token_file, ", which holds no token"));
  }
  if (!token->empty()) credentials.authorization = absl::StrCat("Bearer ", *token);

  if (options.tls_cert.empty() != options.tls_key.empty() ||
      (options.tls_ca.empty() && !options.tls_cert.empty())) {
    return absl::InvalidArgumentError("tls_cert and tls_key go together, and beside tls_ca");
  }
  // The server speaks no TLS on a Unix socket.
  if (options.tls_ca.empty() || absl::StartsWith(target, "unix:")) return credentials;
  grpc::SslCredentialsOptions tls;
  for (const auto& [path, option, text] :
       {std::tuple(&options.tls_ca, "tls_ca", &tls.pem_root_certs),
        std::tuple(&options.tls_cert, "tls_cert", &tls.pem_cert_chain),
        std::tuple(&options.tls_key, "tls_key", &tls.pem_private_key)}) {
    auto bytes = ReadFile(*path, option);
    if (!bytes.ok()) return bytes.status();
    *text = *std::move(bytes);
  }
  credentials.channel = grpc::SslCredentials(tls);
  return credentials;
}

}  // namespace normd::inline client::internal
