// The ReLU's mask, a bit an element, read and written a vector at a time from any
// bit on.
#if defined(NORMD_KERNELS_CPU_RELU_MASK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef NORMD_KERNELS_CPU_RELU_MASK_INL_H_
#undef NORMD_KERNELS_CPU_RELU_MASK_INL_H_
#else
#define NORMD_KERNELS_CPU_RELU_MASK_INL_H_
#endif

#include <atomic>
#include <cstdint>
#include <cstring>

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace normd::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Lanes(d) bits from bit `index` on. Reads 8 bytes: see ReluMaskBytes().
template <class D>
HWY_INLINE hn::Mask<D> ReadMask(D d, const uint8_t* mask, int64_t index) {
  uint64_t word;
  std::memcpy(&word, mask + index / 8, sizeof(word));
  word >>= index % 8;
  return hn::LoadMaskBits(d, reinterpret_cast<const uint8_t*>(&word));
}

template <class D>
HWY_INLINE uint64_t BitsOf(D d, hn::Mask<D> mask) {
  uint64_t word = 0;
  hn::StoreMaskBits(d, mask, reinterpret_cast<uint8_t*>(&word));
  return word;
}

// Writes the bits of consecutive elements. Only the bytes at both ends of a range
// may belong to another thread's range too; they are changed atomically.
class MaskWriter {
 public:
  void Begin(uint8_t* mask, int64_t index) {
    to_ = mask == nullptr ? nullptr : mask + index / 8;
    filled_ = static_cast<unsigned>(index % 8);
    foreign_ = filled_;
    bits_ = 0;
  }

  bool IsWanted() const { return to_ != nullptr; }

  // `count` <= 32 bits, zeros above.
  HWY_INLINE void Append(uint64_t bits, size_t count) {
    if (to_ == nullptr) return;
    bits_ |= bits << filled_;
    if (count % 8 == 0 && foreign_ == 0) {  // whole bytes; what is left keeps its place
      std::memcpy(to_, &bits_, count / 8);
      to_ += count / 8;
      bits_ >>= count;
      return;
    }
    filled_ += static_cast<unsigned>(count);
    if (foreign_ != 0 && filled_ >= 8) {
      SetBits(foreign_, 8);
      Drop();
      foreign_ = 0;
    }
    while (filled_ >= 8 && foreign_ == 0) {
      *to_ = static_cast<uint8_t>(bits_);
      Drop();
    }
  }

  void End() {
    if (to_ != nullptr && filled_ > foreign_) SetBits(foreign_, filled_);
    to_ = nullptr;
  }

 private:
  void Drop() {
    ++to_;
    bits_ >>= 8;
    filled_ -= 8;
  }

  // Bits [first, last) of the current byte.
  void SetBits(unsigned first, unsigned last) {
    const auto own = static_cast<uint8_t>((0xff << first) & (0xff >> (8 - last)));
    std::atomic_ref<uint8_t> byte(*to_);
    byte.fetch_and(static_cast<uint8_t>(~own), std::memory_order_relaxed);
    byte.fetch_or(static_cast<uint8_t>(bits_ & own), std::memory_order_relaxed);
  }

  uint8_t* to_ = nullptr;
  uint64_t bits_ = 0;
  unsigned filled_ = 0;   // bits in bits_, foreign_ included
  unsigned foreign_ = 0;  // low bits of the first byte that are not ours
};

}  // namespace normd::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
