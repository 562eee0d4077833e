"""The X.509-SVIDs at hand, which are used, and which are to be ordered next.

- Without input, output or clocks of its own.
- What is watched is never evicted. What is not is kept while it fits, least recently used first
  to go; where it does not fit, it is let go when it is due instead of renewed.
- While all entries fit, their SVIDs are made before anybody asks.
- An SVID is used only while it is valid, not revoked, below an authority of the bundle, signed by
  none that is denied, and of the SPIFFE ID that its entry has now.
- A revoked SVID is made anew, for another key; an instance that is denied gets no other one,
  whichever of its serials was the one revoked, until it is pardoned.
- Certificates that many chains share are held once.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Final, NamedTuple

from identity_broker.agent.identity import X509Identity
from identity_broker.agent.mirror import EntryChange
from identity_broker.agent.schedule import Rank, Schedule
from identity_client.node.values import SyncedEntry
from identity_client.renewal import renewal_due, retry_delay

_PATIENCE: Final = 3  # a broker that was just restarted, or has not heard of the entry yet
_MOST_DENIED: Final = 1024
_MOST_INTERNED: Final = 256


class SvidKey(NamedTuple):
    """What an SVID is for: an entry, and where the entry asks for it, one process."""

    entry_id: str
    instance: str = ""


@dataclass(frozen=True, slots=True)
class Entries:
    """All entries of the node.

    Attributes:
        count: how many there are, those that have expired included.
        live: lists those that count now; called only where it matters, for there may be many.
    """

    count: int
    live: Callable[[], Iterable[SyncedEntry]]


@dataclass(frozen=True, slots=True)
class Issued:
    """An SVID that was checked, and what it leads to.

    Attributes:
        anchor: the authority of the bundle, DER.
        signers: ids of the authorities that signed the chain.
    """

    identity: X509Identity
    entry_revision: int
    anchor: bytes = field(repr=False)
    signers: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an SVID could not be had."""

    attempts: int
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class _Held:
    identity: X509Identity
    entry_revision: int
    anchor: bytes
    signers: frozenset[str]
    received: datetime


class Svids:
    """All SVIDs of one agent. Belongs to one event loop.

    Args:
        limit: how many are kept although nobody watches them.
        dice: uniform in [0, 1).
    """

    def __init__(self, limit: int, dice: Callable[[], float]) -> None:
        self._limit = limit
        self._dice = dice
        self._schedule: Schedule[SvidKey] = Schedule()
        self._held: dict[SvidKey, _Held] = {}
        self._idle: OrderedDict[SvidKey, None] = OrderedDict()
        self._pins: Counter[SvidKey] = Counter()
        self._known: dict[str, set[SvidKey]] = {}
        self._failures: dict[SvidKey, Failure] = {}
        self._denied: set[SvidKey] = set()
        self._anchors: frozenset[bytes] = frozenset()
        self._by_serial: dict[str, SvidKey] = {}
        self._interned: dict[bytes, bytes] = {}
        self._signers: dict[frozenset[str], frozenset[str]] = {}
        self._prefetches = False

    # --- what is there ------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._held)

    def usable(self, key: SvidKey, entry: SyncedEntry, now: datetime) -> X509Identity | None:
        """The SVID that may be handed out for `entry` now, with the entry's hint."""
        held = self._held.get(key)
        if (
            held is None
            or held.identity.not_after <= now
            or held.identity.spiffe_id != entry.spiffe_id
            or held.anchor not in self._anchors
        ):
            return None
        if key in self._idle:
            self._idle.move_to_end(key)
        if held.identity.hint != entry.hint:
            return replace(held.identity, hint=entry.hint)
        return held.identity

    def is_pending(self, key: SvidKey) -> bool:
        """Whether it is being made, or will be as soon as possible."""
        return self._schedule.is_pending(key)

    def is_hopeful(self, key: SvidKey) -> bool:
        """Whether it may be there in a moment: it is being made, and has hardly failed yet."""
        failure = self._failures.get(key)
        if failure is None:
            return self._schedule.is_pending(key)
        return failure.attempts < _PATIENCE and key in self._schedule

    def failure(self, key: SvidKey) -> Failure | None:
        """Why the last order failed; None once one succeeded."""
        return self._failures.get(key)

    def overdue(self, now: datetime) -> int:
        """How many held ones could not be renewed in time, or have expired."""
        return sum(
            1
            for key, held in self._held.items()
            if key in self._failures or held.identity.not_after <= now
        )

    def expired(self, now: datetime) -> int:
        """How many held ones have expired."""
        return sum(1 for held in self._held.values() if held.identity.not_after <= now)

    # --- who uses it --------------------------------------------------------------------------

    def pin(self, key: SvidKey, entry: SyncedEntry, now: datetime) -> None:
        """Somebody watches it: have it made, and keep it."""
        self._pins[key] += 1
        self._idle.pop(key, None)
        self.want(key, entry, now)

    def unpin(self, key: SvidKey) -> None:
        """One watcher fewer."""
        self._pins[key] -= 1
        if self._pins[key] > 0:
            return
        del self._pins[key]
        if key in self._held:
            self._idle[key] = None
            self._evict()
        elif not self._schedule.is_flying(key):
            self._drop(key)

    def want(self, key: SvidKey, entry: SyncedEntry, now: datetime) -> None:
        """Have it made, unless it is there or denied."""
        if key in self._denied or self.usable(key, entry, now) is not None:
            return
        self._known.setdefault(key.entry_id, set()).add(key)
        if key not in self._failures:  # what fails is retried at its own pace
            self._schedule.want(key, Rank.WAITED)

    # --- what changes -------------------------------------------------------------------------

    def follow(self, changes: Iterable[EntryChange], entries: Entries) -> set[SvidKey]:
        """Take over changed entries.

        Args:
            entries: all there are after the changes.

        Returns:
            The keys whose SVID is gone.
        """
        gone: set[SvidKey] = set()
        fresh: list[SyncedEntry] = []
        for change in changes:
            known = tuple(self._known.get(change.entry_id, ()))
            if change.new is None:
                gone.update(known)
                for key in known:
                    self._drop(key)
            elif known:
                for key in known:
                    self._renew_for(key, change.new)
            else:
                fresh.append(change.new)
        self._prefetch(fresh, entries)
        return gone

    def trust(self, anchors: Iterable[bytes]) -> set[SvidKey]:
        """Use only what leads to one of these authorities; have the rest made anew."""
        self._anchors = frozenset(anchors)
        lost = {key for key, held in self._held.items() if held.anchor not in self._anchors}
        for key in lost:
            self._schedule.redo(key, Rank.REPLACE)
        for key in tuple(self._failures):
            if key not in self._held:
                self._schedule.want(key, self._missing(key))
        return lost

    def revoke(self, serials: Iterable[str]) -> set[SvidKey]:
        """Hand out none of these any more; return whose they were."""
        found = set()
        for serial in serials:
            key = self._by_serial.get(serial)
            if key is not None:
                found.add(key)
                self._lose(key)
        return found

    def refuse(self, authorities: Collection[str]) -> set[SvidKey]:
        """Hand out nothing that one of these authorities signed; return whose it was."""
        lost = {key for key, held in self._held.items() if not held.signers.isdisjoint(authorities)}
        for key in lost:
            self._lose(key)
        return lost

    def deny(self, keys: Iterable[SvidKey]) -> set[SvidKey]:
        """Give these instances no SVID any more; return those that were not denied before."""
        denied = {key for key in keys if key.instance} - self._denied
        for key in denied:
            self._drop(key)
        self._denied |= denied
        return denied

    def pardon(self, keys: Iterable[SvidKey]) -> None:
        """These instances may have SVIDs again."""
        self._denied.difference_update(keys)

    def is_denied(self, key: SvidKey) -> bool:
        """Whether that process is to have no SVID of the entry any more."""
        return key in self._denied

    def forgive(self, is_over: Callable[[str], bool]) -> None:
        """Forget denied instances that are over, once there are many."""
        if len(self._denied) > _MOST_DENIED:
            self._denied = {key for key in self._denied if not is_over(key.instance)}

    def retry_all(self, entries: Entries) -> None:
        """Order at once what has failed: the broker is back."""
        for key in tuple(self._failures):
            self._schedule.want(key, Rank.RENEW if key in self._held else self._missing(key))
        self._prefetches = False  # What was given up while nobody waited for it is made after all.
        self._prefetch((), entries)

    def clear(self) -> None:
        """Forget every SVID and every order."""
        self._schedule = Schedule()
        for each in (self._held, self._idle, self._known, self._failures, self._by_serial):
            each.clear()

    # --- orders -------------------------------------------------------------------------------

    def take(
        self,
        *,
        now: datetime,
        tick: float,
        limit: int,
        aside: Callable[[SvidKey], bool] = lambda _key: False,
    ) -> list[SvidKey]:
        """What to order now, most urgent first; each is to be adopted or failed.

        Args:
            aside: whether a key is left for `take_aside`.
        """
        found = self._schedule.take(now=now, tick=tick, limit=limit, aside=aside)
        return [key for key in found if self._is_still_due(key)]

    def take_aside(self) -> SvidKey | None:
        """The most urgent of what `take` has left; None when there is nothing."""
        while (key := self._schedule.take_aside()) is not None:
            if self._is_still_due(key):
                return key
        return None

    def pause(self, *, now: datetime, tick: float) -> float | None:
        """Seconds until there is something to order; None: until somebody asks."""
        return self._schedule.pause(now=now, tick=tick)

    def adopt(self, key: SvidKey, issued: Issued, *, now: datetime, tick: float) -> bool:
        """Hold what was issued instead of what was held; False when nobody wants it any more."""
        if not self._schedule.land(key):
            return False
        self._failures.pop(key, None)
        self._let_go(key)
        leaf, *above = issued.identity.chain
        identity = replace(issued.identity, chain=(leaf, *map(self._shared, above)))
        anchor = self._shared(issued.anchor)
        signers = self._signers.setdefault(issued.signers, issued.signers)
        self._held[key] = _Held(identity, issued.entry_revision, anchor, signers, now)
        self._by_serial[identity.serial] = key
        self._known.setdefault(key.entry_id, set()).add(key)
        if not self._schedule.is_pending(key):
            due = renewal_due(received=now, not_after=identity.not_after, dice=self._dice())
            self._schedule.later(
                key,
                Rank.RENEW,
                due_tick=tick + (due - now).total_seconds(),
                due_at=due,
                order=identity.not_after.timestamp(),
            )
        if key not in self._pins:
            self._idle[key] = None
            self._evict()
        return True

    def fail(  # what was told, and two clocks
        self,
        key: SvidKey,
        *,
        reason: str,
        message: str,
        retry_after: float | None,
        now: datetime,
        tick: float,
    ) -> None:
        """Note that it could not be had; it is tried again, later and later."""
        if not self._schedule.land(key):
            return
        if key not in self._held and not self._is_kept(key):
            self._drop(key)  # Nobody waits; it is made when somebody asks.
            return
        earlier = self._failures.get(key)
        attempts = 1 if earlier is None else earlier.attempts + 1
        self._failures[key] = Failure(attempts, reason, message)
        held = self._held.get(key)
        remaining = None if held is None else held.identity.not_after - now
        delay = retry_delay(
            attempts, dice=self._dice(), remaining=remaining, retry_after=retry_after
        )
        if not self._schedule.is_pending(key):
            rank = self._missing(key) if held is None else Rank.RENEW
            self._schedule.later(key, rank, due_tick=tick + delay.total_seconds(), due_at=None)

    def discard(self, key: SvidKey) -> None:
        """Forget an SVID and its order: its entry is gone."""
        self._drop(key)

    # --- inside -------------------------------------------------------------------------------

    def _is_still_due(self, key: SvidKey) -> bool:
        """Whether it is worth an order; else it is let go."""
        if key in self._held and not self._is_kept(key):
            self._drop(key)
            return False
        return True

    def _is_kept(self, key: SvidKey) -> bool:
        return key in self._pins or (self._prefetches and not key.instance)

    def _missing(self, key: SvidKey) -> Rank:
        """How urgent one is that is not there."""
        return Rank.WAITED if key in self._pins else Rank.PREFETCH

    def _renew_for(self, key: SvidKey, entry: SyncedEntry) -> None:
        """The entry is not what the SVID was made for."""
        held = self._held.get(key)
        if held is None:
            self._failures.pop(key, None)
            self._schedule.redo(key, Rank.WAITED)
        elif held.entry_revision != entry.revision:
            self._schedule.redo(key, Rank.REPLACE)

    def _prefetch(self, fresh: Iterable[SyncedEntry], entries: Entries) -> None:
        before, self._prefetches = self._prefetches, entries.count <= self._limit
        if not self._prefetches:
            self._evict()
            return
        for entry in fresh if before else entries.live():
            key = SvidKey(entry.id)
            if not entry.per_process and key not in self._held and key not in self._schedule:
                self._known.setdefault(entry.id, set()).add(key)
                self._schedule.want(key, Rank.PREFETCH)
        self._evict()

    def _evict(self) -> None:
        while self._idle and len(self._held) > self._limit:
            key = next(iter(self._idle))
            self._drop(key)

    def _lose(self, key: SvidKey) -> None:
        """It counts no more; have it made anew."""
        if key.instance and key not in self._pins:
            self._drop(key)  # it is made when its process asks
        else:
            self._let_go(key)
            self._schedule.redo(key, Rank.REPLACE)

    def _let_go(self, key: SvidKey) -> None:
        held = self._held.pop(key, None)
        if held is not None:
            self._by_serial.pop(held.identity.serial, None)
        self._idle.pop(key, None)

    def _drop(self, key: SvidKey) -> None:
        self._let_go(key)
        self._schedule.forget(key)
        self._failures.pop(key, None)
        known = self._known.get(key.entry_id)
        if known is not None:
            known.discard(key)
            if not known:
                del self._known[key.entry_id]

    def _shared(self, der: bytes) -> bytes:
        """The one copy of a certificate that many chains have."""
        if len(self._interned) > _MOST_INTERNED:
            self._interned.clear()
            self._signers.clear()
        return self._interned.setdefault(der, der)
