"""ForwardStream and BackwardStream, called like their unary twins."""

from harness.tensors import from_proto, to_proto
from normd.v1 import norm_service_pb2 as rpc


def slices(data, size):
    """`data` in chunks of `size` bytes, or of the sizes that a list goes round."""
    sizes = size if isinstance(size, list) else [size]
    position = index = 0
    while position < len(data):
        step = sizes[index % len(sizes)]
        yield data[position:position + step]
        position += step
        index += 1


def _answer(responses, field):
    """The header of an answer and its tensor."""
    responses = iter(responses)
    header = next(responses).header
    data = b"".join(part.chunk for part in responses)
    message = getattr(header, field)
    assert not message.data, "the header of a stream carries no data"
    return header, from_proto(message, data) if header.HasField(field) else None


def _split(x, channels_last):
    message = to_proto(x, channels_last)
    data = message.data
    message.ClearField("data")
    return message, data


def forward(stub, name, x, residual=None, chunk=1 << 16, channels_last=False, timeout=None,
            **fields):
    """The response header and the output tensor; the residual follows the input."""
    message, data = _split(x, channels_last)
    header = rpc.ForwardRequest(name=name, input=message, **fields)
    residual_data = b""
    if residual is not None:
        residual_message, residual_data = _split(residual, channels_last)
        header.residual.CopyFrom(residual_message)

    def parts():
        yield rpc.ForwardStreamRequest(header=header)
        for piece in slices(data, chunk):
            yield rpc.ForwardStreamRequest(chunk=piece)
        for piece in slices(residual_data, chunk):
            yield rpc.ForwardStreamRequest(residual_chunk=piece)

    return _answer(stub.ForwardStream(parts(), timeout=timeout), "output")


def backward(stub, name, grad_output, x=None, chunk=1 << 16, channels_last=False, timeout=None,
             **fields):
    """The response header and grad_input; the chunks of both tensors alternate."""
    message, data = _split(grad_output, channels_last)
    header = rpc.BackwardRequest(name=name, grad_output=message, **fields)
    others = iter(())
    if x is not None:
        message, x_data = _split(x, channels_last)
        header.input.CopyFrom(message)
        others = slices(x_data, chunk)

    def parts():
        yield rpc.BackwardStreamRequest(header=header)
        for piece in slices(data, chunk):
            yield rpc.BackwardStreamRequest(grad_output_chunk=piece)
            other = next(others, None)
            if other is not None:
                yield rpc.BackwardStreamRequest(input_chunk=other)
        for other in others:
            yield rpc.BackwardStreamRequest(input_chunk=other)

    return _answer(stub.BackwardStream(parts(), timeout=timeout), "grad_input")
