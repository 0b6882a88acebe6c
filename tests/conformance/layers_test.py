"""Every layer is torch's: over a real socket, in random sequences of calls.

As in batch_norm_2d_test, each call is judged from the state that the server reports
before it: a torch module of the instance's type and one of float64 are loaded with
it and make the same call. torch 1.13 has no RMSNorm, so the test has the formula.
"""

import random
import unittest

import grpc
import torch
from harness import layer as layers
from harness.errors import refused
from harness.judge import judge, largest
from harness.layer import EVAL, TRAIN, Layer
from harness.seed import SEED, generator, torch_generator
from harness.server import ServerTestCase
from harness.tensors import from_proto, to_proto
from harness.torch_layer import RMSNorm
from normd.v1 import instance_pb2, norm_service_pb2 as rpc, tensor_pb2

CASES_A_LAYER = 160
DTYPES = [torch.float32, torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16]
EPS = [1e-5, 1e-3]
RELU = rpc.ACTIVATION_RELU


def shape_of(rng, *sizes):
    return tuple(rng.choice(choices) for choices in sizes)


SIZES, CHANNELS = (1, 2, 3, 5, 8, 17), (1, 2, 3, 4, 6, 8, 16, 33)


def batch_norm(dimensions, message, torch_class, sizes):
    def draw(rng):
        affine, track = rng.random() < 0.7, rng.random() < 0.7
        momentum = rng.choice([0.0, 0.1, 0.3, 1.0, None, -1.2])
        shape = shape_of(rng, (1, 2, 3, 4, 7), CHANNELS, *rng.choice(sizes))
        arguments = dict(eps=rng.choice(EPS), affine=affine, track_running_stats=track)
        config = message(num_features=shape[1], **arguments)
        if momentum is None:
            config.cumulative_average = True
        else:
            config.momentum = momentum
        return ({dimensions: config}, shape,
                lambda dtype: torch_class(shape[1], momentum=momentum, dtype=dtype, **arguments))
    return draw


def layer_norm(rng):
    normalized = shape_of(rng, *[SIZES] * rng.choice([1, 1, 2, 3]))
    shape = shape_of(rng, *[(1, 2, 3, 5)] * rng.choice([0, 1, 1, 2])) + normalized
    eps, affine, bias = rng.choice(EPS), rng.random() < 0.7, rng.random() < 0.7
    config = instance_pb2.LayerNorm(normalized_shape=normalized, eps=eps,
                                    elementwise_affine=affine, bias=bias)

    def module(dtype):
        peer = torch.nn.LayerNorm(normalized, eps=eps, elementwise_affine=affine, dtype=dtype)
        if affine and not bias:
            peer.bias = None
        return peer
    return {"layer_norm": config}, shape, module


def rms_norm(rng):
    normalized = shape_of(rng, *[SIZES] * rng.choice([1, 1, 2]))
    shape = shape_of(rng, *[(1, 2, 3, 5)] * rng.choice([0, 1, 2])) + normalized
    eps, affine = rng.choice([None, 1e-5, 1e-3]), rng.random() < 0.7
    config = instance_pb2.RmsNorm(normalized_shape=normalized, eps=eps, elementwise_affine=affine)
    return ({"rms_norm": config}, shape,
            lambda dtype: RMSNorm(normalized, eps=eps, elementwise_affine=affine, dtype=dtype))


def group_norm(rng):
    groups = rng.choice([1, 2, 3, 4, 8])
    channels = groups * rng.choice([1, 2, 3, 5])
    shape = shape_of(rng, (1, 2, 3), (channels,), *[SIZES] * rng.choice([0, 1, 2, 2, 3]))
    eps, affine = rng.choice(EPS), rng.random() < 0.7
    config = instance_pb2.GroupNorm(num_groups=groups, num_channels=channels, eps=eps, affine=affine)
    return ({"group_norm": config}, shape,
            lambda dtype: torch.nn.GroupNorm(groups, channels, eps=eps, affine=affine, dtype=dtype))


def instance_norm(rng):
    shape = shape_of(rng, (1, 2, 3, 5), CHANNELS, SIZES, SIZES)
    if rng.random() < 0.2:
        shape = shape[1:]
    arguments = dict(eps=rng.choice(EPS), momentum=rng.choice([0.0, 0.1, 0.5, 1.0]),
                     affine=rng.random() < 0.5, track_running_stats=rng.random() < 0.5)
    config = instance_pb2.InstanceNorm2d(num_features=shape[-3], **arguments)
    return ({"instance_norm_2d": config}, shape,
            lambda dtype: torch.nn.InstanceNorm2d(shape[-3], dtype=dtype, **arguments))


LAYERS = {
    "BatchNorm1d": batch_norm("batch_norm_1d", instance_pb2.BatchNorm1d, torch.nn.BatchNorm1d,
                              [(), (SIZES,)]),
    "BatchNorm2d": batch_norm("batch_norm_2d", instance_pb2.BatchNorm2d, torch.nn.BatchNorm2d,
                              [(SIZES, SIZES)]),
    "BatchNorm3d": batch_norm("batch_norm_3d", instance_pb2.BatchNorm3d, torch.nn.BatchNorm3d,
                              [((1, 2, 3), (1, 2, 5), (1, 3, 4))]),
    "LayerNorm": layer_norm,
    "GroupNorm": group_norm,
    "InstanceNorm2d": instance_norm,
    "RMSNorm": rms_norm,
}


class Sequence:
    """A few calls on one instance, each judged."""

    def __init__(self, test, kind, index):
        self.test, self.kind = test, kind
        self.rng = generator(f"{kind}/{index}")
        self.torch_rng = torch_generator(self.rng)
        config, self.shape, self.module = LAYERS[kind](self.rng)
        self.dtype = DTYPES[index % len(DTYPES)]
        self.state_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.config = config
        self.channels_last = (kind in ("BatchNorm2d", "BatchNorm3d", "GroupNorm", "InstanceNorm2d")
                              and len(self.shape) >= 4 and self.rng.random() < 0.4)
        name = f"layers/{SEED}/{kind}/{index}"
        test.stub.CreateInstance(rpc.CreateInstanceRequest(
            name=name, config=instance_pb2.InstanceConfig(
                state_dtype=(tensor_pb2.DATA_TYPE_FLOAT64 if self.dtype == torch.float64
                             else tensor_pb2.DATA_TYPE_FLOAT32), **config)))
        self.layer = Layer(test.stub, name)
        self.mode = TRAIN

    def __str__(self):
        return (f"{self.kind} of {str(self.config).split()}, shape {self.shape}, {self.dtype}, "
                f"channels_last={self.channels_last}")

    def randn(self, *shape):
        return torch.randn(shape, generator=self.torch_rng, dtype=torch.float64)

    def twin(self, dtype):
        module = self.module(dtype)
        if isinstance(module, RMSNorm):
            module.input_dtype = self.dtype
        module.load_state_dict({key: value if value.dtype == torch.int64 else value.to(dtype)
                                for key, value in self.layer.state_dict().items()}, strict=True)
        return module.train(self.mode == TRAIN)

    def scatter_parameters(self):
        """Other weights than 1 and other biases than 0."""
        state = {key: value if value.dtype == torch.int64 or key.startswith("running")
                 else self.randn(*value.shape).to(value.dtype)
                 for key, value in self.layer.state_dict().items()}
        if state:
            self.layer.load_state_dict(state)

    def judge(self, what, got, exact, peer, scale, tolerance=1e-4):
        judge(self.test, f"{what} of {self}", got, exact, scale, peer, tolerance)

    def run(self):
        self.scatter_parameters()
        for _ in range(self.rng.choice([2, 3])):
            if self.rng.random() < 0.3:
                self.mode = TRAIN if self.mode == EVAL else EVAL
                self.layer.train() if self.mode == TRAIN else self.layer.eval()
            self.step()

    def step(self):
        x = (self.randn(*self.shape) * 2 + self.randn(1) * 3).to(self.dtype)
        fused = self.rng.random() < 0.3
        residual = self.randn(*self.shape).to(self.dtype) if fused and self.rng.random() < 0.7 else None
        fields = {}
        if fused:
            fields["activation"] = RELU
        if residual is not None:
            fields["residual"] = to_proto(residual, self.channels_last)

        peer, exact = self.twin(self.state_dtype), self.twin(torch.float64)
        inputs = {}
        outputs = {}
        refusal = None
        for name, module, dtype in (("peer", peer, self.state_dtype),
                                    ("exact", exact, torch.float64)):
            at = x.to(dtype, copy=True).requires_grad_()
            shortcut = residual.to(dtype, copy=True).requires_grad_() if residual is not None else None
            try:
                y = module(at)
            except ValueError as error:
                refusal = str(error)
                continue
            if shortcut is not None:
                y = y + shortcut
            inputs[name] = (at, shortcut)
            before = y.detach()  # float64's in the end
            outputs[name] = torch.relu(y) if fused else y
        if refusal is not None:
            version = self.layer.info().version
            with refused(self.test, grpc.StatusCode.FAILED_PRECONDITION,
                         message=refusal.split(", got")[0]):
                self.layer.forward(x, channels_last=self.channels_last)
            self.test.assertEqual(self.layer.info().version, version)
            return

        answer = self.layer.forward(x, channels_last=self.channels_last, save=True, **fields)
        y = outputs["exact"].detach()
        got = from_proto(answer.output)
        self.test.assertEqual(got.dtype, self.dtype)
        with torch.no_grad():
            # What the output is summed from.
            weight = getattr(exact, "weight", None)
            scale = max(largest(y), largest(weight) if weight is not None else 1.0, 1.0)
        self.judge("output", got, y, outputs["peer"].detach(), scale, 1e-5)

        grad = self.randn(*self.shape).to(self.dtype)
        # Where rounding decides on which side of 0 a value falls, gradients may differ.
        if fused:
            grad = grad.masked_fill(before.abs() < 1e-2 * scale, 0)
        for name, dtype in (("peer", self.state_dtype), ("exact", torch.float64)):
            outputs[name].backward(grad.to(dtype))
        back = self.layer.backward(grad, answer.context_id, channels_last=self.channels_last)
        x_exact, r_exact = inputs["exact"]
        x_peer, r_peer = inputs["peer"]
        terms = largest(grad) * max(largest(getattr(exact, "weight", None)), 1.0)
        scale = max(largest(x_exact.grad), terms * self.invstd(x, exact), 1e-3)
        self.judge("grad_input", from_proto(back.grad_input), x_exact.grad, x_peer.grad, scale)
        if residual is not None:
            self.judge("grad_residual", from_proto(back.grad_residual), r_exact.grad, r_peer.grad,
                       max(largest(grad), 1e-3))
        for key in ("weight", "bias"):
            due = getattr(exact, key, None)
            has = back.HasField(f"grad_{key}")
            self.test.assertEqual(has, due is not None, f"grad_{key} of {self}")
            if has:
                got = from_proto(getattr(back, f"grad_{key}"))
                self.test.assertEqual(got.dtype, self.state_dtype)
                scale = max(largest(due.grad), largest(grad) * x.numel() ** 0.5 * 4, 1e-3)
                self.judge(f"grad_{key}", got, due.grad, getattr(peer, key).grad, scale)

        after = self.layer.state_dict()
        for key, value in exact.state_dict().items():
            if value.dtype == torch.int64:
                self.test.assertEqual(after[key].item(), value.item(), f"{key} of {self}")
            else:
                self.judge(key, after[key], value, peer.state_dict()[key],
                           max(largest(value), largest(x) ** 2 * 4 + 1), 1e-6)

    def invstd(self, x, module):
        """The largest factor that a gradient is multiplied with."""
        x = x.double()
        if self.mode == EVAL and getattr(module, "running_var", None) is not None:
            return (module.running_var + module.eps).rsqrt().max().item()
        if self.kind.startswith("Batch"):
            dims = tuple(d for d in range(x.dim()) if d != 1)
        elif self.kind == "InstanceNorm2d":
            dims = (-2, -1)
        elif self.kind == "GroupNorm":
            x = x.reshape(x.shape[0], module.num_groups, -1)
            dims = (-1,)
        else:
            shape = module.normalized_shape if self.kind == "LayerNorm" else module.shape
            dims = tuple(range(-len(shape), 0))
        if self.kind == "RMSNorm":
            square = x.pow(2).mean(dims)
            eps = torch.finfo(self.dtype).eps if module.eps is None else module.eps
        else:
            square, eps = x.var(dims, unbiased=False), module.eps
        return (square + eps).rsqrt().max().item() if square.numel() else 1.0


class RandomSequences(ServerTestCase):
    def run_layer(self, kind):
        for index in range(CASES_A_LAYER):
            sequence = Sequence(self, kind, index)
            with self.subTest(NORMD_SEED=SEED, index=index):
                try:
                    sequence.run()
                except grpc.RpcError as error:
                    self.fail(f"{error.code()}: {error.details()} in {sequence}")


for _kind in LAYERS:
    def _test(self, kind=_kind):
        self.run_layer(kind)
    setattr(RandomSequences, f"test_{CASES_A_LAYER}_sequences_of_{_kind}_are_pytorchs", _test)


class Exactness(ServerTestCase):
    """Where the mean is far larger than the deviation, float64 is the judge."""

    OFFSETS = [(1e4, 1e-2), (1e6, 1.0), (100.0, 1e-3)]

    def test_every_layer_is_right_to_1e_5(self):
        shape = (4, 8, 16, 16)
        configs = {
            "batch_norm_2d": (instance_pb2.BatchNorm2d(num_features=8), (0, 2, 3)),
            "layer_norm": (instance_pb2.LayerNorm(normalized_shape=shape[1:]), (1, 2, 3)),
            "instance_norm_2d": (instance_pb2.InstanceNorm2d(num_features=8), (2, 3)),
        }
        for offset, deviation in self.OFFSETS:
            x = torch.randn(shape) * deviation + offset
            exact = x.double()
            for kind, (config, dims) in configs.items():
                with self.subTest(kind=kind, offset=offset, deviation=deviation):
                    name = f"exact/{kind}/{offset}"
                    self.stub.CreateInstance(rpc.CreateInstanceRequest(
                        name=name, config=instance_pb2.InstanceConfig(**{kind: config})))
                    var, mean = torch.var_mean(exact, dims, unbiased=False, keepdim=True)
                    due = (exact - mean) / (var + 1e-5).sqrt()
                    got = Layer(self.stub, name)(x)
                    self.assertLessEqual((got.double() - due).abs().max().item(), 1e-5)
            groups = 4
            name = f"exact/group_norm/{offset}"
            self.stub.CreateInstance(rpc.CreateInstanceRequest(
                name=name, config=instance_pb2.InstanceConfig(
                    group_norm=instance_pb2.GroupNorm(num_groups=groups, num_channels=8))))
            rows = exact.reshape(4, groups, -1)
            var, mean = torch.var_mean(rows, -1, unbiased=False, keepdim=True)
            due = ((rows - mean) / (var + 1e-5).sqrt()).reshape(shape)
            self.assertLessEqual((Layer(self.stub, name)(x).double() - due).abs().max().item(), 1e-5)


class Refusals(ServerTestCase):
    def create(self, **config):
        name = layers.request_id()
        self.stub.CreateInstance(rpc.CreateInstanceRequest(
            name=name, config=instance_pb2.InstanceConfig(**config)))
        return Layer(self.stub, name)

    def test_configurations_that_pytorch_refuses(self):
        invalid = grpc.StatusCode.INVALID_ARGUMENT
        for config, reason in (
                (dict(group_norm=instance_pb2.GroupNorm(num_groups=3, num_channels=8)),
                 "must be divisible by num_groups"),
                (dict(group_norm=instance_pb2.GroupNorm(num_groups=0, num_channels=8)),
                 "config.group_norm.num_groups"),
                (dict(layer_norm=instance_pb2.LayerNorm()), "config.layer_norm.normalized_shape"),
                (dict(layer_norm=instance_pb2.LayerNorm(normalized_shape=[3, 0])),
                 "config.layer_norm.normalized_shape"),
                (dict(layer_norm=instance_pb2.LayerNorm(normalized_shape=[2] * 8)),
                 "config.layer_norm.normalized_shape"),
                (dict(rms_norm=instance_pb2.RmsNorm(normalized_shape=[3], eps=-1.0)),
                 "config.rms_norm.eps"),
                (dict(instance_norm_2d=instance_pb2.InstanceNorm2d(num_features=0)),
                 "config.instance_norm_2d.num_features"),
                (dict(batch_norm_1d=instance_pb2.BatchNorm1d(num_features=3, momentum=float("nan"))),
                 "config.batch_norm_1d.momentum")):
            with self.subTest(config=str(config)), refused(self, invalid, message=reason):
                self.create(**config)
        with refused(self, grpc.StatusCode.RESOURCE_EXHAUSTED, flag="--max_features"):
            self.create(layer_norm=instance_pb2.LayerNorm(normalized_shape=[2**30, 2**30, 2**30]))

    def test_inputs_that_pytorch_refuses(self):
        invalid = grpc.StatusCode.INVALID_ARGUMENT
        norm = self.create(layer_norm=instance_pb2.LayerNorm(normalized_shape=[3, 4]))
        with refused(self, invalid, message="expected input with shape [*, 3, 4]"):
            norm.forward(torch.zeros(2, 4))
        norm = self.create(batch_norm_1d=instance_pb2.BatchNorm1d(num_features=3))
        with refused(self, invalid, message="expected 2D or 3D input (got 4D input)"):
            norm.forward(torch.zeros(2, 3, 4, 4))
        norm = self.create(instance_norm_2d=instance_pb2.InstanceNorm2d(num_features=3))
        with refused(self, invalid, message="expected 3D or 4D input (got 2D input)"):
            norm.forward(torch.zeros(2, 3))
        norm = self.create(group_norm=instance_pb2.GroupNorm(num_groups=2, num_channels=4))
        with refused(self, invalid, message="num_channels"):
            norm.forward(torch.zeros(2, 6, 4))

    def test_residual_and_activation_that_do_not_fit(self):
        invalid = grpc.StatusCode.INVALID_ARGUMENT
        norm = self.create(batch_norm_2d=instance_pb2.BatchNorm2d(num_features=3))
        x = torch.randn(2, 3, 4, 4)
        for residual, field in ((x[:1], "residual.shape"), (x.double(), "residual.dtype")):
            with refused(self, invalid, field=field):
                norm.forward(x, residual=to_proto(residual))
        with refused(self, invalid, message="activation"):
            norm.forward(x, activation=77)
        self.assertEqual(norm.info().version, 1)


class Folding(ServerTestCase):
    """torch.nn.utils.fusion.fuse_conv_bn_eval is the judge."""

    def fold(self, layer, weight, bias=None, **fields):
        answer = self.stub.FoldConvolution(rpc.FoldConvolutionRequest(
            name=layer.name, weight=to_proto(weight),
            bias=to_proto(bias) if bias is not None else None, **fields))
        return from_proto(answer.weight), from_proto(answer.bias)

    def trained(self, dimensions, channels):
        module = getattr(torch.nn, f"BatchNorm{dimensions}d")(channels)
        config = getattr(instance_pb2, f"BatchNorm{dimensions}d")(num_features=channels)
        name = layers.request_id()
        self.stub.CreateInstance(rpc.CreateInstanceRequest(
            name=name, config=instance_pb2.InstanceConfig(**{f"batch_norm_{dimensions}d": config})))
        layer = Layer(self.stub, name)
        state = module.state_dict()
        state["weight"].normal_()
        state["bias"].normal_()
        state["running_mean"].normal_()
        state["running_var"].uniform_(0.5, 2)
        layer.load_state_dict(state)
        return layer, module.eval()

    def test_convolution_norm_relu_equals_folded_convolution_relu(self):
        for dimensions in (1, 2, 3):
            for groups in (1, 2):
                for bias in (True, False):
                    for transposed in (False, True):
                        with self.subTest(dimensions=dimensions, groups=groups, bias=bias,
                                          transposed=transposed):
                            kind = f"Conv{'Transpose' if transposed else ''}{dimensions}d"
                            conv = getattr(torch.nn, kind)(4, 6, 3, groups=groups, bias=bias).eval()
                            layer, norm = self.trained(dimensions, 6)
                            fields = dict(transposed=True, groups=groups) if transposed else {}
                            weight, shift = self.fold(
                                layer, conv.weight.detach(),
                                conv.bias.detach() if bias else None, **fields)
                            x = torch.randn(2, 4, *[7] * dimensions)
                            due = torch.relu(norm(conv(x))).detach()
                            folded = getattr(torch.nn, kind)(4, 6, 3, groups=groups)
                            folded.load_state_dict({"weight": weight, "bias": shift})
                            got = torch.relu(folded(x)).detach()
                            self.assertLessEqual((got - due).abs().max().item(),
                                                 1e-5 * max(1, due.abs().max().item()))
                            if not transposed:
                                fused = torch.nn.utils.fusion.fuse_conv_bn_eval(conv, norm)
                                torch.testing.assert_close(weight, fused.weight.detach())
                                torch.testing.assert_close(shift, fused.bias.detach())

    def test_what_cannot_be_folded(self):
        layer, _ = self.trained(2, 6)
        invalid = grpc.StatusCode.INVALID_ARGUMENT
        with refused(self, invalid, message="weight.shape"):
            self.fold(layer, torch.zeros(5, 4, 3, 3))
        with refused(self, invalid, message="weight.shape"):
            self.fold(layer, torch.zeros(6, 4))
        with refused(self, invalid, message="bias.shape"):
            self.fold(layer, torch.zeros(6, 4, 3, 3), torch.zeros(5))
        with refused(self, invalid, message="groups"):
            self.fold(layer, torch.zeros(4, 2, 3, 3), transposed=True, groups=3)
        name = layers.request_id()
        self.stub.CreateInstance(rpc.CreateInstanceRequest(
            name=name, config=instance_pb2.InstanceConfig(
                layer_norm=instance_pb2.LayerNorm(normalized_shape=[6]))))
        with refused(self, grpc.StatusCode.FAILED_PRECONDITION, message="batch norm"):
            self.fold(Layer(self.stub, name), torch.zeros(6, 4, 3, 3))


class States(ServerTestCase):
    def test_checkpoints_bring_every_layer_back(self):
        made = {}
        for kind, draw in LAYERS.items():
            config, shape, _ = draw(random.Random(7))
            self.stub.CreateInstance(rpc.CreateInstanceRequest(
                name=kind, config=instance_pb2.InstanceConfig(**config)))
            layer = Layer(self.stub, kind)
            x = torch.randn(shape)
            try:
                layer.forward(x)
            except grpc.RpcError:
                pass  # too few values for this layer: its state is what counts
            layer.eval()
            made[kind] = (layer.info().config, layer.state_dict())
        self.stub.SaveCheckpoint(rpc.SaveCheckpointRequest())
        self.server.kill()
        self.server.start()
        type(self).stub = self.server.stub
        for kind, (config, state) in made.items():
            layer = Layer(self.stub, kind)
            self.assertEqual(layer.info().config, config)
            after = layer.state_dict()
            self.assertEqual(set(after), set(state))
            for key, value in state.items():
                self.assertTrue(torch.equal(after[key], value), f"{kind} {key}")


if __name__ == "__main__":
    unittest.main()
