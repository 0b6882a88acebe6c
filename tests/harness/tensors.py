"""torch tensors to and from the contract's Tensor."""

import numpy
import torch
from normd.v1 import tensor_pb2

DTYPES = {
    torch.float32: tensor_pb2.DATA_TYPE_FLOAT32,
    torch.float64: tensor_pb2.DATA_TYPE_FLOAT64,
    torch.float16: tensor_pb2.DATA_TYPE_FLOAT16,
    torch.bfloat16: tensor_pb2.DATA_TYPE_BFLOAT16,
    torch.int64: tensor_pb2.DATA_TYPE_INT64,
}
TORCH_DTYPES = {number: dtype for dtype, number in DTYPES.items()}

# numpy has no bfloat16: its bits travel as integers.
_BITS = {torch.bfloat16: torch.int16}


def raw_bytes(tensor):
    """The elements of a contiguous tensor, little-endian."""
    tensor = tensor.detach().contiguous()
    return tensor.view(_BITS.get(tensor.dtype, tensor.dtype)).numpy().tobytes()


def from_bytes(data, dtype, shape):
    bits = _BITS.get(dtype, dtype)
    numpy_dtype = torch.empty(0, dtype=bits).numpy().dtype
    array = numpy.frombuffer(data, dtype=numpy_dtype).copy()
    return torch.from_numpy(array).view(dtype).reshape(shape)


def to_proto(tensor, channels_last=False, data=None):
    """The message of a tensor; with `data` given, of that instead of its elements."""
    message = tensor_pb2.Tensor(dtype=DTYPES[tensor.dtype], shape=tensor.shape)
    message.memory_format = (tensor_pb2.MEMORY_FORMAT_CHANNELS_LAST if channels_last
                             else tensor_pb2.MEMORY_FORMAT_CONTIGUOUS)
    if data is None:
        data = raw_bytes(torch.movedim(tensor, 1, -1) if channels_last else tensor)
    message.data = data
    return message


def from_proto(message, data=None):
    """The tensor of a message, in its memory format."""
    dtype = TORCH_DTYPES[message.dtype]
    shape = list(message.shape)
    data = message.data if data is None else data
    if message.memory_format == tensor_pb2.MEMORY_FORMAT_CHANNELS_LAST:
        return torch.movedim(from_bytes(data, dtype, [shape[0], *shape[2:], shape[1]]), -1, 1)
    return from_bytes(data, dtype, shape)


def named(state_dict):
    """A torch state_dict as the contract's list of named tensors."""
    return [tensor_pb2.NamedTensor(name=key, tensor=to_proto(value))
            for key, value in state_dict.items()]


def state_dict(tensors):
    return {entry.name: from_proto(entry.tensor) for entry in tensors}
