#include "server/service/change.h"
#include "server/service/handlers.h"

namespace normd {

void Train(Core& core, const v1::TrainRequest& request, v1::TrainResponse& response, Done done) {
  ChangeInstance(core, request, response, Method::kTrain, std::move(done), [](InstanceState& next) {
    next.mode = Mode::kTrain;
    return Edited::kChanged;
  });
}

void Eval(Core& core, const v1::EvalRequest& request, v1::EvalResponse& response, Done done) {
  ChangeInstance(core, request, response, Method::kEval, std::move(done), [](InstanceState& next) {
    next.mode = Mode::kEval;
    return Edited::kChanged;
  });
}

}  // namespace normd
