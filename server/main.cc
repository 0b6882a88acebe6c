// normd: tensor normalization as a service.
#include <algorithm>
#include <csignal>
#include <cstdio>
#include <fstream>
#include <iostream>

#include <malloc.h>
#include <pthread.h>

#include "absl/strings/str_join.h"
#include "absl/synchronization/mutex.h"
#include "kernels/thread_pool.h"
#include "server/config.h"
#include "server/log.h"
#include "server/server.h"
#include "spdlog/spdlog.h"

namespace {

// Whole or not at all: a reader that sees the file sees every address.
bool WritePortFile(const std::string& path, const std::vector<std::string>& addresses) {
  const std::string temporary = path + ".tmp";
  {
    std::ofstream file(temporary);
    file << absl::StrJoin(addresses, "\n") << "\n";
    if (!file.flush()) return false;
  }
  return std::rename(temporary.c_str(), path.c_str()) == 0;
}

}  // namespace

int main(int argc, char** argv) {
#ifdef NDEBUG
  // Debian's Abseil looks for deadlocks in every build: a node of a graph that is walked under one
  // lock for each mutex there is, half a KiB and microseconds a locking with a million instances.
  // Builds with assertions, which the sanitizers' are, keep it.
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
#endif
  const auto config = normd::ReadConfig(argc, argv);
  if (!config.ok()) {
    std::cerr << "normd: " << config.status().message() << "\n";
    return 2;
  }
  normd::SetUpLog(*config);
  // gRPC's slices come from malloc, whose arenas keep what is freed, each for its own threads.
  // By default there are eight for each core. With one for the two cores that this was measured
  // on, four requests of 100 MiB peaked at 2.0 times their bytes, with one for each core at 2.1
  // to 2.25; and neither these nor small requests took longer.
  mallopt(M_ARENA_MAX, std::max(1, normd::UsableCores() / 4));
  // By default an arena gives back what is free at its end from 128 KiB on, and has it back a
  // message later: a request of 1 MiB had a hundred page faults, one of 10 MiB 1,400. With
  // this none, and a hundred or two.
  mallopt(M_TRIM_THRESHOLD, 8 << 20);
  mallopt(M_TOP_PAD, 1 << 20);

  // Every thread inherits the mask, so that the signals come to sigwait alone.
  sigset_t stop_signals;
  sigemptyset(&stop_signals);
  sigaddset(&stop_signals, SIGTERM);
  sigaddset(&stop_signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &stop_signals, nullptr);
  std::signal(SIGPIPE, SIG_IGN);

  const auto server = normd::Server::Start(*config);
  if (!server.ok()) {
    spdlog::error("{}", std::string(server.status().message()));
    return 1;
  }
  if (!config->port_file.empty() && !WritePortFile(config->port_file, (*server)->addresses())) {
    spdlog::error("cannot write --port_file={}", config->port_file);
    return 1;
  }
  spdlog::info("normd {} serving on {}", NORMD_VERSION,
               absl::StrJoin((*server)->addresses(), ", "));

  int signal = 0;
  sigwait(&stop_signals, &signal);
  spdlog::info("{} received", signal == SIGTERM ? "SIGTERM" : "SIGINT");
  if (const absl::Status drained = (*server)->Drain(); !drained.ok()) {
    spdlog::error("not everything could be kept: {}", std::string(drained.message()));
    return 1;
  }
  spdlog::info("stopped");
  return 0;
}
