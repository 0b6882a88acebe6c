"""ONNX is a second judge beside PyTorch: its published definitions of the operators.

The cases of BatchNormalization (opset 15), InstanceNormalization (6) and
LayerNormalization (17) are those of ONNX's backend test suite, inputs and expected
outputs, as python3-onnx generates them (each from numpy's seed 0). Debian's onnx 1.12
ends before GroupNormalization (21) and RMSNormalization (23): for them the formula of
the specification is written here, in float64.
"""

import importlib
import unittest

import numpy
import onnx
import torch
from harness.layer import EVAL, TRAIN, Layer, request_id
from harness.seed import SEED, generator
from harness.server import ServerTestCase
from normd.v1 import instance_pb2, norm_service_pb2 as rpc, tensor_pb2
from onnx.backend.test.case import node as onnx_cases

# The defaults of the operators' attributes.
EPSILON, MOMENTUM = 1e-5, 0.9
# Beside the suite's own rtol 1e-3 and atol 1e-7: of the largest magnitude due.
TIGHT = 1e-5


def published(module, op_type):
    """The suite's cases of an operator; not those that spell its function body out, whose
    inputs and outputs are the same."""
    # The suite's own collector imports every operator, and not all of 1.12 does with numpy 1.24.
    importlib.import_module(f"onnx.backend.test.case.node.{module}")
    return [case for case in onnx_cases._NodeTestCases
            if [node.op_type for node in case.model.graph.node] == [op_type]]


def attributes(case):
    return {entry.name: onnx.helper.get_attribute_value(entry)
            for entry in case.model.graph.node[0].attribute}


class OnnxTestCase(ServerTestCase):
    def create(self, dtype=numpy.float32, weight=None, bias=None, state=None, **config):
        name = request_id()
        self.stub.CreateInstance(rpc.CreateInstanceRequest(
            name=name, config=instance_pb2.InstanceConfig(
                state_dtype=(tensor_pb2.DATA_TYPE_FLOAT64 if dtype == numpy.float64
                             else tensor_pb2.DATA_TYPE_FLOAT32), **config)))
        layer = Layer(self.stub, name)
        values = {"weight": weight, "bias": bias, **(state or {})}
        tensors = layer.state_dict()
        tensors.update({key: torch.from_numpy(value.astype(dtype)) for key, value in values.items()
                        if value is not None})
        layer.load_state_dict(tensors)
        return layer

    def same(self, what, got, due, rtol=1e-3, atol=1e-7, tight=TIGHT):
        got = numpy.asarray(got, dtype=numpy.float64)
        due = due.astype(numpy.float64)
        numpy.testing.assert_allclose(got, due, rtol=rtol, atol=atol, err_msg=what)
        self.assertLessEqual(numpy.abs(got - due).max(), tight * max(1.0, numpy.abs(due).max()),
                             what)


class PublishedCases(OnnxTestCase):
    def cases(self, module, op_type, count):
        cases = published(module, op_type)
        self.assertGreaterEqual(len(cases), count, f"{op_type} in onnx {onnx.__version__}")
        for case in cases:
            for inputs, outputs in case.data_sets:
                yield case, attributes(case), inputs, outputs

    def test_batch_normalization(self):
        trained = 0
        for case, has, (x, scale, bias, mean, var), outputs in self.cases(
                "batchnorm", "BatchNormalization", 4):
            # ONNX's momentum is the old value's share, PyTorch's the new one's.
            momentum = has.get("momentum", MOMENTUM)
            layer = self.create(
                weight=scale, bias=bias, state=dict(running_mean=mean, running_var=var),
                batch_norm_2d=instance_pb2.BatchNorm2d(
                    num_features=x.shape[1], eps=has.get("epsilon", EPSILON),
                    momentum=1 - momentum))
            training = has.get("training_mode", 0)
            trained += training
            y = layer(torch.from_numpy(x), mode=TRAIN if training else EVAL)
            self.same(case.name, y, outputs[0], case.rtol, case.atol)
            after = layer.state_dict()
            if not training:
                numpy.testing.assert_array_equal(after["running_mean"], mean)
                numpy.testing.assert_array_equal(after["running_var"], var)
                continue
            self.same(f"running_mean of {case.name}", after["running_mean"], outputs[1], case.rtol, case.atol)
            # ONNX folds the population's variance in, PyTorch the unbiased one.
            count = x.size // x.shape[1]
            old = var.astype(numpy.float64) * momentum
            due = old + (outputs[2] - old) * count / (count - 1)
            self.same(f"running_var of {case.name}", after["running_var"], due, case.rtol,
                      case.atol)
        self.assertEqual(trained, 2, "cases in training mode")

    def test_instance_normalization(self):
        for case, has, (x, scale, bias), (due,) in self.cases(
                "instancenorm", "InstanceNormalization", 2):
            layer = self.create(weight=scale, bias=bias, instance_norm_2d=instance_pb2.InstanceNorm2d(
                num_features=x.shape[1], eps=has.get("epsilon", EPSILON), affine=True))
            for mode in (TRAIN, EVAL):
                self.same(case.name, layer(torch.from_numpy(x), mode=mode), due, case.rtol,
                          case.atol)

    def test_layer_normalization(self):
        axes = set()
        for case, has, (x, scale, bias), (due, mean, inv_std_dev) in self.cases(
                "layernormalization", "LayerNormalization", 19):
            axis = has.get("axis", -1)
            axes.add(axis)
            epsilon = has.get("epsilon", EPSILON)
            layer = self.create(weight=scale, bias=bias, layer_norm=instance_pb2.LayerNorm(
                normalized_shape=x.shape[axis:], eps=epsilon))
            self.same(case.name, layer(torch.from_numpy(x)), due, case.rtol, case.atol)
            used = layer.forward(torch.from_numpy(x), statistics=True).batch_statistics
            self.same(f"Mean of {case.name}", used.mean, mean.ravel(), case.rtol,
                      case.atol)
            self.same(f"InvStdDev of {case.name}",
                      1 / numpy.sqrt(numpy.array(used.var) + epsilon), inv_std_dev.ravel(), case.rtol, case.atol)
        self.assertEqual(axes, set(range(-4, 4)))


def group_normalization(x, scale, bias, num_groups, epsilon=EPSILON):
    """GroupNormalization, opset 21: scale and bias have a value a channel."""
    groups = x.astype(numpy.float64).reshape(x.shape[0], num_groups, -1)
    mean = groups.mean(-1, keepdims=True)
    var = groups.var(-1, keepdims=True)
    normalized = ((groups - mean) / numpy.sqrt(var + epsilon)).reshape(x.shape)
    channel = (-1,) + (1,) * (x.ndim - 2)
    return scale.reshape(channel) * normalized + bias.reshape(channel)


def rms_normalization(x, scale, axis=-1, epsilon=EPSILON):
    """RMSNormalization, opset 23."""
    x = x.astype(numpy.float64)
    axes = tuple(range(axis % x.ndim, x.ndim))
    return x / numpy.sqrt((x * x).mean(axes, keepdims=True) + epsilon) * scale


class SpecifiedFormulas(OnnxTestCase):
    # Inputs differ from run to run, and where a sum ends near 0 its float32 rounding is
    # relatively large: no atol of 1e-7 holds for all of them.
    ATOL = {numpy.float32: 1e-5, numpy.float64: 1e-12}
    SHAPES = [(3, 4, 2, 2), (2, 6), (2, 12, 5), (1, 8, 7, 3), (4, 32, 3, 2, 5)]

    def draws(self, op_type):
        for dtype in (numpy.float32, numpy.float64):
            for index, shape in enumerate(self.SHAPES):
                numbers = numpy.random.default_rng(
                    generator(f"{op_type}/{index}").randrange(2**63))
                for epsilon in (EPSILON, 1e-2):
                    x = (numbers.standard_normal(shape) * 2 + 3).astype(dtype)
                    yield (f"{op_type} of {dtype.__name__} {shape}, epsilon {epsilon}, "
                           f"NORMD_SEED={SEED}"), dtype, x, epsilon, numbers

    def test_group_normalization(self):
        for what, dtype, x, epsilon, numbers in self.draws("GroupNormalization"):
            channels = x.shape[1]
            scale, bias = numbers.standard_normal((2, channels)).astype(dtype)
            for groups in [g for g in (1, 2, 4, channels) if channels % g == 0]:
                if x.size == x.shape[0] * groups:
                    continue  # One value a group: PyTorch refuses it, and ONNX gives the bias.
                layer = self.create(dtype, scale, bias, group_norm=instance_pb2.GroupNorm(
                    num_groups=groups, num_channels=channels, eps=epsilon))
                self.same(f"{what}, {groups} groups", layer(torch.from_numpy(x)),
                          group_normalization(x, scale, bias, groups, epsilon),
                          atol=self.ATOL[dtype], tight=self.ATOL[dtype],
                          rtol=1e-3 if dtype == numpy.float32 else 1e-9)

    def test_rms_normalization(self):
        for what, dtype, x, epsilon, numbers in self.draws("RMSNormalization"):
            for axis in range(-x.ndim, 0):
                scale = numbers.standard_normal(x.shape[axis:]).astype(dtype)
                layer = self.create(dtype, scale, rms_norm=instance_pb2.RmsNorm(
                    normalized_shape=x.shape[axis:], eps=epsilon))
                self.same(f"{what}, axis {axis}", layer(torch.from_numpy(x)),
                          rms_normalization(x, scale, axis, epsilon),
                          atol=self.ATOL[dtype], tight=self.ATOL[dtype],
                          rtol=1e-3 if dtype == numpy.float32 else 1e-9)


if __name__ == "__main__":
    unittest.main()
