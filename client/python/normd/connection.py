"""Channel, deadlines and retries: everything between Client and the stubs."""

import pathlib
import random
import time

import grpc

from normd.errors import NormdError
from normd.v1 import norm_service_pb2_grpc

_OPTIONS = [
    # The server limits what it accepts; answers are as large as their questions.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A server that restarts is found again soon.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5000),
]
_FIRST_BACKOFF_S = 0.05
_LONGEST_BACKOFF_S = 5.0


def _retry_delay(error, attempt):
    """Seconds to wait before another try; None: do not retry."""
    hint = error.detail.retry_delay_ms / 1000
    # Nobody here cancels a call: a server that stops did.
    if error.code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        if error.code is not grpc.StatusCode.RESOURCE_EXHAUSTED or not hint:
            return None
    backoff = min(_LONGEST_BACKOFF_S, _FIRST_BACKOFF_S * 2**attempt)
    return max(hint, backoff * random.uniform(0.5, 1.0))


def tls_credentials(tls_ca, tls_cert, tls_key):
    """Of the files in PEM; None where there is no tls_ca."""
    if (tls_cert is None) != (tls_key is None) or (tls_ca is None and tls_cert is not None):
        raise ValueError("tls_cert and tls_key go together, and beside tls_ca")
    if tls_ca is None:
        return None
    ca, key, cert = (
        None if path is None else pathlib.Path(path).read_bytes()
        for path in (tls_ca, tls_key, tls_cert)
    )
    return grpc.ssl_channel_credentials(ca, key, cert)


def token_metadata(token_file):
    """What each call shows of the token in the file."""
    if token_file is None:
        return ()
    token = pathlib.Path(token_file).read_text(encoding="ascii").strip()
    return (("authorization", f"Bearer {token}"),)


class Connection:
    """Thread-safe. `timeout` is in seconds and covers a call with its retries."""

    def __init__(self, target, timeout, credentials, metadata):
        if credentials is None:
            self.channel = grpc.insecure_channel(target, options=_OPTIONS)
        else:
            self.channel = grpc.secure_channel(target, credentials, options=_OPTIONS)
        self.stub = norm_service_pb2_grpc.NormServiceStub(self.channel)
        self._timeout = timeout
        self._metadata = metadata

    def deadline(self, timeout=None):
        """Of a call that begins now, by time.monotonic()."""
        return time.monotonic() + (self._timeout if timeout is None else timeout)

    def call(self, attempt_call, timeout=None):
        """attempt_call(timeout=, metadata=), repeated while that is safe and sensible.

        Every changing request carries a request_id, so that all may be retried.
        """
        deadline = self.deadline(timeout)
        attempt = 0
        while True:
            try:
                return self.call_once(attempt_call, deadline)
            except NormdError as error:
                delay = _retry_delay(error, attempt)
                if delay is None or time.monotonic() + delay >= deadline:
                    raise
                time.sleep(delay)
                attempt += 1

    def call_once(self, attempt_call, deadline):
        """attempt_call(timeout=, metadata=) until `deadline`, of time.monotonic()."""
        timeout = max(deadline - time.monotonic(), 1e-3)
        try:
            return attempt_call(timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise NormdError.from_rpc_error(error) from None
