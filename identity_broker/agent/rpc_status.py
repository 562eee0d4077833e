"""Refusals on the agent's own sockets: few status codes, with a reason in google.rpc.ErrorInfo.

- The only module of the agent that names gRPC status codes. The Workload Endpoint knows four:
  InvalidArgument (never retried), Unavailable and PermissionDenied (retried with backoff) and
  Unimplemented (EP-11); Internal is a bug, NotFound is grpc.health.v1's own.
- Only `public`, `hint` and `reason` leave the process; `detail` and `fields` never do.
- Reasons of a Workload API or SDS call, where the standard's own .proto names none:

    SECURITY_HEADER_MISSING  InvalidArgument    the metadata workload.spiffe.io: true is missing
    MALFORMED_REQUEST        InvalidArgument    a mandatory field is missing or cannot be read
    SPIFFE_ID_INVALID        InvalidArgument    the SPIFFE ID asked for is none
    AUDIENCE_INVALID         InvalidArgument    an audience cannot stand in a token
    TOKEN_INVALID            InvalidArgument    the JWT-SVID to validate does not hold
    NO_IDENTITY              PermissionDenied   nothing is registered for the process
    CALLER_UNKNOWN           PermissionDenied   the process cannot be seen, or has ended
    PROCESS_CHANGED          PermissionDenied   it runs another program, or as another user, by now
    ATTESTATION_FAILED       PermissionDenied   the process could not be attested
    NODE_BANNED              PermissionDenied   the broker withdrew this node
    AGENT_NOT_READY          Unavailable        nothing was heard from the broker yet; or it stops
    WATCH_LAGGED             Unavailable        a follower of revocations does not keep up
    RATE_LIMITED             Unavailable        too many calls or streams by this process or user
    DEADLINE_EXCEEDED        Unavailable        not done in time
    INTERNAL                 Internal           a bug
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, TypeAlias

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status as RpcStatus

from identity_broker.errors import BrokerError, Kind

DOMAIN: Final = "identity-broker"
DETAILS_KEY: Final = "grpc-status-details-bin"
OK: Final = "OK"
CANCELLED: Final = "CANCELLED"
_MAX_TEXT: Final = 1500

_CODES: Final[Mapping[Kind, grpc.StatusCode]] = MappingProxyType(
    {
        Kind.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
        # Not UNAUTHENTICATED: nobody authenticates here by doing anything (EP-9).
        Kind.UNAUTHENTICATED: grpc.StatusCode.PERMISSION_DENIED,
        Kind.DENIED: grpc.StatusCode.PERMISSION_DENIED,
        Kind.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
        Kind.CONFLICT: grpc.StatusCode.UNAVAILABLE,
        Kind.STALE: grpc.StatusCode.UNAVAILABLE,
        Kind.EXHAUSTED: grpc.StatusCode.UNAVAILABLE,
        Kind.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
        Kind.DEADLINE: grpc.StatusCode.UNAVAILABLE,
        Kind.CONFIG: grpc.StatusCode.INTERNAL,
        Kind.INTERNAL: grpc.StatusCode.INTERNAL,
    }
)


def status_code(error: BrokerError) -> grpc.StatusCode:
    """The gRPC status of the error's kind."""
    return _CODES[error.kind]


AbortArguments: TypeAlias = tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]


def abort_arguments(error: BrokerError, correlation_id: str = "") -> AbortArguments:
    """What `ServicerContext.abort` takes: code, sentence, trailing metadata."""
    code = status_code(error)
    message = _bounded(error.public)
    info = ErrorInfo(reason=error.reason, domain=DOMAIN)
    if correlation_id:
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


def unimplemented(sentence: str) -> AbortArguments:
    """The same for a service that is not there, and why it is not."""
    return grpc.StatusCode.UNIMPLEMENTED, sentence, ()


def _bounded(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}…"
