"""The Python client and its torch module against a real server."""

import copy
import gc
import pathlib
import socket
import sys
import unittest

import numpy
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "client" / "python"))
import normd
import normd.torch
from harness import shared_memory
from harness.server import Server, ServerTestCase, eventually


class PythonClient(ServerTestCase):
    def setUp(self):
        super().setUp()
        self.client = normd.Client(self.server.address)
        self.addCleanup(self.client.close)
        self.name = self.id().rpartition(".")[2]
        torch.manual_seed(1)

    def test_calls_of_a_life(self):
        client, name = self.client, self.name
        client.create(name, 3, momentum=None)
        x = torch.randn(4, 3, 5, 6, requires_grad=True)
        local = torch.nn.BatchNorm2d(3, momentum=None)
        y = local(x)
        y.backward(torch.ones_like(y))

        answer = client.forward(name, x.detach().numpy(), save_for_backward=True,
                                return_batch_statistics=True)
        numpy.testing.assert_allclose(answer.output, y.detach().numpy(), atol=1e-5)
        self.assertEqual((answer.mode, answer.num_batches_tracked), ("train", 1))
        self.assertEqual(answer.batch_statistics.count, 120)
        gradients = client.backward(name, numpy.ones_like(answer.output),
                                    context_id=answer.context_id, accumulate=True)
        numpy.testing.assert_allclose(gradients.grad_input, x.grad.numpy(), atol=1e-5)
        numpy.testing.assert_allclose(gradients.grad_bias, local.bias.grad.numpy(), atol=1e-4)

        self.assertTrue(client.step(name, normd.SGD(lr=0.5), zero_grad=True).stepped)
        torch.optim.SGD(local.parameters(), lr=0.5).step()
        state = client.state_dict(name)
        for key, value in local.state_dict().items():
            numpy.testing.assert_allclose(state[key], value.numpy(), atol=1e-4, err_msg=key)
        client.set_state(name, state)
        client.eval(name)
        self.assertEqual(client.get(name).mode, 2)
        self.assertIn(name, [instance.name for instance in client.list()])
        checkpoint = client.save_checkpoint()
        self.assertIn(checkpoint.id, [each.id for each in client.list_checkpoints()])
        client.delete(name)
        client.load_checkpoint(checkpoint.id, [name])
        self.assertEqual(client.get(name).num_batches_tracked, 1)
        self.assertTrue(client.healthy())

    def test_streams_and_memory_formats_answer_alike(self):
        self.client.create(self.name, 3)
        x = numpy.random.default_rng(1).standard_normal((4, 3, 5, 6), dtype="float32")
        plain = self.client.forward(self.name, x).output
        streamed = self.client.forward(self.name, x, stream=True).output
        numpy.testing.assert_array_equal(streamed, plain)
        nhwc = numpy.moveaxis(numpy.ascontiguousarray(numpy.moveaxis(x, 1, -1)), -1, 1)
        answer = self.client.forward(self.name, nhwc).output
        numpy.testing.assert_allclose(answer, plain, atol=1e-6)
        self.assertEqual(answer.strides, nhwc.strides)

    def test_a_repeated_request_id_counts_once(self):
        self.client.create(self.name, 3)
        x = numpy.ones((2, 3, 2, 2), dtype="float32")
        request_id = "123e4567-e89b-42d3-a456-426614174000"
        first = self.client.forward(self.name, x, request_id=request_id)
        second = self.client.forward(self.name, x, request_id=request_id)
        self.assertEqual((first.replayed, second.replayed), (False, True))
        self.assertEqual(second.num_batches_tracked, 1)

    def test_errors_carry_their_detail(self):
        self.client.create(self.name, 3)
        with self.assertRaises(normd.NormdError) as caught:
            self.client.forward(self.name, numpy.ones((2, 5, 2, 2), dtype="float32"))
        self.assertEqual(caught.exception.code.name, "INVALID_ARGUMENT")
        self.assertEqual(caught.exception.detail.field, "input.shape")
        with self.assertRaises(TypeError):
            self.client.forward(self.name, numpy.ones((2, 3, 2, 2), dtype="int32"))

    def test_a_converted_network_trains_as_the_local_one(self):
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
            local = torch.nn.Sequential(
                torch.nn.BatchNorm2d(4),  # its input wants no gradient
                torch.nn.Conv2d(4, 8, 3),
                torch.nn.BatchNorm2d(8),
                torch.nn.ReLU(),
            ).to(dtype)
            remote = normd.torch.convert(copy.deepcopy(local), self.client,
                                         f"{self.name}/{dtype}".replace("torch.", ""))
            optimizer = torch.optim.SGD(local.parameters(), lr=0.1, momentum=0.9)
            convolution = torch.optim.SGD(remote.parameters(), lr=0.1, momentum=0.9)
            for layout in (torch.contiguous_format, torch.channels_last) * 5:
                x = torch.randn(4, 4, 6, 6, dtype=dtype).to(memory_format=layout)
                losses = []
                for model in (local, remote):
                    loss = (model(x) ** 2 * torch.arange(8).view(1, 8, 1, 1)).mean()
                    model.zero_grad()
                    losses.append(loss)
                normd.torch.zero_grad(remote)
                for loss in losses:
                    loss.backward()
                optimizer.step()
                convolution.step()
                normd.torch.step(remote, normd.SGD(lr=0.1, momentum=0.9))
                torch.testing.assert_close(losses[0], losses[1], rtol=tolerance, atol=0)
            local.eval()
            remote.eval()
            with torch.no_grad():
                torch.testing.assert_close(remote(x), local(x), rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(remote[2].to_local().weight, local[2].weight,
                                       rtol=tolerance, atol=tolerance)

    def test_every_norm_of_a_converted_network_is_the_local_one(self):
        norms = (
            torch.nn.BatchNorm2d(8, momentum=None),
            torch.nn.GroupNorm(4, 8, eps=1e-3),
            torch.nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
            torch.nn.LayerNorm([8, 6, 6]),
            torch.nn.LayerNorm([6], elementwise_affine=False),
        )
        local = torch.nn.Sequential(*norms, torch.nn.Flatten(2), torch.nn.BatchNorm1d(8))
        with torch.no_grad():
            for parameter in local.parameters():
                parameter.uniform_(0.5, 1.5)
        remote = normd.torch.convert(copy.deepcopy(local), self.client, self.name)
        self.assertEqual(len(normd.torch.remote_modules(remote)), 6)
        optimizer = torch.optim.SGD(local.parameters(), lr=0.1)
        for _ in range(3):
            x = torch.randn(4, 8, 6, 6)
            inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
            outputs = [model(each) for model, each in zip((local, remote), inputs)]
            torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
            for output in outputs:
                (output ** 3).mean().backward()
            torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-3, atol=1e-6)
            optimizer.step()
            optimizer.zero_grad()
            normd.torch.step(remote, normd.SGD(lr=0.1), zero_grad=True)
        for module, twin in zip(local, remote):
            if isinstance(twin, normd.torch.RemoteNorm):
                back = twin.to_local()
                self.assertEqual(repr(back), repr(module))
                for key, value in module.state_dict().items():
                    torch.testing.assert_close(back.state_dict()[key], value, rtol=1e-4, atol=1e-5)

    def test_halves_keep_their_type(self):
        module = normd.torch.RemoteNorm.create(self.client, self.name, 4)
        for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
            x = torch.randn(4, 4, 6, 6).to(dtype).requires_grad_()
            y = module(x)
            y.sum().backward()
            self.assertEqual((y.dtype, x.grad.dtype), (dtype, dtype))
            expected = torch.nn.functional.batch_norm(x.float(), None, None, training=True)
            torch.testing.assert_close(y.float(), expected, rtol=0, atol=tolerance)


class SharedMemory(unittest.TestCase):
    """Tensors that client and server both see."""

    FLAGS = ("--shared_memory=on", "--durability=none")
    CHANNELS = 16

    def setUp(self):
        self.server = Server(*self.FLAGS)
        self.addCleanup(self.server.close)
        self.server.start()
        self.x = numpy.random.default_rng(1).standard_normal(
            (8, self.CHANNELS, 32, 32), dtype="float32")

    def connect(self, shared_memory=None):
        client = normd.Client(self.server.address, shared_memory=shared_memory)
        self.addCleanup(client.close)
        return client

    def regions(self):
        return shared_memory.status(self.server.stub).regions

    def test_answers_are_those_of_messages_and_lie_in_it(self):
        plain, client = self.connect(False), self.connect()
        plain.create("bn", self.CHANNELS)
        nhwc = numpy.moveaxis(numpy.ascontiguousarray(numpy.moveaxis(self.x, 1, -1)), -1, 1)
        for x in (self.x, nhwc, self.x.astype("float16")):
            residual = -x
            asked = dict(mode="train", save_for_backward=True, residual=residual,
                         activation="relu")
            due, answer = (each.forward("bn", x, **asked) for each in (plain, client))
            numpy.testing.assert_array_equal(answer.output, due.output)
            self.assertEqual(answer.output.strides, x.strides)
            due, answer = (each.backward("bn", x, context_id=forward.context_id)
                           for each, forward in ((plain, due), (client, answer)))
            for field in ("grad_input", "grad_weight", "grad_residual"):
                numpy.testing.assert_array_equal(getattr(answer, field), getattr(due, field))
            due, answer = (each.backward("bn", x, input=x, mode="train", skip_grad_input=skip)
                           for each, skip in ((plain, False), (client, True)))
            self.assertIsNone(answer.grad_input)
            numpy.testing.assert_array_equal(answer.grad_bias, due.grad_bias)
        self.assertGreater(self.regions(), 0)

    def test_memory_of_an_answer_serves_again_when_no_array_lies_there(self):
        client = self.connect(True)
        client.create("bn", self.CHANNELS, mode="eval")
        first = client.forward("bn", self.x).output
        due = first.copy()
        part = first[2:3, 4]  # a view keeps it
        del first
        for _ in range(20):
            gc.collect()
            client.forward("bn", self.x * 2)
            numpy.testing.assert_array_equal(part, due[2:3, 4])
        self.assertLessEqual(self.regions(), 4)

    def test_an_array_made_in_it_is_read_there(self):
        client = self.connect(True)
        client.create("bn", self.CHANNELS, mode="eval")
        x = client.empty(self.x.shape)
        x[:] = self.x
        before = self.regions()
        output = client.forward("bn", x).output
        self.assertEqual(self.regions(), before + 1)  # the output's alone
        numpy.testing.assert_array_equal(output, self.connect(False).forward("bn", self.x).output)
        # What is computed from what, without a copy in between.
        numpy.testing.assert_array_equal(
            client.forward("bn", output).output,
            self.connect(False).forward("bn", output).output)

    def test_arrays_outlive_their_client(self):
        client = self.connect(True)
        client.create("bn", self.CHANNELS, mode="eval")
        output = client.forward("bn", self.x).output
        due = output.copy()
        client.close()
        del client
        gc.collect()
        numpy.testing.assert_array_equal(output, due)
        self.assertGreater(self.regions(), 0)

    def test_regions_go_with_the_client_and_its_arrays(self):
        client = normd.Client(self.server.address, shared_memory=True)
        client.create("bn", self.CHANNELS, mode="eval")
        client.forward("bn", self.x)
        self.assertGreater(self.regions(), 0)
        client.close()
        gc.collect()
        eventually(lambda: self.regions() == 0)

    def test_a_restarted_server_lends_anew(self):
        port = socket.socket()
        port.bind(("127.0.0.1", 0))
        address = "127.0.0.1:%d" % port.getsockname()[1]
        port.close()
        server = Server("--shared_memory=on", listen=address)
        self.addCleanup(server.close)
        server.start()
        client = normd.Client(address, shared_memory=True)
        self.addCleanup(client.close)
        client.create("bn", self.CHANNELS, mode="eval")
        due = client.forward("bn", self.x).output.copy()
        server.restart()
        numpy.testing.assert_array_equal(client.forward("bn", self.x).output, due)

    def test_without_it_messages_serve_unless_it_must_be(self):
        server = Server()
        self.addCleanup(server.close)
        server.start()
        client = normd.Client(server.address)
        self.addCleanup(client.close)
        client.create("bn", self.CHANNELS, mode="eval")
        self.assertEqual(client.forward("bn", self.x).output.shape, self.x.shape)
        self.assertEqual(client.empty((2, 3)).shape, (2, 3))
        must = normd.Client(server.address, shared_memory=True)
        self.addCleanup(must.close)
        for call in (lambda: must.forward("bn", self.x), lambda: must.empty(1000)):
            with self.assertRaises(normd.NormdError) as caught:
                call()
            self.assertEqual(caught.exception.code.name, "FAILED_PRECONDITION")
            self.assertIn("--shared_memory=on", caught.exception.message)


class SmallBudget(SharedMemory):
    """The same where only a few regions are lent."""

    FLAGS = SharedMemory.FLAGS + ("--max_regions=4",)

    def test_where_no_more_is_lent_messages_serve(self):
        client = self.connect()
        client.create("bn", self.CHANNELS, mode="eval")
        kept = [client.forward("bn", self.x).output for _ in range(8)]
        for output in kept[1:]:
            numpy.testing.assert_array_equal(output, kept[0])
        self.assertLessEqual(self.regions(), 4)


if __name__ == "__main__":
    unittest.main()
