"""torch.nn's norms with their parameters, statistics and arithmetic on a server.

    client = normd.Client("127.0.0.1:50051")
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3),
        RemoteNorm.create(client, "net/bn1", 16),
        torch.nn.ReLU())
    loss = criterion(model(x), labels)
    loss.backward()                        # gradients of weight and bias stay on the server
    step(model, normd.SGD(lr=0.1, momentum=0.9))   # and so does their optimizer
    zero_grad(model)
"""

import numpy as np
import torch

from normd import tensors
from normd.v1 import instance_pb2, tensor_pb2


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


class _RemoteForward(torch.autograd.Function):
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


# Layers by the name that Client.create takes. A later torch brings RMSNorm.
_LAYERS = {
    "batch_norm_1d": torch.nn.BatchNorm1d,
    "batch_norm_2d": torch.nn.BatchNorm2d,
    "batch_norm_3d": torch.nn.BatchNorm3d,
    "layer_norm": torch.nn.LayerNorm,
    "group_norm": torch.nn.GroupNorm,
    "instance_norm_2d": torch.nn.InstanceNorm2d,
}
if hasattr(torch.nn, "RMSNorm"):
    _LAYERS["rms_norm"] = torch.nn.RMSNorm


def _arguments_of(module, layer):
    """What Client.create takes to make the like of a torch module: both name things alike."""
    fields = instance_pb2.InstanceConfig.DESCRIPTOR.fields_by_name[layer].message_type.fields
    names = [field.name for field in fields if field.name != "cumulative_average"]
    arguments = {name: getattr(module, name) for name in names}
    if "bias" in arguments:
        arguments["bias"] = module.bias is not None
    if arguments["eps"] is None:  # RMSNorm's default
        del arguments["eps"]
    return arguments


def _layer_of(module):
    """The name of a torch module's layer; None where normd has no such layer."""
    for layer, kind in _LAYERS.items():
        if type(module) is kind:
            return layer
    return None


class RemoteNorm(torch.nn.Module):
    """The instance `name`, of whatever layer, as a module.

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
        config = client.get(name).config
        self.layer = config.WhichOneof("layer")
        layer = getattr(config, self.layer)
        self.affine = getattr(layer, "affine", None) or getattr(layer, "elementwise_affine", False)
        # Autograd calls backward only where an input wants a gradient; the
        # parameters on the server always do, and this tensor stands for them.
        self._anchor = torch.empty(0, requires_grad=True)

    @classmethod
    def create(cls, client, name, num_features=None, *, retain_graph=False, **arguments):
        """Makes the instance first; `arguments` as Client.create takes them."""
        client.create(name, num_features, **arguments)
        return cls(client, name, retain_graph=retain_graph)

    @classmethod
    def from_local(cls, client, name, module, **options):
        """Makes an instance that holds what a torch.nn.BatchNorm2d, LayerNorm, ... holds."""
        layer = _layer_of(module)
        if layer is None:
            raise TypeError(f"{type(module).__name__} is none of {sorted(_LAYERS)}")
        state = module.state_dict()
        wide = any(tensor.dtype is torch.float64 for tensor in state.values())
        remote = cls.create(
            client,
            name,
            layer=layer,
            dtype="float64" if wide else "float32",
            mode="train" if module.training else "eval",
            **_arguments_of(module, layer),
            **options,
        )
        if state:
            client.set_state(name, {key: value.cpu().numpy() for key, value in state.items()})
        return remote.train(module.training)

    def forward(self, input):
        save = torch.is_grad_enabled() and (self.affine or input.requires_grad)
        mode = "train" if self.training else "eval"
        anchor = self._anchor if self.affine else None
        return _RemoteForward.apply(input, anchor, self, mode, save)

    def remote_state_dict(self):
        """What load_state_dict of the layer's torch module takes."""
        state = self.client.state_dict(self.name)
        return {key: torch.from_numpy(np.array(array)) for key, array in state.items()}

    def to_local(self):
        """The torch module, a torch.nn.BatchNorm2d for instance, that holds what the instance
        holds."""
        state = self.client.get_state(self.name)
        config = state.instance.config
        layer = getattr(config, self.layer)
        arguments = {}
        for field in layer.DESCRIPTOR.fields:
            value = getattr(layer, field.name)
            if field.name == "cumulative_average":
                if value:
                    arguments["momentum"] = None
            elif field.label == field.LABEL_REPEATED:
                arguments[field.name] = list(value)
            elif not field.has_presence or layer.HasField(field.name):
                arguments[field.name] = value
        kind = _LAYERS[self.layer]
        without_bias = kind is torch.nn.LayerNorm and not arguments.pop("bias", True)
        local = kind(**arguments)
        if without_bias:
            local.register_parameter("bias", None)  # also where torch has no such argument yet
        if config.state_dtype == tensor_pb2.DATA_TYPE_FLOAT64:
            local = local.double()
        local.load_state_dict(
            {key: torch.from_numpy(np.array(array)) for key, array in state.state_dict.items()}
        )
        return local.train(self.training)

    def extra_repr(self):
        return f"{self.name!r}, {self.layer}, affine={self.affine}"


def remote_modules(model):
    return [module for module in model.modules() if isinstance(module, RemoteNorm)]


def convert(model, client, prefix):
    """Puts a remote twin in the place of each norm, in place; answers the model."""
    for path, module in list(model.named_modules()):
        if _layer_of(module) is not None:
            parent = model.get_submodule(path.rpartition(".")[0])
            remote = RemoteNorm.from_local(client, f"{prefix}/{path}", module)
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
