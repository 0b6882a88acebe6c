"""Tensors in shared memory: the same bytes as in messages, and nobody harmed by anyone."""

import concurrent.futures
import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import pathlib
import re
import secrets
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest

import grpc
import numpy
import torch
from harness import shared_memory
from harness.errors import refused
from harness.layer import EVAL, TRAIN, Layer, batch_norm_2d, request_id
from harness.seed import SEED, generator, torch_generator
from harness.server import Server, ServerTestCase, environment, eventually
from harness.shared_memory import Connection, Region
from harness.tensors import raw_bytes, to_proto
from normd.v1 import norm_service_pb2 as rpc, tensor_pb2

Code = grpc.StatusCode
NORMCTL = os.environ.get("NORMCTL_BIN", "build/release/bin/normctl")
PART = 1 << 16  # of a region, for one tensor

F_ADD_SEALS, F_SEAL_WRITE = 1033, 8
PUNCH_HOLE = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
LIBC = ctypes.CDLL(None, use_errno=True)


class Anywhere(Region):
    """A region that is not mapped here, or not at all."""

    def __init__(self, name):
        self.name = name


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


# A client that is killed: it tells its connection's name, takes its region, writes there for
# ever. No gRPC, which takes long to load.
VICTIM = """
import mmap, socket, sys
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
s.connect(sys.argv[1])
sys.stdout.write(s.recv(64).hex() + "\\n")
sys.stdout.flush()
_, fds, _, _ = socket.recv_fds(s, 64, 1)
size = int(sys.argv[2])
memory = mmap.mmap(fds[0], size)
sys.stdout.write("mapped\\n")
sys.stdout.flush()
value = 0
while True:
    value = (value + 1) % 64  # however mixed, no large float32
    memory[:] = bytes([value]) * size
"""


class Hostile(ServerTestCase):
    """A thousand clients that do what no client should: the server lives, gives nobody wrong
    answers, and gets its memory back."""

    FLAGS = ("--shared_memory=on", "--memory_budget=268435456",
             "--shared_memory_budget=134217728", "--max_regions=8",
             # Clients that wait for room have no region yet.
             "--handshake_timeout=10m")
    SHAPE = (16, 16, 32, 32)
    BYTES = 1 << 20

    def setUp(self):
        super().setUp()
        self.socket_path = shared_memory.status(self.stub).socket
        self.layer = Layer.create(self.stub, f"hostile/{request_id()}", 16)
        self.x = torch.randn(self.SHAPE, generator=torch_generator(generator(self.id())))

    # --- what the server has ---

    def process_file(self, name):
        return (pathlib.Path("/proc") / str(self.server.pid) / name).read_text()

    def mappings(self):
        return self.process_file("maps").count("memfd:normd")

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.server.pid}/fd"))

    def shared_resident(self):
        return int(re.search(r"RssShmem:\s+(\d+) kB", self.process_file("status"))[1])

    # --- clients ---

    def request(self, region, mode=EVAL, offset=0, out=None):
        """A Forward whose input is as it lies in the region."""
        tensor = to_proto(self.x, data=b"")
        tensor.shared_memory.CopyFrom(region.at(offset, self.BYTES))
        request = rpc.ForwardRequest(name=self.layer.name, input=tensor, mode=mode)
        request.output_memory.CopyFrom(region.at(self.BYTES if out is None else out, self.BYTES))
        return request

    def begun(self, region, mode=EVAL, **where):
        return self.stub.Forward.future(self.request(region, mode, **where), timeout=60)

    def done(self, *calls):
        """Waits for calls that may end in any way but the server's failure."""
        for call in calls:
            code = call.code()
            self.assertIn(code, (Code.OK, Code.NOT_FOUND, Code.INVALID_ARGUMENT,
                                 Code.RESOURCE_EXHAUSTED, Code.CANCELLED), call.details())

    def when_there_is_room(self, ask):
        """Its answer, though another client may have all the memory for a while."""
        deadline = time.monotonic() + 60
        while True:
            try:
                return ask()
            except grpc.RpcError as error:
                if error.code() != Code.RESOURCE_EXHAUSTED or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def region(self, connection):
        region = self.when_there_is_room(lambda: Region(connection, 2 * self.BYTES))
        region.memory[:self.BYTES] = raw_bytes(self.x)
        return region

    # --- what they do ---

    def shrinks(self, rng):
        with Connection(self.stub, self.socket_path) as connection:
            region = self.region(connection)
            call = self.begun(region)
            for attempt in (lambda: os.ftruncate(region.fd, 0),
                            lambda: os.ftruncate(region.fd, 1 << 30),
                            lambda: os.open(f"/proc/self/fd/{region.fd}", os.O_RDWR | os.O_TRUNC),
                            lambda: fcntl.fcntl(region.fd, F_ADD_SEALS, F_SEAL_WRITE)):
                with self.assertRaises(PermissionError):
                    attempt()
            self.assertEqual(LIBC.fallocate(region.fd, PUNCH_HOLE, ctypes.c_long(0),
                                            ctypes.c_long(region.size)), 0)
            region.close()
            self.done(call)

    def is_killed(self, rng):
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", VICTIM, self.socket_path, str(2 * self.BYTES)],
            stdout=subprocess.PIPE, text=True)
        with process:
            name = bytes.fromhex(process.stdout.readline())
            region = Anywhere(self.when_there_is_room(lambda: self.stub.RegisterSharedMemory(
                rpc.RegisterSharedMemoryRequest(
                    connection=name, region_bytes=2 * self.BYTES))).region)
            process.stdout.readline()
            calls = [self.begun(region, rng.choice((TRAIN, EVAL))) for _ in range(2)]
            process.kill()
        self.done(*calls)

    def lies_about_offsets(self, rng):
        with Connection(self.stub, self.socket_path) as connection:
            region = self.region(connection)
            for _ in range(5):
                request = self.request(region)
                where = rng.choice((request.input.shared_memory, request.output_memory))
                where.offset = rng.choice((rng.randrange(2**64), 2**64 - 64, region.size,
                                           64 * rng.randrange(2**58), region.size - 64))
                where.length = rng.choice((self.BYTES, rng.randrange(2**64), 2**64 - 1))
                with refused(self, Code.INVALID_ARGUMENT):
                    self.stub.Forward(request)
            region.close()

    def names_what_is_not_its_own(self, rng):
        for name in (rng.randbytes(16), rng.randbytes(rng.randrange(64)), self.gone):
            with refused(self, Code.NOT_FOUND):
                self.stub.Forward(self.request(Anywhere(name)))
            with refused(self, Code.NOT_FOUND):
                self.stub.RegisterSharedMemory(rpc.RegisterSharedMemoryRequest(
                    connection=name, region_bytes=64))
            with refused(self, Code.NOT_FOUND):
                self.stub.UnregisterSharedMemory(rpc.UnregisterSharedMemoryRequest(region=name))

    def writes_while_it_is_read(self, rng):
        with Connection(self.stub, self.socket_path) as connection:
            region = self.region(connection)
            calls = [self.begun(region, mode) for mode in (TRAIN, EVAL)]
            calls.append(self.begun(region, TRAIN, out=0))  # in place, while others read it
            while not all(call.done() for call in calls):
                region.memory[:self.BYTES] = struct.pack("<f", rng.uniform(-9, 9)) * (
                    self.BYTES // 4)
            region.close()
            self.done(*calls)

    def leaves_in_the_middle(self, rng):
        with Connection(self.stub, self.socket_path) as connection:
            region = self.region(connection)
            calls = [self.begun(region, rng.choice((TRAIN, EVAL))) for _ in range(2)]
            if rng.random() < 0.5:
                region.close()
            else:
                self.addCleanup(region.close)
        self.done(*calls)

    def gives_up_what_it_uses(self, rng):
        with Connection(self.stub, self.socket_path) as connection:
            region = self.region(connection)
            calls = [self.begun(region) for _ in range(3)]
            self.stub.UnregisterSharedMemory(rpc.UnregisterSharedMemoryRequest(
                region=region.name))
            type(self).gone = region.name
            calls[0].cancel()
            region.close()
            self.done(*calls)

    def takes_nothing(self, rng):
        with Connection(self.stub, self.socket_path) as connection:
            region, _ = self.when_there_is_room(
                lambda: connection.register(2 * self.BYTES, take=False))
            self.done(self.begun(Anywhere(region)))

    def knocks_and_runs(self, rng):
        with contextlib.ExitStack() as stack:
            for _ in range(5):
                half = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                half.connect(self.socket_path)
                if rng.random() < 0.5:
                    with contextlib.suppress(OSError):
                        half.send(rng.randbytes(rng.randrange(1, 5000)))

    def asks_for_all_there_is(self, rng):
        with Connection(self.stub, self.socket_path) as connection:
            with refused(self, Code.RESOURCE_EXHAUSTED):
                while True:
                    connection.register(rng.randrange(1, 1 << 25), take=rng.random() < 0.5)

    def test_a_thousand_clients_harm_nobody(self):
        attacks = [self.shrinks, self.is_killed, self.lies_about_offsets,
                   self.names_what_is_not_its_own, self.writes_while_it_is_read,
                   self.leaves_in_the_middle, self.gives_up_what_it_uses, self.takes_nothing,
                   self.knocks_and_runs, self.asks_for_all_there_is]
        type(self).gone = b""
        honest = Layer.create(self.stub, f"honest/{request_id()}", 16)
        due = honest.forward(self.x, mode=EVAL).output
        shared_due = due.data
        descriptors, resident = self.descriptors(), self.shared_resident()
        stop = threading.Event()
        answers = []

        def be_honest():
            # Its regions are from before: the others may take all there is.
            with Connection(self.stub, self.socket_path) as connection:
                region = self.region(connection)
                request = self.request(region)
                request.name = honest.name
                while not stop.is_set():
                    self.assertEqual(honest.forward(self.x, mode=EVAL).output, due)
                    got = region.take(self.stub.Forward(request).output)
                    self.assertEqual(got.data, shared_due)
                    answers.append(got.shape)
                region.close()

        def attack(number):
            rng = generator(f"{self.id()}/{number}")
            attacks[number % len(attacks)](rng)

        with concurrent.futures.ThreadPoolExecutor(5) as pool:
            honesty = pool.submit(be_honest)
            try:
                for done in [pool.submit(attack, number) for number in range(1000)]:
                    done.result()
            finally:
                stop.set()
            honesty.result()
        self.assertGreater(len(answers), 3)

        eventually(lambda: shared_memory.status(self.stub).connections == 0)
        eventually(lambda: shared_memory.status(self.stub).bytes_in_use == 0)
        status = shared_memory.status(self.stub)
        self.assertEqual((status.regions, status.bytes_in_use), (0, 0))
        info = self.stub.GetServerInfo(rpc.GetServerInfoRequest())
        self.assertEqual(info.memory_in_use, 0)
        self.assertEqual(self.mappings(), 0)
        # The store's index, which may be such memory too, and gRPC's own are no leak.
        self.assertLessEqual(self.shared_resident(), resident + 256)
        eventually(lambda: self.descriptors() <= descriptors + 20)
        # What was written amid the calls were numbers, and so are the statistics.
        state = self.layer.state_dict()
        self.assertTrue(torch.isfinite(state["running_mean"]).all())
        self.assertTrue(torch.isfinite(state["running_var"]).all())
        self.assertTrue((state["running_var"] >= 0).all())
        self.assertEqual(honest.forward(self.x, mode=EVAL).output, due)

    def test_without_its_socket_the_server_serves_those_it_knows(self):
        with Server("--shared_memory=on") as server, Connection(server.stub) as connection:
            os.unlink(shared_memory.status(server.stub).socket)
            Layer.create(server.stub, self.layer.name, 16)
            region = self.region(connection)
            request = self.request(region)
            answer = region.take(server.stub.Forward(request).output)
            self.assertEqual(answer.data, self.layer.forward(self.x, mode=EVAL).output.data)
            region.close()


class Callers(unittest.TestCase):
    """A region is its caller's, though another may know its name."""

    def test_another_caller_is_told_that_there_is_none(self):
        with tempfile.TemporaryDirectory() as directory:
            auth = pathlib.Path(directory) / "auth"
            tokens = {name: secrets.token_hex(32) for name in ("one", "two")}
            auth.write_text("".join(
                f"sha256:{hashlib.sha256(token.encode()).hexdigest()} {name} admin *\n"
                for name, token in tokens.items()))
            with Server("--shared_memory=on", f"--auth_file={auth}") as server:
                one, two = ((("authorization", f"Bearer {token}"),) for token in tokens.values())
                stub = server.stub
                stub.CreateInstance(rpc.CreateInstanceRequest(
                    name="x", config=batch_norm_2d(3)), metadata=one)
                with refused(self, Code.UNAUTHENTICATED):
                    shared_memory.status(stub)
                with Connection(stub, metadata=one) as connection:
                    region = Region(connection, PART)
                    tensor = to_proto(torch.ones(2, 3, 4, 4))
                    region.put(tensor, 0)
                    request = rpc.ForwardRequest(name="x", input=tensor)
                    stub.Forward(request, metadata=one)
                    with refused(self, Code.NOT_FOUND, "input.shared_memory.region"):
                        stub.Forward(request, metadata=two)
                    request.ClearField("input")
                    request.input.CopyFrom(to_proto(torch.ones(2, 3, 4, 4)))
                    request.output_memory.CopyFrom(region.at(0, 384))
                    with refused(self, Code.NOT_FOUND, "output_memory.region"):
                        stub.Forward(request, metadata=two)
                    giving_up = rpc.UnregisterSharedMemoryRequest(region=region.name)
                    with refused(self, Code.NOT_FOUND, "region"):
                        stub.UnregisterSharedMemory(giving_up, metadata=two)
                    stub.UnregisterSharedMemory(giving_up, metadata=one)
                    region.close()


class Normctl(ServerTestCase):
    FLAGS = ("--shared_memory=on", "--log_level=debug")

    def setUp(self):
        super().setUp()
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = pathlib.Path(directory.name)
        self.layer = Layer.create(self.stub, f"normctl/{request_id()}", 16)
        self.layer.eval()
        numpy.save(self.directory / "x.npy", torch.randn(16, 16, 32, 32).numpy())

    def forward(self, use, server=None):
        """Its output file and how many regions it asked for; or why it failed."""
        output = self.directory / f"{use}.npy"
        before = self.server.log(last=10**6).count("RegisterSharedMemory")
        done = subprocess.run(
            [NORMCTL, f"--server={server or self.server.address}", f"--shared_memory={use}",
             "forward", self.layer.name, f"--input={self.directory / 'x.npy'}",
             f"--output={output}"],
            capture_output=True, text=True, timeout=60, check=False, env=environment())
        if done.returncode != 0:
            return done.returncode, done.stderr
        regions = self.server.log(last=10**6).count("RegisterSharedMemory") - before
        return output.read_bytes(), regions

    def test_uses_it_where_it_is_told_to_or_may(self):
        plain, regions = self.forward("off")
        self.assertEqual(regions, 0)
        for use in ("auto", "on"):
            got, regions = self.forward(use)
            self.assertEqual(got, plain)
            self.assertEqual(regions, 2, "one for the input, one for the output")

    def test_info_tells_of_it(self):
        def info(*flags):
            return subprocess.run([NORMCTL, f"--server={self.server.address}", *flags, "info"],
                                  capture_output=True, text=True, timeout=60, check=True,
                                  env=environment()).stdout

        with Connection(self.stub) as connection:
            connection.register(PART)
            self.assertEqual(json.loads(info("--json"))["shared_memory"]["bytes_in_use"], PART)
        self.assertIn(str(self.server.state_dir / "shared-memory.sock"), info())
        with Server() as without:
            done = subprocess.run([NORMCTL, f"--server={without.address}", "--json", "info"],
                                  capture_output=True, text=True, timeout=60, check=True,
                                  env=environment())
            self.assertIsNone(json.loads(done.stdout)["shared_memory"])

    def test_fails_where_it_must_and_cannot(self):
        with Server() as without:
            Layer.create(without.stub, self.layer.name, 16)
            code, error = self.forward("on", without.address)
            self.assertEqual(code, 1)
            self.assertIn("--shared_memory=on", error)
            self.assertIsInstance(self.forward("auto", without.address)[0], bytes)
        code, error = self.forward("sometimes")
        self.assertEqual(code, 2)
        self.assertIn("auto|on|off", error)


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
