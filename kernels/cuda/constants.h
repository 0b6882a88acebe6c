// Constants: parameters and statistics that stay on a device from call to call.
#ifndef NORMD_KERNELS_CUDA_CONSTANTS_H_
#define NORMD_KERNELS_CUDA_CONSTANTS_H_

#include <cstddef>
#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cuda/device.h"

namespace normd::cuda {

// Memory for small blocks, which a device gives in large ones: its own calls for that take
// as long as a small kernel, or wait for all others. Thread-safe.
class Slabs {
 public:
  // Of at most `limit` bytes together. `device` must outlive this.
  Slabs(Device& device, size_t limit) : device_(device), limit_(limit) {}
  ~Slabs();
  Slabs(const Slabs&) = delete;
  Slabs& operator=(const Slabs&) = delete;

  // 256-byte aligned; null where there is no room.
  std::byte* Get(size_t bytes);
  void Put(std::byte* memory, size_t bytes);
  // Gives slabs that nobody uses back to the device.
  void ReleaseEmpty();

  static constexpr size_t kSlabBytes = size_t{4} << 20;

 private:
  struct Slab {
    std::byte* memory;
    size_t bytes;
    std::map<size_t, size_t> holes;  // offset and size, no two of them adjacent
  };

  Device& device_;
  const size_t limit_;
  std::mutex mutex_;
  std::list<Slab> slabs_;
  size_t bytes_ = 0;
};

// A place for a block in a device's memory, for as long as this lives.
class Slot {
 public:
  Slot(Slabs& slabs, std::byte* memory, size_t bytes)
      : slabs_(slabs), memory_(memory), bytes_(bytes) {}
  ~Slot() { slabs_.Put(memory_, bytes_); }
  Slot(const Slot&) = delete;
  Slot& operator=(const Slot&) = delete;

  std::byte* memory() const { return memory_; }

 private:
  Slabs& slabs_;
  std::byte* const memory_;
  const size_t bytes_;
};

// A block that lasts: see Token.
struct Block {
  Token token;
  size_t bytes = 0;
};

// Which blocks a device has. A block that is not there travels with the call that needs it,
// which then leaves a copy. Those that lost their owner go as others come, and where there is
// no room those that were not used for the longest time. Thread-safe.
class Constants {
 public:
  Constants(Device& device, size_t limit) : slabs_(device, limit) {}

  // Where the block is, and stays while the answer lives; null: it is not here.
  std::shared_ptr<const Slot> Find(const Block& block);
  // How many bytes of these are not.
  size_t Missing(const std::vector<Block>& blocks) const;

  // A place for a block; null where there is no room.
  std::shared_ptr<Slot> Reserve(const Block& block);
  // The block is there now, for everybody.
  void Publish(const Block& block, std::shared_ptr<const Slot> slot);

  // Gives up all that no call uses.
  void Release();

 private:
  // By identity of the owner, which stays its own while a weak pointer to it is left: an
  // owner that is made where another has died is not taken for that.
  struct Key {
    std::weak_ptr<const void> owner;
    const void* pointer;
    size_t bytes;
    bool operator<(const Key& other) const;
  };
  struct Entry {
    std::shared_ptr<const Slot> slot;
    std::list<Key>::iterator use;
  };
  static Key KeyOf(const Block& block);
  void DropOrphans();

  Slabs slabs_;
  mutable std::mutex mutex_;
  std::map<Key, Entry> entries_;
  std::list<Key> uses_;  // the last one used at the end
  size_t reserved_ = 0;  // since orphans were looked for
};

}  // namespace normd::cuda

#endif  // NORMD_KERNELS_CUDA_CONSTANTS_H_
