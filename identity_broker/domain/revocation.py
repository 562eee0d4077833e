"""What an operator revokes, what became of it, and what is on hold.

- A `RevocationOrder` is one decision: durable before the first credential is touched, so that it is
  finished after a crash. RUNNING → COMMITTED (all of it is revoked) → CLOSED (its statement is
  signed: nothing more becomes of it).
- A `Hold` stops issuance by name until it is lifted or its time is over. Only what was revoked for
  certificateHold is valid again then.
- A blocked key is refused for ever. An epoch ends every JWT-SVID of an identity issued until then,
  those the ledger has not heard of yet included.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from identity_broker.domain.credential import RevocationReason
from identity_broker.errors import SubjectInvalid
from identity_ca.spiffe_id import SpiffeId

MAX_NAME = 64
MAX_SUBJECT_BYTES = 2048
LIFTED_BY_TIME = "time"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class SubjectKind(StrEnum):
    """What sort of thing is revoked."""

    SPIFFE_ID = "spiffe-id"
    SERIAL = "serial"
    JTI = "jti"
    NODE = "node"
    ENTRY = "entry"
    KEY_FINGERPRINT = "key-fingerprint"
    AUTHORITY = "authority"
    SELECT = "select"


@dataclass(frozen=True, slots=True)
class RevocationSubject:
    """What is revoked, in canonical spelling; made by `domain.selection.subject`.

    `value` is a SPIFFE ID (SPIFFE_ID, NODE), 40 lower-case hexadecimal digits (SERIAL), a jti, an
    entry id, the SHA-256 of a SubjectPublicKeyInfo in lower-case hexadecimal, an authority's id, or
    a selection expression.
    """

    kind: SubjectKind
    value: str

    def __str__(self) -> str:
        return f"{self.kind.value}={self.value}"


class OrderState(StrEnum):
    """Where a revocation stands."""

    RUNNING = "running"
    COMMITTED = "committed"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class RevocationOrder:
    """One decision to revoke, and what became of it.

    Attributes:
        id: chosen by the caller or random ("rev-" and 16 hexadecimal digits).
        actor: who decided it, as the audit log names callers.
        revoked: credentials revoked by it; `already_revoked` and `expired`: those it met.
        released: those of its credentials that are valid again.
        hold: the name of the hold it made; empty for none.
        sequence: the change feed's position that has all of it; 0 until it is committed.
        swept: whether what was under way elsewhere has been looked for a second time.
        statement: the signed statement (JWS, flattened JSON); empty until it is closed.
    """

    id: str
    subject: RevocationSubject
    reason: RevocationReason
    comment: str
    actor: str
    ordered_at: datetime
    state: OrderState = OrderState.RUNNING
    committed_at: datetime | None = None
    revoked: int = 0
    already_revoked: int = 0
    expired: int = 0
    released: int = 0
    hold: str = ""
    sequence: int = 0
    swept: bool = False
    statement: str = ""


@dataclass(frozen=True, slots=True)
class Hold:
    """A named stop of issuance.

    Attributes:
        subject: SPIFFE_ID, ENTRY, NODE or SELECT stop what they name; any other kind stops nothing
            and is there to be lifted: its credentials were revoked for certificateHold.
        order_id: the revocation it came with.
        until: when it ends by itself; None for never.
        lifted_by: who lifted it; "time" when it ended by itself; empty while it lasts.
    """

    name: str
    subject: RevocationSubject
    order_id: str
    reason: RevocationReason
    actor: str
    created_at: datetime
    until: datetime | None = None
    lifted_at: datetime | None = None
    lifted_by: str = ""

    def lasts(self, now: datetime) -> bool:
        """Whether it is in force at `now`."""
        return self.lifted_at is None and (self.until is None or now < self.until)


@dataclass(frozen=True, slots=True)
class BlockedKey:
    """A key that is refused for ever: SHA-256 of its SubjectPublicKeyInfo, hexadecimal."""

    fingerprint: str
    order_id: str
    reason: RevocationReason
    blocked_at: datetime


@dataclass(frozen=True, slots=True)
class IdentityEpoch:
    """JWT-SVIDs of the identity whose `iat` is not after `not_before` are to be refused.

    `expires_at`: no such token lives longer, so the epoch may be forgotten then.
    """

    spiffe_id: SpiffeId
    not_before: datetime
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class IdentityCount:
    """How many credentials of an identity may still be valid."""

    spiffe_id: SpiffeId
    live: int


@dataclass(frozen=True, slots=True)
class LedgerCount:
    """What the ledger knows of a subject, at one moment.

    Attributes:
        live_x509, live_jwt: those that may still be valid.
        expired: of the 100,000 that expired last, where no index finds the subject's: a key, an
            authority, an expression without identity, node, entry, owner or label.
        identities: whose they are, most first, at most 20 of `identity_count`.
        node_ids: through which nodes, at most 100 of `node_count`.
    """

    live_x509: int
    live_jwt: int
    already_revoked: int
    expired: int
    identities: tuple[IdentityCount, ...]
    identity_count: int
    node_ids: tuple[SpiffeId, ...]
    node_count: int


def check_name(name: str, what: str) -> str:
    """Return the name of a revocation or a hold.

    Raises:
        SubjectInvalid: it is not [A-Za-z0-9._-], 1 to 64 of them, beginning with a letter or digit.
    """
    if not _NAME.fullmatch(name):
        raise SubjectInvalid(
            f"{what} has 1 to {MAX_NAME} letters, digits, dots, underscores and hyphens"
        )
    return name
