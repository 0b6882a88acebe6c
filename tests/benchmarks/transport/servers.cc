#include "tests/benchmarks/transport/servers.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <filesystem>
#include <fstream>
#include <memory>
#include <mutex>
#include <vector>

#include "absl/strings/numbers.h"
#include "grpcpp/generic/async_generic_service.h"
#include "grpcpp/grpcpp.h"
#include "normd/v1/norm_service.grpc.pb.h"

namespace {

using normd::v1::Tensor;

// Of an answer of the echo: more than any that is asked for.
constexpr size_t kLargestAnswer = size_t{256} << 20;

class EchoCall final : public grpc::ServerGenericBidiReactor {
 public:
  EchoCall(const std::string& bytes, size_t size) : bytes_(bytes), size_(size) {
    StartRead(&request_);
  }
  void OnReadDone(bool ok) override {
    if (!ok) return Finish(grpc::Status(grpc::StatusCode::INVALID_ARGUMENT, "no message"));
    // Lent, as normd lends its output.
    const grpc::Slice slice(
        const_cast<char*>(bytes_.data()), std::min(size_, bytes_.size()), [](void*) {}, nullptr);
    response_ = grpc::ByteBuffer(&slice, 1);
    StartWriteAndFinish(&response_, grpc::WriteOptions(), grpc::Status::OK);
  }
  void OnDone() override { delete this; }

 private:
  const std::string& bytes_;
  const size_t size_;
  grpc::ByteBuffer request_;
  grpc::ByteBuffer response_;
};

// Returns each message as it has come, while the next is received.
class ChunksCall final : public grpc::ServerGenericBidiReactor {
 public:
  ChunksCall() { StartRead(&arriving_); }
  void OnReadDone(bool ok) override {
    Note([this, ok] { (ok ? arrived_ : ended_) = true; });
  }
  // Where a write fails, the next read does, too.
  void OnWriteDone(bool) override {
    Note([this] { writing_ = false; });
  }
  void OnDone() override { delete this; }

 private:
  template <class What>
  void Note(What what) {
    bool goes_on = false, ends = false;
    {
      const std::scoped_lock lock(mutex_);
      what();
      if (writing_) return;
      goes_on = arrived_;
      ends = !arrived_ && ended_;
      if (goes_on) leaving_.Swap(&arriving_);
      writing_ = goes_on;
      arrived_ = false;
    }
    if (ends) return Finish(grpc::Status::OK);
    if (!goes_on) return;
    StartWrite(&leaving_);
    StartRead(&arriving_);
  }

  std::mutex mutex_;
  bool arrived_ = false, writing_ = false, ended_ = false;
  grpc::ByteBuffer arriving_;
  grpc::ByteBuffer leaving_;
};

// Returns the messages, as they came, when the last has come: as who must see them all first.
class HeldChunksCall final : public grpc::ServerGenericBidiReactor {
 public:
  HeldChunksCall() { StartRead(&held_.emplace_back()); }
  void OnReadDone(bool ok) override {
    if (ok) return StartRead(&held_.emplace_back());
    held_.pop_back();
    WriteNext();
  }
  void OnWriteDone(bool ok) override {
    held_.pop_front();
    if (!ok) held_.clear();
    WriteNext();
  }
  void OnDone() override { delete this; }

 private:
  void WriteNext() {
    if (held_.empty()) return Finish(grpc::Status::OK);
    StartWrite(&held_.front());
  }

  std::deque<grpc::ByteBuffer> held_;
};

class Echo final : public grpc::CallbackGenericService {
  grpc::ServerGenericBidiReactor* CreateReactor(
      grpc::GenericCallbackServerContext* context) override {
    uint64_t size = 0;
    const std::string method = context->method();
    if (method == kEchoChunks) return new ChunksCall;
    if (method == kEchoHeldChunks) return new HeldChunksCall;
    (void)absl::SimpleAtoi(method.substr(method.rfind('/') + 1), &size);
    return new EchoCall(bytes_, size);
  }

  const std::string bytes_ = std::string(kLargestAnswer, 'x');
};

// BatchNorm2d in float32, contiguous, with weight 1 and bias 0.
class Ordinary final : public normd::v1::NormService::Service {
  using Floats = std::vector<float>;
  struct Shape {
    size_t batch, channels, positions;
  };

  static Shape ShapeOf(const Tensor& tensor) {
    return {static_cast<size_t>(tensor.shape(0)), static_cast<size_t>(tensor.shape(1)),
            static_cast<size_t>(tensor.shape(2) * tensor.shape(3))};
  }
  static Floats FromWire(const Tensor& tensor) {
    Floats values(tensor.data().size() / sizeof(float));
    std::memcpy(values.data(), tensor.data().data(), values.size() * sizeof(float));
    return values;
  }
  static void ToWire(const Tensor& like, const Floats& values, Tensor& tensor) {
    tensor.set_dtype(like.dtype());
    *tensor.mutable_shape() = like.shape();
    tensor.set_data(values.data(), values.size() * sizeof(float));
  }

  static void Moments(const Floats& x, const Shape& shape, Floats& mean, Floats& inverse_std) {
    const auto count = static_cast<double>(shape.batch * shape.positions);
    for (size_t c = 0; c < shape.channels; ++c) {
      double sum = 0, squares = 0;
      for (size_t n = 0; n < shape.batch; ++n) {
        const float* plane = &x[(n * shape.channels + c) * shape.positions];
        for (size_t i = 0; i < shape.positions; ++i) {
          sum += plane[i];
          squares += double{plane[i]} * plane[i];
        }
      }
      const double m = sum / count;
      mean[c] = static_cast<float>(m);
      inverse_std[c] = static_cast<float>(1 / std::sqrt(squares / count - m * m + 1e-5));
    }
  }

  grpc::Status Forward(grpc::ServerContext*, const normd::v1::ForwardRequest* request,
                       normd::v1::ForwardResponse* response) override {
    const Shape shape = ShapeOf(request->input());
    const Floats x = FromWire(request->input());
    Floats y(x.size());
    Floats mean(shape.channels, 0), inverse_std(shape.channels, 1);
    if (request->mode() == normd::v1::MODE_TRAIN) {
      Moments(x, shape, mean, inverse_std);
      const std::scoped_lock lock(mutex_);
      running_mean_.resize(shape.channels);
      for (size_t c = 0; c < shape.channels; ++c) running_mean_[c] += 0.1F * mean[c];
    }
    for (size_t p = 0; p < shape.batch * shape.channels; ++p) {
      const float m = mean[p % shape.channels], s = inverse_std[p % shape.channels];
      for (size_t i = p * shape.positions; i < (p + 1) * shape.positions; ++i) {
        y[i] = (x[i] - m) * s;
      }
    }
    ToWire(request->input(), y, *response->mutable_output());
    return grpc::Status::OK;
  }

  grpc::Status Backward(grpc::ServerContext*, const normd::v1::BackwardRequest* request,
                        normd::v1::BackwardResponse* response) override {
    const Shape shape = ShapeOf(request->input());
    const Floats x = FromWire(request->input());
    const Floats grad = FromWire(request->grad_output());
    Floats grad_x(x.size());
    Floats mean(shape.channels), inverse_std(shape.channels);
    Moments(x, shape, mean, inverse_std);
    const auto count = static_cast<double>(shape.batch * shape.positions);
    for (size_t c = 0; c < shape.channels; ++c) {
      const float m = mean[c], s = inverse_std[c];
      double sum = 0, products = 0;
      for (size_t n = 0; n < shape.batch; ++n) {
        const size_t begin = (n * shape.channels + c) * shape.positions;
        for (size_t i = begin; i < begin + shape.positions; ++i) {
          sum += grad[i];
          products += double{grad[i]} * ((x[i] - m) * s);
        }
      }
      const auto mean_grad = static_cast<float>(sum / count);
      const auto mean_product = static_cast<float>(products / count);
      for (size_t n = 0; n < shape.batch; ++n) {
        const size_t begin = (n * shape.channels + c) * shape.positions;
        for (size_t i = begin; i < begin + shape.positions; ++i) {
          grad_x[i] = s * (grad[i] - mean_grad - (x[i] - m) * s * mean_product);
        }
      }
    }
    ToWire(request->input(), grad_x, *response->mutable_grad_input());
    return grpc::Status::OK;
  }

  std::mutex mutex_;
  Floats running_mean_;
};

}  // namespace

std::string PortFile(const std::string& directory, const std::string& name) {
  return directory + "/" + name + ".port";
}

std::string SocketAddress(const std::string& directory, const std::string& name) {
  return "unix:" + directory + "/" + name + ".sock";
}

int Serve(const std::string& name, const std::string& directory) {
  Echo echo;
  Ordinary ordinary;
  grpc::ServerBuilder builder;
  if (name == "echo") {
    builder.RegisterCallbackGenericService(&echo);
  } else {
    builder.RegisterService(&ordinary);
  }
  builder.SetMaxReceiveMessageSize(-1);
  builder.SetMaxSendMessageSize(-1);
  if (name == "echo") builder.AddChannelArgument(GRPC_ARG_HTTP2_BDP_PROBE, 0);  // as normd
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.AddListeningPort(SocketAddress(directory, name), grpc::InsecureServerCredentials());
  const auto server = builder.BuildAndStart();
  if (server == nullptr) return 1;
  const std::string file = PortFile(directory, name);
  std::ofstream(file + ".tmp") << "127.0.0.1:" << port << "\n" << std::flush;
  std::filesystem::rename(file + ".tmp", file);
  server->Wait();
  return 0;
}
