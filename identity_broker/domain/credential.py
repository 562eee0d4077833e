"""The ledger's values: every credential the broker set out to issue.

- An intent is recorded before a signature can exist.
- INTENT → ISSUED when the outcome arrives, → UNCONFIRMED when none does in time.
- ISSUED and UNCONFIRMED → SUPERSEDED, REVOKED, EXPIRED; SUPERSEDED → REVOKED, EXPIRED.
- EXPIRED → REVOKED while the validity lasts: the clock that expired it may have run ahead.
- REVOKED for certificateHold → ISSUED or UNCONFIRMED when the hold is lifted, and → REVOKED for a
  better reason; any other revocation is final.
- A credential that is not REVOKED counts as possibly valid, and can be revoked, until `not_after`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum, StrEnum

from identity_ca.spiffe_id import SpiffeId


class CredentialKind(StrEnum):
    """What sort of credential."""

    X509 = "x509"
    JWT = "jwt"


class CredentialState(StrEnum):
    """Where a credential stands in its life."""

    INTENT = "intent"
    ISSUED = "issued"
    UNCONFIRMED = "unconfirmed"
    SUPERSEDED = "superseded"
    REVOKED = "revoked"
    EXPIRED = "expired"


class RevocationReason(IntEnum):
    """RFC 5280, section 5.3.1 (those that make sense here)."""

    UNSPECIFIED = 0
    KEY_COMPROMISE = 1
    CA_COMPROMISE = 2
    AFFILIATION_CHANGED = 3
    SUPERSEDED = 4
    CESSATION_OF_OPERATION = 5
    CERTIFICATE_HOLD = 6  # the only one that can be taken back
    PRIVILEGE_WITHDRAWN = 9


@dataclass(frozen=True, slots=True)
class CredentialIntent:
    """What is about to be signed. Durable before the signature exists.

    `id` is the serial (40 lower-case hexadecimal digits) or the jti; `entry_id` is empty for a
    node's own SVID and `node_id` is None for the broker's own. `instance` is the node's word for
    the process it is for; empty where that does not matter.
    """

    id: str
    kind: CredentialKind
    spiffe_id: SpiffeId
    entry_id: str
    entry_revision: int
    node_id: SpiffeId | None
    authority_id: str
    key_fingerprint: str
    tbs_digest: str
    not_before: datetime
    not_after: datetime
    recorded_at: datetime
    correlation_id: str = ""
    instance: str = ""


@dataclass(frozen=True, slots=True)
class CredentialOutcome:
    """What became of an intent: issued, with the SHA-256 (hex) of the credential.

    `supersedes` is the serial this one takes the place of, if any.
    """

    id: str
    digest: str
    issued_at: datetime
    supersedes: str = ""


@dataclass(frozen=True, slots=True)
class Credential:
    """A ledger row."""

    intent: CredentialIntent
    state: CredentialState
    digest: str = ""
    revoked_at: datetime | None = None
    reason: RevocationReason | None = None
    comment: str = ""
    order_id: str = ""

    @property
    def id(self) -> str:
        """Serial or jti."""
        return self.intent.id


@dataclass(frozen=True, slots=True)
class Revocation:
    """A credential that is not to be trusted though it has not expired.

    `entry_id`, `node_id` and `instance` are the intent's. `singled_out`: revoked by its own id, not
    with all of an identity or a node, so that the instance itself is not to get another one.
    """

    id: str
    kind: CredentialKind
    spiffe_id: SpiffeId
    revoked_at: datetime
    expires_at: datetime
    reason: RevocationReason
    comment: str = ""
    authority_id: str = ""
    entry_id: str = ""
    node_id: SpiffeId | None = None
    instance: str = ""
    singled_out: bool = False

    def denied_to(self, node_id: SpiffeId) -> str:
        """The instance that this node may give no other SVID of the entry; empty for none.

        Instances are the words of the node they run on: to another one they mean nothing.
        """
        return self.instance if self.singled_out and self.node_id == node_id else ""
