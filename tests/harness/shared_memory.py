"""Shared memory as a client gets it: a connection, and the regions that live with it."""

import mmap
import os
import socket

from normd.v1 import norm_service_pb2 as rpc, tensor_pb2


def status(stub, **call):
    return stub.GetSharedMemoryStatus(rpc.GetSharedMemoryStatusRequest(), **call)


class Connection:
    """One connection to the server's socket. `metadata` goes with its RPCs."""

    def __init__(self, stub, path=None, metadata=()):
        self.stub = stub
        self.metadata = metadata
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(10)
        self.socket.connect(path or status(stub, metadata=metadata).socket)
        self.name = self.socket.recv(64)

    def register(self, size, take=True):
        """The region's name, and its descriptor unless it stays in the socket."""
        region = self.stub.RegisterSharedMemory(rpc.RegisterSharedMemoryRequest(
            connection=self.name, region_bytes=size), metadata=self.metadata).region
        if not take:
            return region, None
        while True:
            name, descriptors, _, _ = socket.recv_fds(self.socket, 64, 1)
            if name == region:
                return region, descriptors[0]
            os.close(descriptors[0])  # of one that was not taken

    def close(self):
        self.socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Region:
    """A region that is mapped here too."""

    def __init__(self, connection, size):
        self.size = size
        self.name, self.fd = connection.register(size)
        self.memory = mmap.mmap(self.fd, size)

    def at(self, offset, length):
        return tensor_pb2.SharedMemory(region=self.name, offset=offset, length=length)

    def put(self, message, offset):
        """Moves the message's data here, to `offset`; returns where they end."""
        data = message.data
        message.ClearField("data")
        self.memory[offset:offset + len(data)] = data
        message.shared_memory.CopyFrom(self.at(offset, len(data)))
        return offset + len(data)

    def take(self, message):
        """The message with the data that it says are here, in the message itself."""
        assert not message.data and message.shared_memory.region == self.name, message
        begin = message.shared_memory.offset
        whole = tensor_pb2.Tensor()
        whole.CopyFrom(message)
        whole.ClearField("shared_memory")
        whole.data = self.memory[begin:begin + message.shared_memory.length]
        return whole

    def close(self):
        self.memory.close()
        os.close(self.fd)
