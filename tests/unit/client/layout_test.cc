#include "client/normctl/layout.h"

#include <numeric>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace normd::normctl {
namespace {

using ::testing::ElementsAre;

Tensor Counting(std::vector<int64_t> shape) {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  std::string bytes(count * sizeof(float), '\0');
  std::vector<float> values(count);
  std::iota(values.begin(), values.end(), 0.0f);
  std::copy_n(reinterpret_cast<const char*>(values.data()), bytes.size(), bytes.begin());
  return Tensor::Own(DataType::kFloat32, std::move(shape), std::move(bytes));
}

TEST(InFormat, PutsChannelsLast) {
  const Tensor tensor = InFormat(MemoryFormat::kChannelsLast, Counting({1, 2, 2, 2}));
  EXPECT_THAT(tensor.values<float>(), ElementsAre(0, 4, 1, 5, 2, 6, 3, 7));
  EXPECT_THAT(tensor.shape(), ElementsAre(1, 2, 2, 2));  // still logical
  EXPECT_EQ(tensor.memory_format(), MemoryFormat::kChannelsLast);
}

TEST(InFormat, PutsEveryElementWhereItsIndexSays) {
  const std::vector<int64_t> shape = {2, 3, 4, 5};
  const Tensor nchw = Counting(shape);
  const Tensor nhwc = InFormat(MemoryFormat::kChannelsLast, nchw);
  for (int n = 0; n < 2; ++n) {
    for (int c = 0; c < 3; ++c) {
      for (int h = 0; h < 4; ++h) {
        for (int w = 0; w < 5; ++w) {
          ASSERT_EQ(nhwc.values<float>()[((n * 4 + h) * 5 + w) * 3 + c],
                    nchw.values<float>()[((n * 3 + c) * 4 + h) * 5 + w]);
        }
      }
    }
  }
}

TEST(InFormat, ComesBackAsItWas) {
  for (const auto& shape : std::vector<std::vector<int64_t>>{
           {2, 3, 4, 5}, {1, 1, 1, 1}, {3, 1, 2, 2}, {0, 5, 2, 2}, {2, 3, 7}, {2, 3, 2, 2, 2}}) {
    const Tensor tensor = Counting(shape);
    const Tensor back =
        InFormat(MemoryFormat::kContiguous, InFormat(MemoryFormat::kChannelsLast, tensor));
    EXPECT_EQ(back.bytes(), tensor.bytes());
    EXPECT_EQ(back.shape(), shape);
  }
}

TEST(FromFortranOrder, IsATransposition) {
  // Column-major (2, 3): the columns one after another.
  const Tensor columns = Counting({2, 3});
  const std::string rows = FromFortranOrder(columns.bytes(), 4, columns.shape());
  const Tensor tensor = Tensor::Own(DataType::kFloat32, {2, 3}, rows);
  EXPECT_THAT(tensor.values<float>(), ElementsAre(0, 2, 4, 1, 3, 5));
}

TEST(FromFortranOrder, LeavesScalarsVectorsAndEmptyArraysAlone) {
  EXPECT_EQ(FromFortranOrder("abcd", 4, {}), "abcd");
  EXPECT_EQ(FromFortranOrder("abcdefgh", 4, {2}), "abcdefgh");
  EXPECT_EQ(FromFortranOrder("", 4, {3, 0, 2}), "");
}

}  // namespace
}  // namespace normd::normctl
