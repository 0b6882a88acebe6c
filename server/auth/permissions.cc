#include "server/auth/permissions.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "server/error/error.h"

namespace normd {
namespace {

constexpr Permission kPermissions[] = {
    // method            role           scope            changes
    {"GetServerInfo", Role::kReader, Scope::kServer, false},
    {"RegisterSharedMemory", Role::kReader, Scope::kServer, false},
    {"UnregisterSharedMemory", Role::kReader, Scope::kServer, false},
    {"GetSharedMemoryStatus", Role::kReader, Scope::kServer, false},
    {"ListInstances", Role::kReader, Scope::kVisible, false},
    {"GetInstance", Role::kReader, Scope::kName, false},
    {"GetState", Role::kReader, Scope::kName, false},
    {"FoldConvolution", Role::kReader, Scope::kName, false},
    // A Forward that changes the instance or keeps a context asks for a user: service/forward.
    {"Forward", Role::kReader, Scope::kName, false},
    {"ForwardStream", Role::kReader, Scope::kName, false},

    {"Backward", Role::kUser, Scope::kName, false},
    {"BackwardStream", Role::kUser, Scope::kName, false},
    {"ZeroGrad", Role::kUser, Scope::kName, true},
    {"Step", Role::kUser, Scope::kName, true},
    {"Train", Role::kUser, Scope::kName, true},
    {"Eval", Role::kUser, Scope::kName, true},

    {"CreateInstance", Role::kAdmin, Scope::kName, true},
    {"DeleteInstance", Role::kAdmin, Scope::kName, true},
    {"SetState", Role::kAdmin, Scope::kName, true},
    {"ResetRunningStats", Role::kAdmin, Scope::kName, true},
    {"ResetParameters", Role::kAdmin, Scope::kName, true},
    // A new checkpoint holds every instance, and may push out the oldest one.
    {"SaveCheckpoint", Role::kAdmin, Scope::kAll, true},
    {"LoadCheckpoint", Role::kAdmin, Scope::kNames, true},
    {"ListCheckpoints", Role::kAdmin, Scope::kAll, false},
};

absl::Status CheckName(const Caller& caller, Role role, absl::string_view field,
                       absl::string_view name, absl::string_view doing) {
  if (caller.May(role, name)) return absl::OkStatus();
  return PermissionDenied(caller.name(), field, name,
                          absl::StrCat(doing, " takes the role ", NameOf(role), " there"));
}

}  // namespace

absl::Span<const Permission> Permissions() { return kPermissions; }

const Permission* FindPermission(absl::string_view method) {
  const auto* row =
      std::find_if(std::begin(kPermissions), std::end(kPermissions),
                   [&](const Permission& permission) { return permission.method == method; });
  return row == std::end(kPermissions) ? nullptr : row;
}

absl::Status CheckRole(const Caller& caller, const Permission* permission) {
  if (permission == nullptr) {
    return absl::PermissionDeniedError("the method has no row in the table of permissions");
  }
  if (caller.MaySomewhere(permission->role)) return absl::OkStatus();
  return PermissionDenied(
      caller.name(), "", "",
      absl::StrCat(permission->method, " takes the role ", NameOf(permission->role)));
}

absl::Status CheckNames(const Caller& caller, const Permission& permission,
                        absl::Span<const std::string> names) {
  const bool by_name = permission.scope == Scope::kName || permission.scope == Scope::kNames;
  if (permission.scope == Scope::kVisible || permission.scope == Scope::kServer) {
    return CheckRole(caller, &permission);
  }
  if (!by_name || names.empty()) {
    if (caller.MayOnAll(permission.role)) return absl::OkStatus();
    return PermissionDenied(
        caller.name(), by_name ? "names" : "", "",
        absl::StrCat(permission.method, " takes the role ", NameOf(permission.role),
                     " on all instances", by_name ? ", or names of those it is for" : ""));
  }
  const char* field = permission.scope == Scope::kName ? "name" : "names";
  for (const std::string& name : names) {
    absl::Status status = CheckName(caller, permission.role, field, name, permission.method);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status CheckStronger(const Caller& caller, Role role, absl::string_view name,
                           absl::string_view doing) {
  return CheckName(caller, role, "name", name, doing);
}

}  // namespace normd
