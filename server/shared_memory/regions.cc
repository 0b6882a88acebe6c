#include "server/shared_memory/regions.h"

#include <array>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "server/error/error.h"

namespace normd {
namespace {

constexpr size_t kNameBytes = 16;
// A cache line and the widest vector.
constexpr uint64_t kAlignment = 64;
constexpr size_t kHugePage = size_t{2} << 20;

// What nobody guesses: whoever knows the name may use what it names.
absl::StatusOr<std::string> NewName() {
  std::string name(kNameBytes, '\0');
  if (getrandom(name.data(), name.size(), 0) != static_cast<ssize_t>(name.size())) {
    return absl::InternalError(absl::StrCat("no random bytes: ", std::strerror(errno)));
  }
  return name;
}

absl::Status NoMemory(absl::string_view what) {
  return Retryable(
      absl::StatusCode::kResourceExhausted,
      absl::StrCat("the system gives no shared memory: ", what, ": ", std::strerror(errno)),
      absl::Seconds(1));
}

// `field` names nothing that the caller may see. Whether it is another's is not told.
absl::Status NotThere(absl::string_view field, absl::string_view value, absl::string_view allowed) {
  const std::string shown = absl::BytesToHexString(value.substr(0, kNameBytes));
  return FieldError(absl::StatusCode::kNotFound, field, shown, allowed,
                    absl::StrCat(field, " ", shown, " is not there; allowed: ", allowed));
}

// One packet, with a descriptor beside it unless `fd` is negative. Never waits: a client
// that does not read has no room.
bool Send(int socket, absl::string_view bytes, int fd) {
  iovec part = {.iov_base = const_cast<char*>(bytes.data()), .iov_len = bytes.size()};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control = {};
  msghdr message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (fd >= 0) {
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(header), &fd, sizeof(fd));
  }
  return sendmsg(socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL) ==
         static_cast<ssize_t>(bytes.size());
}

}  // namespace

absl::Status Region::CheckSystem() {
  int overcommit = 0;
  if (std::ifstream("/proc/sys/vm/overcommit_memory") >> overcommit && overcommit == 2) {
    return absl::FailedPreconditionError(
        "--shared_memory=on is not safe where vm.overcommit_memory is 2; set it to 0 or 1, or "
        "leave shared memory off");
  }
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<Region>> Region::Make(int64_t bytes, MemoryClaim shared,
                                                     MemoryClaim memory, OwnedFd& fd) {
  OwnedFd file(memfd_create("normd", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (file.get() < 0) return NoMemory("memfd_create");
  const auto size = static_cast<size_t>(bytes);
  if (ftruncate(file.get(), bytes) != 0) return NoMemory("ftruncate");
  if (fcntl(file.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    return NoMemory("fcntl(F_ADD_SEALS)");
  }
  void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0);
  if (data == MAP_FAILED) return NoMemory("mmap");
  // Where the system lends huge pages to shared memory at all, for the same reasons as to
  // the pool's.
  if (size >= kHugePage) madvise(data, size, MADV_HUGEPAGE);
  fd = std::move(file);
  return std::shared_ptr<Region>(
      new Region(static_cast<char*>(data), bytes, std::move(shared), std::move(memory)));
}

std::shared_ptr<Region> Region::OnDevice(int64_t bytes, std::shared_ptr<void> memory) {
  std::shared_ptr<Region> region(
      new Region(static_cast<char*>(memory.get()), bytes, MemoryClaim(), MemoryClaim()));
  region->device_memory_ = std::move(memory);
  return region;
}

Region::~Region() {
  if (on_device()) return;
  // Else a client that keeps its mapping would keep memory that nobody counts. What it
  // touches after this is its own, as if it had allocated it.
  if (abandoned_.load(std::memory_order_relaxed)) madvise(data_, size_, MADV_REMOVE);
  munmap(data_, size_);
}

absl::StatusOr<std::string> Regions::Connect(OwnedFd socket) {
  auto name = NewName();
  if (!name.ok()) return name.status();
  // In one go: a client that has the name may use it at once.
  absl::MutexLock lock(&mutex_);
  if (!Send(socket.get(), *name, -1)) {
    return absl::UnavailableError(absl::StrCat("the client is gone: ", std::strerror(errno)));
  }
  connections_[*name].socket = std::move(socket);
  return name;
}

void Regions::Disconnect(const std::string& connection, bool by_client) {
  std::vector<std::shared_ptr<Region>> gone;  // unmapped outside of the lock
  absl::MutexLock lock(&mutex_);
  const auto found = connections_.find(connection);
  if (found == connections_.end()) return;
  for (const std::string& name : found->second.regions) {
    const auto entry = regions_.find(name);
    if (by_client) entry->second.region->Abandon();
    gone.push_back(std::move(entry->second.region));
    regions_.erase(entry);
  }
  connections_.erase(found);
}

bool Regions::HasRegions(const std::string& connection) const {
  absl::MutexLock lock(&mutex_);
  const auto found = connections_.find(connection);
  return found != connections_.end() && !found->second.regions.empty();
}

absl::Status Regions::BeginRegion(const std::string& connection) {
  absl::MutexLock lock(&mutex_);
  const auto found = connections_.find(connection);
  if (found == connections_.end()) {
    return NotThere("connection", connection,
                    "the bytes that the server sent when the client connected to its socket");
  }
  Connection& of_client = found->second;
  const int64_t count = static_cast<int64_t>(of_client.regions.size()) + of_client.making;
  if (count >= limits_.max_regions) {
    return LimitExceeded("connection", absl::StrCat("a region beside the ", count, " it has"),
                         limits_.max_regions, "--max_regions");
  }
  ++of_client.making;
  return absl::OkStatus();
}

absl::StatusOr<std::string> Regions::Add(const std::string& connection, absl::string_view owner,
                                         std::shared_ptr<Region> region, OwnedFd fd) {
  auto name = NewName();
  if (!name.ok()) return name.status();
  absl::MutexLock lock(&mutex_);
  const auto found = connections_.find(connection);
  if (found == connections_.end()) {
    return NotThere("connection", connection, "a connection that is still open");
  }
  if (fd.get() >= 0 && !Send(found->second.socket.get(), *name, fd.get())) {
    return Retryable(absl::StatusCode::kResourceExhausted,
                     absl::StrCat("the region cannot be sent: ", std::strerror(errno),
                                  "; does the client take those it was sent?"),
                     absl::Seconds(1));
  }
  found->second.regions.insert(*name);
  regions_[*name] = {std::move(region), std::string(owner), connection};
  return name;
}

absl::StatusOr<std::string> Regions::Register(const std::string& connection,
                                              absl::string_view owner, int64_t bytes) {
  if (bytes < 1) return InvalidField("region_bytes", absl::StrCat(bytes), "1 or more");
  if (bytes > limits_.max_region_bytes) {
    return LimitExceeded("region_bytes", absl::StrCat("a region of ", bytes, " bytes"),
                         limits_.max_region_bytes, "--max_region_bytes");
  }
  return AddNew(connection, owner, [&](OwnedFd& fd) -> absl::StatusOr<std::shared_ptr<Region>> {
    auto shared = shared_->Claim(bytes);
    if (!shared.ok()) return ForField(shared.status(), "region_bytes");
    auto memory = memory_->Claim(bytes);
    if (!memory.ok()) return ForField(memory.status(), "region_bytes");
    return Region::Make(bytes, *std::move(shared), *std::move(memory), fd);
  });
}

absl::StatusOr<std::string> Regions::RegisterOnDevice(const std::string& connection,
                                                      absl::string_view owner, int64_t bytes,
                                                      OpenDevice open) {
  if (bytes < 1) return InvalidField("region_bytes", absl::StrCat(bytes), "1 or more");
  return AddNew(connection, owner, [&](OwnedFd&) -> absl::StatusOr<std::shared_ptr<Region>> {
    auto memory = open();
    if (!memory.ok()) return memory.status();
    return Region::OnDevice(bytes, *std::move(memory));
  });
}

absl::StatusOr<std::string> Regions::AddNew(const std::string& connection, absl::string_view owner,
                                            Make make) {
  if (absl::Status begun = BeginRegion(connection); !begun.ok()) return begun;
  // Outside of the lock: the system may take its time.
  OwnedFd fd;
  auto region = make(fd);
  auto made = region.ok() ? Add(connection, owner, *std::move(region), std::move(fd))
                          : absl::StatusOr<std::string>(region.status());
  absl::MutexLock lock(&mutex_);
  const auto found = connections_.find(connection);
  if (found != connections_.end()) --found->second.making;
  return made;
}

absl::Status Regions::Unregister(const std::string& region, absl::string_view owner) {
  std::shared_ptr<Region> gone;  // unmapped outside of the lock
  absl::MutexLock lock(&mutex_);
  const auto found = regions_.find(region);
  if (found == regions_.end() || found->second.owner != owner) {
    return NotThere("region", region, "a region of the caller's");
  }
  gone = std::move(found->second.region);
  gone->Abandon();
  connections_.at(found->second.connection).regions.erase(region);
  regions_.erase(found);
  return absl::OkStatus();
}

absl::StatusOr<SharedBytes> Regions::Find(const v1::SharedMemory& name, absl::string_view owner,
                                          absl::string_view field) const {
  SharedBytes bytes{.name = name};
  {
    absl::MutexLock lock(&mutex_);
    const auto found = regions_.find(name.region());
    if (found == regions_.end() || found->second.owner != owner) {
      return NotThere(absl::StrCat(field, ".region"), name.region(), "a region of the caller's");
    }
    bytes.region = found->second.region;
  }
  const uint64_t size = bytes.region->size();
  if (name.offset() % kAlignment != 0 || name.offset() > size) {
    return InvalidField(
        absl::StrCat(field, ".offset"), absl::StrCat(name.offset()),
        absl::StrCat("a multiple of ", kAlignment, ", at most the region's ", size, " bytes"));
  }
  if (name.length() > size - name.offset()) {
    return InvalidField(absl::StrCat(field, ".length"), absl::StrCat(name.length()),
                        absl::StrCat("at most the ", size - name.offset(),
                                     " bytes from the offset to the region's end"));
  }
  bytes.data = bytes.region->data() + name.offset();
  bytes.size = name.length();
  return bytes;
}

Regions::Usage Regions::usage() const {
  absl::MutexLock lock(&mutex_);
  return {.connections = static_cast<int64_t>(connections_.size()),
          .regions = static_cast<int64_t>(regions_.size()),
          .bytes = shared_->in_use()};
}

}  // namespace normd
