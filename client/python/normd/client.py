"""Client: a typed call for each RPC."""

import time
import uuid

import numpy as np
from google.protobuf import wrappers_pb2

from normd import tensors
from normd.connection import Connection, tls_credentials, token_metadata
from normd.errors import NormdError
from normd.results import BackwardResult, BatchStatistics, ForwardResult, State
from normd.shared_memory import NotShared, SharedMemory, SharedTensors
from normd.v1 import instance_pb2, norm_service_pb2 as pb, tensor_pb2

_MODES = {
    None: instance_pb2.MODE_UNSPECIFIED,
    "train": instance_pb2.MODE_TRAIN,
    "eval": instance_pb2.MODE_EVAL,
}
_MODE_NAMES = {wire: name for name, wire in _MODES.items()}
_STATE_DTYPES = {
    "float32": tensor_pb2.DATA_TYPE_FLOAT32,
    "float64": tensor_pb2.DATA_TYPE_FLOAT64,
}
_ACTIVATIONS = {
    None: pb.ACTIVATION_UNSPECIFIED,
    "none": pb.ACTIVATION_NONE,
    "relu": pb.ACTIVATION_RELU,
}
_LAYERS = {
    field.name: field.message_type
    for field in instance_pb2.InstanceConfig.DESCRIPTOR.oneofs_by_name["layer"].fields
}

# Room for everything in a message that is not tensor data.
_OVERHEAD = 64 << 10
# Smaller tensors go into one message without asking for the server's limit.
_SMALL = 1 << 20
_CHUNK = 1 << 20


class Client:
    """A connection to one server. Thread-safe; close it, or use it in a `with`.

    target   "host:port" or "unix:/path"
    timeout  seconds for a call with its retries; each call takes its own, too
    tls_ca   file of roots in PEM: speak TLS, and believe what they vouch for
    tls_cert, tls_key  files in PEM that are shown to the server
    token_file  file of the token that each call shows; read once, as the others are
    credentials, metadata  grpc's own, instead or besides
    shared_memory  whether tensors go through memory that client and server share: None, where
        the server is on this host and allows it, and they are large enough to gain; True,
        always, and calls fail where it is not possible; or False. Outputs lie there too, and
        keep their piece of the server's --shared_memory_budget while they live.

    Every changing call sends a request_id, so that a retry after a lost answer
    is not applied twice. Calls raise NormdError.
    """

    def __init__(
        self,
        target="127.0.0.1:50051",
        *,
        timeout=60.0,
        tls_ca=None,
        tls_cert=None,
        tls_key=None,
        token_file=None,
        credentials=None,
        metadata=(),
        shared_memory=None,
    ):
        if credentials is None:
            credentials = tls_credentials(tls_ca, tls_cert, tls_key)
        self._connection = Connection(
            target, timeout, credentials, tuple(metadata) + token_metadata(token_file)
        )
        self._memory = SharedMemory(target, shared_memory, self._once)
        self._max_message_bytes = None

    def close(self):
        self._memory.close()
        self._connection.channel.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    # --- lifecycle ---

    def create(
        self,
        name,
        num_features=None,
        *,
        layer="batch_norm_2d",
        dtype="float32",
        mode="train",
        request_id=None,
        timeout=None,
        **arguments,
    ):
        """A layer of torch.nn under a name, with its arguments and defaults.

        layer  "batch_norm_1d", "batch_norm_2d", "batch_norm_3d", "layer_norm", "group_norm",
               "instance_norm_2d" or "rms_norm"
        dtype  of parameters and statistics: "float64" for float64 inputs

        A batch norm's momentum=None is the cumulative average.
        """
        if layer not in _LAYERS:
            raise ValueError(f"layer is one of {sorted(_LAYERS)}, not {layer!r}")
        if num_features is not None:
            arguments["num_features"] = num_features
        fields = _LAYERS[layer].fields_by_name
        unknown = sorted(set(arguments) - set(fields))
        if unknown:
            raise TypeError(f"{layer} has no {', '.join(unknown)}; it has {', '.join(fields)}")
        if "momentum" in arguments and arguments["momentum"] is None:
            del arguments["momentum"]
            arguments["cumulative_average"] = True
        if isinstance(arguments.get("normalized_shape"), int):
            arguments["normalized_shape"] = [arguments["normalized_shape"]]
        config = instance_pb2.InstanceConfig(
            **{layer: arguments}, state_dtype=_STATE_DTYPES[dtype]
        )
        request = pb.CreateInstanceRequest(
            name=name, config=config, mode=_MODES[mode], request_id=_id(request_id)
        )
        return self._unary("CreateInstance", request, timeout).instance

    def get(self, name, *, timeout=None):
        return self._unary("GetInstance", pb.GetInstanceRequest(name=name), timeout).instance

    def list(self, prefix="", *, timeout=None):
        """All instances in the order of their names."""
        token = ""
        while True:
            page = self._unary(
                "ListInstances",
                pb.ListInstancesRequest(name_prefix=prefix, page_size=1000, page_token=token),
                timeout,
            )
            yield from page.instances
            token = page.next_page_token
            if not token:
                return

    def delete(self, name, **change):
        return self._change("DeleteInstance", pb.DeleteInstanceRequest(name=name), **change).version

    # --- mode ---

    def train(self, name, **change):
        return self._change("Train", pb.TrainRequest(name=name), **change).version

    def eval(self, name, **change):
        return self._change("Eval", pb.EvalRequest(name=name), **change).version

    # --- compute ---

    def empty(self, shape, dtype="float32"):
        """As numpy.empty, in memory shared with the server where that is possible.

        Tensors are read from there, and not copied. Do not write to it during a call that has
        it, nor after one that failed for its timeout or connection: the server may still read.
        """
        dtype = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if self._memory.wants(size):
            try:
                lease = self._memory.get(size, self._connection.deadline())
                return lease.bytes(size).view(dtype).reshape(shape)
            except NotShared as why:
                if self._memory.must:
                    raise why.error from None
        return np.empty(shape, dtype)

    def forward(
        self,
        name,
        input,
        *,
        mode=None,
        save_for_backward=False,
        return_batch_statistics=False,
        residual=None,
        activation=None,
        memory_format=None,
        stream=None,
        expected_version=None,
        request_id=None,
        timeout=None,
    ):
        """activation(norm(input) + residual), in logical order of the dimensions.

        residual       of the input's dtype and shape, or None
        activation     "relu", or None
        mode           "train", "eval", or None: the instance's own
        memory_format  "contiguous", "channels_last", or None: as the array lies
        stream         True or False; None: through shared memory where the client has it, or a
                       stream where one message is too small
        """
        header, data = tensors.header_and_bytes(input, memory_format)
        request = pb.ForwardRequest(
            name=name,
            mode=_MODES[mode],
            save_for_backward=save_for_backward,
            return_batch_statistics=return_batch_statistics,
            activation=_ACTIVATIONS[activation],
            expected_version=expected_version,
            request_id=_id(request_id),
            input=header,
        )
        residual_data = memoryview(b"")
        if residual is not None:
            # The input's format, whatever the residual's own.
            memory_format = memory_format or tensors.format_of(np.asarray(input))
            residual_header, residual_data = tensors.header_and_bytes(residual, memory_format)
            request.residual.CopyFrom(residual_header)
        inputs = [(data, request.input)]
        if residual is not None:
            inputs.append((residual_data, request.residual))
        shared = self._shared(
            "Forward", request, inputs, "output_memory", data.nbytes, stream, timeout
        )
        if shared:
            response, output = shared
        elif self._streams(stream, data.nbytes + residual_data.nbytes):

            def requests():
                yield pb.ForwardStreamRequest(header=request)
                for chunk in self._chunks(data):
                    yield pb.ForwardStreamRequest(chunk=chunk)
                for chunk in self._chunks(residual_data):
                    yield pb.ForwardStreamRequest(residual_chunk=chunk)

            response, output, _ = self._stream("ForwardStream", requests, "output", timeout)
        else:
            for each, tensor in inputs:
                tensor.data = bytes(each)
            response = self._unary("Forward", request, timeout)
            output = response.output.data
        statistics = None
        if response.HasField("batch_statistics"):
            wire = response.batch_statistics
            statistics = BatchStatistics(wire.count, np.array(wire.mean), np.array(wire.var))
        return ForwardResult(
            output=tensors.from_wire(response.output, output),
            version=response.version,
            mode=_MODE_NAMES[response.mode],
            num_batches_tracked=response.num_batches_tracked,
            context_id=response.context_id,
            batch_statistics=statistics,
            replayed=response.replayed,
        )

    def backward(
        self,
        name,
        grad_output,
        *,
        context_id="",
        input=None,
        mode=None,
        batch_statistics=None,
        accumulate=False,
        retain_context=False,
        skip_grad_input=False,
        memory_format=None,
        stream=None,
        expected_version=None,
        request_id=None,
        timeout=None,
    ):
        """The gradients of a forward, named by its context_id or given again by its input."""
        grad_header, grad_data = tensors.header_and_bytes(grad_output, memory_format)
        request = pb.BackwardRequest(
            name=name,
            context_id=context_id,
            mode=_MODES[mode],
            accumulate=accumulate,
            retain_context=retain_context,
            skip_grad_input=skip_grad_input,
            expected_version=expected_version,
            request_id=_id(request_id),
            grad_output=grad_header,
        )
        if batch_statistics is not None:
            request.batch_statistics.count = batch_statistics.count
            request.batch_statistics.mean.extend(batch_statistics.mean)
            request.batch_statistics.var.extend(batch_statistics.var)
        input_data = memoryview(b"")
        if input is not None:
            input_header, input_data = tensors.header_and_bytes(input, memory_format)
            request.input.CopyFrom(input_header)

        inputs = [(grad_data, request.grad_output)]
        if input is not None:
            inputs.append((input_data, request.input))
        output_bytes = 0 if skip_grad_input else grad_data.nbytes
        shared = self._shared(
            "Backward", request, inputs, "grad_input_memory", output_bytes, stream, timeout
        )
        if shared:
            response, output = shared
            residual = response.grad_residual.data
        elif self._streams(stream, grad_data.nbytes + input_data.nbytes):

            def requests():
                yield pb.BackwardStreamRequest(header=request)
                for chunk in self._chunks(input_data):
                    yield pb.BackwardStreamRequest(input_chunk=chunk)
                for chunk in self._chunks(grad_data):
                    yield pb.BackwardStreamRequest(grad_output_chunk=chunk)

            response, output, residual = self._stream(
                "BackwardStream", requests, "grad_input", timeout
            )
        else:
            for each, tensor in inputs:
                tensor.data = bytes(each)
            response = self._unary("Backward", request, timeout)
            output = response.grad_input.data
            residual = response.grad_residual.data
        has_grad_input = response.HasField("grad_input")
        return BackwardResult(
            grad_input=tensors.from_wire(response.grad_input, output) if has_grad_input else None,
            grad_weight=tensors.optional_from_wire(response, "grad_weight"),
            grad_bias=tensors.optional_from_wire(response, "grad_bias"),
            grad_residual=(
                tensors.from_wire(response.grad_residual, residual)
                if response.HasField("grad_residual")
                else None
            ),
            version=response.version,
            replayed=response.replayed,
        )

    def fold_convolution(
        self, name, weight, bias=None, *, transposed=False, groups=1, timeout=None
    ):
        """(weight, bias) of the convolution with the instance's eval mode folded in."""
        request = pb.FoldConvolutionRequest(
            name=name,
            transposed=transposed,
            groups=groups,
            weight=tensors.to_wire(weight, "contiguous"),
            bias=None if bias is None else tensors.to_wire(bias, "contiguous"),
        )
        response = self._unary("FoldConvolution", request, timeout)
        return tensors.from_wire(response.weight), tensors.from_wire(response.bias)

    # --- learning ---

    def zero_grad(self, name, *, set_to_none=True, **change):
        request = pb.ZeroGradRequest(name=name, set_to_none=set_to_none)
        return self._change("ZeroGrad", request, **change).version

    def step(self, name, optimizer, *, reset_optimizer=False, zero_grad=False, **change):
        """One step of normd.SGD(...), normd.Adam(...) or normd.AdamW(...).

        Answers normd.v1.StepResponse: version, stepped.
        """
        request = pb.StepRequest(
            name=name, optimizer=optimizer, reset_optimizer=reset_optimizer, zero_grad=zero_grad
        )
        return self._change("Step", request, **change)

    # --- state ---

    def get_state(self, name, *, gradients=False, optimizer=False, timeout=None):
        request = pb.GetStateRequest(
            name=name, include_gradients=gradients, include_optimizer=optimizer
        )
        response = self._unary("GetState", request, timeout)
        return State(
            version=response.version,
            instance=response.instance,
            state_dict=_arrays(response.state.state_dict),
            gradients=_arrays(response.state.gradients),
            optimizer_state=_arrays(response.state.optimizer_state),
        )

    def state_dict(self, name, *, timeout=None):
        """PyTorch's state_dict, as numpy arrays."""
        return self.get_state(name, timeout=timeout).state_dict

    def set_state(self, name, state_dict, **change):
        """load_state_dict(strict=True): all or nothing."""
        request = pb.SetStateRequest(name=name)
        for key, array in state_dict.items():
            request.state.state_dict.add(name=key, tensor=tensors.to_wire(array))
        return self._change("SetState", request, **change).version

    def reset_running_stats(self, name, **change):
        request = pb.ResetRunningStatsRequest(name=name)
        return self._change("ResetRunningStats", request, **change).version

    def reset_parameters(self, name, **change):
        request = pb.ResetParametersRequest(name=name)
        return self._change("ResetParameters", request, **change).version

    # --- checkpoints ---

    def save_checkpoint(self, *, request_id=None, timeout=None):
        request = pb.SaveCheckpointRequest(request_id=_id(request_id))
        return self._unary("SaveCheckpoint", request, timeout).checkpoint

    def load_checkpoint(self, checkpoint_id="", names=(), *, timeout=None):
        """Answers normd.v1.LoadCheckpointResponse: checkpoint, instances, damaged."""
        request = pb.LoadCheckpointRequest(checkpoint_id=checkpoint_id, names=names)
        return self._unary("LoadCheckpoint", request, timeout)

    def list_checkpoints(self, *, timeout=None):
        """All checkpoints, newest first."""
        token = ""
        while True:
            page = self._unary(
                "ListCheckpoints",
                pb.ListCheckpointsRequest(page_size=1000, page_token=token),
                timeout,
            )
            yield from page.checkpoints
            token = page.next_page_token
            if not token:
                return

    # --- server ---

    def info(self, *, timeout=None):
        return self._unary("GetServerInfo", pb.GetServerInfoRequest(), timeout)

    def healthy(self, service="", *, timeout=None):
        """Whether the server says that it serves (grpc.health.v1)."""
        # HealthCheckRequest and HealthCheckResponse have one field each, and on
        # the wire they are these two well-known types.
        check = self._connection.channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=wrappers_pb2.StringValue.SerializeToString,
            response_deserializer=wrappers_pb2.Int32Value.FromString,
        )
        request = wrappers_pb2.StringValue(value=service)
        serving = 1
        answer = self._connection.call(lambda **options: check(request, **options), timeout)
        return answer.value == serving

    # --- how ---

    def _unary(self, method, request, timeout):
        stub = getattr(self._connection.stub, method)
        # Lets the server refuse a large one, or have it wait, before it is sent.
        size = request.ByteSize()
        announced = (("normd-message-bytes", str(size)),) if size > 65536 else ()
        return self._connection.call(
            lambda metadata, **options: stub(request, metadata=metadata + announced, **options),
            timeout,
        )

    def _once(self, method, request, deadline):
        stub = getattr(self._connection.stub, method)
        return self._connection.call_once(lambda **options: stub(request, **options), deadline)

    def _shared(self, method, request, inputs, output_field, output_bytes, stream, timeout):
        """The answer to a call whose tensors lie in shared memory, and its output's bytes.

        None where it is to be made another way; `request` names no memory then.
        """
        if stream is not None or not self._memory.wants(sum(data.nbytes for data, _ in inputs)):
            return None
        stub = getattr(self._connection.stub, method)
        deadline = self._connection.deadline(timeout)
        for last in (False, True):  # a restarted server has other memory to lend
            there = SharedTensors(self._memory, deadline)
            try:
                for data, tensor in inputs:
                    there.put(data, tensor)
                response = self._connection.call(
                    lambda **options: there.attempt(
                        lambda: stub(request, **options),
                        getattr(request, output_field),
                        output_bytes,
                    ),
                    deadline - time.monotonic(),
                )
                return response, there.output(output_bytes)
            except NotShared as why:
                error = why.error
            except NormdError as refusal:
                if not self._memory.forget_if_lost(refusal):
                    raise
                if not last:
                    continue
                error = refusal
            if self._memory.must:
                raise error
            break
        for _, tensor in inputs:
            tensor.ClearField("shared_memory")
        request.ClearField(output_field)
        return None

    def _change(self, method, request, *, expected_version=None, request_id=None, timeout=None):
        if expected_version is not None:
            request.expected_version = expected_version
        request.request_id = _id(request_id)
        return self._unary(method, request, timeout)

    def _stream(self, method, requests, field, timeout):
        """The first message's header, and the bytes of all chunks and of all residual ones."""
        stub = getattr(self._connection.stub, method)

        def attempt(**options):
            answers = stub(requests(), **options)
            header = next(answers).header
            chunks, residual_chunks = bytearray(), bytearray()
            for answer in answers:
                if answer.WhichOneof("part") == "chunk":
                    chunks += answer.chunk
                else:
                    residual_chunks += answer.grad_residual_chunk
            return header, chunks, residual_chunks

        return self._connection.call(attempt, timeout)

    def _streams(self, stream, payload_bytes):
        if stream is not None:
            return stream
        return payload_bytes > _SMALL and payload_bytes + _OVERHEAD > self._limit()

    def _chunks(self, data):
        if not data.nbytes:
            return
        size = max(1, min(_CHUNK, self._limit() // 2))
        for begin in range(0, data.nbytes, size):
            yield bytes(data[begin : begin + size])

    def _limit(self):
        if self._max_message_bytes is None:
            self._max_message_bytes = self.info().limits.max_message_bytes
        return self._max_message_bytes


def _id(request_id):
    return request_id or str(uuid.uuid4())


def _arrays(named_tensors):
    return {named.name: tensors.from_wire(named.tensor) for named in named_tensors}
