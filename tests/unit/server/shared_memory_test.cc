#include <array>
#include <cerrno>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "absl/time/clock.h"
#include "server/error/error.h"
#include "server/shared_memory/hand_over.h"
#include "server/shared_memory/regions.h"
#include "tests/unit/server/temporary_directory.h"

namespace normd {
namespace {

constexpr int64_t kSize = 1 << 16;
constexpr char kOwner[] = "me";

// What a client does with its end of a connection.
class ClientEnd {
 public:
  explicit ClientEnd(int socket) : socket_(socket) {
    const timeval patience = {.tv_sec = 10, .tv_usec = 0};
    setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
  }

  int socket() const { return socket_.get(); }
  void Close() { socket_ = OwnedFd(); }

  // The next packet, with the descriptor beside it; empty at the connection's end.
  std::string Receive(OwnedFd* fd = nullptr) {
    std::array<char, 64> bytes;
    iovec part = {.iov_base = bytes.data(), .iov_len = bytes.size()};
    alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control = {};
    msghdr message = {};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    const ssize_t count = recvmsg(socket(), &message, MSG_CMSG_CLOEXEC);
    if (const cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr) {
      int number = -1;
      std::memcpy(&number, CMSG_DATA(header), sizeof(number));
      OwnedFd received(number);
      if (fd != nullptr) *fd = std::move(received);
    }
    return {bytes.data(), count < 0 ? 0 : static_cast<size_t>(count)};
  }

 private:
  OwnedFd socket_;
};

class Mapped {
 public:
  Mapped(int fd, int64_t size)
      : size_(static_cast<size_t>(size)),
        data_(static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0))) {
    EXPECT_NE(data_, MAP_FAILED);
  }
  ~Mapped() { munmap(data_, size_); }
  Mapped(const Mapped&) = delete;
  Mapped& operator=(const Mapped&) = delete;
  char* data() const { return data_; }

 private:
  const size_t size_;
  char* const data_;
};

class SharedMemoryTest : public ::testing::Test {
 protected:
  // A connection, and what its client was told that it is called.
  ClientEnd Connect(std::string* name) {
    std::array<int, 2> ends;
    EXPECT_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends.data()), 0);
    ClientEnd client(ends[1]);
    const auto connection = regions_.Connect(OwnedFd(ends[0]));
    EXPECT_TRUE(connection.ok()) << connection.status();
    *name = client.Receive();
    EXPECT_EQ(*name, *connection);
    return client;
  }

  std::string Register(const std::string& connection, int64_t bytes = kSize) {
    const auto region = regions_.Register(connection, kOwner, bytes);
    EXPECT_TRUE(region.ok()) << region.status();
    return region.value_or("");
  }

  static v1::SharedMemory Name(const std::string& region, uint64_t offset, uint64_t length) {
    v1::SharedMemory name;
    name.set_region(region);
    name.set_offset(offset);
    name.set_length(length);
    return name;
  }

  MemoryBudget shared_{8 * kSize, "--shared_memory_budget"};
  MemoryBudget memory_{16 * kSize, "--memory_budget"};
  Regions regions_{&shared_, &memory_, {.max_region_bytes = 4 * kSize, .max_regions = 3}};
};

TEST_F(SharedMemoryTest, TheClientSeesTheSameBytesAndCannotTakeThemAway) {
  std::string connection;
  ClientEnd client = Connect(&connection);
  const std::string region = Register(connection);
  OwnedFd fd;
  EXPECT_EQ(client.Receive(&fd), region);
  const Mapped mapped(fd.get(), kSize);
  const auto bytes = regions_.Find(Name(region, 64, 128), kOwner, "x");
  ASSERT_TRUE(bytes.ok()) << bytes.status();
  bytes->data[0] = 'a';
  mapped.data()[64 + 127] = 'z';
  EXPECT_EQ(mapped.data()[64], 'a');
  EXPECT_EQ(bytes->data[127], 'z');

  EXPECT_EQ(ftruncate(fd.get(), 0), -1);
  EXPECT_EQ(errno, EPERM);
  EXPECT_EQ(ftruncate(fd.get(), 2 * kSize), -1);
  EXPECT_EQ(fcntl(fd.get(), F_ADD_SEALS, F_SEAL_WRITE), -1);
  const std::string path = absl::StrCat("/proc/self/fd/", fd.get());
  const OwnedFd again(open(path.c_str(), O_RDWR | O_TRUNC | O_CLOEXEC));
  EXPECT_LT(again.get(), 0);
  // Holes read as zeros; the mapping stays whole.
  EXPECT_EQ(fallocate(fd.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, kSize), 0);
  EXPECT_EQ(bytes->data[0], 0);
}

TEST_F(SharedMemoryTest, EveryUseIsWithinTheRegion) {
  std::string connection;
  const ClientEnd client = Connect(&connection);
  const std::string region = Register(connection);
  constexpr uint64_t kMost = std::numeric_limits<uint64_t>::max();
  for (const auto& [offset, length] : std::vector<std::pair<uint64_t, uint64_t>>{
           {0, 0}, {0, kSize}, {kSize - 64, 64}, {kSize, 0}, {64, kSize - 64}}) {
    const auto bytes = regions_.Find(Name(region, offset, length), kOwner, "x");
    ASSERT_TRUE(bytes.ok()) << offset << " " << length << " " << bytes.status();
    EXPECT_EQ(bytes->data, bytes->region->data() + offset);
    EXPECT_EQ(bytes->size, length);
  }
  for (const auto& [offset, length, field] :
       std::vector<std::tuple<uint64_t, uint64_t, std::string>>{{0, kSize + 1, "x.length"},
                                                                {64, kSize - 63, "x.length"},
                                                                {kSize, 1, "x.length"},
                                                                {0, kMost, "x.length"},
                                                                {64, kMost - 63, "x.length"},
                                                                {kSize - 64, kMost, "x.length"},
                                                                {kSize + 64, 0, "x.offset"},
                                                                {kMost - 63, 64, "x.offset"},
                                                                {kMost - 63, kMost, "x.offset"},
                                                                {uint64_t{1} << 63, 64, "x.offset"},
                                                                {8, 8, "x.offset"},
                                                                {kMost, 0, "x.offset"}}) {
    const auto bytes = regions_.Find(Name(region, offset, length), kOwner, "x");
    EXPECT_TRUE(absl::IsInvalidArgument(bytes.status())) << offset << " " << length;
    EXPECT_EQ(DetailOf(bytes.status()).field(), field) << offset << " " << length;
  }
}

TEST_F(SharedMemoryTest, ARegionIsForItsOwnerAlone) {
  std::string connection;
  const ClientEnd client = Connect(&connection);
  const std::string region = Register(connection);
  EXPECT_EQ(region.size(), 16u);
  EXPECT_NE(region, connection);
  const auto others = regions_.Find(Name(region, 0, 64), "someone", "x");
  const auto unknown = regions_.Find(Name(std::string(16, 'r'), 0, 64), kOwner, "x");
  EXPECT_TRUE(absl::IsNotFound(others.status()));
  EXPECT_TRUE(absl::IsNotFound(unknown.status()));
  EXPECT_EQ(DetailOf(others.status()).field(), "x.region");
  EXPECT_EQ(DetailOf(others.status()).allowed(), DetailOf(unknown.status()).allowed());
  EXPECT_TRUE(absl::IsNotFound(regions_.Unregister(region, "someone")));
  EXPECT_TRUE(regions_.Unregister(region, kOwner).ok());
  EXPECT_TRUE(absl::IsNotFound(regions_.Unregister(region, kOwner)));
  EXPECT_TRUE(absl::IsNotFound(regions_.Find(Name(region, 0, 64), kOwner, "x").status()));
}

TEST_F(SharedMemoryTest, ARegionOutlivesItsConnectionForTheCallThatUsesIt) {
  std::string connection;
  ClientEnd client = Connect(&connection);
  const std::string region = Register(connection);
  OwnedFd fd;
  client.Receive(&fd);
  const Mapped mapped(fd.get(), kSize);
  mapped.data()[kSize - 1] = 'x';
  {
    const auto in_use = regions_.Find(Name(region, 0, kSize), kOwner, "x");
    ASSERT_TRUE(in_use.ok());
    regions_.Disconnect(connection, /*by_client=*/true);
    EXPECT_TRUE(absl::IsNotFound(regions_.Find(Name(region, 0, 64), kOwner, "x").status()));
    EXPECT_EQ(regions_.usage().connections, 0);
    EXPECT_EQ(regions_.usage().regions, 0);
    // The call's memory is there, and counted.
    EXPECT_EQ(in_use->data[kSize - 1], 'x');
    std::memset(in_use->data, 'y', in_use->size);
    EXPECT_EQ(regions_.usage().bytes, kSize);
    EXPECT_EQ(memory_.in_use(), kSize);
  }
  EXPECT_EQ(regions_.usage().bytes, 0);
  EXPECT_EQ(memory_.in_use(), 0);
  // The pages went, though this client keeps its mapping.
  EXPECT_EQ(mapped.data()[kSize - 1], 0);
  EXPECT_TRUE(absl::IsNotFound(regions_.Register(connection, kOwner, kSize).status()));
}

TEST_F(SharedMemoryTest, AServerThatStopsLeavesAnswersToThoseWhoHoldThem) {
  std::string connection;
  ClientEnd client = Connect(&connection);
  Register(connection);
  OwnedFd fd;
  client.Receive(&fd);
  const Mapped mapped(fd.get(), kSize);
  mapped.data()[0] = 'x';
  regions_.Disconnect(connection, /*by_client=*/false);
  EXPECT_EQ(memory_.in_use(), 0);
  EXPECT_EQ(mapped.data()[0], 'x');
}

TEST_F(SharedMemoryTest, RefusedRegionsTakeNothing) {
  std::string connection;
  const ClientEnd client = Connect(&connection);
  for (const int64_t bytes : {std::numeric_limits<int64_t>::min(), int64_t{-1}, int64_t{0}}) {
    EXPECT_TRUE(absl::IsInvalidArgument(regions_.Register(connection, kOwner, bytes).status()));
  }
  const auto refused = [&](const std::string& of, int64_t bytes) {
    const auto region = regions_.Register(of, kOwner, bytes);
    EXPECT_TRUE(absl::IsResourceExhausted(region.status())) << region.status();
    return DetailOf(region.status()).flag();
  };
  EXPECT_EQ(refused(connection, 4 * kSize + 1), "--max_region_bytes");
  EXPECT_EQ(refused(connection, std::numeric_limits<int64_t>::max()), "--max_region_bytes");
  Register(connection, 4 * kSize);
  Register(connection, 3 * kSize);
  EXPECT_EQ(refused(connection, kSize + 1), "--shared_memory_budget");
  Register(connection, kSize);
  EXPECT_EQ(refused(connection, 1), "--max_regions");
  EXPECT_EQ(shared_.in_use(), 8 * kSize);
  regions_.Disconnect(connection, /*by_client=*/true);

  std::string other;
  const ClientEnd other_client = Connect(&other);
  const auto calls = memory_.Claim(16 * kSize - 1);
  EXPECT_EQ(refused(other, 2), "--memory_budget");
  EXPECT_EQ(shared_.in_use(), 0);
  EXPECT_TRUE(absl::IsNotFound(regions_.Register("nobody", kOwner, 1).status()));
}

// It takes no budget and no packet, and is closed when its last user has gone.
TEST_F(SharedMemoryTest, DeviceMemoryIsForItsOwnerAndOutlivesItsConnectionForTheCallThatUsesIt) {
  std::string connection;
  ClientEnd client = Connect(&connection);
  int open = 0;
  std::array<char, kSize> memory;
  const auto opener = [&]() -> absl::StatusOr<std::shared_ptr<void>> {
    ++open;
    return std::shared_ptr<void>(memory.data(), [&](void*) { --open; });
  };
  const auto region = regions_.RegisterOnDevice(connection, kOwner, kSize, opener);
  ASSERT_TRUE(region.ok()) << region.status();
  EXPECT_EQ(region->size(), 16u);
  EXPECT_EQ(regions_.usage().regions, 1);
  EXPECT_EQ(memory_.in_use(), 0);
  EXPECT_TRUE(absl::IsNotFound(regions_.Find(Name(*region, 0, 64), "someone", "x").status()));
  EXPECT_TRUE(
      absl::IsInvalidArgument(regions_.Find(Name(*region, 64, kSize), kOwner, "x").status()));
  {
    const auto in_use = regions_.Find(Name(*region, 64, 64), kOwner, "x");
    ASSERT_TRUE(in_use.ok());
    EXPECT_TRUE(in_use->on_device());
    EXPECT_EQ(in_use->data, memory.data() + 64);
    regions_.Disconnect(connection, /*by_client=*/true);
    EXPECT_TRUE(absl::IsNotFound(regions_.Find(Name(*region, 0, 64), kOwner, "x").status()));
    EXPECT_EQ(open, 1);
  }
  EXPECT_EQ(open, 0);
  EXPECT_EQ(client.Receive(), "");  // nothing was sent before the end

  // What is refused is not opened, or is closed again.
  EXPECT_TRUE(
      absl::IsNotFound(regions_.RegisterOnDevice(connection, kOwner, kSize, opener).status()));
  const ClientEnd other = Connect(&connection);
  for (int i = 0; i < 3; ++i) {
    EXPECT_TRUE(regions_.RegisterOnDevice(connection, kOwner, kSize, opener).ok());
  }
  EXPECT_EQ(open, 3);
  EXPECT_EQ(DetailOf(regions_.RegisterOnDevice(connection, kOwner, kSize, opener).status()).flag(),
            "--max_regions");
  EXPECT_EQ(open, 3);
  regions_.Disconnect(connection, /*by_client=*/true);
  EXPECT_EQ(open, 0);
}

TEST_F(SharedMemoryTest, AClientThatTakesNothingIsNotWaitedFor) {
  Regions many(&shared_, &memory_, {.max_region_bytes = kSize, .max_regions = 1 << 20});
  std::array<int, 2> ends;
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends.data()), 0);
  const OwnedFd client(ends[1]);
  const auto connection = many.Connect(OwnedFd(ends[0]));
  ASSERT_TRUE(connection.ok());
  absl::Status status;
  int sent = 0;
  while (status.ok() && sent < 100'000) {
    status = many.Register(*connection, kOwner, 1).status();
    sent += status.ok();
  }
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_EQ(shared_.in_use(), sent);
  many.Disconnect(*connection, /*by_client=*/true);
  EXPECT_EQ(shared_.in_use(), 0);
}

class HandOverTest : public SharedMemoryTest {
 protected:
  absl::StatusOr<std::unique_ptr<HandOver>> Listen(absl::Duration idle = absl::Minutes(1)) {
    return HandOver::Listen(path_, &regions_, idle);
  }

  ClientEnd Dial() {
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    path_.copy(address.sun_path, sizeof(address.sun_path) - 1);
    const int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    EXPECT_EQ(connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
    return ClientEnd(fd);
  }

  void AwaitNoConnection() {
    const absl::Time deadline = absl::Now() + absl::Seconds(10);
    while (regions_.usage().connections > 0 && absl::Now() < deadline) {
      absl::SleepFor(absl::Milliseconds(1));
    }
    EXPECT_EQ(regions_.usage().connections, 0);
  }

  TemporaryDirectory directory_;
  const std::string path_ = directory_.path() + "/shared-memory.sock";
};

TEST_F(HandOverTest, IsForItsOwnUserAndGoesWhenItIsDone) {
  struct stat file = {};
  {
    const auto hand_over = Listen();
    ASSERT_TRUE(hand_over.ok()) << hand_over.status();
    ASSERT_EQ(stat(path_.c_str(), &file), 0);
    EXPECT_EQ(file.st_mode & 0777, 0600u);
    EXPECT_TRUE(absl::IsFailedPrecondition(Listen().status()));
  }
  EXPECT_NE(stat(path_.c_str(), &file), 0);
}

TEST_F(HandOverTest, TakesThePlaceOfASocketThatADeadServerLeft) {
  {
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    path_.copy(address.sun_path, sizeof(address.sun_path) - 1);
    const OwnedFd dead(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    ASSERT_EQ(bind(dead.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
  }
  const auto hand_over = Listen();
  ASSERT_TRUE(hand_over.ok()) << hand_over.status();
  EXPECT_EQ(Dial().Receive().size(), 16u);
}

TEST_F(HandOverTest, NeverTakesThePlaceOfAFile) {
  OwnedFd(open(path_.c_str(), O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
  EXPECT_TRUE(absl::IsFailedPrecondition(Listen().status()));
  EXPECT_EQ(access(path_.c_str(), F_OK), 0);
  EXPECT_TRUE(absl::IsFailedPrecondition(
      HandOver::Listen(std::string(200, 'x'), &regions_, absl::Minutes(1)).status()));
}

TEST_F(HandOverTest, AConnectionsEndIsSeen) {
  const auto hand_over = Listen();
  ASSERT_TRUE(hand_over.ok()) << hand_over.status();
  ClientEnd client = Dial();
  const std::string connection = client.Receive();
  Register(connection);
  EXPECT_EQ(memory_.in_use(), kSize);
  client.Close();
  AwaitNoConnection();
  EXPECT_EQ(memory_.in_use(), 0);
}

TEST_F(HandOverTest, AClientThatSpeaksIsCutOff) {
  const auto hand_over = Listen();
  ASSERT_TRUE(hand_over.ok()) << hand_over.status();
  ClientEnd client = Dial();
  const std::string connection = client.Receive();
  Register(connection);
  client.Receive();
  ASSERT_EQ(send(client.socket(), "?", 1, 0), 1);
  AwaitNoConnection();
  EXPECT_EQ(client.Receive(), "");
}

TEST_F(HandOverTest, AConnectionThatWantsNothingIsClosedAndOneWithARegionIsNot) {
  const auto hand_over = Listen(absl::Milliseconds(100));
  ASSERT_TRUE(hand_over.ok()) << hand_over.status();
  ClientEnd with = Dial();
  const std::string connection = with.Receive();
  // Should this one be closed before it has its region, the machine is too slow to tell.
  if (!regions_.Register(connection, kOwner, kSize).ok()) GTEST_SKIP();
  ClientEnd without = Dial();
  without.Receive();
  EXPECT_EQ(without.Receive(), "");
  EXPECT_EQ(regions_.usage().connections, 1);
  EXPECT_TRUE(regions_.HasRegions(connection));
}

}  // namespace
}  // namespace normd
