#include <cerrno>
#include <cstring>

#include <fcntl.h>
#include <unistd.h>

#include "tests/benchmarks/durability/contender.h"

namespace normd {
namespace {

class BareLog : public Engine {
 public:
  BareLog(const std::string& directory, Records records)
      : records_(std::move(records)),
        file_(open((directory + "/bare.log").c_str(), O_WRONLY | O_CREAT | O_APPEND, 0644)) {
    if (file_ < 0) Die(std::strerror(errno));
  }
  ~BareLog() override { close(file_); }

  void Commit(size_t count) override {
    std::string batch;
    for (size_t i = 0; i < count; ++i, next_ = (next_ + 1) % records_.keys.size()) {
      batch += records_.records[next_];
    }
    if (write(file_, batch.data(), batch.size()) != static_cast<ssize_t>(batch.size()) ||
        fdatasync(file_) != 0) {
      Die(std::strerror(errno));
    }
  }

 private:
  Records records_;
  size_t next_ = 0;
  const int file_;
};

}  // namespace

std::unique_ptr<Engine> OpenBareLog(const std::string& directory, Records records) {
  return std::make_unique<BareLog>(directory, std::move(records));
}

}  // namespace normd
