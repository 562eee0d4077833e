"""What the broker told this node: entries, bundle, what is to be refused, revocation lists.

- Without input or output: updates go in, what changed comes out; whoever holds the mirror acts.
- An update is applied whole or not at all: it builds on what is here, and what it gives has the
  digest it names.
- It never goes back by itself: a full state older than this one is taken only when the broker
  insists on it for a minute (a restored database, not a lagging replica).
- An entry stops counting when it expires, without being told.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Final

from identity_broker.agent.denied import Denied, DeniedChange
from identity_broker.agent.match import EntryIndex, Kind, is_live, wanted_of
from identity_ca.bundle import JwtKey, TrustBundle
from identity_ca.errors import CAError
from identity_ca.spiffe_id import TrustDomain
from identity_client.node.values import (
    SyncedBundle,
    SyncedEntry,
    SyncPosition,
    SyncUpdate,
    entry_digest,
)

INSIST_SECONDS: Final = 60.0
"""How long a broker must hold on to an older state before it is believed."""


# Planned endings that no longer count are cleared away when they are more than the entries.
_SPARE_EXPIRIES: Final = 64
_BEGINNING: Final = datetime.min.replace(tzinfo=UTC)
_NOTHING_DENIED: Final = DeniedChange()


class Mismatch(Enum):
    """Why an update cannot be applied."""

    GAP = "an update is missing"
    DIGEST = "the entries do not give the digest that the broker names"
    STALE = "the broker is behind what it told before"
    BUNDLE = "the bundle cannot be used"


class OutOfStep(Exception):  # it says where the mirror stands
    """The update was not applied; ask for the full state."""

    def __init__(self, mismatch: Mismatch, detail: str = "") -> None:
        self.mismatch = mismatch
        super().__init__(f"{mismatch.value}: {detail}" if detail else mismatch.value)


@dataclass(frozen=True, slots=True)
class EntryChange:
    """One entry before and after; None where it was not, or is no more."""

    old: SyncedEntry | None
    new: SyncedEntry | None

    @property
    def entry_id(self) -> str:
        """The entry's id."""
        entry = self.new or self.old
        return "" if entry is None else entry.id


@dataclass(frozen=True, slots=True)
class Changed:
    """What an update did."""

    entries: tuple[EntryChange, ...] = ()
    bundle: bool = False
    crls: bool = False
    denied: DeniedChange = _NOTHING_DENIED

    def __bool__(self) -> bool:
        return bool(self.entries or self.bundle or self.crls or self.denied)


@dataclass(slots=True)
class _Stale:
    """Since when the broker offers an older state; None while it does not."""

    since: float | None = None

    def insists(self, tick: float) -> bool:
        if self.since is None:
            self.since = tick
        return tick - self.since >= INSIST_SECONDS


class Mirror:
    """The state of one node, as last told. Belongs to one event loop.

    Attributes:
        denied: what is to be refused.
    """

    def __init__(self, trust_domain: TrustDomain) -> None:
        self._trust_domain = trust_domain
        self._index = EntryIndex()
        self._digest = 0
        self._revision = 0
        self._bundle: TrustBundle | None = None
        self._crls: tuple[bytes, ...] = ()
        self._expiries: list[tuple[datetime, str, int]] = []
        self._looked_at = _BEGINNING
        self._stale = _Stale()
        self.denied: Final = Denied()

    # --- what it says -------------------------------------------------------------------------

    def __len__(self) -> int:
        """Entries, expired ones included."""
        return len(self._index)

    @property
    def revision(self) -> int:
        """The change feed's position it stands at."""
        return self._revision

    @property
    def synced(self) -> bool:
        """Whether the broker ever told the full state (and did not take it back)."""
        return self._bundle is not None

    @property
    def position(self) -> SyncPosition:
        """Where to resume."""
        return SyncPosition(self._revision, self._digest) if self.synced else SyncPosition()

    @property
    def bundle(self) -> TrustBundle | None:
        """The own trust domain's bundle; None before the first full state."""
        return self._bundle

    @property
    def crls(self) -> tuple[bytes, ...]:
        """Revocation lists, DER."""
        return self._crls

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kinds of selectors that entries ask for; the same object until they change."""
        return self._index.kinds

    def wanted(self) -> Mapping[str, frozenset[str]]:
        """What attestors are asked for: type → first parts of selector values."""
        return wanted_of(self._index.kinds)

    def entries(self, now: datetime) -> list[SyncedEntry]:
        """The live entries."""
        return [entry for entry in self._index if is_live(entry, now)]

    def entry(self, entry_id: str, now: datetime) -> SyncedEntry | None:
        """The live entry of that id."""
        entry = self._index.get(entry_id)
        return entry if entry is not None and is_live(entry, now) else None

    def match(self, selectors: frozenset[str], now: datetime) -> list[SyncedEntry]:
        """The live entries of a process with these selectors, oldest first."""
        return self._index.match(selectors, now)

    # --- what it is told ----------------------------------------------------------------------

    def apply(self, update: SyncUpdate, *, now: datetime, tick: float) -> Changed:
        """Apply an update, whole.

        Args:
            now: aware UTC.
            tick: a clock that only goes forward, in seconds.

        Raises:
            OutOfStep: nothing was applied.
        """
        if update.full:
            return self._replace(update, now, tick)
        if not self.synced or update.previous != self._revision or update.revision < self._revision:
            raise OutOfStep(
                Mismatch.GAP, f"at {self._revision}, told of {update.previous} to {update.revision}"
            )
        return self._extend(update, now)

    def withdraw(self, now: datetime) -> Changed:
        """Forget everything but what is denied: the node may hand out nothing any more."""
        gone = tuple(EntryChange(entry, None) for entry in self.entries(now))
        self._index = EntryIndex()
        self._digest = self._revision = 0
        self._bundle = None
        self._crls = ()
        self._expiries = []
        return Changed(entries=gone, bundle=True, crls=True)

    def expire(self, now: datetime) -> Changed:
        """Say which entries have ended since the last call, or, the clock set back, begun again.

        Denials that are over are forgotten.
        """
        changes = []
        if now < self._looked_at:
            for entry in self._index:
                if entry.expires_at is not None and now < entry.expires_at <= self._looked_at:
                    changes.append(EntryChange(None, entry))
                    self._expect(entry)
            self._clear_expiries()
        self._looked_at = now
        while self._expiries and self._expiries[0][0] <= now:
            _, entry_id, revision = heapq.heappop(self._expiries)
            found = self._index.get(entry_id)
            if found is not None and found.revision == revision and not is_live(found, now):
                changes.append(EntryChange(found, None))
        self.denied.forget(now)
        return Changed(entries=tuple(changes))

    # --- inside -------------------------------------------------------------------------------

    def _replace(self, update: SyncUpdate, now: datetime, tick: float) -> Changed:
        if self.synced and update.revision < self._revision and not self._stale.insists(tick):
            raise OutOfStep(Mismatch.STALE, f"{update.revision} after {self._revision}")
        if _digest_of(update.entries) != update.entries_digest:
            raise OutOfStep(Mismatch.DIGEST)
        bundle = self._bundle_from(update.bundle)
        if bundle is None:
            raise OutOfStep(Mismatch.BUNDLE, "a full state must bring one")
        index = EntryIndex(update.entries)
        changes = [
            EntryChange(self._index.get(entry.id), entry)
            for entry in index
            if self._index.get(entry.id) != entry
        ]
        changes += [EntryChange(old, None) for old in self._index if index.get(old.id) is None]
        self._index = index
        self._expiries = []
        for entry in index:
            self._expect(entry)
        return self._settle(update, tuple(changes), bundle, now)

    def _extend(self, update: SyncUpdate, now: datetime) -> Changed:
        removed = set(update.removed_ids)
        newest = {entry.id: entry for entry in update.entries}
        digest = self._digest
        for entry_id in removed | newest.keys():
            old = self._index.get(entry_id)
            if old is not None:
                digest ^= entry_digest(old.id, old.revision)
        for entry in newest.values():
            digest ^= entry_digest(entry.id, entry.revision)
        if digest != update.entries_digest:
            raise OutOfStep(Mismatch.DIGEST)
        bundle = self._bundle_from(update.bundle)
        changes = [
            EntryChange(gone, None)
            for entry_id in removed - newest.keys()
            if (gone := self._index.remove(entry_id)) is not None
        ]
        for entry in newest.values():
            old = self._index.put(entry)
            if old != entry:
                changes.append(EntryChange(old, entry))
                self._expect(entry)
        self._clear_expiries()
        return self._settle(update, tuple(changes), bundle, now)

    def _settle(
        self,
        update: SyncUpdate,
        changes: tuple[EntryChange, ...],
        bundle: TrustBundle | None,
        now: datetime,
    ) -> Changed:
        denied = self.denied.apply(update, now)
        new_bundle = bundle is not None and bundle != self._bundle
        if bundle is not None:
            self._bundle = bundle
        new_crls = update.crls is not None and update.crls != self._crls
        if update.crls is not None:
            self._crls = update.crls
        self._revision = update.revision
        self._digest = update.entries_digest
        self._stale.since = None  # Whoever knows where we stand is not behind.
        return Changed(entries=changes, bundle=new_bundle, crls=new_crls, denied=denied)

    def _expect(self, entry: SyncedEntry) -> None:
        if entry.expires_at is not None:
            heapq.heappush(self._expiries, (entry.expires_at, entry.id, entry.revision))

    def _clear_expiries(self) -> None:
        """Drop the planned endings of entries that went or changed, once they are many."""
        if len(self._expiries) <= 2 * len(self._index) + _SPARE_EXPIRIES:
            return
        self._expiries = [planned for planned in set(self._expiries) if self._is_planned(*planned)]
        heapq.heapify(self._expiries)

    def _is_planned(self, at: datetime, entry_id: str, revision: int) -> bool:
        entry = self._index.get(entry_id)
        return entry is not None and (entry.expires_at, entry.revision) == (at, revision)

    def _bundle_from(self, synced: SyncedBundle | None) -> TrustBundle | None:
        if synced is None:
            return None
        if synced.trust_domain != self._trust_domain.name:
            raise OutOfStep(Mismatch.BUNDLE, "it is another trust domain's")
        try:
            return TrustBundle(
                self._trust_domain,
                x509_authorities=synced.x509_authorities,
                jwt_keys=tuple(
                    JwtKey(key.key_id, key.public_key, key.expires_at) for key in synced.jwt_keys
                ),
                sequence=synced.sequence,
                refresh_hint=synced.refresh_hint,
            )
        except CAError as exc:
            raise OutOfStep(Mismatch.BUNDLE, exc.message) from exc


def _digest_of(entries: Iterable[SyncedEntry]) -> int:
    digest = 0
    for entry in entries:
        digest ^= entry_digest(entry.id, entry.revision)
    return digest
