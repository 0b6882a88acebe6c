#include "tests/benchmarks/transport/shared_memory.h"

#include <atomic>
#include <cstdlib>
#include <iostream>
#include <thread>

#include "absl/time/clock.h"

namespace {

template <class T>
T Checked(absl::StatusOr<T> answer, const char* what) {
  if (answer.ok()) return *std::move(answer);
  std::cerr << what << ": " << answer.status() << "\n";
  std::exit(1);
}

}  // namespace

SharedMemoryCalls::SharedMemoryCalls(const std::string& address, const std::string& where)
    : client_(Checked(normd::Client::Connect(address, {.shared_memory = normd::SharedMemory::kOn}),
                      "Connect")),
      copied_(where == "copied") {}

void SharedMemoryCalls::Put(const normd::v1::Tensor& tensor, int in_flight) {
  tensors_.clear();
  const std::vector<int64_t> shape(tensor.shape().begin(), tensor.shape().end());
  for (int i = 0; i < in_flight; ++i) {
    if (copied_) {
      tensors_.push_back(normd::Tensor::Own(normd::DataType::kFloat32, shape, tensor.data()));
      continue;
    }
    const auto buffer = Checked(client_.Allocate(tensor.data().size()), "Allocate");
    tensor.data().copy(buffer.data(), buffer.size());
    tensors_.push_back(buffer.AsTensor(normd::DataType::kFloat32, shape));
  }
}

void SharedMemoryCalls::CallOnce(const std::string& name, const std::string& op,
                                 const normd::Tensor& x) const {
  if (op == "backward") {
    Checked(client_.Backward(name, x, {.input = x, .mode = normd::Mode::kTrain}), "Backward");
  } else {
    Checked(
        client_.Forward(name, x, {.mode = op == "eval" ? normd::Mode::kEval : normd::Mode::kTrain}),
        "Forward");
  }
}

std::vector<double> SharedMemoryCalls::Send(const std::string& name, const std::string& op,
                                            int count) {
  std::vector<double> latencies(static_cast<size_t>(count));
  std::atomic<size_t> next = 0;
  const auto work = [&](const normd::Tensor& x) {
    for (size_t i = next++; i < latencies.size(); i = next++) {
      const absl::Time start = absl::Now();
      CallOnce(name, op, x);
      latencies[i] = absl::ToDoubleMilliseconds(absl::Now() - start);
    }
  };
  std::vector<std::thread> threads;
  for (size_t i = 1; i < tensors_.size(); ++i) {
    threads.emplace_back([&, i] { work(tensors_[i]); });
  }
  work(tensors_[0]);
  for (std::thread& thread : threads) thread.join();
  return latencies;
}
