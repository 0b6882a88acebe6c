// ParseMessage takes what protobuf's own parser takes, and reads the same in it, wherever
// the message is cut into slices. The first byte picks the method and how it is cut.
#include "server/wire/message.h"

#include <algorithm>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "google/protobuf/stubs/logging.h"
#include "google/protobuf/unknown_field_set.h"
#include "normd/v1/norm_service.pb.h"

namespace {

using google::protobuf::Message;
using google::protobuf::UnknownField;
using google::protobuf::UnknownFieldSet;
using normd::v1::Tensor;

void Check(bool holds) {
  if (!holds) std::abort();
}

// Groups were gone before proto3: protobuf skips unknown ones, ParseMessage refuses them.
bool HasGroup(const UnknownFieldSet& fields) {
  for (int i = 0; i < fields.field_count(); ++i) {
    if (fields.field(i).type() == UnknownField::TYPE_GROUP) return true;
  }
  return false;
}
bool HasGroup(const Message& message) {
  const google::protobuf::Reflection* reflection = message.GetReflection();
  if (HasGroup(reflection->GetUnknownFields(message))) return true;
  std::vector<const google::protobuf::FieldDescriptor*> fields;
  reflection->ListFields(message, &fields);
  for (const auto* field : fields) {
    if (field->cpp_type() == google::protobuf::FieldDescriptor::CPPTYPE_MESSAGE &&
        !field->is_repeated() && HasGroup(reflection->GetMessage(message, field))) {
      return true;
    }
  }
  return false;
}

// Slices whose sizes follow from `seed`: some empty, some of a byte, some long.
grpc::ByteBuffer Cut(const std::string& bytes, uint32_t seed) {
  std::vector<grpc::Slice> slices;
  for (size_t at = 0; at < bytes.size();) {
    seed = seed * 1664525 + 1013904223;
    const size_t size =
        std::min<size_t>((seed >> 24) % 3 == 0 ? seed >> 20 & 1 : seed >> 24, bytes.size() - at);
    slices.emplace_back(bytes.data() + at, size);
    at += size;
  }
  return {slices.data(), slices.size()};
}

// `number` and its tensor in `whole`.
using Field = std::pair<int, Tensor* (*)(Message&)>;

template <class Request>
void Compare(const std::string& bytes, uint32_t seed, const std::vector<Field>& fields) {
  normd::BufferPool pool(1 << 20);
  grpc::ByteBuffer cut = Cut(bytes, seed);
  std::vector<normd::Payload> payloads(fields.size());
  std::vector<normd::TensorField> wanted;
  for (size_t i = 0; i < fields.size(); ++i) wanted.push_back({fields[i].first, &payloads[i]});
  Request header, whole;
  normd::SerialExecutor executor;
  const absl::Status read = normd::ParseMessage(cut, wanted, pool, executor, header);
  const bool valid = whole.ParseFromString(bytes);
  Check(read.ok() || absl::IsInvalidArgument(read));
  if (!read.ok()) {
    Check(!valid || HasGroup(whole));
    return;
  }
  Check(valid);
  for (size_t i = 0; i < fields.size(); ++i) {
    Tensor* of_header = fields[i].second(header);
    Tensor* of_whole = fields[i].second(whole);
    Check((of_header == nullptr) == (of_whole == nullptr));
    if (of_whole == nullptr) {
      Check(payloads[i].size == 0);
      continue;
    }
    Check(of_header->data().empty());
    Check(of_whole->data() == std::string(payloads[i].data, payloads[i].size));
    Check(reinterpret_cast<uintptr_t>(payloads[i].data) % alignof(double) == 0);
    of_whole->clear_data();
  }
  // As text: NaN is equal to NaN there.
  Check(header.DebugString() == whole.DebugString());
}

template <class Request, bool (Request::*has)() const, Tensor* (Request::*get)()>
Tensor* Get(Message& message) {
  auto& request = static_cast<Request&>(message);
  return (request.*has)() ? (request.*get)() : nullptr;
}

// A stream's chunk, as it lies in the slices and as protobuf has it.
void CompareChunk(const std::string& bytes, uint32_t seed) {
  const grpc::ByteBuffer cut = Cut(bytes, seed);
  const auto chunk = normd::Chunk::Of(cut, {14, 15});
  if (!chunk) return;
  normd::v1::ForwardStreamRequest whole;
  Check(whole.ParseFromString(bytes));
  const std::string& expected = chunk->number() == 15 ? whole.chunk() : whole.residual_chunk();
  Check(chunk->size() == expected.size());
  std::string copied(chunk->size(), '\0');
  const size_t middle = chunk->size() / 2;
  chunk->Copy(middle, chunk->size() - middle, copied.data() + middle);
  chunk->Copy(0, middle, copied.data());
  Check(copied == expected);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  google::protobuf::SetLogHandler(nullptr);  // of invalid UTF-8
  const std::string bytes(reinterpret_cast<const char*>(data) + 1, size - 1);
  using Forward = normd::v1::ForwardRequest;
  using Backward = normd::v1::BackwardRequest;
  const uint32_t seed = data[0];
  switch (seed % 3) {
    case 0:
      Compare<Forward>(bytes, seed,
                       {{15, Get<Forward, &Forward::has_input, &Forward::mutable_input>},
                        {14, Get<Forward, &Forward::has_residual, &Forward::mutable_residual>}});
      break;
    case 1:
      Compare<Backward>(
          bytes, seed,
          {{14, Get<Backward, &Backward::has_input, &Backward::mutable_input>},
           {15, Get<Backward, &Backward::has_grad_output, &Backward::mutable_grad_output>}});
      break;
    default: CompareChunk(bytes, seed); break;
  }
  return 0;
}
