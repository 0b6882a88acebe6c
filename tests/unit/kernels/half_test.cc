#include "kernels/half.h"

#include <limits>

#include <gtest/gtest.h>

namespace normd {
namespace {

TEST(Half, EveryFloat16SurvivesTheRoundTrip) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = ToFloat(Float16{static_cast<uint16_t>(bits)});
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(ToFloat(ToFloat16(value))));
    } else {
      ASSERT_EQ(ToFloat16(value).bits, bits) << value;
    }
  }
}

TEST(Half, EveryBFloat16SurvivesTheRoundTrip) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = ToFloat(BFloat16{static_cast<uint16_t>(bits)});
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(ToFloat(ToBFloat16(value))));
    } else {
      ASSERT_EQ(ToBFloat16(value).bits, bits) << value;
    }
  }
}

TEST(Half, RoundsToNearestAndTiesToEven) {
  for (uint32_t bits = 0; bits < 0x7bff; ++bits) {  // neighbours among finite float16
    const float low = ToFloat(Float16{static_cast<uint16_t>(bits)});
    const float high = ToFloat(Float16{static_cast<uint16_t>(bits + 1)});
    const float middle = low + (high - low) / 2;
    ASSERT_EQ(ToFloat16(middle).bits, bits % 2 == 0 ? bits : bits + 1);
    ASSERT_EQ(ToFloat16(std::nextafter(middle, low)).bits, bits);
    ASSERT_EQ(ToFloat16(std::nextafter(middle, high)).bits, bits + 1);
  }
  EXPECT_EQ(ToFloat16(65519.0f).bits, 0x7bff);
  EXPECT_EQ(ToFloat16(65520.0f).bits, 0x7c00);
  EXPECT_EQ(ToBFloat16(1.00390625f).bits, 0x3f80);  // halfway, down to even
  EXPECT_EQ(ToBFloat16(1.01171875f).bits, 0x3f82);  // halfway, up to even
  EXPECT_EQ(ToBFloat16(std::numeric_limits<float>::max()).bits, 0x7f80);
}

}  // namespace
}  // namespace normd
