"""The one exception of this package."""

from normd.v1 import error_pb2

_DETAIL_KEY = "normd-error-detail-bin"


class NormdError(Exception):
    """A call that the server refused or that did not reach it.

    code     grpc.StatusCode
    message  what happened, for people
    detail   normd.v1.ErrorDetail: field, value, allowed, limit, flag,
             retry_delay_ms, current_version; empty where the server sent none
    """

    def __init__(self, code, message, detail):
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message
        self.detail = detail

    @classmethod
    def from_rpc_error(cls, error):
        detail = error_pb2.ErrorDetail()
        for key, value in error.trailing_metadata() or ():
            if key == _DETAIL_KEY:
                detail.ParseFromString(value)
        return cls(error.code(), error.details(), detail)
