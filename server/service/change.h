// The way of every RPC that changes an instance and carries no tensor.
#ifndef NORMD_SERVER_SERVICE_CHANGE_H_
#define NORMD_SERVER_SERVICE_CHANGE_H_

#include <utility>

#include "absl/functional/function_ref.h"
#include "server/service/core.h"
#include "server/service/validate.h"

namespace normd {

// Applies `edit` to the instance that the request names, once a request_id, and
// answers the new version.
template <class Request, class Response>
void ChangeInstance(Core& core, const Request& request, Response& response, Method method,
                    Done done,
                    absl::FunctionRef<absl::StatusOr<Edited>(InstanceState& next)> edit) {
  const absl::StatusOr<ChangeOptions> options = ToChangeOptions(request, method);
  if (!options.ok()) return done(options.status());
  const auto instance = core.registry->Find(request.name());
  if (!instance.ok()) return done(instance.status());
  (*instance)->Change(*options, edit,
                      [&response, done = std::move(done)](absl::StatusOr<Changed> changed) mutable {
                        if (changed.ok()) {
                          response.set_version(changed->version);
                          response.set_replayed(changed->replayed);
                          if constexpr (requires { response.set_stepped(true); }) {
                            if (changed->replayed) {
                              response.set_stepped(changed->method == Method::kStep);
                            }
                          }
                        }
                        done(changed.status());
                      });
}

}  // namespace normd

#endif  // NORMD_SERVER_SERVICE_CHANGE_H_
