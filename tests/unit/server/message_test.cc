// What ParseMessage keeps of a message, and for how long; what WriteMessage makes of an answer.
// That ParseMessage reads what protobuf reads is proven by tests/fuzz/message.cc.
#include "server/wire/message.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/thread_pool.h"
#include "normd/v1/norm_service.pb.h"

namespace normd {
namespace {

using v1::ForwardRequest;

// A message in slices that are counted while they live.
class Counted {
 public:
  Counted(const ForwardRequest& request, size_t slice_bytes) : bytes_(request.SerializeAsString()) {
    std::vector<grpc::Slice> slices;
    for (size_t at = 0; at < bytes_.size(); at += slice_bytes) {
      ++living_;
      slices.emplace_back(
          bytes_.data() + at, std::min(slice_bytes, bytes_.size() - at),
          [](void* living) { --*static_cast<std::atomic<int>*>(living); }, &living_);
    }
    message = grpc::ByteBuffer(slices.data(), slices.size());
  }

  int living() const { return living_; }

 private:
  std::string bytes_;
  std::atomic<int> living_ = 0;

 public:
  grpc::ByteBuffer message;  // destroyed before what it lends
};

ForwardRequest Request(size_t tensor_bytes) {
  ForwardRequest request;
  request.set_name("bn");
  std::string& data = *request.mutable_input()->mutable_data();
  data.resize(tensor_bytes);
  for (size_t i = 0; i < data.size(); ++i) data[i] = static_cast<char>(i * 7);
  return request;
}

absl::Status Parse(grpc::ByteBuffer& message, Payload& payload, BufferPool& pool) {
  const TensorField field{ForwardRequest::kInputFieldNumber, &payload};
  ForwardRequest header;
  ThreadPool executor(2);
  return ParseMessage(message, {&field, 1}, pool, executor, header);
}

TEST(ParseMessage, LeavesNothingOfAMessageThatItGathered) {
  BufferPool pool(0);
  const ForwardRequest request = Request(300'001);
  Counted counted(request, 1000);
  Payload payload;
  ASSERT_TRUE(Parse(counted.message, payload, pool).ok());
  EXPECT_EQ(counted.living(), 0);
  EXPECT_EQ(counted.message.Length(), 0u);
  EXPECT_EQ(std::string(payload.data, payload.size), request.input().data());
}

TEST(ParseMessage, KeepsASliceAsLongAsThePayloadThatLiesInIt) {
  BufferPool pool(0);
  // Where the tensor begins in its slice is not ours to say: one of eight lengths of the name
  // puts it where it may stay.
  bool stayed = false;
  for (int i = 0; i < 8; ++i) {
    ForwardRequest request = Request(1000);
    request.set_name("bn" + std::string(static_cast<size_t>(i), 'x'));
    Counted counted(request, 1 << 20);
    auto payload = std::make_unique<Payload>();
    ASSERT_TRUE(Parse(counted.message, *payload, pool).ok());
    const Payload moved = std::move(*payload);
    payload.reset();
    EXPECT_EQ(std::string(moved.data, moved.size), request.input().data());
    EXPECT_EQ(counted.living(), moved.keep != nullptr ? 1 : 0);
    EXPECT_EQ(moved.keep != nullptr, moved.gathered.buffer.data() == nullptr);
    stayed |= moved.keep != nullptr;
  }
  EXPECT_TRUE(stayed);
}

TEST(ParseMessage, GathersWhatASliceHasWithinItself) {
  BufferPool pool(0);
  for (int i = 0; i < 8; ++i) {
    ForwardRequest request = Request(8);
    request.set_name("b" + std::string(static_cast<size_t>(i), 'x'));
    const std::string bytes = request.SerializeAsString();
    // A slice of its own, of 8 bytes: gRPC has no memory for it but the slice.
    const std::vector<grpc::Slice> slices = {grpc::Slice(bytes.substr(0, bytes.size() - 8)),
                                             grpc::Slice(bytes.substr(bytes.size() - 8))};
    grpc::ByteBuffer message(slices.data(), slices.size());
    Payload payload;
    ASSERT_TRUE(Parse(message, payload, pool).ok());
    EXPECT_EQ(payload.keep, nullptr);
    EXPECT_EQ(std::string(payload.data, payload.size), request.input().data());
  }
}

// An answer with a tensor of `bytes`.
grpc::ByteBuffer Written(BufferPool& pool, size_t bytes, const std::string& context_id) {
  v1::ForwardResponse header;
  header.set_context_id(context_id);
  AnswerTensor tensor{.number = v1::ForwardResponse::kOutputFieldNumber};
  tensor.header.add_shape(static_cast<int64_t>(bytes));
  tensor.data.buffer = pool.Get(bytes);
  std::memset(tensor.data.buffer.data(), 'x', bytes);
  std::vector<AnswerTensor> tensors;
  tensors.push_back(std::move(tensor));
  return WriteMessage(header, std::move(tensors));
}

TEST(WriteMessage, LendsATensorInOneSliceWithItsFieldsWhereTheyHaveRoom) {
  BufferPool pool(size_t{64} << 20);
  struct {
    size_t bytes, context_id_bytes, slices;
  } const cases[] = {{1, 0, 1},
                     {1024, 36, 1},
                     {1024, 500, 2},             // fields longer than the room
                     {size_t{3} << 20, 36, 2}};  // a large buffer, which has none
  for (const auto& [bytes, context_id_bytes, slices] : cases) {
    for (int time = 0; time < 2; ++time) {  // of fresh memory and of idle memory
      const std::string context_id(context_id_bytes, 'c');
      grpc::ByteBuffer message = Written(pool, bytes, context_id);
      std::vector<grpc::Slice> found;
      ASSERT_TRUE(message.Dump(&found).ok());
      EXPECT_EQ(found.size(), slices) << bytes;
      std::string all;
      for (const grpc::Slice& slice : found) {
        all.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
      }
      v1::ForwardResponse response;
      ASSERT_TRUE(response.ParseFromString(all));
      EXPECT_EQ(response.context_id(), context_id);
      EXPECT_EQ(response.output().shape(0), static_cast<int64_t>(bytes));
      EXPECT_EQ(response.output().data(), std::string(bytes, 'x'));
    }
  }
}

}  // namespace
}  // namespace normd
