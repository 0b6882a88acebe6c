// Arriving: memory that fills as the chunks of a stream come.
#ifndef NORMD_SERVER_SERVICE_ARRIVING_H_
#define NORMD_SERVER_SERVICE_ARRIVING_H_

#include <cstddef>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "normd/v1/tensor.pb.h"
#include "server/service/core.h"
#include "server/service/validate.h"
#include "server/wire/buffer.h"
#include "server/wire/message.h"

namespace normd {

// A known number of bytes, of which none is there at first. Memory is claimed as they
// come, in steps, and not because someone has announced them.
class ArrivingBytes {
 public:
  explicit ArrivingBytes(size_t size = 0) : size_(size) {}

  size_t size() const { return size_; }
  size_t received() const { return received_; }
  size_t missing() const { return size_ - received_; }

  // Appends `count` bytes of `chunk` from the `from`-th on; at most missing() of them.
  // RESOURCE_EXHAUSTED where the budget has no room for them.
  absl::Status Add(Core& core, const Chunk& chunk, size_t from, size_t count);

  // Precondition: missing() == 0, but for the destructor's sake none.
  ClaimedBuffer& memory() { return memory_; }

 private:
  absl::Status Grow(Core& core, size_t count);

  size_t size_;
  size_t received_ = 0;
  ClaimedBuffer memory_;
};

// How much of a tensor has come in chunks, and what is wrong with that.
class ArrivingTensor {
 public:
  // `header` names type and shape alone; `field` names it in errors.
  absl::Status Begin(const v1::Tensor& header, absl::string_view field);
  // Whether the tensor could ever be kept: RESOURCE_EXHAUSTED where it is larger than
  // the whole budget.
  absl::Status CheckFits(Core& core) const;

  // Counts a chunk of `bytes`: INVALID_ARGUMENT past the end.
  absl::Status Take(size_t bytes);
  // INVALID_ARGUMENT before the end.
  absl::Status End() const;

  size_t size() const { return size_; }
  int64_t received() const { return static_cast<int64_t>(received_); }

 private:
  absl::Status WrongSize(absl::string_view found) const;

  std::string field_;
  size_t size_ = 0;
  size_t received_ = 0;
};

}  // namespace normd

#endif  // NORMD_SERVER_SERVICE_ARRIVING_H_
