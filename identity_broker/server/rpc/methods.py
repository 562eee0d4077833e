"""THE table: who may call what, for how long, how often, and what is kept about it.

- A method without a row is not served: `build_handlers` refuses to build it.
- A row's `callers` are matched against the classes the caller proved; ANYONE admits everybody.
- Streams have no deadline of ours, except attestation, which ends.
- Rates are named here and numbered by the configuration's `limits` table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum, StrEnum
from types import MappingProxyType
from typing import Final

from identity_broker.domain.caller import CallerClass


class RateName(StrEnum):
    """A budget; each caller has one for each method."""

    ATTEST = "attest"
    ISSUE = "issue"
    READ = "read"
    WRITE = "write"
    WATCH = "watch"
    FOLLOW = "follow"  # by all replicas of one identity, which come back together


@dataclass(frozen=True, slots=True)
class Rate:
    """`per_second` calls for ever, `burst` of them at once."""

    per_second: float
    burst: int


class AuditLevel(Enum):
    """What is kept about a call beside its metrics."""

    NONE = "none"  # public and harmless: nothing
    REFUSALS = "refusals"  # a caller refused for who it is
    ISSUANCE = "issuance"  # refusals; what is issued stands in the ledger
    CHANGES = "changes"  # refusals; the change is audited in its own transaction


@dataclass(frozen=True, slots=True)
class MethodRow:
    """What the pipeline enforces for one method.

    `counted` names the repeated field whose length a batch is charged for.
    """

    callers: frozenset[CallerClass]
    deadline: timedelta | None
    rate: RateName | None
    audit: AuditLevel
    idempotent: bool
    counted: str = ""


_ANYONE: Final = frozenset({CallerClass.ANYONE})
_NODE: Final = frozenset({CallerClass.NODE})
_ADMIN: Final = frozenset({CallerClass.ADMIN, CallerClass.LOCAL})
_KNOWN: Final = frozenset(
    {CallerClass.NODE, CallerClass.WORKLOAD, CallerClass.ADMIN, CallerClass.LOCAL}
)

_5S: Final = timedelta(seconds=5)
_15S: Final = timedelta(seconds=15)
_30S: Final = timedelta(seconds=30)
_45S: Final = timedelta(seconds=45)  # waits up to 30 s, on request

_PUBLIC_READ: Final = MethodRow(_ANYONE, _5S, RateName.READ, AuditLevel.NONE, idempotent=True)
_PUBLIC_WATCH: Final = MethodRow(_ANYONE, None, RateName.WATCH, AuditLevel.NONE, idempotent=True)
_READ: Final = MethodRow(_ADMIN, _15S, RateName.READ, AuditLevel.REFUSALS, idempotent=True)
_WATCH: Final = MethodRow(_ADMIN, None, RateName.WATCH, AuditLevel.REFUSALS, idempotent=True)
_CHANGE: Final = MethodRow(_ADMIN, _30S, RateName.WRITE, AuditLevel.CHANGES, idempotent=True)

_V1: Final = "/identity_api.broker.v1."

METHODS: Final[Mapping[str, MethodRow]] = MappingProxyType(
    {
        # How a machine becomes a node.
        f"{_V1}NodeAttestation/Attest": MethodRow(
            _ANYONE, _30S, RateName.ATTEST, AuditLevel.CHANGES, idempotent=False
        ),
        f"{_V1}NodeAttestation/Renew": MethodRow(
            _NODE, _15S, RateName.ISSUE, AuditLevel.ISSUANCE, idempotent=False
        ),
        # Issuing. Each success is one more credential in the ledger: a retry is safe, not free.
        f"{_V1}Svid/BatchIssueX509": MethodRow(
            _NODE, _30S, RateName.ISSUE, AuditLevel.ISSUANCE, idempotent=False, counted="items"
        ),
        f"{_V1}Svid/BatchIssueJwt": MethodRow(
            _NODE, _30S, RateName.ISSUE, AuditLevel.ISSUANCE, idempotent=False, counted="items"
        ),
        # Registration entries.
        f"{_V1}Entry/BatchCreate": MethodRow(
            _ADMIN, _30S, RateName.WRITE, AuditLevel.CHANGES, idempotent=False, counted="entries"
        ),
        f"{_V1}Entry/BatchUpdate": MethodRow(
            _ADMIN, _30S, RateName.WRITE, AuditLevel.CHANGES, idempotent=False, counted="items"
        ),
        f"{_V1}Entry/BatchDelete": MethodRow(
            _ADMIN, _30S, RateName.WRITE, AuditLevel.CHANGES, idempotent=True, counted="ids"
        ),
        f"{_V1}Entry/Get": _READ,
        f"{_V1}Entry/List": _READ,
        f"{_V1}Entry/Watch": _WATCH,
        f"{_V1}Entry/ListAuthorized": MethodRow(
            _NODE, _15S, RateName.READ, AuditLevel.REFUSALS, idempotent=True
        ),
        f"{_V1}Entry/Explain": _READ,
        # Nodes and join tokens.
        f"{_V1}Node/List": _READ,
        f"{_V1}Node/Get": _READ,
        f"{_V1}Node/Ban": _CHANGE,
        f"{_V1}Node/Evict": _CHANGE,
        f"{_V1}Node/CreateJoinToken": MethodRow(
            _ADMIN, _15S, RateName.WRITE, AuditLevel.CHANGES, idempotent=False
        ),
        # What node agents are told.
        f"{_V1}NodeSync/Sync": MethodRow(
            _NODE, None, RateName.WATCH, AuditLevel.REFUSALS, idempotent=True
        ),
        f"{_V1}NodeSync/Await": MethodRow(
            _ADMIN, _45S, RateName.READ, AuditLevel.REFUSALS, idempotent=True
        ),
        # The trust domain's public keys.
        f"{_V1}Bundle/Get": _PUBLIC_READ,
        f"{_V1}Bundle/Watch": _PUBLIC_WATCH,
        # The ledger.
        f"{_V1}Credential/List": _READ,
        f"{_V1}Credential/Get": _READ,
        # Revoking.
        f"{_V1}Revocation/Plan": _READ,
        f"{_V1}Revocation/Revoke": _CHANGE,
        f"{_V1}Revocation/Get": MethodRow(
            _ADMIN, _45S, RateName.READ, AuditLevel.REFUSALS, idempotent=True
        ),
        f"{_V1}Revocation/List": _READ,
        f"{_V1}Revocation/ListHolds": _READ,
        f"{_V1}Revocation/LiftHold": _CHANGE,
        # What verifiers follow.
        f"{_V1}RevocationFeed/Follow": MethodRow(
            _KNOWN, None, RateName.FOLLOW, AuditLevel.REFUSALS, idempotent=True
        ),
        # The signing authorities.
        f"{_V1}Authority/List": _READ,
        f"{_V1}Authority/Show": _READ,
        # gRPC's own services.
        "/grpc.health.v1.Health/Check": _PUBLIC_READ,
        "/grpc.health.v1.Health/List": _PUBLIC_READ,
        "/grpc.health.v1.Health/Watch": _PUBLIC_WATCH,
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _PUBLIC_WATCH,
    }
)
