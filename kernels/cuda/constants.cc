#include "kernels/cuda/constants.h"

#include <algorithm>
#include <iterator>
#include <tuple>
#include <utility>

namespace normd::cuda {
namespace {

constexpr size_t kAlignment = 256;

size_t Rounded(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

Slabs::~Slabs() {
  for (const Slab& slab : slabs_) device_.Free(slab.memory);
}

std::byte* Slabs::Get(size_t bytes) {
  bytes = Rounded(bytes);
  const std::lock_guard lock(mutex_);
  for (Slab& slab : slabs_) {
    for (const auto& [offset, size] : slab.holes) {
      if (size < bytes) continue;
      std::byte* const memory = slab.memory + offset;
      if (size > bytes) slab.holes[offset + bytes] = size - bytes;
      slab.holes.erase(offset);
      return memory;
    }
  }
  const size_t of_slab = std::max(bytes, kSlabBytes);
  void* memory = nullptr;
  if (of_slab > limit_ - bytes_ || device_.Allocate(of_slab, &memory) != Outcome::kOk) {
    return nullptr;
  }
  bytes_ += of_slab;
  Slab& slab = slabs_.emplace_back(Slab{static_cast<std::byte*>(memory), of_slab, {}});
  if (of_slab > bytes) slab.holes[bytes] = of_slab - bytes;
  return slab.memory;
}

void Slabs::Put(std::byte* memory, size_t bytes) {
  bytes = Rounded(bytes);
  const std::lock_guard lock(mutex_);
  for (Slab& slab : slabs_) {
    if (memory < slab.memory || memory >= slab.memory + slab.bytes) continue;
    auto hole = slab.holes.emplace(static_cast<size_t>(memory - slab.memory), bytes).first;
    if (const auto next = std::next(hole);
        next != slab.holes.end() && next->first == hole->first + hole->second) {
      hole->second += next->second;
      slab.holes.erase(next);
    }
    if (hole != slab.holes.begin()) {
      const auto before = std::prev(hole);
      if (before->first + before->second == hole->first) {
        before->second += hole->second;
        slab.holes.erase(hole);
      }
    }
    return;
  }
}

void Slabs::ReleaseEmpty() {
  const std::lock_guard lock(mutex_);
  std::erase_if(slabs_, [this](const Slab& slab) {
    const bool empty = slab.holes.size() == 1 && slab.holes.begin()->second == slab.bytes;
    if (empty) {
      device_.Free(slab.memory);
      bytes_ -= slab.bytes;
    }
    return empty;
  });
}

bool Constants::Key::operator<(const Key& other) const {
  if (owner.owner_before(other.owner)) return true;
  if (other.owner.owner_before(owner)) return false;
  return std::tie(pointer, bytes) < std::tie(other.pointer, other.bytes);
}

Constants::Key Constants::KeyOf(const Block& block) {
  return {block.token, block.token.get(), block.bytes};
}

std::shared_ptr<const Slot> Constants::Find(const Block& block) {
  const std::lock_guard lock(mutex_);
  const auto found = entries_.find(KeyOf(block));
  if (found == entries_.end()) return nullptr;
  uses_.splice(uses_.end(), uses_, found->second.use);
  return found->second.slot;
}

size_t Constants::Missing(const std::vector<Block>& blocks) const {
  size_t missing = 0;
  const std::lock_guard lock(mutex_);
  for (const Block& block : blocks) {
    if (!entries_.contains(KeyOf(block))) missing += block.bytes;
  }
  return missing;
}

void Constants::DropOrphans() {
  reserved_ = 0;
  std::erase_if(entries_, [this](const auto& entry) {
    const bool orphan = entry.first.owner.expired();
    if (orphan) uses_.erase(entry.second.use);
    return orphan;
  });
}

std::shared_ptr<Slot> Constants::Reserve(const Block& block) {
  const std::lock_guard lock(mutex_);
  // No more orphans than others, for a step a block.
  if (++reserved_ > entries_.size()) DropOrphans();
  std::byte* memory = slabs_.Get(block.bytes);
  if (memory == nullptr) {
    DropOrphans();
    memory = slabs_.Get(block.bytes);
  }
  // Twice the room, since that may lie in pieces: not all, where another has the memory.
  for (size_t freed = 0; memory == nullptr && !uses_.empty() && freed < 2 * block.bytes;) {
    freed += uses_.front().bytes;
    entries_.erase(uses_.front());
    uses_.pop_front();
    memory = slabs_.Get(block.bytes);
  }
  if (memory == nullptr) {
    slabs_.ReleaseEmpty();
    memory = slabs_.Get(block.bytes);
  }
  if (memory == nullptr) return nullptr;
  return std::make_shared<Slot>(slabs_, memory, block.bytes);
}

void Constants::Publish(const Block& block, std::shared_ptr<const Slot> slot) {
  const std::lock_guard lock(mutex_);
  const auto [at, fresh] = entries_.try_emplace(KeyOf(block));
  if (!fresh) return;
  at->second = {std::move(slot), uses_.insert(uses_.end(), at->first)};
}

void Constants::Release() {
  const std::lock_guard lock(mutex_);
  entries_.clear();
  uses_.clear();
  slabs_.ReleaseEmpty();
}

}  // namespace normd::cuda
