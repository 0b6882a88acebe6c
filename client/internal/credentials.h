// What a connection shows of itself, and whom it believes: from the options' files.
#ifndef NORMD_CLIENT_INTERNAL_CREDENTIALS_H_
#define NORMD_CLIENT_INTERNAL_CREDENTIALS_H_

#include <memory>
#include <string>

#include <grpcpp/grpcpp.h>

#include "absl/status/statusor.h"
#include "client/normd_client.h"

namespace normd::inline client::internal {

struct Credentials {
  std::shared_ptr<grpc::ChannelCredentials> channel;
  std::string authorization;  // the metadata of each call; empty: none
};

// Reads the files that `options` name. INVALID_ARGUMENT naming the option at fault.
absl::StatusOr<Credentials> ReadCredentials(const std::string& target,
                                            const ClientOptions& options);

}  // namespace normd::inline client::internal

#endif  // NORMD_CLIENT_INTERNAL_CREDENTIALS_H_
