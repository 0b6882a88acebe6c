// SqliteStore: the embedded StateStore, one SQLite database in WAL mode.
#ifndef NORMD_SERVER_STATE_SQLITE_STORE_H_
#define NORMD_SERVER_STATE_SQLITE_STORE_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/state/state_store.h"

namespace normd {

// Opens or makes DIRECTORY/state.sqlite and locks it: FailedPrecondition when
// another process has it, or when the directory cannot be written; DataLoss when
// the file is damaged or of a newer format. Messages say what to do.
absl::StatusOr<std::unique_ptr<StateStore>> OpenSqliteStore(const std::string& directory);

}  // namespace normd

#endif  // NORMD_SERVER_STATE_SQLITE_STORE_H_
