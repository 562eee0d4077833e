"""The SDK's errors: one tree, readable, and a faithful inverse of what crosses the wire."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status as RpcStatus

from identity_api.broker.v1 import types_pb2
from identity_client import errors
from identity_client._wire.status import error_from_item, error_from_rpc, refusal_status

ALL = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, errors.IdentityError)
]


class EndedCall(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, details: str = "", metadata: Any = ()) -> None:
        self._parts = (code, details, metadata)

    def code(self) -> grpc.StatusCode:
        return self._parts[0]

    def details(self) -> str:
        return self._parts[1]

    def trailing_metadata(self) -> Any:
        return self._parts[2]


def refused(code: grpc.StatusCode, domain: str = "identity-broker", **info: str) -> EndedCall:
    reason = info.pop("reason")
    status = RpcStatus(code=code.value[0], message="no")
    status.details.add().Pack(ErrorInfo(reason=reason, domain=domain, metadata=info))
    return EndedCall(code, "no", [("grpc-status-details-bin", status.SerializeToString())])


def test_the_tree_at_the_top_names_every_class() -> None:
    assert errors.__doc__
    for cls in ALL:
        assert cls.__name__ in errors.__doc__
        assert cls.__name__ in errors.__all__


@pytest.mark.parametrize("cls", ALL)
def test_every_error_survives_pickling(cls: type[errors.IdentityError]) -> None:
    error = cls("m", reason="R", hint="h", retry_after=2.5, correlation_id="c")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert vars(again) == vars(error)
    assert str(again) == "m [R]; h"


def test_error_info_becomes_reason_hint_and_correlation_id() -> None:
    error = error_from_rpc(
        refused(
            grpc.StatusCode.UNAUTHENTICATED,
            reason="JOIN_TOKEN_REJECTED",
            hint="make a new one: idb token generate",
            correlation_id="01j",
        )
    )
    assert type(error) is errors.NotAuthenticated
    assert (error.reason, error.correlation_id) == ("JOIN_TOKEN_REJECTED", "01j")
    assert error.hint == "make a new one: idb token generate"
    assert not error.retryable


def test_a_refusal_without_a_hint_does_not_borrow_one() -> None:
    assert (
        error_from_rpc(refused(grpc.StatusCode.UNAVAILABLE, reason="STORE_UNAVAILABLE")).hint == ""
    )


def test_an_unknown_reason_is_kept() -> None:
    error = error_from_rpc(refused(grpc.StatusCode.PERMISSION_DENIED, reason="NEW_IN_2030"))
    assert type(error) is errors.NotPermitted
    assert error.reason == "NEW_IN_2030"


def test_another_domain_s_error_info_is_not_ours() -> None:
    error = error_from_rpc(
        refused(grpc.StatusCode.PERMISSION_DENIED, domain="example.com", reason="QUOTA")
    )
    assert error.reason == "METHOD_DENIED"


def test_retry_info_becomes_retry_after() -> None:
    status = RpcStatus(code=14, message="away")
    status.details.add().Pack(ErrorInfo(reason="STORE_UNAVAILABLE", domain="identity-broker"))
    retry = RetryInfo()
    retry.retry_delay.FromMilliseconds(1500)
    status.details.add().Pack(retry)
    call = EndedCall(
        grpc.StatusCode.UNAVAILABLE,
        "away",
        [("grpc-status-details-bin", status.SerializeToString())],
    )
    error = error_from_rpc(call)
    assert isinstance(error, errors.BrokerUnavailable)
    assert error.retry_after == 1.5
    assert error.retryable


def test_broken_details_fall_back_to_the_status_code() -> None:
    call = EndedCall(grpc.StatusCode.NOT_FOUND, "x", [("grpc-status-details-bin", b"\xff\xff")])
    assert type(error_from_rpc(call)) is errors.ObjectNotFound


@pytest.mark.parametrize("code", [c for c in grpc.StatusCode if c is not grpc.StatusCode.OK])
def test_every_status_code_without_details_is_an_error_of_ours(code: grpc.StatusCode) -> None:
    error = error_from_rpc(EndedCall(code, "text"))
    assert error.reason
    assert "text" in error.message


def test_a_tls_failure_says_so() -> None:
    error = error_from_rpc(
        EndedCall(grpc.StatusCode.UNAVAILABLE, "Hostname Verification Check failed.")
    )
    assert error.reason == "BROKER_TLS_FAILED"
    assert "bundle" in error.hint


def test_batch_items() -> None:
    assert error_from_item(types_pb2.Status()) is None
    error = error_from_item(
        types_pb2.Status(
            code=7,
            reason="ENTRY_NOT_AUTHORIZED",
            message="no",
            hint="idb explain",
            retry_after_seconds=3,
        )
    )
    assert type(error) is errors.NotPermitted
    assert (error.reason, error.hint, error.retry_after) == (
        "ENTRY_NOT_AUTHORIZED",
        "idb explain",
        3,
    )


@pytest.mark.parametrize("cls", [errors.PeerRevoked, errors.PeerExpired, errors.PeerRejected])
def test_a_peer_refusal_round_trips(cls: type[errors.PeerRejected]) -> None:
    status = refusal_status(cls("no", retry_after=1.0))
    assert status.trailing_metadata
    error = error_from_rpc(EndedCall(status.code, status.details, status.trailing_metadata))
    assert type(error) is cls
    assert error.reason == cls.default_reason
    assert error.retry_after == 1.0
