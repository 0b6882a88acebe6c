"""torch.nn.BatchNorm2d with its parameters, statistics and arithmetic on a server.

    client = normd.Client("127.0.0.1:50051")
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3),
        RemoteBatchNorm2d.create(client, "net/bn1", 16),
        torch.nn.ReLU())
    loss = criterion(model(x), labels)
    loss.backward()                        # gradients of weight and bias stay on the server
    step(model, normd.SGD(lr=0.1, momentum=0.9))   # and so does their optimizer
    zero_grad(model)
"""

import numpy as np
import torch

from normd import tensors
from normd.v1 import tensor_pb2


def _to_numpy(tensor):
    """The tensor's memory where it can be lent; bfloat16 as its bits."""
    tensor = tensor.detach().cpu()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def _to_torch(array, like):
    if not array.flags.writeable:
        array = array.copy(order="K")  # received memory is read-only; torch wants to own
    if like.dtype is torch.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(like.device)
    return torch.from_numpy(array).to(like.device)


class _RemoteNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, anchor, module, mode, save):
        array = _to_numpy(input)
        # The gradient must come in the output's format, however autograd made it.
        ctx.memory_format = tensors.format_of(array)
        answer = module.client.forward(
            module.name,
            array,
            mode=mode,
            save_for_backward=save,
            memory_format=ctx.memory_format,
        )
        ctx.module = module
        ctx.context_id = answer.context_id
        return _to_torch(answer.output, input)

    @staticmethod
    def backward(ctx, grad_output):
        module = ctx.module
        answer = module.client.backward(
            module.name,
            _to_numpy(grad_output),
            context_id=ctx.context_id,
            accumulate=module.affine,
            retain_context=module.retain_graph,
            skip_grad_input=not ctx.needs_input_grad[0],
            memory_format=ctx.memory_format,
        )
        grad_input = None
        if answer.grad_input is not None:
            grad_input = _to_torch(answer.grad_input, grad_output)
        return grad_input, None, None, None, None


class RemoteBatchNorm2d(torch.nn.Module):
    """The instance `name` as a module.

    Train or eval is told with each call, from this module's own `training`; the
    instance's mode on the server is not touched. Weight and bias are no
    parameters of this module: their gradients are accumulated on the server,
    where step() applies them. `retain_graph` keeps what backward needs for
    another backward, as the argument of that name of Tensor.backward does.
    """

    def __init__(self, client, name, *, retain_graph=False):
        super().__init__()
        self.client = client
        self.name = name
        self.retain_graph = retain_graph
        layer = client.get(name).config.batch_norm_2d
        self.num_features = layer.num_features
        self.affine = layer.affine
        # Autograd calls backward only where an input wants a gradient; the
        # parameters on the server always do, and this tensor stands for them.
        self._anchor = torch.empty(0, requires_grad=True)

    @classmethod
    def create(cls, client, name, num_features, *, retain_graph=False, **layer):
        """Makes the instance first; `layer` as torch.nn.BatchNorm2d takes it."""
        client.create(name, num_features, **layer)
        return cls(client, name, retain_graph=retain_graph)

    @classmethod
    def from_local(cls, client, name, module, **options):
        """Makes an instance that holds what a torch.nn.BatchNorm2d holds."""
        weight = module.weight if module.affine else module.running_mean
        dtype = "float64" if weight is not None and weight.dtype is torch.float64 else "float32"
        remote = cls.create(
            client,
            name,
            module.num_features,
            eps=module.eps,
            momentum=module.momentum,
            affine=module.affine,
            track_running_stats=module.track_running_stats,
            dtype=dtype,
            mode="train" if module.training else "eval",
            **options,
        )
        state = {key: value.cpu().numpy() for key, value in module.state_dict().items()}
        if state:
            client.set_state(name, state)
        return remote.train(module.training)

    def forward(self, input):
        save = torch.is_grad_enabled() and (self.affine or input.requires_grad)
        mode = "train" if self.training else "eval"
        anchor = self._anchor if self.affine else None
        return _RemoteNorm.apply(input, anchor, self, mode, save)

    def remote_state_dict(self):
        """What nn.BatchNorm2d.load_state_dict takes."""
        state = self.client.state_dict(self.name)
        return {key: torch.from_numpy(np.array(array)) for key, array in state.items()}

    def to_local(self):
        """A torch.nn.BatchNorm2d that holds what the instance holds."""
        state = self.client.get_state(self.name)
        layer = state.instance.config.batch_norm_2d
        local = torch.nn.BatchNorm2d(
            layer.num_features,
            eps=layer.eps,
            momentum=None if layer.cumulative_average else layer.momentum,
            affine=layer.affine,
            track_running_stats=layer.track_running_stats,
        )
        if state.instance.config.state_dtype == tensor_pb2.DATA_TYPE_FLOAT64:
            local = local.double()
        local.load_state_dict(
            {key: torch.from_numpy(np.array(array)) for key, array in state.state_dict.items()}
        )
        return local.train(self.training)

    def extra_repr(self):
        return f"{self.name!r}, {self.num_features}, affine={self.affine}"


def remote_modules(model):
    return [module for module in model.modules() if isinstance(module, RemoteBatchNorm2d)]


def convert(model, client, prefix):
    """Puts a remote twin in the place of each BatchNorm2d, in place; answers the model."""
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.BatchNorm2d):
            parent = model.get_submodule(path.rpartition(".")[0])
            remote = RemoteBatchNorm2d.from_local(client, f"{prefix}/{path}", module)
            setattr(parent, path.rpartition(".")[2], remote)
    return model


def step(model, optimizer, *, zero_grad=False):
    """One optimizer step of every remote module that has parameters."""
    for module in remote_modules(model):
        if module.affine:
            module.client.step(module.name, optimizer, zero_grad=zero_grad)


def zero_grad(model, set_to_none=True):
    """Drops or zeroes the gradients of every remote module."""
    for module in remote_modules(model):
        module.client.zero_grad(module.name, set_to_none=set_to_none)
