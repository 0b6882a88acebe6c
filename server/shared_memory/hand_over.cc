#include "server/shared_memory/hand_over.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "absl/strings/str_cat.h"
#include "server/clock.h"
#include "spdlog/spdlog.h"

namespace normd {
namespace {

constexpr size_t kMostConnections = 256;
constexpr int kBacklog = 64;

absl::Status CannotListen(const std::string& path, absl::string_view why) {
  return absl::FailedPreconditionError(
      absl::StrCat("cannot listen on ", path, " for shared memory: ", why,
                   "; give another path with --shared_memory_socket"));
}

bool IsOurs(int socket) {
  ucred peer = {};
  socklen_t size = sizeof(peer);
  if (getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0) return false;
  return peer.uid == 0 || peer.uid == geteuid();
}

}  // namespace

absl::StatusOr<std::unique_ptr<HandOver>> HandOver::Listen(const std::string& path,
                                                           Regions* regions, absl::Duration idle) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof(address.sun_path)) {
    return CannotListen(
        path, absl::StrCat("a socket's path has at most ", sizeof(address.sun_path) - 1, " bytes"));
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  const auto* where = reinterpret_cast<const sockaddr*>(&address);
  const auto make = [] { return OwnedFd(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0)); };

  // What a process left that is no more is taken away; a socket that is served is not.
  struct stat found = {};
  if (lstat(path.c_str(), &found) == 0) {
    if (!S_ISSOCK(found.st_mode)) return CannotListen(path, "there is a file that is no socket");
    const OwnedFd probe = make();
    if (connect(probe.get(), where, sizeof(address)) == 0) {
      return CannotListen(path, "another server listens there");
    }
    unlink(path.c_str());
  }
  OwnedFd listener = make();
  // The file gets the socket's own mode, so it never was open to others.
  if (listener.get() < 0 || fchmod(listener.get(), 0600) != 0 ||
      bind(listener.get(), where, sizeof(address)) != 0 || listen(listener.get(), kBacklog) != 0) {
    return CannotListen(path, std::strerror(errno));
  }
  OwnedFd stop(eventfd(0, EFD_CLOEXEC));
  if (stop.get() < 0) return CannotListen(path, std::strerror(errno));
  return std::unique_ptr<HandOver>(
      new HandOver(path, regions, idle, std::move(listener), std::move(stop)));
}

HandOver::HandOver(std::string path, Regions* regions, absl::Duration idle, OwnedFd listener,
                   OwnedFd stop)
    : path_(std::move(path)),
      regions_(regions),
      idle_(idle),
      listener_(std::move(listener)),
      stop_(std::move(stop)),
      thread_([this] { Run(); }) {}

HandOver::~HandOver() {
  const uint64_t one = 1;
  (void)!write(stop_.get(), &one, sizeof(one));
  thread_.join();
  for (const Peer& peer : peers_) regions_->Disconnect(peer.connection, /*by_client=*/false);
  unlink(path_.c_str());
}

void HandOver::Run() {
  for (;;) {
    std::vector<pollfd> polled = {{.fd = stop_.get(), .events = POLLIN, .revents = 0},
                                  {.fd = listener_.get(), .events = POLLIN, .revents = 0}};
    const size_t first = polled.size();
    for (const Peer& peer : peers_) {
      polled.push_back({.fd = peer.socket, .events = POLLIN | POLLRDHUP, .revents = 0});
    }
    const auto wait = peers_.empty() ? -1 : absl::ToInt64Milliseconds(idle_) / 4 + 1;
    if (poll(polled.data(), polled.size(), static_cast<int>(wait)) < 0) continue;
    if (polled[0].revents != 0) return;
    // The end, or words that nobody asked for.
    for (size_t i = peers_.size(); i-- > 0;) {
      if (polled[first + i].revents == 0) continue;
      regions_->Disconnect(peers_[i].connection, /*by_client=*/true);
      peers_[i] = peers_.back();
      peers_.pop_back();
    }
    CloseIdle();
    if (polled[1].revents != 0) Accept();
  }
}

void HandOver::Accept() {
  OwnedFd socket(accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  if (socket.get() < 0) {
    // Out of descriptors, at worst: the next round finds the client still waiting.
    if (errno == EMFILE || errno == ENFILE) absl::SleepFor(absl::Milliseconds(50));
    return;
  }
  if (!IsOurs(socket.get())) {
    spdlog::warn("shared memory is for this server's user and root: a connection was refused");
    return;
  }
  if (peers_.size() >= kMostConnections) return;
  const int number = socket.get();
  auto connection = regions_->Connect(std::move(socket));
  if (connection.ok()) peers_.push_back({*std::move(connection), number, SteadyNow()});
}

void HandOver::CloseIdle() {
  const absl::Time now = SteadyNow();
  for (size_t i = peers_.size(); i-- > 0;) {
    Peer& peer = peers_[i];
    if (regions_->HasRegions(peer.connection)) {
      peer.useful_at = now;
    } else if (now - peer.useful_at > idle_) {
      regions_->Disconnect(peer.connection, /*by_client=*/true);
      peer = peers_.back();
      peers_.pop_back();
    }
  }
}

}  // namespace normd
