// The public types to and from the contract's messages.
#ifndef NORMD_CLIENT_INTERNAL_CONVERT_H_
#define NORMD_CLIENT_INTERNAL_CONVERT_H_

#include <string>
#include <vector>

#include "client/normd_client.h"
#include "normd/v1/norm_service.pb.h"

namespace normd::inline client::internal {

// Everything but the bytes.
v1::Tensor HeaderOf(const Tensor& tensor);
// With the bytes, copied.
v1::Tensor ToWire(const Tensor& tensor);
// Takes the message's bytes, or `bytes` in their place.
Tensor FromWire(v1::Tensor&& wire);
Tensor FromWire(const v1::Tensor& header, std::string bytes);

v1::Mode ToWire(Mode mode);
Mode FromWire(v1::Mode wire);
v1::InstanceConfig ToWire(const InstanceConfig& config);
v1::Optimizer ToWire(const Optimizer& optimizer);
v1::BatchStatistics ToWire(const BatchStatistics& statistics);

BatchStatistics FromWire(const v1::BatchStatistics& wire);
Instance FromWire(const v1::Instance& wire);
Checkpoint FromWire(const v1::Checkpoint& wire);
ServerInfo FromWire(const v1::GetServerInfoResponse& wire);
State FromWire(v1::GetStateResponse&& wire);

}  // namespace normd::inline client::internal

#endif  // NORMD_CLIENT_INTERNAL_CONVERT_H_
