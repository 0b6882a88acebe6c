#include "server/wire/message.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "absl/container/inlined_vector.h"
#include "google/protobuf/io/coded_stream.h"
#include "google/protobuf/io/zero_copy_stream_impl_lite.h"
#include "normd/v1/tensor.pb.h"
#include "server/error/error.h"

namespace normd {
namespace {

using google::protobuf::io::CodedInputStream;
using google::protobuf::io::CodedOutputStream;

// The protobuf wire format (https://protobuf.dev/programming-guides/encoding/): a
// field is a tag, number << 3 | wire type, and a value in the form of its type.
enum WireType : uint32_t { kVarint = 0, kFixed64 = 1, kLength = 2, kFixed32 = 5 };

constexpr size_t kAlignment = alignof(double);

uint32_t MakeTag(int number, WireType type) { return static_cast<uint32_t>(number) << 3 | type; }

absl::Status Malformed() {
  return InvalidField("request", "malformed", "a protobuf message of the method's request type");
}

// Protobuf's parser takes tags and lengths of up to five bytes, CodedInputStream longer
// ones too. 0: no tag, as there.
constexpr int kLongestVarint32 = 5;

uint32_t ReadTag(CodedInputStream& in) {
  const int begin = in.CurrentPosition();
  const uint32_t tag = in.ReadTag();
  return in.CurrentPosition() - begin <= kLongestVarint32 ? tag : 0;
}

bool ReadSize(CodedInputStream& in, uint32_t& size) {
  const int begin = in.CurrentPosition();
  return in.ReadVarint32(&size) && in.CurrentPosition() - begin <= kLongestVarint32;
}

void AppendVarint(uint64_t value, std::string& out) {
  std::array<uint8_t, 10> bytes;
  const uint8_t* end = CodedOutputStream::WriteVarint64ToArray(value, bytes.data());
  out.append(reinterpret_cast<const char*>(bytes.data()), static_cast<size_t>(end - bytes.data()));
}

// In pieces, as they lie: nothing is allocated for bytes that are not there.
bool CopyBytes(CodedInputStream& in, uint32_t size, std::string& out) {
  while (size > 0) {
    const void* piece = nullptr;
    int available = 0;
    if (!in.GetDirectBufferPointer(&piece, &available) || available <= 0) return false;
    const uint32_t taken = std::min(size, static_cast<uint32_t>(available));
    out.append(static_cast<const char*>(piece), taken);
    if (!in.Skip(static_cast<int>(taken))) return false;
    size -= taken;
  }
  return true;
}

// Copies the value of a field that began with `tag`, and the tag, to `out`.
bool CopyField(CodedInputStream& in, uint32_t tag, std::string& out) {
  AppendVarint(tag, out);
  switch (tag & 7) {
    case kVarint: {
      uint64_t value = 0;
      if (!in.ReadVarint64(&value)) return false;
      AppendVarint(value, out);
      return true;
    }
    case kFixed64: return CopyBytes(in, 8, out);
    case kFixed32: return CopyBytes(in, 4, out);
    case kLength: {
      uint32_t size = 0;
      if (!ReadSize(in, size)) return false;
      AppendVarint(size, out);
      return CopyBytes(in, size, out);
    }
    default: return false;  // groups, which proto3 does not have
  }
}

// The slices of a message, let go of as those after them are read, some at a time.
//
// The last reference to memory that gRPC has received must be a ByteBuffer's: to drop it takes
// a context that gRPC 1.51 does not make for a Slice, and near the resource quota it crashes
// without.
class SliceStream final : public google::protobuf::io::ZeroCopyInputStream {
 public:
  // Empties `message`.
  explicit SliceStream(grpc::ByteBuffer& message) {
    if (!message.Dump(&slices_).ok()) return;
    if (slices_.size() <= kPart) {
      parts_.emplace_back().Swap(&message);
      part_ = 1;
      return;
    }
    parts_.reserve(slices_.size() / kPart + 1);
    for (size_t begin = 0; begin < slices_.size(); begin += kPart) {
      parts_.emplace_back(slices_.data() + begin, std::min(kPart, slices_.size() - begin));
    }
    slices_.clear();
    message.Clear();
  }

  // What keeps the bytes that were read last where they are; null where nothing can.
  std::shared_ptr<const void> KeepLast() const {
    const grpc::Slice& last = slices_[next_ - 1];
    // A slice of a few bytes has them within itself.
    if (grpc::Slice(last).begin() != last.begin()) return nullptr;
    return std::make_shared<grpc::ByteBuffer>(&last, 1);
  }

  bool Next(const void** data, int* size) override {
    while (backed_up_ == 0) {
      while (next_ == slices_.size()) {
        if (!NextPart()) return false;
      }
      backed_up_ = slices_[next_++].size();
    }
    *data = slices_[next_ - 1].end() - backed_up_;
    *size = static_cast<int>(std::exchange(backed_up_, 0));
    count_ += *size;
    return true;
  }
  void BackUp(int count) override {
    backed_up_ = static_cast<size_t>(count);
    count_ -= count;
  }
  // From here on what is skipped is copied, too: to `sink` and on from there, by the threads
  // of `executor`. Null: no more.
  void CopySkipped(char* sink, Executor* executor) {
    sink_ = sink;
    executor_ = executor;
  }
  bool Skip(int count) override {
    while (count > 0) {
      if (backed_up_ == 0 && next_ == slices_.size()) count -= SkipParts(count);
      const void* data = nullptr;
      int size = 0;
      if (count == 0 || !Next(&data, &size)) break;
      if (size > count) BackUp(size - count);
      const int taken = std::min(count, size);
      if (sink_ != nullptr) {
        std::memcpy(sink_, data, static_cast<size_t>(taken));
        sink_ += taken;
      }
      count -= taken;
    }
    return count == 0 && !broken_.load(std::memory_order_relaxed);
  }
  int64_t ByteCount() const override { return count_; }

 private:
  static constexpr size_t kPart = 64;  // slices of up to 16 KiB, as HTTP/2 frames them

  // The part that has been read; its slices first.
  void DropPart() {
    slices_.clear();
    next_ = 0;
    if (part_ > 0) parts_[part_ - 1].Clear();
  }

  bool NextPart() {
    DropPart();
    return part_ < parts_.size() && parts_[part_++].Dump(&slices_).ok();
  }

  // Whole parts of the next `count` bytes; answers how many bytes these were.
  int SkipParts(int count) {
    if (sink_ == nullptr) return 0;
    DropPart();
    std::vector<size_t> offsets = {0};
    while (part_ + offsets.size() <= parts_.size()) {
      const size_t end = offsets.back() + parts_[part_ + offsets.size() - 1].Length();
      if (end > static_cast<size_t>(count)) break;
      offsets.push_back(end);
    }
    const size_t parts = offsets.size() - 1;
    executor_->ParallelFor(static_cast<int64_t>(parts), [&](int64_t k) {
      grpc::ByteBuffer& part = parts_[part_ + static_cast<size_t>(k)];
      std::vector<grpc::Slice> slices;
      if (!part.Dump(&slices).ok()) {
        broken_.store(true, std::memory_order_relaxed);
        return;
      }
      char* to = sink_ + offsets[static_cast<size_t>(k)];
      for (const grpc::Slice& slice : slices) {
        std::memcpy(to, slice.begin(), slice.size());
        to += slice.size();
      }
      slices.clear();
      part.Clear();
    });
    part_ += parts;
    sink_ += offsets.back();
    count_ += static_cast<int64_t>(offsets.back());
    return static_cast<int>(offsets.back());
  }

  absl::InlinedVector<grpc::ByteBuffer, 1> parts_;
  char* sink_ = nullptr;
  Executor* executor_ = nullptr;
  std::atomic<bool> broken_ = false;  // gRPC did not give a part's slices
  size_t part_ = 0;                   // the next
  std::vector<grpc::Slice> slices_;   // of the one before; destroyed before parts_
  size_t next_ = 0;                   // of slices_
  size_t backed_up_ = 0;              // bytes of the slice before that are to be read again
  int64_t count_ = 0;
};

// Takes the next `size` bytes, which are known to be there.
absl::Status TakePayload(SliceStream& slices, CodedInputStream& in, int size, BufferPool& pool,
                         Executor& executor, Payload& payload) {
  payload = Payload();
  payload.size = static_cast<size_t>(size);
  if (size == 0) return absl::OkStatus();
  const void* piece = nullptr;
  int available = 0;
  if (in.GetDirectBufferPointer(&piece, &available) && available >= size &&
      reinterpret_cast<uintptr_t>(piece) % kAlignment == 0) {
    payload.keep = slices.KeepLast();
    if (payload.keep != nullptr) {
      payload.data = static_cast<const char*>(piece);
      return in.Skip(size) ? absl::OkStatus() : Malformed();
    }
  }
  payload.gathered.buffer = pool.Get(payload.size);
  if (payload.gathered.buffer.data() == nullptr) {
    return absl::ResourceExhaustedError("the server has no memory for the request's tensor");
  }
  char* const to = payload.gathered.buffer.data();
  payload.data = to;
  // What `in` has at hand, and then past it.
  const int at_hand = std::min(available, size);
  if (at_hand > 0) std::memcpy(to, piece, static_cast<size_t>(at_hand));
  slices.CopySkipped(to + at_hand, &executor);
  const bool there = in.Skip(size);
  slices.CopySkipped(nullptr, nullptr);
  return there ? absl::OkStatus() : Malformed();
}

// Reads the fields of a Tensor up to the stream's limit.
absl::Status ReadTensor(SliceStream& slices, CodedInputStream& in, BufferPool& pool,
                        Executor& executor, std::string& header, Payload& payload) {
  const uint32_t data_tag = MakeTag(v1::Tensor::kDataFieldNumber, kLength);
  while (in.BytesUntilLimit() > 0) {
    const uint32_t tag = ReadTag(in);
    if (tag == data_tag) {
      uint32_t size = 0;
      if (!ReadSize(in, size) || size > static_cast<uint32_t>(in.BytesUntilLimit())) {
        return Malformed();
      }
      absl::Status taken = TakePayload(slices, in, static_cast<int>(size), pool, executor, payload);
      if (!taken.ok()) return taken;
    } else if (tag == 0 || !CopyField(in, tag, header)) {
      return Malformed();
    }
  }
  return absl::OkStatus();
}

// `lent`, with `front` before it: in one slice, where the buffer has room for it.
void AppendLent(const std::string& front, ClaimedBuffer lent,
                absl::InlinedVector<grpc::Slice, 2>& slices) {
  char* begin = lent.buffer.data();
  size_t size = lent.buffer.size();
  if (front.size() <= lent.buffer.room_in_front()) {
    begin -= front.size();
    size += front.size();
    std::memcpy(begin, front.data(), front.size());
  } else {
    slices.emplace_back(front);
  }
  slices.emplace_back(
      begin, size, [](void* pointer) { delete static_cast<ClaimedBuffer*>(pointer); },
      new ClaimedBuffer(std::move(lent)));
}

}  // namespace

absl::Status ParseMessage(grpc::ByteBuffer& message, absl::Span<const TensorField> fields,
                          BufferPool& pool, Executor& executor,
                          google::protobuf::MessageLite& header) {
  const size_t total = message.Length();
  if (total > std::numeric_limits<int>::max()) return Malformed();
  SliceStream slices(message);
  CodedInputStream in(&slices);
  in.PushLimit(static_cast<int>(total));

  std::string fields_but_data;
  fields_but_data.reserve(128);
  while (in.BytesUntilLimit() > 0) {
    const uint32_t tag = ReadTag(in);
    const auto field = std::find_if(fields.begin(), fields.end(), [tag](const TensorField& f) {
      return tag == MakeTag(f.number, kLength);
    });
    if (field == fields.end()) {
      if (tag == 0 || !CopyField(in, tag, fields_but_data)) return Malformed();
      continue;
    }
    uint32_t size = 0;
    if (!ReadSize(in, size) || size > static_cast<uint32_t>(in.BytesUntilLimit())) {
      return Malformed();
    }
    std::string tensor;
    const CodedInputStream::Limit outer = in.PushLimit(static_cast<int>(size));
    absl::Status read = ReadTensor(slices, in, pool, executor, tensor, *field->payload);
    if (!read.ok()) return read;
    in.PopLimit(outer);
    AppendVarint(tag, fields_but_data);
    AppendVarint(tensor.size(), fields_but_data);
    fields_but_data += tensor;
  }
  if (!header.ParseFromString(fields_but_data)) return Malformed();
  return absl::OkStatus();
}

grpc::ByteBuffer WriteMessage(const google::protobuf::MessageLite& header,
                              std::vector<AnswerTensor> tensors) {
  absl::InlinedVector<grpc::Slice, 2> slices;
  std::string front = header.SerializeAsString();
  for (AnswerTensor& tensor : tensors) {
    const size_t size = tensor.data.buffer.size();
    std::string fields = tensor.header.SerializeAsString();
    if (size > 0) {
      AppendVarint(MakeTag(v1::Tensor::kDataFieldNumber, kLength), fields);
      AppendVarint(size, fields);
    }
    AppendVarint(MakeTag(tensor.number, kLength), front);
    AppendVarint(fields.size() + size, front);
    front += fields;
    if (size == 0) continue;
    AppendLent(front, std::move(tensor.data), slices);
    front.clear();
  }
  if (!front.empty() || slices.empty()) slices.emplace_back(front);
  return {slices.data(), slices.size()};
}

std::optional<Chunk> Chunk::Of(const grpc::ByteBuffer& message, absl::Span<const int> numbers) {
  Chunk chunk;
  chunk.message_ = message;
  if (!message.Dump(&chunk.slices_).ok()) return std::nullopt;
  // Tag and length, wherever the slices are cut: ten bytes at most.
  std::array<uint8_t, 10> front;
  size_t filled = 0;
  for (const grpc::Slice& slice : chunk.slices_) {
    const size_t more = std::min(front.size() - filled, slice.size());
    std::memcpy(front.data() + filled, slice.begin(), more);
    filled += more;
    if (filled == front.size()) break;
  }
  CodedInputStream in(front.data(), static_cast<int>(filled));
  const uint32_t tag = ReadTag(in);
  uint32_t size = 0;
  if (tag == 0 || !ReadSize(in, size)) return std::nullopt;
  const auto number = std::find_if(numbers.begin(), numbers.end(),
                                   [tag](int n) { return tag == MakeTag(n, kLength); });
  chunk.offset_ = static_cast<size_t>(in.CurrentPosition());
  chunk.size_ = size;
  if (number == numbers.end() || message.Length() != chunk.offset_ + chunk.size_) {
    return std::nullopt;
  }
  chunk.number_ = *number;
  return chunk;
}

Chunk Chunk::Of(int number, const std::string& bytes) {
  Chunk chunk;
  chunk.number_ = number;
  chunk.size_ = bytes.size();
  chunk.slices_.emplace_back(bytes);
  return chunk;
}

void Chunk::Copy(size_t from, size_t count, char* to) const {
  size_t skip = offset_ + from;
  for (const grpc::Slice& slice : slices_) {
    if (count == 0) break;
    const size_t skipped = std::min(skip, slice.size());
    skip -= skipped;
    const size_t bytes = std::min(count, slice.size() - skipped);
    if (bytes > 0) std::memcpy(to, slice.begin() + skipped, bytes);
    to += bytes;
    count -= bytes;
  }
}

grpc::ByteBuffer WriteChunk(int number, const char* data, size_t size, std::shared_ptr<void> keep) {
  std::string front;
  AppendVarint(MakeTag(number, kLength), front);
  AppendVarint(size, front);
  const std::array slices = {
      grpc::Slice(front),
      grpc::Slice(
          const_cast<char*>(data), size,
          [](void* pointer) { delete static_cast<std::shared_ptr<void>*>(pointer); },
          new std::shared_ptr<void>(std::move(keep)))};
  return {slices.data(), slices.size()};
}

}  // namespace normd
