// What each RPC asks of its caller: one table for all of them. A method without a row
// is refused to everyone.
#ifndef NORMD_SERVER_AUTH_PERMISSIONS_H_
#define NORMD_SERVER_AUTH_PERMISSIONS_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "server/auth/caller.h"

namespace normd {

// On which instances the role is asked for.
enum class Scope : uint8_t {
  kName,     // the request's `name`
  kNames,    // each of the request's `names`; none named: all there are
  kAll,      // all there are
  kVisible,  // any; the answer holds only what the caller may see
  kServer,   // any; the answer tells of no instance
};

struct Permission {
  const char* method;  // of normd.v1.NormService
  Role role;
  Scope scope;
  // Whether a call changes something and belongs into the audit log. Forward and
  // Backward, which change something at times, tell so themselves.
  bool changes;
};

absl::Span<const Permission> Permissions();
// Null where the table has no such row.
const Permission* FindPermission(absl::string_view method);

// PERMISSION_DENIED unless the caller has the role on any instance at all: asked
// before a request is read. `permission` may be null.
absl::Status CheckRole(const Caller& caller, const Permission* permission);

// PERMISSION_DENIED unless the caller has the role on `names`, which are the
// request's. Whether there are instances of those names plays no part.
absl::Status CheckNames(const Caller& caller, const Permission& permission,
                        absl::Span<const std::string> names);

// For what a request turns out to do beyond its method's row: PERMISSION_DENIED unless
// the caller has `role` on `name`. `doing` begins the message: "a Forward that folds".
absl::Status CheckStronger(const Caller& caller, Role role, absl::string_view name,
                           absl::string_view doing);

}  // namespace normd

#endif  // NORMD_SERVER_AUTH_PERMISSIONS_H_
