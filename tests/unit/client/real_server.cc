#include "tests/unit/client/real_server.h"

#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "server/config.h"
#include "server/server.h"
#if NORMD_HAS_EMULATED_GPU
#include "tests/unit/kernels/emulated_device.h"
#endif

namespace normd {

struct RealServer::Held {
#if NORMD_HAS_EMULATED_GPU
  std::shared_ptr<EmulatedState> device = std::make_shared<EmulatedState>();
#endif
  std::unique_ptr<Server> server;
};

RealServer::RealServer(const Options& options) : held_(std::make_unique<Held>()) {
  // The defaults, which a process can read but once.
  char name[] = "normd";
  char* argv[] = {name};
  static const absl::StatusOr<Config> kDefaults = ReadConfig(1, argv);
  EXPECT_TRUE(kDefaults.ok()) << kDefaults.status();
  Config config = *kDefaults;
  config.listen = {options.listen};
  config.state_dir = options.state_dir;
  config.shared_memory = options.shared_memory;
  config.shared_memory_budget = options.shared_memory_budget;
  config.shared_memory_socket = options.state_dir + "/shared-memory.sock";
  config.cuda_ipc = options.cuda_ipc;
#if NORMD_HAS_EMULATED_GPU
  config.backend = "cuda";
  auto server = Server::Start(config, [&](const CudaOptions& options_of_server, std::string*) {
    std::vector<std::unique_ptr<cuda::Device>> devices;
    devices.push_back(MakeEmulatedDevice(held_->device));
    return cuda::MakeBackend(std::move(devices), options_of_server);
  });
#else
  auto server = Server::Start(config);
#endif
  EXPECT_TRUE(server.ok()) << server.status();
  held_->server = *std::move(server);
  address_ = held_->server->addresses().front();
}

RealServer::~RealServer() = default;

#if NORMD_HAS_EMULATED_GPU
char* RealServer::MemoryOnDevice(const std::string& handle, size_t bytes) {
  DeviceHandle opaque;
  EXPECT_EQ(handle.size(), opaque.size());
  std::memcpy(opaque.data(), handle.data(), opaque.size());
  auto& memory = held_->device->shared[opaque];
  memory.resize(bytes);
  return memory.data();
}

int RealServer::open_on_device() const { return held_->device->shared_open; }
#endif

}  // namespace normd
