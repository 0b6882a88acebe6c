"""Malformed requests: each is refused with its status and names its field, changes
nothing, and the next good request is answered."""

import math
import random
import struct
import unittest

import grpc
import torch
from harness.errors import names_field, refused
from harness.layer import EVAL, TRAIN, Layer, request_id
from harness.server import ServerTestCase
from harness.tensors import named, to_proto
from normd.v1 import instance_pb2, norm_service_pb2 as rpc, optimizer_pb2, tensor_pb2

INVALID = grpc.StatusCode.INVALID_ARGUMENT
FAILED = grpc.StatusCode.FAILED_PRECONDITION
NOT_FOUND = grpc.StatusCode.NOT_FOUND
EXISTS = grpc.StatusCode.ALREADY_EXISTS
ABORTED = grpc.StatusCode.ABORTED
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED

MAX_MESSAGE = 1 << 20
MAX_FEATURES = 4096
MAX_INSTANCES = 8
CHANNELS = 3
NAN, INF = math.nan, math.inf
F32 = tensor_pb2.DATA_TYPE_FLOAT32
F64 = tensor_pb2.DATA_TYPE_FLOAT64
F16 = tensor_pb2.DATA_TYPE_FLOAT16
I64 = tensor_pb2.DATA_TYPE_INT64
LAST = tensor_pb2.MEMORY_FORMAT_CHANNELS_LAST

X = torch.arange(2 * CHANNELS * 4, dtype=torch.float32).reshape(2, CHANNELS, 2, 2) * 0.5 - 3
GRAD = torch.linspace(-1, 1, X.numel()).reshape(X.shape)


def tensor(shape=X.shape, dtype=F32, size=None, data=None, memory_format=0):
    """A tensor's message that claims what it likes; `size` zero bytes of data."""
    if data is None:
        data = bytes(X.numel() * 4 if size is None else size)
    return tensor_pb2.Tensor(dtype=dtype, shape=shape, data=data, memory_format=memory_format)


def create(name="new", **layer):
    arguments = {"num_features": 4, **layer}
    state_dtype = arguments.pop("state_dtype", 0)
    return rpc.CreateInstanceRequest(name=name, config=instance_pb2.InstanceConfig(
        batch_norm_2d=instance_pb2.BatchNorm2d(**arguments), state_dtype=state_dtype))


def forward(x=None, name="bn", **fields):
    return rpc.ForwardRequest(name=name, input=to_proto(X) if x is None else x, **fields)


def backward(grad=None, name="bn", **fields):
    return rpc.BackwardRequest(name=name, grad_output=to_proto(GRAD) if grad is None else grad,
                               **fields)


def statistics(count=8, mean=(0.0,) * CHANNELS, var=(1.0,) * CHANNELS):
    return instance_pb2.BatchStatistics(count=count, mean=mean, var=var)


def step(name="bn", reset_optimizer=True, **rule):
    optimizer = optimizer_pb2.Optimizer(**{
        key: (optimizer_pb2.Sgd if key == "sgd" else optimizer_pb2.Adam)(**value)
        for key, value in rule.items()})
    return rpc.StepRequest(name=name, optimizer=optimizer, reset_optimizer=reset_optimizer)


def state(change=None, drop=(), add=(), **fields):
    """A SetState of a good state_dict with some tensors changed, dropped or added."""
    good = named(torch.nn.BatchNorm2d(CHANNELS).state_dict())
    entries = [entry for entry in good if entry.name not in drop]
    for entry in entries:
        if change and entry.name in change:
            entry.tensor.CopyFrom(change[entry.name])
    entries += [tensor_pb2.NamedTensor(name=key, tensor=value) for key, value in add]
    return rpc.SetStateRequest(name="bn", state=instance_pb2.State(state_dict=entries, **fields))


def vector(*values):
    return to_proto(torch.tensor(values, dtype=torch.float32))


def bad_names():
    names = {
        "empty": "", "space": "a b", "leading slash": "/a", "trailing slash": "a/",
        "empty segment": "a//b", "dot": ".", "dot dot": "..", "dot segment": "a/./b",
        "parent": "../a", "parent inside": "a/../../b", "too long": "n" * 256,
        "not ASCII": "größe", "newline": "a\nb", "NUL": "a\0b", "percent": "a%2Fb",
        "backslash": "a\\b", "shell": "$(reboot)", "star": "*",
    }
    for title, name in names.items():
        yield f"create: name {title}", "CreateInstance", create(name), INVALID, "name"
    for method in ("GetInstance", "DeleteInstance", "Train", "Eval", "ZeroGrad", "GetState",
                   "ResetRunningStats", "ResetParameters"):
        request = getattr(rpc, f"{method}Request")
        yield f"{method}: name '../x'", method, request(name="../x"), INVALID, "name"
        yield f"{method}: no name", method, request(), INVALID, "name"
        yield (f"{method}: nobody", method, request(name="nobody"), NOT_FOUND, None,
               dict(message="nobody"))
    yield "forward: name '..'", "Forward", forward(name=".."), INVALID, "name"
    yield ("forward: nobody", "Forward", forward(name="nobody"), NOT_FOUND, None,
           dict(message="nobody"))
    yield "backward: name 'a//b'", "Backward", backward(name="a//b"), INVALID, "name"
    yield ("backward: nobody", "Backward", backward(name="nobody", input=to_proto(X)),
           NOT_FOUND, None, dict(message="nobody"))
    yield "step: name ' '", "Step", step(name=" ", sgd=dict(lr=0.1)), INVALID, "name"
    yield "set state: no name", "SetState", rpc.SetStateRequest(), INVALID, "name"



def bad_configs():
    def case(title, request, field, code=INVALID, **more):
        return f"create: {title}", "CreateInstance", request, code, field, more

    yield case("no config", rpc.CreateInstanceRequest(name="new"), "config.layer")
    yield case("no layer", rpc.CreateInstanceRequest(name="new",
                                                     config=instance_pb2.InstanceConfig()),
               "config.layer")
    yield case("num_features 0", create(num_features=0), "num_features")
    yield case("num_features -1", create(num_features=-1), "num_features")
    yield case("num_features -2^63", create(num_features=-2**63), "num_features")
    yield case("num_features 2^40", create(num_features=2**40), "num_features", EXHAUSTED,
               flag="--max_features")
    yield case("num_features 2^63 - 1", create(num_features=2**63 - 1), "num_features", EXHAUSTED,
               flag="--max_features")
    yield case("one feature too many", create(num_features=MAX_FEATURES + 1), "num_features",
               EXHAUSTED, flag="--max_features")
    for title, eps in (("negative", -1e-9), ("NaN", NAN), ("Inf", INF), ("-Inf", -INF)):
        yield case(f"eps {title}", create(eps=eps), "eps")
    for title, momentum in (("NaN", NAN), ("Inf", INF), ("-Inf", -INF)):
        yield case(f"momentum {title}", create(momentum=momentum), "momentum")
    yield case("cumulative_average false", create(cumulative_average=False), "cumulative_average")
    for title, dtype in (("FLOAT16", F16), ("INT64", I64), ("unknown", 99), ("negative", -1)):
        yield case(f"state_dtype {title}", create(state_dtype=dtype), "state_dtype")
    request = create()
    request.mode = 7
    yield case("mode unknown", request, "mode")
    yield case("taken name", create("bn"), None, EXISTS, message="bn")


def bad_inputs():
    def case(title, x, field, code=INVALID, name="bn", **more):
        return f"forward: {title}", "Forward", forward(x, name), code, field, more

    yield "forward: no input", "Forward", rpc.ForwardRequest(name="bn"), INVALID, "input.dtype", {}
    yield case("dtype missing", tensor(dtype=0), "input.dtype")
    yield case("dtype unknown", tensor(dtype=77), "input.dtype")
    yield case("dtype negative", tensor(dtype=-5), "input.dtype")
    yield case("dtype int64", tensor(dtype=I64, size=X.numel() * 8), "input.dtype")
    yield case("float64 for a float32 instance", tensor(dtype=F64, size=X.numel() * 8),
               "input.dtype")
    yield case("float32 for a float64 instance", tensor(), "input.dtype", name="double")
    yield case("float16 for a float64 instance", tensor(dtype=F16, size=X.numel() * 2),
               "input.dtype", name="double")
    yield case("a scalar", tensor(shape=(), size=4), "input.shape")
    for dimensions in (1, 2, 3, 5, 8):
        yield case(f"{dimensions} dimensions", tensor(shape=(1,) * dimensions, size=4),
                   "input.shape")
    yield case("9 dimensions", tensor(shape=(1,) * 9, size=4), "input.shape")
    yield case("100,000 dimensions", tensor(shape=(1,) * 100_000, size=4), "input.shape")
    yield case("channels short", tensor(shape=(2, 2, 2, 2), size=64), "input.shape", message="3")
    yield case("channels over", tensor(shape=(2, 4, 2, 2), size=128), "input.shape", message="4")
    yield case("no channels", tensor(shape=(2, 0, 2, 2), size=0), "input.shape")
    yield case("negative batch", tensor(shape=(-2, 3, 2, 2)), "input.shape")
    yield case("two negatives", tensor(shape=(-2, 3, -2, 2)), "input.shape")
    yield case("least dimension", tensor(shape=(-2**63, 3, 2, 2)), "input.shape")
    yield case("dimension past 2^40", tensor(shape=(2**40 + 1, 3, 1, 1)), "input.shape")
    yield case("largest dimension", tensor(shape=(2**63 - 1, 3, 2, 2)), "input.shape")
    yield case("product past 2^64", tensor(shape=(2**40, 3, 2**40, 1)), "input.shape")
    yield case("product wraps to 0", tensor(shape=(2**32, 3, 2**32, 1), size=0), "input.shape")
    yield case("product wraps to the size", tensor(shape=(2**40, 3, 2**24, 4), size=0),
               "input.shape")
    yield case("overflow beside a zero", tensor(shape=(0, 3, 2**40, 2**40), size=0), "input.shape")
    yield case("2^40 elements, four bytes", tensor(shape=(2**38, 3, 1, 1), size=4), "input.data")
    yield case("no data", tensor(size=0), "input.data")
    yield case("a byte short", tensor(size=X.numel() * 4 - 1), "input.data")
    yield case("a byte over", tensor(size=X.numel() * 4 + 1), "input.data")
    yield case("half the data", tensor(size=X.numel() * 2), "input.data")
    yield case("data for an empty tensor", tensor(shape=(0, 3, 2, 2), size=4), "input.data")
    yield case("channels_last of a vector", tensor(shape=(24,), memory_format=LAST),
               ("input.memory_format", "input.shape"))
    yield case("memory format unknown", tensor(memory_format=9), "input.memory_format")
    yield case("one value per channel", tensor(shape=(1, 3, 1, 1), size=12), "input.shape", FAILED,
               message="Expected more than 1 value per channel when training")
    yield "forward: mode unknown", "Forward", forward(mode=3), INVALID, "mode", {}
    yield "forward: mode negative", "Forward", forward(mode=-1), INVALID, "mode", {}


def bad_gradients():
    def case(title, request, field, code=INVALID, **more):
        return f"backward: {title}", "Backward", request, code, field, more

    yield case("neither context nor input", backward(), ("context_id", "input"))
    yield case("no grad_output", rpc.BackwardRequest(name="bn", input=to_proto(X)), "grad_output.dtype")
    yield case("grad_output of another shape",
               backward(tensor(shape=(2, 3, 4, 1)), input=to_proto(X)), "grad_output.shape")
    yield case("grad_output of another dtype",
               backward(tensor(dtype=F16, size=X.numel() * 2), input=to_proto(X)),
               "grad_output.dtype")
    yield case("grad_output of another format",
               backward(tensor(memory_format=LAST), input=to_proto(X)),
               "grad_output.memory_format")
    yield case("grad_output a byte short", backward(tensor(size=95), input=to_proto(X)),
               "grad_output.data")
    yield case("input a byte short", backward(input=tensor(size=95)), "input.data")
    yield case("input of wrong channels", backward(tensor(shape=(2, 2, 2, 2), size=64),
                                                   input=tensor(shape=(2, 2, 2, 2), size=64)),
               "input.shape")
    yield case("context unknown", backward(context_id="no-such-context"), "context_id", NOT_FOUND)
    yield case("context garbage", backward(context_id="\x01" * 500), "context_id",
               (NOT_FOUND, INVALID))
    yield case("statistics of another count",
               backward(input=to_proto(X), batch_statistics=statistics(count=7)),
               "batch_statistics.count")
    yield case("statistics of a negative count",
               backward(input=to_proto(X), batch_statistics=statistics(count=-8)),
               "batch_statistics.count")
    yield case("statistics a mean short",
               backward(input=to_proto(X), batch_statistics=statistics(mean=(0, 0))),
               "batch_statistics.mean")
    yield case("statistics a variance over",
               backward(input=to_proto(X), batch_statistics=statistics(var=(1,) * 4)),
               "batch_statistics.var")
    yield case("negative variance",
               backward(input=to_proto(X), batch_statistics=statistics(var=(1, -1, 1))),
               "batch_statistics.var")
    yield case("batch statistics in eval mode",
               backward(input=to_proto(X), mode=EVAL, batch_statistics=statistics()),
               "batch_statistics")
    yield case("mode unknown", backward(input=to_proto(X), mode=12), "mode")
    yield case("one value per channel",
               backward(tensor(shape=(1, 3, 1, 1), size=12), input=tensor(shape=(1, 3, 1, 1),
                                                                          size=12)),
               "input.shape", FAILED, message="Expected more than 1 value per channel")


def bad_steps():
    def case(title, request, field, code=INVALID, **more):
        return f"step: {title}", "Step", request, code, field, more

    yield case("no optimizer", rpc.StepRequest(name="bn"), "optimizer.rule")
    yield case("no rule", step(), "optimizer.rule")
    for title, value in (("NaN", NAN), ("Inf", INF), ("negative", -0.1)):
        yield case(f"sgd lr {title}", step(sgd=dict(lr=value)), "sgd.lr")
        yield case(f"sgd momentum {title}", step(sgd=dict(lr=0.1, momentum=value)), "sgd.momentum")
        yield case(f"sgd weight_decay {title}", step(sgd=dict(lr=0.1, weight_decay=value)),
                   "sgd.weight_decay")
        yield case(f"adam lr {title}", step(adam=dict(lr=value)), "adam.lr")
        yield case(f"adam eps {title}", step(adam=dict(eps=value)), "adam.eps")
        yield case(f"adamw weight_decay {title}", step(adamw=dict(weight_decay=value)),
                   "adamw.weight_decay")
    yield case("sgd dampening NaN", step(sgd=dict(lr=0.1, momentum=0.9, dampening=NAN)),
               "sgd.dampening")
    yield case("nesterov without momentum", step(sgd=dict(lr=0.1, nesterov=True)), "nesterov")
    yield case("nesterov with dampening",
               step(sgd=dict(lr=0.1, momentum=0.9, dampening=0.1, nesterov=True)), "nesterov")
    for title, value in (("1", 1.0), ("past 1", 1.5), ("negative", -0.1), ("NaN", NAN)):
        yield case(f"beta1 {title}", step(adam=dict(beta1=value)), "adam.beta1")
        yield case(f"beta2 {title}", step(adamw=dict(beta2=value)), "adamw.beta2")
    yield case("no parameters", step(name="plain", sgd=dict(lr=0.1)), None, FAILED)


def bad_states():
    def case(title, request, field, code=INVALID, **more):
        return f"set state: {title}", "SetState", request, code, field, more

    yield case("nothing", rpc.SetStateRequest(name="bn"), "state.state_dict", FAILED,
               message="running_mean")
    for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        yield case(f"{key} missing", state(drop=(key,)), "state.state_dict", FAILED, message=key)
    yield case("a key too many", state(add=[("gamma", vector(1, 1, 1))]), "state.state_dict",
               FAILED, message="gamma")
    yield case("all wrong keys are named", state(drop=("bias",), add=[("beta", vector(1, 1, 1))]),
               "state.state_dict", FAILED, message='"beta"')
    yield case("a key twice", state(add=[("weight", vector(1, 1, 1))]), "state.state_dict")
    yield case("weight of another size", state({"weight": vector(1, 1)}), "weight.shape", FAILED)
    yield case("weight of two dimensions", state({"weight": tensor(shape=(3, 1), size=12)}),
               "weight.shape", FAILED)
    yield case("running_mean a byte short",
               state({"running_mean": tensor(shape=(3,), size=11)}), "running_mean.data")
    yield case("running_var negative", state({"running_var": vector(1, -1e-6, 1)}), "running_var")
    yield case("weight of int64", state({"weight": tensor(shape=(3,), dtype=I64, size=24)}),
               "weight.dtype")
    yield case("weight without dtype", state({"weight": tensor(shape=(3,), dtype=0, size=12)}),
               "weight.dtype")
    yield case("bias of negative size", state({"bias": tensor(shape=(-3,), size=12)}),
               "bias.shape")
    yield case("num_batches_tracked a float", state({"num_batches_tracked": vector(1)}),
               "num_batches_tracked.dtype")
    yield case("num_batches_tracked of one dimension",
               state({"num_batches_tracked": tensor(shape=(1,), dtype=I64, size=8)}),
               "num_batches_tracked.shape", FAILED)
    yield case("num_batches_tracked negative",
               state({"num_batches_tracked": tensor(shape=(), dtype=I64,
                                                    data=struct.pack("<q", -1))}),
               "num_batches_tracked")
    yield case("num_batches_tracked of four bytes",
               state({"num_batches_tracked": tensor(shape=(), dtype=I64, size=4)}),
               "num_batches_tracked.data")
    yield case("gradients", state(gradients=[tensor_pb2.NamedTensor(name="weight",
                                                                    tensor=vector(1, 1, 1))]),
               "state.gradients")
    yield case("optimizer state",
               state(optimizer_state=[tensor_pb2.NamedTensor(name="weight.step")]),
               "state.optimizer_state")


def bad_ids_and_versions():
    changes = {
        "Train": rpc.TrainRequest(name="bn"), "Eval": rpc.EvalRequest(name="bn"),
        "Forward": forward(), "Backward": backward(input=to_proto(X), accumulate=True),
        "ZeroGrad": rpc.ZeroGradRequest(name="bn"), "Step": step(sgd=dict(lr=0.1)),
        "SetState": state(), "ResetRunningStats": rpc.ResetRunningStatsRequest(name="bn"),
        "ResetParameters": rpc.ResetParametersRequest(name="bn"),
        "DeleteInstance": rpc.DeleteInstanceRequest(name="bn"),
    }

    def change(method, **fields):
        request = type(changes[method])()
        request.CopyFrom(changes[method])
        for key, value in fields.items():
            setattr(request, key, value)
        return request

    for method in changes:
        yield (f"{method}: request_id no UUID", method, change(method, request_id="retry-1"),
               INVALID, "request_id", {})
        yield (f"{method}: another version expected", method, change(method, expected_version=999),
               ABORTED, "expected_version", {})
    good = request_id()
    for title, bad in (("short", good[:-1]), ("long", good + "0"), ("spaced", good[:8] + " " +
                       good[9:]), ("of letters past f", good[:-1] + "g"), ("of 10 kB", "a" * 10_000),
                       ("not ASCII", "é" * 18), ("without dashes", good.replace("-", "0"))):
        yield f"request_id {title}", "Train", change("Train", request_id=bad), INVALID, "request_id"
    yield "version 0 expected", "Train", change("Train", expected_version=0), ABORTED, \
        "expected_version", {}
    yield "version 2^64 - 1 expected", "Eval", change("Eval", expected_version=2**64 - 1), ABORTED, \
        "expected_version", {}
    request = create()
    request.request_id = "{" + good + "}"
    yield "create: request_id braced", "CreateInstance", request, INVALID, "request_id", {}
    yield ("save: request_id no UUID", "SaveCheckpoint",
           rpc.SaveCheckpointRequest(request_id="x"), INVALID, "request_id", {})


def bad_pages_and_checkpoints():
    for size in (-1, 1001, 2**31 - 1, -2**31):
        yield (f"list: page_size {size}", "ListInstances",
               rpc.ListInstancesRequest(page_size=size), INVALID, "page_size", {})
        yield (f"list checkpoints: page_size {size}", "ListCheckpoints",
               rpc.ListCheckpointsRequest(page_size=size), INVALID, "page_size", {})
    for title, token in (("garbage", "garbage!"), ("NUL", "\0"), ("long", "A" * 5000)):
        yield (f"list: page_token {title}", "ListInstances",
               rpc.ListInstancesRequest(page_token=token), INVALID, "page_token", {})
        yield (f"list checkpoints: page_token {title}", "ListCheckpoints",
               rpc.ListCheckpointsRequest(page_token=token), INVALID, "page_token", {})
    for checkpoint in ("../x", "..", "/etc", "a/b", ".", "00000001-manual/..", "\0", "x" * 5000):
        yield (f"load: checkpoint_id {checkpoint[:30]!r}", "LoadCheckpoint",
               rpc.LoadCheckpointRequest(checkpoint_id=checkpoint), INVALID, "checkpoint_id", {})
    yield ("load: no such checkpoint", "LoadCheckpoint",
           rpc.LoadCheckpointRequest(checkpoint_id="99999999-manual"), NOT_FOUND, None,
           dict(message="99999999-manual"))
    yield ("load: a bad name", "LoadCheckpoint", rpc.LoadCheckpointRequest(names=["../bn"]),
           (INVALID, NOT_FOUND), None, {})
    yield ("load: a name that is not in it", "LoadCheckpoint",
           rpc.LoadCheckpointRequest(names=["bn", "nobody"]), NOT_FOUND, None,
           dict(message="nobody"))


def all_cases():
    for table in (bad_names, bad_configs, bad_inputs, bad_gradients, bad_steps, bad_states,
                  bad_ids_and_versions, bad_pages_and_checkpoints):
        for case in table():
            title, method, request, code, field = case[:5]
            yield title, method, request, code, field, case[5] if len(case) > 5 else {}


class BadInputCase(ServerTestCase):
    """A server with three instances, and the answer that a good request always gets."""

    FLAGS = (f"--max_message_bytes={MAX_MESSAGE}", f"--max_features={MAX_FEATURES}",
             f"--max_instances={MAX_INSTANCES}")

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.layer = Layer.create(cls.stub, "bn", CHANNELS)
        Layer.create(cls.stub, "double", CHANNELS, dtype=torch.float64)
        Layer.create(cls.stub, "plain", CHANNELS, affine=False)
        cls.layer.forward(X)
        cls.layer.backward(GRAD, x=X, accumulate=True)
        cls.stub.SaveCheckpoint(rpc.SaveCheckpointRequest())
        cls.good_answer = cls.layer.forward(X, mode=EVAL).output.data
        cls.before = cls.everything()

    @classmethod
    def everything(cls):
        """All that a refused call must leave alone."""
        instances = cls.stub.ListInstances(rpc.ListInstancesRequest()).instances
        states = [cls.stub.GetState(rpc.GetStateRequest(name=i.name, include_gradients=True,
                                                        include_optimizer=True))
                  for i in instances]
        checkpoints = cls.stub.ListCheckpoints(rpc.ListCheckpointsRequest()).checkpoints
        return [m.SerializeToString(deterministic=True) for m in (*instances, *states, *checkpoints)]

    def still_well(self):
        """The next good request is answered as ever, and nothing changed."""
        self.assertTrue(self.server.alive(), "the server died")
        self.assertEqual(self.layer.forward(X, mode=EVAL).output.data, self.good_answer)
        self.assertEqual(self.everything(), self.before)


class Table(BadInputCase):
    def test_at_least_80_malformed_requests(self):
        self.assertGreaterEqual(len(list(all_cases())), 80)

    def test_each_is_refused_with_its_status_and_field_and_changes_nothing(self):
        for title, method, request, code, field, more in all_cases():
            with self.subTest(title):
                if isinstance(field, tuple):  # either is a fair thing to complain about
                    with refused(self, code, **more) as refusal:
                        getattr(self.stub, method)(request)
                    self.assertTrue(any(names_field(refusal.detail, each) for each in field),
                                    f"{refusal.error.details()} [{refusal.detail}]")
                else:
                    with refused(self, code, field, **more) as refusal:
                        getattr(self.stub, method)(request)
                self.assertLess(len(refusal.error.details()), 2000)
                self.still_well()

    def test_a_version_that_does_not_match_is_answered_with_the_one_that_is(self):
        with refused(self, ABORTED, "expected_version") as refusal:
            self.stub.Train(rpc.TrainRequest(name="bn", expected_version=77))
        self.assertEqual(refusal.detail.current_version, self.layer.info().version)
        self.assertIn("77", refusal.error.details())

    def test_too_many_instances_name_the_flag(self):
        made = []
        with refused(self, EXHAUSTED, flag="--max_instances") as refusal:
            for index in range(MAX_INSTANCES):
                self.stub.CreateInstance(create(f"more/{index}"))
                made.append(f"more/{index}")
        self.assertEqual(len(made), MAX_INSTANCES - 3)
        self.assertEqual(refusal.detail.limit, MAX_INSTANCES)
        for name in made:
            self.stub.DeleteInstance(rpc.DeleteInstanceRequest(name=name))
        self.still_well()


class Contexts(BadInputCase):
    def test_a_used_context_is_refused(self):
        context = self.layer.forward(X, save=True, mode=EVAL).context_id
        self.layer.backward(GRAD, context)
        with refused(self, FAILED, "context_id"):
            self.layer.backward(GRAD, context)
        self.still_well()

    def test_a_context_of_another_instance_is_refused_and_stays_good(self):
        context = self.layer.forward(X, save=True, mode=EVAL).context_id
        with refused(self, NOT_FOUND, "context_id"):
            Layer(self.stub, "plain").backward(GRAD, context)
        self.layer.backward(GRAD, context)
        self.still_well()

    def test_context_and_input_together_are_refused(self):
        context = self.layer.forward(X, save=True, mode=EVAL).context_id
        with refused(self, INVALID) as refusal:
            self.layer.backward(GRAD, context, x=X)
        self.assertTrue(names_field(refusal.detail, "input") or
                        names_field(refusal.detail, "context_id"), refusal.detail)
        self.still_well()

    def test_a_gradient_that_does_not_fit_leaves_the_context_good(self):
        context = self.layer.forward(X, save=True, mode=EVAL).context_id
        with refused(self, INVALID, "grad_output.shape"):
            self.layer.backward(GRAD.reshape(2, 3, 4, 1), context)
        with refused(self, INVALID, "grad_output.dtype"):
            self.layer.backward(GRAD.double(), context)
        with refused(self, INVALID, "grad_output.memory_format"):
            self.layer.backward(GRAD, context, channels_last=True)
        self.layer.backward(GRAD, context)
        self.still_well()

    def test_a_context_of_a_deleted_instance_is_gone(self):
        for _ in range(2):  # the second is another instance of the same name
            layer = Layer.create(self.stub, "short-lived", CHANNELS)
            context = layer.forward(X, save=True).context_id
            layer.delete()
        layer = Layer.create(self.stub, "short-lived", CHANNELS)
        with refused(self, NOT_FOUND, "context_id"):
            layer.backward(GRAD, context)
        layer.delete()
        self.still_well()


class Bytes(BadInputCase):
    """What is no message at all, or too large a one."""

    METHODS = ("CreateInstance", "GetInstance", "ListInstances", "DeleteInstance", "Train", "Eval",
               "Forward", "Backward", "ZeroGrad", "Step", "GetState", "SetState",
               "ResetRunningStats", "ResetParameters", "SaveCheckpoint", "LoadCheckpoint",
               "ListCheckpoints", "GetServerInfo")
    def raw(self, method, kind="unary_unary"):
        return getattr(self.server.channel, kind)(f"/normd.v1.NormService/{method}")

    def test_garbage_is_refused_by_every_method(self):
        for method in self.METHODS:
            for garbage in (b"\xff" * 64, b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\x07",
                            b"\x0a\x05bn", b"\x0a\x02\xff\xfe"):
                with self.subTest(method=method, garbage=garbage[:8]):
                    with refused(self, INVALID) as refusal:
                        if method == "GetServerInfo" and garbage == b"\x0a\x02\xff\xfe":
                            self.raw(method)(b"\x07")  # no field 1: that one would be ignored
                        elif method in ("ListCheckpoints",) and garbage == b"\x0a\x02\xff\xfe":
                            self.raw(method)(b"\x12\x02\xff\xfe")
                        else:
                            self.raw(method)(garbage)
                    self.assertTrue(refusal.detail and refusal.detail.field)
                    self.assertTrue(refusal.error.details())
            self.still_well()

    def test_a_message_cut_anywhere_is_refused(self):
        good = forward(mode=EVAL).SerializeToString()
        for size in range(1, len(good)):
            try:
                answer = self.raw("Forward")(good[:size])
            except grpc.RpcError as error:
                self.assertIn(error.code(), (INVALID, NOT_FOUND), f"cut at {size}")
            else:
                self.fail(f"cut at {size}: answered {len(answer)} bytes")
        self.still_well()

    def test_flipped_bytes_never_kill(self):
        rng = random.Random(3)
        flipped = Layer.create(self.stub, "flipped", CHANNELS)  # some flips make train of eval
        good = forward(mode=EVAL, name=flipped.name).SerializeToString()
        header = len(good) - X.numel() * 4
        for _ in range(500):
            data = bytearray(good)
            for _ in range(rng.randrange(1, 4)):
                data[rng.randrange(header)] = rng.randrange(256)
            try:
                self.raw("Forward")(bytes(data))
            except grpc.RpcError as error:
                self.assertIn(error.code(), (INVALID, NOT_FOUND, FAILED, EXHAUSTED, ABORTED))
        flipped.delete()
        self.still_well()

    def test_an_unknown_method_is_unimplemented(self):
        with refused(self, grpc.StatusCode.UNIMPLEMENTED):
            self.raw("Normalize")(b"")
        self.still_well()

    def test_an_oversize_message_names_the_flag(self):
        side = 300  # 3 * 300 * 300 floats are more than a MiB
        with refused(self, EXHAUSTED, flag="--max_message_bytes") as refusal:
            self.layer.forward(torch.zeros(1, CHANNELS, side, side), mode=EVAL)
        self.assertEqual(refusal.detail.limit, MAX_MESSAGE)
        self.still_well()

    def test_a_message_just_under_the_limit_passes(self):
        rows = (MAX_MESSAGE - 1024) // (CHANNELS * 4)
        self.assertEqual(self.layer(torch.zeros(1, CHANNELS, rows, 1), mode=EVAL).shape[2], rows)
        self.still_well()


class Streams(BadInputCase):
    """Streams that break their protocol."""

    def forward_parts(self, *chunks, header=None):
        if header is None:
            header = rpc.ForwardRequest(name="bn", mode=EVAL, input=tensor(data=b""))
        return [rpc.ForwardStreamRequest(header=header),
                *(rpc.ForwardStreamRequest(chunk=chunk) for chunk in chunks)]

    def backward_parts(self, grads=(), inputs=(), header=None):
        if header is None:
            header = rpc.BackwardRequest(name="bn", mode=EVAL, input=tensor(data=b""),
                                         grad_output=tensor(data=b""))
        return [rpc.BackwardStreamRequest(header=header),
                *(rpc.BackwardStreamRequest(grad_output_chunk=chunk) for chunk in grads),
                *(rpc.BackwardStreamRequest(input_chunk=chunk) for chunk in inputs)]

    def check(self, title, method, parts, code, field=None, **more):
        with self.subTest(title):
            with refused(self, code, field, **more):
                for _ in getattr(self.stub, method)(iter(parts), timeout=30):
                    pass
            self.still_well()

    def test_forward_streams(self):
        data = to_proto(X).data
        half = len(data) // 2
        parts = self.forward_parts
        check = lambda title, parts, code=INVALID, field=None, **more: self.check(
            title, "ForwardStream", parts, code, field, **more)
        check("nothing at all", [])
        check("chunk before the header", [rpc.ForwardStreamRequest(chunk=data)])
        check("an empty part first", [rpc.ForwardStreamRequest()])
        check("an empty part later", parts(data[:half]) + [rpc.ForwardStreamRequest()])
        check("two headers", parts() + parts(data))
        check("a header between chunks", parts(data[:half]) + parts(data[half:]))
        check("no chunks", parts())
        check("too few bytes", parts(data[:half]), field="input.data")
        check("a byte short", parts(data[:half], data[half:-1]), field="input.data")
        check("a byte over", parts(data, b"x"), field="input.data")
        check("far too many bytes", parts(*[data] * 50), field="input.data")
        check("data in the header",
              parts(data, header=rpc.ForwardRequest(name="bn", mode=EVAL, input=to_proto(X))),
              field="input.data")
        check("no such instance", parts(data, header=rpc.ForwardRequest(
            name="nobody", input=tensor(data=b""))), NOT_FOUND, message="nobody")
        check("bad name", parts(data, header=rpc.ForwardRequest(
            name="../x", input=tensor(data=b""))), field="name")
        check("bad shape", parts(data, header=rpc.ForwardRequest(
            name="bn", input=tensor(shape=(2, -3, 2, 2), data=b""))), field="input.shape")
        check("wrong channels", parts(data, header=rpc.ForwardRequest(
            name="bn", input=tensor(shape=(3, 2, 2, 2), data=b""))), field="input.shape")
        check("an oversize chunk", parts(bytes(MAX_MESSAGE + 1)), EXHAUSTED,
              flag="--max_message_bytes")
        check("more than the server's memory", parts(data, header=rpc.ForwardRequest(
            name="bn", input=tensor(shape=(2**36, 3, 1, 1), data=b""))), EXHAUSTED,
            flag="--memory_budget")
        check("another version expected", parts(data, header=rpc.ForwardRequest(
            name="bn", mode=TRAIN, expected_version=99, input=tensor(data=b""))), ABORTED,
            "expected_version")

    def test_backward_streams(self):
        data, grad = to_proto(X).data, to_proto(GRAD).data
        parts = self.backward_parts
        check = lambda title, parts, code=INVALID, field=None, **more: self.check(
            title, "BackwardStream", parts, code, field, **more)
        check("nothing at all", [])
        check("chunk before the header", [rpc.BackwardStreamRequest(input_chunk=data)])
        check("two headers", parts() + parts([grad], [data]))
        check("no chunks", parts())
        check("gradient missing", parts([], [data]), field="grad_output.data")
        check("input missing", parts([grad]), field="input.data")
        check("input a byte short", parts([grad], [data[:-1]]), field="input.data")
        check("gradient a byte over", parts([grad, b"x"], [data]), field="grad_output.data")
        check("shapes that differ", parts([grad], [data], header=rpc.BackwardRequest(
            name="bn", mode=EVAL, input=tensor(data=b""),
            grad_output=tensor(shape=(2, 3, 4, 1), data=b""))), field="grad_output.shape")
        check("unknown context", parts([grad], header=rpc.BackwardRequest(
            name="bn", context_id="nothing", grad_output=tensor(data=b""))), NOT_FOUND,
            "context_id")
        context = self.layer.forward(X, save=True, mode=EVAL).context_id
        check("input beside a context", parts([grad], [data], header=rpc.BackwardRequest(
            name="bn", context_id=context, grad_output=tensor(data=b""))))
        self.layer.backward(GRAD, context)

    def test_garbage_in_a_stream(self):
        for method in ("ForwardStream", "BackwardStream"):
            call = self.server.channel.stream_stream(f"/normd.v1.NormService/{method}")
            for garbage in ([b"\xff" * 64], [b"\x07"], [b"\x0a\x05bn"]):
                with self.subTest(method=method, garbage=garbage[0][:4]):
                    with refused(self, INVALID, "request"):
                        list(call(iter(garbage), timeout=30))
            self.still_well()

    def test_a_stream_cancelled_half_way_leaves_nothing(self):
        for _ in range(20):
            call = self.stub.ForwardStream(iter(self.forward_parts(to_proto(X).data[:40])))
            call.cancel()
        self.still_well()


if __name__ == "__main__":
    unittest.main()
