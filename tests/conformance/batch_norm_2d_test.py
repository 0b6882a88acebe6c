"""normd's BatchNorm2d is torch.nn.BatchNorm2d: over a real socket, call by call.

Every call is judged from the state that the server itself reports before it:
the same state_dict is loaded into a torch module of the instance's type (the
peer) and into one of float64 (the exact answer), both make the same call, and
all three answers and the three states afterwards are compared.
"""

import itertools
import unittest

import grpc
import torch
from harness import layer as layers
from harness.errors import refused
from harness.judge import judge, largest, same_specials
from harness.layer import EVAL, TRAIN, Layer
from harness.seed import SEED, generator, torch_generator
from harness.server import ServerTestCase
from harness.tensors import from_proto
from normd.v1 import optimizer_pb2

SHAPES = [
    (0, 5, 2, 2), (2, 3, 0, 4), (1, 1, 1, 2), (2, 1, 1, 1), (1, 4, 1, 1), (1, 1, 1, 1),
    (3, 1, 5, 5), (2, 3, 1, 1), (4, 9, 1, 1), (2, 3, 6, 6), (8, 16, 32, 32), (3, 7, 11, 13),
    (1, 64, 7, 5), (5, 2, 17, 3), (2, 33, 4, 4), (16, 6, 1, 9), (7, 130, 3, 3), (1, 3, 64, 61),
]
DTYPES = [torch.float32, torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16]
MOMENTA = [0.0, 0.1, 0.3, 1.0, None, -1.2]
EPS = [1e-5, 1e-3, 0.0]

# affine x track_running_stats x momentum x channels_last, eight times with other
# shapes, types and eps.
CASES = list(itertools.product([True, False], [True, False], MOMENTA, [False, True], range(8)))
ONE_VALUE = "Expected more than 1 value per channel when training"


def relayout(x, channels_last):
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


class Sequence:
    """A random walk of calls on one instance, each judged."""

    def __init__(self, test, case, index):
        self.test = test
        affine, track, momentum, self.channels_last, _ = case
        self.rng = generator(index)
        self.torch_rng = torch_generator(self.rng)
        # Every shape comes round, whatever the seed.
        self.shape = SHAPES[(index * 7 + index // len(SHAPES)) % len(SHAPES)]
        self.dtype = DTYPES[(index + index // len(DTYPES)) % len(DTYPES)]
        self.arguments = dict(eps=EPS[self.rng.randrange(3)], momentum=momentum, affine=affine,
                              track_running_stats=track)
        self.state_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.mode = TRAIN
        self.done = []
        self.layer = Layer.create(test.stub, f"sequence/{SEED}/{index}", self.shape[1],
                                  dtype=self.state_dtype, **self.arguments)

    def __str__(self):
        return (f"shape {self.shape}, {self.dtype}, channels_last={self.channels_last}, "
                f"{self.arguments}, calls {self.done}")

    # --- material ---

    def randn(self, *shape):
        return torch.randn(shape, generator=self.torch_rng, dtype=torch.float64)

    def batch(self):
        """A batch with another offset and deviation in each channel."""
        n, c, h, w = self.shape
        h_w = (h, w)
        n = n if n == 0 else max(1, n + self.rng.choice([-1, 0, 0, 1]))
        offset, deviation = self.randn(c, 1, 1) * 3, self.randn(c, 1, 1).abs() + 0.1
        return (self.randn(n, c, *h_w) * deviation + offset).to(self.dtype)

    def twin(self, dtype):
        """The torch module in the server's own state."""
        module = torch.nn.BatchNorm2d(self.shape[1], dtype=dtype, **self.arguments)
        module.load_state_dict({key: value if value.dtype == torch.int64 else value.to(dtype)
                                for key, value in self.layer.state_dict().items()}, strict=True)
        return module.train(self.mode == TRAIN)

    def twins(self):
        """The peer computes in the type of the state: PyTorch's CPU has no float16 batch norm."""
        peer = self.twin(self.state_dtype)
        exact = self.twin(torch.float64)
        return peer, exact

    # --- judging ---

    def judge(self, what, got, exact, peer, scale, tolerance):
        judge(self.test, f"{what} of {self}", got, exact, scale, peer, tolerance)

    def judge_state(self, before, peer, exact, x):
        """The server's state after a call against the twins' after the same call."""
        got, peer, exact = self.layer.state_dict(), peer.state_dict(), exact.state_dict()
        self.test.assertEqual(set(got), set(exact), str(self))
        for key in got:
            if key == "num_batches_tracked":
                self.test.assertEqual(got[key].item(), exact[key].item(), f"{key} of {self}")
                continue
            scale = max(largest(before[key]), largest(exact[key]))
            if key.startswith("running_"):
                # What the new value is made of: (1 - m) * old + m * batch.
                m = self.arguments["momentum"]
                m = 1 / max(1, exact["num_batches_tracked"].item()) if m is None else m
                old = (1 - m) * before[key].double()
                scale = max(scale, largest(old), largest(exact[key] - old))
            if key == "running_mean":
                # The sum that the mean is made of.
                scale = max(scale, largest(x))
            judge(self.test, f"{key} of {self}", got[key], exact[key], scale, peer[key], 1e-6)

    # --- calls ---

    def run(self):
        if self.rng.random() < 0.8:
            self.set_state()
        calls = ["forward"] * 3 + ["backward"] * 3 + ["backward_without_context"] * 2 + [
            "switch_mode", "switch_mode", "step", "reset_running_stats", "zero_grad", "override"]
        for call in ["backward", *self.rng.choices(calls, k=self.rng.randrange(4, 8))]:
            self.done.append(call)
            getattr(self, call)()
        self.layer.delete()

    def set_state(self):
        state = self.layer.state_dict()
        for key, value in state.items():
            if key == "num_batches_tracked":
                state[key] = torch.tensor(self.rng.randrange(5))
            elif key == "running_var":
                state[key] = (self.randn(*value.shape).abs() + 0.1).to(value.dtype)
            else:
                state[key] = self.randn(*value.shape).to(value.dtype)
        self.layer.load_state_dict(state)
        got = self.layer.state_dict()
        for key, value in state.items():
            self.test.assertTrue(torch.equal(got[key], value), f"{key} of {self}")

    def switch_mode(self):
        self.mode = EVAL if self.mode == TRAIN else TRAIN
        self.layer.eval() if self.mode == EVAL else self.layer.train()
        self.test.assertEqual(self.layer.info().mode, self.mode)

    def override(self):
        """A forward in the other mode, by the request's own field; the instance keeps its."""
        own = self.mode
        self.mode = EVAL if own == TRAIN else TRAIN
        self.forward(mode=self.mode)
        self.mode = own
        self.test.assertEqual(self.layer.info().mode, own)

    def by_batch(self):
        """Whether the batch's own statistics serve."""
        return self.mode == TRAIN or not self.arguments["track_running_stats"]

    def refuses_single_value(self, x):
        """PyTorch refuses one value a channel; so do we, and nothing changes."""
        if not self.by_batch() or x.numel() // max(1, x.shape[1]) != 1:
            return False
        version = self.layer.info().version
        with self.test.assertRaisesRegex(ValueError, ONE_VALUE):
            self.twin(torch.float64)(x.double())
        with refused(self.test, grpc.StatusCode.FAILED_PRECONDITION, message=ONE_VALUE):
            self.layer.forward(x, self.channels_last, mode=self.mode)
        self.test.assertEqual(self.layer.info().version, version)
        return True

    def forward(self, mode=None, save=False, statistics=False):
        x = self.batch()
        if self.refuses_single_value(x):
            return None
        before = self.layer.state_dict()
        peer, exact = self.twins()
        version = self.layer.info().version
        answer = self.layer.forward(x, self.channels_last, save=save, statistics=statistics,
                                    mode=mode)
        x_peer = relayout(x.clone().to(self.state_dtype), self.channels_last).requires_grad_()
        x_exact = x.clone().double().requires_grad_()
        y_peer, y_exact = peer(x_peer), exact(x_exact)

        got = from_proto(answer.output)
        self.test.assertEqual(got.dtype, x.dtype)
        self.test.assertEqual(answer.output.memory_format, 2 if self.channels_last else 1)
        # A value that is the mean is 0 but for float64's own last bits: it is judged by the
        # scale of what is normalized, which is the weight.
        scale = max(largest(y_exact), largest(exact.bias),
                    largest(exact.weight) if exact.affine else 1.0)
        self.judge("output", got, y_exact.detach(), y_peer.detach(), scale, 1e-5)
        self.judge_state(before, peer, exact, x)
        changes = self.mode == TRAIN and self.arguments["track_running_stats"]
        if changes:
            self.test.assertEqual(answer.version, version + 1, str(self))
            self.test.assertEqual(answer.num_batches_tracked, peer.num_batches_tracked.item())
        self.test.assertEqual(answer.mode, self.mode)
        self.test.assertEqual(answer.version, self.layer.info().version)
        if statistics:
            self.judge_statistics(answer, x)
        return x, peer, exact, x_peer, x_exact, y_peer, y_exact, answer

    def judge_statistics(self, answer, x):
        statistics = answer.batch_statistics
        if not self.by_batch():
            self.test.assertFalse(answer.HasField("batch_statistics"))
            return
        self.test.assertEqual(statistics.count, x.numel() // x.shape[1])
        if x.numel():
            mean = x.double().mean((0, 2, 3))
            var = x.double().var((0, 2, 3), unbiased=False)
            for got, exact in ((statistics.mean, mean), (statistics.var, var)):
                got = torch.tensor(list(got), dtype=torch.float64)
                self.test.assertTrue(torch.allclose(got, exact, rtol=1e-6, atol=1e-6 * largest(x)),
                                     f"statistics of {self}")

    def backward(self):
        self._backward(with_context=True)

    def backward_without_context(self):
        self._backward(with_context=False)

    def _backward(self, with_context):
        keep_statistics = self.rng.random() < 0.5
        made = self.forward(save=with_context, statistics=not with_context)
        if made is None:
            return
        x, peer, exact, x_peer, x_exact, y_peer, y_exact, answer = made
        n, c, h, w = x.shape
        grad = (self.randn(n, c, h, w) + self.randn(c, 1, 1)).to(self.dtype)
        y_peer.backward(relayout(grad.to(self.state_dtype), self.channels_last))
        y_exact.backward(grad.double())

        accumulate = self.rng.random() < 0.6
        kept = self.layer.gradients()
        if with_context:
            got = self.layer.backward(grad, answer.context_id, channels_last=self.channels_last,
                                      accumulate=accumulate)
        else:
            statistics = answer.batch_statistics if keep_statistics and self.by_batch() else None
            got = self.layer.backward(grad, x=x, channels_last=self.channels_last,
                                      accumulate=accumulate, batch_statistics=statistics)

        # What the gradients are summed from is what their rounding is relative to.
        with torch.no_grad():
            if self.by_batch():
                mean, var = (x_exact.mean((0, 2, 3)), x_exact.var((0, 2, 3), unbiased=False))
            else:
                mean, var = exact.running_mean, exact.running_var
            invstd = (var + self.arguments["eps"]).rsqrt().view(-1, 1, 1)
            normalized = (x_exact - mean.view(-1, 1, 1)) * invstd
            weight = exact.weight.view(-1, 1, 1) if exact.affine else 1.0
            terms = grad.double() * weight * invstd

        self.judge("grad_input", from_proto(got.grad_input), x_exact.grad, x_peer.grad,
                   max(largest(x_exact.grad), largest(terms)), 1e-4)
        sums = {}
        if exact.affine:
            for key, each in (("weight", grad.double() * normalized), ("bias", grad.double())):
                sums[key] = from_proto(getattr(got, f"grad_{key}"))
                exact_grad = getattr(exact, key).grad
                # A sum's natural scale, and what the last bits of the mean make of it.
                scale = max(largest(exact_grad), largest((each**2).sum((0, 2, 3)).sqrt()),
                            0.3 * largest(grad.double().sum((0, 2, 3))))
                self.test.assertEqual(sums[key].dtype, self.state_dtype)
                self.judge(f"grad_{key}", sums[key], exact_grad, getattr(peer, key).grad, scale,
                           1e-4)
        else:
            self.test.assertFalse(got.HasField("grad_weight") or got.HasField("grad_bias"))

        after = self.layer.gradients()
        if accumulate and exact.affine:
            self.test.assertEqual(got.version, answer.version + 1)
            for key in sums:
                due = sums[key].double() + (kept[key].double() if key in kept else 0)
                self.test.assertTrue(torch.allclose(after[key].double(), due, rtol=1e-6, atol=1e-30,
                                                    equal_nan=True), f"gradient {key} of {self}")
        else:
            self.test.assertEqual(set(after), set(kept), str(self))
            for key in after:
                self.test.assertTrue(torch.equal(after[key], kept[key]) or
                                     after[key].isnan().any(), str(self))

    def zero_grad(self):
        to_none = self.rng.random() < 0.5
        had = self.layer.gradients()
        self.layer.zero_grad(set_to_none=to_none)
        got = self.layer.gradients()
        self.test.assertEqual(set(got), set() if to_none else set(had))
        self.test.assertEqual(sum(largest(value) for value in got.values()), 0)

    def step(self):
        optimizer = optimizer_pb2.Optimizer(sgd=optimizer_pb2.Sgd(lr=0.1, weight_decay=0.01))
        if not self.arguments["affine"]:
            with refused(self.test, grpc.StatusCode.FAILED_PRECONDITION):
                self.layer.step(optimizer)
            return
        gradients = self.layer.gradients()
        before = self.layer.state_dict()
        peer, exact = self.twins()
        for module in (peer, exact):
            for key, value in gradients.items():
                getattr(module, key).grad = value.to(getattr(module, key).dtype)
            torch.optim.SGD(module.parameters(), lr=0.1, weight_decay=0.01).step()
        answer = self.layer.step(optimizer)
        self.test.assertEqual(answer.stepped, bool(gradients))
        for key, value in gradients.items():
            before[key] = torch.cat([before[key], value])  # for the scale alone
        self.judge_state(before, peer, exact, torch.zeros(1))

    def reset_running_stats(self):
        peer, exact = self.twins()
        before = self.layer.state_dict()
        for module in (peer, exact):
            module.reset_running_stats()
        self.test.stub.ResetRunningStats(
            layers.rpc.ResetRunningStatsRequest(name=self.layer.name))
        self.judge_state(before, peer, exact, torch.zeros(1))


class RandomSequences(ServerTestCase):
    def test_every_call_of_384_random_sequences_is_pytorchs(self):
        self.assertGreaterEqual(len(CASES), 300)
        for index, case in enumerate(CASES):
            sequence = Sequence(self, case, index)
            with self.subTest(NORMD_SEED=SEED, index=index):
                try:
                    sequence.run()
                except grpc.RpcError as error:
                    self.fail(f"{error.code()}: {error.details()} in {sequence}")


class CornerCases(ServerTestCase):
    def layer(self, num_features, **arguments):
        return Layer.create(self.stub, f"{self._testMethodName}/{layers.request_id()}",
                            num_features, **arguments)

    def test_cumulative_average_is_the_plain_mean_of_the_batches(self):
        layer = self.layer(3, momentum=None)
        rng = torch_generator(generator(self.id()))
        batches = [torch.randn(4, 3, 5, 5, generator=rng) + k for k in range(7)]
        for x in batches:
            layer.forward(x)
        state = layer.state_dict()
        mean = torch.stack([x.double().mean((0, 2, 3)) for x in batches]).mean(0)
        var = torch.stack([x.double().var((0, 2, 3)) for x in batches]).mean(0)
        self.assertLess((state["running_mean"] - mean).abs().max().item(), 5e-6)
        self.assertLess((state["running_var"] - var).abs().max().item(), 5e-6)

    def test_an_empty_batch_is_counted_and_leaves_the_statistics_alone(self):
        for shape in [(0, 5, 2, 2), (3, 5, 0, 2), (0, 5, 0, 0)]:
            for momentum in (0.1, None):
                with self.subTest(shape=shape, momentum=momentum):
                    layer = self.layer(5, momentum=momentum)
                    layer.forward(torch.randn(2, 5, 3, 3))
                    before = layer.state_dict()
                    answer = layer.forward(torch.zeros(shape), save=True)
                    self.assertEqual(list(answer.output.shape), list(shape))
                    self.assertEqual(answer.output.data, b"")
                    self.assertEqual(answer.num_batches_tracked, 2)
                    after = layer.state_dict()
                    self.assertTrue(torch.equal(after["running_mean"], before["running_mean"]))
                    self.assertTrue(torch.equal(after["running_var"], before["running_var"]))
                    back = layer.backward(torch.zeros(shape), answer.context_id)
                    self.assertEqual(largest(from_proto(back.grad_weight)), 0)
                    self.assertEqual(largest(from_proto(back.grad_bias)), 0)

    def test_nan_and_infinity_pass_through_as_in_pytorch(self):
        for channels_last in (False, True):
            for mode, special in itertools.product(
                    (TRAIN, EVAL), (float("nan"), float("inf"), float("-inf"))):
                with self.subTest(channels_last=channels_last, mode=mode, special=special):
                    layer = self.layer(4)
                    module = torch.nn.BatchNorm2d(4)
                    module.train(mode == TRAIN)
                    with torch.no_grad():
                        module.weight.copy_(torch.tensor([1.0, -2.0, 0.0, 3.0]))
                    layer.load_state_dict(module.state_dict())
                    x = torch.randn(3, 4, 6, 6)
                    x[1, 0, 2, 3] = special
                    x[0, 1, 0, 0] = special
                    x[2, 2, 5, 5] = special
                    got = layer.forward(x, channels_last, save=True, mode=mode)
                    x_peer = x.clone().requires_grad_()
                    due = module(x_peer)
                    same_specials(self, from_proto(got.output), due.detach(), "output")
                    state = layer.state_dict()
                    for key in ("running_mean", "running_var"):
                        same_specials(self, state[key], module.state_dict()[key], key)
                    finite = torch.isfinite(due)
                    self.assertTrue(torch.allclose(from_proto(got.output)[finite], due[finite],
                                                   rtol=1e-5, atol=1e-5))
                    grad = torch.randn(3, 4, 6, 6)
                    due.backward(grad)
                    back = layer.backward(grad, got.context_id, channels_last=channels_last)
                    same_specials(self, from_proto(back.grad_input), x_peer.grad, "grad_input")
                    same_specials(self, from_proto(back.grad_weight), module.weight.grad,
                                  "grad_weight")
                    same_specials(self, from_proto(back.grad_bias), module.bias.grad, "grad_bias")

    def test_one_value_per_channel_is_refused_in_train_with_pytorchs_reason(self):
        for channels in (1, 7):
            layer = self.layer(channels)
            x = torch.randn(1, channels, 1, 1)
            with refused(self, grpc.StatusCode.FAILED_PRECONDITION, message=ONE_VALUE):
                layer.forward(x)
            self.assertEqual(layer.info().version, 1)
            self.assertEqual(layer.state_dict()["num_batches_tracked"].item(), 0)
            y = layer(x, mode=EVAL)
            self.assertLess((y - x / (1 + 1e-5)**0.5).abs().max().item(), 1e-6)

    def test_one_value_per_channel_is_refused_in_eval_without_running_statistics(self):
        layer = self.layer(3, track_running_stats=False)
        with refused(self, grpc.StatusCode.FAILED_PRECONDITION, message=ONE_VALUE):
            layer.forward(torch.randn(1, 3, 1, 1), mode=EVAL)

    def test_wrong_channels_and_dimensions_name_both_numbers(self):
        layer = self.layer(6)
        with refused(self, grpc.StatusCode.INVALID_ARGUMENT, "input.shape") as refusal:
            layer.forward(torch.randn(2, 5, 3, 3))
        self.assertRegex(refusal.error.details(), r"\b6\b")
        self.assertRegex(refusal.error.details(), r"\b5\b")
        with refused(self, grpc.StatusCode.INVALID_ARGUMENT, "input.shape") as refusal:
            layer.forward(torch.randn(2, 6, 3))
        self.assertRegex(refusal.error.details(), r"\b4\b|\b4D\b")
        self.assertRegex(refusal.error.details(), r"\b3\b|\b3D\b")

    def test_constant_input_gives_the_bias(self):
        layer = self.layer(2)
        layer.load_state_dict({**layer.state_dict(), "bias": torch.tensor([0.5, -3.0])})
        y = layer(torch.full((4, 2, 3, 3), 7.25))
        self.assertTrue(torch.equal(y[:, 0], torch.full((4, 3, 3), 0.5)))
        self.assertTrue(torch.equal(y[:, 1], torch.full((4, 3, 3), -3.0)))

    def test_constant_input_without_eps_is_pytorchs(self):
        for shape in ((4, 2, 3, 3), (4, 2, 1, 1), (1, 2, 40, 40)):
            for channels_last in (False, True):
                layer = self.layer(2, eps=0.0)
                module = torch.nn.BatchNorm2d(2, eps=0.0)
                with torch.no_grad():
                    module.bias.copy_(torch.tensor([0.5, -3.0]))
                layer.load_state_dict(module.state_dict())
                x = torch.full(shape, 7.25).requires_grad_()
                grad = torch.randn(shape)
                due = module(x)
                due.backward(grad)
                answer = layer.forward(x, channels_last, save=True)
                self.assertTrue(torch.equal(from_proto(answer.output), due.detach()))
                back = layer.backward(grad, answer.context_id, channels_last=channels_last)
                self.assertTrue(torch.equal(from_proto(back.grad_input), x.grad))
                self.assertTrue(torch.equal(from_proto(back.grad_weight), module.weight.grad))

    def test_float16_and_bfloat16_share_a_float32_instance(self):
        layer = self.layer(3)
        for count, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16), 1):
            y = layer(torch.randn(2, 3, 4, 4).to(dtype))
            self.assertEqual(y.dtype, dtype)
            self.assertEqual(layer.info().num_batches_tracked, count)

    def test_a_context_keeps_the_weight_of_its_forward(self):
        layer = self.layer(3)
        x, grad = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
        context = layer.forward(x, save=True).context_id
        module = torch.nn.BatchNorm2d(3).double()
        x64 = x.double().requires_grad_()
        module(x64).backward(grad.double())
        layer.load_state_dict({**layer.state_dict(), "weight": torch.full((3,), 100.0)})
        got = from_proto(layer.backward(grad, context).grad_input)
        self.assertLess((got - x64.grad).abs().max().item(), 1e-5)

    def test_reset_parameters_is_pytorchs(self):
        layer = self.layer(3)
        layer.forward(torch.randn(4, 3, 5, 5) * 3)
        layer.load_state_dict({**layer.state_dict(), "weight": torch.full((3,), 2.0),
                               "bias": torch.full((3,), 2.0)})
        self.stub.ResetParameters(layers.rpc.ResetParametersRequest(name=layer.name))
        module = torch.nn.BatchNorm2d(3)
        for key, value in layer.state_dict().items():
            self.assertTrue(torch.equal(value, module.state_dict()[key]), key)

    def test_state_dict_of_another_float_type_is_converted(self):
        layer = self.layer(3)
        module = torch.nn.BatchNorm2d(3).double()
        with torch.no_grad():
            module.weight.copy_(torch.tensor([0.1, 1e-3, 3.0]))
        layer.load_state_dict(module.state_dict())
        self.assertEqual(layer.state_dict()["weight"].dtype, torch.float32)
        self.assertTrue(torch.equal(layer.state_dict()["weight"], module.weight.detach().float()))

    def test_a_negative_running_var_that_momentum_made_gives_nan_as_in_pytorch(self):
        layer = self.layer(2, momentum=-1.2)
        module = torch.nn.BatchNorm2d(2, momentum=-1.2)
        x = torch.randn(8, 2, 6, 6) * 5
        layer.forward(x)
        module(x)
        self.assertLess(layer.state_dict()["running_var"].max().item(), 0)
        due = module.eval()(x).detach()
        self.assertTrue(due.isnan().all())
        same_specials(self, layer(x, mode=EVAL), due, "output")


class Exactness(ServerTestCase):
    """Where |mean| >> deviation PyTorch loses the answer; float64 is the judge."""

    SOURCES = {
        "1e6 + randn": lambda r: 1e6 + r,
        "1e4 + 1e-2 randn": lambda r: 1e4 + 1e-2 * r,
        "100 + 1e-3 randn": lambda r: 100 + 1e-3 * r,
        "-1e6 + randn": lambda r: -1e6 + r,
    }
    SHAPES = [(8, 16, 32, 32), (2, 128, 2, 2), (2, 1024, 2, 2), (4, 3, 7, 5), (16, 5, 1, 1),
              (1, 2, 200, 200)]

    def cases(self):
        rng = torch_generator(generator(self.id()))
        for (name, source), shape, channels_last in itertools.product(
                self.SOURCES.items(), self.SHAPES, (False, True)):
            x = source(torch.randn(shape, generator=rng, dtype=torch.float64)).float()
            grad = torch.randn(shape, generator=rng)
            layer = Layer.create(self.stub, f"exact/{layers.request_id()}", shape[1])
            with self.subTest(NORMD_SEED=SEED, source=name, shape=shape,
                              channels_last=channels_last):
                yield layer, x, grad, channels_last
            layer.delete()

    def test_train_forward_and_backward_are_right_to_1e_5(self):
        for layer, x, grad, channels_last in self.cases():
            module = torch.nn.BatchNorm2d(x.shape[1]).double()
            x64 = x.double().requires_grad_()
            y64 = module(x64)
            y64.backward(grad.double())
            answer = layer.forward(x, channels_last, save=True, statistics=True)
            y = from_proto(answer.output)
            self.assertLessEqual((y - y64).abs().max().item(), 1e-5)

            deviation = x.double().std((0, 2, 3), unbiased=False)
            mean = torch.tensor(list(answer.batch_statistics.mean), dtype=torch.float64)
            var = torch.tensor(list(answer.batch_statistics.var), dtype=torch.float64)
            self.assertLessEqual(((mean - x.double().mean((0, 2, 3))) / deviation).abs().max(), 1e-6)
            self.assertLessEqual((var / deviation**2 - 1).abs().max(), 1e-5)

            terms = max(1.0, largest(grad.double() / deviation.view(-1, 1, 1)))
            for back in (layer.backward(grad, answer.context_id, channels_last=channels_last),
                         layer.backward(grad, x=x, channels_last=channels_last),
                         layer.backward(grad, x=x, channels_last=channels_last,
                                        batch_statistics=answer.batch_statistics)):
                self.assertLessEqual((from_proto(back.grad_input) - x64.grad).abs().max().item(),
                                     1e-5 * terms)
                count = x.numel() / x.shape[1]
                for key in ("weight", "bias"):
                    got = from_proto(getattr(back, f"grad_{key}"))
                    due = getattr(module, key).grad
                    self.assertLessEqual((got - due).abs().max().item(),
                                         1e-5 * max(count**0.5, largest(due)))

    def test_running_statistics_round_only_where_they_are_stored(self):
        for layer, x, _, channels_last in self.cases():
            layer.forward(x, channels_last)
            state = layer.state_dict()
            mean, var = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3))
            for key, due in (("running_mean", 0.1 * mean), ("running_var", 0.9 + 0.1 * var)):
                self.assertLessEqual((state[key] / due - 1).abs().max().item(), 2e-7, key)

    def test_eval_is_right_from_the_stored_statistics(self):
        for layer, x, _, channels_last in self.cases():
            state = layer.state_dict()
            state["running_mean"] = x.double().mean((0, 2, 3)).float()
            state["running_var"] = x.double().var((0, 2, 3)).float()
            layer.load_state_dict(state)
            y64 = ((x.double() - state["running_mean"].double().view(-1, 1, 1)) /
                   (state["running_var"].double() + 1e-5).sqrt().view(-1, 1, 1))
            y = layer(x, channels_last=channels_last, mode=EVAL)
            self.assertLessEqual((y - y64).abs().max().item(), 1e-6 * max(1.0, largest(y64)))


if __name__ == "__main__":
    unittest.main()
