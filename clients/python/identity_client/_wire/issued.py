"""What was issued: results of a batch to values, one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from identity_api.broker.v1 import svid_pb2
from identity_client._wire.convert import time_from_wire
from identity_client._wire.status import error_from_item
from identity_client.errors import IdentityError, ProtocolViolation
from identity_client.node.values import IssuedJwt, IssuedX509

__all__ = ["jwts_from_wire", "x509s_from_wire"]

_R = TypeVar("_R", svid_pb2.BatchIssueX509Response.Result, svid_pb2.BatchIssueJwtResponse.Result)
_V = TypeVar("_V")


def x509s_from_wire(
    results: Sequence[svid_pb2.BatchIssueX509Response.Result], wanted: int
) -> list[IssuedX509 | IdentityError]:
    """The outcome of each item, in order; one that cannot be read is a ProtocolViolation.

    Raises:
        ProtocolViolation: there are not `wanted` of them.
    """
    return _each(results, wanted, _x509)


def jwts_from_wire(
    results: Sequence[svid_pb2.BatchIssueJwtResponse.Result], wanted: int
) -> list[IssuedJwt | IdentityError]:
    """As `x509s_from_wire`, for JWT-SVIDs."""
    return _each(results, wanted, _jwt)


def _each(
    results: Iterable[_R], wanted: int, convert: Callable[[_R], _V]
) -> list[_V | IdentityError]:
    outcomes: list[_V | IdentityError] = []
    for result in results:
        error = error_from_item(result.status)
        if error is not None:
            outcomes.append(error)
            continue
        try:
            if not result.HasField("svid"):
                raise ProtocolViolation("the broker said that it issued, and sent nothing")
            outcomes.append(convert(result))
        except ProtocolViolation as violation:
            outcomes.append(violation)
    if len(outcomes) != wanted:
        raise ProtocolViolation("the broker answered another number of items than was asked for")
    return outcomes


def _x509(result: svid_pb2.BatchIssueX509Response.Result) -> IssuedX509:
    svid = result.svid
    if not svid.cert_chain:
        raise ProtocolViolation("the broker issued an empty certificate chain")
    return IssuedX509(
        chain=tuple(svid.cert_chain),
        spiffe_id=svid.spiffe_id,
        serial=svid.serial,
        not_before=time_from_wire(svid.not_before),
        not_after=time_from_wire(svid.expires_at),
        hint=svid.hint,
    )


def _jwt(result: svid_pb2.BatchIssueJwtResponse.Result) -> IssuedJwt:
    svid = result.svid
    if not svid.token:
        raise ProtocolViolation("the broker issued an empty token")
    return IssuedJwt(
        token=svid.token,
        spiffe_id=svid.spiffe_id,
        jti=svid.jti,
        issued_at=time_from_wire(svid.issued_at),
        expires_at=time_from_wire(svid.expires_at),
        hint=svid.hint,
    )
