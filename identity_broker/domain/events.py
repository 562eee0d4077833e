"""Change feed topics and audit events.

- A change is appended in the transaction that made it; `seq` is the commit order.
- An audit event says who did what to whom; it never holds a secret.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType


class Topic(StrEnum):
    """What changed. The key names the object; readers load what they need by key."""

    ENTRY = "entry"  # key: entry id (created, updated or deleted)
    NODE = "node"  # key: node SPIFFE ID (attested, renewed, banned, evicted)
    REVOCATION = "revocation"  # key: serial or jti (revoked, or released from hold)
    EPOCH = "epoch"  # key: SPIFFE ID
    HOLD = "hold"  # key: the hold's name
    KEY = "key"  # key: fingerprint of a blocked key
    AUTHORITY = "authority"  # key: authority kind


@dataclass(frozen=True, slots=True)
class Change:
    """One row of the outbox."""

    seq: int
    topic: Topic
    key: str


class AuditKind(StrEnum):
    """The closed set of audit events."""

    NODE_ATTESTED = "node_attested"
    NODE_RENEWED = "node_renewed"
    NODE_BANNED = "node_banned"
    NODE_EVICTED = "node_evicted"
    JOIN_TOKEN_CREATED = "join_token_created"
    ENTRY_CREATED = "entry_created"
    ENTRY_UPDATED = "entry_updated"
    ENTRY_DELETED = "entry_deleted"
    CREDENTIAL_ISSUED = "credential_issued"
    CREDENTIAL_REVOKED = "credential_revoked"
    CREDENTIAL_UNCONFIRMED = "credential_unconfirmed"
    CREDENTIAL_RELEASED = "credential_released"
    HOLD_PLACED = "hold_placed"
    HOLD_LIFTED = "hold_lifted"
    KEY_BLOCKED = "key_blocked"
    LEAK_REPORTED = "leak_reported"
    REVOCATION_CLOSED = "revocation_closed"
    STATUS_DISAGREES = "status_disagrees"
    AUTHORITY_TAINTED = "authority_tainted"
    AUTHORITY_REVOKED = "authority_revoked"
    AUTHORITY_PREPARED = "authority_prepared"
    AUTHORITY_ACTIVATED = "authority_activated"
    AUTHORITY_RETIRED = "authority_retired"
    CALL_REFUSED = "call_refused"


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """One line of the audit log."""

    at: datetime
    kind: AuditKind
    actor: str
    subject: str
    reason: str = ""
    correlation_id: str = ""
    facts: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
