// A server in the test's own process. Its headers stay out of the test, which has the
// client's: both have a Mode.
#ifndef NORMD_TESTS_UNIT_CLIENT_REAL_SERVER_H_
#define NORMD_TESTS_UNIT_CLIENT_REAL_SERVER_H_

#include <cstddef>
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
    bool cuda_ipc = false;  // on a device that is not there
  };
  // Fails the test where it cannot serve.
  explicit RealServer(const Options& options);
  ~RealServer();

  const std::string& address() const { return address_; }

  // With cuda_ipc: memory of a client's on the device, by the handle that names it. Before
  // any call uses it.
  char* MemoryOnDevice(const std::string& handle, size_t bytes);
  // How often such memory is open.
  int open_on_device() const;

 private:
  struct Held;
  std::unique_ptr<Held> held_;
  std::string address_;
};

}  // namespace normd

#endif  // NORMD_TESTS_UNIT_CLIENT_REAL_SERVER_H_
