"""A stream's answer is its unary twin's, byte for byte, however it is cut; where the statistics
of a large tensor are taken while it comes, to rounding."""

import os
import threading
import time
import unittest

import grpc
import torch
from harness import streams
from harness.errors import refused
from harness.layer import EVAL, TRAIN, Layer, request_id
from harness.seed import SEED, generator, torch_generator
from harness.server import ServerTestCase
from harness.tensors import from_proto, raw_bytes, to_proto
from normd.v1 import instance_pb2, norm_service_pb2 as rpc, tensor_pb2

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


class EveryLayer(StreamCase):
    """Samples that are normalized each by itself pass through; what else there is does not:
    either way the bytes are the unary call's."""

    CONFIGS = {
        "layer_norm": instance_pb2.InstanceConfig(
            layer_norm=instance_pb2.LayerNorm(normalized_shape=[5, 7])),
        "rms_norm": instance_pb2.InstanceConfig(
            rms_norm=instance_pb2.RmsNorm(normalized_shape=[7])),
        "group_norm": instance_pb2.InstanceConfig(
            group_norm=instance_pb2.GroupNorm(num_groups=2, num_channels=6)),
        "instance_norm": instance_pb2.InstanceConfig(
            instance_norm_2d=instance_pb2.InstanceNorm2d(num_features=6)),
        "instance_norm_tracking": instance_pb2.InstanceConfig(
            instance_norm_2d=instance_pb2.InstanceNorm2d(num_features=6, affine=True,
                                                         track_running_stats=True)),
        "batch_norm": instance_pb2.InstanceConfig(
            batch_norm_2d=instance_pb2.BatchNorm2d(num_features=6)),
        "batch_norm_without_statistics": instance_pb2.InstanceConfig(
            batch_norm_2d=instance_pb2.BatchNorm2d(num_features=6, track_running_stats=False)),
    }

    def test_streams_answer_the_unary_calls_bytes(self):
        for kind, config in self.CONFIGS.items():
            for shape in ((3, 6, 5, 7), (40, 6, 5, 7)):
                for fields in ({}, {"activation": rpc.ACTIVATION_RELU},
                               {"return_batch_statistics": True}, {"residual": True},
                               {"save_for_backward": True}):
                    with self.subTest(NORMD_SEED=SEED, kind=kind, shape=shape, fields=fields):
                        self.compare(config, shape, dict(fields))

    def compare(self, config, shape, fields):
        names = [f"{which}/{request_id()}" for which in ("unary", "stream")]
        for name in names:
            self.stub.CreateInstance(rpc.CreateInstanceRequest(name=name, config=config))
        # InstanceNorm and GroupNorm take channels_last, LayerNorm does not.
        channels_last = (not config.HasField("layer_norm") and not config.HasField("rms_norm")
                         and self.rng.random() < 0.5)
        x = self.randn(shape)
        residual = self.randn(shape) if fields.pop("residual", False) else None
        for mode in (TRAIN, EVAL, TRAIN):
            due = self.stub.Forward(rpc.ForwardRequest(
                name=names[0], input=to_proto(x, channels_last), mode=mode,
                residual=None if residual is None else to_proto(residual, channels_last),
                **fields))
            header, y = streams.forward(self.stub, names[1], x, residual=residual, mode=mode,
                                        chunk=[1, 333, 8192], channels_last=channels_last,
                                        **fields)
            self.assertEqual(raw_bytes(y), raw_bytes(from_proto(due.output)))
            header.output.Clear()
            due.output.Clear()
            header.context_id = due.context_id = ""
            self.assertEqual(header, due)


class LargeTensors(StreamCase):
    """In train mode the statistics of a large stream are taken while it comes; a large unary
    call is folded first and normalized where it lies."""

    FLAGS = ()
    SHAPES = [(33, 64, 64, 64),  # 33 MiB: whole samples are summed at once
              (3, 300, 57, 41),  # channels of a sample
              (2, 3, 1031, 733),  # parts of a channel
              (1, 1, 1, 2000003),
              (1000003, 3, 1, 1)]

    def test_answer_what_the_unary_call_does_and_are_counted_once(self):
        for shape in self.SHAPES:
            for channels_last in (False, True):
                for fields in ({}, {"activation": rpc.ACTIVATION_RELU, "residual": True}):
                    with self.subTest(NORMD_SEED=SEED, shape=shape, channels_last=channels_last,
                                      fields=fields):
                        self.compare(shape, channels_last, dict(fields))

    def compare(self, shape, channels_last, fields):
        unary, stream = self.pair(shape[1])
        x = self.randn(shape) + self.randn((shape[1], 1, 1)) * 3
        added = self.randn(shape) if fields.pop("residual", False) else None
        fields.update(mode=TRAIN, return_batch_statistics=True)
        request = rpc.ForwardRequest(
            name=unary.name, input=to_proto(x, channels_last), request_id=request_id(),
            residual=None if added is None else to_proto(added, channels_last), **fields)
        answer = self.stub.Forward(request)
        due = from_proto(answer.output)
        header, y = streams.forward(self.stub, stream.name, x, residual=added, chunk=1 << 18,
                                    channels_last=channels_last, **fields)
        self.assertLess((y - due).abs().max().item(), 1e-6)
        for field in ("mean", "var"):
            got, wanted = (torch.tensor(list(getattr(each.batch_statistics, field)))
                           for each in (header, answer))
            self.assertTrue(torch.allclose(got, wanted, rtol=1e-6, atol=1e-6), field)
        for each in (header, answer):
            each.ClearField("output")
            each.batch_statistics.ClearField("mean")
            each.batch_statistics.ClearField("var")
        self.assertEqual(header, answer)

        again = self.stub.Forward(request)
        self.assertTrue(again.replayed)
        self.assertEqual(raw_bytes(due), raw_bytes(from_proto(again.output)))
        self.assertEqual(again.num_batches_tracked, 1)
        kept = stream.state_dict()
        for key, value in unary.state_dict().items():
            self.assertTrue(torch.allclose(value, kept[key], rtol=1e-6, atol=1e-6), key)
        unary.delete()
        stream.delete()

    def test_are_exact_where_the_mean_is_far_from_zero_in_every_type(self):
        for shape in self.SHAPES[1:]:
            for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
                with self.subTest(NORMD_SEED=SEED, shape=shape, dtype=dtype):
                    [layer, _] = self.pair(
                        shape[1], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
                    # So that some values differ in their last bits alone.
                    x = (self.randn(shape, torch.float64) + 100).to(dtype)
                    header, y = streams.forward(self.stub, layer.name, x, mode=TRAIN,
                                                chunk=[1 << 20, 999], return_batch_statistics=True,
                                                channels_last=self.rng.random() < 0.5)
                    wide = x.double()
                    due = torch.nn.functional.batch_norm(wide, None, None, training=True)
                    rounding = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}.get(dtype, 0)
                    over = (y.double() - due).abs() - due.abs() * rounding * 1.001
                    self.assertLess(over.max().item(), 1e-5)
                    mean = torch.tensor(list(header.batch_statistics.mean), dtype=torch.float64)
                    self.assertLess((mean - wide.mean((0, 2, 3))).abs().max().item(), 1e-6)

    def test_give_the_same_bytes_however_they_are_cut_and_keep_nan_to_its_channel(self):
        x = self.randn((3, 300, 57, 41))
        x[1, 7, 5, 5], x[2, 299, 0, 0], x[0, 0, 0, 1] = (float(v) for v in ("nan", "inf", "-inf"))
        answers = set()
        for chunk in (4 << 20, 77777, [1, 5 << 20, 12345]):
            [layer, _] = self.pair(300)
            header, y = streams.forward(self.stub, layer.name, x, mode=TRAIN, chunk=chunk,
                                        return_batch_statistics=True)
            self.assertEqual(y.isnan().any(3).any(2).any(0).nonzero().flatten().tolist(),
                             [0, 7, 299])
            answers.add((raw_bytes(y), str(list(header.batch_statistics.mean))))
        self.assertEqual(len(answers), 1)


class BoundedMemory(StreamCase):
    """What a stream costs is what has come of it, and in eval mode hardly anything."""

    BUDGET = 96 << 20
    FLAGS = (f"--max_message_bytes={MAX_MESSAGE + 1024}", f"--memory_budget={BUDGET}")
    CHUNK = bytes(range(256)) * (MAX_MESSAGE // 256)

    def header(self, name, shape, mode):
        return rpc.ForwardStreamRequest(header=rpc.ForwardRequest(
            name=name, mode=mode,
            input=tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT16, shape=shape)))

    def in_use(self):
        return self.stub.GetServerInfo(rpc.GetServerInfoRequest()).memory_in_use

    @unittest.skipIf("san" in os.environ.get("NORMD_BIN", ""), "sanitizers keep freed memory")
    def test_eval_takes_no_more_memory_than_a_few_chunks(self):
        Layer.create(self.stub, "endless", 64)
        chunks = 384  # four times the budget
        before = self.server.peak_bytes()

        def parts():
            yield self.header("endless", (chunks * MAX_MESSAGE // 128, 64, 1, 1), EVAL)
            for _ in range(chunks):
                yield rpc.ForwardStreamRequest(chunk=self.CHUNK)

        received = 0
        for i, part in enumerate(self.stub.ForwardStream(parts(), timeout=120)):
            received += len(part.chunk)
            if i == 20:
                time.sleep(1)  # a slow reader holds the server's reading, not its memory
                self.assertLess(self.in_use(), 16 << 20)
        self.assertEqual(received, chunks * MAX_MESSAGE)
        self.assertLess(self.server.peak_bytes() - before, 64 << 20)

    def test_a_header_claims_nothing_and_chunks_what_they_hold(self):
        Layer.create(self.stub, "claims", 64)
        go_on = threading.Event()

        def parts(chunks):
            yield self.header("claims", (80 * MAX_MESSAGE // 128, 64, 1, 1), TRAIN)
            for _ in range(chunks):
                yield rpc.ForwardStreamRequest(chunk=self.CHUNK)
            go_on.wait(60)

        # Together they announce 20 times the budget.
        calls = [self.stub.ForwardStream(parts(0), timeout=60) for _ in range(24)]
        time.sleep(0.5)
        self.assertEqual(self.in_use(), 0)
        calls.append(self.stub.ForwardStream(parts(10), timeout=60))
        deadline = time.monotonic() + 30
        while self.in_use() < 10 * MAX_MESSAGE and time.monotonic() < deadline:
            time.sleep(0.05)
        self.assertGreaterEqual(self.in_use(), 10 * MAX_MESSAGE)
        self.assertLess(self.in_use(), 16 * MAX_MESSAGE)
        for call in calls:
            call.cancel()
        go_on.set()
        while self.in_use() > 0 and time.monotonic() < deadline:
            time.sleep(0.05)
        self.assertEqual(self.in_use(), 0)
        self.assertEqual(Layer(self.stub, "claims").info().version, 1)

    def test_past_the_budget_a_train_stream_is_told_when_to_come_again(self):
        Layer.create(self.stub, "full", 64)
        go_on = threading.Event()

        def parts():
            yield self.header("full", (80 * MAX_MESSAGE // 128, 64, 1, 1), TRAIN)
            for _ in range(79):
                yield rpc.ForwardStreamRequest(chunk=self.CHUNK)
            go_on.wait(60)

        first = self.stub.ForwardStream(parts(), timeout=60)
        deadline = time.monotonic() + 30
        while self.in_use() < 79 * MAX_MESSAGE and time.monotonic() < deadline:
            time.sleep(0.05)
        with refused(self, grpc.StatusCode.RESOURCE_EXHAUSTED, flag="--memory_budget") as refusal:
            list(self.stub.ForwardStream(parts(), timeout=60))
        self.assertGreater(refusal.detail.retry_delay_ms, 0)
        first.cancel()
        go_on.set()


if __name__ == "__main__":
    unittest.main()
