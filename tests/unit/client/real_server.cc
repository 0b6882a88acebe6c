#include "tests/unit/client/real_server.h"

#include <gtest/gtest.h>

#include "server/config.h"
#include "server/server.h"

namespace normd {

struct RealServer::Held {
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
  auto server = Server::Start(config);
  EXPECT_TRUE(server.ok()) << server.status();
  held_->server = *std::move(server);
  address_ = held_->server->addresses().front();
}

RealServer::~RealServer() = default;

}  // namespace normd
