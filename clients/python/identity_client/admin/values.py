"""What an operator reads and writes through the admin API, as plain values.

- SPIFFE IDs and selectors are their canonical strings: the broker is the one that checks them,
  so a malformed one is refused with the broker's own reason.
- Times are timezone-aware UTC; None means "not set".
- An enum value of a newer broker reads as UNKNOWN instead of failing the whole answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from types import MappingProxyType
from typing import Generic, TypeVar

from identity_client.errors import IdentityError

T = TypeVar("T")


class CredentialKind(StrEnum):
    """What sort of credential."""

    UNKNOWN = "unknown"
    X509 = "x509"
    JWT = "jwt"


class CredentialState(StrEnum):
    """Where a credential stands in its life."""

    UNKNOWN = "unknown"
    INTENT = "intent"
    ISSUED = "issued"
    UNCONFIRMED = "unconfirmed"
    SUPERSEDED = "superseded"
    REVOKED = "revoked"
    EXPIRED = "expired"


class RevocationReason(StrEnum):
    """RFC 5280, section 5.3.1 (those that make sense here)."""

    UNSPECIFIED = "unspecified"
    KEY_COMPROMISE = "key-compromise"
    CA_COMPROMISE = "ca-compromise"
    AFFILIATION_CHANGED = "affiliation-changed"
    SUPERSEDED = "superseded"
    CESSATION_OF_OPERATION = "cessation-of-operation"
    CERTIFICATE_HOLD = "certificate-hold"
    PRIVILEGE_WITHDRAWN = "privilege-withdrawn"


class AuthorityKind(StrEnum):
    """What an authority signs."""

    UNKNOWN = "unknown"
    X509 = "x509"
    JWT = "jwt"


class AuthorityState(StrEnum):
    """Where an authority stands in its life."""

    UNKNOWN = "unknown"
    PREPARED = "prepared"
    ACTIVE = "active"
    OLD = "old"
    TAINTED = "tainted"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Who shows these selectors below this parent is that SPIFFE ID.

    `selectors` are "type:value". `id` may be empty on create: the broker then chooses one.
    `per_process` asks for one X.509-SVID for each process; `key_algorithm` is "ec-p256" (when
    empty), "ec-p384" or "rsa-2048".
    `held_by` (the hold because of which nothing is issued), `revision`, `created_at` and
    `updated_at` are the broker's.
    """

    id: str = ""
    spiffe_id: str = ""
    parent_id: str = ""
    selectors: tuple[str, ...] = ()
    x509_ttl: timedelta | None = None
    jwt_ttl: timedelta | None = None
    dns_names: tuple[str, ...] = ()
    hint: str = ""
    federates_with: tuple[str, ...] = ()
    admin: bool = False
    downstream: bool = False
    disabled: bool = False
    expires_at: datetime | None = None
    owner: str = ""
    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    per_process: bool = False
    key_algorithm: str = ""
    held_by: str = ""
    revision: int = 0
    created_at: datetime | None = None
    updated_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryQuery:
    """Exact matches; empty means any. Every one of `selectors` must be among the entry's."""

    spiffe_id: str = ""
    parent_id: str = ""
    selectors: tuple[str, ...] = ()
    owner: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class EntryChange:
    """An update of one entry: the named fields of `entry` replace the stored ones.

    A non-zero `entry.revision` makes the update fail with STALE_WRITE unless it is current.
    """

    entry: Entry
    fields: frozenset[str]


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """What became of one item of a batch; `value` may be there beside an error (ENTRY_EXISTS)."""

    value: T | None
    error: IdentityError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One rule on the way to an entry, in the broker's order; `selector` where it is about one."""

    rule: str
    held: bool
    detail: str = ""
    selector: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Why an entry would or would not be issued to a node."""

    entry: Entry
    authorized: bool
    checks: tuple[Check, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """An attested node; `svid_revoked`: it is refused until it has attested again."""

    spiffe_id: str
    attestor: str
    selectors: tuple[str, ...]
    attested_at: datetime | None
    serial: str
    expires_at: datetime | None
    banned: bool
    ban_reason: str
    reattestable: bool
    svid_revoked: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """Which nodes stand at `revision` of the change feed, or later.

    `applied` were told of a change and have applied it; `pending` were told, or waited for, and
    have not answered in time; `connected` counts the nodes connected to the broker that was asked.
    """

    revision: int
    applied: tuple[str, ...]
    pending: tuple[str, ...]
    connected: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinToken:
    """A single-use token; `token` is a secret that is shown once and kept out of repr()."""

    token: str = field(repr=False)
    expires_at: datetime | None
    node_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    """A ledger row: a credential the broker set out to issue.

    `id` is its serial or jti; `instance` is the process it is for, in the node's words;
    `revocation_id` names what ended it, for `revocations.get`.
    """

    id: str
    kind: CredentialKind
    state: CredentialState
    spiffe_id: str
    entry_id: str
    entry_revision: int
    node_id: str
    authority_id: str
    key_fingerprint: str
    tbs_digest: str
    digest: str
    not_before: datetime | None
    expires_at: datetime | None
    recorded_at: datetime | None
    revoked_at: datetime | None
    reason: RevocationReason | None
    comment: str
    instance: str = ""
    revocation_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CredentialQuery:
    """Exact matches; empty means any."""

    spiffe_id: str = ""
    node_id: str = ""
    entry_id: str = ""
    states: frozenset[CredentialState] = frozenset()
    kind: CredentialKind | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Authority:
    """A signing authority. Certificates and keys are DER."""

    id: str
    kind: AuthorityKind
    state: AuthorityState
    key_id: str
    algorithm: str
    not_before: datetime | None
    expires_at: datetime | None
    certificate_chain: tuple[bytes, ...]
    roots: tuple[bytes, ...]
    public_key: bytes
    upstream: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleJwtKey:
    """A key JWT-SVIDs verify with: SubjectPublicKeyInfo, DER."""

    key_id: str
    public_key: bytes
    expires_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """The trust domain's bundle. Certificates are DER."""

    trust_domain: str
    x509_authorities: tuple[bytes, ...]
    jwt_keys: tuple[BundleJwtKey, ...]
    refresh_hint: timedelta
    sequence: int
