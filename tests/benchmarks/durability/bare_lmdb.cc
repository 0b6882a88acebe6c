#include <lmdb.h>

#include "tests/benchmarks/durability/contender.h"

namespace normd {
namespace {

void Check(int code) {
  if (code != MDB_SUCCESS) Die(mdb_strerror(code));
}

class BareLmdb : public Engine {
 public:
  BareLmdb(const std::string& directory, Records records) : records_(std::move(records)) {
    Check(mdb_env_create(&env_));
    Check(mdb_env_set_mapsize(env_, size_t{1} << 30));
    Check(mdb_env_open(env_, (directory + "/bare.lmdb").c_str(), MDB_NOSUBDIR, 0644));
    MDB_txn* txn = nullptr;
    Check(mdb_txn_begin(env_, nullptr, 0, &txn));
    Check(mdb_dbi_open(txn, nullptr, 0, &dbi_));
    Check(mdb_txn_commit(txn));
    Commit(records_.keys.size());
  }
  ~BareLmdb() override { mdb_env_close(env_); }

  void Commit(size_t count) override {
    MDB_txn* txn = nullptr;
    Check(mdb_txn_begin(env_, nullptr, 0, &txn));
    for (size_t i = 0; i < count; ++i, next_ = (next_ + 1) % records_.keys.size()) {
      MDB_val key{records_.keys[next_].size(), records_.keys[next_].data()};
      MDB_val record{records_.records[next_].size(), records_.records[next_].data()};
      Check(mdb_put(txn, dbi_, &key, &record, 0));
    }
    Check(mdb_txn_commit(txn));
  }

 private:
  Records records_;
  size_t next_ = 0;
  MDB_env* env_ = nullptr;
  MDB_dbi dbi_ = 0;
};

}  // namespace

std::unique_ptr<Engine> OpenBareLmdb(const std::string& directory, Records records) {
  return std::make_unique<BareLmdb>(directory, std::move(records));
}

}  // namespace normd
