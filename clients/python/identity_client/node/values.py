"""What a node asks the broker for, and what it is told.

- Values alone: nothing here reads a file, a clock or a socket.
- Private keys never appear; tokens never appear in a representation.
- Certificates and CRLs are DER; whoever uses them checks them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Literal

from identity_client.errors import IdentityError

__all__ = [
    "IssuedJwt",
    "IssuedX509",
    "JwtRequest",
    "NodePhase",
    "NodeStatus",
    "SyncEvent",
    "SyncLost",
    "SyncPosition",
    "SyncUpdate",
    "SyncedBundle",
    "SyncedEntry",
    "SyncedEpoch",
    "SyncedJwtKey",
    "SyncedRevocation",
    "Verifier",
    "X509Request",
    "entry_digest",
]

_DIGEST_BYTES = 8


def entry_digest(entry_id: str, revision: int) -> int:
    """One entry's share of the digest that node and broker compare (node_sync.proto).

    The digest of a set of entries is the exclusive or of its members' shares; 0 for none.
    """
    octets = hashlib.sha256(f"{entry_id}\0{revision}".encode()).digest()
    return int.from_bytes(octets[:_DIGEST_BYTES], "big")


# --- the node itself ------------------------------------------------------------------------------


class NodePhase(StrEnum):
    """Where a node stands."""

    ATTESTING = "attesting"  # it has no SVID (any more), and is asking for one
    ATTESTED = "attested"
    BANNED = "banned"  # an operator banned it; asked again now and then
    REFUSED = "refused"  # the broker refuses its proof, and nothing new can be shown


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """A node's own health; holds no secret.

    Attributes:
        phase: see NodePhase.
        node_id: its SPIFFE ID; empty before the first attestation.
        serial: its SVID's serial number, as in the broker's ledger.
        expires_at: when its SVID expires.
        last_error: why the last attempt to attest, renew or follow failed; None after a success.
        state_problem: why the state directory could not be written; empty when it could. The node
            works on, and a restart may need a new proof.
    """

    phase: NodePhase
    node_id: str = ""
    serial: str = ""
    expires_at: datetime | None = None
    last_error: IdentityError | None = None
    state_problem: str = ""


# --- issuing --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class X509Request:
    """An order for one X.509-SVID.

    Attributes:
        entry_id: an entry this node may ask for.
        csr: PKCS #10, DER; contributes its key alone.
        instance: which instance of the workload it is for; kept in the ledger, at most 128 bytes.
    """

    entry_id: str
    csr: bytes = field(repr=False)
    instance: str = ""


@dataclass(frozen=True, slots=True)
class IssuedX509:
    """An X.509-SVID as the broker sent it, unchecked.

    Attributes:
        chain: DER certificates, leaf first, without the root.
        serial: 40 lower-case hexadecimal digits, as in the broker's ledger.
    """

    chain: tuple[bytes, ...] = field(repr=False)
    spiffe_id: str
    serial: str
    not_before: datetime
    not_after: datetime
    hint: str


@dataclass(frozen=True, slots=True)
class JwtRequest:
    """An order for one JWT-SVID."""

    entry_id: str
    audiences: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class IssuedJwt:
    """A JWT-SVID as the broker sent it, unchecked. The token is secret."""

    token: str = field(repr=False)
    spiffe_id: str
    jti: str
    issued_at: datetime
    expires_at: datetime
    hint: str


# --- what the broker pushes -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SyncPosition:
    """Where a node stands: a revision of the change feed, and its entries' digest.

    Revision 0 asks for everything.
    """

    revision: int = 0
    digest: int = 0


@dataclass(frozen=True, slots=True)
class SyncedEntry:
    """An entry this node may ask for.

    Attributes:
        selectors: "type:value", sorted; a process must have all of them.
        key_algorithm: "ec-p256", "ec-p384", "rsa-2048"; empty for the broker's default.
        expires_at: when it stops counting; the node leaves it out from then on.
        x509_ttl, jwt_ttl: None for the broker's default.
    """

    id: str
    revision: int
    spiffe_id: str
    selectors: tuple[str, ...]
    hint: str = ""
    per_process: bool = False
    key_algorithm: str = ""
    expires_at: datetime | None = None
    federates_with: tuple[str, ...] = ()
    created_at: datetime | None = None
    x509_ttl: timedelta | None = None
    jwt_ttl: timedelta | None = None


@dataclass(frozen=True, slots=True)
class SyncedJwtKey:
    """A key that JWT-SVIDs of the trust domain verify with; `public_key` is SPKI in DER."""

    key_id: str
    public_key: bytes = field(repr=False)
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class SyncedBundle:
    """The trust domain's keys; `x509_authorities` are DER CA certificates, at least one."""

    trust_domain: str
    x509_authorities: tuple[bytes, ...] = field(repr=False)
    jwt_keys: tuple[SyncedJwtKey, ...]
    sequence: int
    refresh_hint: timedelta


@dataclass(frozen=True, slots=True)
class SyncedRevocation:
    """A credential that must not be accepted any more, though it has not expired.

    Attributes:
        id: serial number or jti, as in the broker's ledger.
        reason: CRLReason (RFC 5280, section 5.3.1).
        authority_id: who signed it, the subject key identifier in hexadecimal; X.509 only, and
            empty where the broker does not say.
        entry_id, instance: the instance of the workload that is to get no other SVID of that
            entry, because one of its own was revoked by serial number; empty where it may.
    """

    id: str
    kind: Literal["x509", "jwt"]
    spiffe_id: str
    expires_at: datetime
    revoked_at: datetime
    reason: int = 0
    authority_id: str = ""
    entry_id: str = ""
    instance: str = ""


@dataclass(frozen=True, slots=True)
class SyncedEpoch:
    """JWT-SVIDs of the identity whose `iat` is not after `not_before` are to be refused.

    `expires_at`: no such token lives longer; the epoch may be forgotten then.
    """

    spiffe_id: str
    not_before: datetime
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class SyncUpdate:
    """What changed for this node, whole: the broker's messages up to a complete one, joined.

    Attributes:
        revision: where the node stands once it has applied this.
        previous: the revision this builds on; without meaning when `full`.
        full: this replaces everything the node has.
        entries: new or changed ones, all of them when `full`; expired ones may be among them.
        removed_ids: entries the node may not ask for any more.
        bundle: when it changed; never None when `full`.
        revocations: new ones, in the order they were sent; all that are in force when `full`.
        released_ids: credentials that are not revoked any more; none of `revocations`.
        epochs: new ones, in the order they were sent; all that are in force when `full`.
        denied_authorities: ids of all authorities whose signatures are to be refused, when they
            changed; never None when `full`.
        crls: all current lists, when they changed; never None when `full`.
        entries_digest: what the node's entries must give once this is applied.
        sent_at: the broker's clock when it sent the last message of this.
    """

    revision: int
    previous: int
    full: bool
    entries: tuple[SyncedEntry, ...]
    removed_ids: tuple[str, ...]
    bundle: SyncedBundle | None
    revocations: tuple[SyncedRevocation, ...]
    released_ids: tuple[str, ...]
    epochs: tuple[SyncedEpoch, ...]
    denied_authorities: tuple[str, ...] | None
    crls: tuple[bytes, ...] | None = field(repr=False)
    entries_digest: int
    sent_at: datetime
    _acknowledge: Callable[[int], Awaitable[None]] = field(repr=False, compare=False)

    @property
    def is_heartbeat(self) -> bool:
        """Whether it says nothing but "still here, and nothing up to `revision` concerns you"."""
        return not (
            self.full
            or self.entries
            or self.removed_ids
            or self.bundle is not None
            or self.revocations
            or self.released_ids
            or self.epochs
            or self.denied_authorities is not None
            or self.crls is not None
        )

    async def ack(self) -> None:
        """Tell the broker that this has been applied. Does nothing once the stream has ended."""
        await self._acknowledge(self.revision)


@dataclass(frozen=True, slots=True)
class SyncLost:
    """The stream has broken; it is opened again by itself.

    What was heard before stays true as far as anybody knows, except when `error.reason` is
    NODE_BANNED: then nothing may be handed out any more.
    """

    error: IdentityError


SyncEvent = SyncUpdate | SyncLost


# --- what the node tells --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verifier:
    """Somebody who follows revocations through this node.

    Attributes:
        name: its SPIFFE ID, a slash and its process number.
        revision: of the last revocations it has acknowledged; 0 before the first.
    """

    name: str
    revision: int
