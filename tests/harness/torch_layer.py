"""normd in a torch network: modules whose tensors never leave the server."""

import torch
from harness.layer import EVAL, TRAIN, Layer
from harness.tensors import from_proto, to_proto
from normd.v1 import norm_service_pb2 as rpc


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, layer, mode, activation):
        fields = {} if residual is None else {"residual": to_proto(residual.detach())}
        answer = layer.forward(x.detach(), mode=mode, save=mode == TRAIN, activation=activation,
                               **fields)
        ctx.layer, ctx.context_id = layer, answer.context_id
        ctx.has_residual = residual is not None
        return from_proto(answer.output)

    @staticmethod
    def backward(ctx, grad_output):
        answer = ctx.layer.backward(grad_output, ctx.context_id, accumulate=True)
        grad_residual = from_proto(answer.grad_residual) if ctx.has_residual else None
        return from_proto(answer.grad_input), grad_residual, None, None, None


class ServedNorm(torch.nn.Module):
    """A layer with parameters, statistics, gradients and optimizer on the server:
    activation(layer(x) + residual), in one call."""

    def __init__(self, layer, activation=rpc.ACTIVATION_UNSPECIFIED):
        super().__init__()
        self.layer = layer
        self.activation = activation

    def forward(self, x, residual=None):
        return _Normalize.apply(x, residual, self.layer, TRAIN if self.training else EVAL,
                                self.activation)


class ServedBatchNorm2d(ServedNorm):
    """torch.nn.BatchNorm2d on the server."""

    def __init__(self, stub, name, num_features, **arguments):
        super().__init__(Layer.create(stub, name, num_features, **arguments))


class RMSNorm(torch.nn.Module):
    """torch.nn.RMSNorm, which came after this torch."""

    def __init__(self, normalized_shape, eps=None, elementwise_affine=True, dtype=None):
        super().__init__()
        self.shape, self.eps = tuple(normalized_shape), eps
        self.weight = (torch.nn.Parameter(torch.ones(self.shape, dtype=dtype))
                       if elementwise_affine else None)
        self.input_dtype = dtype

    def forward(self, x):
        eps = torch.finfo(self.input_dtype).eps if self.eps is None else self.eps
        dims = tuple(range(-len(self.shape), 0))
        y = x * torch.rsqrt(x.pow(2).mean(dims, keepdim=True) + eps)
        return y if self.weight is None else y * self.weight
