// Regions: memory that clients on this host and the server both see, and the connections
// that it lives and dies with.
#ifndef NORMD_SERVER_SHARED_MEMORY_REGIONS_H_
#define NORMD_SERVER_SHARED_MEMORY_REGIONS_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "normd/v1/tensor.pb.h"
#include "server/admission/memory_budget.h"
#include "server/shared_memory/owned_fd.h"

namespace normd {

// One region, there for as long as this lives: memory of the host that the server made, or
// of its GPU that the client has. What follows is about the first. A memfd that can neither shrink
// nor grow (it is sealed), so that every byte of the mapping can be touched whatever the client
// does with its own descriptor. What lies in it may change at any time: nothing that is
// read here may decide where memory is read or written.
class Region {
 public:
  // Whether the system keeps what it has promised: FAILED_PRECONDITION with
  // vm.overcommit_memory=2. There a page that a client has taken out of a region may not
  // be had again, and touching it would end the server.
  static absl::Status CheckSystem();

  // Memory of `claims`' bytes. Also gives the descriptor to send to the client.
  // RESOURCE_EXHAUSTED where the system has no such memory.
  static absl::StatusOr<std::shared_ptr<Region>> Make(int64_t bytes, MemoryClaim shared,
                                                      MemoryClaim memory, OwnedFd& fd);
  // `bytes` of a device's memory, which `memory` keeps open.
  static std::shared_ptr<Region> OnDevice(int64_t bytes, std::shared_ptr<void> memory);
  ~Region();
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  // With on_device(), where the device has it: not to be touched here.
  char* data() const { return data_; }
  uint64_t size() const { return size_; }
  bool on_device() const { return device_memory_ != nullptr; }

  // The client has given the region up: its pages go with the mapping, though the client
  // may have kept one of its own.
  void Abandon() { abandoned_.store(true, std::memory_order_relaxed); }

 private:
  Region(char* data, int64_t bytes, MemoryClaim shared, MemoryClaim memory)
      : data_(data),
        size_(static_cast<uint64_t>(bytes)),
        shared_(std::move(shared)),
        memory_(std::move(memory)) {}

  char* const data_;
  const uint64_t size_;
  std::atomic<bool> abandoned_ = false;
  MemoryClaim shared_;
  MemoryClaim memory_;
  std::shared_ptr<void> device_memory_;
};

// A part of a region, which stays mapped while this lives.
struct SharedBytes {
  std::shared_ptr<Region> region;  // null: none
  v1::SharedMemory name;
  char* data = nullptr;
  size_t size = 0;

  bool on_device() const { return region != nullptr && region->on_device(); }
};

struct RegionLimits {
  int64_t max_region_bytes = 0;
  int64_t max_regions = 0;  // of a connection
};

// Thread-safe.
class Regions {
 public:
  // Every region's bytes are claimed from both budgets, which must outlive all regions.
  Regions(MemoryBudget* shared, MemoryBudget* memory, RegionLimits limits)
      : shared_(shared), memory_(memory), limits_(limits) {}

  // --- for the hand-over ---

  // Takes a connected socket (SOCK_SEQPACKET) and tells its client the connection's name,
  // which it answers. An error where it cannot be told.
  absl::StatusOr<std::string> Connect(OwnedFd socket);
  // Closes the socket, and takes the connection's regions out of the table.
  // `by_client`: it is the client who went.
  void Disconnect(const std::string& connection, bool by_client);
  // Whether the connection has a region.
  bool HasRegions(const std::string& connection) const;

  // --- for calls ---

  // Makes a region for `owner`, sends it through the connection and answers its name.
  // The errors are RegisterSharedMemory's.
  absl::StatusOr<std::string> Register(const std::string& connection, absl::string_view owner,
                                       int64_t bytes);
  // Likewise a region of `bytes` of device memory that `open` opens, which is the client's
  // own: nothing is claimed and nothing sent.
  using OpenDevice = absl::FunctionRef<absl::StatusOr<std::shared_ptr<void>>()>;
  absl::StatusOr<std::string> RegisterOnDevice(const std::string& connection,
                                               absl::string_view owner, int64_t bytes,
                                               OpenDevice open);
  // NOT_FOUND where there is no such region of `owner`.
  absl::Status Unregister(const std::string& region, absl::string_view owner);
  // The bytes that `name` says. INVALID_ARGUMENT or NOT_FOUND, with `field` naming the
  // one at fault.
  absl::StatusOr<SharedBytes> Find(const v1::SharedMemory& name, absl::string_view owner,
                                   absl::string_view field) const;

  struct Usage {
    int64_t connections = 0;
    int64_t regions = 0;
    int64_t bytes = 0;  // those that calls still use too
  };
  Usage usage() const;
  const RegionLimits& limits() const { return limits_; }
  int64_t budget() const { return shared_->limit(); }

 private:
  struct Connection {
    OwnedFd socket;
    absl::flat_hash_set<std::string> regions;
    int64_t making = 0;  // regions that are to come
  };
  struct Entry {
    std::shared_ptr<Region> region;
    std::string owner;
    std::string connection;
  };

  absl::Status BeginRegion(const std::string& connection);
  // Begins a region and ends with Add() what make(fd) answers; a descriptor that it sets is
  // sent.
  using Make = absl::FunctionRef<absl::StatusOr<std::shared_ptr<Region>>(OwnedFd& fd)>;
  absl::StatusOr<std::string> AddNew(const std::string& connection, absl::string_view owner,
                                     Make make);
  absl::StatusOr<std::string> Add(const std::string& connection, absl::string_view owner,
                                  std::shared_ptr<Region> region, OwnedFd fd);

  MemoryBudget* const shared_;
  MemoryBudget* const memory_;
  const RegionLimits limits_;
  mutable absl::Mutex mutex_;
  absl::flat_hash_map<std::string, Connection> connections_ ABSL_GUARDED_BY(mutex_);
  absl::flat_hash_map<std::string, Entry> regions_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace normd

#endif  // NORMD_SERVER_SHARED_MEMORY_REGIONS_H_
