#include "formats/safetensors.h"

#include <gtest/gtest.h>

namespace normd {
namespace {

// A file of this header, whatever it claims, and these data.
std::string FileOf(std::string_view header, std::string_view data = "") {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes += static_cast<char>(uint64_t{header.size()} >> (8 * i));
  bytes += header;
  bytes += data;
  return bytes;
}

std::string TwoTensors() {
  return WriteSafetensors(
      {.metadata = {{"format", "pt"}, {"quotes", "\"\\\n\t\x01 \xc3\xa4"}},
       .tensors = {{"b", "F32", {3}, "abcdefghijkl"}, {"a/x", "I64", {}, "12345678"}}});
}

TEST(Safetensors, SurvivesWritingAndParsing) {
  const std::string bytes = TwoTensors();
  const auto file = ParseSafetensors(bytes);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->metadata.at("format"), "pt");
  EXPECT_EQ(file->metadata.at("quotes"), "\"\\\n\t\x01 \xc3\xa4");
  ASSERT_EQ(file->tensors.size(), 2u);
  EXPECT_EQ(file->tensors[0].name, "b");
  EXPECT_EQ(file->tensors[0].dtype, "F32");
  EXPECT_EQ(file->tensors[0].shape, std::vector<int64_t>{3});
  EXPECT_EQ(file->tensors[0].data, "abcdefghijkl");
  EXPECT_EQ(file->Find("a/x")->data, "12345678");
  EXPECT_TRUE(file->Find("a/x")->shape.empty());
  EXPECT_EQ(file->Find("c"), nullptr);
}

TEST(Safetensors, WritesThePublishedFormatByteForByte) {
  const std::string header = R"({"__metadata__":{"k":"v"},"t":{"dtype":"U8","shape":[1,2],)"
                             R"("data_offsets":[0,2]}})";
  const std::string padded = header + std::string((8 - header.size() % 8) % 8, ' ');
  EXPECT_EQ(WriteSafetensors({.metadata = {{"k", "v"}}, .tensors = {{"t", "U8", {1, 2}, "xy"}}}),
            FileOf(padded, "xy"));
  EXPECT_EQ(WriteSafetensors({}), FileOf("{}      "));
}

TEST(Safetensors, BeginsTheDataAtAMultipleOf8) {
  for (size_t length = 1; length < 20; ++length) {
    const std::string bytes =
        WriteSafetensors({.metadata = {}, .tensors = {{std::string(length, 'n'), "U8", {1}, "x"}}});
    EXPECT_EQ((bytes.size() - 1) % 8, 0u);
    EXPECT_TRUE(ParseSafetensors(bytes).ok());
  }
}

TEST(Safetensors, ReadsTensorsInTheOrderOfTheirData) {
  const std::string bytes = FileOf(R"({"late":{"dtype":"U8","shape":[2],"data_offsets":[1,3]},)"
                                   R"("empty":{"dtype":"F32","shape":[0,7],"data_offsets":[1,1]},)"
                                   R"( "early" : {"shape":[1],"data_offsets":[0,1],"dtype":"U8"}})",
                                   "xyz");
  const auto file = ParseSafetensors(bytes);
  ASSERT_TRUE(file.ok()) << file.status();
  ASSERT_EQ(file->tensors.size(), 3u);
  EXPECT_EQ(file->tensors[0].name, "early");
  EXPECT_EQ(file->tensors[1].name, "empty");
  EXPECT_EQ(file->tensors[2].data, "yz");
}

TEST(Safetensors, RefusesEveryCut) {
  const std::string bytes = TwoTensors();
  for (size_t size = 0; size < bytes.size(); ++size) {
    EXPECT_EQ(ParseSafetensors(bytes.substr(0, size)).status().code(),
              absl::StatusCode::kInvalidArgument)
        << size;
  }
  EXPECT_FALSE(ParseSafetensors(bytes + "x").ok());
}

TEST(Safetensors, RefusesHeadersThatLie) {
  const auto tensor = [](std::string_view rest) {
    return R"({"t":{"dtype":"F32",)" + std::string(rest) + "}}";
  };
  const std::string deep(100'000, '[');
  const std::pair<std::string, std::string> headers[] = {
      {"", "empty header"},
      {"[]", "no object"},
      {" {}", "begins with a space"},
      {"\xEF\xBB\xBF{}", "byte order mark"},
      {"{}x", "text after it"},
      {std::string("{}\0 ", 4), "NUL"},
      {R"({"t":)", "cut JSON"},
      {R"({"t":1})", "tensor is a number"},
      {R"({"t":null})", "tensor is null"},
      {R"({"t":[]})", "tensor is an array"},
      {R"({"t":{}})", "tensor says nothing"},
      {R"({"__metadata__":{"k":1}})", "metadata of numbers"},
      {R"({"__metadata__":{"k":{}}})", "metadata nested"},
      {R"({"__metadata__":"x"})", "metadata no object"},
      {R"({"__metadata__":{"k":"a","k":"b"}})", "metadata key twice"},
      {R"({"__metadata__":{},"__metadata__":{}})", "metadata twice"},
      {"{\"__metadata__\":{\"k\":\"\xff\"}}", "no UTF-8"},
      {tensor(R"("shape":[1],"data_offsets":[0,4],"more":0)"), "unknown key"},
      {tensor(R"("shape":[1],"data_offsets":[0,4],"shape":[1])"), "key twice"},
      {tensor(R"("shape":[1])"), "no offsets"},
      {tensor(R"("data_offsets":[0,4])"), "no shape"},
      {tensor(R"("shape":[1],"data_offsets":[0])"), "one offset"},
      {tensor(R"("shape":[1],"data_offsets":[0,4,4])"), "three offsets"},
      {tensor(R"("shape":[1],"data_offsets":[4,0])"), "offsets backwards"},
      {tensor(R"("shape":[1],"data_offsets":[0,8])"), "more bytes than its shape"},
      {tensor(R"("shape":[2],"data_offsets":[0,4])"), "fewer bytes than its shape"},
      {tensor(R"("shape":[-1],"data_offsets":[0,4])"), "negative dimension"},
      {tensor(R"("shape":[1.0],"data_offsets":[0,4])"), "dimension no integer"},
      {tensor(R"("shape":["1"],"data_offsets":[0,4])"), "dimension a string"},
      {tensor(R"("shape":[[1]],"data_offsets":[0,4])"), "nested shape"},
      {tensor(R"("shape":1,"data_offsets":[0,4])"), "shape a number"},
      {tensor(R"("shape":[9223372036854775808],"data_offsets":[0,4])"), "past 63 bits"},
      {tensor(R"("shape":[99999999999999999999],"data_offsets":[0,4])"), "past 64 bits"},
      {tensor(R"("shape":[4294967296,4294967296,0],"data_offsets":[0,4])"), "empty, with bytes"},
      {tensor(R"("shape":[4294967296,1073741824],"data_offsets":[0,0])"), "product overflows to 0"},
      {tensor(R"("shape":[1],"data_offsets":[18446744073709551612,0])"), "offset wraps"},
      {tensor(R"("shape":[1],"data_offsets":[4,8])"), "gap before the first"},
      {tensor(R"("shape":[0],"data_offsets":[0,0])"), "bytes left over"},
      {R"({"t":{"dtype":"F12","shape":[1],"data_offsets":[0,4]}})", "unknown dtype"},
      {R"({"t":{"dtype":"f32","shape":[1],"data_offsets":[0,4]}})", "dtype in small letters"},
      {R"({"t":{"dtype":4,"shape":[1],"data_offsets":[0,4]}})", "dtype a number"},
      {R"({"t":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},)"
       R"("t":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})",
       "name twice"},
      {R"({"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},)"
       R"("b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}})",
       "overlap"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
       R"("b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}})",
       "gap"},
      {R"({"a":{"dtype":"U8","shape":[5],"data_offsets":[0,5]}})", "past the end"},
      {"{\"t\":" + deep, "deeply nested"},
      {tensor("\"shape\":[" + std::string(2000, '1') + "]"), "a number of 2000 digits"},
      {tensor(R"("data_offsets":[0,4],"shape":[1)" +
              [] {
                std::string ones;
                for (int i = 0; i < 64; ++i) ones += ",1";
                return ones;
              }() +
              "]"),
       "65 dimensions"},
  };
  for (const auto& [header, what] : headers) {
    const absl::Status status = ParseSafetensors(FileOf(header, "abcd")).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << what;
    EXPECT_LT(status.message().size(), 1000u) << what;
  }
  // The data were sound.
  EXPECT_TRUE(ParseSafetensors(FileOf(tensor(R"("shape":[1],"data_offsets":[0,4])"), "abcd")).ok());
}

TEST(Safetensors, RefusesHeaderLengthsPastTheFile) {
  for (const uint64_t length : {uint64_t{3}, uint64_t{100'000'001}, ~uint64_t{0}, ~uint64_t{7}}) {
    std::string bytes(8, '\0');
    for (int i = 0; i < 8; ++i) bytes[i] = static_cast<char>(length >> (8 * i));
    EXPECT_EQ(ParseSafetensors(bytes + "{}").status().code(), absl::StatusCode::kInvalidArgument);
  }
}

TEST(Safetensors, KnowsItsElementSizes) {
  EXPECT_EQ(SafetensorsElementSize("F64"), 8u);
  EXPECT_EQ(SafetensorsElementSize("BF16"), 2u);
  EXPECT_EQ(SafetensorsElementSize("BOOL"), 1u);
  EXPECT_EQ(SafetensorsElementSize("F3"), 0u);
  EXPECT_EQ(SafetensorsElementSize(""), 0u);
}

}  // namespace
}  // namespace normd
