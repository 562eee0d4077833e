"""Errors on the wire: google.rpc.Status with ErrorInfo and, where a retry helps, RetryInfo.

- The only module of the server that names gRPC status codes.
- Only `public`, `hint` and `reason` leave the process; `detail` and `fields` never do.
- `identity_client._wire.status` is the inverse; a test sends every leaf there and back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status as RpcStatus

from identity_api.broker.v1 import types_pb2
from identity_broker.errors import BrokerError, Kind

DOMAIN: Final = "identity-broker"
DETAILS_KEY: Final = "grpc-status-details-bin"
OK: Final = "OK"
CANCELLED: Final = "CANCELLED"
# Trailers share 8 KiB by default on the client's side; a sentence has no business being longer.
_MAX_TEXT: Final = 1500

_CODES: Final[Mapping[Kind, grpc.StatusCode]] = MappingProxyType(
    {
        Kind.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
        Kind.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
        Kind.DENIED: grpc.StatusCode.PERMISSION_DENIED,
        Kind.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
        Kind.CONFLICT: grpc.StatusCode.ALREADY_EXISTS,
        Kind.STALE: grpc.StatusCode.ABORTED,
        Kind.EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
        Kind.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
        Kind.DEADLINE: grpc.StatusCode.DEADLINE_EXCEEDED,
        Kind.CONFIG: grpc.StatusCode.INTERNAL,
        Kind.INTERNAL: grpc.StatusCode.INTERNAL,
    }
)


def status_code(error: BrokerError) -> grpc.StatusCode:
    """The gRPC status of the error's kind."""
    return _CODES[error.kind]


def abort_arguments(
    error: BrokerError, correlation_id: str
) -> tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]:
    """What `ServicerContext.abort` takes: code, sentence, trailing metadata."""
    code = _CODES[error.kind]
    message = _bounded(error.public)
    info = ErrorInfo(reason=error.reason, domain=DOMAIN)
    info.metadata["correlation_id"] = correlation_id
    if error.hint:
        info.metadata["hint"] = _bounded(error.hint)
    status = RpcStatus(code=code.value[0], message=message)
    status.details.add().Pack(info)
    if error.retry_after is not None:
        delay = Duration()
        delay.FromNanoseconds(math.ceil(error.retry_after * 1e9))
        status.details.add().Pack(RetryInfo(retry_delay=delay))
    return code, message, ((DETAILS_KEY, status.SerializeToString()),)


def item_status(error: BrokerError | None) -> types_pb2.Status:
    """The status of one item of a batch; None is success."""
    if error is None:
        return types_pb2.Status()
    return types_pb2.Status(
        code=_CODES[error.kind].value[0],
        reason=error.reason,
        message=_bounded(error.public),
        hint=_bounded(error.hint),
        retry_after_seconds=0
        if error.retry_after is None
        else max(1, math.ceil(error.retry_after)),
    )


def _bounded(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}…"
