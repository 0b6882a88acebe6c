"""One instance on a server, called as a torch module is."""

import uuid

import torch
from harness.tensors import from_proto, named, state_dict, to_proto
from normd.v1 import instance_pb2, norm_service_pb2 as rpc, tensor_pb2

TRAIN = instance_pb2.MODE_TRAIN
EVAL = instance_pb2.MODE_EVAL


def request_id():
    return str(uuid.uuid4())


def batch_norm_2d(num_features, eps=1e-5, momentum=0.1, affine=True, track_running_stats=True,
                  dtype=torch.float32):
    """The config of torch.nn.BatchNorm2d with the same arguments."""
    layer = instance_pb2.BatchNorm2d(num_features=num_features, eps=eps, affine=affine,
                                     track_running_stats=track_running_stats)
    if momentum is None:
        layer.cumulative_average = True
    else:
        layer.momentum = momentum
    return instance_pb2.InstanceConfig(
        batch_norm_2d=layer,
        state_dtype=(tensor_pb2.DATA_TYPE_FLOAT64 if dtype == torch.float64
                     else tensor_pb2.DATA_TYPE_FLOAT32))


class Layer:
    """An instance. Its methods answer the response message, or what it holds."""

    def __init__(self, stub, name):
        self.stub = stub
        self.name = name

    @classmethod
    def create(cls, stub, name, num_features, **arguments):
        stub.CreateInstance(rpc.CreateInstanceRequest(
            name=name, config=batch_norm_2d(num_features, **arguments)))
        return cls(stub, name)

    def info(self):
        return self.stub.GetInstance(rpc.GetInstanceRequest(name=self.name)).instance

    def train(self):
        return self.stub.Train(rpc.TrainRequest(name=self.name))

    def eval(self):
        return self.stub.Eval(rpc.EvalRequest(name=self.name))

    def forward(self, x, channels_last=False, save=False, statistics=False, mode=None, **fields):
        return self.stub.Forward(rpc.ForwardRequest(
            name=self.name, input=to_proto(x, channels_last), save_for_backward=save,
            return_batch_statistics=statistics, mode=mode, **fields))

    def __call__(self, x, **arguments):
        return from_proto(self.forward(x, **arguments).output)

    def backward(self, grad_output, context_id="", x=None, channels_last=False, **fields):
        return self.stub.Backward(rpc.BackwardRequest(
            name=self.name, context_id=context_id,
            input=to_proto(x, channels_last) if x is not None else None,
            grad_output=to_proto(grad_output, channels_last), **fields))

    def zero_grad(self, **fields):
        return self.stub.ZeroGrad(rpc.ZeroGradRequest(name=self.name, **fields))

    def step(self, optimizer, **fields):
        return self.stub.Step(rpc.StepRequest(name=self.name, optimizer=optimizer, **fields))

    def get_state(self, gradients=False, optimizer=False):
        return self.stub.GetState(rpc.GetStateRequest(
            name=self.name, include_gradients=gradients, include_optimizer=optimizer))

    def state_dict(self):
        return state_dict(self.get_state().state.state_dict)

    def gradients(self):
        return state_dict(self.get_state(gradients=True).state.gradients)

    def optimizer_state(self):
        return state_dict(self.get_state(optimizer=True).state.optimizer_state)

    def load_state_dict(self, tensors):
        return self.stub.SetState(rpc.SetStateRequest(
            name=self.name, state=instance_pb2.State(state_dict=named(tensors))))

    def delete(self):
        return self.stub.DeleteInstance(rpc.DeleteInstanceRequest(name=self.name))
