"""What a deny set is made of: revocations, epochs, issuers, lists, and what the feed told.

- A denial is one small key, a shared number and a reference to the identity it names.
- An identity counts as denied for as long as an X.509-SVID of it is, and no longer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from cryptography import x509

__all__ = [
    "IdentityEpoch",
    "Issuer",
    "KeptDenials",
    "Key",
    "RevocationList",
    "RevokedCredential",
    "Told",
    "id_key",
]

Key = bytes | str


def id_key(credential_id: str) -> Key:
    """What a serial number or jti is kept under: half as many octets where it is hexadecimal.

    Leading zeros do not matter: they are padding in one text and missing in another.
    """
    try:
        octets = bytes.fromhex(credential_id)
    except ValueError:
        return credential_id
    if 2 * len(octets) != len(credential_id):  # fromhex skips blanks
        return credential_id
    return octets.lstrip(b"\0")


@dataclass(frozen=True, slots=True)
class RevokedCredential:
    """One revocation, as the broker announced it.

    Attributes:
        id: serial number (lower-case hexadecimal, 40 digits) or jti.
        spiffe_id: whom the credential named; empty where that does not matter.
        expires_at: when the credential would have expired.
        shown_in_tls: whether it is an X.509-SVID, that a peer may show.
    """

    id: str
    spiffe_id: str
    expires_at: datetime
    shown_in_tls: bool = True


@dataclass(frozen=True, slots=True)
class IdentityEpoch:
    """JWT-SVIDs of one identity issued at or before a moment are to be refused.

    Attributes:
        spiffe_id: whose.
        not_before: seconds since the epoch, against `iat`.
        expires_at: seconds since the epoch; no such token lives longer.
    """

    spiffe_id: str
    not_before: int
    expires_at: int


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
    """What one issuer revoked.

    Attributes:
        issuer: who.
        serials: serial numbers, as `id_key` makes them.
        next_update: seconds since the epoch; until when the list is news.
    """

    issuer: Issuer
    serials: frozenset[Key] = field(repr=False)
    next_update: float = math.inf

    @classmethod
    def of(
        cls, issuer: Issuer, serials: Iterable[str], next_update: float = math.inf
    ) -> RevocationList:
        """The list of these serial numbers, as `peer.serial_text` writes them."""
        return cls(issuer, frozenset(id_key(one) for one in serials), next_update)


@dataclass(frozen=True, slots=True)
class KeptDenials:
    """What the feed told, to be kept over a restart. The collections are copies.

    Attributes:
        denied: until when each is denied, in seconds since the epoch.
        whose: whom those name that a peer may show.
        epochs: of which identities older JWT-SVIDs are refused.
        authorities: whose signatures are worth nothing.
        heard_at: when something was last heard, in seconds since the epoch; 0 for never.
    """

    denied: Mapping[Key, int] = field(repr=False)
    whose: Mapping[Key, str] = field(repr=False)
    epochs: Mapping[str, IdentityEpoch] = field(repr=False)
    authorities: Collection[str] = field(repr=False)
    heard_at: float


class _Named:
    """An identity and its X.509-SVIDs that are denied."""

    __slots__ = ("count", "name", "until")

    def __init__(self, name: str) -> None:
        self.name, self.count, self.until = name, 0, 0


class Told:
    """What the feed told.

    Attributes:
        denied: until when each is denied, in seconds since the epoch.
        epochs: of which identities older JWT-SVIDs are refused.
        authorities: whose signatures are worth nothing; None where that was not said.
    """

    __slots__ = ("_named", "_whose", "authorities", "denied", "epochs")

    def __init__(self) -> None:
        self.denied: dict[Key, int] = {}
        self.epochs: dict[str, IdentityEpoch] = {}
        self.authorities: frozenset[str] | None = None
        self._named: dict[str, _Named] = {}
        # One object for each identity: a denial costs a reference to it.
        self._whose: dict[Key, _Named] = {}

    def deny(self, key: Key, until: int, name: str) -> bool:
        """Denies a credential, never for shorter than before; whether it was not denied.

        Args:
            key: of its id, as `id_key` makes it.
            until: seconds since the epoch.
            name: the SPIFFE ID in it where a peer may show it, else empty.
        """
        known = self.denied.get(key, 0)
        if until >= known:
            self.denied[key] = until
        if name:
            self._name(key, until, name)
        return not known

    def names(self, name: str) -> bool:
        """Whether an X.509-SVID of that identity is denied and has not expired."""
        named = self._named.get(name)
        return named is not None and named.until > time.time()

    def whose(self) -> dict[Key, str]:
        """Whom those name that a peer may show."""
        return {key: named.name for key, named in self._whose.items()}

    def forget(self, key: Key) -> bool:
        """Denies it no more, nor its identity if nothing else of it is denied; whether it was."""
        self._unname(key)
        return self.denied.pop(key, None) is not None

    def prune(self, moment: float) -> None:
        """Forgets what has expired."""
        before = len(self.denied)
        for key in [key for key, until in self.denied.items() if until <= moment]:
            self.forget(key)
        if len(self.denied) < before // 2:
            # A dictionary never shrinks by itself.
            self.denied, self._whose = dict(self.denied), dict(self._whose)
            self._named = dict(self._named)
        for name in [name for name, one in self.epochs.items() if one.expires_at <= moment]:
            del self.epochs[name]

    def _name(self, key: Key, until: int, name: str) -> None:
        known = self._whose.get(key)
        if known is not None and known.name != name:
            self._unname(key)
            known = None
        if known is None:
            known = self._named.get(name)
            if known is None:
                known = self._named[name] = _Named(name)
            known.count += 1
            self._whose[key] = known
        known.until = max(known.until, until)

    def _unname(self, key: Key) -> None:
        named = self._whose.pop(key, None)
        if named is None:
            return
        named.count -= 1
        if not named.count:
            del self._named[named.name]
