// Calls whose tensors lie in memory that client and server share.
#ifndef NORMD_TESTS_BENCHMARKS_TRANSPORT_SHARED_MEMORY_H_
#define NORMD_TESTS_BENCHMARKS_TRANSPORT_SHARED_MEMORY_H_

#include <cstdint>
#include <string>
#include <vector>

#include "client/normd_client.h"
#include "normd/v1/tensor.pb.h"

class SharedMemoryCalls {
 public:
  // `where`: "shared", the tensor is built where the server reads it, or "copied", ordinary
  // memory, which the client copies there for each call.
  SharedMemoryCalls(const std::string& address, const std::string& where);

  // Takes the tensor for the calls that follow: `in_flight` copies of it.
  void Put(const normd::v1::Tensor& tensor, int in_flight);
  // Makes `count` calls with as many at once as tensors, and returns the latency of each in
  // milliseconds. `op`: eval, train_forward or backward.
  std::vector<double> Send(const std::string& name, const std::string& op, int count);

 private:
  void CallOnce(const std::string& name, const std::string& op, const normd::Tensor& x) const;

  normd::Client client_;
  const bool copied_;
  std::vector<normd::Tensor> tensors_;
};

#endif  // NORMD_TESTS_BENCHMARKS_TRANSPORT_SHARED_MEMORY_H_
