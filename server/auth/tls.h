// TLS for the addresses of TCP (--tls_cert, --tls_key, --tls_client_ca).
#ifndef NORMD_SERVER_AUTH_TLS_H_
#define NORMD_SERVER_AUTH_TLS_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "grpcpp/security/server_credentials.h"

namespace normd {

// Files in PEM.
struct TlsFiles {
  std::string cert;       // the server's certificate, with those that lead to its root
  std::string key;        // its private key
  std::string client_ca;  // roots of client certificates; empty: none are asked for
};

// Credentials that read the files again within a second of a change, for connections
// made from then on; those there are go on. With `client_ca` only clients whose
// certificate it vouches for get a connection. TLS 1.2 or newer.
// FAILED_PRECONDITION, naming the flag, when a file cannot be read, is no PEM, or the key
// is not the certificate's.
absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> MakeTlsCredentials(const TlsFiles& files);

}  // namespace normd

#endif  // NORMD_SERVER_AUTH_TLS_H_
