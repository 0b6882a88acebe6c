// NormServiceImpl: every RPC of normd.v1.NormService, from gRPC to its handler.
#ifndef NORMD_SERVER_SERVICE_NORM_SERVICE_H_
#define NORMD_SERVER_SERVICE_NORM_SERVICE_H_

#include <memory>

#include "grpcpp/impl/service_type.h"
#include "server/service/core.h"

namespace normd {

// `core` must outlive the service.
std::unique_ptr<grpc::Service> MakeNormService(Core& core);

}  // namespace normd

#endif  // NORMD_SERVER_SERVICE_NORM_SERVICE_H_
