// forward, backward, fold.
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "client/normctl/command.h"
#include "client/normctl/flags.h"
#include "client/normctl/float_types.h"
#include "client/normctl/layout.h"
#include "client/normctl/output.h"
#include "client/normctl/tensor_file.h"
#include "client/normctl/usage_error.h"

namespace normd::normctl {
namespace {

constexpr char kTensorFile[] = "FILE.npy|FILE.safetensors[:KEY]";

absl::StatusOr<Tensor> ReadFloats(const std::string& spec) {
  auto tensor = ReadTensor(spec);
  if (tensor.ok() && tensor->dtype() == DataType::kInt64) {
    return UsageError(absl::StrCat(spec, ": values are int64; save them as float32"));
  }
  return tensor;
}

// What forward and backward say of their tensors.
struct TensorFlags {
  std::shared_ptr<std::optional<DataType>> dtype;
  std::shared_ptr<MemoryFormat> format;
  std::shared_ptr<bool> stream;

  explicit TensorFlags(CLI::App& app)
      : dtype(AddDataType(app, "--dtype", InputTypes(), "Convert the files' values to this first")),
        format(AddMemoryFormat(app)),
        stream(Shared(false)) {
    app.add_flag("--stream", *stream, "Stream the tensor even where one message can hold it");
  }

  absl::StatusOr<Tensor> Read(const std::string& spec) const {
    auto tensor = ReadFloats(spec);
    if (!tensor.ok()) return tensor;
    return InFormat(*format, ConvertTo(dtype->value_or(tensor->dtype()), *tensor));
  }
};

std::shared_ptr<std::string> AddFile(CLI::App& app, const std::string& flag,
                                     const std::string& help) {
  auto file = Shared<std::string>();
  app.add_option(flag, *file, help)->type_name(kTensorFile);
  return file;
}

CallOptions Watched(CallOptions call, Session& session, const char* what) {
  call.progress = [&session, what](int64_t received, int64_t total) {
    session.progress.Show(absl::StrCat(what, ": ", HumanBytes(static_cast<double>(received)),
                                       " of ", HumanBytes(static_cast<double>(total))));
  };
  return call;
}

// Tells of a tensor, and where it was written if it was.
void Tell(const char* name, const std::string& spec, const Tensor& tensor, Report* report) {
  Json json = JsonTensor(tensor);
  absl::StrAppend(&report->text, name, ": ", HumanTensor(tensor));
  if (!spec.empty()) {
    json["file"] = spec;
    absl::StrAppend(&report->text, " -> ", spec);
  }
  report->text += "\n";
  report->json[name] = std::move(json);
}

// Writes a tensor where a file was named for it, and tells of it.
absl::Status Deliver(const char* name, const std::string& spec, const std::optional<Tensor>& tensor,
                     Report* report) {
  if (!tensor) {
    if (spec.empty()) return absl::OkStatus();
    return UsageError(absl::StrCat("there is no ", name, " to write to ", spec));
  }
  if (!spec.empty()) {
    absl::Status status = WriteTensor(spec, *tensor);
    if (!status.ok()) return status;
  }
  Tell(name, spec, *tensor, report);
  return absl::OkStatus();
}

// Forward from file to file, where both have the tensor as it is sent and it is large or
// to be streamed: neither is ever in memory. Nothing where it must be.
absl::StatusOr<std::optional<ForwardResult>> ForwardFiles(
    const Session& session, const std::string& name, const std::string& input,
    const std::string& output, const TensorFlags& tensors, const ForwardOptions& options,
    const CallOptions& call) {
  constexpr int64_t kLarge = int64_t{64} << 20;
  if (*tensors.format != MemoryFormat::kContiguous || (!output.empty() && !IsNpy(output)) ||
      session.shared_memory == SharedMemory::kOn) {
    return std::nullopt;
  }
  const auto source = OpenTensor(input);
  if (!source.ok()) return source.status();
  if (!source->has_value()) return std::nullopt;
  const DataType dtype = (*source)->dtype;
  const std::vector<int64_t>& shape = (*source)->shape;
  const int64_t bytes = Tensor::Borrow(dtype, shape, "").num_elements() * int64_t(SizeOf(dtype));
  if (tensors.dtype->value_or(dtype) != dtype || dtype == DataType::kInt64 ||
      (!*tensors.stream && bytes < kLarge)) {
    return std::nullopt;
  }
  std::optional<PartFile> file;
  const std::string front = NpyFrontOf(dtype, shape);
  const auto write = [&](int64_t offset, std::string_view part) {
    return file ? file->Write(static_cast<int64_t>(front.size()) + offset, part) : absl::OkStatus();
  };
  if (!output.empty()) {
    absl::Status begun = file.emplace(output).Write(0, front);
    if (!begun.ok()) return begun;
  }
  auto answer = session.client.ForwardStream(name, **source, write, options, call);
  if (!answer.ok()) return answer.status();
  if (file) {
    absl::Status finished = file->Finish();
    if (!finished.ok()) return finished;
  }
  return *std::move(answer);
}

absl::Status CheckSpecs(const std::vector<std::string>& specs) {
  for (const std::string& spec : specs) {
    if (spec.empty()) continue;
    absl::Status status = CheckTensorSpec(spec);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

Action Forward(CLI::App& app) {
  auto name = AddName(app);
  auto input = Shared<std::string>();
  app.add_option("--input", *input, "The input, of the layer's shape: (N, C, H, W) ...")
      ->required()
      ->type_name(kTensorFile);
  auto output = AddFile(app, "--output", "Where the output goes");
  auto mode = AddMode(app, "Mode of this call alone; default: the instance's");
  auto options = Shared<ForwardOptions>();
  app.add_flag("--save_for_backward", options->save_for_backward,
               "Keep on the server what backward needs, and print its context");
  auto residual = AddFile(app, "--residual", "Added to the normalized input, of its shape");
  app.add_flag_callback(
      "--relu", [options] { options->activation = Activation::kRelu; },
      "Answer max(0, y), after the residual");
  app.add_flag("--stats", options->return_batch_statistics, "Print the batch's statistics");
  const TensorFlags tensors(app);
  auto call = AddChangeFlags(app);

  return [=](Session& session) -> absl::StatusOr<Report> {
    absl::Status status = CheckSpecs({*output});
    if (!status.ok()) return status;
    if (!residual->empty()) {
      auto r = tensors.Read(*residual);
      if (!r.ok()) return r.status();
      options->residual = *std::move(r);
    }
    options->mode = *mode;
    const CallOptions watched = Watched(*call, session, "forward");
    const auto filed = ForwardFiles(session, *name, *input, *output, tensors, *options, watched);
    if (!filed.ok()) return filed.status();
    absl::StatusOr<ForwardResult> answer;
    if (filed->has_value()) {
      answer = **filed;
    } else {
      const auto x = tensors.Read(*input);
      if (!x.ok()) return x.status();
      answer = *tensors.stream ? session.client.ForwardStream(*name, *x, *options, watched)
                               : session.client.Forward(*name, *x, *options, watched);
      if (!answer.ok()) return answer.status();
    }

    Report report = {.json = JsonChanged(*answer),
                     .text = absl::StrCat(*name, " in ", std::string(NameOf(answer->mode)),
                                          " mode: ", HumanVersion(*answer), ", ",
                                          answer->num_batches_tracked, " batches tracked\n")};
    report.json["mode"] = NameOf(answer->mode);
    report.json["num_batches_tracked"] = answer->num_batches_tracked;
    if (options->save_for_backward) {
      report.json["context_id"] = answer->context_id;
      absl::StrAppend(&report.text, "context: ", answer->context_id, "\n");
    }
    if (answer->batch_statistics) {
      const BatchStatistics& statistics = *answer->batch_statistics;
      report.json["batch_statistics"] = {
          {"count", statistics.count}, {"mean", statistics.mean}, {"var", statistics.var}};
      std::vector<std::vector<std::string>> rows = {{"SET", "MEAN", "VAR"}};
      for (size_t c = 0; c < statistics.mean.size(); ++c) {
        rows.push_back({absl::StrCat(c), absl::StrCat(statistics.mean[c]),
                        absl::StrCat(c < statistics.var.size() ? statistics.var[c] : 0)});
      }
      absl::StrAppend(&report.text, "statistics over ", statistics.count, " values each:\n",
                      Table(rows));
    }
    if (filed->has_value()) {
      Tell("output", *output, answer->output, &report);
    } else {
      status = Deliver("output", *output, answer->output, &report);
      if (!status.ok()) return status;
    }
    return report;
  };
}

Action Backward(CLI::App& app) {
  auto name = AddName(app);
  auto grad_output = Shared<std::string>();
  app.add_option("--grad_output", *grad_output, "Gradient of the loss by the output")
      ->required()
      ->type_name(kTensorFile);
  auto options = Shared<BackwardOptions>();
  auto* context =
      app.add_option("--context", options->context_id, "What forward --save_for_backward printed")
          ->type_name("ID");
  auto input = Shared<std::string>();
  auto* input_option = app.add_option("--input", *input, "Without a context: the forward's input")
                           ->type_name(kTensorFile);
  context->excludes(input_option);
  auto grad_input = AddFile(app, "--grad_input,--output", "Where the input's gradient goes");
  auto grad_weight = AddFile(app, "--grad_weight", "Where the weight's gradient goes");
  auto grad_bias = AddFile(app, "--grad_bias", "Where the bias's gradient goes");
  auto grad_residual = AddFile(app, "--grad_residual", "Where the residual's gradient goes");
  auto mode = AddMode(app, "Without a context: the forward's mode; default: the instance's");
  app.add_flag("--accumulate", options->accumulate,
               "Add the gradients of weight and bias to the instance's, for step");
  app.add_flag("--retain_context", options->retain_context,
               "Keep the context for another backward");
  app.add_flag("--skip_grad_input", options->skip_grad_input,
               "Do not compute the input's gradient");
  const TensorFlags tensors(app);
  auto call = AddChangeFlags(app);

  return [=](Session& session) -> absl::StatusOr<Report> {
    if (options->context_id.empty() && input->empty()) {
      return UsageError("give --context=ID, as forward --save_for_backward printed it, or --input");
    }
    absl::Status status = CheckSpecs({*grad_input, *grad_weight, *grad_bias, *grad_residual});
    if (!status.ok()) return status;
    const auto dy = tensors.Read(*grad_output);
    if (!dy.ok()) return dy.status();
    if (!input->empty()) {
      auto x = tensors.Read(*input);
      if (!x.ok()) return x.status();
      options->input = *std::move(x);
    }
    options->mode = *mode;
    const CallOptions watched = Watched(*call, session, "backward");
    const auto answer = *tensors.stream
                            ? session.client.BackwardStream(*name, *dy, *options, watched)
                            : session.client.Backward(*name, *dy, *options, watched);
    if (!answer.ok()) return answer.status();

    Report report = {
        .json = JsonChanged(*answer),
        .text = absl::StrCat(*name, ": ", HumanVersion(*answer),
                             options->accumulate ? ", gradients accumulated\n" : "\n")};
    report.json["accumulated"] = options->accumulate;
    for (const auto& [what, spec, tensor] :
         {std::make_tuple("grad_input", *grad_input, answer->grad_input),
          std::make_tuple("grad_weight", *grad_weight, answer->grad_weight),
          std::make_tuple("grad_bias", *grad_bias, answer->grad_bias),
          std::make_tuple("grad_residual", *grad_residual, answer->grad_residual)}) {
      status = Deliver(what, spec, tensor, &report);
      if (!status.ok()) return status;
    }
    return report;
  };
}

Action Fold(CLI::App& app) {
  auto name = AddName(app);
  auto weight = Shared<std::string>();
  app.add_option("--weight", *weight, "The convolution's weight, (O, I / groups, kH, kW)")
      ->required()
      ->type_name(kTensorFile);
  auto bias = AddFile(app, "--bias", "The convolution's bias, (O); zeros unless given");
  auto options = Shared<FoldConvolutionOptions>();
  auto* transposed = app.add_flag("--transposed", options->transposed,
                                  "The weight is (I, O / groups, kH, kW), of a ConvTranspose");
  app.add_option("--groups", options->groups, "Of a transposed convolution")
      ->needs(transposed)
      ->capture_default_str()
      ->type_name("G");
  auto output = Shared<std::string>();
  app.add_option("--output", *output,
                 "Where both go, as weight and bias; or the weight alone, with --output_bias")
      ->required()
      ->type_name("FILE.safetensors|FILE.npy");
  auto output_bias = AddFile(app, "--output_bias", "Where the bias goes");

  return [=](Session& session) -> absl::StatusOr<Report> {
    const bool in_one_file = output_bias->empty();
    if (in_one_file && !absl::EndsWith(*output, ".safetensors")) {
      return UsageError(absl::StrCat("'", *output,
                                     "' cannot hold weight and bias: give --output_bias for the "
                                     "bias, or --output=FILE.safetensors for both"));
    }
    absl::Status status = CheckSpecs({*output, *output_bias});
    if (!status.ok()) return status;
    const auto w = ReadFloats(*weight);
    if (!w.ok()) return w.status();
    if (!bias->empty()) {
      auto b = ReadFloats(*bias);
      if (!b.ok()) return b.status();
      options->bias = *std::move(b);
    }
    const auto folded = session.client.FoldConvolution(*name, *w, *options);
    if (!folded.ok()) return folded.status();

    Report report = {.json = {{"version", folded->version}},
                     .text = absl::StrCat(*name, ": folded, version ", folded->version, "\n")};
    if (in_one_file) {
      status = WriteTensors(*output, {{"weight", folded->weight}, {"bias", folded->bias}},
                            {{"format", "pt"}, {"instance", *name}});
      if (!status.ok()) return status;
      report.json["file"] = *output;
    }
    status = Deliver("weight", in_one_file ? "" : *output, folded->weight, &report);
    if (status.ok()) status = Deliver("bias", *output_bias, folded->bias, &report);
    if (!status.ok()) return status;
    if (in_one_file) absl::StrAppend(&report.text, "-> ", *output, "\n");
    return report;
  };
}

constexpr Command kCommands[] = {
    {"forward", "Normalize a tensor", "forward net/bn1 --input=x.npy --output=y.npy --mode=train",
     Forward},
    {"backward", "The gradients of a forward",
     "backward net/bn1 --context=ID --grad_output=dy.npy --grad_input=dx.npy --accumulate",
     Backward},
    {"fold", "A convolution's weight and bias with an eval-mode batch norm folded in",
     "fold net/bn1 --weight=w.npy --bias=b.npy --output=folded.safetensors", Fold},
};

}  // namespace

absl::Span<const Command> ComputeCommands() { return kCommands; }

}  // namespace normd::normctl
