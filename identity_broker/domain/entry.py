"""Registration entries: who shows these selectors below this parent is that SPIFFE ID.

- An entry that contradicts itself or the trust domain cannot be built.
- An entry whose parent is the broker itself names a *group of nodes*: its selectors are matched
  against node selectors. Every other entry belongs to a node or to such a group.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from types import MappingProxyType

from identity_broker.domain import names
from identity_broker.domain.selector import Selector
from identity_broker.errors import EntryInvalid
from identity_ca.keys import KeyAlgorithm
from identity_ca.spiffe_id import SpiffeId, TrustDomain

MIN_TTL = timedelta(seconds=10)
MAX_X509_TTL = timedelta(hours=24)  # the profile's own limit
MAX_JWT_TTL = timedelta(hours=24)
MAX_SELECTORS = 64
MAX_DNS_NAMES = 32
MAX_LABELS = 32
MAX_HINT_BYTES = 1024  # SPIFFE Workload API, section 8
KEY_ALGORITHMS = (KeyAlgorithm.EC_P256, KeyAlgorithm.EC_P384, KeyAlgorithm.RSA_2048)

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_LABEL_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}")


@dataclass(frozen=True, slots=True)
class RegistrationEntry:
    """One statement of who may become what.

    Attributes:
        per_process: one X.509-SVID for each process, instead of one for the node.
        key_algorithm: the kind of key the agent makes; None leaves it to the agent (EC P-256).
        held_by: the hold because of which nothing is issued from it; empty for none.

    Raises:
        EntryInvalid: a field is out of range or contradicts another.
    """

    id: str
    spiffe_id: SpiffeId
    parent_id: SpiffeId
    selectors: frozenset[Selector]
    x509_ttl: timedelta | None = None
    jwt_ttl: timedelta | None = None
    dns_names: tuple[str, ...] = ()
    hint: str = ""
    federates_with: tuple[TrustDomain, ...] = ()
    admin: bool = False
    downstream: bool = False
    disabled: bool = False
    expires_at: datetime | None = None
    owner: str = ""
    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    per_process: bool = False
    key_algorithm: KeyAlgorithm | None = None
    held_by: str = ""
    revision: int = 0
    created_at: datetime | None = None
    updated_at: datetime | None = None

    def __post_init__(self) -> None:
        _check_identity(self)
        _check_keys(self)
        _check_ttl("x509_ttl", self.x509_ttl, MAX_X509_TTL)
        _check_ttl("jwt_ttl", self.jwt_ttl, MAX_JWT_TTL)
        _check_dns_names(self.dns_names)
        _check_texts(self)

    @property
    def names_node_group(self) -> bool:
        """Whether the entry's selectors are matched against node selectors."""
        return self.parent_id == names.broker_id(self.spiffe_id.trust_domain)

    def is_live(self, now: datetime) -> bool:
        """Whether anything may be issued from it at `now`."""
        return self.is_told and (self.expires_at is None or now < self.expires_at)

    @property
    def is_told(self) -> bool:
        """Whether nodes are told of it: it is neither disabled nor on hold."""
        return not self.disabled and not self.held_by

    def with_fields(self, other: RegistrationEntry, fields: frozenset[str]) -> RegistrationEntry:
        """Return this entry with the named fields taken from `other`, checked as a whole.

        Raises:
            EntryInvalid: a field may not be changed, or the result contradicts itself.
        """
        unknown = fields - UPDATABLE_FIELDS
        if unknown:
            raise EntryInvalid(
                f"these fields cannot be updated: {', '.join(sorted(unknown))}",
                hint=f"fields that can: {', '.join(sorted(UPDATABLE_FIELDS))}",
            )
        return replace(self, **{name: getattr(other, name) for name in fields})


UPDATABLE_FIELDS = frozenset(
    {
        "spiffe_id",
        "parent_id",
        "selectors",
        "x509_ttl",
        "jwt_ttl",
        "dns_names",
        "hint",
        "federates_with",
        "admin",
        "downstream",
        "disabled",
        "expires_at",
        "owner",
        "labels",
        "per_process",
        "key_algorithm",
    }
)


def _check_identity(entry: RegistrationEntry) -> None:
    if not _ID.fullmatch(entry.id):
        raise EntryInvalid("an entry id has 1 to 64 letters, digits, dots, underscores and hyphens")
    if not entry.spiffe_id.path:
        raise EntryInvalid(
            f'"{entry.spiffe_id}" has no path: a trust domain\'s own ID is never issued',
            hint='add a path, as in "spiffe://example.org/payments/api"',
        )
    if names.is_reserved(entry.spiffe_id):
        raise EntryInvalid(f'"{entry.spiffe_id}" lies below /idb, which is the broker\'s own')
    if entry.parent_id.trust_domain != entry.spiffe_id.trust_domain:
        raise EntryInvalid(
            f'the parent "{entry.parent_id}" is not in the trust domain of "{entry.spiffe_id}"'
        )
    if not entry.parent_id.path:
        raise EntryInvalid("the parent must be a node, a node group or the broker")
    if entry.parent_id == entry.spiffe_id:
        raise EntryInvalid("an entry cannot be its own parent")
    if not 1 <= len(entry.selectors) <= MAX_SELECTORS:
        raise EntryInvalid(f"an entry needs 1 to {MAX_SELECTORS} selectors")
    if entry.spiffe_id.trust_domain in entry.federates_with:
        raise EntryInvalid("an entry cannot federate with its own trust domain")
    if len(set(entry.federates_with)) != len(entry.federates_with):
        raise EntryInvalid("a trust domain is named twice in federates_with")
    if entry.admin and entry.names_node_group:
        raise EntryInvalid("a node group cannot be an administrator")


def _check_keys(entry: RegistrationEntry) -> None:
    if entry.per_process and entry.names_node_group:
        raise EntryInvalid("a node group has no processes: per_process is for entries of workloads")
    if entry.key_algorithm is not None and entry.key_algorithm not in KEY_ALGORITHMS:
        raise EntryInvalid(
            f"agents make no {entry.key_algorithm} keys",
            hint=f"key_algorithm is one of: {', '.join(KEY_ALGORITHMS)}",
        )


def _check_ttl(name: str, ttl: timedelta | None, longest: timedelta) -> None:
    if ttl is not None and not MIN_TTL <= ttl <= longest:
        raise EntryInvalid(
            f"{name} must be between {int(MIN_TTL.total_seconds())} s "
            f"and {int(longest.total_seconds())} s"
        )


def _check_dns_names(dns_names: tuple[str, ...]) -> None:
    if len(dns_names) > MAX_DNS_NAMES:
        raise EntryInvalid(f"an entry may have at most {MAX_DNS_NAMES} DNS names")
    if len(set(dns_names)) != len(dns_names):
        raise EntryInvalid("a DNS name is listed twice")
    for name in dns_names:
        labels = name.split(".")
        if len(name) > 253 or not all(_DNS_LABEL.fullmatch(label) for label in labels):
            raise EntryInvalid(f"{name[:64]!r} is not a lower-case DNS name")
        if len(labels) >= 2 and labels[1] == "svid":
            raise EntryInvalid(
                f"{name[:64]!r} looks like the DNS name derived from a SPIFFE ID",
                hint='names of the form "<hash>.svid.<trust domain>" are the broker\'s own',
            )


def _check_texts(entry: RegistrationEntry) -> None:
    if len(entry.hint.encode()) > MAX_HINT_BYTES or not _is_text(entry.hint):
        raise EntryInvalid(f"a hint is printable text of at most {MAX_HINT_BYTES} bytes")
    if len(entry.owner.encode()) > 256 or not _is_text(entry.owner):
        raise EntryInvalid("an owner is printable text of at most 256 bytes")
    if len(entry.labels) > MAX_LABELS:
        raise EntryInvalid(f"an entry may have at most {MAX_LABELS} labels")
    for key, value in entry.labels.items():
        if not _LABEL_KEY.fullmatch(key):
            raise EntryInvalid(f"label {key[:64]!r} is not a label name")
        if len(value.encode()) > 256 or not _is_text(value):
            raise EntryInvalid(f'label "{key}" is printable text of at most 256 bytes')


def _is_text(value: str) -> bool:
    return not value or value.isprintable()
