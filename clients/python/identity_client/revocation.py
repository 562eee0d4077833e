"""The deny set: what was revoked and has not expired yet.

- One writer, any number of reading threads; a look-up is a dictionary access or two and takes no
  lock.
- What the broker's feed told is taken back in two ways alone: by name (`release`), or by a
  complete new state that does not have it any more (`begin_full` … `finish_full`). What such a
  state denies is denied before it is complete.
- What a Workload API sends as revocation lists is the full state of one moment (Workload API,
  section 4.4): the newest lists replace those before. A list denies its own issuer's certificates
  and nobody else's (RFC 5280, section 5). Lists and feed do not touch each other's denials.
- Bounded: what has expired is refused for that alone and leaves.
- Where there is a feed, it alone is news: an agent that has lost its broker still sends the lists
  it has. Lists are news where there is no feed.
- Whoever holds connections open is told when somebody was denied (`watch`), and held weakly.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import weakref
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final, Protocol

from identity_client.denials import (
    IdentityEpoch,
    Issuer,
    KeptDenials,
    RevocationList,
    RevokedCredential,
    Told,
    id_key,
)
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


class Watcher(Protocol):
    """Somebody who holds connections open."""

    def peers_denied(self) -> None:
        """Somebody was denied just now. On the source's thread; must not block or raise."""
        ...


class DenySet:
    """Who must be refused though nothing has expired.

    Attributes:
        feed_synced: whether the feed's whole state is known and its stream is open.
        lists_synced: whether revocation lists arrive.
        feed_served: whether there has ever been a feed; lists are no news then.
        feed_absent: whether it was said that there is none, and there never was one.
        heard_at: when something was last heard about revocations, "nothing new" included.
        staleness: what silence means for checks that name no other policy.
    """

    def __init__(self, staleness: StalenessPolicy = DEFAULT_STALENESS) -> None:
        self.staleness = staleness
        self.feed_synced = False
        self.lists_synced = False
        self.feed_served = False
        self.feed_absent = False
        self.heard_at: datetime | None = None
        self._told = Told()
        self._coming: Told | None = None
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
        return self.feed_synced or (self.feed_absent and self.lists_synced)

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

    def cannot_place(self, issuer: Issuer | None) -> bool:
        """Whether an authority is denied, and a certificate does not say that it is not its own.

        Without an authority key identifier nothing tells authorities of one name apart.
        """
        return bool(self._key_ids) and (issuer is None or not issuer.key_id)

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
        return self._told.names(spiffe_id)

    def may_concern(self, spiffe_id: str) -> bool:
        """Whether what is denied may be an X.509-SVID of that identity.

        A denied authority may have signed one for anybody. A list names nobody; where there is a
        feed, that says who is meant.
        """
        if self._key_ids or self._told.names(spiffe_id):
            return True
        return not self.feed_served and any(one.serials for one in self._lists)

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
        if self.feed_absent and self.lists_synced and uptime() < self._lists_until:
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
            name = one.spiffe_id if one.shown_in_tls else ""
            if self._coming is not None:
                self._coming.deny(key, expires_at, name)
            if self._told.deny(key, expires_at, name):
                fresh.append(one)
        return tuple(fresh)

    def release(self, ids: Iterable[str]) -> bool:
        """Denies these no more: they were on hold. Returns whether any was denied.

        While a full state is coming, it is that state which they are taken from.
        """
        told = self._coming or self._told
        return sum(told.forget(id_key(one)) for one in ids) > 0

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
        self._coming = Told()

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
            if told is not None:
                told.prune(moment)

    def keep(self) -> KeptDenials:
        """A copy of what the feed told."""
        told = self._told
        return KeptDenials(
            denied=dict(told.denied),
            whose=told.whose(),
            epochs=dict(told.epochs),
            authorities=self._authorities,
            heard_at=self.heard_at.timestamp() if self.heard_at else 0.0,
        )

    def restore(self, kept: KeptDenials, *, now: datetime) -> None:
        """Denies what was kept, beside whatever is denied already."""
        moment = int(now.timestamp())
        furthest = moment + _LONGEST_SECONDS
        for key, until in kept.denied.items():
            if until > moment:
                self._told.deny(key, min(until, furthest), kept.whose.get(key, ""))
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
        until = min((one.next_update for one in self._lists), default=0.0)
        # Counted on the clock that nobody sets back.
        self._lists_until = uptime() + until - now.timestamp()
        if self.lists_synced and self.feed_absent:
            self.hear(now=now)

    def lose_lists(self) -> None:
        """Lists do not arrive any more; silence counts from now."""
        if self.lists_synced:
            self.lists_synced = False
            if self.feed_absent:
                self._heard = max(self._heard, uptime())

    # --- news ----------------------------------------------------------------------------------

    def find_feed(self) -> None:
        """There is a feed: from now on it alone is news."""
        self.feed_served, self.feed_absent = True, False

    def lack_feed(self, *, now: datetime) -> None:
        """There is no feed: lists are news, unless there ever was one."""
        if self.feed_served or self.feed_absent:
            return
        self.feed_absent = True
        if self.lists_synced:
            self.hear(now=now)

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
