"""Tensors in shared memory: the same bytes as in messages, and nobody harmed by anyone."""

import os
import unittest

import grpc
import torch
from harness import shared_memory
from harness.errors import refused
from harness.layer import EVAL, TRAIN, Layer, request_id
from harness.seed import SEED, generator, torch_generator
from harness.server import Server, ServerTestCase, eventually
from harness.shared_memory import Connection, Region
from harness.tensors import to_proto
from normd.v1 import norm_service_pb2 as rpc, tensor_pb2

Code = grpc.StatusCode
PART = 1 << 16  # of a region, for one tensor


class SharedCase(ServerTestCase):
    FLAGS = ("--shared_memory=on",)

    def setUp(self):
        super().setUp()
        self.rng = generator(self.id())
        self.torch_rng = torch_generator(self.rng)
        self.connection = Connection(self.stub)
        self.addCleanup(self.connection.close)

    def region(self, size=4 * PART):
        region = Region(self.connection, size)
        self.addCleanup(region.close)
        return region

    def randn(self, shape, dtype=torch.float32):
        return torch.randn(shape, generator=self.torch_rng, dtype=torch.float64).to(dtype)

    def layer(self, channels=3, **arguments):
        return Layer.create(self.stub, f"shared/{request_id()}", channels, **arguments)

    def status(self):
        return shared_memory.status(self.stub)


def without_tensor(response, field):
    header = type(response)()
    header.CopyFrom(response)
    header.ClearField(field)
    header.ClearField("context_id" if field == "output" else "grad_residual")
    return header


class SameBytes(SharedCase):
    """What is computed in a region is what is computed from a message."""

    def forward(self, name, x, region=None, residual=None, in_place=False, channels_last=False,
                **fields):
        request = rpc.ForwardRequest(name=name, input=to_proto(x, channels_last), **fields)
        if residual is not None:
            request.residual.CopyFrom(to_proto(residual, channels_last))
        if region is None:
            return self.stub.Forward(request)
        length = region.put(request.input, 0)
        if residual is not None:
            region.put(request.residual, PART)
        request.output_memory.CopyFrom(region.at(0 if in_place else 2 * PART, length))
        answer = self.stub.Forward(request)
        answer.output.CopyFrom(region.take(answer.output))
        return answer

    def backward(self, name, grad, x=None, region=None, channels_last=False, **fields):
        request = rpc.BackwardRequest(name=name, grad_output=to_proto(grad, channels_last),
                                      **fields)
        if x is not None:
            request.input.CopyFrom(to_proto(x, channels_last))
        if region is None:
            return self.stub.Backward(request)
        length = region.put(request.grad_output, 0)
        if x is not None:
            region.put(request.input, PART)
        request.grad_input_memory.CopyFrom(region.at(2 * PART, length))
        request.grad_residual_memory.CopyFrom(region.at(3 * PART, length))
        answer = self.stub.Backward(request)
        answer.grad_input.CopyFrom(region.take(answer.grad_input))
        if answer.HasField("grad_residual"):
            answer.grad_residual.CopyFrom(region.take(answer.grad_residual))
        return answer

    def test_forward_and_backward_equal_those_of_messages(self):
        region = self.region()
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            for shape in ((4, 3, 8, 8), (1, 5, 11, 7), (0, 3, 2, 2), (2, 17, 1, 3)):
                for channels_last in (False, True):
                    with self.subTest(NORMD_SEED=SEED, dtype=dtype, shape=shape,
                                      channels_last=channels_last):
                        self.compare(region, dtype, shape, channels_last)

    def compare(self, region, dtype, shape, channels_last):
        state = dtype if dtype == torch.float64 else torch.float32
        plain, shared = (self.layer(shape[1], dtype=state).name for _ in range(2))
        x, grad, residual = (self.randn(shape, dtype) for _ in range(3))
        for mode in (TRAIN, EVAL):
            for extra in ({}, {"residual": residual, "activation": rpc.ACTIVATION_RELU}):
                due, got = (self.forward(name, x, where, mode=mode, save_for_backward=True,
                                         return_batch_statistics=True,
                                         channels_last=channels_last, **extra)
                            for name, where in ((plain, None), (shared, region)))
                self.assertEqual(got.output, due.output)
                self.assertEqual(without_tensor(got, "output"), without_tensor(due, "output"))
                due, got = (self.backward(name, grad, None, where, accumulate=True,
                                          context_id=context, channels_last=channels_last)
                            for name, where, context in ((plain, None, due.context_id),
                                                         (shared, region, got.context_id)))
                self.assertEqual(got.HasField("grad_residual"), bool(extra))
                self.assertEqual(got.grad_residual, due.grad_residual)
                self.assertEqual(got.grad_input, due.grad_input)
                self.assertEqual(without_tensor(got, "grad_input"),
                                 without_tensor(due, "grad_input"))
            due, got = (self.backward(name, grad, x, where, mode=mode,
                                      channels_last=channels_last)
                        for name, where in ((plain, None), (shared, region)))
            self.assertEqual(got, due)

    def test_an_output_in_place_of_the_input_is_the_same(self):
        region = self.region()
        plain, shared = self.layer(), self.layer()
        for mode in (TRAIN, EVAL):
            for saving in (False, True):
                x = self.randn((4, 3, 8, 8))
                due = self.forward(plain.name, x, mode=mode, save_for_backward=saving)
                got = self.forward(shared.name, x, region, in_place=True, mode=mode,
                                   save_for_backward=saving)
                self.assertEqual(got.output, due.output)
        self.assertEqual(plain.get_state().state, shared.get_state().state)

    def test_gradients_in_place_are_the_same(self):
        region = self.region()
        layer = self.layer()
        x, grad = self.randn((4, 3, 8, 8)), self.randn((4, 3, 8, 8))
        for accumulate in (False, True):
            for at in (0, PART):  # grad_output's memory, the input's
                due = self.backward(layer.name, grad, x)
                request = rpc.BackwardRequest(name=layer.name, accumulate=accumulate,
                                              grad_output=to_proto(grad), input=to_proto(x))
                length = region.put(request.grad_output, 0)
                region.put(request.input, PART)
                request.grad_input_memory.CopyFrom(region.at(at, length))
                got = self.stub.Backward(request)
                self.assertEqual(region.take(got.grad_input), due.grad_input)
                self.assertEqual(got.grad_weight, due.grad_weight)

    def test_either_side_alone_may_be_in_a_region(self):
        region = self.region()
        layer = self.layer()
        layer.eval()
        x = self.randn((4, 3, 8, 8))
        due = layer.forward(x).output
        request = rpc.ForwardRequest(name=layer.name, input=to_proto(x))
        request.output_memory.CopyFrom(region.at(64, len(request.input.data)))
        self.assertEqual(region.take(self.stub.Forward(request).output), due)
        request.ClearField("output_memory")
        region.put(request.input, 0)
        self.assertEqual(self.stub.Forward(request).output, due)

    def test_a_tensor_larger_than_any_message(self):
        with Server("--shared_memory=on", "--max_message_bytes=65536") as server:
            with Connection(server.stub) as connection:
                region = Region(connection, 8 << 20)
                layer = Layer.create(server.stub, "large", 64)
                x = self.randn((16, 64, 32, 32))
                request = rpc.ForwardRequest(name="large", input=to_proto(x), mode=EVAL)
                end = region.put(request.input, 0)
                request.output_memory.CopyFrom(region.at(end, end))
                y = region.take(server.stub.Forward(request).output)
                expected = x / (1 + 1e-5) ** 0.5
                got = torch.frombuffer(bytearray(y.data), dtype=torch.float32).reshape(x.shape)
                torch.testing.assert_close(got, expected)
                self.assertEqual(layer.info().version, 1)
                region.close()


class Refused(SharedCase):
    def request(self, region, offset=0, length=None, name=None):
        x = self.randn((2, 3, 4, 4))
        request = rpc.ForwardRequest(name=name or self.layer().name, input=to_proto(x), mode=EVAL)
        size = len(request.input.data)
        request.input.ClearField("data")
        request.input.shared_memory.CopyFrom(region.at(offset, size if length is None else length))
        return request, size

    def test_what_is_not_within_a_region(self):
        region = self.region(PART)
        top = 2**64 - 64
        for offset, length, field in ((PART, 384, "length"), (PART - 64, 384, "length"),
                                      (top, 384, "offset"), (top, 2**64 - 1, "offset"),
                                      (0, 2**64 - 1, "length"), (64, 2**64 - 64, "length"),
                                      (2**63, 384, "offset"), (1, 384, "offset"),
                                      (32, 384, "offset")):
            with self.subTest(offset=offset, length=length):
                request, _ = self.request(region, offset, length)
                with refused(self, Code.INVALID_ARGUMENT, f"input.shared_memory.{field}"):
                    self.stub.Forward(request)
                request, size = self.request(region)
                request.output_memory.CopyFrom(region.at(offset, length))
                with refused(self, Code.INVALID_ARGUMENT, f"output_memory.{field}"):
                    self.stub.Forward(request)

    def test_another_length_than_the_tensors(self):
        region = self.region(PART)
        request, size = self.request(region, 0, 64)
        with refused(self, Code.INVALID_ARGUMENT, "input.data"):
            self.stub.Forward(request)
        request, size = self.request(region)
        request.output_memory.CopyFrom(region.at(1024, size + 64))
        with refused(self, Code.INVALID_ARGUMENT, "output_memory.length"):
            self.stub.Forward(request)

    def test_an_output_amid_an_input(self):
        region = self.region(PART)
        for offset in (64, 640, 320):
            request, size = self.request(region, 320)
            request.output_memory.CopyFrom(region.at(offset, size))
            if offset == 320:
                self.stub.Forward(request)
                continue
            with refused(self, Code.INVALID_ARGUMENT, "output_memory"):
                self.stub.Forward(request)
        x = to_proto(self.randn((2, 3, 4, 4)))
        name = self.layer().name
        context = self.stub.Forward(rpc.ForwardRequest(
            name=name, input=x, residual=x, save_for_backward=True)).context_id
        request = rpc.BackwardRequest(name=name, grad_output=x, context_id=context)
        request.grad_input_memory.CopyFrom(region.at(0, size))
        request.grad_residual_memory.CopyFrom(region.at(64, size))
        with refused(self, Code.INVALID_ARGUMENT, "grad_residual_memory"):
            self.stub.Backward(request)

    def test_data_beside_shared_memory(self):
        request, size = self.request(self.region())
        request.input.data = bytes(size)
        with refused(self, Code.INVALID_ARGUMENT, "input.shared_memory"):
            self.stub.Forward(request)

    def test_regions_that_are_not_there(self):
        region = self.region()
        request, _ = self.request(region)
        self.stub.Forward(request)
        for name in (b"", b"\0" * 16, region.name[:15], region.name + b"\0"):
            request.input.shared_memory.region = name
            with refused(self, Code.NOT_FOUND, "input.shared_memory.region"):
                self.stub.Forward(request)
        request.input.shared_memory.region = region.name
        self.stub.UnregisterSharedMemory(rpc.UnregisterSharedMemoryRequest(region=region.name))
        with refused(self, Code.NOT_FOUND, "input.shared_memory.region"):
            self.stub.Forward(request)
        with refused(self, Code.NOT_FOUND, "region"):
            self.stub.UnregisterSharedMemory(rpc.UnregisterSharedMemoryRequest(region=region.name))

    def test_connections_that_are_not_there(self):
        for name in (b"", b"\0" * 16, self.connection.name[:15]):
            with refused(self, Code.NOT_FOUND, "connection"):
                self.stub.RegisterSharedMemory(rpc.RegisterSharedMemoryRequest(
                    connection=name, region_bytes=64))

    def test_tensors_of_other_calls(self):
        region = self.region()
        layer = self.layer()
        weight = to_proto(self.randn((3, 3, 3, 3)))
        region.put(weight, 0)
        with refused(self, Code.INVALID_ARGUMENT, "weight.shared_memory"):
            self.stub.FoldConvolution(rpc.FoldConvolutionRequest(name=layer.name, weight=weight))
        request, size = self.request(region)
        with refused(self, Code.INVALID_ARGUMENT, "input.shared_memory"):
            list(self.stub.ForwardStream(iter([rpc.ForwardStreamRequest(header=request)])))
        request.input.ClearField("shared_memory")
        request.output_memory.CopyFrom(region.at(0, size))
        with refused(self, Code.INVALID_ARGUMENT, "output_memory"):
            list(self.stub.ForwardStream(iter([rpc.ForwardStreamRequest(header=request)])))
        request = rpc.BackwardRequest(name=layer.name, grad_output=request.input,
                                      input=request.input, grad_input_memory=region.at(0, size))
        with refused(self, Code.INVALID_ARGUMENT, "grad_input_memory"):
            list(self.stub.BackwardStream(iter([
                rpc.BackwardStreamRequest(header=request),
                rpc.BackwardStreamRequest(grad_output_chunk=bytes(size)),
                rpc.BackwardStreamRequest(input_chunk=bytes(size))])))


class Limits(SharedCase):
    FLAGS = ("--shared_memory=on", "--max_region_bytes=1048576", "--max_regions=3",
             "--shared_memory_budget=3145728", "--memory_budget=8388608")

    def test_each_limit_names_its_flag(self):
        status = self.status()
        self.assertEqual((status.max_region_bytes, status.max_regions,
                          status.shared_memory_budget), (1 << 20, 3, 3 << 20))
        for size in (-1, 0):
            with refused(self, Code.INVALID_ARGUMENT, "region_bytes"):
                self.connection.register(size)
        with refused(self, Code.RESOURCE_EXHAUSTED, "region_bytes", flag="--max_region_bytes",
                     message="region"):
            self.connection.register((1 << 20) + 1)
        for _ in range(3):
            self.region(1 << 19)
        with refused(self, Code.RESOURCE_EXHAUSTED, "connection", flag="--max_regions",
                     message="region"):
            self.connection.register(1)
        with Connection(self.stub) as other:
            regions = [Region(other, 1 << 20)]
            with refused(self, Code.RESOURCE_EXHAUSTED, flag="--shared_memory_budget"):
                other.register(1 << 20)
            status = self.status()
            self.assertEqual((status.connections, status.regions), (2, 4))
            self.assertEqual(status.bytes_in_use, 5 << 19)
            info = self.stub.GetServerInfo(rpc.GetServerInfoRequest())
            self.assertEqual(info.memory_in_use, 5 << 19)
            for region in regions:
                region.close()
        eventually(lambda: self.status().bytes_in_use == 3 << 19)

    def test_memory_that_calls_hold_is_not_there_for_regions(self):
        with Server("--shared_memory=on", "--memory_budget=2097152",
                    "--shared_memory_budget=4194304") as server:
            with Connection(server.stub) as connection:
                connection.register(1 << 20)
                with refused(self, Code.RESOURCE_EXHAUSTED, flag="--memory_budget"):
                    connection.register((1 << 20) + 1)


class Off(ServerTestCase):
    def test_it_is_off_unless_asked_for_and_says_how_to_ask(self):
        status = shared_memory.status(self.stub)
        self.assertEqual(status, rpc.GetSharedMemoryStatusResponse())
        self.assertFalse((self.server.state_dir / "shared-memory.sock").exists())
        for call in (
                lambda: self.stub.RegisterSharedMemory(rpc.RegisterSharedMemoryRequest()),
                lambda: self.stub.UnregisterSharedMemory(rpc.UnregisterSharedMemoryRequest()),
                lambda: self.stub.Forward(rpc.ForwardRequest(
                    name="x", input=tensor_pb2.Tensor(shared_memory=tensor_pb2.SharedMemory())))):
            with refused(self, Code.FAILED_PRECONDITION, flag="--shared_memory"):
                call()


if __name__ == "__main__":
    unittest.main()
