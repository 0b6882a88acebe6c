// The file that says who may do what (--auth_file).
//
// A line a grant; blank lines and what follows a # do not count:
//
//   CREDENTIAL                  NAME      ROLE     NAMES
//   sha256:9f86d081...0f00a08   trainer   user     net/,shared/
//   cn:ops                      ops       admin    *
//   san:eval.example.org        eval      reader   net/
//
//   CREDENTIAL  sha256: and the SHA-256 of a bearer token in hexadecimal; cn: or san:
//               and the common name or a subject alternative name of a client
//               certificate that --tls_client_ca vouches for
//   NAME        of the caller, for logs: 1 to 64 of [A-Za-z0-9._@-]
//   ROLE        reader, user or admin
//   NAMES       prefixes of instance names, separated by commas; * for all names
//
// Lines of one credential add up and bear one NAME. Tokens are random and of 256 bits
// (normctl token new), so a plain SHA-256 keeps them as well as a slow hash would: there
// is no guessing them, and every request pays for the hash.
#ifndef NORMD_SERVER_AUTH_AUTH_FILE_H_
#define NORMD_SERVER_AUTH_AUTH_FILE_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/container/btree_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "server/auth/caller.h"

namespace normd {

// What the file says; immutable, so any number of threads may ask at once.
class AuthFile {
 public:
  // INVALID_ARGUMENT naming the line, what is wrong there, and what is allowed.
  // `path` is for messages.
  static absl::StatusOr<AuthFile> Parse(absl::string_view text, absl::string_view path);

  // Null where there is no such token. Takes as long whichever there are.
  std::shared_ptr<const Caller> FindToken(absl::string_view token) const;
  // By the names in a verified certificate: all that the lines grant to any of them.
  // Null where no line speaks of them.
  std::shared_ptr<const Caller> FindCertificate(const std::vector<std::string>& common_names,
                                                const std::vector<std::string>& alt_names) const;

  size_t size() const { return callers_.size(); }

 private:
  struct Entry {
    std::string name;
    std::vector<Grant> grants;
  };

  absl::btree_map<std::string, Entry> callers_;  // by credential
  // Those of tokens once more, ready to be handed out.
  std::vector<std::pair<std::string, std::shared_ptr<const Caller>>> tokens_;
};

}  // namespace normd

#endif  // NORMD_SERVER_AUTH_AUTH_FILE_H_
