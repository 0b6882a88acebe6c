"""What users would write today: a grpcio server with torch.nn.functional.batch_norm.

    torch_server.py PORT_FILE       serves normd's contract for BatchNorm2d in float32
"""

import os
import sys
from concurrent import futures

import grpc
import torch
from normd.v1 import instance_pb2, norm_service_pb2 as rpc, norm_service_pb2_grpc, tensor_pb2

UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


def from_proto(tensor):
    return torch.frombuffer(bytearray(tensor.data), dtype=torch.float32).reshape(
        list(tensor.shape))


def to_proto(tensor):
    return tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=tensor.shape,
                             data=tensor.numpy().tobytes())


class Service(norm_service_pb2_grpc.NormServiceServicer):
    """One layer for each number of channels."""

    def __init__(self):
        self.layers = {}

    def layer(self, x):
        return self.layers.setdefault(x.shape[1], torch.nn.BatchNorm2d(x.shape[1]))

    def normalize(self, x, training):
        layer = self.layer(x)
        return torch.nn.functional.batch_norm(x, layer.running_mean, layer.running_var,
                                              layer.weight, layer.bias, training)

    def Forward(self, request, context):
        with torch.no_grad():
            y = self.normalize(from_proto(request.input), request.mode == instance_pb2.MODE_TRAIN)
        return rpc.ForwardResponse(output=to_proto(y))

    def Backward(self, request, context):
        x = from_proto(request.input).requires_grad_()
        y = self.normalize(x, request.mode == instance_pb2.MODE_TRAIN)
        (grad,) = torch.autograd.grad(y, x, from_proto(request.grad_output))
        return rpc.BackwardResponse(grad_input=to_proto(grad))


def main():
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=10), options=UNLIMITED)
    norm_service_pb2_grpc.add_NormServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with open(sys.argv[1] + ".tmp", "w", encoding="ascii") as file:
        file.write(f"127.0.0.1:{port}\n")
    os.rename(sys.argv[1] + ".tmp", sys.argv[1])
    server.wait_for_termination()


if __name__ == "__main__":
    main()
