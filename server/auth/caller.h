// Who calls, and what that caller may do.
#ifndef NORMD_SERVER_AUTH_CALLER_H_
#define NORMD_SERVER_AUTH_CALLER_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"

namespace normd {

// Each may do what those before it may.
enum class Role : uint8_t {
  kReader,  // look, and compute what changes nothing
  kUser,    // train: every change that learning makes
  kAdmin,   // create, delete, overwrite, checkpoints
};

const char* NameOf(Role role);  // "reader"

// A role on all instances whose names begin with `prefix`; with "" on all there are.
struct Grant {
  Role role = Role::kReader;
  std::string prefix;
};

// Immutable, so any number of threads may ask at once.
class Caller {
 public:
  // `name` tells the caller in logs.
  Caller(std::string name, std::vector<Grant> grants);
  // Where nobody is asked for credentials: everything.
  static Caller Everyone(std::string name) { return {std::move(name), {{Role::kAdmin, ""}}}; }

  const std::string& name() const { return name_; }

  // On that instance, whether it exists or not.
  bool May(Role role, absl::string_view instance) const;
  // On every instance, those to come too.
  bool MayOnAll(Role role) const;
  // On any name at all.
  bool MaySomewhere(Role role) const;

  // The prefixes that together cover exactly the names which begin with `prefix` and
  // on which the caller has `role`: in order, none covering another.
  std::vector<std::string> Visible(Role role, absl::string_view prefix) const;

 private:
  std::string name_;
  std::vector<Grant> grants_;  // by prefix
};

}  // namespace normd

#endif  // NORMD_SERVER_AUTH_CALLER_H_
