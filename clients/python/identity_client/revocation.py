"""The deny set: what was revoked and has not expired yet.

- One writer, any number of reading threads; a look-up is a dictionary access or two.
- What the broker announces by name is never taken back: a new listing adds to the set and
  replaces nothing. It is bounded by expiry: what has expired is refused for that alone.
- What a Workload API sends as revocation lists is the full state of one moment (Workload API,
  section 4.4): the newest lists replace those before. A list denies its own issuer's certificates
  and nobody else's (RFC 5280, section 5).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime

from cryptography import x509

__all__ = ["DenySet", "Issuer", "RevocationList", "RevokedCredential"]


@dataclass(frozen=True, slots=True)
class RevokedCredential:
    """One revocation, as the broker announced it.

    Attributes:
        id: serial number (lower-case hexadecimal, 40 digits) or jti.
        spiffe_id: whom the credential named.
        expires_at: when the credential would have expired.
    """

    id: str
    spiffe_id: str
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Issuer:
    """Who signed a certificate or a revocation list, as it says itself.

    Attributes:
        name: the issuer's distinguished name, DER.
        key_id: keyIdentifier of the authority key identifier; empty where there is none.
    """

    name: bytes = field(repr=False)
    key_id: bytes

    @classmethod
    def of(cls, signed: x509.Certificate | x509.CertificateRevocationList) -> Issuer:
        """The issuer that `signed` names."""
        try:
            found = signed.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier)
            key_id = found.value.key_identifier or b""
        except x509.ExtensionNotFound:
            key_id = b""
        return cls(signed.issuer.public_bytes(), key_id)

    def may_be(self, other: Issuer) -> bool:
        """Whether both can be the same: where one names no key, the distinguished name decides."""
        same_key = not (self.key_id and other.key_id) or self.key_id == other.key_id
        return same_key and self.name == other.name


@dataclass(frozen=True, slots=True)
class RevocationList:
    """What one issuer revoked: serial numbers as `peer.serial_text` writes them."""

    issuer: Issuer
    serials: frozenset[str] = field(repr=False)


class DenySet:
    """Serial numbers and jtis that must be refused."""

    __slots__ = ("_denied", "_expiries", "_lists", "synced")

    def __init__(self) -> None:
        self._denied: dict[str, datetime] = {}
        self._expiries: list[tuple[datetime, str]] = []
        self._lists: tuple[RevocationList, ...] = ()
        # Whether the broker's whole listing has been read and its stream is open.
        self.synced = False

    def __contains__(self, credential_id: object) -> bool:
        return credential_id in self._denied

    def __len__(self) -> int:
        return len(self._denied) + sum(len(one.serials) for one in self._lists)

    def __repr__(self) -> str:
        return f"DenySet({len(self)} revoked, synced={self.synced})"

    def denies(self, serial: str, issuer: Issuer | None) -> bool:
        """Whether the certificate with that serial number from that issuer is revoked."""
        if serial in self._denied:
            return True
        if issuer is None:
            return False
        return any(serial in one.serials and one.issuer.may_be(issuer) for one in self._lists)

    def replace_lists(self, lists: Iterable[RevocationList]) -> None:
        """Takes the newest revocation lists in place of those before."""
        self._lists = tuple(lists)

    def add(
        self, revoked: Iterable[RevokedCredential], *, now: datetime
    ) -> tuple[RevokedCredential, ...]:
        """Denies what has not expired, forgets what has; returns what was not denied before."""
        self.prune(now=now)
        fresh = []
        for credential in revoked:
            if credential.expires_at <= now or credential.id in self._denied:
                continue
            self._denied[credential.id] = credential.expires_at
            heapq.heappush(self._expiries, (credential.expires_at, credential.id))
            fresh.append(credential)
        return tuple(fresh)

    def prune(self, *, now: datetime) -> None:
        """Forgets what has expired."""
        while self._expiries and self._expiries[0][0] <= now:
            self._denied.pop(heapq.heappop(self._expiries)[1], None)
