// Memory that the client shares with a server on its host.
#ifndef NORMD_CLIENT_INTERNAL_SHARED_MEMORY_H_
#define NORMD_CLIENT_INTERNAL_SHARED_MEMORY_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "client/normd_client.h"
#include "normd/v1/tensor.pb.h"

namespace normd::inline client::internal {

class Connection;

// A region of the server's that is mapped here.
struct Block {
  Block(std::string region, char* data, size_t size)
      : region(std::move(region)), data(data), size(size) {}
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  const std::string region;
  char* const data;
  const size_t size;
};

// The blocks of one connection to the server's socket. Leases keep it: the server takes
// its memory back when the socket is closed.
class BlockPool;

// A block for one user. Goes back to its pool with this.
class Lease {
 public:
  Lease(std::unique_ptr<Block> block, std::shared_ptr<BlockPool> pool)
      : block_(std::move(block)), pool_(std::move(pool)) {}
  ~Lease();
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

  char* data() const { return block_->data; }
  // What the server calls the first `bytes`.
  v1::SharedMemory Name(size_t bytes) const;
  // The server may still read or write there: the block is not to be used again.
  void Discard() { discard_ = true; }

 private:
  std::unique_ptr<Block> block_;
  const std::shared_ptr<BlockPool> pool_;
  std::atomic<bool> discard_ = false;
};

// Memory that this process has on the server's GPU. Taken back from the server with this.
class CudaRegion {
 public:
  CudaRegion(std::shared_ptr<Connection> connection, std::shared_ptr<BlockPool> pool,
             std::string name)
      : connection_(std::move(connection)), pool_(std::move(pool)), name_(std::move(name)) {}
  ~CudaRegion();
  CudaRegion(const CudaRegion&) = delete;
  CudaRegion& operator=(const CudaRegion&) = delete;

  // What the server calls it.
  const std::string& name() const { return name_; }

 private:
  const std::shared_ptr<Connection> connection_;
  const std::shared_ptr<BlockPool> pool_;  // the region lives as long as its socket
  const std::string name_;
};

// Thread-safe.
class SharedMemoryPool {
 public:
  // For the connection's calls; it outlives this.
  SharedMemoryPool(Connection* connection, const std::string& target);

  // Whether a call with so many bytes of tensor should try.
  bool Wants(size_t bytes) const;
  // Whether a call that cannot may go without.
  bool must() const;

  // A block of `bytes` or more. Asks the server for one where none is idle; an error says
  // why there is none.
  absl::StatusOr<std::shared_ptr<Lease>> Get(size_t bytes, absl::Time deadline);
  // Where the bytes are for the server, if they lie in a block of this pool.
  std::optional<v1::SharedMemory> Find(std::string_view bytes) const;

  // Has the server open memory that this process has on its GPU, for as long as the answer
  // lives. `self` is the connection that this belongs to.
  absl::StatusOr<std::shared_ptr<const CudaRegion>> RegisterCuda(std::shared_ptr<Connection> self,
                                                                 std::string_view ipc_handle,
                                                                 int64_t bytes,
                                                                 absl::Time deadline);

  // Whether `status` says that the server does not know our memory: it has been restarted,
  // or is another. The memory is forgotten then, and the call may be made without it.
  bool ForgetIfLost(const absl::Status& status);

 private:
  absl::StatusOr<std::shared_ptr<BlockPool>> Open(absl::Time deadline)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(asking_);
  absl::StatusOr<std::unique_ptr<Block>> Ask(BlockPool& pool, size_t bytes, absl::Time deadline)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(asking_);
  std::shared_ptr<BlockPool> pool() const;
  void Forget(const std::shared_ptr<BlockPool>& pool);

  Connection* const connection_;
  const bool local_;

  // Held while the server is asked: descriptors come in the order of the requests.
  absl::Mutex asking_;
  absl::Time ask_again_ ABSL_GUARDED_BY(asking_) = absl::InfinitePast();
  absl::Status refused_ ABSL_GUARDED_BY(asking_);  // until then

  mutable absl::Mutex mutex_;
  std::shared_ptr<BlockPool> pool_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace normd::inline client::internal

#endif  // NORMD_CLIENT_INTERNAL_SHARED_MEMORY_H_
