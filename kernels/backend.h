// Backend: the one interface between the server and whatever computes.
#ifndef NORMD_KERNELS_BACKEND_H_
#define NORMD_KERNELS_BACKEND_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stop_token>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/problem.h"

namespace normd {

enum class Outcome : uint8_t {
  kOk,
  kStopped,       // the stop token was set; outputs hold anything
  kOutOfMemory,   // scratch, staging or device memory; outputs hold anything
  kTooLarge,      // likewise, and there will not be: more than the device's budget
  kDeviceFailed,  // the device cannot go on (sticky); outputs hold anything
  kRefused,       // what was given names nothing that this device can use
};

// Where the tensors of a call lie. Parameters and statistics are always in host
// memory.
enum class Place : uint8_t { kHost, kDevice };

// By what a process names memory that it has on a device to others of this host: the bytes
// of a cudaIpcMemHandle_t.
using DeviceHandle = std::array<std::byte, 64>;

// weight and bias a channel, problem.channels values of
// problem.parameter_dtype() each; null: 1 and 0.
struct Affine {
  const void* weight = nullptr;
  const void* bias = nullptr;
};

// Statistics of a batch, problem.num_sets() values each. `m2` is the sum of
// squared deviations from the mean, so that partial results merge exactly
// (Chan, Golub, LeVeque 1979): var = m2 / set_size. Double, since a mean rounded
// to float32 loses the answer where |mean| >> deviation.
struct Moments {
  double* mean = nullptr;
  double* m2 = nullptr;
};

// Statistics to normalize by, problem.num_sets() values each: mean, and biased
// variance without eps.
struct Statistics {
  const double* mean = nullptr;
  const double* var = nullptr;
};

// What a block of parameters or statistics is known by: with the same pointer, of the same
// owner, and the same number of bytes it holds the same bytes for ever, so that a backend
// with memory of its own may keep them there while the owner lives. Null: of this call alone.
using Token = std::shared_ptr<const void>;

// Those of the blocks of a call.
struct Lasting {
  Token weight = nullptr;
  Token bias = nullptr;
  Token mean = nullptr;
  Token var = nullptr;
};

// ReLU as PyTorch has it: NaN stays NaN and lets its gradient through.
enum class Activation : uint8_t { kNone, kRelu };

// What follows the norm in the same pass: y = activation(norm(x) + residual).
struct Epilogue {
  const void* residual = nullptr;  // shaped and typed as x; null: none
  Activation activation = Activation::kNone;
  // kRelu only: receives a bit a value, in memory order (value i is bit i % 8 of
  // byte i / 8), set where the gradient passes. ReluMaskBytes(problem.size())
  // bytes; null: not wanted.
  uint8_t* relu_mask = nullptr;
};

// Bytes of a mask of `size` values: some more than the bits need, so that whole
// words may be read from any bit on. The bytes after the last bit hold anything.
constexpr int64_t ReluMaskBytes(int64_t size) { return (size + 63) / 64 * 8 + 8; }

struct ForwardByBatchArgs {
  const void* x = nullptr;
  void* y = nullptr;  // may be x or the residual; null: only the moments are wanted
  Affine affine = {};
  Moments moments = {};  // written; required
  Epilogue epilogue = {};
  Lasting lasting = {};
};

struct ForwardByStatisticsArgs {
  const void* x = nullptr;
  void* y = nullptr;  // may be x or the residual
  Affine affine = {};
  Statistics statistics = {};
  Epilogue epilogue = {};
  Lasting lasting = {};
};

// `count` elements, in the order of memory, from element `first` of a tensor that
// need not be there as a whole: x, y, residual and relu_mask are the range's own.
struct ForwardRangeArgs {
  int64_t first = 0;  // 0 <= first <= first + count <= problem.size()
  int64_t count = 0;
  const void* x = nullptr;
  void* y = nullptr;  // may be x or the residual
  Affine affine = {};
  Statistics statistics = {};  // of all sets of the problem
  // Whether these are the whole tensor's own, as ForwardByBatch found them.
  bool statistics_of_batch = false;
  Epilogue epilogue = {};
  Lasting lasting = {};
};

struct BackwardArgs {
  const void* x = nullptr;
  const void* grad_y = nullptr;
  void* grad_x = nullptr;  // may be x or grad_y; null: not wanted
  const void* weight = nullptr;
  Statistics statistics = {};  // those that the forward normalized by
  // Whether these are the statistics of x itself (train), so that the gradient
  // flows through them too, or constants (eval).
  bool statistics_of_batch = true;
  // Written: problem.channels values of problem.parameter_dtype() each; null:
  // not wanted.
  void* grad_weight = nullptr;
  void* grad_bias = nullptr;
  // Of a forward with an epilogue: the mask it wrote (null: no activation), and
  // where the residual's gradient goes: may be grad_y; null: not wanted.
  const uint8_t* relu_mask = nullptr;
  void* grad_residual = nullptr;
  Lasting lasting = {};
};

struct DeviceInfo {
  std::string name;
  int parallelism = 1;
  int64_t memory_bytes = 0;
  bool healthy = true;
  // Of the device's own memory: what this process may take, and what it has. 0: it has
  // none but the host's.
  int64_t memory_budget = 0;
  int64_t memory_in_use = 0;
};

// A device that computes norms.
//
// Calls block until their outputs are complete, and any number of threads may
// call at once. That is also how asynchronous devices overlap: each call in
// flight has a stream of its own, so one's copies run beside another's kernel.
//
// Pointers need only their element's alignment (problem.dtype); nothing past
// the end of a tensor is read or written. Empty problems are allowed: nothing is
// written but zeroed grad_weight, grad_bias and moments. NaN and Inf pass
// through as IEEE arithmetic has it, and stay within their set.
//
// Exact where |mean| >> deviation: values are shifted before they are squared,
// and y is built as ((x - shift) - residual) * invstd * weight + bias with
// shift + residual = mean.
class Backend {
 public:
  virtual ~Backend() = default;

  // "cpu", "cuda".
  virtual std::string_view name() const = 0;
  virtual std::vector<DeviceInfo> devices() const = 0;
  // Whether tensors may lie there.
  virtual bool Supports(Place place) const = 0;
  // Opens memory that another process has on the device: where it lies for Place::kDevice,
  // and how many bytes there are from there on. It stays open as long as `memory`, which
  // must not outlive this. kRefused: the handle names none.
  virtual Outcome OpenShared(const DeviceHandle& /*handle*/, std::shared_ptr<void>* /*memory*/,
                             int64_t* /*bytes*/) {
    return Outcome::kRefused;
  }
  // Gives up memory of the host that is kept for calls to come. At any time, on any thread.
  virtual void ReleaseIdle() {}

  // Normalizes x by the statistics of x itself and returns them.
  virtual Outcome ForwardByBatch(const NormProblem& problem, const ForwardByBatchArgs& args,
                                 Place place, std::stop_token stop) = 0;

  // Normalizes x by given statistics.
  virtual Outcome ForwardByStatistics(const NormProblem& problem,
                                      const ForwardByStatisticsArgs& args, Place place,
                                      std::stop_token stop) = 0;

  // The same for a part of x. However a tensor is cut, the parts are what
  // ForwardByStatistics makes of the whole, bit for bit, and with
  // statistics_of_batch what ForwardByBatch makes of it.
  virtual Outcome ForwardRange(const NormProblem& problem, const ForwardRangeArgs& args,
                               Place place, std::stop_token stop) = 0;

  // Gradients of either, x^ being the normalized x:
  //   grad_bias   = sum(grad_y)          grad_weight = sum(grad_y * x^)    a channel
  //   grad_x      = invstd * (g - mean(g) - x^ * mean(g * x^)),  g = grad_y * weight
  // with both means over the set (Ioffe and Szegedy 2015); with constant
  // statistics grad_x = invstd * g. Where the forward had an activation, grad_y is
  // what the mask lets through of it, and that is grad_residual.
  virtual Outcome Backward(const NormProblem& problem, const BackwardArgs& args, Place place,
                           std::stop_token stop) = 0;
};

}  // namespace normd

#endif  // NORMD_KERNELS_BACKEND_H_
