"""A stream's answer is its unary twin's, byte for byte, however it is cut."""

import threading
import unittest

import grpc
import torch
from harness import streams
from harness.errors import refused
from harness.layer import EVAL, TRAIN, Layer, request_id
from harness.seed import SEED, generator, torch_generator
from harness.server import ServerTestCase
from harness.tensors import from_proto, raw_bytes

MAX_MESSAGE = 1 << 20


class StreamCase(ServerTestCase):
    FLAGS = (f"--max_message_bytes={MAX_MESSAGE}",)

    def setUp(self):
        super().setUp()
        self.rng = generator(self.id())
        self.torch_rng = torch_generator(self.rng)

    def pair(self, channels, **arguments):
        """Two instances alike: one for the unary call, one for the stream."""
        return [Layer.create(self.stub, f"{which}/{request_id()}", channels, **arguments)
                for which in ("unary", "stream")]

    def randn(self, shape, dtype=torch.float32):
        return torch.randn(shape, generator=self.torch_rng, dtype=torch.float64).to(dtype)


class SameAnswer(StreamCase):
    SHAPES = [(4, 3, 8, 8), (1, 5, 31, 7), (0, 3, 2, 2), (2, 17, 1, 3), (3, 64, 16, 16)]
    # A byte at a time, through the middle of elements, all at once.
    CHUNKS = [7, [1, 2, 3, 4096], 1 << 20]

    def test_forward_and_backward_equal_the_unary_calls(self):
        for shape in self.SHAPES:
            for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
                for chunk in self.CHUNKS:
                    channels_last = self.rng.random() < 0.5
                    with self.subTest(NORMD_SEED=SEED, shape=shape, dtype=dtype, chunk=chunk,
                                      channels_last=channels_last):
                        self.compare(shape, dtype, chunk, channels_last)

    def compare(self, shape, dtype, chunk, channels_last):
        if chunk == 7 and shape[0] * shape[1] > 100:
            chunk = 1000 + 7
        unary, stream = self.pair(
            shape[1], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        x, grad = self.randn(shape, dtype), self.randn(shape, dtype)
        options = dict(chunk=chunk, channels_last=channels_last)

        for mode in (TRAIN, EVAL):
            due = unary.forward(x, channels_last, save=True, statistics=True, mode=mode)
            header, y = streams.forward(self.stub, stream.name, x, mode=mode, **options,
                                        save_for_backward=True, return_batch_statistics=True)
            self.assertEqual(raw_bytes(y), raw_bytes(from_proto(due.output)))
            self.assertEqual(header.version, due.version)
            self.assertEqual(header.num_batches_tracked, due.num_batches_tracked)
            self.assertEqual(header.batch_statistics, due.batch_statistics)
            self.assertEqual(header.mode, mode)
            self.assertEqual(header.output.memory_format, due.output.memory_format)

            back = unary.backward(grad, due.context_id, channels_last=channels_last,
                                  accumulate=True, retain_context=True)
            header, dx = streams.backward(self.stub, stream.name, grad, **options, accumulate=True,
                                          context_id=header.context_id)
            self.assertEqual(raw_bytes(dx), raw_bytes(from_proto(back.grad_input)))
            self.assertEqual(header.grad_weight, back.grad_weight)
            self.assertEqual(header.grad_bias, back.grad_bias)
            self.assertEqual(header.version, back.version)

            back = unary.backward(grad, x=x, channels_last=channels_last, mode=mode)
            header, dx = streams.backward(self.stub, stream.name, grad, x=x, mode=mode, **options)
            self.assertEqual(raw_bytes(dx), raw_bytes(from_proto(back.grad_input)))
            self.assertEqual(header.grad_weight, back.grad_weight)

        for key, value in unary.state_dict().items():
            self.assertTrue(torch.equal(value, stream.state_dict()[key]), key)
        unary.delete()
        stream.delete()


class PastOneMessage(StreamCase):
    def test_a_tensor_of_many_messages_passes(self):
        layer = Layer.create(self.stub, "large", 8)
        x = self.randn((16, 8, 96, 96))  # 4.7 MB
        with refused(self, grpc.StatusCode.RESOURCE_EXHAUSTED, flag="--max_message_bytes"):
            layer.forward(x[:4])
        # Far past the limit gRPC itself cuts it off, in its own words.
        with refused(self, grpc.StatusCode.RESOURCE_EXHAUSTED):
            layer.forward(x)
        header, y = streams.forward(self.stub, "large", x, chunk=MAX_MESSAGE - 100,
                                    save_for_backward=True)
        module = torch.nn.BatchNorm2d(8)
        x_peer = x.clone().requires_grad_()
        due = module(x_peer)
        self.assertLess((y - due).abs().max().item(), 1e-5)
        grad = self.randn(x.shape)
        due.backward(grad)
        header, dx = streams.backward(self.stub, "large", grad, context_id=header.context_id)
        self.assertLess((dx - x_peer.grad).abs().max().item(), 1e-5)

    def test_skip_grad_input_answers_the_header_alone(self):
        layer = Layer.create(self.stub, "first", 3)
        x = self.randn((2, 3, 4, 4))
        header, dx = streams.backward(self.stub, "first", x, x=x, skip_grad_input=True)
        self.assertIsNone(dx)
        self.assertEqual(list(header.grad_weight.shape), [3])
        back = layer.backward(x, x=x, skip_grad_input=True)
        self.assertFalse(back.HasField("grad_input"))
        self.assertEqual(header.grad_weight, back.grad_weight)

    def test_a_retried_stream_counts_once(self):
        layer = Layer.create(self.stub, "retried", 3)
        x = self.randn((2, 3, 4, 4))
        again = request_id()
        answers = [streams.forward(self.stub, "retried", x, request_id=again) for _ in range(3)]
        self.assertEqual([header.version for header, _ in answers], [2, 2, 2])
        self.assertEqual([header.replayed for header, _ in answers], [False, True, True])
        self.assertEqual(len({raw_bytes(y) for _, y in answers}), 1)
        self.assertEqual(layer.info().num_batches_tracked, 1)
        # The unary twin of the same method knows the id too.
        self.assertTrue(layer.forward(x, request_id=again).replayed)

    def test_a_deadline_ends_a_stream_that_waits(self):
        Layer.create(self.stub, "slow", 3)

        def parts():
            message = streams._split(self.randn((2, 3, 4, 4)), False)[0]
            yield streams.rpc.ForwardStreamRequest(
                header=streams.rpc.ForwardRequest(name="slow", input=message))
            threading.Event().wait(5)

        with refused(self, grpc.StatusCode.DEADLINE_EXCEEDED):
            list(self.stub.ForwardStream(parts(), timeout=0.3))
        self.assertEqual(Layer(self.stub, "slow").info().version, 1)


if __name__ == "__main__":
    unittest.main()
