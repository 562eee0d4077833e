"""Refusals on the wire: google.rpc.Status with ErrorInfo and RetryInfo, to and from our errors.

- The only module that names gRPC status codes.
- The class is chosen by reason where we know it, else by status code; the reason itself is kept
  as it came, so a broker newer than this SDK stays readable.
- A failure that no broker answered (refused connection, TLS, deadline) is BrokerUnavailable.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, cast

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status as RpcStatus

from identity_api.broker.v1 import types_pb2
from identity_client import errors

__all__ = [
    "DOMAIN",
    "error_from_item",
    "error_from_rpc",
    "error_from_workload_api",
    "refusal_status",
]

DOMAIN = "identity-broker"
_DETAILS_KEY = "grpc-status-details-bin"

_BY_REASON: dict[str, type[errors.IdentityError]] = {
    "STALE_WRITE": errors.StaleObject,
    "PEER_REJECTED": errors.PeerRejected,
    "PEER_REVOKED": errors.PeerRevoked,
    "PEER_EXPIRED": errors.PeerExpired,
    "REVOCATIONS_STALE": errors.RevocationsStale,
}

_BY_CODE: dict[grpc.StatusCode, type[errors.IdentityError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.RequestRejected,
    grpc.StatusCode.FAILED_PRECONDITION: errors.RequestRejected,
    grpc.StatusCode.OUT_OF_RANGE: errors.RequestRejected,
    grpc.StatusCode.UNIMPLEMENTED: errors.RequestRejected,
    grpc.StatusCode.UNAUTHENTICATED: errors.NotAuthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.NotPermitted,
    grpc.StatusCode.NOT_FOUND: errors.ObjectNotFound,
    grpc.StatusCode.ALREADY_EXISTS: errors.Conflict,
    grpc.StatusCode.ABORTED: errors.StaleObject,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.LimitReached,
    grpc.StatusCode.UNAVAILABLE: errors.BrokerUnavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.BrokerUnavailable,
    grpc.StatusCode.CANCELLED: errors.BrokerUnavailable,
}

# Reasons for answers that carry no ErrorInfo of the broker's.
_BARE_REASON: dict[grpc.StatusCode, str] = {
    grpc.StatusCode.DEADLINE_EXCEEDED: "DEADLINE_EXCEEDED",
    grpc.StatusCode.CANCELLED: "CANCELLED",
    grpc.StatusCode.UNIMPLEMENTED: "METHOD_UNKNOWN",
}

# What a Workload API's bare status means (SPIFFE Workload Endpoint, section 6 and appendix A).
_AWAY = errors.BrokerUnavailable(
    "the Workload API does not answer",
    reason="WORKLOAD_API_UNREACHABLE",
    hint="is the node agent running, and is that its socket? idb agent status",
)
_WORKLOAD_API: dict[grpc.StatusCode, errors.IdentityError] = {
    grpc.StatusCode.UNAVAILABLE: _AWAY,
    grpc.StatusCode.DEADLINE_EXCEEDED: _AWAY,
    grpc.StatusCode.CANCELLED: _AWAY,
    grpc.StatusCode.PERMISSION_DENIED: errors.NotPermitted(
        "no identity is registered for this process",
        reason="NO_IDENTITY",
        hint="idb explain --pid PID says which entries miss, and by which selector",
    ),
    grpc.StatusCode.INVALID_ARGUMENT: errors.RequestRejected(
        "the Workload API rejected the request"
    ),
    grpc.StatusCode.UNIMPLEMENTED: errors.RequestRejected(
        "the Workload API does not offer this call", reason="METHOD_UNKNOWN"
    ),
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.LimitReached(
        "a limit of the Workload API was reached"
    ),
}
_WORKLOAD_API_FAILED = errors.BrokerFailed("the Workload API failed")

_CODE_OF: dict[type[errors.IdentityError], grpc.StatusCode] = {
    errors.PeerRevoked: grpc.StatusCode.UNAUTHENTICATED,
    errors.PeerExpired: grpc.StatusCode.UNAUTHENTICATED,
    errors.RevocationsStale: grpc.StatusCode.UNAVAILABLE,
    errors.PeerRejected: grpc.StatusCode.PERMISSION_DENIED,
}

_BY_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


class _EndedCall(Protocol):
    """What grpc.aio.AioRpcError and the sync RpcError have in common."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


def error_from_rpc(error: grpc.RpcError) -> errors.IdentityError:
    """The error a failed call stands for, from grpc (a call that ended) or grpc.aio.

    Never raises: an answer without or with broken details becomes the error of its status code.
    """
    if not hasattr(error, "code"):
        return errors.BrokerUnavailable(f"the call failed: {error}")
    call = cast("_EndedCall", error)
    code = call.code()
    text = call.details() or ""
    metadata = call.trailing_metadata() or ()
    info, retry_after = _details(metadata)
    if info is None:
        return _bare(code, text)
    return _build(
        code,
        message=text,
        reason=info.reason,
        hint=info.metadata.get("hint", ""),
        retry_after=retry_after,
        correlation_id=info.metadata.get("correlation_id", ""),
    )


def error_from_workload_api(error: grpc.RpcError) -> errors.IdentityError:
    """The error a failed call of a Workload API stands for, whoever's it is.

    RequestRejected must not be tried again; NotPermitted means that there is no identity for this
    process (any more); whatever else may be tried again. Never raises.
    """
    if not hasattr(error, "code"):
        return type(_AWAY).because(_AWAY)
    call = cast("_EndedCall", error)
    if _details(call.trailing_metadata() or ())[0] is not None:
        return error_from_rpc(error)
    meant = _WORKLOAD_API.get(call.code(), _WORKLOAD_API_FAILED)
    found = type(meant).because(meant)
    text = call.details()
    if text:
        found = type(meant)(f"{meant.message}: {text}", reason=meant.reason, hint=meant.hint)
    return found


def error_from_item(status: types_pb2.Status) -> errors.IdentityError | None:
    """The error one item of a batch stands for; None where the item succeeded."""
    if status.code == 0:
        return None
    return _build(
        _BY_NUMBER.get(status.code, grpc.StatusCode.UNKNOWN),
        message=status.message,
        reason=status.reason,
        hint=status.hint,
        retry_after=float(status.retry_after_seconds) or None,
        correlation_id="",
    )


def refusal_status(error: errors.IdentityError) -> grpc.Status:
    """What a service answers a peer it refuses, for `context.abort_with_status`."""
    code = next((_CODE_OF[c] for c in type(error).__mro__ if c in _CODE_OF), None)
    code = code or grpc.StatusCode.UNAVAILABLE
    info = ErrorInfo(reason=error.reason, domain=DOMAIN)
    if error.hint:
        info.metadata["hint"] = error.hint
    status = RpcStatus(code=code.value[0], message=error.message)
    status.details.add().Pack(info)
    if error.retry_after is not None:
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after * 1e9))
        status.details.add().Pack(RetryInfo(retry_delay=delay))
    return _Refusal(code, error.message, ((_DETAILS_KEY, status.SerializeToString()),))


class _Refusal(grpc.Status):
    def __init__(
        self, code: grpc.StatusCode, details: str, metadata: tuple[tuple[str, bytes], ...]
    ) -> None:
        self.code = code
        self.details = details
        self.trailing_metadata: Any = metadata


def _details(
    metadata: Iterable[tuple[str, str | bytes]],
) -> tuple[ErrorInfo | None, float | None]:
    info: ErrorInfo | None = None
    retry_after: float | None = None
    for key, value in metadata:
        if key != _DETAILS_KEY or not isinstance(value, bytes):
            continue
        try:
            for detail in RpcStatus.FromString(value).details:
                if detail.Is(ErrorInfo.DESCRIPTOR):
                    found = ErrorInfo()
                    detail.Unpack(found)
                    info = found if found.domain == DOMAIN else info
                elif detail.Is(RetryInfo.DESCRIPTOR):
                    retry = RetryInfo()
                    detail.Unpack(retry)
                    retry_after = retry.retry_delay.ToTimedelta().total_seconds()
        except DecodeError:
            continue  # The status code still says enough to build the error from.
    return info, retry_after


def _bare(code: grpc.StatusCode, text: str) -> errors.IdentityError:
    cls = _BY_CODE.get(code, errors.BrokerFailed)
    if code is grpc.StatusCode.UNAVAILABLE and _is_tls_failure(text):
        return errors.BrokerUnavailable(
            f"the TLS handshake with the broker failed: {text}",
            reason="BROKER_TLS_FAILED",
            hint="is the bundle file this trust domain's, and is that the broker's address?",
        )
    if cls is errors.BrokerUnavailable and text:
        text = f"{cls.sentence}: {text}"
    return cls(text, reason=_BARE_REASON.get(code, ""))


def _is_tls_failure(text: str) -> bool:
    # Not "handshake": a server that goes away in the middle of one is merely away.
    lowered = text.lower()
    return any(sign in lowered for sign in ("certificate", "verification", "peer name", " alert "))


def _build(
    code: grpc.StatusCode,
    *,
    message: str,
    reason: str,
    hint: str,
    retry_after: float | None,
    correlation_id: str,
) -> errors.IdentityError:
    cls = _BY_REASON.get(reason) or _BY_CODE.get(code, errors.BrokerFailed)
    error = cls(
        message,
        reason=reason,
        hint=hint,
        retry_after=retry_after,
        correlation_id=correlation_id,
    )
    error.hint = hint  # The broker chose its hint; ours would speak of something else.
    return error
