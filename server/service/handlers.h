// The handlers of the unary RPCs without tensors, one file a group. Each checks
// the request, does the work, fills `response` and calls `done` once; `request` and
// `response` live until then.
#ifndef NORMD_SERVER_SERVICE_HANDLERS_H_
#define NORMD_SERVER_SERVICE_HANDLERS_H_

#include "normd/v1/norm_service.pb.h"
#include "server/auth/caller.h"
#include "server/service/core.h"

namespace normd {

// lifecycle.cc
void CreateInstance(Core& core, const v1::CreateInstanceRequest& request,
                    v1::CreateInstanceResponse& response, Done done);
void GetInstance(Core& core, const v1::GetInstanceRequest& request,
                 v1::GetInstanceResponse& response, Done done);
// Those that the caller may see.
void ListInstances(Core& core, const Caller& caller, const v1::ListInstancesRequest& request,
                   v1::ListInstancesResponse& response, Done done);
void DeleteInstance(Core& core, const v1::DeleteInstanceRequest& request,
                    v1::DeleteInstanceResponse& response, Done done);

// mode.cc
void Train(Core& core, const v1::TrainRequest& request, v1::TrainResponse& response, Done done);
void Eval(Core& core, const v1::EvalRequest& request, v1::EvalResponse& response, Done done);

// fold_convolution.cc
void FoldConvolution(Core& core, const v1::FoldConvolutionRequest& request,
                     v1::FoldConvolutionResponse& response, Done done);

// learning.cc
void ZeroGrad(Core& core, const v1::ZeroGradRequest& request, v1::ZeroGradResponse& response,
              Done done);
void Step(Core& core, const v1::StepRequest& request, v1::StepResponse& response, Done done);

// state.cc
void GetState(Core& core, const v1::GetStateRequest& request, v1::GetStateResponse& response,
              Done done);
void SetState(Core& core, const v1::SetStateRequest& request, v1::SetStateResponse& response,
              Done done);
void ResetRunningStats(Core& core, const v1::ResetRunningStatsRequest& request,
                       v1::ResetRunningStatsResponse& response, Done done);
void ResetParameters(Core& core, const v1::ResetParametersRequest& request,
                     v1::ResetParametersResponse& response, Done done);

// checkpoints.cc
void SaveCheckpoint(Core& core, const v1::SaveCheckpointRequest& request,
                    v1::SaveCheckpointResponse& response, Done done);
// Tells only who may act on every instance which file is damaged.
void LoadCheckpoint(Core& core, const Caller& caller, const v1::LoadCheckpointRequest& request,
                    v1::LoadCheckpointResponse& response, Done done);
void ListCheckpoints(Core& core, const v1::ListCheckpointsRequest& request,
                     v1::ListCheckpointsResponse& response, Done done);

// shared_memory.cc; a region is for the caller who made it.
void RegisterSharedMemory(Core& core, const Caller& caller,
                          const v1::RegisterSharedMemoryRequest& request,
                          v1::RegisterSharedMemoryResponse& response, Done done);
void UnregisterSharedMemory(Core& core, const Caller& caller,
                            const v1::UnregisterSharedMemoryRequest& request,
                            v1::UnregisterSharedMemoryResponse& response, Done done);
void GetSharedMemoryStatus(Core& core, const v1::GetSharedMemoryStatusRequest& request,
                           v1::GetSharedMemoryStatusResponse& response, Done done);

// server_info.cc
void GetServerInfo(Core& core, const v1::GetServerInfoRequest& request,
                   v1::GetServerInfoResponse& response, Done done);

}  // namespace normd

#endif  // NORMD_SERVER_SERVICE_HANDLERS_H_
