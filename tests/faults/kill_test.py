"""Kills a real server under load, again and again, and holds it to what it acknowledged.

Clients call two instances from threads and retry each call, with its request id, until it is
answered, through as many lives of the server as that takes. The record of all calls and of the
states found after each restart must be linearizable, and nothing acknowledged may be missing
(history.py). More kills than in the tests: run.sh --kills 300.
"""

import os
import random
import subprocess
import threading
import time
import unittest
import uuid

import grpc
import numpy
import torch
from normd.v1 import instance_pb2, norm_service_pb2 as rpc

from faults.history import Call, Restart, age_of_lost, check
from faults.model import CHANNELS, Model, batch, new_state
from harness.errors import error_detail
from harness.layer import batch_norm_2d
from harness.server import Server, environment
from harness.tensors import from_proto, named, state_dict, to_proto

KILLS = int(os.environ.get("NORMD_KILLS", "20"))
CLIENTS = 4
# Train-mode forwards are the only change of the first two; the third gets every one there is.
TRAINED, AVERAGED, MIXED = "trained", "averaged", "mixed"
MOMENTUM = {TRAINED: 0.1, AVERAGED: None, MIXED: 0.1}  # None: the cumulative average
KINDS = {
    TRAINED: ["forward"] * 9 + ["get_state"],
    AVERAGED: ["forward"] * 9 + ["get_state"],
    MIXED: ["forward"] * 6 + ["eval", "get_state"] * 2 + ["set_state", "reset_running_stats",
                                                          "reset_parameters"],
}


def send(stub, name, kind, seed, request_id):
    """Makes a call; returns its response and what it answers, as the model says it."""
    if kind in ("forward", "eval"):
        mode = (instance_pb2.MODE_TRAIN if kind == "forward" else instance_pb2.MODE_EVAL)
        response = stub.Forward(rpc.ForwardRequest(
            name=name, input=to_proto(torch.from_numpy(batch(seed))), mode=mode,
            return_batch_statistics=kind == "forward",
            request_id=request_id if kind == "forward" else ""), timeout=20)
        answer = {"output": from_proto(response.output).numpy()}
        if kind == "forward":
            answer["num_batches_tracked"] = response.num_batches_tracked
            answer["statistics"] = {"mean": numpy.array(response.batch_statistics.mean),
                                    "var": numpy.array(response.batch_statistics.var)}
        return response, answer
    if kind == "get_state":
        response = stub.GetState(rpc.GetStateRequest(name=name), timeout=20)
        return response, values(response)
    if kind == "set_state":
        tensors = {key: torch.as_tensor(value) for key, value in new_state(seed).items()}
        return stub.SetState(rpc.SetStateRequest(
            name=name, state=instance_pb2.State(state_dict=named(tensors)),
            request_id=request_id), timeout=20), {}
    method, request = {
        "reset_running_stats": (stub.ResetRunningStats, rpc.ResetRunningStatsRequest),
        "reset_parameters": (stub.ResetParameters, rpc.ResetParametersRequest),
    }[kind]
    return method(request(name=name, request_id=request_id), timeout=20), {}


def values(response):
    found = {key: value.numpy() for key, value in state_dict(response.state.state_dict).items()}
    found["num_batches_tracked"] = int(found["num_batches_tracked"])
    return found


class Lives:
    """The lives of one server, one after another. Thread-safe."""

    def __init__(self, server):
        self.server = server
        self.changed = threading.Condition()
        self.random = random.Random(KILLS)
        self.epoch = 0
        self.stub = server.stub
        self.restarts = {name: [] for name in KINDS}

    def now(self):
        with self.changed:
            return self.epoch, self.stub

    def after(self, epoch):
        """Waits until that life is over and the next one has begun."""
        with self.changed:
            self.changed.wait_for(lambda: self.epoch > epoch, timeout=60)

    def kill_and_start(self):
        killed_at = time.monotonic_ns()
        self.server.kill()
        while self.random.random() < 0.25:  # now and then the next one dies while it starts
            with open(self.server.log_file, "ab") as log:
                starting = subprocess.Popen(self.server.command(), stdin=subprocess.DEVNULL,
                                            stdout=log, stderr=log, env=environment())
            time.sleep(self.random.uniform(0, 0.06))
            starting.kill()
            starting.wait()
        self.server.start()
        for name, restarts in self.restarts.items():
            found = self.server.stub.GetState(rpc.GetStateRequest(name=name))
            restarts.append(Restart(killed_at, found.version, values(found)))
        with self.changed:
            self.epoch += 1
            self.stub = self.server.stub
            self.changed.notify_all()


class Client(threading.Thread):
    """Calls until it is told to stop, and records."""

    def __init__(self, lives, seed):
        super().__init__(daemon=True)
        self.lives = lives
        self.random = random.Random(seed)
        self.calls = {name: [] for name in KINDS}
        self.stopped = threading.Event()
        self.error = None

    def run(self):
        try:
            while not self.stopped.is_set():
                name = self.random.choice(list(KINDS))
                self.calls[name].append(self.call(name, self.random.choice(KINDS[name])))
        except Exception as error:  # told by the test
            self.error = error

    def call(self, name, kind):
        seed = self.random.randrange(1 << 30)
        request_id = str(uuid.UUID(int=self.random.getrandbits(128), version=4))
        begin = time.monotonic_ns()
        while True:
            epoch, stub = self.lives.now()
            try:
                response, answer = send(stub, name, kind, seed, request_id)
            except (grpc.RpcError, ValueError) as error:  # ValueError: the channel is closed
                detail = error_detail(error) if isinstance(error, grpc.RpcError) else None
                if detail is not None and detail.applied_version:
                    # It counts, and its output cannot be told any more.
                    return Call(kind, begin, time.monotonic_ns(), detail.applied_version, seed, {},
                                epoch, True)
                if isinstance(error, grpc.RpcError) and error.code() not in (
                        grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                    raise
                self.lives.after(epoch)
                continue
            return Call(kind, begin, time.monotonic_ns(), response.version, seed, answer, epoch,
                        getattr(response, "replayed", False))


class Killed(unittest.TestCase):
    def under_load(self, *flags):
        """KILLS kills under load; returns the calls and restarts of each instance."""
        server = Server(*flags)
        self.addCleanup(server.close)
        server.start()
        for name in KINDS:
            server.stub.CreateInstance(rpc.CreateInstanceRequest(
                name=name, config=batch_norm_2d(CHANNELS, momentum=MOMENTUM[name])))
        if "--durability=update" not in flags:
            time.sleep(1)  # until the instances are on disk
        lives = Lives(server)
        clients = [Client(lives, seed) for seed in range(CLIENTS)]
        for client in clients:
            client.start()
        for _ in range(KILLS):
            time.sleep(lives.random.uniform(0.05, 0.6))
            lives.kill_and_start()
        for client in clients:
            client.stopped.set()
        for client in clients:
            client.join(60)
            self.assertFalse(client.is_alive(), "a call was never answered")
            if client.error is not None:
                raise client.error
        calls = {name: sum((client.calls[name] for client in clients), []) for name in KINDS}
        return server, calls, lives.restarts

    def test_with_update_nothing_acknowledged_is_lost_and_each_batch_counts_once(self):
        server, calls, restarts = self.under_load("--durability=update")
        for name in KINDS:
            self.assertGreater(len(calls[name]), KILLS)
            found = server.stub.GetState(rpc.GetStateRequest(name=name))
            # What there is in the end is judged like one more restart.
            end = Restart(time.monotonic_ns(), found.version, values(found))
            problems = check(Model(MOMENTUM[name]), calls[name], [*restarts[name], end])
            self.assertEqual(problems, [], name)
            # Each call had an id of its own, however often it was sent.
            changes = sum(call.changes for call in calls[name])
            self.assertEqual(found.version, 1 + changes)
            if name != MIXED:
                self.assertEqual(end.state["num_batches_tracked"], changes)
        replayed = sum(call.replayed for each in calls.values() for call in each)
        print(f"\n{KILLS} kills, {sum(map(len, calls.values()))} calls, {replayed} of them answered "
              "again after a kill: none lost")
        if KILLS >= 20:
            self.assertGreater(replayed, 0, "no kill came between a change and its answer")

    def test_with_interval_nothing_older_than_it_is_lost(self):
        # A commit has half the interval, and here as long again as a busy disk may take.
        interval_ns, commit_ns = 300_000_000, 1_000_000_000
        _, calls, restarts = self.under_load("--durability=interval", "--checkpoint_interval=300ms")
        for name in KINDS:
            problems = check(Model(MOMENTUM[name]), calls[name], restarts[name],
                             may_lose_ns=interval_ns + commit_ns)
            self.assertEqual(problems, [], name)
        oldest = max(age_of_lost(calls[name], restarts[name]) for name in KINDS)
        print(f"\n{KILLS} kills, {sum(map(len, calls.values()))} calls: the oldest change lost was "
              f"{oldest / 1e6:.0f} ms old")
        if KILLS >= 20:
            self.assertGreater(oldest, 0, "no kill came between a change and its commit")


if __name__ == "__main__":
    unittest.main()
