"""The agent's states as messages of the Workload API, each of them complete in itself (API-3).

- X.509 bundles hold X.509 authorities alone, JWT bundles JWT keys alone (API-10).
- Bundles are keyed by the SPIFFE ID of the trust domain ("spiffe://other.org"), as the standard's
  .proto says.
- A hint stands once in a response: the first SVID keeps it, the others go without (API-9).
- No answer is longer than what gRPC clients take by default; the lists of revoked certificates,
  which are optional, are left out before that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from google.protobuf.message import Message
from google.protobuf.struct_pb2 import ListValue, Struct, Value

from identity_broker.agent.identity import BundleState, JwtIdentity, WorkloadState
from identity_broker.errors import InvariantViolated
from identity_broker.telemetry.logs import get_logger
from identity_ca.bundle import TrustBundle
from identity_ca.jwt import VerifiedJwt
from identity_client._wire.workload import (
    JWTSVID,
    X509SVID,
    JWTBundlesResponse,
    JWTSVIDResponse,
    ValidateJWTSVIDResponse,
    X509BundlesResponse,
    X509SVIDResponse,
)

MAX_HINT_BYTES: Final = 1024
"""Longest hint handed out (section 8)."""

MAX_ANSWER_BYTES: Final = 4 * 1024 * 1024 - 64 * 1024
"""What a gRPC client takes without being told to is 4 MiB."""

_MAX_CLAIM_DEPTH: Final = 16

_log = get_logger("workload api")


def x509_svids(state: WorkloadState) -> X509SVIDResponse:
    """All X.509-SVIDs with their keys, in the state's order (API-20)."""
    own = _x509_bundle(state.bundle)
    hints = _Hints()
    for each in state.identities:
        if not (each.chain and each.key and own):
            raise InvariantViolated(
                detail=f"{each.spiffe_id}: an SVID without chain, key or bundle"
            )
    answer = X509SVIDResponse(
        svids=[
            X509SVID(
                spiffe_id=each.spiffe_id,
                x509_svid=b"".join(each.chain),
                x509_svid_key=each.key,
                bundle=own,
                hint=hints.once(each.hint, each.spiffe_id),
            )
            for each in state.identities
        ],
        federated_bundles={
            _name(bundle): der
            for bundle in state.federated.values()
            if (der := _x509_bundle(bundle))
        },
    )
    answer.crl.extend(_crls_that_fit(answer, state.crls))
    return answer


def x509_bundles(state: BundleState) -> X509BundlesResponse:
    """The X.509 bundles; the own trust domain's is among them (API-12)."""
    answer = X509BundlesResponse(
        bundles={
            _name(bundle): der
            for bundle in _own_and_federated(state)
            # An empty bundle says what a missing one says: nothing of that domain holds (TB-5).
            if (der := _x509_bundle(bundle)) or bundle is state.bundle
        }
    )
    answer.crl.extend(_crls_that_fit(answer, state.crls))
    return answer


def jwt_bundles(state: BundleState) -> JWTBundlesResponse:
    """The JWT bundles as JWK sets; the own trust domain's is among them (API-14)."""
    return JWTBundlesResponse(
        bundles={_name(bundle): bundle.to_jwks() for bundle in _own_and_federated(state)}
    )


def jwt_svids(identities: Sequence[JwtIdentity]) -> JWTSVIDResponse:
    """The tokens, in order."""
    hints = _Hints()
    return JWTSVIDResponse(
        svids=[
            JWTSVID(
                spiffe_id=each.spiffe_id,
                svid=each.token,
                hint=hints.once(each.hint, each.spiffe_id),
            )
            for each in identities
        ]
    )


def validated(jwt: VerifiedJwt) -> ValidateJWTSVIDResponse:
    """Whose token it is and what it claims (API-15).

    A claim that a Struct cannot hold (a number out of range, nesting beyond reason) is left out;
    none of SPIFFE's own is such a claim.
    """
    claims = Struct()
    for name, value in jwt.claims.items():
        converted = _value(value, _MAX_CLAIM_DEPTH)
        if converted is not None:
            claims.fields[name].CopyFrom(converted)
    return ValidateJWTSVIDResponse(spiffe_id=str(jwt.spiffe_id), claims=claims)


class _Hints:
    """Hands out every hint once."""

    def __init__(self) -> None:
        self._given: dict[str, str] = {}

    def once(self, hint: str, spiffe_id: str) -> str:
        """The hint, or "" where it was given before or is too long to be one."""
        if not hint:
            return ""
        if len(hint.encode()) > MAX_HINT_BYTES:
            _log.warning("hint left out", spiffe_id=spiffe_id, detail="longer than 1024 bytes")
            return ""
        holder = self._given.get(hint)
        if holder is not None:
            _log.warning(
                "hint left out",
                spiffe_id=spiffe_id,
                detail=f"{holder} has the same hint, {hint!r}",
                hint="idb entry update: give the entries of one process different hints",
            )
            return ""
        self._given[hint] = spiffe_id
        return hint


def _own_and_federated(state: BundleState) -> Iterable[TrustBundle]:
    return (state.bundle, *state.federated.values())


def _name(bundle: TrustBundle) -> str:
    return str(bundle.trust_domain.id)


def _x509_bundle(bundle: TrustBundle) -> bytes:
    return b"".join(bundle.x509_authorities)


def _crls_that_fit(answer: Message, crls: Sequence[bytes]) -> list[bytes]:
    room = MAX_ANSWER_BYTES - answer.ByteSize()
    kept: list[bytes] = []
    left_out = 0
    for crl in sorted(crls, key=len):
        if len(crl) + 8 <= room:
            kept.append(crl)
            room -= len(crl) + 8
        else:
            left_out += 1
    if left_out:
        _log.error("revocation lists too long to be handed out", count=left_out)
    return [crl for crl in crls if crl in kept]


def _value(value: Any, depth: int) -> Value | None:
    """The value in a Struct, or None where it has no place in one."""
    if value is None:
        return Value(null_value=0)  # type: ignore[arg-type]  # the enum's only member
    if isinstance(value, bool):
        return Value(bool_value=value)
    if isinstance(value, str):
        return Value(string_value=value)
    if isinstance(value, int | float):
        try:
            number = float(value)
        except OverflowError:
            return None
        return Value(number_value=number) if math.isfinite(number) else None
    if depth == 0:
        return None
    return _list(value, depth) if isinstance(value, list | tuple) else _struct(value, depth)


def _list(values: Sequence[Any], depth: int) -> Value | None:
    converted = [_value(each, depth - 1) for each in values]
    whole = [each for each in converted if each is not None]
    # A list with a member taken out says something else.
    return Value(list_value=ListValue(values=whole)) if len(whole) == len(converted) else None


def _struct(value: Mapping[str, Any], depth: int) -> Value | None:
    members = {name: _value(each, depth - 1) for name, each in value.items()}
    whole = {name: each for name, each in members.items() if each is not None}
    return Value(struct_value=Struct(fields=whole)) if len(whole) == len(members) else None
