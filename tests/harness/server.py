"""A real normd process: started, stopped, killed and brought back."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import tempfile
import time
import unittest

import grpc
import health_pb2
import health_pb2_grpc
from normd.v1 import norm_service_pb2_grpc

NORMD = os.environ.get("NORMD_BIN", "build/release/bin/normd")

# A sanitizer's report anywhere in the log fails the test, whatever the exit code.
SANITIZER_REPORT = re.compile(
    r"ERROR: (Address|Leak|Thread|Memory)Sanitizer|WARNING: ThreadSanitizer|runtime error: |"
    r"SUMMARY: \w+Sanitizer")

CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A new server on an old port must not be met with the old one's back-off.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.use_local_subchannel_pool", 1),
]


def environment(extra=None):
    """The environment without flags' twins, so that each test sets its own."""
    return {**{key: value for key, value in os.environ.items() if not key.startswith("NORMD_")},
            **(extra or {})}


class ServerFailed(AssertionError):
    """The server did what no server may: died, hung, or a sanitizer complained."""


class Server:
    """One normd on a free port and a state directory of its own.

    `flags` are passed as they are; `credentials` are the channel's, where the server speaks
    TLS. The state directory lives until close(), so
    that start() after stop() or kill() finds what was left.
    """

    def __init__(self, *flags, state_dir=None, env=None, listen="127.0.0.1:0",
                 credentials=None):
        self.flags = list(flags)
        self.env = env or {}
        self.listen = listen
        self.credentials = credentials
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="normd-test-"))
        self.state_dir = pathlib.Path(state_dir) if state_dir else self.directory / "state"
        self.port_file = self.directory / "port"
        self.log_file = self.directory / "log"
        self.process = None
        self.channel = None
        self.address = None

    # --- life ---

    def command(self):
        return [NORMD, f"--listen={self.listen}", f"--port_file={self.port_file}",
                f"--state_dir={self.state_dir}", *self.flags]

    def start(self, timeout=60):
        """Starts it and returns when its health service says SERVING."""
        self.port_file.unlink(missing_ok=True)
        with open(self.log_file, "ab") as log:
            self.process = subprocess.Popen(self.command(), stdin=subprocess.DEVNULL, stdout=log,
                                            stderr=log, env=environment(self.env))
        deadline = time.monotonic() + timeout
        while not self.port_file.exists():
            if self.process.poll() is not None:
                raise ServerFailed(f"normd ended with {self.process.returncode} at its start\n"
                                   f"{self.log()}")
            if time.monotonic() > deadline:
                self.process.kill()
                raise ServerFailed(f"normd wrote no port file in {timeout} s\n{self.log()}")
            time.sleep(0.01)
        self.address = self.port_file.read_text().split()[0]
        self.channel = self.connect()
        health = health_pb2_grpc.HealthStub(self.channel)
        answer = health.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True,
                              timeout=max(1, deadline - time.monotonic()))
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            raise ServerFailed(f"health is {answer.status} after the start\n{self.log()}")
        self.stub = norm_service_pb2_grpc.NormServiceStub(self.channel)
        return self

    def connect(self, credentials=None):
        """Another channel of its own connection."""
        credentials = credentials or self.credentials
        if credentials is not None:
            return grpc.secure_channel(self.address, credentials, options=CHANNEL_OPTIONS)
        return grpc.insecure_channel(self.address, options=CHANNEL_OPTIONS)

    def peak_bytes(self):
        """The most memory that the process has had resident so far."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024

    def signal(self, number=signal.SIGTERM):
        self.process.send_signal(number)

    def wait(self, timeout=60):
        """Waits for a signalled server; it must end with 0 and a clean log."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)
            self.process.wait()
            raise ServerFailed(f"normd still runs after {timeout} s\n{self.log()}") from None
        self._forget()
        self.check_log()
        if code != 0:
            raise ServerFailed(f"normd ended with {code}\n{self.log()}")

    def stop(self, timeout=60):
        self.signal()
        self.wait(timeout)

    def kill(self):
        """Ends it as a power cut would: kill -9."""
        if self.process.poll() is not None:
            raise ServerFailed(f"normd was dead before: {self.process.returncode}\n{self.log()}")
        self.process.kill()
        self.process.wait()
        self._forget()
        self.check_log()

    def restart(self):
        self.stop()
        return self.start()

    def close(self):
        """Stops it where it runs, and removes its files. May be called again."""
        try:
            if self.process is not None:
                if self.process.poll() is None:
                    self.stop()
                else:
                    code = self.process.returncode
                    self._forget()
                    raise ServerFailed(f"normd died on its own: {code}\n{self.log()}")
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _forget(self):
        self.process = None
        if self.channel is not None:
            self.channel.close()
            self.channel = None

    # --- sight ---

    @property
    def pid(self):
        return self.process.pid

    def alive(self):
        return self.process is not None and self.process.poll() is None

    def log(self, last=100):
        lines = self.log_file.read_text(errors="replace").splitlines()
        return "\n".join(lines[-last:])

    def check_log(self):
        text = self.log_file.read_text(errors="replace")
        found = SANITIZER_REPORT.search(text)
        if found:
            raise ServerFailed(text[max(0, found.start() - 200):found.start() + 6000])

    def checkpoint_directory(self):
        """Where generations lie: the parent of the directories with a manifest."""
        for manifest in sorted(self.state_dir.rglob("manifest.json")):
            return manifest.parent.parent
        raise FileNotFoundError(f"no checkpoint under {self.state_dir}")

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.close()


def run_normd(*flags, env=None, timeout=60, **popen):
    """Runs normd to its end, for starts that must fail. Returns the CompletedProcess."""
    return subprocess.run([popen.pop("binary", NORMD), *flags], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          env=environment(env), timeout=timeout, check=False, **popen)


def eventually(condition, timeout=10):
    """Waits until the condition holds, and fails when it never does."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not in {timeout} s")
        time.sleep(0.02)


class ServerTestCase(unittest.TestCase):
    """Tests that share one server, started with the class's FLAGS."""

    FLAGS = ()
    server: Server

    @classmethod
    def setUpClass(cls):
        cls.server = Server(*cls.FLAGS)
        try:
            cls.server.start()
        except BaseException:
            shutil.rmtree(cls.server.directory, ignore_errors=True)
            raise
        cls.stub = cls.server.stub

    @classmethod
    def tearDownClass(cls):
        cls.server.close()

    def setUp(self):
        self.assertTrue(self.server.alive(), "the server died in the test before")
