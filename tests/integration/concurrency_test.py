"""Many callers at once: each batch counts once, in one order, and nobody waits for a stranger."""

import queue
import threading
import time
import unittest
from concurrent.futures import ThreadPoolExecutor

import grpc
import torch
from harness import streams
from harness.errors import error_detail, refused
from harness.layer import EVAL, TRAIN, Layer, batch_norm_2d, request_id
from harness.seed import generator, torch_generator
from harness.server import ServerTestCase, eventually
from harness.tensors import from_proto, named, to_proto
from normd.v1 import instance_pb2, norm_service_pb2 as rpc, norm_service_pb2_grpc, optimizer_pb2, tensor_pb2

CALLS = 100
CHANNELS = 6


class ConcurrencyCase(ServerTestCase):
    def setUp(self):
        super().setUp()
        self.rng = torch_generator(generator(self.id()))
        # Connections of their own: one connection's calls share a pipe.
        self.channels = [self.server.connect() for _ in range(8)]
        for channel in self.channels:
            self.addCleanup(channel.close)

    def stubs(self, count):
        return [norm_service_pb2_grpc.NormServiceStub(self.channels[index % len(self.channels)])
                for index in range(count)]

    def batch(self, index=0):
        return torch.randn(4, CHANNELS, 9, 7, generator=self.rng) * 2 + index % 5

    def layer(self, **arguments):
        return Layer.create(self.stub, f"{self._testMethodName}/{request_id()}", CHANNELS,
                            **arguments)

    def at_once(self, calls):
        """Starts every call before the first is waited for; their answers in order."""
        with ThreadPoolExecutor(32) as pool:
            return [future.result() for future in [pool.submit(call) for call in calls]]


class OneInstance(ConcurrencyCase):
    def forwards(self, layer, batches, **fields):
        requests = [rpc.ForwardRequest(name=layer.name, input=to_proto(x), **fields)
                    for x in batches]
        return self.at_once([lambda stub=stub, request=request: stub.Forward(request)
                             for stub, request in zip(self.stubs(len(requests)), requests)])

    def test_100_forwards_count_100_and_average_exactly(self):
        layer = self.layer(momentum=None)
        batches = [self.batch(index) for index in range(CALLS)]
        answers = self.forwards(layer, batches)

        self.assertEqual(sorted(answer.version for answer in answers), list(range(2, CALLS + 2)))
        self.assertEqual(sorted(answer.num_batches_tracked for answer in answers),
                         list(range(1, CALLS + 1)))
        state = layer.state_dict()
        self.assertEqual(state["num_batches_tracked"].item(), CALLS)
        mean = torch.stack([x.double().mean((0, 2, 3)) for x in batches]).mean(0)
        var = torch.stack([x.double().var((0, 2, 3)) for x in batches]).mean(0)
        # 100 roundings to float32.
        self.assertLess((state["running_mean"] - mean).abs().max().item(), 3e-6)
        self.assertLess((state["running_var"] / var - 1).abs().max().item(), 3e-6)
        for x, answer in zip(batches, answers):
            due = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
            self.assertLess((from_proto(answer.output) - due).abs().max().item(), 1e-5)

    def test_the_average_is_that_of_pytorch_in_the_order_of_versions(self):
        for momentum in (None, 0.1):
            layer = self.layer(momentum=momentum, dtype=torch.float64)
            batches = [self.batch(index).double() for index in range(CALLS)]
            answers = self.forwards(layer, batches)
            module = torch.nn.BatchNorm2d(CHANNELS, momentum=momentum, dtype=torch.float64)
            for _, x in sorted(zip([answer.version for answer in answers], batches),
                               key=lambda pair: pair[0]):
                module(x)
            for key, value in layer.state_dict().items():
                self.assertLess((value - module.state_dict()[key]).abs().max().item(), 1e-13,
                                f"{key}, momentum {momentum}")

    def test_forwards_steps_and_modes_interleave_in_one_order(self):
        layer = self.layer()
        sgd = optimizer_pb2.Optimizer(sgd=optimizer_pb2.Sgd(lr=1e-3))
        calls, names = [], layer.name
        for index, stub in enumerate(self.stubs(90)):
            x = self.batch(index)
            calls.append([
                lambda s=stub, x=x: s.Forward(rpc.ForwardRequest(
                    name=names, input=to_proto(x), mode=TRAIN)),
                lambda s=stub, x=x: s.Backward(rpc.BackwardRequest(
                    name=names, input=to_proto(x), grad_output=to_proto(x), mode=TRAIN,
                    accumulate=True)),
                lambda s=stub: s.Step(rpc.StepRequest(name=names, optimizer=sgd)),
                lambda s=stub: s.Eval(rpc.EvalRequest(name=names)),
                lambda s=stub: s.Train(rpc.TrainRequest(name=names)),
                lambda s=stub: s.ZeroGrad(rpc.ZeroGradRequest(name=names)),
            ][index % 6])
        answers = self.at_once(calls)
        changes = [answer.version for index, answer in enumerate(answers)
                   if index % 6 != 2 or answer.stepped]
        self.assertEqual(len(set(changes)), len(changes), "two changes made one version")
        self.assertEqual(layer.info().version, max(changes))
        self.assertEqual(layer.info().version, 1 + len(changes))
        self.assertEqual(layer.info().num_batches_tracked, 15)

    def test_gradients_of_concurrent_backwards_add_up(self):
        layer = self.layer(dtype=torch.float64)
        batches = [self.batch(index).double() for index in range(40)]
        answers = self.at_once([
            lambda stub=stub, x=x: Layer(stub, layer.name).backward(x.cos(), x=x, accumulate=True)
            for stub, x in zip(self.stubs(40), batches)])
        self.assertEqual(sorted(answer.version for answer in answers), list(range(2, 42)))
        for key in ("weight", "bias"):
            due = sum(from_proto(getattr(answer, f"grad_{key}")) for answer in answers)
            self.assertLess((layer.gradients()[key] - due).abs().max().item(), 1e-9)

    def test_one_request_id_of_many_callers_counts_once(self):
        layer = self.layer()
        answers = self.forwards(layer, [self.batch()] * 20,
                                request_id=request_id())
        self.assertEqual({answer.version for answer in answers}, {2})
        self.assertEqual([answer.replayed for answer in answers].count(False), 1)
        self.assertEqual(len({answer.output.data for answer in answers}), 1)
        self.assertEqual(layer.info().num_batches_tracked, 1)

    def test_of_many_with_one_expected_version_one_wins(self):
        layer = self.layer()
        x = self.batch()

        def call(stub):
            try:
                return stub.Forward(rpc.ForwardRequest(name=layer.name, input=to_proto(x),
                                                       expected_version=1)).version
            except grpc.RpcError as error:
                self.assertEqual(error.code(), grpc.StatusCode.ABORTED, error.details())
                self.assertEqual(error_detail(error).current_version, 2)
                return None
        outcomes = self.at_once([lambda stub=stub: call(stub) for stub in self.stubs(20)])
        self.assertEqual(sorted(outcomes, key=str), [2] + [None] * 19)
        self.assertEqual(layer.info().num_batches_tracked, 1)

    def test_of_many_creates_of_one_name_one_wins(self):
        def call(stub):
            try:
                return stub.CreateInstance(rpc.CreateInstanceRequest(
                    name="contended", config=batch_norm_2d(3))).instance.uid
            except grpc.RpcError as error:
                self.assertEqual(error.code(), grpc.StatusCode.ALREADY_EXISTS)
                return None
        outcomes = self.at_once([lambda stub=stub: call(stub) for stub in self.stubs(20)])
        winners = [uid for uid in outcomes if uid]
        self.assertEqual(winners, [Layer(self.stub, "contended").info().uid])

    def test_a_state_is_read_from_one_version(self):
        """GetState beside SetState: never a mix of two."""
        layer = self.layer()
        base = layer.state_dict()
        stop = threading.Event()

        def write(stub):
            value = 0
            while not stop.is_set():
                value += 1
                same = torch.full((CHANNELS,), float(value))
                Layer(stub, layer.name).load_state_dict(
                    {**base, "weight": same, "bias": same, "running_mean": same,
                     "running_var": same, "num_batches_tracked": torch.tensor(value)})
        with ThreadPoolExecutor(2) as pool:
            writers = [pool.submit(write, stub) for stub in self.stubs(1)]
            try:
                for _ in range(200):
                    got = layer.state_dict()
                    values = {value for key in ("weight", "bias", "running_mean")
                              for value in got[key].tolist()}
                    self.assertLessEqual(len(values), 2 if values & {0.0, 1.0} else 1, values)
                    if got["num_batches_tracked"].item():
                        self.assertEqual(values, {float(got["num_batches_tracked"].item())})
            finally:
                stop.set()
            for writer in writers:
                writer.result()


class Retries(ConcurrencyCase):
    """A request_id sent three times, across a clean restart too, counts once."""

    def three_times(self, layer, call):
        """The answers to a call with one id: twice at once, once after a restart."""
        again = request_id()
        answers = [call(layer, again), call(layer, again)]
        info = layer.info()
        self.server.restart()
        type(self).stub = layer.stub = self.server.stub
        answers.append(call(layer, again))
        self.assertEqual([answer.replayed for answer in answers], [False, True, True])
        self.assertEqual(len({answer.version for answer in answers}), 1)
        self.assertEqual(layer.info(), info)
        return answers

    def test_forward(self):
        layer = self.layer()
        layer.forward(self.batch())
        x = self.batch(3)
        answers = self.three_times(layer, lambda layer, id: layer.forward(x, request_id=id))
        self.assertEqual(len({answer.output.data for answer in answers}), 1)
        self.assertEqual({answer.num_batches_tracked for answer in answers}, {2})
        self.assertEqual({answer.mode for answer in answers}, {TRAIN})

    def test_a_late_retry_of_a_forward_is_answered_as_the_first(self):
        layer = self.layer()
        x, again = self.batch(), request_id()
        first = layer.forward(x, request_id=again, statistics=True)
        for index in range(5):
            layer.forward(self.batch(index))
        late = layer.forward(x, request_id=again, statistics=True)
        self.assertTrue(late.replayed)
        self.assertEqual((late.version, late.num_batches_tracked), (2, 1))
        self.assertEqual(late.output.data, first.output.data)
        self.assertEqual(late.batch_statistics, first.batch_statistics)
        self.assertEqual(layer.info().num_batches_tracked, 6)

    def test_a_retried_forward_is_answered_as_the_first_whichever_mode_is_set_now(self):
        layer = self.layer()
        x, again = self.batch(), request_id()
        first = layer.forward(x, request_id=again)
        layer.eval()
        late = layer.forward(x, request_id=again)
        self.assertEqual((late.replayed, late.version, late.mode), (True, 2, TRAIN))
        self.assertEqual(late.output.data, first.output.data)

    def test_a_retry_whose_output_can_no_longer_be_told_says_so(self):
        layer = self.layer()
        x, again = self.batch(), request_id()
        layer.forward(x, request_id=again)
        layer.train()
        layer.load_state_dict({**layer.state_dict(), "weight": torch.full((CHANNELS,), 2.0)})
        calls = (lambda: layer.forward(x, request_id=again),
                 lambda: streams.forward(layer.stub, layer.name, x, request_id=again))
        for restarted in (False, True):
            for call in calls:
                with refused(self, grpc.StatusCode.FAILED_PRECONDITION, "request_id") as refusal:
                    call()
                self.assertEqual(refusal.detail.applied_version, 2)
            self.assertEqual(layer.info().num_batches_tracked, 1)
            self.server.restart()
            type(self).stub = layer.stub = self.server.stub

    def test_a_retried_backward_without_a_context_says_so_too(self):
        layer = self.layer()
        x, again = self.batch(), request_id()
        first = layer.backward(x, x=x, mode=TRAIN, accumulate=True, request_id=again)
        layer.forward(self.batch(1))  # changes neither weight nor bias
        late = layer.backward(x, x=x, mode=TRAIN, accumulate=True, request_id=again)
        self.assertEqual((late.replayed, late.grad_input.data), (True, first.grad_input.data))
        layer.load_state_dict({**layer.state_dict(), "weight": torch.full((CHANNELS,), 2.0)})
        with refused(self, grpc.StatusCode.FAILED_PRECONDITION, "request_id") as refusal:
            layer.backward(x, x=x, mode=TRAIN, accumulate=True, request_id=again)
        self.assertEqual(refusal.detail.applied_version, first.version)

    def test_a_retried_forward_gives_a_context_that_works(self):
        layer = self.layer()
        x, again = self.batch(), request_id()
        first = layer.forward(x, request_id=again, save=True)
        second = layer.forward(x, request_id=again, save=True)
        self.assertTrue(first.context_id)
        again = layer.backward(x, second.context_id).grad_input.data
        self.assertEqual(again, layer.backward(x, x=x, mode=TRAIN).grad_input.data)

    def test_backward_that_accumulates(self):
        layer = self.layer()
        x, grad = self.batch(), self.batch()
        answers = self.three_times(layer, lambda layer, id: layer.backward(
            grad, x=x, accumulate=True, request_id=id))
        self.assertEqual(len({answer.grad_input.data for answer in answers}), 1)
        self.assertTrue(torch.equal(layer.gradients()["weight"],
                                    from_proto(answers[0].grad_weight)))

    def test_backward_with_a_context_is_answered_again(self):
        layer = self.layer()
        x, grad, again = self.batch(), self.batch(), request_id()
        context = layer.forward(x, save=True).context_id
        first = layer.backward(grad, context, accumulate=True, request_id=again)
        second = layer.backward(grad, context, accumulate=True, request_id=again)
        self.assertTrue(second.replayed)
        self.assertEqual(second.grad_input.data, first.grad_input.data)
        self.assertEqual(second.version, first.version)
        self.assertTrue(torch.equal(layer.gradients()["weight"], from_proto(first.grad_weight)))

    def test_step(self):
        layer = self.layer()
        layer.backward(self.batch(), x=self.batch(), accumulate=True)
        sgd = optimizer_pb2.Optimizer(sgd=optimizer_pb2.Sgd(lr=0.5, momentum=0.9))
        answers = self.three_times(layer, lambda layer, id: layer.step(sgd, request_id=id))
        self.assertEqual({answer.stepped for answer in answers}, {True})

    def test_a_step_that_only_reset_the_optimizer_did_not_step(self):
        layer = self.layer()
        layer.backward(self.batch(), x=self.batch(), accumulate=True)
        sgd = optimizer_pb2.Optimizer(sgd=optimizer_pb2.Sgd(lr=0.5, momentum=0.9))
        layer.step(sgd, zero_grad=True)
        answers = self.three_times(layer, lambda layer, id: layer.step(
            sgd, reset_optimizer=True, request_id=id))
        self.assertEqual({answer.stepped for answer in answers}, {False})

    def test_the_others(self):
        layer = self.layer()
        layer.backward(self.batch(), x=self.batch(), accumulate=True)
        state = layer.state_dict()
        calls = [
            lambda layer, id: layer.stub.Eval(rpc.EvalRequest(name=layer.name, request_id=id)),
            lambda layer, id: layer.stub.Train(rpc.TrainRequest(name=layer.name, request_id=id)),
            lambda layer, id: layer.zero_grad(request_id=id),
            lambda layer, id: layer.stub.ResetRunningStats(
                rpc.ResetRunningStatsRequest(name=layer.name, request_id=id)),
            lambda layer, id: layer.stub.ResetParameters(
                rpc.ResetParametersRequest(name=layer.name, request_id=id)),
            lambda layer, id: layer.stub.SetState(rpc.SetStateRequest(
                name=layer.name, request_id=id,
                state=instance_pb2.State(state_dict=named(state)))),
        ]
        for call in calls:
            self.three_times(layer, call)

    def test_the_id_of_one_method_is_refused_for_another(self):
        layer = self.layer()
        again = request_id()
        self.stub.Eval(rpc.EvalRequest(name=layer.name, request_id=again))
        with refused(self, grpc.StatusCode.INVALID_ARGUMENT, "request_id"):
            self.stub.Train(rpc.TrainRequest(name=layer.name, request_id=again))
        self.assertEqual(layer.info().version, 2)

    def test_an_id_in_capitals_is_the_same_id(self):
        layer = self.layer()
        again = request_id()
        self.stub.Eval(rpc.EvalRequest(name=layer.name, request_id=again))
        answer = self.stub.Eval(rpc.EvalRequest(name=layer.name, request_id=again.upper()))
        self.assertTrue(answer.replayed)

    def test_a_refused_call_does_not_use_its_id_up(self):
        layer = self.layer()
        again = request_id()
        with refused(self, grpc.StatusCode.ABORTED, "expected_version"):
            layer.forward(self.batch(), request_id=again, expected_version=9)
        answer = layer.forward(self.batch(), request_id=again)
        self.assertFalse(answer.replayed)
        self.assertEqual(layer.info().num_batches_tracked, 1)

    def test_the_last_1024_ids_are_remembered(self):
        layer = self.layer()
        ids = [request_id() for _ in range(1024)]
        for each in ids:
            self.stub.Train(rpc.TrainRequest(name=layer.name, request_id=each))
        version = layer.info().version
        for index in (0, 1, 511, 1023):
            answer = self.stub.Train(rpc.TrainRequest(name=layer.name, request_id=ids[index]))
            self.assertTrue(answer.replayed, index)
            self.assertEqual(answer.version, index + 2)
        self.assertEqual(layer.info().version, version)


class Everything(ConcurrencyCase):
    """32 threads that create, delete, compute and checkpoint under the same few names."""

    FLAGS = ("--durability=update", "--checkpoint_interval=200ms", "--keep_checkpoints=2")
    NAMES = ("a", "b", "c")
    CALLS = 25  # a thread
    # Somebody else was faster.
    LOST = {grpc.StatusCode.NOT_FOUND, grpc.StatusCode.ALREADY_EXISTS, grpc.StatusCode.ABORTED,
            grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT}

    def test_at_once_on_the_same_names(self):
        sgd = optimizer_pb2.Optimizer(sgd=optimizer_pb2.Sgd(lr=1e-3, momentum=0.9))
        outcomes = []

        def work(stub, seed):
            rng = generator(f"{self.id()}/{seed}")
            x = torch.randn(2, 3, 4, 4)
            wider = torch.randn(2, 5, 4, 4)

            def learn(layer, x):
                context = layer.forward(x, save=True, request_id=request_id()).context_id
                layer.backward(x, context, accumulate=True)
                layer.step(sgd, zero_grad=True)

            ways = [
                lambda layer: stub.CreateInstance(rpc.CreateInstanceRequest(
                    name=layer.name, config=batch_norm_2d(rng.choice((3, 5)),
                                                          affine=rng.random() < 0.7))),
                lambda layer: layer.delete(),
                lambda layer: layer.forward(x, mode=TRAIN),
                lambda layer: layer.forward(x, mode=EVAL),
                lambda layer: learn(layer, x),
                lambda layer: learn(layer, wider),
                lambda layer: layer.train(),
                lambda layer: layer.get_state(gradients=True, optimizer=True),
                lambda layer: stub.ListInstances(rpc.ListInstancesRequest()),
                lambda layer: stub.SaveCheckpoint(rpc.SaveCheckpointRequest()),
                lambda layer: stub.LoadCheckpoint(rpc.LoadCheckpointRequest()),
            ]
            for _ in range(self.CALLS):
                try:
                    rng.choice(ways)(Layer(stub, rng.choice(self.NAMES)))
                    outcomes.append(None)
                except grpc.RpcError as error:
                    self.assertIn(error.code(), self.LOST, error.details())
                    outcomes.append(error.code())
        self.at_once([lambda stub=stub, seed=seed: work(stub, seed)
                      for seed, stub in enumerate(self.stubs(32))])
        self.assertEqual(len(outcomes), 32 * self.CALLS)
        self.assertGreater(outcomes.count(None), len(outcomes) / 4)

        # What is left hangs together, and is the same after a kill.
        def left():
            states = {}
            for told in self.server.stub.ListInstances(rpc.ListInstancesRequest()).instances:
                layer = Layer(self.server.stub, told.name)
                channels = told.config.batch_norm_2d.num_features
                state = layer.state_dict()
                for key in ("running_mean", "running_var"):
                    self.assertEqual(list(state[key].shape), [channels])
                    self.assertTrue(state[key].isfinite().all())
                for value in layer.gradients().values():
                    self.assertEqual(list(value.shape), [channels])
                states[told.name] = layer.get_state(gradients=True, optimizer=True)
            return states
        before = left()
        self.server.kill()
        self.server.start()
        type(self).stub = self.server.stub
        self.assertEqual(left(), before)


class OtherInstances(ConcurrencyCase):
    FLAGS = ("--threads=2",)

    def test_a_stream_that_hangs_holds_nobody_up(self):
        """Half a tensor has come; its own instance and others answer meanwhile."""
        own, other = self.layer(), self.layer()
        x = torch.randn(64, CHANNELS, 32, 32)
        message = to_proto(x)
        data, message.data = message.data, b""
        parts = queue.Queue()
        parts.put(rpc.ForwardStreamRequest(header=rpc.ForwardRequest(name=own.name,
                                                                     input=message)))
        parts.put(rpc.ForwardStreamRequest(chunk=data[:len(data) // 2]))
        call = self.stubs(1)[0].ForwardStream(iter(parts.get, None))
        time.sleep(0.2)
        for layer in (own, other):
            for index in range(5):
                self.assertEqual(layer.forward(self.batch()).num_batches_tracked, index + 1)
        parts.put(rpc.ForwardStreamRequest(chunk=data[len(data) // 2:]))
        parts.put(None)
        self.assertEqual(next(call).header.num_batches_tracked, 6)
        self.assertEqual(sum(len(part.chunk) for part in call), len(data))

    def test_a_huge_forward_does_not_delay_another_instance_for_its_duration(self):
        huge, small = self.layer(), self.layer()
        stub, other = self.stubs(2)
        request = rpc.ForwardRequest(name=huge.name,
                                     input=to_proto(torch.randn(64, CHANNELS, 256, 256)))  # 100 MB
        for _ in range(3):
            began = time.monotonic()
            call = stub.Forward.future(request)
            waits = []
            while not call.done():
                at = time.monotonic()
                Layer(other, small.name).forward(self.batch())
                waits.append(time.monotonic() - at)
            took = time.monotonic() - began
            call.result()
            if len(waits) >= 4 and max(waits) < took / 2:
                return
        self.fail(f"{len(waits)} small calls beside one of {took:.2f} s, the longest "
                  f"{max(waits):.2f} s")


class ContextLifetime(ConcurrencyCase):
    FLAGS = ("--context_ttl=1s", "--context_budget=2000000")

    def test_a_context_expires(self):
        layer = self.layer()
        x = self.batch()
        context = layer.forward(x, save=True).context_id
        kept = layer.forward(x, save=True).context_id
        layer.backward(x, kept)
        time.sleep(1.5)
        with refused(self, grpc.StatusCode.NOT_FOUND, "context_id"):
            layer.backward(x, context)

    def test_those_of_a_deleted_instance_give_their_memory_back(self):
        def held():
            return self.stub.GetServerInfo(rpc.GetServerInfoRequest()).memory_in_use
        layer, x = self.layer(), torch.randn(4, CHANNELS, 32, 32)
        before = held()
        contexts = [layer.forward(x, save=True).context_id for _ in range(3)]
        self.assertGreater(held() - before, 3 * x.numel() * 4 - 1)
        layer.delete()
        eventually(lambda: held() <= before)  # gRPC may hold an answer for a moment
        again = Layer.create(self.stub, layer.name, CHANNELS)
        with refused(self, grpc.StatusCode.NOT_FOUND, "context_id"):
            again.backward(x, contexts[0])

    def test_retain_keeps_it_for_more(self):
        layer = self.layer()
        x = self.batch()
        context = layer.forward(x, save=True).context_id
        answers = [layer.backward(x, context, retain_context=True) for _ in range(3)]
        answers.append(layer.backward(x, context))
        self.assertEqual(len({answer.grad_input.data for answer in answers}), 1)
        with refused(self, grpc.StatusCode.FAILED_PRECONDITION, "context_id"):
            layer.backward(x, context)

    def test_the_budget_refuses_and_names_its_flag_and_recovers(self):
        layer = self.layer()
        x = torch.randn(8, CHANNELS, 64, 64)  # 786 kB: two fit
        contexts = [layer.forward(x, save=True).context_id for _ in range(2)]
        count = layer.info().num_batches_tracked
        with refused(self, grpc.StatusCode.RESOURCE_EXHAUSTED, flag="--context_budget") as refusal:
            layer.forward(x, save=True)
        self.assertEqual(refusal.detail.limit, 2000000)
        self.assertEqual(layer.info().num_batches_tracked, count, "a refused call changed something")
        layer.forward(x)  # without a context there is room
        layer.backward(x, contexts[0])
        contexts.append(layer.forward(x, save=True).context_id)
        time.sleep(1.5)  # the others expire
        for _ in range(2):
            layer.forward(x, save=True)

    def test_a_refused_forward_keeps_no_context(self):
        layer = self.layer()
        x = torch.randn(8, CHANNELS, 64, 64)
        for mode in (TRAIN, EVAL):
            for _ in range(4):
                with refused(self, grpc.StatusCode.ABORTED, "expected_version"):
                    layer.forward(x, save=True, mode=mode, expected_version=99)
        layer.backward(x, layer.forward(x, save=True).context_id)

    def test_one_context_of_many_callers_serves_one(self):
        layer = self.layer()
        x = self.batch()
        context = layer.forward(x, save=True).context_id

        def call(stub):
            try:
                Layer(stub, layer.name).backward(x, context, accumulate=True)
                return 1
            except grpc.RpcError as error:
                self.assertEqual(error.code(), grpc.StatusCode.FAILED_PRECONDITION)
                return 0
        self.assertEqual(sum(self.at_once([lambda stub=stub: call(stub)
                                           for stub in self.stubs(16)])), 1)

    def test_a_cancelled_call_is_cancelled_and_a_late_one_too(self):
        layer = self.layer()
        with refused(self, grpc.StatusCode.DEADLINE_EXCEEDED):
            self.stub.Forward(rpc.ForwardRequest(
                name=layer.name, input=to_proto(torch.randn(64, CHANNELS, 128, 128))),
                timeout=0.001)
        self.assertEqual(layer.forward(self.batch(), mode=EVAL).mode, EVAL)


class AtMostSoMany(ServerTestCase):
    """--max_concurrent_requests."""

    FLAGS = ("--max_concurrent_requests=2",)

    def test_one_more_is_told_when_to_come_again_and_gets_in_when_one_has_left(self):
        layer = Layer.create(self.stub, "few", 3)
        x = torch.ones(2, 3, 4, 4)
        go_on = threading.Event()

        def waits():
            yield rpc.ForwardStreamRequest(header=rpc.ForwardRequest(
                name="few", mode=EVAL, input=tensor_pb2.Tensor(
                    dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[2, 3, 4, 4])))
            go_on.wait(60)

        calls = [self.stub.ForwardStream(waits(), timeout=60) for _ in range(2)]
        for call in calls:
            next(call)  # the answer's header: it is under way
        for again in range(20):  # a refused call leaves no place taken
            with refused(self, grpc.StatusCode.RESOURCE_EXHAUSTED,
                         flag="--max_concurrent_requests") as refusal:
                layer.forward(x, mode=EVAL) if again % 2 else list(self.stub.ForwardStream(waits()))
            self.assertGreater(refusal.detail.retry_delay_ms, 0)
        self.assertEqual(layer.info().version, 1)  # calls without tensors go on
        for call in calls:
            call.cancel()
        go_on.set()
        deadline = time.monotonic() + 30
        while True:
            try:
                layer.forward(x, mode=EVAL)
                break
            except grpc.RpcError:
                self.assertLess(time.monotonic(), deadline)
                time.sleep(0.02)


if __name__ == "__main__":
    unittest.main()
