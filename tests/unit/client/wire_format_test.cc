#include "client/internal/wire_format.h"

#include <algorithm>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "normd/v1/norm_service.pb.h"

namespace normd::inline client::internal {
namespace {

using Response = v1::BackwardStreamResponse;

grpc::ByteBuffer Cut(const std::string& bytes, size_t at) {
  const std::vector<grpc::Slice> slices = {grpc::Slice(bytes.substr(0, at)),
                                           grpc::Slice(bytes.substr(at))};
  return {slices.data(), slices.size()};
}

TEST(TakeBytesOf, FindsTheBytesWhereverTheSlicesAreCut) {
  for (const size_t size : {size_t{0}, size_t{1}, size_t{127}, size_t{300}, size_t{70000}}) {
    Response chunk;
    chunk.set_chunk(std::string(size, 'x'));
    const std::string message = chunk.SerializeAsString();
    for (size_t at = 0; at <= std::min<size_t>(message.size(), 20); ++at) {
      std::string to = "before";
      ASSERT_TRUE(TakeBytesOf(Cut(message, at), Response::kChunkFieldNumber,
                              [&](std::string_view piece) { to += piece; }));
      ASSERT_EQ(to, "before" + chunk.chunk());
    }
  }
}

TEST(TakeBytesOf, TakesNoOtherMessage) {
  Response header;
  header.mutable_header()->set_version(7);
  Response other;
  other.set_grad_residual_chunk("abc");
  Response chunk;
  chunk.set_chunk("abc");
  const std::string message = chunk.SerializeAsString();
  for (const std::string& bytes :
       {header.SerializeAsString(), other.SerializeAsString(), std::string(), message + "y",
        message.substr(0, message.size() - 1), message.substr(0, 1), message + message}) {
    std::string to = "before";
    EXPECT_FALSE(TakeBytesOf(Cut(bytes, bytes.size() / 2), Response::kChunkFieldNumber,
                             [&](std::string_view piece) { to += piece; }));
    EXPECT_EQ(to, "before");
  }
}

}  // namespace
}  // namespace normd::inline client::internal
