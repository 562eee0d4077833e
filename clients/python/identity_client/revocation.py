"""The deny set: what was revoked and has not expired yet.

- One writer, any number of reading threads; a look-up is a dictionary access or two and takes no
  lock.
- What the broker's feed told is taken back in two ways alone: by name (`release`), or by a
  complete new state that does not have it any more (`begin_full` … `finish_full`). What such a
  state denies is denied before it is complete.
- What a Workload API sends as revocation lists is the full state of one moment (Workload API,
  section 4.4): the newest lists replace those before. A list denies its own issuer's certificates
  and nobody else's (RFC 5280, section 5). Lists and feed do not touch each other's denials.
- Bounded: what has expired is refused for that alone and leaves. A denial is one small key and a
  shared number: 100,000 of them take some 12 MB.
- Whoever holds connections open is told when somebody was denied (`watch`), and held weakly.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import weakref
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Final, Protocol

from cryptography import x509

from identity_client.errors import RevocationsStale
from identity_client.staleness import DEFAULT_STALENESS, StalenessPolicy, uptime

__all__ = [
    "DenySet",
    "IdentityEpoch",
    "Issuer",
    "KeptDenials",
    "RevocationList",
    "RevokedCredential",
    "Watcher",
    "id_key",
]

_logger = logging.getLogger(__name__)

# Expired denials are harmless: it is enough to look for them now and then.
_PRUNE_SECONDS: Final = 60.0
# No credential lives longer; a denial for ever would never leave.
_LONGEST_SECONDS: Final = 10 * 366 * 86_400

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
    """What the feed told, to be kept over a restart. The collections are copies."""

    denied: Mapping[Key, int] = field(repr=False)
    named: Mapping[str, int] = field(repr=False)
    epochs: Mapping[str, IdentityEpoch] = field(repr=False)
    authorities: Collection[str] = field(repr=False)
    heard_at: float


class Watcher(Protocol):
    """Somebody who holds connections open."""

    def peers_denied(self) -> None:
        """Somebody was denied just now. On the source's thread; must not block or raise."""
        ...


class _Told:
    """What the feed told."""

    __slots__ = ("authorities", "denied", "epochs", "named")

    def __init__(self) -> None:
        self.denied: dict[Key, int] = {}
        self.named: dict[str, int] = {}
        self.epochs: dict[str, IdentityEpoch] = {}
        self.authorities: frozenset[str] | None = None


class DenySet:
    """Who must be refused though nothing has expired.

    Attributes:
        feed_synced: whether the feed's whole state is known and its stream is open.
        lists_synced: whether revocation lists arrive.
        heard_at: when something was last heard about revocations, "nothing new" included.
        staleness: what silence means for checks that name no other policy.
    """

    def __init__(self, staleness: StalenessPolicy = DEFAULT_STALENESS) -> None:
        self.staleness = staleness
        self.feed_synced = False
        self.lists_synced = False
        self.heard_at: datetime | None = None
        self._told = _Told()
        self._coming: _Told | None = None
        self._authorities: frozenset[str] = frozenset()
        self._key_ids: frozenset[bytes] = frozenset()
        self._lists: tuple[RevocationList, ...] = ()
        self._lists_until = 0.0
        # Equal expiries share one number.
        self._moments: dict[int, int] = {}
        self._pruned = 0.0
        self._heard = uptime()
        self._warned: float | None = None
        self._watchers: weakref.WeakSet[Watcher] = weakref.WeakSet()
        self._watching = threading.Lock()

    # --- for readers ---------------------------------------------------------------------------

    def __contains__(self, credential_id: object) -> bool:
        return isinstance(credential_id, str) and id_key(credential_id) in self._told.denied

    def __len__(self) -> int:
        return len(self._told.denied) + sum(len(one.serials) for one in self._lists)

    def __repr__(self) -> str:
        return f"DenySet({len(self)} revoked, synced={self.synced})"

    @property
    def synced(self) -> bool:
        """Whether revocations arrive as they happen."""
        return self.feed_synced or self.lists_synced

    def denies(self, serial: str, issuer: Issuer | None) -> bool:
        """Whether the certificate with that serial number from that issuer is revoked."""
        key = id_key(serial)
        if key in self._told.denied:
            return True
        if issuer is None:
            return False
        if self._key_ids and issuer.key_id in self._key_ids:
            return True
        return any(key in one.serials and one.issuer.may_be(issuer) for one in self._lists)

    def denies_token(
        self, jti: str, spiffe_id: str, issued_at: float | None, key_id: str = ""
    ) -> bool:
        """Whether a JWT-SVID is revoked: by name, with its identity, or with its authority.

        Args:
            jti: empty for none.
            spiffe_id: whom it names.
            issued_at: `iat`; a token without one counts as older than anything.
            key_id: `kid` of its header.
        """
        told = self._told
        if jti and id_key(jti) in told.denied:
            return True
        if key_id and key_id in self._authorities:
            return True
        epoch = told.epochs.get(spiffe_id)
        if epoch is None or epoch.expires_at <= time.time():
            return False
        return issued_at is None or issued_at <= epoch.not_before

    def names(self, spiffe_id: str) -> bool:
        """Whether an X.509-SVID of that identity is denied by the feed and has not expired."""
        return self._told.named.get(spiffe_id, 0) > time.time()

    def check_fresh(self, policy: StalenessPolicy | None = None) -> None:
        """What silence means: nothing, one warning, or that nobody is accepted.

        Raises:
            RevocationsStale: the policy is to refuse.
        """
        policy = policy or self.staleness
        if uptime() - self._heard < policy.seconds:
            return
        age = self.age
        if age < policy.seconds:
            return
        if policy.refuses:
            raise RevocationsStale(f"nothing was heard about revocations for {age:.0f} s")
        self._warn_once(age)

    def note_silence(self) -> None:
        """Says so once where nothing was heard for too long, though nobody is being checked."""
        age = self.age
        if age >= self.staleness.seconds:
            self._warn_once(age)

    def is_stale(self, policy: StalenessPolicy | None = None) -> bool:
        """Whether nothing was heard for longer than the policy allows."""
        return self.age >= (policy or self.staleness).seconds

    @property
    def age(self) -> float:
        """Seconds since something was heard about revocations, or since the start."""
        if self.lists_synced and time.time() < self._lists_until:
            return 0.0  # Their issuer promises the next ones for later.
        return max(0.0, uptime() - self._heard)

    def watch(self, watcher: Watcher) -> None:
        """Tells `watcher` of every denial for as long as it lives."""
        with self._watching:
            self._watchers.add(watcher)

    # --- what the feed told --------------------------------------------------------------------

    def add(
        self, revoked: Iterable[RevokedCredential], *, now: datetime
    ) -> tuple[RevokedCredential, ...]:
        """Denies what has not expired, forgets what has; returns what was not denied before."""
        moment = now.timestamp()
        self.prune(now=now)
        furthest = int(moment) + _LONGEST_SECONDS
        fresh = []
        for one in revoked:
            expires_at = min(math.ceil(one.expires_at.timestamp()), furthest)
            if expires_at <= moment:
                continue
            key = id_key(one.id)
            expires_at = self._moments.setdefault(expires_at, expires_at)
            if self._coming is not None:
                self._coming.denied[key] = expires_at
                _name(self._coming.named, one, expires_at)
            _name(self._told.named, one, expires_at)
            if key not in self._told.denied:
                fresh.append(one)
            self._told.denied[key] = max(expires_at, self._told.denied.get(key, 0))
        return tuple(fresh)

    def release(self, ids: Iterable[str]) -> bool:
        """Denies these no more: they were on hold. Returns whether any was denied.

        While a full state is coming, it is that state which they are taken from.
        """
        told = self._coming or self._told
        found = [told.denied.pop(id_key(one), None) for one in ids]
        return any(one is not None for one in found)

    def raise_epoch(self, epoch: IdentityEpoch) -> bool:
        """Refuses an identity's older JWT-SVIDs; an epoch is never lowered. Whether it was news."""
        moment = int(time.time())
        if epoch.expires_at <= moment:
            return False
        if epoch.expires_at > moment + _LONGEST_SECONDS:
            epoch = replace(epoch, expires_at=moment + _LONGEST_SECONDS)
        if self._coming is not None:
            _raise(self._coming.epochs, epoch)
        return _raise(self._told.epochs, epoch)

    def deny_authorities(self, ids: Iterable[str], *, only: bool = True) -> bool:
        """Refuses what these authorities signed. Returns whether one is new.

        While a full state is coming, those it does not name are denied until it is complete.

        Args:
            ids: subject key identifiers, hexadecimal, and key IDs of JWT authorities.
            only: no others any more.
        """
        ids = frozenset(ids)
        if self._coming is not None:
            self._coming.authorities = (self._coming.authorities or frozenset()) | ids
        if self._coming is not None or not only:
            ids |= self._authorities
        new = bool(ids - self._authorities)
        self._use_authorities(ids)
        return new

    def begin_full(self) -> None:
        """What comes from now on replaces everything the feed told, once it is complete."""
        self._coming = _Told()

    def finish_full(self) -> None:
        """The full state is complete: what it does not have is denied no more."""
        if self._coming is not None:
            self._told, self._coming = self._coming, None
            if self._told.authorities is not None:
                self._use_authorities(self._told.authorities)

    def abandon_full(self) -> None:
        """The full state will not be completed: what is denied stays denied."""
        self._coming = None

    def _use_authorities(self, ids: frozenset[str]) -> None:
        self._authorities = ids
        self._key_ids = frozenset(key for one in ids if (key := _octets(one)))

    def prune(self, *, now: datetime) -> None:
        """Forgets what has expired; looks for it once a minute."""
        moment = now.timestamp()
        if 0 <= moment - self._pruned < _PRUNE_SECONDS:
            return
        self._pruned = moment
        self._moments.clear()
        for told in (self._told, self._coming):
            if told is None:
                continue
            before = len(told.denied)
            for key in [key for key, expiry in told.denied.items() if expiry <= moment]:
                del told.denied[key]
            if len(told.denied) < before // 2:
                told.denied = dict(told.denied)  # A dictionary never shrinks by itself.
            for name in [name for name, expiry in told.named.items() if expiry <= moment]:
                del told.named[name]
            for name in [name for name, e in told.epochs.items() if e.expires_at <= moment]:
                del told.epochs[name]

    def keep(self) -> KeptDenials:
        """A copy of what the feed told."""
        told = self._told
        return KeptDenials(
            denied=dict(told.denied),
            named=dict(told.named),
            epochs=dict(told.epochs),
            authorities=self._authorities,
            heard_at=self.heard_at.timestamp() if self.heard_at else 0.0,
        )

    def restore(self, kept: KeptDenials, *, now: datetime) -> None:
        """Denies what was kept, beside whatever is denied already."""
        moment = int(now.timestamp())
        furthest = moment + _LONGEST_SECONDS
        told = self._told
        told.denied |= {k: min(t, furthest) for k, t in kept.denied.items() if t > moment}
        told.named |= {k: min(t, furthest) for k, t in kept.named.items() if t > moment}
        for epoch in kept.epochs.values():
            self.raise_epoch(epoch)
        self._use_authorities(self._authorities | frozenset(kept.authorities))
        if 0 < kept.heard_at <= moment:
            self.heard_at = datetime.fromtimestamp(kept.heard_at, UTC)
            self._heard = uptime() - (moment - kept.heard_at)

    # --- what lists told -----------------------------------------------------------------------

    def replace_lists(self, lists: Iterable[RevocationList], *, now: datetime) -> None:
        """Takes the newest revocation lists in place of those before."""
        self._lists = tuple(lists)
        self.lists_synced = bool(self._lists)
        self._lists_until = min((one.next_update for one in self._lists), default=0.0)
        if self._lists:
            self.hear(now=now)

    def lose_lists(self) -> None:
        """Lists do not arrive any more; silence counts from now."""
        if self.lists_synced:
            self.lists_synced = False
            self._heard = max(self._heard, uptime())

    # --- news ----------------------------------------------------------------------------------

    def hear(self, *, now: datetime, ago: float = 0.0) -> None:
        """Something was heard about revocations, if only that there are none.

        Args:
            now: when that was.
            ago: how many seconds that is ago.
        """
        self.heard_at = now
        self._heard = uptime() - ago

    def tell_watchers(self) -> None:
        """Somebody was denied: whoever holds connections open looks through them."""
        with self._watching:
            watchers = list(self._watchers)
        for watcher in watchers:
            try:
                watcher.peers_denied()
            except Exception:  # One that fails must not keep the others' connections open.
                _logger.exception("closing the connections of revoked peers failed")

    def _warn_once(self, age: float) -> None:
        heard = self._heard
        if self._warned != heard:
            self._warned = heard
            _logger.warning(
                "nothing was heard about revocations for %.0f s: peers are checked against those "
                "known so far",
                age,
            )


def _name(named: dict[str, int], one: RevokedCredential, expires_at: int) -> None:
    if one.shown_in_tls and one.spiffe_id and named.get(one.spiffe_id, 0) < expires_at:
        named[one.spiffe_id] = expires_at


def _raise(epochs: dict[str, IdentityEpoch], epoch: IdentityEpoch) -> bool:
    known = epochs.get(epoch.spiffe_id)
    if known is None:
        epochs[epoch.spiffe_id] = epoch
        return True
    epochs[epoch.spiffe_id] = IdentityEpoch(
        epoch.spiffe_id,
        max(known.not_before, epoch.not_before),
        max(known.expires_at, epoch.expires_at),
    )
    return epoch.not_before > known.not_before


def _octets(hexadecimal: str) -> bytes:
    try:
        return bytes.fromhex(hexadecimal)
    except ValueError:
        return b""  # A JWT authority's key ID.
