// A server in the test's own process. Its headers stay out of the test, which has the
// client's: both have a Mode.
#ifndef NORMD_TESTS_UNIT_CLIENT_REAL_SERVER_H_
#define NORMD_TESTS_UNIT_CLIENT_REAL_SERVER_H_

#include <cstdint>
#include <memory>
#include <string>

namespace normd {

class RealServer {
 public:
  struct Options {
    std::string listen = "127.0.0.1:0";
    std::string state_dir;
    bool shared_memory = false;
    int64_t shared_memory_budget = int64_t{1} << 30;
  };
  // Fails the test where it cannot serve.
  explicit RealServer(const Options& options);
  ~RealServer();

  const std::string& address() const { return address_; }

 private:
  struct Held;
  std::unique_ptr<Held> held_;
  std::string address_;
};

}  // namespace normd

#endif  // NORMD_TESTS_UNIT_CLIENT_REAL_SERVER_H_
