"""What an operator revokes, holds and is told about it, as plain values.

- A subject's value is the text an operator types; the broker checks it and answers its canonical
  spelling.
- Times are timezone-aware UTC; None means "not set".
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from identity_client.admin.values import RevocationReason


class SubjectKind(StrEnum):
    """What sort of thing is revoked."""

    UNKNOWN = "unknown"
    SPIFFE_ID = "spiffe-id"
    SERIAL = "serial"
    JTI = "jti"
    NODE = "node"
    ENTRY = "entry"
    KEY_FINGERPRINT = "key-fingerprint"
    AUTHORITY = "authority"
    SELECT = "select"


class RevocationState(StrEnum):
    """Where a revocation stands.

    RUNNING: some of it is still to be revoked, which happens by itself; COMMITTED: all of it is;
    CLOSED: its statement is signed.
    """

    UNKNOWN = "unknown"
    RUNNING = "running"
    COMMITTED = "committed"
    CLOSED = "closed"


class VerifierState(StrEnum):
    """What is known of a verifier.

    It has the revocation; it is connected and has not; it left; or it is a node that was away when
    the revocation was committed, and may still hold what was revoked.
    """

    UNKNOWN = "unknown"
    ACKNOWLEDGED = "acknowledged"
    SILENT = "silent"
    GONE = "gone"
    AWAY = "away"


@dataclass(frozen=True, slots=True)
class Subject:
    """What is revoked: `Subject(SubjectKind.SPIFFE_ID, "spiffe://example.org/shop/orders")`."""

    kind: SubjectKind
    value: str

    def __str__(self) -> str:
        return f"{self.kind.value}={self.value}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldTerms:
    """How a revocation stops issuance.

    Attributes:
        name: what the hold is called; the revocation's id when empty.
        until: when it ends by itself; None for never.
    """

    name: str = ""
    until: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentityCount:
    """How many credentials of an identity may still be valid."""

    spiffe_id: str
    live: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConcerned:
    """A node that credentials were issued through."""

    spiffe_id: str
    connected: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RevocationPlan:
    """What revoking a subject would hit now.

    Attributes:
        subject: in canonical spelling.
        identities: whose credentials, most first; at most 20 of `identity_count`.
        held_entry_ids: entries that nothing would be issued from; at most 100 of
            `held_entry_count`.
        nodes: at most 100 of `node_count`.
        callers: services that called the subject in the last day, where `callers_known`.
        holds: whether a hold comes with it unless refused.
        blocked_keys: fingerprints of keys that would be refused for ever.
        stranded_node_ids: nodes whose own SVID would be revoked and that cannot attest again by
            themselves, though they are not banned by it; at most 100 of `stranded_node_count`.
    """

    subject: Subject
    live_x509: int
    live_jwt: int
    already_revoked: int
    expired: int
    identities: tuple[IdentityCount, ...]
    identity_count: int
    held_entry_ids: tuple[str, ...]
    held_entry_count: int
    nodes: tuple[NodeConcerned, ...]
    node_count: int
    connected_verifiers: int
    callers_known: bool
    callers: tuple[str, ...]
    holds: bool
    blocked_keys: tuple[str, ...]
    stranded_node_ids: tuple[str, ...]
    stranded_node_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Revocation:
    """One decision to revoke, and what became of it.

    Attributes:
        actor: who decided it.
        committed_at: when all of it was durable; None until then.
        revoked: credentials revoked by it; `already_revoked` and `expired`: those it met.
        released: those of its credentials that are valid again.
        hold: the hold it made; empty for none.
        held_entry_ids: entries that the hold holds.
        sequence: the change feed's position that has all of it; 0 until then.
    """

    id: str
    subject: Subject
    reason: RevocationReason
    comment: str
    actor: str
    state: RevocationState
    ordered_at: datetime | None
    committed_at: datetime | None
    revoked: int
    already_revoked: int
    expired: int
    released: int
    hold: str
    held_entry_ids: tuple[str, ...]
    sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Revoked:
    """A revocation that is durable.

    Attributes:
        revoked_ids: what this call revoked; at most 1,000.
        repeated: it was ordered before, so that this call added nothing. False where this call had
            to ask twice: the broker cannot tell then whose the first one was.
    """

    revocation: Revocation
    revoked_ids: tuple[str, ...]
    repeated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Verifier:
    """One verifier and what it has heard.

    Attributes:
        name: its SPIFFE ID, and the name it gave itself.
        kind: "agent", "workload" (directly) or "behind" (an agent).
        latency_ms: from the commit to the acknowledgement; None where the broker saw only one.
        node_id: the node it is told through, for kind "behind".
    """

    name: str
    kind: str
    state: VerifierState
    acknowledged_at: datetime | None
    latency_ms: int | None
    node_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Propagation:
    """Who has heard of a revocation.

    Attributes:
        verifiers: the silent ones first, then those away; at most 1,000.
        told: how many were to be told, or are connected now; without those away.
        away: nodes that were not connected at the commit and are not known to have it.
        p50_ms, p99_ms: from the commit to the acknowledgement; None where the broker saw none.
        within_objective_permille: verifiers that had it within a second, of a thousand connected;
            None where the broker can judge none.
    """

    verifiers: tuple[Verifier, ...]
    told: int
    acknowledged: int
    silent: int
    gone: int
    away: int
    p50_ms: int | None
    p99_ms: int | None
    within_objective_permille: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RevocationStatus:
    """A revocation, who has heard of it, and its signed statement; empty until it is closed."""

    revocation: Revocation
    propagation: Propagation
    statement: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """A named stop of issuance.

    Attributes:
        revocation_id: the revocation it came with.
        until: when it ends by itself; None for never.
        lifted_by: who lifted it; "time" when it ended by itself; empty while it lasts.
        held_entry_ids: entries it holds; at most 100.
    """

    name: str
    subject: Subject
    revocation_id: str
    reason: RevocationReason
    actor: str
    created_at: datetime | None
    until: datetime | None
    lifted_at: datetime | None
    lifted_by: str
    held_entry_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifted:
    """What lifting a hold did: credentials valid again, entries that are issued from again."""

    hold: Hold
    released: int
    freed_entry_ids: tuple[str, ...]


LONGEST_WAIT = timedelta(seconds=30)
"""How long one call waits for acknowledgements, at most."""
