"""What a refused call must look like."""

import contextlib

import grpc
from normd.v1 import error_pb2

DETAIL_KEY = "normd-error-detail-bin"


def error_detail(error):
    """The ErrorDetail of a grpc.RpcError, or None where it carries none."""
    for key, value in error.trailing_metadata() or ():
        if key == DETAIL_KEY:
            return error_pb2.ErrorDetail.FromString(value)
    return None


def names_field(detail, field):
    """Whether the detail is about `field`, written as its full path or as its end."""
    if detail is None:
        return False
    return detail.field == field or detail.field.endswith("." + field)


@contextlib.contextmanager
def refused(test, code, field=None, message=None, flag=None):
    """The block's call must be refused so; yields a holder whose `detail` is filled.

    field    ErrorDetail.field, or the end of its path; its last word is in the message too,
             unless `message` says what is (PyTorch's own reason)
    message  a part of the message, whatever its case
    flag     ErrorDetail.flag; it is in the message too
    """
    class Refusal:
        error = None
        detail = None

    refusal = Refusal()
    codes = code if isinstance(code, (tuple, set, list)) else (code,)
    try:
        yield refusal
    except grpc.RpcError as error:
        refusal.error = error
        refusal.detail = error_detail(error)
        said = f"{error.code().name}: {error.details()} [{str(refusal.detail).strip()!r}]"
        test.assertIn(error.code(), codes, said)
        if field is not None:
            test.assertTrue(names_field(refusal.detail, field), f"no field {field!r} in {said}")
            if message is None:
                test.assertIn(field.split(".")[-1], error.details(), said)
        if message is not None:
            test.assertIn(message.lower(), error.details().lower(), said)
        if flag is not None:
            test.assertIsNotNone(refusal.detail, said)
            test.assertEqual(refusal.detail.flag, flag, said)
            test.assertIn(flag, error.details(), said)
        return
    test.fail(f"was answered; {'/'.join(c.name for c in codes)} was due")
