#include <sqlite3.h>

#include "tests/benchmarks/durability/contender.h"

namespace normd {
namespace {

class BareSqlite : public Engine {
 public:
  BareSqlite(const std::string& directory, Records records) : records_(std::move(records)) {
    Check(sqlite3_open((directory + "/bare.sqlite").c_str(), &db_));
    Check(sqlite3_exec(db_,
                       "PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL;"
                       "PRAGMA synchronous = FULL; PRAGMA wal_autocheckpoint = 16384;"
                       "CREATE TABLE records (name TEXT PRIMARY KEY, record BLOB) WITHOUT ROWID",
                       nullptr, nullptr, nullptr));
    Check(sqlite3_prepare_v2(db_, "REPLACE INTO records VALUES (?1, ?2)", -1, &put_, nullptr));
    Commit(records_.keys.size());
  }
  ~BareSqlite() override {
    sqlite3_finalize(put_);
    sqlite3_close(db_);
  }

  void Commit(size_t count) override {
    Check(sqlite3_exec(db_, "BEGIN IMMEDIATE", nullptr, nullptr, nullptr));
    for (size_t i = 0; i < count; ++i, next_ = (next_ + 1) % records_.keys.size()) {
      const std::string& key = records_.keys[next_];
      const std::string& record = records_.records[next_];
      sqlite3_bind_text(put_, 1, key.data(), static_cast<int>(key.size()), SQLITE_STATIC);
      sqlite3_bind_blob(put_, 2, record.data(), static_cast<int>(record.size()), SQLITE_STATIC);
      if (sqlite3_step(put_) != SQLITE_DONE) Die(sqlite3_errmsg(db_));
      sqlite3_reset(put_);
    }
    Check(sqlite3_exec(db_, "COMMIT", nullptr, nullptr, nullptr));
  }

 private:
  void Check(int code) {
    if (code != SQLITE_OK) Die(sqlite3_errmsg(db_));
  }

  Records records_;
  size_t next_ = 0;
  sqlite3* db_ = nullptr;
  sqlite3_stmt* put_ = nullptr;
};

}  // namespace

std::unique_ptr<Engine> OpenBareSqlite(const std::string& directory, Records records) {
  return std::make_unique<BareSqlite>(directory, std::move(records));
}

}  // namespace normd
