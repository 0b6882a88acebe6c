// make_corpus DIRECTORY: writes the seeds of the fuzz targets, small sound inputs.
#include <filesystem>
#include <fstream>
#include <iostream>

#include "formats/npy.h"
#include "formats/safetensors.h"
#include "normd/v1/norm_service.pb.h"
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

  for (const bool fortran : {false, true}) {
    const Npy array{.descr = "<f4", .shape = {2, 1}, .fortran_order = fortran};
    Write(directory / "npy" / (fortran ? "fortran" : "c"), NpyHeader(array) + "abcdefgh");
  }

  Write(directory / "instance_name/flat", "bn1");
  Write(directory / "instance_name/nested", "net-1/block_2/bn.3");

  // The first byte picks the message and how it is cut.
  v1::Tensor tensor;
  tensor.set_dtype(v1::DATA_TYPE_FLOAT32);
  tensor.add_shape(4);
  tensor.set_data("0123456789abcdef");
  v1::ForwardRequest forward;
  forward.set_name("net/bn");
  forward.set_expected_version(7);
  *forward.mutable_input() = tensor;
  *forward.mutable_residual() = tensor;
  Write(directory / "message/forward", "\x03" + forward.SerializeAsString());
  v1::BackwardRequest backward;
  backward.set_name("net/bn");
  backward.mutable_batch_statistics()->add_mean(0.5);
  *backward.mutable_input() = tensor;
  *backward.mutable_grad_output() = tensor;
  Write(directory / "message/backward", "\x04" + backward.SerializeAsString());
  v1::ForwardStreamRequest chunk;
  chunk.set_chunk("0123456789abcdef");
  Write(directory / "message/chunk", "\x05" + chunk.SerializeAsString());

  Write(directory / "auth_file/grants",
        "sha256:" + Sha256Hex("token") +
            " trainer user net/,shared/  # a token\n\ncn:ops ops admin *\n"
            "san:eval.example.org eval reader net/\n");

  Write(directory / "config/local",
        "listen=127.0.0.1:0,unix:/run/normd\nthreads=2\nlog_level=warn");
  Write(directory / "config/guarded",
        "listen=0.0.0.0:50051\ntls_cert=a\ntls_key=b\nauth_file=c\ndurability=update\n"
        "checkpoint_interval=1m30s\nkeepalive_time=10s\nmemory_budget=1000000");

  Write(directory / "normctl_flags/batch_norm",
        "net/bn\n--num_features=3\n--eps=1e-5\n--momentum=none\n--no_affine\n--mode=eval");
  Write(directory / "normctl_flags/layer_norm",
        "ln\n--layer=layer_norm\n--normalized_shape=4,5\n--no_bias\n--timeout=1m30s\n"
        "--expected_version=7\n--dtype=bfloat16\n--memory_format=channels_last");
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
