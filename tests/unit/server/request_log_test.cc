#include "server/instance/request_log.h"

#include <gtest/gtest.h>

#include "tests/unit/server/sample_instances.h"

namespace normd {
namespace {

constexpr absl::Time kNow = absl::FromUnixSeconds(1'700'000'000);

TEST(RequestLog, ForgetsAfterTenMinutes) {
  RequestLog log;
  const AppliedRequest request = SampleRequest(1, kNow);
  log.Add(request);
  EXPECT_EQ(log.Find(request.id, kNow + RequestLog::kKeep), request);
  EXPECT_EQ(log.Find(request.id, kNow + RequestLog::kKeep + absl::Seconds(1)), std::nullopt);
}

TEST(RequestLog, KeepsWhatIsDatedTomorrowForTenMinutesFromNow) {
  RequestLog log;
  const AppliedRequest request = SampleRequest(1, kNow + absl::Hours(24));
  log.Add(request);
  log.NoneAfter(kNow);
  EXPECT_TRUE(log.Find(request.id, kNow + RequestLog::kKeep).has_value());
  EXPECT_FALSE(log.Find(request.id, kNow + RequestLog::kKeep + absl::Seconds(1)).has_value());
}

}  // namespace
}  // namespace normd
