"""The system's clock is set by a day while the server runs, and is behind what is on disk when it
starts: nothing is lost, kept for a day more, or forgotten a day too early."""

import pathlib
import time
import unittest

import grpc
import torch
from faults.model import CHANNELS, batch
from harness.layer import Layer, request_id
from harness.server import NORMD, Server, eventually
from normd.v1 import norm_service_pb2 as rpc

BAD_CLOCK = pathlib.Path(NORMD).resolve().with_name("libnormd_bad_clock.so")
DAY = 24 * 60 * 60
X = torch.from_numpy(batch(1))


class Clock(unittest.TestCase):
    def start(self, ahead, *flags):
        self.assertTrue(BAD_CLOCK.exists(), f"{BAD_CLOCK} is not built")
        self.server = Server(*flags)
        self.addCleanup(self.server.close)
        self.control = self.server.directory / "clock"
        self.server.env = {"LD_PRELOAD": str(BAD_CLOCK), "NORMD_TEST_CLOCK": str(self.control)}
        self.set_clock(ahead)
        self.server.start()
        self.layer = Layer.create(self.server.stub, "a", CHANNELS)
        self.assert_clock(ahead)

    def set_clock(self, ahead):
        # In one step, since the server reads it all the time.
        new = self.control.with_name("new-clock")
        new.write_text(str(ahead))
        new.rename(self.control)

    def assert_clock(self, ahead):
        told = self.layer.info().update_time.seconds - time.time()
        self.assertLess(abs(told - ahead), DAY / 2, "the server has another clock")

    def checkpoints(self):
        """Newest first."""
        return [one.id for one in
                self.server.stub.ListCheckpoints(rpc.ListCheckpointsRequest()).checkpoints]

    def backward(self, context_id):
        return self.layer.backward(X, context_id, retain_context=True)

    def is_forgotten(self, context_id):
        try:
            self.backward(context_id)
        except grpc.RpcError as error:
            self.assertEqual(error.code(), grpc.StatusCode.NOT_FOUND)
            return True
        return False

    def test_set_back_it_goes_on_storing_checkpointing_and_forgetting(self):
        self.start(DAY, "--durability=interval", "--checkpoint_interval=300ms", "--context_ttl=8s")
        again = request_id()
        first = self.layer.forward(X, request_id=again)
        context = self.layer.forward(X, save=True).context_id
        eventually(self.checkpoints)

        self.set_clock(0)
        self.backward(context)
        before = self.checkpoints()[0]
        last = self.layer.forward(X)
        self.assert_clock(0)
        eventually(lambda: self.checkpoints()[0] > before, timeout=30)
        eventually(lambda: self.is_forgotten(context), timeout=60)
        # Some of what is on disk is of tomorrow.
        self.server.kill()
        self.server.start()
        self.layer = Layer(self.server.stub, "a")
        self.assertEqual(self.layer.info().num_batches_tracked, last.num_batches_tracked)
        repeated = self.layer.forward(X, request_id=again)
        self.assertEqual((repeated.replayed, repeated.version), (True, first.version))
        # The newest is the one that was made last, though the clock says otherwise.
        self.server.stub.LoadCheckpoint(rpc.LoadCheckpointRequest())
        self.assertEqual(self.layer.info().num_batches_tracked, last.num_batches_tracked)

    def test_set_back_before_a_start_the_newest_checkpoint_is_taken(self):
        self.start(DAY, "--durability=none")
        save = self.server.stub.SaveCheckpoint
        save(rpc.SaveCheckpointRequest())
        self.set_clock(0)
        last = self.layer.forward(X)
        save(rpc.SaveCheckpointRequest())
        self.server.kill()
        self.server.start()
        self.layer = Layer(self.server.stub, "a")
        self.assertEqual(self.layer.info().version, last.version)

    def test_set_forward_nothing_is_forgotten(self):
        self.start(0, "--durability=interval", "--context_ttl=1h")
        again = request_id()
        first = self.layer.forward(X, request_id=again)
        context = self.layer.forward(X, save=True).context_id
        removed = Layer.create(self.server.stub, "b", CHANNELS).name
        delete = rpc.DeleteInstanceRequest(name=removed, request_id=request_id())
        self.server.stub.DeleteInstance(delete)

        self.set_clock(DAY)
        repeated = self.layer.forward(X, request_id=again)
        self.layer.train()
        self.assert_clock(DAY)
        self.assertEqual((repeated.replayed, repeated.version), (True, first.version))
        self.backward(context)
        self.assertTrue(self.server.stub.DeleteInstance(delete).replayed)


if __name__ == "__main__":
    unittest.main()
