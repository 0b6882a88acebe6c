// What the durability benchmark times, side by side.
#ifndef NORMD_TESTS_BENCHMARKS_DURABILITY_CONTENDER_H_
#define NORMD_TESTS_BENCHMARKS_DURABILITY_CONTENDER_H_

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "absl/time/time.h"

namespace normd {

// The same instances for all: `writers` of them, of `channels` channels, on a disk whose syncs
// take `slower` more.
struct Workload {
  int writers = 1;
  int channels = 64;
  absl::Duration slower;
};

// What our persister did with the workload in one round.
struct Run {
  absl::Duration elapsed;
  std::vector<size_t> batches;  // updates in each commit
  size_t updates = 0;
};

// Each writer updates its own instance, waits for the acknowledgement and goes on,
// for `duration`: Persister with --durability=update over SqliteStore.
Run RunOurs(const std::string& directory, const Workload& workload, absl::Duration duration);

// From now on each sync to disk of this process takes `delay` more; whole milliseconds.
void SlowSyncs(absl::Duration delay);

// A bare engine: puts one record for each key and makes the whole batch durable.
class Engine {
 public:
  virtual ~Engine() = default;
  // records[i] under keys[i]; the first `count` of them, round and round.
  virtual void Commit(size_t count) = 0;
};

// Records as large as ours, one a writer, under its name.
struct Records {
  std::vector<std::string> keys;
  std::vector<std::string> records;
};
Records RecordsOf(const Workload& workload);

// SQLite, set as SqliteStore sets it, with one table of key and record.
std::unique_ptr<Engine> OpenBareSqlite(const std::string& directory, Records records);
// LMDB, syncing each commit.
std::unique_ptr<Engine> OpenBareLmdb(const std::string& directory, Records records);
// A file to which records are appended, and fdatasync: what the disk can do.
std::unique_ptr<Engine> OpenBareLog(const std::string& directory, Records records);

// Ends the program with a message.
[[noreturn]] void Die(const std::string& what);

}  // namespace normd

#endif  // NORMD_TESTS_BENCHMARKS_DURABILITY_CONTENDER_H_
