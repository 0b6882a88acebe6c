// The C++ client of normd: the one public header.
//
//   absl::StatusOr<normd::Client> client = normd::Client::Connect("127.0.0.1:50051");
//   auto created = client->CreateInstance("bn1", {.layer = normd::BatchNorm2d{.num_features =
//   64}}); auto answer = client->Forward("bn1", normd::Tensor::Borrow(x, {8, 64, 56, 56})); const
//   float* y = answer->output.values<float>().data();
//
// The meaning of each call, its fields and its errors is said in
// proto/normd/v1/norm_service.proto; this header says what is the client's own.
#ifndef NORMD_CLIENT_NORMD_CLIENT_H_
#define NORMD_CLIENT_NORMD_CLIENT_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"

// Inline, so that a program that links the server's parts as well (a test, a
// benchmark) has no two different normd::Mode.
namespace normd::inline client {

namespace internal {
class Connection;
class CudaRegion;
class Lease;
}  // namespace internal

// --- tensors ---

enum class DataType { kFloat32, kFloat64, kFloat16, kBFloat16, kInt64 };

// PyTorch's name: "float32".
std::string_view NameOf(DataType dtype);
// The type of that name, if there is one.
std::optional<DataType> DataTypeNamed(std::string_view name);
// Bytes of one element.
size_t SizeOf(DataType dtype);

// In which order the elements lie in memory: NCHW or NHWC.
enum class MemoryFormat { kContiguous, kChannelsLast };

// A dense tensor: what it is, and little-endian bytes that it shares with its
// copies or borrows. Cheap to copy, and its bytes never change through it.
class Tensor {
 public:
  // float32, of shape (0), without bytes.
  Tensor() = default;

  // Borrowed bytes: the caller keeps them alive and unchanged during each call
  // that the tensor is given to. Costs one copy when it is sent.
  static Tensor Borrow(DataType dtype, std::vector<int64_t> shape, std::string_view bytes,
                       MemoryFormat format = MemoryFormat::kContiguous);
  template <class T>
  static Tensor Borrow(absl::Span<const T> values, std::vector<int64_t> shape,
                       MemoryFormat format = MemoryFormat::kContiguous);

  // Owned bytes; sent without a copy.
  static Tensor Own(DataType dtype, std::vector<int64_t> shape, std::string bytes,
                    MemoryFormat format = MemoryFormat::kContiguous);
  // Bytes that live as long as `owner` does; sent without a copy.
  static Tensor Share(DataType dtype, std::vector<int64_t> shape, std::string_view bytes,
                      std::shared_ptr<const void> owner,
                      MemoryFormat format = MemoryFormat::kContiguous);

  DataType dtype() const { return dtype_; }
  // Logical order (N, C, H, W), whatever the memory format.
  const std::vector<int64_t>& shape() const { return shape_; }
  MemoryFormat memory_format() const { return format_; }
  std::string_view bytes() const { return bytes_; }
  // Null for borrowed bytes.
  const std::shared_ptr<const void>& owner() const { return owner_; }

  // Elements that the shape says. Precondition: they can be counted in 63 bits.
  int64_t num_elements() const;

  // The bytes as values. Precondition: T is float, double or int64_t, as dtype()
  // says, or uint16_t for the two 16-bit types.
  template <class T>
  absl::Span<const T> values() const {
    return {reinterpret_cast<const T*>(bytes_.data()), bytes_.size() / sizeof(T)};
  }

 private:
  DataType dtype_ = DataType::kFloat32;
  std::vector<int64_t> shape_ = {0};
  MemoryFormat format_ = MemoryFormat::kContiguous;
  std::string_view bytes_;
  std::shared_ptr<const void> owner_;
};

// Memory to build a tensor in, from Client::Allocate(). Shared by copies.
class TensorBuffer {
 public:
  char* data() const { return data_; }  // aligned to 64 bytes
  size_t size() const { return size_; }
  // Whether the server sees it too: its tensors are not sent.
  bool shared() const { return shared_; }

  // As values; T as for Tensor::values().
  template <class T>
  absl::Span<T> values() const {
    return {reinterpret_cast<T*>(data_), size_ / sizeof(T)};
  }

  // The first bytes as a tensor that keeps the memory. Do not write to it during a call
  // that has the tensor, nor after one that failed for its deadline or connection: the server
  // may still read it then.
  // Precondition: the shape's bytes fit.
  Tensor AsTensor(DataType dtype, std::vector<int64_t> shape,
                  MemoryFormat format = MemoryFormat::kContiguous) const;

 private:
  friend class Client;
  char* data_ = nullptr;
  size_t size_ = 0;
  bool shared_ = false;
  std::shared_ptr<const void> owner_;
};

// Memory that this process has on the server's GPU, from Client::RegisterCudaMemory().
// Shared by copies; with the last one the server lets go of it, which is one call to it. Only
// then may the memory be freed. One made by default is none, and no call takes it.
class CudaMemory {
 public:
  int64_t size() const { return size_; }

 private:
  friend class Client;
  std::string region() const;
  int64_t size_ = 0;
  std::shared_ptr<const internal::CudaRegion> region_;
};

// A tensor that lies there.
struct CudaTensor {
  CudaMemory memory;
  int64_t offset = 0;  // of its first byte; a multiple of 64
  DataType dtype = DataType::kFloat32;
  std::vector<int64_t> shape;
  MemoryFormat format = MemoryFormat::kContiguous;
};

struct NamedTensor {
  std::string name;  // "weight", "running_mean", ...
  Tensor tensor;
};

// A tensor that is sent from where it need not be in memory: a file. Its bytes can be counted
// in 63 bits.
struct TensorSource {
  DataType dtype = DataType::kFloat32;
  std::vector<int64_t> shape = {};
  MemoryFormat memory_format = MemoryFormat::kContiguous;
  // Fills `to` with the bytes from `offset` on. From the first to the last; from the first
  // again where the call is tried again.
  std::function<absl::Status(int64_t offset, absl::Span<char> to)> read = {};
};

// Where a tensor goes that is not to be in memory: takes the bytes from `offset` on, from the
// first to the last, and from the first again where the call is tried again.
using TensorSink = std::function<absl::Status(int64_t offset, std::string_view bytes)>;

// --- instances ---

enum class Mode { kTrain, kEval };

std::string_view NameOf(Mode mode);  // "train", "eval"

// The layers of torch.nn, with its names and defaults.
template <int kDimensions>
struct BatchNorm {
  int64_t num_features = 0;
  double eps = 1e-5;
  // None: the cumulative average over all batches.
  std::optional<double> momentum = 0.1;
  bool affine = true;
  bool track_running_stats = true;
};
using BatchNorm1d = BatchNorm<1>;  // (N, C) or (N, C, L)
using BatchNorm2d = BatchNorm<2>;  // (N, C, H, W)
using BatchNorm3d = BatchNorm<3>;  // (N, C, D, H, W)

// (*, normalized_shape).
struct LayerNorm {
  std::vector<int64_t> normalized_shape = {};
  double eps = 1e-5;
  bool elementwise_affine = true;
  bool bias = true;
};

// (N, C, *); num_groups divides num_channels.
struct GroupNorm {
  int64_t num_groups = 0;
  int64_t num_channels = 0;
  double eps = 1e-5;
  bool affine = true;
};

// (N, C, H, W) or (C, H, W).
struct InstanceNorm2d {
  int64_t num_features = 0;
  double eps = 1e-5;
  double momentum = 0.1;
  bool affine = false;
  bool track_running_stats = false;
};

// (*, normalized_shape).
struct RmsNorm {
  std::vector<int64_t> normalized_shape = {};
  // None: the machine epsilon of the input's dtype.
  std::optional<double> eps = std::nullopt;
  bool elementwise_affine = true;
};

using Layer = std::variant<BatchNorm2d, BatchNorm1d, BatchNorm3d, LayerNorm, GroupNorm,
                           InstanceNorm2d, RmsNorm>;

struct InstanceConfig {
  Layer layer = {};
  // Of parameters, statistics and gradients: kFloat32, or kFloat64 for float64 inputs.
  DataType state_dtype = DataType::kFloat32;
};

struct Instance {
  std::string name;
  std::string uid;
  InstanceConfig config;
  Mode mode = Mode::kTrain;
  uint64_t version = 0;
  int64_t num_batches_tracked = 0;
  bool has_gradients = false;
  std::string optimizer;  // "sgd", "adam", "adamw", or empty before the first step
  int64_t state_bytes = 0;
  absl::Time create_time;
  absl::Time update_time;
};

// --- what calls take and answer ---
//
// Members of what calls take are initialized with {} so that designated
// initializers may leave them out without a warning.

// Of any one call.
struct CallOptions {
  // For the call with all its retries; ClientOptions::timeout unless given.
  std::optional<absl::Duration> timeout = {};
  // Changing calls: another version there is ABORTED, and nothing changes.
  std::optional<uint64_t> expected_version = {};
  // Changing calls: a UUID, made by the client unless given. Give one to repeat a
  // call from another process without doing it twice.
  std::string request_id = {};
  // Streamed calls: told the payload's bytes so far, from the calling thread.
  std::function<void(int64_t received, int64_t total)> progress = {};
};

// The answer to a change.
struct Changed {
  uint64_t version = 0;
  // The request_id had been applied before, and was not again.
  bool replayed = false;
};

struct CreateResult : Changed {
  Instance instance;
};

struct ListOptions {
  std::string name_prefix = {};
  int32_t page_size = 0;  // 1 to 1,000; 0: 100
  std::string page_token = {};
};

struct InstancePage {
  std::vector<Instance> instances;
  std::string next_page_token;  // empty on the last page
  int64_t total_count = 0;      // on the server
};

// Statistics of one batch, a value a channel, or a value for each set of values
// that the layer normalizes together: samples in order, groups within them.
struct BatchStatistics {
  int64_t count = 0;  // values behind each
  std::vector<double> mean;
  std::vector<double> var;  // biased
};

// What follows the normalization in the same pass.
enum class Activation { kNone, kRelu };

// Forward answers activation(norm(input) + residual).
struct ForwardOptions {
  std::optional<Mode> mode = {};  // for this call alone; the instance's unless given
  bool save_for_backward = false;
  bool return_batch_statistics = false;
  Activation activation = Activation::kNone;
  std::optional<Tensor> residual = {};  // of the input's dtype, shape and format
};

struct ForwardResult : Changed {
  Tensor output;  // dtype, shape and format of the input
  Mode mode = Mode::kTrain;
  int64_t num_batches_tracked = 0;
  std::string context_id;  // with save_for_backward
  std::optional<BatchStatistics> batch_statistics;
};

struct BackwardOptions {
  // What a Forward kept, or, without one, its input and what else is known of it.
  std::string context_id = {};
  std::optional<Tensor> input = {};
  std::optional<Mode> mode = {};
  std::optional<BatchStatistics> batch_statistics = {};
  bool accumulate = false;      // add the gradients to the instance's
  bool retain_context = false;  // keep the context for another Backward
  bool skip_grad_input = false;
};

struct BackwardResult : Changed {
  std::optional<Tensor> grad_input;   // none with skip_grad_input
  std::optional<Tensor> grad_weight;  // none without affine
  std::optional<Tensor> grad_bias;
  std::optional<Tensor> grad_residual;  // where the context's Forward had a residual
};

struct FoldConvolutionOptions {
  std::optional<Tensor> bias = {};  // (O), of the weight's dtype; zeros unless given
  bool transposed = false;
  int64_t groups = 1;  // of a transposed convolution; a plain one's weight tells them
};

struct FoldedConvolution {
  uint64_t version = 0;  // of the instance that was folded in
  Tensor weight;
  Tensor bias;
};

// torch.optim.SGD.
struct Sgd {
  double lr = 0;
  double momentum = 0;
  double dampening = 0;
  double weight_decay = 0;
  bool nesterov = false;
  bool maximize = false;
};

// torch.optim.Adam.
struct Adam {
  double lr = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 0;
  bool amsgrad = false;
  bool maximize = false;
};

// torch.optim.AdamW.
struct AdamW {
  double lr = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 1e-2;
  bool amsgrad = false;
  bool maximize = false;
};

using Optimizer = std::variant<Sgd, Adam, AdamW>;

struct StepOptions {
  bool reset_optimizer = false;  // forget its state first
  bool zero_grad = false;        // drop the gradients afterwards
};

struct StepResult : Changed {
  bool stepped = false;  // whether there were gradients
};

struct GetStateOptions {
  bool include_gradients = false;
  bool include_optimizer = false;
};

struct State {
  uint64_t version = 0;
  Instance instance;
  std::vector<NamedTensor> state_dict;       // PyTorch's keys
  std::vector<NamedTensor> gradients;        // the same keys
  std::vector<NamedTensor> optimizer_state;  // "weight.momentum_buffer", ...
};

struct Checkpoint {
  std::string id;
  absl::Time create_time;
  std::string reason;  // "manual", "interval", "shutdown"
  int64_t instance_count = 0;
  int64_t total_bytes = 0;
  bool sound = false;
  std::string problem;  // what is wrong when it is not sound
};

struct SaveCheckpointResult {
  Checkpoint checkpoint;
  bool replayed = false;
};

struct LoadCheckpointResult {
  struct Loaded {
    std::string name;
    uint64_t version = 0;
  };
  Checkpoint checkpoint;
  std::vector<Loaded> instances;  // the first 1,000
  int64_t instance_count = 0;
  std::vector<Checkpoint> damaged;  // newer ones that were passed over
};

struct CheckpointPage {
  std::vector<Checkpoint> checkpoints;  // newest first
  std::string next_page_token;
};

struct ServerInfo {
  struct Device {
    std::string name;
    int32_t parallelism = 0;
    int64_t memory_bytes = 0;
    bool healthy = false;
    int64_t memory_budget = 0;  // of a GPU's own memory; 0: none but the host's
    int64_t memory_in_use = 0;
  };
  struct Limits {
    int64_t max_message_bytes = 0;
    int64_t max_instances = 0;
    int64_t max_features = 0;
    int64_t memory_budget = 0;
    int64_t context_budget = 0;
    absl::Duration context_ttl;
  };
  std::string version;
  std::string backend;         // "cpu", "cuda"
  std::string backend_reason;  // where normd chose "cpu": why not "cuda"
  std::vector<Device> devices;
  Limits limits;
  absl::Time start_time;
  int64_t instance_count = 0;
  int64_t memory_in_use = 0;
  std::string durability;  // "interval", "update", "none"
};

// What the server lends to the clients on its host; all 0 without --shared_memory=on.
struct SharedMemoryStatus {
  bool enabled = false;
  std::string socket;
  int64_t connections = 0;
  int64_t regions = 0;
  int64_t bytes_in_use = 0;
  int64_t shared_memory_budget = 0;
  int64_t max_region_bytes = 0;
  int64_t max_regions = 0;  // of a connection
  bool cuda_ipc = false;    // whether memory on the server's GPU may be registered
};

// grpc.health.v1.HealthCheckResponse.ServingStatus.
enum class Health { kUnknown, kServing, kNotServing, kServiceUnknown };

// --- errors ---

// What the server says for programs about a refused call; what does not apply is
// empty.
struct ErrorDetail {
  std::string field;    // path in the request: "input.shape"
  std::string value;    // what was found there
  std::string allowed;  // what is allowed there
  int64_t limit = 0;    // reached, in the unit of its flag
  std::string flag;     // of the server, that sets the limit
  absl::Duration retry_delay;
  uint64_t current_version = 0;  // when expected_version did not match
};

// The detail that came with `status`; empty where none did.
ErrorDetail DetailOf(const absl::Status& status);

// --- the client ---

// UNAVAILABLE is retried, CANCELLED by a server that stops, and RESOURCE_EXHAUSTED where
// the server says when to come again; every change carries a request_id, so that no retry counts
// twice. Waits double from `initial_backoff` to `max_backoff`, each shortened at random by up to a
// half; never shorter than the server asks for.
struct RetryPolicy {
  absl::Duration initial_backoff = absl::Milliseconds(50);
  absl::Duration max_backoff = absl::Seconds(5);
  int max_attempts = 0;  // 0: as many as the timeout allows; 1: no retry
};

// Whether the tensors of Forward and Backward go through memory that client and server
// share, where the server is on this host and runs with --shared_memory=on. Outputs lie there
// too, and keep their piece of the server's --shared_memory_budget while they live.
enum class SharedMemory {
  kAuto,  // where it is possible and worth it
  kOn,    // always: calls fail where it is not possible
  kOff,
};

struct ClientOptions {
  // For a call with all its retries, unless the call says otherwise.
  absl::Duration timeout = absl::Seconds(60);
  RetryPolicy retry = {};
  // Tensors whose message would be longer go through streams; 0: the server's own
  // limit, asked for when it is first needed.
  int64_t max_message_bytes = 0;
  // Bytes of tensor in one message of a stream.
  int64_t stream_chunk_bytes = 1 << 20;
  SharedMemory shared_memory = SharedMemory::kAuto;
  // Files in PEM. With `tls_ca` the connection speaks TLS and believes the certificates
  // that these roots vouch for (but on a Unix socket, which is never encrypted);
  // `tls_cert` and `tls_key` are what it shows of itself.
  std::string tls_ca = {};
  std::string tls_cert = {};
  std::string tls_key = {};
  // File of the token that each call shows. Read once, as the others are.
  std::string token_file = {};
  // Begins the user-agent that the server sees: "trainer/1.2".
  std::string user_agent = {};
};

// A connection to one server, shared by copies. Any number of threads may call at
// once. Calls block. A failed call carries the server's status code and message,
// and DetailOf() its detail.
class Client {
 public:
  // `target` is "host:port", "unix:/path", or what else gRPC names. Connects when
  // first used, and again whenever the connection was lost; so an error here is
  // one of the arguments.
  static absl::StatusOr<Client> Connect(std::string target, const ClientOptions& options = {});

  absl::StatusOr<CreateResult> CreateInstance(std::string_view name, const InstanceConfig& config,
                                              Mode mode = Mode::kTrain,
                                              const CallOptions& call = {}) const;
  absl::StatusOr<Instance> GetInstance(std::string_view name, const CallOptions& call = {}) const;
  absl::StatusOr<InstancePage> ListInstances(const ListOptions& options = {},
                                             const CallOptions& call = {}) const;
  absl::StatusOr<Changed> DeleteInstance(std::string_view name, const CallOptions& call = {}) const;

  absl::StatusOr<Changed> Train(std::string_view name, const CallOptions& call = {}) const;
  absl::StatusOr<Changed> Eval(std::string_view name, const CallOptions& call = {}) const;

  // Memory for a tensor: shared with the server where that is possible (with
  // SharedMemory::kOn an error where it is not), else ordinary. Not initialized.
  absl::StatusOr<TensorBuffer> Allocate(size_t bytes, const CallOptions& call = {}) const;

  // Through shared memory where the options say so, or through ForwardStream and
  // BackwardStream where one message is too short. What lies in a shared TensorBuffer is read
  // there, other tensors are copied into shared memory; outputs are in it and not copied.
  absl::StatusOr<ForwardResult> Forward(std::string_view name, const Tensor& input,
                                        const ForwardOptions& options = {},
                                        const CallOptions& call = {}) const;
  absl::StatusOr<BackwardResult> Backward(std::string_view name, const Tensor& grad_output,
                                          const BackwardOptions& options,
                                          const CallOptions& call = {}) const;
  // Through the streams whatever the size.
  absl::StatusOr<ForwardResult> ForwardStream(std::string_view name, const Tensor& input,
                                              const ForwardOptions& options = {},
                                              const CallOptions& call = {}) const;
  // From and to where no tensor need be in memory: the result's output has no bytes. An error
  // of either end is the call's. Both are used from the calling thread.
  absl::StatusOr<ForwardResult> ForwardStream(std::string_view name, const TensorSource& input,
                                              const TensorSink& output,
                                              const ForwardOptions& options = {},
                                              const CallOptions& call = {}) const;
  absl::StatusOr<BackwardResult> BackwardStream(std::string_view name, const Tensor& grad_output,
                                                const BackwardOptions& options,
                                                const CallOptions& call = {}) const;

  // For tensors on the server's GPU, which runs with --cuda_ipc=on on this host: has it open
  // `bytes` of memory from cudaMalloc, by the bytes of its cudaIpcMemHandle_t.
  absl::StatusOr<CudaMemory> RegisterCudaMemory(std::string_view ipc_handle, int64_t bytes,
                                                const CallOptions& call = {}) const;
  // `input` must be complete before the call; `output`, which may be the input in eval mode,
  // is complete after it, and the result's is empty. Keeps no context: Backward takes the input
  // again. After an error of deadline or connection the server may still work on both.
  absl::StatusOr<ForwardResult> Forward(std::string_view name, const CudaTensor& input,
                                        const CudaTensor& output,
                                        const ForwardOptions& options = {},
                                        const CallOptions& call = {}) const;
  // Likewise; without `grad_input` it is not computed. options.input and context_id are for
  // tensors of the host.
  absl::StatusOr<BackwardResult> Backward(std::string_view name, const CudaTensor& grad_output,
                                          const CudaTensor& input,
                                          const std::optional<CudaTensor>& grad_input,
                                          const BackwardOptions& options = {},
                                          const CallOptions& call = {}) const;

  // Weight and bias of a convolution that does what the one of `weight` does with
  // the instance in eval mode after it.
  absl::StatusOr<FoldedConvolution> FoldConvolution(std::string_view name, const Tensor& weight,
                                                    const FoldConvolutionOptions& options = {},
                                                    const CallOptions& call = {}) const;

  absl::StatusOr<Changed> ZeroGrad(std::string_view name, bool set_to_none = true,
                                   const CallOptions& call = {}) const;
  absl::StatusOr<StepResult> Step(std::string_view name, const Optimizer& optimizer,
                                  const StepOptions& options = {},
                                  const CallOptions& call = {}) const;

  absl::StatusOr<State> GetState(std::string_view name, const GetStateOptions& options = {},
                                 const CallOptions& call = {}) const;
  absl::StatusOr<Changed> SetState(std::string_view name, absl::Span<const NamedTensor> state_dict,
                                   const CallOptions& call = {}) const;
  absl::StatusOr<Changed> ResetRunningStats(std::string_view name,
                                            const CallOptions& call = {}) const;
  absl::StatusOr<Changed> ResetParameters(std::string_view name,
                                          const CallOptions& call = {}) const;

  absl::StatusOr<SaveCheckpointResult> SaveCheckpoint(const CallOptions& call = {}) const;
  // The newest sound one unless named; all its instances unless some are named.
  absl::StatusOr<LoadCheckpointResult> LoadCheckpoint(std::string_view checkpoint_id = "",
                                                      absl::Span<const std::string> names = {},
                                                      const CallOptions& call = {}) const;
  absl::StatusOr<CheckpointPage> ListCheckpoints(int32_t page_size = 0,
                                                 std::string_view page_token = "",
                                                 const CallOptions& call = {}) const;

  absl::StatusOr<ServerInfo> GetServerInfo(const CallOptions& call = {}) const;
  absl::StatusOr<SharedMemoryStatus> GetSharedMemoryStatus(const CallOptions& call = {}) const;
  // Of the whole server, or of "normd.v1.NormService".
  absl::StatusOr<Health> CheckHealth(std::string_view service = "",
                                     const CallOptions& call = {}) const;

 private:
  explicit Client(std::shared_ptr<internal::Connection> connection)
      : connection_(std::move(connection)) {}

  std::shared_ptr<internal::Connection> connection_;
};

// --- inline definitions ---

template <class T>
Tensor Tensor::Borrow(absl::Span<const T> values, std::vector<int64_t> shape, MemoryFormat format) {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double> || std::is_same_v<T, int64_t>,
                "for 16-bit types give the bytes and their DataType");
  constexpr DataType dtype = std::is_same_v<T, float>    ? DataType::kFloat32
                             : std::is_same_v<T, double> ? DataType::kFloat64
                                                         : DataType::kInt64;
  return Borrow(dtype, std::move(shape),
                {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)}, format);
}

}  // namespace normd::inline client

#endif  // NORMD_CLIENT_NORMD_CLIENT_H_
