"""Tensors in memory that the client shares with a server on its host.

The server makes the memory and hands it over through its Unix socket, region by region
(norm_service.proto says how). Arrays lie in it as in any other; a region is used again when
the last array on it is gone.
"""

import collections
import mmap
import os
import re
import socket
import threading
import time
import weakref

import grpc
import numpy as np

from normd.errors import NormdError
from normd.v1 import error_pb2, norm_service_pb2 as pb, tensor_pb2

# Below this a message is as fast.
_WORTH_SHARING = 64 << 10
_SMALLEST = 4096
# As the server asks of offsets.
_ALIGNMENT = 64
# What is kept for later calls.
_MOST_IDLE_BYTES = 1 << 30
_MOST_IDLE_REGIONS = 32
# How long a refusal is believed, in seconds.
_OFF_FOR = 10.0
_NOT_NOW_FOR = 1.0
# The server sends what it sends before it answers.
_LONGEST_RECEIVE_S = 5.0

# Codes with which a server has no more to do with a call's memory.
_OVER = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
)
_OFF = (
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNIMPLEMENTED,
    # The socket is another server's than the one that answers, behind a tunnel.
    grpc.StatusCode.NOT_FOUND,
)


def is_local(target):
    """Whether the server at `target` is on this host."""
    if target.startswith("unix"):
        return True
    address = re.sub(r"^(dns|ipv4|ipv6):", "", target).lstrip("/")
    host = address.rpartition(":")[0]
    return host in ("localhost", "[::1]") or host.startswith("127.")


def _round_up(size):
    """Four steps a power of two, so that a region serves tensors of about one size."""
    size = max(size, _SMALLEST)
    step = (1 << (size - 1).bit_length()) // 8
    return -(-size // step) * step


def _refused(code, message):
    return NormdError(code, message, error_pb2.ErrorDetail())


class NotShared(Exception):
    """A call cannot be made through shared memory; `error`, a NormdError, says why."""

    def __init__(self, error):
        super().__init__(str(error))
        self.error = error


class Region:
    """A region of the server's, mapped here. Gone when nobody has it any more."""

    def __init__(self, name, descriptor, size):
        self.name = name
        self.size = size
        self.memory = np.frombuffer(mmap.mmap(descriptor, size), np.uint8)
        self.address = self.memory.ctypes.data


class Lease:
    """A region for one user: for the arrays that lie in it, which keep this."""

    def __init__(self, region, connection):
        self._region = region
        self._fate = {"discard": False}
        # Arrays made from this have it as their base.
        self.__array_interface__ = region.memory.__array_interface__
        # The connection is kept too: the server takes its memory back when it is closed.
        weakref.finalize(self, connection.give_back, region, self._fate).atexit = False

    def bytes(self, size):
        return np.asarray(self)[:size]

    def named(self, size):
        return tensor_pb2.SharedMemory(region=self._region.name, length=size)

    def discard(self):
        """The server may still read or write there: the region is not to be used again."""
        self._fate["discard"] = True


class _Connection:
    """A connection to the server's socket, with the regions that live with it."""

    def __init__(self, status):
        self.max_region_bytes = status.max_region_bytes
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        weakref.finalize(self, self.socket.close).atexit = False
        self.socket.settimeout(_LONGEST_RECEIVE_S)
        self.socket.connect(status.socket)
        self.name = self.socket.recv(64)
        self._lock = threading.Lock()
        self._regions = []  # all that are mapped
        self._idle = []
        # What finalizers bring, on whatever thread and whatever that one is doing.
        self._returned = collections.deque()
        self._unwanted = []  # names that the server is to be told of

    def give_back(self, region, fate):
        self._returned.append((region, fate["discard"]))

    def add(self, region):
        with self._lock:
            self._regions.append(region)

    def take(self, size):
        """The smallest idle region of `size` that is not much larger, or None."""
        with self._lock:
            self._sort_returned()
            fitting = [region for region in self._idle if size <= region.size <= _round_up(size)]
            if not fitting:
                return None
            region = min(fitting, key=lambda each: each.size)
            self._idle.remove(region)
            return region

    def take_unwanted(self, all_idle=False):
        with self._lock:
            self._sort_returned()
            if all_idle:
                for region in self._idle:
                    self._drop(region)
                self._idle = []
            names, self._unwanted = self._unwanted, []
            return names

    def find(self, address, size):
        """What the server calls these bytes, where they lie in a region."""
        with self._lock:
            for region in self._regions:
                offset = address - region.address
                if 0 <= offset <= region.size - size and offset % _ALIGNMENT == 0:
                    return tensor_pb2.SharedMemory(
                        region=region.name, offset=offset, length=size
                    )
        return None

    def _sort_returned(self):
        while self._returned:
            region, discard = self._returned.popleft()
            idle_bytes = sum(each.size for each in self._idle)
            full = (
                idle_bytes + region.size > _MOST_IDLE_BYTES
                or len(self._idle) >= _MOST_IDLE_REGIONS
            )
            if discard or full:
                self._drop(region)
            else:
                self._idle.append(region)

    def _drop(self, region):
        self._regions.remove(region)
        self._unwanted.append(region.name)


class SharedMemory:
    """What a client shares. Thread-safe.

    use         True: always, and calls fail where it is not possible; False: never; None:
                where it is possible and worth it
    call_once   call_once(method, request, deadline): one RPC, without another try
    """

    def __init__(self, target, use, call_once):
        self._local = is_local(target)
        self._use = use
        self._call_once = call_once
        # Held while the server is asked: descriptors come in the order of the requests.
        self._asking = threading.Lock()
        self._ask_again = 0.0
        self._refusal = None  # until then
        self._connection = None

    @property
    def must(self):
        """Whether a call that cannot must not go without."""
        return bool(self._use)

    def wants(self, size):
        """Whether a call with so many bytes of tensor should try."""
        if self._use is None:
            return self._local and size >= _WORTH_SHARING
        return self._use and size > 0

    def find(self, data):
        """What the server calls the bytes of `data`, where they lie in this memory."""
        connection = self._connection
        return connection and connection.find(data.ctypes.data, data.nbytes)

    def get(self, size, deadline):
        """A Lease of `size` bytes or more. NotShared where there is none."""
        connection = self._connection
        region = connection and connection.take(size)
        if region:
            return Lease(region, connection)
        with self._asking:
            if time.monotonic() < self._ask_again:
                raise NotShared(self._refusal)
            try:
                connection = self._open(deadline)
                try:
                    region = self._ask(connection, size, deadline)
                except NormdError as error:
                    if error.code is not grpc.StatusCode.NOT_FOUND:
                        raise
                    # The server of before is gone; its socket may be another's.
                    self._connection = None
                    connection = self._open(deadline)
                    region = self._ask(connection, size, deadline)
            except OSError as error:
                self._refuse(_refused(grpc.StatusCode.UNAVAILABLE, f"no shared memory: {error}"))
            except NormdError as error:
                self._refuse(error)
            return Lease(region, connection)

    def forget_if_lost(self, error):
        """Whether the server does not know our memory: it has been restarted, or is another.

        The memory is forgotten then, and the call may be made without it.
        """
        code, detail = error.code, error.detail
        lost = (
            code is grpc.StatusCode.NOT_FOUND and detail.field.endswith("_memory.region")
        ) or (code is grpc.StatusCode.FAILED_PRECONDITION and detail.flag == "--shared_memory")
        if lost:
            self._connection = None
        return lost

    def close(self):
        """Regions go with the last array that lies in them."""
        self._connection = None

    def _refuse(self, error):
        self._refusal = error
        off = error.code in _OFF
        self._ask_again = time.monotonic() + (_OFF_FOR if off else _NOT_NOW_FOR)
        raise NotShared(error)

    def _open(self, deadline):
        if self._connection is not None:
            return self._connection
        if not self._local:
            raise _refused(
                grpc.StatusCode.FAILED_PRECONDITION,
                "shared memory is for servers on this host: those at unix:PATH, localhost "
                "or 127.0.0.1",
            )
        status = self._call_once(
            "GetSharedMemoryStatus", pb.GetSharedMemoryStatusRequest(), deadline
        )
        if not status.enabled:
            raise _refused(
                grpc.StatusCode.FAILED_PRECONDITION,
                "the server runs without shared memory; --shared_memory=on allows it",
            )
        self._connection = _Connection(status)
        return self._connection

    def _ask(self, connection, size, deadline):
        self._unregister(connection.take_unwanted(), deadline)
        size = max(size, min(_round_up(size), connection.max_region_bytes))
        request = pb.RegisterSharedMemoryRequest(connection=connection.name, region_bytes=size)
        try:
            name = self._call_once("RegisterSharedMemory", request, deadline).region
        except NormdError as error:
            if error.code is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            self._unregister(connection.take_unwanted(all_idle=True), deadline)
            name = self._call_once("RegisterSharedMemory", request, deadline).region
        while True:
            packet, descriptors, _, _ = socket.recv_fds(connection.socket, 64, 1)
            if not descriptors:
                raise OSError("the server closed its socket")
            try:
                # Another came for a request whose answer was lost.
                if packet == name:
                    region = Region(name, descriptors[0], size)
                    connection.add(region)
                    return region
            finally:
                os.close(descriptors[0])

    def _unregister(self, names, deadline):
        for name in names:
            try:
                self._call_once(
                    "UnregisterSharedMemory", pb.UnregisterSharedMemoryRequest(region=name), deadline
                )
            except NormdError:
                pass  # at worst the region lives as long as the connection


class SharedTensors:
    """The tensors of one call in shared memory."""

    def __init__(self, memory, deadline):
        self._memory = memory
        self._deadline = deadline
        self._inputs = []
        self._output = None

    def put(self, data, tensor):
        """Names in `tensor` where the bytes are, or where they have been copied to."""
        data = np.frombuffer(data, np.uint8)
        if not data.size:
            return
        there = self._memory.find(data)
        if there is None:
            lease = self._memory.get(data.size, self._deadline)
            lease.bytes(data.size)[:] = data
            there = lease.named(data.size)
            self._inputs.append(lease)
        tensor.shared_memory.CopyFrom(there)

    def attempt(self, call, output_memory, size):
        """call(), with memory for an output of `size` bytes named in `output_memory`.

        Each attempt has memory of its own: the server may still be writing for the one before.
        """
        leases = list(self._inputs)
        if size:
            self._output = self._memory.get(size, self._deadline)
            output_memory.CopyFrom(self._output.named(size))
            leases.append(self._output)
        try:
            return call()
        except BaseException as error:
            if not isinstance(error, grpc.RpcError) or error.code() not in _OVER:
                for lease in leases:
                    lease.discard()
            raise

    def output(self, size):
        """The bytes of the output, where they lie."""
        return self._output.bytes(size) if size else b""
