// Server: all parts of normd, put together and taken apart in the right order.
#ifndef NORMD_SERVER_SERVER_H_
#define NORMD_SERVER_SERVER_H_

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/cuda/cuda_backend.h"
#include "server/config.h"

namespace normd {

class Server {
 public:
  // Restores the state, listens, and serves. The error's message says what to do.
  // `make_cuda` makes the CUDA backend, for tests that bring devices of their own.
  using MakeCuda = std::function<std::unique_ptr<Backend>(const CudaOptions&, std::string* why)>;
  static absl::StatusOr<std::unique_ptr<Server>> Start(const Config& config,
                                                       const MakeCuda& make_cuda = MakeCudaBackend);
  // Drains, if that was not done.
  virtual ~Server() = default;

  // The addresses served on, with the ports that were chosen for port 0.
  virtual const std::vector<std::string>& addresses() const = 0;

  // Flips health to NOT_SERVING, answers new calls UNAVAILABLE, lets those under way
  // finish for --drain_timeout and cancels what is left, then makes everything durable
  // and writes a last checkpoint. Call once.
  virtual absl::Status Drain() = 0;
};

}  // namespace normd

#endif  // NORMD_SERVER_SERVER_H_
