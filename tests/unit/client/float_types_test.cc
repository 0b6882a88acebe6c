#include "client/normctl/float_types.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include <gtest/gtest.h>

namespace normd::normctl {
namespace {

TEST(Float16, HasBackEveryValueItCanHold) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float value = FloatFromFloat16(half);
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(FloatFromFloat16(Float16FromFloat(value))));
    } else {
      EXPECT_EQ(Float16FromFloat(value), half) << value;
    }
  }
}

TEST(BFloat16, HasBackEveryValueItCanHold) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float value = FloatFromBFloat16(half);
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(FloatFromBFloat16(BFloat16FromFloat(value))));
    } else {
      EXPECT_EQ(BFloat16FromFloat(value), half) << value;
    }
  }
}

// Between any two neighbours: half way goes to the even one, and the rest to the
// nearer one. Exact in float, which has more places than either.
template <uint16_t (*kNarrow)(float), float (*kWiden)(uint16_t)>
void ExpectNearestEven(uint16_t last_finite) {
  for (uint16_t bits = 0; bits < last_finite; ++bits) {
    const float low = kWiden(bits);
    const float high = kWiden(bits + 1);
    const float middle = static_cast<float>((static_cast<double>(low) + high) / 2);
    ASSERT_EQ(kNarrow(middle), bits % 2 == 0 ? bits : bits + 1) << middle;
    ASSERT_EQ(kNarrow(std::nextafter(middle, low)), bits) << middle;
    ASSERT_EQ(kNarrow(std::nextafter(middle, high)), bits + 1) << middle;
    ASSERT_EQ(kNarrow(-middle), 0x8000 | (bits % 2 == 0 ? bits : bits + 1)) << middle;
  }
}

TEST(Float16, RoundsToNearestEven) {
  ExpectNearestEven<Float16FromFloat, FloatFromFloat16>(0x7bff);
}

TEST(BFloat16, RoundsToNearestEven) {
  // Below the smallest normal float the middle itself is rounded: begin past it.
  for (uint32_t bits = 0x0080; bits < 0x7f7f; ++bits) {
    const float low = FloatFromBFloat16(static_cast<uint16_t>(bits));
    const float high = FloatFromBFloat16(static_cast<uint16_t>(bits + 1));
    const float middle = low + (high - low) / 2;
    ASSERT_EQ(BFloat16FromFloat(middle), bits % 2 == 0 ? bits : bits + 1) << middle;
    ASSERT_EQ(BFloat16FromFloat(std::nextafter(middle, low)), bits) << middle;
    ASSERT_EQ(BFloat16FromFloat(std::nextafter(middle, high)), bits + 1) << middle;
  }
}

TEST(Float16, OverflowsToInfinityAndKeepsSigns) {
  EXPECT_EQ(Float16FromFloat(65519.996f), 0x7bff);
  EXPECT_EQ(Float16FromFloat(65520.0f), 0x7c00);
  EXPECT_EQ(Float16FromFloat(-1e30f), 0xfc00);
  EXPECT_EQ(Float16FromFloat(-0.0f), 0x8000);
  EXPECT_EQ(Float16FromFloat(INFINITY), 0x7c00);
  EXPECT_EQ(BFloat16FromFloat(std::numeric_limits<float>::max()), 0x7f80);
  EXPECT_EQ(BFloat16FromFloat(-0.0f), 0x8000);
}

TEST(ConvertTo, GoesThroughEveryPairOfTypes) {
  const std::vector<float> values = {0, 1, -2.5, 0.15625, 1024};
  const Tensor tensor = Tensor::Borrow(absl::Span<const float>(values), {5});
  const std::vector<DataType> types = {DataType::kFloat32, DataType::kFloat64, DataType::kFloat16,
                                       DataType::kBFloat16};
  for (const DataType first : types) {
    for (const DataType second : types) {
      const Tensor there = ConvertTo(second, ConvertTo(first, tensor));
      EXPECT_EQ(there.dtype(), second);
      EXPECT_EQ(there.bytes().size(), 5 * SizeOf(second));
      const Tensor back = ConvertTo(DataType::kFloat32, there);
      for (size_t i = 0; i < values.size(); ++i) EXPECT_EQ(back.values<float>()[i], values[i]);
    }
  }
}

}  // namespace
}  // namespace normd::normctl
