"""A disk that is full or fails: a change is refused, memory and disk stay equal, reads go on, and
changes too as soon as it is well again."""

import errno
import os
import pathlib
import subprocess
import tempfile
import time
import unittest

import grpc
import health_pb2
import health_pb2_grpc
import torch
from faults.model import CHANNELS, batch
from harness.errors import refused
from harness.layer import EVAL, Layer, request_id
from harness.server import NORMD, Server, eventually
from normd.v1 import norm_service_pb2 as rpc

BAD_DISK = pathlib.Path(NORMD).resolve().with_name("libnormd_bad_disk.so")


class Disk(unittest.TestCase):
    def start(self, server):
        self.server = server
        self.addCleanup(server.close)
        server.start()
        self.layer = Layer.create(server.stub, "a", CHANNELS)
        self.seed = 0
        for _ in range(3):
            self.forward()

    def forward(self, **fields):
        self.seed += 1
        return self.layer.forward(torch.from_numpy(batch(self.seed)), **fields)

    def state(self):
        """Version and state, as bytes, of every instance that there is."""
        stub = self.server.stub
        names = [instance.name
                 for instance in stub.ListInstances(rpc.ListInstancesRequest()).instances]
        return {name: self.state_of(Layer(stub, name).get_state()) for name in names}

    @staticmethod
    def state_of(answer):
        return answer.version, [(entry.name, entry.tensor.data) for entry in answer.state.state_dict]

    def kill_and_restart(self):
        self.server.kill()
        self.server.start()
        self.layer = Layer(self.server.stub, "a")

    def refuses_and_recovers(self, code, break_disk, mend_disk):
        """Twice: once the server lives through it, once it is killed while the disk is bad."""
        for killed in (False, True):
            before = self.state()
            break_disk()
            retried = request_id()
            with refused(self, code, message="state.sqlite"):
                Layer.create(self.server.stub, "b", CHANNELS)
            # The last to be refused is the one whose traces are left.
            for _ in range(3):
                with refused(self, code, message="state.sqlite"):
                    self.forward(request_id=retried)
            self.assertEqual(self.state(), before)
            self.forward(mode=EVAL)  # reads go on
            if killed:
                # What the disk holds is what a start reads, though it could not write to it.
                self.server.kill()
                mend_disk()
                self.server.start()
                self.layer = Layer(self.server.stub, "a")
                self.assertEqual(self.state(), before, "a refused change came back")
            else:
                mend_disk()
            answer = self.forward(request_id=retried)
            self.assertEqual((answer.version, answer.replayed), (before["a"][0] + 1, False))
            after = self.state()
            self.kill_and_restart()
            self.assertEqual(self.state(), after)


@unittest.skipUnless(os.geteuid() == 0, "only root may mount a file system")
class FullDisk(Disk):
    def test_a_full_disk_refuses_changes_until_there_is_room(self):
        # Beside its files the server's directory holds those of the harness, which need room too.
        mount = tempfile.mkdtemp(prefix="normd-full-")
        self.addCleanup(os.rmdir, mount)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], check=True)
        self.addCleanup(subprocess.run, ["umount", mount], check=True)
        filler = pathlib.Path(mount, "filler")

        def fill():
            with open(filler, "wb", buffering=0) as file:
                try:
                    while file.write(bytes(4096)):
                        pass
                except OSError as error:
                    self.assertEqual(error.errno, errno.ENOSPC)
        self.start(Server("--durability=update", state_dir=f"{mount}/state"))
        # The log has room for some changes yet: larger ones end it.
        wide = Layer.create(self.server.stub, "wide", 2048)
        fill()
        for _ in range(10):
            with refused(self, grpc.StatusCode.RESOURCE_EXHAUSTED, message="state.sqlite"):
                for _ in range(50):
                    wide.train()
        self.refuses_and_recovers(grpc.StatusCode.RESOURCE_EXHAUSTED, fill, filler.unlink)


class FailingDisk(Disk):
    def setUp(self):
        self.assertTrue(BAD_DISK.exists(), f"{BAD_DISK} is not built")

    def start_with_bad_disk(self, *flags):
        server = Server(*flags)
        self.control = server.directory / "disk"
        server.env = {"LD_PRELOAD": str(BAD_DISK), "NORMD_TEST_DISK": str(self.control)}
        self.control.write_text("")
        self.start(server)

    def fails(self, what):
        return lambda: self.control.write_text(what)

    def test_a_failed_write_is_refused_and_tried_again(self):
        self.start_with_bad_disk("--durability=update")
        self.refuses_and_recovers(grpc.StatusCode.UNAVAILABLE, self.fails(f"write {errno.EIO}"),
                                  self.fails(""))

    def test_a_failed_sync_is_refused_and_does_not_come_back_after_a_kill(self):
        self.start_with_bad_disk("--durability=update")
        self.refuses_and_recovers(grpc.StatusCode.UNAVAILABLE, self.fails(f"sync {errno.EIO}"),
                                  self.fails(""))

    def test_no_space_by_a_quota_is_told_as_such(self):
        self.start_with_bad_disk("--durability=update")
        self.refuses_and_recovers(grpc.StatusCode.RESOURCE_EXHAUSTED,
                                  self.fails(f"write {errno.ENOSPC}"), self.fails(""))

    def test_with_interval_what_could_not_be_written_is_written_later(self):
        self.start_with_bad_disk("--durability=interval", "--checkpoint_interval=100ms")
        for fault in (f"write {errno.EIO}", f"sync {errno.EIO}"):
            self.control.write_text(fault)
            for _ in range(5):
                self.forward()
            eventually(lambda: "will be tried again" in self.server.log())
            self.control.write_text("")
            after = self.state()
            time.sleep(1)  # ten times the interval after which it is tried again
            self.kill_and_restart()
            self.assertEqual(self.state(), after)

    def test_a_clock_set_back_keeps_no_change_from_the_disk(self):
        # Abseil asks for the time every two seconds only, and counts cycles in between.
        self.start_with_bad_disk("--durability=interval", "--checkpoint_interval=3s")
        time.sleep(4)  # until the instance is on disk
        self.forward()  # waits for its interval when the clock goes back
        self.control.write_text("clock 3600")
        retried = request_id()
        self.forward(request_id=retried)
        after = self.state()
        time.sleep(5)
        self.kill_and_restart()
        self.assertEqual(self.state(), after)
        # It is remembered whatever the clock said then.
        self.control.write_text("")
        self.assertTrue(self.forward(request_id=retried).replayed)

    def test_with_interval_changes_are_refused_when_none_can_be_written_for_long(self):
        self.start_with_bad_disk("--durability=interval", "--checkpoint_interval=500ms")

        def changes():
            return health_pb2_grpc.HealthStub(self.server.channel).Check(
                health_pb2.HealthCheckRequest(service="normd.v1.NormService/changes")).status
        for fault, code in ((f"write {errno.ENOSPC}", grpc.StatusCode.RESOURCE_EXHAUSTED),
                            (f"sync {errno.EIO}", grpc.StatusCode.UNAVAILABLE)):
            self.assertEqual(changes(), health_pb2.HealthCheckResponse.SERVING)
            self.control.write_text(fault)
            self.forward()  # is acknowledged: the disk may be well again soon
            eventually(lambda: changes() == health_pb2.HealthCheckResponse.NOT_SERVING, 30)
            before = self.state()
            retried = request_id()
            with refused(self, code, message="state.sqlite"):
                self.forward(request_id=retried)
            with refused(self, code, message="state.sqlite"):
                Layer.create(self.server.stub, "b", CHANNELS)
            with refused(self, code, message="state.sqlite"):
                self.layer.delete()
            self.assertEqual(self.state(), before)
            self.forward(mode=EVAL)  # reads go on
            self.control.write_text("")
            eventually(lambda: changes() == health_pb2.HealthCheckResponse.SERVING, 30)
            answer = self.forward(request_id=retried)
            self.assertEqual((answer.version, answer.replayed), (before["a"][0] + 1, False))
            # Two intervals: what was taken back by a refusal is in nobody's way.
            time.sleep(2)
            after = self.state()
            self.kill_and_restart()
            self.assertEqual(self.state(), after)


if __name__ == "__main__":
    unittest.main()
