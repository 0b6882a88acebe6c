// make_corpus DIRECTORY: writes the seeds of the fuzz targets, small sound inputs.
#include <filesystem>
#include <fstream>
#include <iostream>

#include "formats/safetensors.h"
#include "server/state/instance_codec.h"
#include "server/state/manifest.h"
#include "server/state/sha256.h"

namespace normd {
namespace {

void Write(const std::filesystem::path& path, const std::string& bytes) {
  std::filesystem::create_directories(path.parent_path());
  std::ofstream(path, std::ios::binary) << bytes;
}

void WriteAll(const std::filesystem::path& directory) {
  Write(directory / "safetensors/empty", WriteSafetensors({}));
  Write(directory / "safetensors/two_tensors",
        WriteSafetensors({.metadata = {{"format", "pt"}},
                          .tensors = {{"a", "F32", {1, 2}, "abcdefgh"}, {"b", "U8", {}, "x"}}}));

  for (const bool large : {false, true}) {
    Layer layer;
    layer.num_features = large ? 3 : 1;
    layer.affine = large;
    layer.track_running_stats = large;
    if (!large) layer.momentum.reset();
    InstanceState state = InitialState(
        std::make_shared<const Identity>(Identity{.name = large ? "net/bn" : "bn",
                                                  .uid = "0b5cd3c1-30aa-4e3c-9f4e-6b1f5ec6a001",
                                                  .layer = layer,
                                                  .create_time = absl::UnixEpoch()}),
        Mode::kTrain);
    StoredInstance instance;
    if (large) {
      state.grad_weight = state.weight;
      auto optimizer = std::make_shared<OptimizerState>();
      optimizer->rule = OptimizerRule::kAdam;
      optimizer->weight = {.momentum_buffer = {},
                           .exp_avg = state.weight,
                           .exp_avg_sq = state.weight,
                           .max_exp_avg_sq = {},
                           .step = 3};
      state.optimizer = optimizer;
      instance.requests.push_back(
          {.id = 7, .method = Method::kForward, .version = 1, .time = absl::UnixEpoch()});
    }
    instance.state = std::make_shared<const InstanceState>(std::move(state));
    Write(directory / "instance_codec" / (large ? "trained" : "plain"), EncodeInstance(instance));
    Write(directory / "instance_codec" / (large ? "record_trained" : "record_plain"),
          EncodeRecord(*instance.state));
  }

  Manifest manifest{
      .id = "00000042-manual", .create_time = absl::UnixEpoch(), .reason = "manual", .files = {}};
  for (const char* name : {"a", "net/bn"}) {
    manifest.files.push_back(
        {.file = InstanceFileName(name), .instance = name, .bytes = 7, .sha256 = Sha256Hex(name)});
  }
  std::string text = WriteManifest(manifest);
  text.resize(text.size() - 65);  // without the checksum, which the target adds
  Write(directory / "manifest/two_files", text);
}

}  // namespace
}  // namespace normd

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: fuzz_make_corpus DIRECTORY\n";
    return 2;
  }
  normd::WriteAll(argv[1]);
}
