"""What the service must answer: its instances as torch sees them, in float64.

A model answers a call with what is due, or raises Refused with the status that is. It knows nothing
of how the server does it: layers are torch's functions, gradients are autograd's, steps are
torch.optim's.
"""

import copy

import grpc
import torch
from normd.v1 import instance_pb2 as pb, optimizer_pb2, tensor_pb2

Code = grpc.StatusCode
RELU = 2
RUNNING = ("running_mean", "running_var")


class Refused(Exception):
    def __init__(self, code):
        super().__init__(code.name)
        self.code = code


class Layer:
    """A layer's kind and arguments: how torch computes it, and how the contract writes it."""

    def __init__(self, kind, dtype, **arguments):
        self.kind, self.dtype, self.arguments = kind, dtype, arguments
        self.of_batch = kind.startswith("batch_norm")
        self.tracked = arguments.get("track_running_stats", False)
        self.momentum = arguments.get("momentum", 0.1)
        self.has_weight = arguments.get("affine", arguments.get("elementwise_affine", True))
        self.has_bias = self.has_weight and kind != "rms_norm"
        self.channels = arguments.get("num_features", arguments.get("num_channels"))
        self.shape = arguments.get("normalized_shape") or (self.channels,)

    def config(self):
        message = {"batch_norm_1d": pb.BatchNorm1d, "batch_norm_2d": pb.BatchNorm2d,
                   "layer_norm": pb.LayerNorm, "rms_norm": pb.RmsNorm, "group_norm": pb.GroupNorm,
                   "instance_norm_2d": pb.InstanceNorm2d}[self.kind]
        arguments = dict(self.arguments)
        if arguments.get("momentum", 0) is None:
            arguments["cumulative_average"] = True
            del arguments["momentum"]
        dtype = (tensor_pb2.DATA_TYPE_FLOAT64 if self.dtype == torch.float64
                 else tensor_pb2.DATA_TYPE_FLOAT32)
        return pb.InstanceConfig(**{self.kind: message(**arguments)}, state_dtype=dtype)

    def batch_shape(self, rng):
        n, space = rng.choice((2, 3)), [rng.choice((2, 3)) for _ in range(2)]
        if self.kind == "batch_norm_1d":
            return [n, self.channels, space[0]]
        return [n, *(self.shape if self.channels is None else (self.channels, *space))]

    def by_batch(self, training):
        return training or not self.tracked

    def folds(self, training):
        return training and self.tracked

    def __call__(self, x, weight, bias, mean, var, by_batch):
        call = torch.nn.functional
        eps = self.arguments["eps"]
        if self.of_batch:
            stats = (None, None) if by_batch else (mean, var)
            return call.batch_norm(x, *stats, weight, bias, training=by_batch, eps=eps)
        if self.kind == "instance_norm_2d":
            stats = (None, None) if by_batch else (mean, var)
            return call.instance_norm(x, *stats, weight, bias, use_input_stats=by_batch, eps=eps)
        if self.kind == "group_norm":
            return call.group_norm(x, self.arguments["num_groups"], weight, bias, eps)
        if self.kind == "layer_norm":
            return call.layer_norm(x, self.shape, weight, bias, eps)
        dims = tuple(range(-len(self.shape), 0))
        y = x * torch.rsqrt(x.pow(2).mean(dims, keepdim=True) + eps)
        return y if weight is None else y * weight


class Instance:
    """A living instance."""

    def __init__(self, layer, training, request_id):
        self.layer, self.training, self.version = layer, training, 1
        self.parameters_version = 1
        self.batches = 0
        self.tensors = {}
        self.reset(parameters=True)
        self.optimizer = self.rule = None
        self.requests = {}  # of changes, by id: method, version
        self.contexts = {}
        self.remember(request_id, "create")

    def reset(self, parameters):
        shape = self.layer.shape
        if self.layer.tracked:
            self.tensors["running_mean"] = torch.zeros(shape).double()
            self.tensors["running_var"] = torch.ones(shape).double()
            self.batches = 0
        if parameters:
            self.put("weight", torch.ones(shape).double(), self.layer.has_weight)
            self.put("bias", torch.zeros(shape).double(), self.layer.has_bias)

    def put(self, key, value, present=True):
        """A parameter's values; its gradient and optimizer state stay."""
        if not present:
            return
        if key in self.tensors:
            self.tensors[key].data = value
        else:
            self.tensors[key] = torch.nn.Parameter(value)

    def parameter(self, key):
        return self.tensors.get(key)

    def gradients(self):
        return {key: self.tensors[key].grad for key in ("weight", "bias")
                if key in self.tensors and self.tensors[key].grad is not None}

    def state_dict(self):
        found = {key: value.detach() for key, value in self.tensors.items()}
        return found | ({"num_batches_tracked": torch.tensor(self.batches)}
                        if self.layer.tracked else {})

    # --- the order of changes ---

    def check(self, method, request_id, expected):
        """The version that `request_id` made, or None where it is to be applied."""
        if request_id in self.requests:
            known, version = self.requests[request_id]
            if known.split("/")[0] != method:
                raise Refused(Code.INVALID_ARGUMENT)
            return version
        if expected is not None and expected != self.version:
            raise Refused(Code.ABORTED)
        return None

    def change(self, request_id, method, parameters=False):
        self.version += 1
        if parameters and self.layer.has_weight:
            self.parameters_version = self.version
        self.remember(request_id, method)
        return self.version

    def remember(self, request_id, method):
        if request_id:
            self.requests[request_id] = (method, self.version)

    # --- tensors ---

    def values(self):
        return [self.tensors[key].detach().clone() if key in self.tensors else None
                for key in ("weight", "bias", *RUNNING)]

    def forward(self, x, training, residual, relu):
        by_batch = self.layer.by_batch(training)
        y = self.layer(x, *self.values(), by_batch)
        if residual is not None:
            y = y + residual
        return torch.relu(y) if relu else y

    def fold(self, x):
        axes = [axis for axis in range(x.dim()) if axis != 1]
        if self.layer.of_batch:
            self.batches += 1
            mean, var = x.mean(axes), x.var(axes)
        else:
            mean, var = x.mean((2, 3)).mean(0), x.var((2, 3)).mean(0)
        share = 1 / self.batches if self.layer.momentum is None else self.layer.momentum
        for key, value in zip(RUNNING, (mean, var)):
            self.tensors[key] = (1 - share) * self.tensors[key] + share * value

    def backward(self, context, grad_output):
        """Gradients by the names of the answer."""
        x, values, by_batch, residual, relu = context
        x = x.clone().requires_grad_()
        weight, bias = (None if value is None else value.clone().requires_grad_()
                        for value in values[:2])
        y = self.layer(x, weight, bias, *values[2:], by_batch)
        if residual is not None:
            residual = residual.clone().requires_grad_()
            y = y + residual
        if relu:
            y = torch.relu(y)
        leaves = {"grad_input": x, "grad_weight": weight, "grad_bias": bias,
                  "grad_residual": residual}
        leaves = {key: leaf for key, leaf in leaves.items() if leaf is not None}
        return dict(zip(leaves, torch.autograd.grad(y, leaves.values(), grad_output)))

    def accumulate(self, grads):
        for key in ("weight", "bias"):
            if key not in self.tensors:
                continue
            made, parameter = grads["grad_" + key], self.tensors[key]
            parameter.grad = made if parameter.grad is None else parameter.grad + made

    def step(self, rule, arguments, reset, zero_grad):
        """Whether it stepped, and whether anything changed."""
        if not self.layer.has_weight:
            raise Refused(Code.FAILED_PRECONDITION)
        if self.rule not in (None, rule) and not reset:
            raise Refused(Code.FAILED_PRECONDITION)
        gradients = self.gradients()
        if reset or self.rule is None and gradients:
            self.rule = self.optimizer = None
        if not gradients:
            return False, reset
        if self.optimizer is None:
            kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam,
                    "adamw": torch.optim.AdamW}[rule]
            self.optimizer = kind([self.tensors[key] for key in ("weight", "bias")
                                   if key in self.tensors], lr=1)
            self.rule = rule
        for group in self.optimizer.param_groups:
            group.update(arguments)
        self.optimizer.step()
        if zero_grad:
            for key in gradients:
                self.tensors[key].grad = None
        return True, True

    def replace(self, loaded):
        """By the one of a checkpoint: its state and mode, under this one's identity."""
        if loaded.layer is not self.layer:
            self.contexts = {}
        kept = {"version": self.version + 1, "parameters_version": self.version + 1,
                "requests": self.requests, "contexts": self.contexts}
        self.__dict__.update(loaded.copy().__dict__ | kept)

    def copy(self):
        other = copy.copy(self)
        other.tensors, other.optimizer = copy.deepcopy((self.tensors, self.optimizer))
        # Gradients belong to the copy.
        for key in self.gradients():
            other.tensors[key].grad = self.tensors[key].grad.clone()
        other.requests, other.contexts = dict(self.requests), {}
        return other


def optimizer_message(rule, arguments):
    kind = optimizer_pb2.Sgd if rule == "sgd" else optimizer_pb2.Adam
    return optimizer_pb2.Optimizer(**{rule: kind(**arguments)})
