#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/error/error.h"
#include "server/service/convert.h"
#include "server/service/handlers.h"
#include "server/service/rpc.h"
#include "server/service/validate.h"
#include "server/wire/elements.h"

namespace normd {
namespace {

// Where output channels are in a convolution's weight.
struct Channels {
  int64_t outer = 1;   // transposed, grouped: groups * I / groups
  int64_t count = 0;   // channels that vary within it
  int64_t inner = 1;   // elements of one channel, contiguous
  int64_t groups = 1;  // transposed: outer rows belong to groups in turn

  // The output channel of element i.
  int64_t Of(int64_t i) const {
    const int64_t within = i / inner % count;
    const int64_t group = i / inner / count / (outer / groups);
    return group * count + within;
  }
};

absl::StatusOr<Channels> FindChannels(const v1::FoldConvolutionRequest& request,
                                      const TensorSpec& weight, int64_t num_features) {
  const std::vector<int64_t>& shape = weight.shape;
  const auto refuse = [&](absl::string_view allowed) {
    return InvalidField("weight.shape", ShapeText(shape), allowed);
  };
  if (shape.size() < 3 || shape.size() > 5) {
    return refuse("1 to 3 kernel dimensions behind the two of the channels");
  }
  if (weight.format != MemoryFormat::kContiguous) {
    return InvalidField("weight.memory_format", "CHANNELS_LAST", "CONTIGUOUS");
  }
  if (request.groups() < 0 || (!request.transposed() && request.groups() > 1)) {
    return InvalidField("groups", absl::StrCat(request.groups()),
                        "1 or more for a transposed convolution; 0 or 1 for a plain one, whose "
                        "weight tells");
  }
  Channels channels;
  for (size_t i = 2; i < shape.size(); ++i) channels.inner *= shape[i];
  if (!request.transposed()) {
    channels.count = shape[0];
    channels.inner *= shape[1];
  } else {
    channels.outer = shape[0];
    channels.count = shape[1];
    channels.groups = std::max<int64_t>(request.groups(), 1);
    if (shape[0] % channels.groups != 0) {
      return InvalidField("groups", absl::StrCat(channels.groups),
                          absl::StrCat("a divisor of the weight's ", shape[0], " input channels"));
    }
  }
  if (channels.count * channels.groups != num_features) {
    return refuse(absl::StrCat("O = ", num_features, ", the instance's num_features, not ",
                               channels.count * channels.groups));
  }
  return channels;
}

// y = (conv(x) - mean) * scale + beta with scale = gamma / sqrt(var + eps): scale goes
// into the convolution's weight, the rest into its bias.
absl::Status Fold(const InstanceState& state, const v1::FoldConvolutionRequest& request,
                  v1::FoldConvolutionResponse& response) {
  const Layer& layer = state.layer();
  if (!IsBatchNorm(layer.kind) || !layer.track_running_stats) {
    return FailedField(
        "name", state.identity->name,
        "a batch norm with running statistics, which are constants in eval mode",
        "the instance cannot be folded: it is no batch norm with running statistics");
  }
  const auto weight = ToTensorSpec(request.weight(), "weight");
  if (!weight.ok()) return weight.status();
  if (absl::Status s = CheckBytes(*weight, request.weight().data().size(), "weight"); !s.ok()) {
    return s;
  }
  const auto channels = FindChannels(request, *weight, layer.num_features);
  if (!channels.ok()) return channels.status();
  if (request.has_bias()) {
    const auto bias = ToTensorSpec(request.bias(), "bias");
    if (!bias.ok()) return bias.status();
    const TensorSpec expected{.dtype = weight->dtype, .shape = {layer.num_features}};
    if (absl::Status s = CheckSameTensor(*bias, "bias", expected, "the weight's output channels");
        !s.ok()) {
      return s;
    }
    if (absl::Status s = CheckBytes(*bias, request.bias().data().size(), "bias"); !s.ok()) return s;
  }

  std::vector<double> scale(static_cast<size_t>(layer.num_features));
  const TensorSpec bias_spec{
      .dtype = weight->dtype, .shape = {layer.num_features}, .elements = layer.num_features};
  *response.mutable_bias() = ToProto(bias_spec);
  std::string& folded_bias = *response.mutable_bias()->mutable_data();
  folded_bias.resize(static_cast<size_t>(bias_spec.bytes()));
  for (size_t c = 0; c < scale.size(); ++c) {
    const auto i = static_cast<int64_t>(c);
    scale[c] = (state.weight.present() ? state.weight[i] : 1) /
               std::sqrt(state.running_var[i] + *layer.eps);
    const double bias =
        request.has_bias() ? ReadElement(request.bias().data().data(), weight->dtype, c) : 0;
    WriteElement(
        folded_bias.data(), weight->dtype, c,
        (bias - state.running_mean[i]) * scale[c] + (state.bias.present() ? state.bias[i] : 0));
  }
  *response.mutable_weight() = ToProto(*weight);
  const std::string& from = request.weight().data();
  std::string& to = *response.mutable_weight()->mutable_data();
  to.resize(from.size());
  for (int64_t i = 0; i < weight->elements; ++i) {
    const auto at = static_cast<size_t>(i);
    const double value = ReadElement(from.data(), weight->dtype, at);
    WriteElement(to.data(), weight->dtype, at, value * scale[static_cast<size_t>(channels->Of(i))]);
  }
  return absl::OkStatus();
}

}  // namespace

void FoldConvolution(Core& core, const v1::FoldConvolutionRequest& request,
                     v1::FoldConvolutionResponse& response, Done done) {
  if (absl::Status s = CheckName(request.name()); !s.ok()) return done(s);
  const auto state = core.registry->Published(request.name());
  if (!state.ok()) return done(state.status());
  response.set_version((*state)->version);
  const auto bytes = static_cast<int64_t>(request.weight().data().size());
  if (bytes <= kLargestInline) return done(Fold(**state, request, response));
  core.executor->Enqueue(
      [&request, &response, state = *state, done = std::make_shared<Done>(std::move(done))] {
        (*done)(Fold(*state, request, response));
      });
}

}  // namespace normd
