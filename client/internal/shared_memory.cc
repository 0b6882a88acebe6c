#include "client/internal/shared_memory.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "client/internal/connection.h"

namespace normd::inline client::internal {
namespace {

using Stub = v1::NormService::StubInterface;

// Below this a message is as fast.
constexpr size_t kWorthSharing = 64 * 1024;
constexpr size_t kSmallest = 4096;
// As the server asks of offsets.
constexpr size_t kAlignment = 64;
// What is kept for later calls.
constexpr size_t kMostIdleBytes = size_t{1} << 30;
constexpr size_t kMostIdleBlocks = 32;
// How long a refusal is believed.
constexpr absl::Duration kOffFor = absl::Seconds(10);
constexpr absl::Duration kNotNowFor = absl::Seconds(1);
constexpr absl::Duration kLongestFarewell = absl::Seconds(5);
// The server sends what it sends before it answers.
constexpr timeval kLongestReceive = {.tv_sec = 5, .tv_usec = 0};

class OwnedFd {
 public:
  explicit OwnedFd(int fd) : fd_(fd) {}
  OwnedFd(OwnedFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  OwnedFd& operator=(OwnedFd&&) = delete;
  ~OwnedFd() {
    if (fd_ >= 0) close(fd_);
  }
  int get() const { return fd_; }

 private:
  int fd_;
};

bool IsLocal(absl::string_view target) {
  if (absl::StartsWith(target, "unix")) return true;
  for (const char* scheme : {"dns:", "ipv4:", "ipv6:"}) absl::ConsumePrefix(&target, scheme);
  while (absl::ConsumePrefix(&target, "/")) {
  }
  const absl::string_view host = target.substr(0, target.rfind(':'));
  return host == "localhost" || host == "[::1]" || absl::StartsWith(host, "127.");
}

// Four steps a power of two, so that a block serves tensors of about one size.
size_t RoundUp(size_t bytes) {
  bytes = std::max(bytes, kSmallest);
  const size_t step = std::bit_ceil(bytes) / 8;
  return (bytes + step - 1) / step * step;
}

absl::Status Failed(absl::string_view what) {
  return absl::UnavailableError(
      absl::StrCat("no shared memory: ", what, ": ", errno == 0 ? "closed" : std::strerror(errno)));
}

// One packet of the server's, and the descriptor beside it if there is one.
struct Packet {
  std::string bytes;
  OwnedFd fd;
};
absl::StatusOr<Packet> Receive(int socket) {
  std::array<char, 64> bytes;
  iovec part = {.iov_base = bytes.data(), .iov_len = bytes.size()};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control = {};
  msghdr message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  errno = 0;
  const ssize_t count = recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
  if (count <= 0) return Failed("the server's socket");
  int fd = -1;
  const cmsghdr* header = CMSG_FIRSTHDR(&message);
  if (header != nullptr && header->cmsg_type == SCM_RIGHTS) {
    std::memcpy(&fd, CMSG_DATA(header), sizeof(fd));
  }
  return Packet{std::string(bytes.data(), static_cast<size_t>(count)), OwnedFd(fd)};
}

// Maps what the server sent, if it is what it must be: memory that cannot go away.
absl::StatusOr<std::unique_ptr<Block>> Map(const std::string& region, int fd, size_t bytes) {
  struct stat file = {};
  const int seals = fcntl(fd, F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0 || fstat(fd, &file) != 0 ||
      static_cast<size_t>(file.st_size) < bytes) {
    errno = EINVAL;
    return Failed("the server's memory");
  }
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) return Failed("mmap");
  constexpr size_t kHugePage = size_t{2} << 20;
  if (bytes >= kHugePage) madvise(data, bytes, MADV_HUGEPAGE);
  return std::make_unique<Block>(region, static_cast<char*>(data), bytes);
}

}  // namespace

Block::~Block() { munmap(data, size); }

class BlockPool {
 public:
  BlockPool(OwnedFd socket, std::string name, int64_t max_region_bytes)
      : socket_(std::move(socket)), name_(std::move(name)), max_region_bytes_(max_region_bytes) {}

  int socket() const { return socket_.get(); }
  const std::string& name() const { return name_; }
  size_t max_region_bytes() const { return static_cast<size_t>(max_region_bytes_); }

  // The smallest idle block of `bytes` that is not much larger; null where there is none.
  std::unique_ptr<Block> Take(size_t bytes) {
    absl::MutexLock lock(&mutex_);
    const auto found = idle_.lower_bound(bytes);
    if (found == idle_.end() || found->first > RoundUp(bytes)) return nullptr;
    std::unique_ptr<Block> block = std::move(found->second);
    idle_.erase(found);
    idle_bytes_ -= block->size;
    return block;
  }

  void Add(const Block& block) {
    absl::MutexLock lock(&mutex_);
    by_address_[block.data] = &block;
  }

  void Put(std::unique_ptr<Block> block, bool discard) {
    absl::MutexLock lock(&mutex_);
    if (discard || idle_bytes_ + block->size > kMostIdleBytes || idle_.size() >= kMostIdleBlocks) {
      return Drop(std::move(block));
    }
    idle_bytes_ += block->size;
    const size_t size = block->size;
    idle_.emplace(size, std::move(block));
  }

  void DropIdle() {
    absl::MutexLock lock(&mutex_);
    for (auto& [size, block] : idle_) Drop(std::move(block));
    idle_.clear();
    idle_bytes_ = 0;
  }

  // Regions that the server is to be told of: nobody here uses them any more.
  std::vector<std::string> TakeUnwanted() {
    absl::MutexLock lock(&mutex_);
    return std::exchange(unwanted_, {});
  }

  std::optional<v1::SharedMemory> Find(std::string_view bytes) const {
    absl::MutexLock lock(&mutex_);
    auto after = by_address_.upper_bound(bytes.data());
    if (after == by_address_.begin()) return std::nullopt;
    const Block& block = *std::prev(after)->second;
    const auto offset = static_cast<size_t>(bytes.data() - block.data);
    if (offset > block.size || bytes.size() > block.size - offset || offset % kAlignment != 0) {
      return std::nullopt;
    }
    v1::SharedMemory name;
    name.set_region(block.region);
    name.set_offset(offset);
    name.set_length(bytes.size());
    return name;
  }

 private:
  void Drop(std::unique_ptr<Block> block) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    by_address_.erase(block->data);
    unwanted_.push_back(block->region);
  }

  const OwnedFd socket_;
  const std::string name_;
  const int64_t max_region_bytes_;
  mutable absl::Mutex mutex_;
  std::multimap<size_t, std::unique_ptr<Block>> idle_ ABSL_GUARDED_BY(mutex_);
  size_t idle_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  std::map<const char*, const Block*, std::less<>> by_address_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::string> unwanted_ ABSL_GUARDED_BY(mutex_);
};

Lease::~Lease() { pool_->Put(std::move(block_), discard_); }

CudaRegion::~CudaRegion() {
  v1::UnregisterSharedMemoryRequest request;
  request.set_region(name_);
  // The worst that an error means is that the region lives as long as the connection.
  (void)connection_->CallOnce(&Stub::UnregisterSharedMemory, request,
                              absl::Now() + kLongestFarewell);
}

v1::SharedMemory Lease::Name(size_t bytes) const {
  v1::SharedMemory name;
  name.set_region(block_->region);
  name.set_length(bytes);
  return name;
}

SharedMemoryPool::SharedMemoryPool(Connection* connection, const std::string& target)
    : connection_(connection), local_(IsLocal(target)) {}

bool SharedMemoryPool::Wants(size_t bytes) const {
  switch (connection_->options().shared_memory) {
    case SharedMemory::kOff: return false;
    case SharedMemory::kOn: return bytes > 0;
    case SharedMemory::kAuto: break;
  }
  return local_ && bytes >= kWorthSharing;
}

bool SharedMemoryPool::must() const {
  return connection_->options().shared_memory == SharedMemory::kOn;
}

std::shared_ptr<BlockPool> SharedMemoryPool::pool() const {
  absl::MutexLock lock(&mutex_);
  return pool_;
}

void SharedMemoryPool::Forget(const std::shared_ptr<BlockPool>& pool) {
  absl::MutexLock lock(&mutex_);
  if (pool_ == pool) pool_ = nullptr;
}

bool SharedMemoryPool::ForgetIfLost(const absl::Status& status) {
  const ErrorDetail detail = DetailOf(status);
  const bool lost = (absl::IsNotFound(status) && absl::EndsWith(detail.field, "_memory.region")) ||
                    (absl::IsFailedPrecondition(status) && detail.flag == "--shared_memory");
  if (lost) Forget(pool());
  return lost;
}

std::optional<v1::SharedMemory> SharedMemoryPool::Find(std::string_view bytes) const {
  const auto current = pool();
  return current == nullptr ? std::nullopt : current->Find(bytes);
}

absl::StatusOr<std::shared_ptr<Lease>> SharedMemoryPool::Get(size_t bytes, absl::Time deadline) {
  if (auto current = pool(); current != nullptr) {
    if (auto block = current->Take(bytes); block != nullptr) {
      return std::make_shared<Lease>(std::move(block), std::move(current));
    }
  }
  absl::MutexLock lock(&asking_);
  if (absl::Now() < ask_again_) return refused_;
  auto opened = Open(deadline);
  absl::Status status = opened.status();
  if (opened.ok()) {
    auto block = Ask(**opened, bytes, deadline);
    if (absl::IsNotFound(block.status())) {
      // The server of before is gone; its socket may be another's.
      Forget(*opened);
      opened = Open(deadline);
      if (opened.ok()) block = Ask(**opened, bytes, deadline);
    }
    if (block.ok()) return std::make_shared<Lease>(*std::move(block), *std::move(opened));
    status = block.status();
  }
  refused_ = status;
  // Not found: the socket is another server's than the one that answers, behind a tunnel.
  const bool off = absl::IsFailedPrecondition(status) || absl::IsUnimplemented(status) ||
                   absl::IsNotFound(status);
  ask_again_ = absl::Now() + (off ? kOffFor : kNotNowFor);
  return status;
}

absl::StatusOr<std::shared_ptr<const CudaRegion>> SharedMemoryPool::RegisterCuda(
    std::shared_ptr<Connection> self, std::string_view ipc_handle, int64_t bytes,
    absl::Time deadline) {
  absl::MutexLock lock(&asking_);
  for (bool again = true;; again = false) {
    auto opened = Open(deadline);
    if (!opened.ok()) return opened.status();
    v1::RegisterSharedMemoryRequest request;
    request.set_connection((*opened)->name());
    request.set_region_bytes(bytes);
    request.set_cuda_ipc_handle(std::string(ipc_handle));
    auto answer = connection_->CallOnce(&Stub::RegisterSharedMemory, request, deadline);
    if (absl::IsNotFound(answer.status()) && again) {
      Forget(*opened);  // of a server of before
      continue;
    }
    if (!answer.ok()) return answer.status();
    return std::make_shared<const CudaRegion>(std::move(self), *std::move(opened),
                                              answer->region());
  }
}

absl::StatusOr<std::shared_ptr<BlockPool>> SharedMemoryPool::Open(absl::Time deadline) {
  if (auto current = pool(); current != nullptr) return current;
  if (!local_) {
    return absl::FailedPreconditionError(
        "shared memory is for servers on this host: those at unix:PATH, localhost or 127.0.0.1");
  }
  const auto status = connection_->CallOnce(&Stub::GetSharedMemoryStatus,
                                            v1::GetSharedMemoryStatusRequest(), deadline);
  if (!status.ok()) return status.status();
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (!status->enabled() || status->socket().size() >= sizeof(address.sun_path)) {
    return absl::FailedPreconditionError(
        "the server runs without shared memory; --shared_memory=on allows it");
  }
  status->socket().copy(address.sun_path, sizeof(address.sun_path) - 1);
  OwnedFd socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  if (socket.get() < 0 ||
      setsockopt(socket.get(), SOL_SOCKET, SO_RCVTIMEO, &kLongestReceive,
                 sizeof(kLongestReceive)) != 0 ||
      connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    return Failed(status->socket());
  }
  auto greeting = Receive(socket.get());
  if (!greeting.ok()) return greeting.status();
  auto made = std::make_shared<BlockPool>(std::move(socket), std::move(greeting->bytes),
                                          status->max_region_bytes());
  absl::MutexLock lock(&mutex_);
  pool_ = made;
  return made;
}

absl::StatusOr<std::unique_ptr<Block>> SharedMemoryPool::Ask(BlockPool& pool, size_t bytes,
                                                             absl::Time deadline) {
  const auto unregister = [&] {
    for (std::string& region : pool.TakeUnwanted()) {
      v1::UnregisterSharedMemoryRequest request;
      request.set_region(std::move(region));
      // The worst that an error means is that the region lives as long as the connection.
      (void)connection_->CallOnce(&Stub::UnregisterSharedMemory, request, deadline);
    }
  };
  unregister();
  const size_t size = std::max(bytes, std::min(RoundUp(bytes), pool.max_region_bytes()));
  v1::RegisterSharedMemoryRequest request;
  request.set_connection(pool.name());
  request.set_region_bytes(static_cast<int64_t>(size));
  auto answer = connection_->CallOnce(&Stub::RegisterSharedMemory, request, deadline);
  if (absl::IsResourceExhausted(answer.status())) {
    pool.DropIdle();
    unregister();
    answer = connection_->CallOnce(&Stub::RegisterSharedMemory, request, deadline);
  }
  if (!answer.ok()) return answer.status();
  for (;;) {
    auto packet = Receive(pool.socket());
    if (!packet.ok()) return packet.status();
    // Another came for a request whose answer was lost.
    if (packet->bytes != answer->region()) continue;
    auto block = Map(answer->region(), packet->fd.get(), size);
    if (block.ok()) pool.Add(**block);
    return block;
  }
}

}  // namespace normd::inline client::internal
