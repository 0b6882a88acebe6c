"""numpy arrays to and from normd.v1.Tensor.

Arrays are logical (N, C, H, W) whatever lies behind them: an array whose memory
is channels_last travels as such and comes back as such. numpy has no bfloat16;
arrays of uint16 hold the bits of one.
"""

import numpy as np

from normd.v1 import tensor_pb2

_TO_WIRE = {
    np.dtype("<f4"): tensor_pb2.DATA_TYPE_FLOAT32,
    np.dtype("<f8"): tensor_pb2.DATA_TYPE_FLOAT64,
    np.dtype("<f2"): tensor_pb2.DATA_TYPE_FLOAT16,
    np.dtype("<u2"): tensor_pb2.DATA_TYPE_BFLOAT16,
    np.dtype("<i8"): tensor_pb2.DATA_TYPE_INT64,
}
_FROM_WIRE = {wire: dtype for dtype, wire in _TO_WIRE.items()}

MEMORY_FORMATS = {
    "contiguous": tensor_pb2.MEMORY_FORMAT_CONTIGUOUS,
    "channels_last": tensor_pb2.MEMORY_FORMAT_CHANNELS_LAST,
}


def format_of(array):
    """The format that needs no copy; contiguous where either or neither does."""
    if not array.flags.c_contiguous and array.ndim >= 3:
        if np.moveaxis(array, 1, -1).flags.c_contiguous:
            return "channels_last"
    return "contiguous"


def header_and_bytes(array, memory_format=None):
    """The Tensor without its data, and the data (bytes-like, maybe the array's own memory)."""
    array = np.asarray(array)
    dtype = array.dtype.newbyteorder("<")
    if dtype not in _TO_WIRE:
        raise TypeError(
            f"arrays of {array.dtype} are not supported: use float32, float64, float16, "
            "or uint16 for the bits of bfloat16"
        )
    memory_format = memory_format or format_of(array)
    if memory_format not in MEMORY_FORMATS:
        raise ValueError(f"memory_format is one of {list(MEMORY_FORMATS)}, not {memory_format!r}")
    header = tensor_pb2.Tensor(
        dtype=_TO_WIRE[dtype], shape=array.shape, memory_format=MEMORY_FORMATS[memory_format]
    )
    if memory_format == "channels_last" and array.ndim >= 2:
        array = np.moveaxis(array, 1, -1)
    array = np.ascontiguousarray(array, dtype=dtype)
    return header, memoryview(array.reshape(-1).view(np.uint8))


def to_wire(array, memory_format=None):
    tensor, data = header_and_bytes(array, memory_format)
    tensor.data = bytes(data)
    return tensor


def from_wire(tensor, data=None):
    """The array of `tensor`, with `data` in place of its own where given."""
    data = tensor.data if data is None else data
    flat = np.frombuffer(data, dtype=_FROM_WIRE[tensor.dtype])
    shape = tuple(tensor.shape)
    if tensor.memory_format == tensor_pb2.MEMORY_FORMAT_CHANNELS_LAST and len(shape) >= 2:
        return np.moveaxis(flat.reshape(shape[:1] + shape[2:] + shape[1:2]), -1, 1)
    return flat.reshape(shape)


def optional_from_wire(message, field):
    return from_wire(getattr(message, field)) if message.HasField(field) else None
