// Fills the store of a state directory, as fast as it goes, for tests and benchmarks at scale:
//   normd_fill_store DIRECTORY COUNT
// COUNT instances of BatchNorm2d(64), "net/layer0000000/bn" and so on, each after one train-mode
// forward.
#include <algorithm>
#include <cstdlib>
#include <iostream>

#include <fmt/format.h>

#include "absl/time/clock.h"
#include "server/state/sqlite_store.h"

namespace normd {
namespace {

constexpr int kChannels = 64;
constexpr int kBatch = 20'000;

Change Creation(int number) {
  Layer layer;
  layer.num_features = kChannels;
  const std::string name = fmt::format("net/layer{:07}/bn", number);
  InstanceState state =
      InitialState(std::make_shared<const Identity>(Identity{.name = name,
                                                             .uid = fmt::format("{:036x}", number),
                                                             .layer = layer,
                                                             .create_time = absl::Now()}),
                   Mode::kTrain);
  state.version = 2;
  state.num_batches_tracked = 1;
  state.running_mean = Values::Map(DType::kFloat32, kChannels, [&](int64_t channel) {
    return static_cast<double>(number % 1000) / 1000 + static_cast<double>(channel);
  });
  return {.name = name,
          .previous_version = 0,
          .state = std::make_shared<const InstanceState>(std::move(state)),
          .requests = {}};
}

int Fill(const std::string& directory, int count) {
  const auto store = OpenSqliteStore(directory);
  if (!store.ok()) {
    std::cerr << store.status() << "\n";
    return 1;
  }
  for (int begin = 0; begin < count; begin += kBatch) {
    std::vector<Change> changes;
    for (int i = begin; i < std::min(begin + kBatch, count); ++i) changes.push_back(Creation(i));
    for (const absl::Status& status : (*store)->Commit(changes)) {
      if (status.ok()) continue;
      std::cerr << status << "\n";
      return 1;
    }
  }
  return 0;
}

}  // namespace
}  // namespace normd

int main(int argc, char** argv) {
  const int count = argc == 3 ? std::atoi(argv[2]) : 0;
  if (count <= 0) {
    std::cerr << "usage: normd_fill_store DIRECTORY COUNT\n";
    return 2;
  }
  return normd::Fill(argv[1], count);
}
