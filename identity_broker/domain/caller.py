"""Who is calling, as far as the broker could prove it.

- A caller's classes are what the method table is matched against.
- A caller is rebuilt for every call: a connection outlives certificates, bans and revocations.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from identity_ca.spiffe_id import SpiffeId


class CallerClass(StrEnum):
    """What a method's row can allow."""

    ANYONE = "anyone"  # no proof at all: the bootstrap listener
    NODE = "node"  # an X.509-SVID of an attested node
    WORKLOAD = "workload"  # any other X.509-SVID this broker issued
    ADMIN = "admin"  # a workload whose live entry has the admin flag
    LOCAL = "local"  # root or the broker's own user on the admin socket


class ListenerKind(StrEnum):
    """Where a call came in: decides what the broker can know of the peer."""

    BOOTSTRAP = "bootstrap"  # TLS, no client certificate: nothing
    MTLS = "mtls"  # TLS with a client certificate: a PeerCertificate
    LOCAL = "local"  # the admin socket: a LocalPeer


@dataclass(frozen=True, slots=True)
class PeerCertificate:
    """What the TLS handshake showed of the peer, parsed once per certificate.

    `authority_key_id` is the leaf's authorityKeyIdentifier in lower-case hexadecimal, "" where it
    has none: which authority says that it signed.
    """

    spiffe_id: SpiffeId
    serial: str
    not_after: datetime
    authority_key_id: str


@dataclass(frozen=True, slots=True)
class LocalPeer:
    """The process at the other end of the admin socket (SO_PEERCRED).

    `groups` are its supplementary groups when it connected (SO_PEERGROUPS); `gid` is not
    necessarily among them.
    """

    pid: int
    uid: int
    gid: int
    groups: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Caller:
    """A proven caller.

    `name` is for logs, limits and the audit: a SPIFFE ID, "uid:0", or an address.
    """

    classes: frozenset[CallerClass]
    name: str
    spiffe_id: SpiffeId | None = None
    serial: str = ""
    local: LocalPeer | None = None

    @property
    def is_anonymous(self) -> bool:
        """Whether nothing but a network address is known of it."""
        return self.spiffe_id is None and self.local is None
