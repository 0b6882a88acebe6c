"""normd in a torch network: a module whose tensors never leave the server."""

import torch
from harness.layer import EVAL, TRAIN, Layer
from harness.tensors import from_proto


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layer, mode):
        answer = layer.forward(x.detach(), mode=mode, save=mode == TRAIN)
        ctx.layer, ctx.context_id = layer, answer.context_id
        return from_proto(answer.output)

    @staticmethod
    def backward(ctx, grad_output):
        answer = ctx.layer.backward(grad_output, ctx.context_id, accumulate=True)
        return from_proto(answer.grad_input), None, None


class ServedBatchNorm2d(torch.nn.Module):
    """torch.nn.BatchNorm2d with parameters, statistics, gradients and optimizer on the server."""

    def __init__(self, stub, name, num_features, **arguments):
        super().__init__()
        self.layer = Layer.create(stub, name, num_features, **arguments)

    def forward(self, x):
        return _Normalize.apply(x, self.layer, TRAIN if self.training else EVAL)
