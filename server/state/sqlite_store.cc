#include "server/state/sqlite_store.h"

#include <algorithm>
#include <cerrno>
#include <future>
#include <string_view>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sqlite3.h>
#include <sys/stat.h>
#include <unistd.h>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/hash/hash.h"
#include "absl/numeric/int128.h"
#include "absl/synchronization/mutex.h"
#include "server/clock.h"
#include "server/state/files.h"
#include "server/state/instance_codec.h"
#include "server/state/parallel.h"
#include "server/state/sha256.h"

namespace normd {
namespace {

// 1: a record may be a safetensors file, EncodeInstance without requests. 2: none that is written.
constexpr int kFormat = 2;
constexpr int kApplicationId = 0x4e4f524d;  // "NORM"

// A transaction that writes a page as it is.
constexpr const char* kCommitNothing = "BEGIN IMMEDIATE; PRAGMA user_version = 2; COMMIT";
static_assert(kFormat == 2);

// `seq` counts up as requests are stored, so that the newest lie together at one
// end of the table and the expired at the other; only the memory of this process
// knows which rows are an instance's.
// The text, comments too, is kept in the database and compared: it stays as format 1 has it.
constexpr const char* kTables[] = {
    R"(CREATE TABLE instances (
    id       INTEGER PRIMARY KEY,
    name     TEXT NOT NULL UNIQUE,
    version  INTEGER NOT NULL,  -- 64 bits, as signed
    checksum INTEGER NOT NULL,  -- of version and record
    record   BLOB NOT NULL      -- EncodeInstance, without requests
  ))",
    R"(CREATE TABLE requests (
    seq      INTEGER PRIMARY KEY,
    instance INTEGER NOT NULL,  -- instances.id
    request  BLOB NOT NULL      -- PackRequest
  ))",
    R"(CREATE TABLE tombstones (
    seq      INTEGER PRIMARY KEY,
    name     TEXT NOT NULL,
    request  BLOB NOT NULL
  ))",
};

// Pages in the log before they are moved into the database, which stalls a commit
// for two more syncs: 64 MiB, and as much to read again after a crash.
constexpr int kLogPages = 16384;
constexpr int kCacheKiB = 64 * 1024;

// Expired rows are looked for after this many new ones, so many at a time.
constexpr int kPruneEvery = 256;
constexpr int kPruneAtMost = 1024;

// Rows that are decoded side by side while loading.
constexpr size_t kLoadBatch = 4096;

// A prepared statement. Bindings and steps return SQLite's codes.
class Statement {
 public:
  Statement() = default;
  int Prepare(sqlite3* db, const char* sql) {
    sqlite3_stmt* statement = nullptr;
    const int code =
        sqlite3_prepare_v3(db, sql, -1, SQLITE_PREPARE_PERSISTENT, &statement, nullptr);
    statement_.reset(statement);
    return code;
  }
  Statement& Bind(int at, int64_t value) {
    sqlite3_bind_int64(statement_.get(), at, value);
    return *this;
  }
  // The bytes must live until the next Reset.
  Statement& BindText(int at, std::string_view text) {
    sqlite3_bind_text64(statement_.get(), at, text.data(), text.size(), SQLITE_STATIC, SQLITE_UTF8);
    return *this;
  }
  Statement& BindBlob(int at, std::string_view bytes) {
    sqlite3_bind_blob64(statement_.get(), at, bytes.data(), bytes.size(), SQLITE_STATIC);
    return *this;
  }
  // SQLITE_ROW, SQLITE_DONE or an error.
  int Step() { return sqlite3_step(statement_.get()); }
  void Reset() { sqlite3_reset(statement_.get()); }
  // For statements without rows.
  int Run() {
    const int code = Step();
    Reset();
    return code == SQLITE_DONE ? SQLITE_OK : code;
  }

  int64_t Int(int column) const { return sqlite3_column_int64(statement_.get(), column); }
  // Valid until the next Step or Reset. A value of another type is converted, as
  // a damaged database may hold.
  std::string_view Bytes(int column) const {
    const void* data = sqlite3_column_blob(statement_.get(), column);
    return {static_cast<const char*>(data),
            static_cast<size_t>(sqlite3_column_bytes(statement_.get(), column))};
  }

 private:
  struct Finalize {
    void operator()(sqlite3_stmt* statement) const { sqlite3_finalize(statement); }
  };
  std::unique_ptr<sqlite3_stmt, Finalize> statement_;
};

struct CloseDatabase {
  void operator()(sqlite3* db) const { sqlite3_close_v2(db); }
};

void AppendNumber(std::string& out, uint64_t value) {
  for (int shift = 56; shift >= 0; shift -= 8) out += static_cast<char>(value >> shift);
}

uint64_t TakeNumber(std::string_view& bytes) {
  uint64_t value = 0;
  for (int i = 0; i < 8; ++i) value = value << 8 | static_cast<uint8_t>(bytes[i]);
  bytes.remove_prefix(8);
  return value;
}

// A request in a row: big-endian time (nanoseconds since 1970), id, method,
// version, num_batches_tracked, 8 bytes a number (16 the id), and 8 of SHA-256 of
// these and of what the row belongs to.
constexpr size_t kPackedRequestBytes = 7 * 8;

std::string PackRequest(const AppliedRequest& request, std::string_view owner) {
  std::string out;
  out.reserve(kPackedRequestBytes + owner.size());
  AppendNumber(out, static_cast<uint64_t>(absl::ToUnixNanos(request.time)));
  AppendNumber(out, absl::Uint128High64(request.id));
  AppendNumber(out, absl::Uint128Low64(request.id));
  AppendNumber(out, static_cast<uint64_t>(request.method));
  AppendNumber(out, request.version);
  AppendNumber(out, static_cast<uint64_t>(request.num_batches_tracked));
  const size_t size = out.size();
  out += owner;
  const uint64_t checksum = Sha256Prefix(out);
  out.resize(size);
  AppendNumber(out, checksum);
  return out;
}

bool UnpackRequest(std::string_view bytes, std::string_view owner, AppliedRequest* request) {
  if (bytes.size() != kPackedRequestBytes) return false;
  std::string_view rest = bytes;
  request->time = absl::FromUnixNanos(static_cast<int64_t>(TakeNumber(rest)));
  const uint64_t high = TakeNumber(rest);
  request->id = absl::MakeUint128(high, TakeNumber(rest));
  const uint64_t method = TakeNumber(rest);
  if (!KnownMethod(method)) return false;
  request->method = static_cast<Method>(method);
  request->version = TakeNumber(rest);
  request->num_batches_tracked = static_cast<int64_t>(TakeNumber(rest));
  return PackRequest(*request, owner) == bytes;
}

// What a row of requests belongs to.
std::string OwnerOf(int64_t seq, int64_t instance) {
  std::string owner;
  AppendNumber(owner, static_cast<uint64_t>(seq));
  AppendNumber(owner, static_cast<uint64_t>(instance));
  return owner;
}

// What a row of tombstones belongs to.
std::string OwnerOf(int64_t seq, std::string_view name) {
  std::string owner;
  AppendNumber(owner, static_cast<uint64_t>(seq));
  owner += name;
  return owner;
}

// Good within this process.
uint64_t NameHash(std::string_view name, int64_t id) {
  return absl::HashOf(absl::string_view(name.data(), name.size()), id);
}

int64_t RecordChecksum(uint64_t version, std::string_view record) {
  std::string number;
  AppendNumber(number, version);
  return static_cast<int64_t>(Sha256Prefix(number, record));
}

class SqliteStore : public StateStore {
 public:
  explicit SqliteStore(const std::string& directory)
      : directory_(directory), path_(fmt::format("{}/state.sqlite", directory)) {}

  absl::Status Open();

  std::vector<absl::Status> Commit(absl::Span<const Change> changes) override;
  absl::Status Load(absl::FunctionRef<absl::Status(StoredInstance)> instance,
                    absl::FunctionRef<absl::Status(Tombstone)> tombstone) override;

 private:
  // `code` as a status that says what to do.
  absl::Status StatusOf(int code) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status Damaged(std::string_view what) const;

  int Execute(const char* sql) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return sqlite3_exec(db_.get(), sql, nullptr, nullptr, nullptr);
  }
  // Ends a transaction that failed, if it is still open.
  void Rollback() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (sqlite3_get_autocommit(db_.get()) == 0) Execute("ROLLBACK");
  }
  // The first column of the first row.
  absl::StatusOr<int64_t> Query(const char* sql) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status CheckFormat() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Learns which requests are stored; forgets those that expired.
  int ReadRequestRows() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  // These run inside a transaction and return SQLite's codes; `applied` tells
  // whether the version matched.
  int Apply(const Change& change, bool* applied) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  int Remove(const Change& change, bool* applied) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  int AddRequests(int64_t instance, const Change& change) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // All but the newest `keep` of an instance.
  int DropRequests(int64_t instance, size_t keep) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  int PruneExpired() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::string directory_;
  const std::string path_;
  absl::Mutex mutex_;
  std::unique_ptr<sqlite3, CloseDatabase> db_ ABSL_GUARDED_BY(mutex_);

  struct Statements {
    Statement begin, commit, insert, update, remove, find, add_request, drop_request, add_tombstone,
        expired_requests, expired_tombstones;
  };
  // Destroyed before the database.
  Statements sql_ ABSL_GUARDED_BY(mutex_);

  // The rows of each instance in `requests`, oldest first. Follows the database
  // transaction by transaction: after a failed one it is read anew.
  absl::flat_hash_map<int64_t, std::vector<int64_t>> request_rows_ ABSL_GUARDED_BY(mutex_);
  bool request_rows_stale_ ABSL_GUARDED_BY(mutex_) = false;
  int64_t next_seq_ ABSL_GUARDED_BY(mutex_) = 1;
  int unpruned_ ABSL_GUARDED_BY(mutex_) = 0;
};

absl::Status SqliteStore::Damaged(std::string_view what) const {
  return absl::DataLossError(fmt::format(
      "{} is damaged: {}. Move it (and {}-wal) aside and start again: the newest sound checkpoint "
      "is loaded then",
      path_, what, path_));
}

absl::Status SqliteStore::StatusOf(int code) const {
  const int system_error = db_ == nullptr ? 0 : sqlite3_system_errno(db_.get());
  const bool known = db_ != nullptr && sqlite3_extended_errcode(db_.get()) == code;
  const std::string reason = known ? sqlite3_errmsg(db_.get()) : sqlite3_errstr(code);
  switch (code & 0xff) {
    case SQLITE_OK:
    case SQLITE_ROW:
    case SQLITE_DONE: return absl::OkStatus();
    // The SQL here is always the same: it can only fail over tables that changed.
    case SQLITE_ERROR:
    case SQLITE_CONSTRAINT:
    case SQLITE_MISMATCH:
    case SQLITE_CORRUPT:
    case SQLITE_NOTADB: return Damaged(reason);
    case SQLITE_FULL:
      return absl::ResourceExhaustedError(
          fmt::format("no space is left on the disk of {}: {}", path_, reason));
    case SQLITE_BUSY:
    case SQLITE_LOCKED:
      return absl::FailedPreconditionError(fmt::format(
          "{} is in use by another normd: stop that one, or give this one its own --state_dir",
          directory_));
    case SQLITE_READONLY:
      // A damaged header can call the database read-only.
      if (access(path_.c_str(), W_OK) == 0 && access(directory_.c_str(), W_OK) == 0) {
        return Damaged(reason);
      }
      [[fallthrough]];
    case SQLITE_CANTOPEN:
    case SQLITE_PERM:
      return absl::FailedPreconditionError(fmt::format(
          "cannot write {}: {}. --state_dir must be a directory that this user may write", path_,
          reason));
    case SQLITE_NOMEM: return absl::ResourceExhaustedError(fmt::format("{}: no memory", path_));
    default: break;
  }
  if (system_error == ENOSPC || system_error == EDQUOT || system_error == EFBIG) {
    return ErrnoStatus(system_error, "cannot write", path_);
  }
  return absl::UnavailableError(fmt::format("{}: {} (SQLite's code {})", path_, reason, code));
}

absl::StatusOr<int64_t> SqliteStore::Query(const char* sql) {
  Statement statement;
  int code = statement.Prepare(db_.get(), sql);
  if (code == SQLITE_OK) code = statement.Step();
  if (code != SQLITE_ROW && code != SQLITE_DONE) return StatusOf(code);
  return code == SQLITE_ROW ? statement.Int(0) : 0;
}

absl::Status SqliteStore::CheckFormat() {
  const absl::StatusOr<int64_t> format = Query("PRAGMA user_version");
  if (!format.ok()) return format.status();
  const absl::StatusOr<int64_t> application = Query("PRAGMA application_id");
  if (!application.ok()) return application.status();
  const absl::StatusOr<int64_t> tables = Query("SELECT count(*) FROM sqlite_schema");
  if (!tables.ok()) return tables.status();

  if (*tables == 0 && *format == 0) {
    const std::string make = fmt::format(
        "BEGIN IMMEDIATE; PRAGMA application_id = {}; PRAGMA user_version = {}; {}; COMMIT",
        kApplicationId, kFormat, fmt::join(kTables, ";"));
    return StatusOf(Execute(make.c_str()));
  }
  if (*application != kApplicationId) return Damaged("it was not made by normd");
  if (*format > kFormat) {
    return absl::DataLossError(fmt::format(
        "{} has format {}, and this normd knows formats up to {}: start the newer normd that wrote "
        "it, or use another --state_dir",
        path_, *format, kFormat));
  }
  if (*format < 1) return Damaged(fmt::format("it has the unknown format {}", *format));
  Statement schema;
  int code =
      schema.Prepare(db_.get(), "SELECT sql FROM sqlite_schema WHERE type = 'table' ORDER BY name");
  for (const char* table : kTables) {
    if (code == SQLITE_OK || code == SQLITE_ROW) code = schema.Step();
    if (code == SQLITE_DONE || (code == SQLITE_ROW && schema.Bytes(0) != table)) {
      return Damaged("its tables are not those of its format");
    }
  }
  if (code != SQLITE_ROW) return StatusOf(code);
  schema.Reset();
  // So that a normd that does not know the records written from now on refuses them.
  if (*format < kFormat) return StatusOf(Execute(kCommitNothing));
  return absl::OkStatus();
}

// The state in a row's record, of any format.
absl::StatusOr<std::shared_ptr<const InstanceState>> StateIn(std::string_view record) {
  if (IsRecord(record)) return DecodeRecord(record);
  absl::StatusOr<StoredInstance> decoded = DecodeInstance(record);
  if (!decoded.ok()) return decoded.status();
  if (!decoded->requests.empty()) return absl::DataLossError("a record with requests");
  return std::move(decoded->state);
}

absl::Status SqliteStore::Open() {
  absl::MutexLock lock(&mutex_);
  if (absl::Status status = MakeDirectories(directory_); !status.ok()) {
    return absl::FailedPreconditionError(status.message());
  }
  // SQLite takes less than its header for an empty database. None at all is one:
  // a crash may have come before the first commit.
  struct stat info;
  constexpr off_t kHeaderBytes = 512;
  if (stat(path_.c_str(), &info) == 0 && info.st_size > 0 && info.st_size < kHeaderBytes) {
    return Damaged(fmt::format("it has only {} bytes", info.st_size));
  }
  sqlite3* db = nullptr;
  // Our own mutex serializes the calls.
  int code =
      sqlite3_open_v2(path_.c_str(), &db,
                      SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE | SQLITE_OPEN_NOMUTEX, nullptr);
  db_.reset(db);
  if (code != SQLITE_OK) return StatusOf(code);
  sqlite3_extended_result_codes(db, 1);
  // Damage is to be answered with an error, never with what a hostile schema says.
  sqlite3_db_config(db, SQLITE_DBCONFIG_DEFENSIVE, 1, nullptr);
  sqlite3_db_config(db, SQLITE_DBCONFIG_TRUSTED_SCHEMA, 0, nullptr);

  // Exclusive before the log is first touched: the lock is then held until the
  // database is closed, and the log's index needs no shared memory.
  const std::string settings = fmt::format(
      "PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; "
      "PRAGMA wal_autocheckpoint = {}; PRAGMA journal_size_limit = {}; PRAGMA cache_size = -{}; "
      "PRAGMA cell_size_check = ON; PRAGMA temp_store = MEMORY; BEGIN IMMEDIATE; COMMIT",
      kLogPages, int64_t{kLogPages} * 4096, kCacheKiB);
  if (code = Execute(settings.c_str()); code != SQLITE_OK) return StatusOf(code);
  if (sqlite3_db_readonly(db, "main") != 0) return StatusOf(SQLITE_READONLY);
  // Where a file system cannot have it, SQLite keeps another mode and says no word.
  const absl::StatusOr<int64_t> log = Query("SELECT journal_mode = 'wal' FROM pragma_journal_mode");
  if (!log.ok()) return log.status();
  if (*log != 1) {
    return absl::FailedPreconditionError(
        fmt::format("{} cannot have a write-ahead log on its file system", path_));
  }
  if (absl::Status status = CheckFormat(); !status.ok()) return status;

  const std::pair<Statement*, const char*> statements[] = {
      {&sql_.begin, "BEGIN IMMEDIATE"},
      {&sql_.commit, "COMMIT"},
      {&sql_.insert,
       "INSERT INTO instances (name, version, checksum, record) VALUES (?1, ?2, ?3, ?4) "
       "ON CONFLICT DO NOTHING RETURNING id"},
      {&sql_.update,
       "UPDATE instances SET version = ?2, checksum = ?3, record = ?4 "
       "WHERE name = ?1 AND version = ?5 RETURNING id"},
      {&sql_.remove, "DELETE FROM instances WHERE name = ?1 AND version = ?2 RETURNING id"},
      {&sql_.find, "SELECT version FROM instances WHERE name = ?1"},
      {&sql_.add_request, "INSERT INTO requests (seq, instance, request) VALUES (?1, ?2, ?3)"},
      {&sql_.drop_request, "DELETE FROM requests WHERE seq = ?1"},
      {&sql_.add_tombstone, "INSERT INTO tombstones (seq, name, request) VALUES (?1, ?2, ?3)"},
      // Blobs compare byte by byte, and begin with the time.
      {&sql_.expired_requests,
       "DELETE FROM requests WHERE seq IN (SELECT seq FROM requests ORDER BY seq LIMIT ?2) "
       "AND request < ?1 RETURNING instance, seq"},
      {&sql_.expired_tombstones,
       "DELETE FROM tombstones WHERE seq IN (SELECT seq FROM tombstones ORDER BY seq LIMIT ?2) "
       "AND request < ?1"},
  };
  for (const auto& [statement, sql] : statements) {
    if (code = statement->Prepare(db_.get(), sql); code != SQLITE_OK) return StatusOf(code);
  }
  if (code = ReadRequestRows(); code != SQLITE_OK) return StatusOf(code);

  absl::StatusOr<Descriptor> directory = OpenDirectory(AT_FDCWD, directory_, directory_);
  if (!directory.ok()) return directory.status();
  return SyncDirectory(directory->get(), directory_);
}

// The time before which a request has expired, as packed rows compare.
std::string ExpiryKey() {
  std::string key;
  AppendNumber(key, static_cast<uint64_t>(absl::ToUnixNanos(SteadyNow() - RequestLog::kKeep)));
  return key;
}

int SqliteStore::ReadRequestRows() {
  request_rows_.clear();
  next_seq_ = 1;
  const std::string expired = ExpiryKey();
  AppliedRequest request;
  bool any_expired = false;
  // Each is checked before it may be taken for expired.
  Statement rows;
  int code = rows.Prepare(db_.get(), "SELECT seq, instance, request FROM requests ORDER BY seq");
  if (code != SQLITE_OK) return code;
  while ((code = rows.Step()) == SQLITE_ROW) {
    const int64_t seq = rows.Int(0);
    const int64_t instance = rows.Int(1);
    if (!UnpackRequest(rows.Bytes(2), OwnerOf(seq, instance), &request)) return SQLITE_CORRUPT;
    next_seq_ = seq + 1;
    if (rows.Bytes(2) < expired) {
      any_expired = true;
    } else {
      request_rows_[instance].push_back(seq);
    }
  }
  if (code != SQLITE_DONE) return code;
  code = rows.Prepare(db_.get(), "SELECT seq, name, request FROM tombstones ORDER BY seq");
  if (code != SQLITE_OK) return code;
  while ((code = rows.Step()) == SQLITE_ROW) {
    const int64_t seq = rows.Int(0);
    if (!UnpackRequest(rows.Bytes(2), OwnerOf(seq, rows.Bytes(1)), &request)) return SQLITE_CORRUPT;
    next_seq_ = std::max(next_seq_, seq + 1);
    any_expired = any_expired || rows.Bytes(2) < expired;
  }
  if (code != SQLITE_DONE) return code;
  request_rows_stale_ = false;
  if (!any_expired) return SQLITE_OK;
  for (const char* sql :
       {"DELETE FROM requests WHERE request < ?1", "DELETE FROM tombstones WHERE request < ?1"}) {
    code = rows.Prepare(db_.get(), sql);
    if (code == SQLITE_OK) code = rows.BindBlob(1, expired).Run();
    if (code != SQLITE_OK) return code;
  }
  return SQLITE_OK;
}

std::vector<absl::Status> SqliteStore::Commit(absl::Span<const Change> changes) {
  absl::MutexLock lock(&mutex_);
  std::vector<absl::Status> statuses(changes.size());
  int code = request_rows_stale_ ? ReadRequestRows() : SQLITE_OK;
  if (code == SQLITE_OK) code = sql_.begin.Run();
  if (code == SQLITE_OK) {
    for (size_t i = 0; i < changes.size() && code == SQLITE_OK; ++i) {
      const Change& change = changes[i];
      bool applied = false;
      code = change.state == nullptr ? Remove(change, &applied) : Apply(change, &applied);
      if (code == SQLITE_OK && !applied) {
        sql_.find.BindText(1, change.name);
        const uint64_t version =
            sql_.find.Step() == SQLITE_ROW ? static_cast<uint64_t>(sql_.find.Int(0)) : 0;
        sql_.find.Reset();
        statuses[i] =
            absl::AbortedError(fmt::format("the store holds version {} of \"{}\", not version {}",
                                           version, change.name, change.previous_version));
      }
    }
    if (code == SQLITE_OK && unpruned_ >= kPruneEvery) code = PruneExpired();
    if (code == SQLITE_OK) code = sql_.commit.Run();
  }
  if (code != SQLITE_OK) {
    // Before the rollback, which has an outcome of its own.
    const absl::Status status = StatusOf(code);
    Rollback();
    // Where only the sync failed, the log holds the whole transaction, and a start after
    // kill -9 would take what is refused here for committed. The next transaction
    // lies on the same place of the log: one that changes nothing, at once.
    Execute(kCommitNothing);
    Rollback();
    request_rows_stale_ = true;
    statuses.assign(changes.size(), status);
  }
  return statuses;
}

int SqliteStore::Apply(const Change& change, bool* applied) {
  const std::string record = EncodeRecord(*change.state);
  const uint64_t version = change.state->version;
  Statement& put = change.previous_version == 0 ? sql_.insert : sql_.update;
  put.BindText(1, change.name)
      .Bind(2, static_cast<int64_t>(version))
      .Bind(3, RecordChecksum(version, record))
      .BindBlob(4, record);
  if (change.previous_version != 0) put.Bind(5, static_cast<int64_t>(change.previous_version));
  int code = put.Step();
  *applied = code == SQLITE_ROW;
  const int64_t instance = *applied ? put.Int(0) : 0;
  if (*applied) code = put.Step();
  put.Reset();
  if (code != SQLITE_DONE) return code;
  if (!*applied) return SQLITE_OK;
  if (change.replace_requests) {
    if (code = DropRequests(instance, 0); code != SQLITE_OK) return code;
  }
  return AddRequests(instance, change);
}

int SqliteStore::Remove(const Change& change, bool* applied) {
  int code;
  if (change.previous_version == 0) {
    // Made and removed before it was ever stored: only its tombstone is new.
    sql_.find.BindText(1, change.name);
    code = sql_.find.Step();
    *applied = code == SQLITE_DONE;
    sql_.find.Reset();
    if (code != SQLITE_DONE && code != SQLITE_ROW) return code;
  } else {
    sql_.remove.BindText(1, change.name).Bind(2, static_cast<int64_t>(change.previous_version));
    code = sql_.remove.Step();
    *applied = code == SQLITE_ROW;
    const int64_t instance = *applied ? sql_.remove.Int(0) : 0;
    if (*applied) code = sql_.remove.Step();
    sql_.remove.Reset();
    if (code != SQLITE_DONE) return code;
    if (*applied) {
      if (code = DropRequests(instance, 0); code != SQLITE_OK) return code;
    }
  }
  if (!*applied || change.requests.empty()) return SQLITE_OK;
  ++unpruned_;
  const int64_t seq = next_seq_++;
  const std::string packed = PackRequest(change.requests.back(), OwnerOf(seq, change.name));
  return sql_.add_tombstone.Bind(1, seq).BindText(2, change.name).BindBlob(3, packed).Run();
}

int SqliteStore::AddRequests(int64_t instance, const Change& change) {
  if (change.requests.empty()) return SQLITE_OK;
  std::vector<int64_t>& rows = request_rows_[instance];
  const size_t count = std::min(change.requests.size(), RequestLog::kCapacity);
  for (auto request = change.requests.end() - count; request != change.requests.end(); ++request) {
    const int64_t seq = next_seq_++;
    const std::string packed = PackRequest(*request, OwnerOf(seq, instance));
    const int code = sql_.add_request.Bind(1, seq).Bind(2, instance).BindBlob(3, packed).Run();
    if (code != SQLITE_OK) return code;
    rows.push_back(seq);
    ++unpruned_;
  }
  // Trimmed when twice full, so that each row is dropped among its neighbours.
  if (rows.size() < 2 * RequestLog::kCapacity) return SQLITE_OK;
  return DropRequests(instance, RequestLog::kCapacity);
}

int SqliteStore::DropRequests(int64_t instance, size_t keep) {
  const auto found = request_rows_.find(instance);
  if (found == request_rows_.end()) return SQLITE_OK;
  std::vector<int64_t>& rows = found->second;
  const auto kept = rows.end() - static_cast<ptrdiff_t>(std::min(keep, rows.size()));
  for (auto row = rows.begin(); row != kept; ++row) {
    const int code = sql_.drop_request.Bind(1, *row).Run();
    if (code != SQLITE_OK) return code;
  }
  rows.erase(rows.begin(), kept);
  if (rows.empty()) request_rows_.erase(found);
  return SQLITE_OK;
}

int SqliteStore::PruneExpired() {
  unpruned_ = 0;
  const std::string expired = ExpiryKey();
  Statement& requests = sql_.expired_requests;
  requests.BindBlob(1, expired).Bind(2, kPruneAtMost);
  int code;
  while ((code = requests.Step()) == SQLITE_ROW) {
    const auto found = request_rows_.find(requests.Int(0));
    if (found == request_rows_.end()) continue;
    std::vector<int64_t>& rows = found->second;
    const auto row = std::lower_bound(rows.begin(), rows.end(), requests.Int(1));
    if (row != rows.end() && *row == requests.Int(1)) rows.erase(row);
    if (rows.empty()) request_rows_.erase(found);
  }
  requests.Reset();
  if (code != SQLITE_DONE) return code;
  return sql_.expired_tombstones.BindBlob(1, expired).Bind(2, kPruneAtMost).Run();
}

absl::Status SqliteStore::Load(absl::FunctionRef<absl::Status(StoredInstance)> instance,
                               absl::FunctionRef<absl::Status(Tombstone)> tombstone) {
  absl::MutexLock lock(&mutex_);
  const absl::Time oldest = SteadyNow() - RequestLog::kKeep;

  // Whether every page hangs together; what the rows hold has its own checksums.
  Statement rows;
  int code = rows.Prepare(db_.get(), "PRAGMA quick_check(1)");
  if (code == SQLITE_OK) code = rows.Step();
  if (code != SQLITE_ROW) return StatusOf(code);
  if (rows.Bytes(0) != "ok") return Damaged(rows.Bytes(0));

  absl::flat_hash_map<int64_t, std::vector<AppliedRequest>> requests;
  code = rows.Prepare(db_.get(), "SELECT seq, instance, request FROM requests ORDER BY seq");
  if (code != SQLITE_OK) return StatusOf(code);
  while ((code = rows.Step()) == SQLITE_ROW) {
    AppliedRequest request;
    if (!UnpackRequest(rows.Bytes(2), OwnerOf(rows.Int(0), rows.Int(1)), &request)) {
      return Damaged("a remembered request does not match its checksum");
    }
    if (request.time >= oldest) requests[rows.Int(1)].push_back(request);
  }
  if (code != SQLITE_DONE) return StatusOf(code);

  struct Row {
    int64_t id;
    std::string name;
    uint64_t version;
    int64_t checksum;
    std::string record;
    StoredInstance decoded;
  };
  struct Batch {
    std::vector<Row> rows{kLoadBatch};
    size_t count = 0;
    // Last, so that nobody decodes rows that are gone.
    std::future<absl::Status> decoded;
  };
  const auto decode = [this](Batch& batch) {
    return ParallelFor(batch.count, [&](size_t i) {
      Row& row = batch.rows[i];
      if (RecordChecksum(row.version, row.record) != row.checksum) {
        return Damaged(fmt::format("instance \"{}\" does not match its checksum", row.name));
      }
      auto state = StateIn(row.record);
      if (!state.ok()) return Damaged(std::string(state.status().message()));
      if ((*state)->identity->name != row.name || (*state)->version != row.version) {
        return Damaged(fmt::format("the row of \"{}\" holds another record", row.name));
      }
      row.decoded.state = *std::move(state);
      return absl::OkStatus();
    });
  };
  const auto deliver = [&](Batch& batch) {
    absl::Status status = batch.decoded.get();
    for (size_t i = 0; status.ok() && i < batch.count; ++i) {
      StoredInstance& stored = batch.rows[i].decoded;
      if (const auto found = requests.find(batch.rows[i].id); found != requests.end()) {
        stored.requests = std::move(found->second);
        requests.erase(found);
        if (stored.requests.size() > RequestLog::kCapacity) {
          stored.requests.erase(stored.requests.begin(),
                                stored.requests.end() - RequestLog::kCapacity);
        }
      }
      status = instance(std::exchange(stored, {}));
    }
    return status;
  };
  // Of all names and ids: the index by name, which finds the row to update, must
  // hold the same as the table.
  uint64_t sum = 0;
  code = rows.Prepare(db_.get(),
                      "SELECT id, name, version, checksum, record FROM instances ORDER BY id");
  if (code != SQLITE_OK) return StatusOf(code);
  // One batch is read while the one before it is decoded.
  Batch batches[2];
  for (size_t turn = 0; code != SQLITE_DONE; ++turn) {
    Batch& batch = batches[turn % 2];
    batch.count = 0;
    while (batch.count < batch.rows.size() && (code = rows.Step()) == SQLITE_ROW) {
      Row& row = batch.rows[batch.count++];
      row.id = rows.Int(0);
      row.name = rows.Bytes(1);
      row.version = static_cast<uint64_t>(rows.Int(2));
      row.checksum = rows.Int(3);
      row.record = rows.Bytes(4);
      sum += NameHash(row.name, row.id);
    }
    if (code != SQLITE_ROW && code != SQLITE_DONE) return StatusOf(code);
    batch.decoded = std::async(std::launch::async, decode, std::ref(batch));
    if (turn > 0) {
      if (absl::Status s = deliver(batches[(turn + 1) % 2]); !s.ok()) return s;
    }
    if (code == SQLITE_DONE) {
      if (absl::Status s = deliver(batch); !s.ok()) return s;
    }
  }
  code = rows.Prepare(db_.get(),
                      "SELECT name, id FROM instances INDEXED BY sqlite_autoindex_instances_1");
  if (code != SQLITE_OK) return StatusOf(code);
  while ((code = rows.Step()) == SQLITE_ROW) {
    sum -= NameHash(rows.Bytes(0), rows.Int(1));
  }
  if (code != SQLITE_DONE) return StatusOf(code);
  if (sum != 0) return Damaged("the index of names is not that of the instances");
  if (!requests.empty()) return Damaged("requests of an instance that is not there");

  code = rows.Prepare(db_.get(), "SELECT seq, name, request FROM tombstones ORDER BY seq");
  if (code != SQLITE_OK) return StatusOf(code);
  while ((code = rows.Step()) == SQLITE_ROW) {
    Tombstone removed{.name = std::string(rows.Bytes(1)), .request = {}};
    if (!UnpackRequest(rows.Bytes(2), OwnerOf(rows.Int(0), removed.name), &removed.request)) {
      return Damaged("a removal does not match its checksum");
    }
    if (removed.request.time < oldest) continue;
    if (absl::Status status = tombstone(std::move(removed)); !status.ok()) return status;
  }
  return StatusOf(code);
}

}  // namespace

absl::StatusOr<std::unique_ptr<StateStore>> OpenSqliteStore(const std::string& directory) {
  auto store = std::make_unique<SqliteStore>(directory);
  if (absl::Status status = store->Open(); !status.ok()) return status;
  return store;
}

}  // namespace normd
