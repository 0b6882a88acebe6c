"""Random calls, sound and unsound, one after another, against a model of the service.

Each call is answered as the model says: status, version, replayed, num_batches_tracked, and every
tensor. The server is killed now and then, and goes on where it was. NORMD_SEED=N repeats a run;
NORMD_SECONDS=S goes on for so long, each round from a seed of its own.
"""

import os
import time
import unittest
import uuid

import grpc
import torch
from harness.layer import EVAL, TRAIN
from harness.seed import generator
from harness.server import Server
from harness.service_model import Code, Instance, Layer, Refused, optimizer_message
from harness.tensors import from_proto, named, state_dict, to_proto
from normd.v1 import instance_pb2, norm_service_pb2 as rpc

SECONDS = float(os.environ.get("NORMD_SECONDS", "0"))
CALLS = 400  # a round
NAMES = ["a", "b", "net/a", "net/b", "net/c", "other"]
MOST = 5  # instances
KEPT = 3  # checkpoints

OPTIMIZERS = {"sgd": dict(lr=0.1, momentum=0.9, weight_decay=0.01),
              "adam": dict(lr=0.01, amsgrad=True, weight_decay=0.01),
              "adamw": dict(lr=0.02, weight_decay=0.1)}


def random_layer(rng):
    dtype, eps = rng.choice((torch.float64, torch.float64, torch.float32)), 1e-5
    kind = rng.choice(("batch_norm_2d", "batch_norm_2d", "batch_norm_1d", "layer_norm", "rms_norm",
                       "group_norm", "instance_norm_2d"))
    affine = rng.random() < 0.8
    if kind in ("layer_norm", "rms_norm"):
        shape = rng.choice(((3,), (2, 3)))
        return Layer(kind, dtype, normalized_shape=shape, eps=eps, elementwise_affine=affine)
    if kind == "group_norm":
        return Layer(kind, dtype, num_groups=2, num_channels=4, eps=eps, affine=affine)
    momentum = rng.choice((0.1, 0.5, None)) if kind.startswith("batch") else 0.3
    return Layer(kind, dtype, num_features=rng.choice((1, 3)), eps=eps, momentum=momentum,
                 affine=affine, track_running_stats=rng.random() < 0.8)


class Round:
    """One server, one model, and the calls that both get."""

    def __init__(self, test, server, seed):
        self.test, self.server = test, server
        self.rng = generator(seed)
        self.torch = torch.Generator().manual_seed(self.rng.randrange(2**63))
        self.instances = {}
        self.removals = {}     # by name: request_id, version
        self.checkpoints = {}  # by id: copies by name
        self.said = []

    def run(self, calls):
        ways = [way for way, weight in (
            (self.create, 3), (self.delete, 1), (self.mode, 2), (self.forward, 12),
            (self.backward, 8), (self.zero_grad, 1), (self.step, 4), (self.get_state, 2),
            (self.set_state, 2), (self.reset, 1), (self.list, 1), (self.save, 1), (self.load, 1),
        ) for _ in range(weight)]
        for _ in range(calls):
            if self.rng.random() < 0.005:
                self.kill()
            try:
                self.rng.choice(ways)()
            except AssertionError as error:
                raise AssertionError(f"{error}\nafter {len(self.said)} calls, the last of them:\n"
                                     + "\n".join(self.said[-12:])) from error
        for name in list(self.instances):
            self.compare_state(name)

    # --- what is sent, and what is due ---

    def name(self):
        living = self.rng.choice(sorted(self.instances)) if self.instances else "none"
        return living if self.rng.random() < 0.95 else self.rng.choice((*NAMES, "", "../a", "a//b"))

    def find(self, name):
        if not name or ".." in name or "//" in name:
            raise Refused(Code.INVALID_ARGUMENT)
        if name not in self.instances:
            raise Refused(Code.NOT_FOUND)
        return self.instances[name]

    def tensor(self, shape, layer):
        drawn = torch.randn(*shape, generator=self.torch, dtype=torch.float64) * 2 + 0.5
        return drawn.to(layer.dtype)

    def options(self, name):
        """request_id and expected_version: mostly fresh and right, now and then not."""
        fields, known = {}, self.instances.get(name)
        if self.rng.random() < 0.5:
            fields["request_id"] = str(uuid.UUID(int=self.rng.getrandbits(128), version=4))
        if known is not None and self.rng.random() < 0.1 and known.requests:
            fields["request_id"] = self.rng.choice(list(known.requests))
        if known is not None and self.rng.random() < 0.2:
            fields["expected_version"] = known.version + self.rng.choice((0, 0, 1))
        return fields

    def call(self, method, request, model):
        """Both answer: the response and what is due, or None twice where both refuse."""
        brief = str(request).replace("\n", " ")[:200]
        self.said.append(f"{method} {brief}")
        try:
            due = model()
        except Refused as refused:
            due = refused
        try:
            answer = getattr(self.server.stub, method)(request, timeout=60)
        except grpc.RpcError as error:
            self.said[-1] += f" -> {error.code().name}"
            what = due.code if isinstance(due, Refused) else "an answer"
            self.test.assertEqual(error.code(), what, error.details())
            return None, None
        self.test.assertFalse(isinstance(due, Refused), f"answered, but {due} is due")
        self.said[-1] += f" -> version {getattr(answer, 'version', '')}"
        return answer, due

    def close(self, layer, got, due, what):
        tolerance = 1e-9 if layer.dtype == torch.float64 else 3e-4
        due = due.detach().double()
        self.test.assertEqual(list(got.shape), list(due.shape), what)
        bound = tolerance * max(1.0, due.abs().max().item())
        off = (got.double() - due).abs().max().item()
        self.test.assertLessEqual(off, bound, f"{what}: {got} is not {due}")

    def changed(self, method, request, edit):
        """A change without tensors: `edit` makes it in the instance, true where it did."""
        def model():
            instance = self.find(request.name)
            known = instance.check(method, request.request_id, expected_of(request))
            if known is not None:
                return known, True
            edit(instance)
            return instance.version, False
        answer, due = self.call(method, request, model)
        if answer is not None:
            self.test.assertEqual((answer.version, answer.replayed), due)
        return answer, due

    # --- the calls ---

    def create(self):
        name = self.rng.choice((*NAMES, *NAMES, "a/../b"))
        layer = random_layer(self.rng)
        training = self.rng.random() < 0.8
        fields = {key: value for key, value in self.options(name).items() if key == "request_id"}
        request = rpc.CreateInstanceRequest(name=name, config=layer.config(),
                                            mode=TRAIN if training else EVAL, **fields)

        def model():
            if ".." in name:
                raise Refused(Code.INVALID_ARGUMENT)
            if name in self.instances:
                known = self.instances[name].requests.get(request.request_id)
                if known is None:
                    raise Refused(Code.ALREADY_EXISTS)
                if known[0] != "create":
                    raise Refused(Code.INVALID_ARGUMENT)
                return 1, True
            if len(self.instances) >= MOST:
                raise Refused(Code.RESOURCE_EXHAUSTED)
            self.instances[name] = Instance(layer, training, request.request_id)
            return 1, False
        answer, due = self.call("CreateInstance", request, model)
        if answer is not None:
            self.test.assertEqual((answer.version, answer.replayed), due)

    def delete(self):
        name = self.name()
        fields = self.options(name)
        if self.removals and self.rng.random() < 0.3:
            name = self.rng.choice(sorted(self.removals))
            fields = {"request_id": self.removals[name][0]}
        request = rpc.DeleteInstanceRequest(name=name, **fields)

        def model():
            removal = self.removals.get(name)
            if removal is not None and removal[0] == request.request_id:
                return removal[1], True
            instance = self.find(name)
            expected = expected_of(request)
            if expected is not None and expected != instance.version:
                raise Refused(Code.ABORTED)
            if request.request_id in instance.requests:
                raise Refused(Code.INVALID_ARGUMENT)
            del self.instances[name]
            if request.request_id:
                self.removals[name] = (request.request_id, instance.version)
            return instance.version, False
        answer, due = self.call("DeleteInstance", request, model)
        if answer is not None:
            self.test.assertEqual((answer.version, answer.replayed), due)

    def mode(self):
        name, training = self.name(), self.rng.random() < 0.6
        method, kind = ("Train", rpc.TrainRequest) if training else ("Eval", rpc.EvalRequest)
        request = kind(name=name, **self.options(name))

        def edit(instance):
            instance.training = training
            instance.change(request.request_id, method)
        self.changed(method, request, edit)

    def forward(self):
        name = self.name()
        layer = self.instances[name].layer if name in self.instances else random_layer(self.rng)
        shape = layer.batch_shape(self.rng)
        fault = self.rng.choice(("shape", "one value", "bytes")) if self.rng.random() < 0.06 else ""
        if fault == "shape":
            shape[-1 if layer.channels is None else 1] += 1
        elif fault == "one value" and layer.channels is not None:
            shape = [1] + [1 if axis > 1 else size for axis, size in enumerate(shape)][1:]
        x = self.tensor(shape, layer)
        residual = self.tensor(shape, layer) if self.rng.random() < 0.2 else None
        relu = self.rng.random() < 0.2
        mode = self.rng.choice((0, 0, TRAIN, EVAL))
        save = self.rng.random() < 0.6
        request = rpc.ForwardRequest(
            name=name, input=to_proto(x), mode=mode, save_for_backward=save,
            activation=rpc.ACTIVATION_RELU if relu else rpc.ACTIVATION_NONE,
            return_batch_statistics=True, **self.options(name))
        if residual is not None:
            request.residual.CopyFrom(to_proto(residual))
        if fault == "bytes":
            request.input.data = request.input.data[:-1]
        x, residual = x.double(), None if residual is None else residual.double()

        def model():
            if fault == "bytes" and ".." not in name and "//" not in name and name:
                raise Refused(Code.INVALID_ARGUMENT)
            instance = self.find(name)
            known = instance.requests.get(request.request_id)
            training = instance.training if mode == 0 else mode == TRAIN
            if known is not None and known[0] == "forward":
                training = True  # what is remembered has folded
                # Whoever repeats a call learns first of all that it was applied.
                if instance.parameters_version > known[1]:
                    raise Refused(Code.FAILED_PRECONDITION)
            if fault == "shape":
                raise Refused(Code.INVALID_ARGUMENT)
            by_batch = layer.by_batch(training)
            if by_batch and values_a_set(layer, shape) == 1:
                raise Refused(Code.FAILED_PRECONDITION)
            folds = layer.folds(training)
            version = None
            if folds or expected_of(request) not in (None, instance.version):
                version = instance.check("forward", request.request_id, expected_of(request))
            output = instance.forward(x, training, residual, relu)
            context = (x, instance.values(), by_batch, residual, relu)
            if folds and version is None:
                instance.fold(x)
                instance.change(request.request_id, "forward")
            return output, version or instance.version, version is not None, context, training
        answer, due = self.call("Forward", request, model)
        if answer is None:
            return
        output, version, replayed, context, training = due
        instance = self.instances[name]
        self.test.assertEqual((answer.version, answer.replayed), (version, replayed))
        self.test.assertEqual(answer.mode, TRAIN if training else EVAL)
        if not replayed:
            self.test.assertEqual(answer.num_batches_tracked, instance.batches)
        self.close(layer, from_proto(answer.output), output, "output")
        self.test.assertEqual(bool(answer.context_id), save)
        if save:
            instance.contexts[answer.context_id] = context
        self.resync(name)

    def backward(self):
        name = self.name()
        instance = self.instances.get(name)
        contexts = {} if instance is None else instance.contexts
        options = {key: value for key, value in self.options(name).items()
                   if key != "request_id" or instance is None or value not in instance.requests}
        fields = dict(accumulate=self.rng.random() < 0.7, skip_grad_input=self.rng.random() < 0.3,
                      **options)
        if contexts and self.rng.random() < 0.9:
            context_id = self.rng.choice(sorted(contexts))
            context = contexts[context_id]
            retain = self.rng.random() < 0.3
            fields |= dict(context_id=context_id, retain_context=retain)
        elif self.rng.random() < 0.2:
            fields |= dict(context_id=self.rng.choice(("0" * 32, "x")))
            context = None
        elif instance is not None:
            layer = instance.layer
            x = self.tensor(layer.batch_shape(self.rng), layer)
            by_batch = layer.by_batch(self.rng.random() < 0.6)
            context = (x.double(), instance.values(), by_batch, None, False)
            fields |= dict(input=to_proto(x), mode=TRAIN if by_batch else EVAL)
        else:
            context = None
        layer = instance.layer if instance is not None else random_layer(self.rng)
        shape = context[0].shape if context is not None else layer.batch_shape(self.rng)
        shape = list(shape)
        wrong = self.rng.random() < 0.04
        if wrong:
            shape[0] += 1
        grad = self.tensor(shape, layer)
        request = rpc.BackwardRequest(name=name, grad_output=to_proto(grad), **fields)

        def model():
            if context is None and not request.context_id and name and ".." not in name:
                if "//" not in name:
                    raise Refused(Code.INVALID_ARGUMENT)  # neither context nor input
            instance = self.find(name)
            if context is None:
                raise Refused(Code.NOT_FOUND)
            if wrong:
                raise Refused(Code.INVALID_ARGUMENT)
            if fields["accumulate"] or expected_of(request) not in (None, instance.version):
                instance.check("backward", request.request_id, expected_of(request))
            grads = instance.backward(context, grad.double())
            if fields["accumulate"] and layer.has_weight:
                instance.accumulate(grads)
                instance.change(request.request_id, "backward")
            if request.context_id and not request.retain_context:
                del instance.contexts[request.context_id]
            return grads
        answer, grads = self.call("Backward", request, model)
        if answer is None:
            return
        self.test.assertEqual((answer.version, answer.replayed), (instance.version, False))
        if fields["skip_grad_input"]:
            self.test.assertFalse(answer.HasField("grad_input"))
            grads.pop("grad_input")
        for key in ("grad_input", "grad_weight", "grad_bias", "grad_residual"):
            self.test.assertEqual(answer.HasField(key), key in grads, key)
            if key in grads:
                self.close(layer, from_proto(getattr(answer, key)), grads[key], key)
        self.resync(name)

    def zero_grad(self):
        name, to_none = self.name(), self.rng.random() < 0.5
        request = rpc.ZeroGradRequest(name=name, set_to_none=to_none, **self.options(name))

        def edit(instance):
            for key, grad in instance.gradients().items():
                instance.tensors[key].grad = None if to_none else torch.zeros_like(grad)
            instance.change(request.request_id, "ZeroGrad")
        self.changed("ZeroGrad", request, edit)

    def step(self):
        name = self.name()
        instance = self.instances.get(name)
        rule = instance and instance.rule
        if rule is None or self.rng.random() < 0.1:
            rule = self.rng.choice(sorted(OPTIMIZERS))
        reset, zero_grad = self.rng.random() < 0.1, self.rng.random() < 0.3
        request = rpc.StepRequest(name=name, optimizer=optimizer_message(rule, OPTIMIZERS[rule]),
                                  reset_optimizer=reset, zero_grad=zero_grad, **self.options(name))
        stepped = None

        def edit(instance):
            nonlocal stepped
            stepped, made = instance.step(rule, OPTIMIZERS[rule], reset, zero_grad)
            if made:
                instance.change(request.request_id, "Step" if stepped else "Step/reset",
                                parameters=stepped)
        answer, due = self.changed("Step", request, edit)
        if answer is not None:
            if due[1]:
                stepped = self.instances[name].requests[request.request_id][0] == "Step"
            self.test.assertEqual(answer.stepped, stepped)
            self.resync(name)

    def get_state(self):
        name = self.name()
        answer, instance = self.call("GetInstance", rpc.GetInstanceRequest(name=name),
                                     lambda: self.find(name))
        if answer is not None:
            told = answer.instance
            self.test.assertEqual((told.version, told.mode == TRAIN, told.num_batches_tracked,
                                   told.has_gradients, told.optimizer),
                                  (instance.version, instance.training, instance.batches,
                                   bool(instance.gradients()), instance.rule or ""))
            self.compare_state(name)

    def compare_state(self, name):
        instance = self.instances[name]
        answer = self.server.stub.GetState(rpc.GetStateRequest(
            name=name, include_gradients=True, include_optimizer=True))
        self.test.assertEqual(answer.version, instance.version, name)
        optimizer = {}
        if instance.optimizer is not None:
            keys = [key for key in ("weight", "bias") if key in instance.tensors]
            for key in keys:
                for slot, value in instance.optimizer.state[instance.tensors[key]].items():
                    if value is not None:
                        optimizer[f"{key}.{slot}"] = torch.as_tensor(value)
        for got, due in ((state_dict(answer.state.state_dict), instance.state_dict()),
                         (state_dict(answer.state.gradients), instance.gradients()),
                         (state_dict(answer.state.optimizer_state), optimizer)):
            self.test.assertEqual(sorted(got), sorted(due), name)
            for key in due:
                self.close(instance.layer, got[key].squeeze() if due[key].dim() == 0 else got[key],
                           due[key], f"{name}'s {key}")

    def resync(self, name):
        """A float32 instance is compared and taken over: its roundings are its own."""
        instance = self.instances[name]
        if instance.layer.dtype == torch.float64 or self.rng.random() < 0.3:
            return
        self.compare_state(name)
        answer = self.server.stub.GetState(rpc.GetStateRequest(name=name, include_gradients=True))
        for key, value in state_dict(answer.state.state_dict).items():
            if key in ("weight", "bias"):
                instance.put(key, value.double())
            elif key != "num_batches_tracked":
                instance.tensors[key] = value.double()
        for key, value in state_dict(answer.state.gradients).items():
            instance.tensors[key].grad = value.double()

    def set_state(self):
        name = self.name()
        instance = self.instances.get(name)
        layer = instance.layer if instance is not None else random_layer(self.rng)
        due = Instance(layer, True, "").state_dict()
        for key in due:
            if key == "num_batches_tracked":
                due[key] = torch.tensor(self.rng.randrange(100))
            else:
                value = self.tensor(layer.shape, layer)
                due[key] = value.abs() if key == "running_var" else value
        fault = self.rng.choice(("missing", "unexpected", "shape", "negative")) \
            if self.rng.random() < 0.3 else ""
        sent = dict(due)
        if fault == "missing" and sent:
            del sent[sorted(sent)[0]]
        elif fault == "unexpected":
            sent["more"] = torch.ones(1, dtype=layer.dtype)
        elif fault == "shape" and layer.has_weight:
            sent["weight"] = torch.ones(17, dtype=layer.dtype)
        elif fault == "negative" and layer.tracked:
            sent["running_var"] = -sent["running_var"] - 1
        else:
            fault = ""
        request = rpc.SetStateRequest(name=name, state=instance_pb2.State(state_dict=named(sent)),
                                      **self.options(name))

        def edit(instance):
            if fault:
                raise Refused(Code.INVALID_ARGUMENT if fault == "negative"
                              else Code.FAILED_PRECONDITION)
            for key, value in due.items():
                if key == "num_batches_tracked":
                    instance.batches = int(value)
                elif key in ("weight", "bias"):
                    instance.put(key, value.double())
                else:
                    instance.tensors[key] = value.double()
            instance.change(request.request_id, "SetState", parameters=True)
        self.changed("SetState", request, edit)

    def reset(self):
        name, parameters = self.name(), self.rng.random() < 0.5
        method, kind = (("ResetParameters", rpc.ResetParametersRequest) if parameters
                        else ("ResetRunningStats", rpc.ResetRunningStatsRequest))
        request = kind(name=name, **self.options(name))

        def edit(instance):
            instance.reset(parameters)
            instance.change(request.request_id, method, parameters=parameters)
        self.changed(method, request, edit)

    def list(self):
        prefix = self.rng.choice(("", "net/", "a", "zzz"))
        answer, due = self.call(
            "ListInstances", rpc.ListInstancesRequest(name_prefix=prefix, page_size=1000),
            lambda: [(name, self.instances[name].version) for name in sorted(self.instances)
                     if name.startswith(prefix)])
        self.test.assertEqual([(one.name, one.version) for one in answer.instances], due)
        self.test.assertEqual(answer.total_count, len(self.instances))

    def save(self):
        answer, _ = self.call("SaveCheckpoint", rpc.SaveCheckpointRequest(), lambda: None)
        self.test.assertEqual(answer.checkpoint.instance_count, len(self.instances))
        self.checkpoints[answer.checkpoint.id] = {name: instance.copy() for name, instance
                                                  in self.instances.items()}
        for old in sorted(self.checkpoints)[:-KEPT]:
            del self.checkpoints[old]

    def load(self):
        checkpoint = self.rng.choice(("", *self.checkpoints, "99999999-manual", "nonsense"))
        names = ([] if self.rng.random() < 0.5
                 else self.rng.sample(NAMES, self.rng.randrange(1, 3)))
        request = rpc.LoadCheckpointRequest(checkpoint_id=checkpoint, names=names)

        def model():
            if checkpoint == "nonsense":
                raise Refused(Code.INVALID_ARGUMENT)
            found = self.checkpoints.get(checkpoint or max(self.checkpoints, default=""))
            if found is None or not set(names) <= set(found):
                raise Refused(Code.NOT_FOUND)
            wanted = sorted(names or found)
            if len(set(self.instances) | set(wanted)) > MOST and set(wanted) - set(self.instances):
                raise Refused(Code.RESOURCE_EXHAUSTED)
            for name in wanted:
                if name in self.instances:
                    self.instances[name].replace(found[name])
                else:
                    self.instances[name] = found[name].copy()
            return [(name, self.instances[name].version) for name in wanted]
        answer, due = self.call("LoadCheckpoint", request, model)
        if answer is not None:
            self.test.assertEqual([(one.name, one.version) for one in answer.instances], due)

    def kill(self):
        self.said.append("kill -9 and restart")
        self.server.kill()
        self.server.start()
        for instance in self.instances.values():
            instance.contexts = {}
        for name in self.instances:
            self.compare_state(name)


def expected_of(request):
    return request.expected_version if request.HasField("expected_version") else None


def values_a_set(layer, shape):
    """Values that share a mean, where one alone is refused: in torch too."""
    size = 1
    for axis, extent in enumerate(shape):
        if axis > 1 or axis == 0 and layer.of_batch:
            size *= extent
    return size if layer.of_batch or layer.kind == "instance_norm_2d" else 0


class Stateful(unittest.TestCase):
    def round(self, seed):
        server = Server("--durability=update", "--checkpoint_interval=24h",
                        f"--max_instances={MOST}", f"--keep_checkpoints={KEPT}")
        self.addCleanup(server.close)
        server.start()
        Round(self, server, seed).run(CALLS)
        server.close()

    def test_each_answer_is_the_models(self):
        began, rounds = time.monotonic(), 0
        while rounds == 0 or time.monotonic() - began < SECONDS:
            with self.subTest(round=rounds):
                self.round(f"stateful/{rounds}")
            rounds += 1
        print(f"\n{rounds} rounds of {CALLS} calls")


if __name__ == "__main__":
    unittest.main()
