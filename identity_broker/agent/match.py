"""Which entries a process matches, and which watchers a change concerns: both found by selector.

- Without input, output or clock: a process is the set of selectors that were attested.
- An entry is filed under its rarest selector alone, so that a question costs what it finds.
- An entry without selectors matches nobody.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Generic, TypeVar

from identity_client.node.values import SyncedEntry

Kind = tuple[str, str]
"""A selector's type and the first part of its value: ("unix", "uid")."""

_NEVER = datetime.min.replace(tzinfo=UTC)
_W = TypeVar("_W", bound=Hashable)


def kind_of(selector: str) -> Kind:
    """The kind of "type:part:rest"."""
    type_name, _, value = selector.partition(":")
    return type_name, value.partition(":")[0]


def is_live(entry: SyncedEntry, now: datetime) -> bool:
    """Whether the entry still counts."""
    return entry.expires_at is None or now < entry.expires_at


class EntryIndex:
    """Entries by id and by selector."""

    def __init__(self, entries: Iterable[SyncedEntry] = ()) -> None:
        self._entries: dict[str, SyncedEntry] = {}
        self._place: dict[str, str] = {}
        self._filed: dict[str, dict[str, SyncedEntry]] = {}
        self._kinds: Counter[Kind] = Counter()
        self._known_kinds: frozenset[Kind] | None = None
        for entry in entries:
            self.put(entry)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[SyncedEntry]:
        return iter(self._entries.values())

    def get(self, entry_id: str) -> SyncedEntry | None:
        """The entry of that id."""
        return self._entries.get(entry_id)

    def put(self, entry: SyncedEntry) -> SyncedEntry | None:
        """Add or replace an entry; return the one it replaces."""
        old = self.remove(entry.id)
        self._entries[entry.id] = entry
        self._count(entry, 1)
        if entry.selectors:
            rarest = min(entry.selectors, key=lambda each: len(self._filed.get(each, ())))
            self._filed.setdefault(rarest, {})[entry.id] = entry
            self._place[entry.id] = rarest
        return old

    def remove(self, entry_id: str) -> SyncedEntry | None:
        """Take an entry out; return it."""
        entry = self._entries.pop(entry_id, None)
        if entry is None:
            return None
        self._count(entry, -1)
        place = self._place.pop(entry_id, None)
        if place is not None:
            filed = self._filed[place]
            del filed[entry_id]
            if not filed:
                del self._filed[place]
        return entry

    def match(self, selectors: frozenset[str], now: datetime) -> list[SyncedEntry]:
        """The live entries all of whose selectors are among these, oldest first."""
        found = [
            entry
            for selector in selectors
            for entry in self._filed.get(selector, {}).values()
            if selectors.issuperset(entry.selectors) and is_live(entry, now)
        ]
        found.sort(key=lambda entry: (entry.created_at or _NEVER, entry.id))
        return found

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kinds of selectors any entry asks for; the same object until they change."""
        if self._known_kinds is None:
            self._known_kinds = frozenset(self._kinds)
        return self._known_kinds

    def _count(self, entry: SyncedEntry, step: int) -> None:
        for kind in {kind_of(selector) for selector in entry.selectors}:
            before = self._kinds[kind]
            self._kinds[kind] = before + step
            if before + step == 0:
                del self._kinds[kind]
            if before == 0 or before + step == 0:
                self._known_kinds = None


def wanted_of(kinds: Iterable[Kind]) -> Mapping[str, frozenset[str]]:
    """Kinds as attestors take them: type → first parts."""
    wanted: dict[str, set[str]] = {}
    for type_name, part in kinds:
        wanted.setdefault(type_name, set()).add(part)
    return {type_name: frozenset(parts) for type_name, parts in wanted.items()}


class WatcherIndex(Generic[_W]):
    """Watchers by the selectors they were attested with.

    A watcher was attested for certain kinds of selectors only; whether it has one of another kind
    is not known, so an entry that asks for one concerns it unless a known selector is missing.
    """

    def __init__(self) -> None:
        self._placed: dict[_W, tuple[frozenset[Kind], frozenset[str]]] = {}
        self._groups: dict[frozenset[Kind], dict[str, set[_W]]] = {}
        self._members: dict[frozenset[Kind], set[_W]] = {}

    def __len__(self) -> int:
        return len(self._placed)

    def place(self, watcher: _W, selectors: frozenset[str], kinds: frozenset[Kind]) -> None:
        """File a watcher under what it was attested with, instead of what it was filed under."""
        if self._placed.get(watcher) == (kinds, selectors):
            return
        self.drop(watcher)
        self._placed[watcher] = (kinds, selectors)
        self._members.setdefault(kinds, set()).add(watcher)
        group = self._groups.setdefault(kinds, {})
        for selector in selectors:
            group.setdefault(selector, set()).add(watcher)

    def drop(self, watcher: _W) -> None:
        """Forget a watcher."""
        kinds, selectors = self._placed.pop(watcher, (None, frozenset()))
        if kinds is None:
            return
        group, members = self._groups[kinds], self._members[kinds]
        for selector in selectors:
            filed = group[selector]
            filed.discard(watcher)
            if not filed:
                del group[selector]
        members.discard(watcher)
        if not members:
            del self._groups[kinds], self._members[kinds]

    def concerned(self, selectors: Iterable[str]) -> set[_W]:
        """The watchers that an entry with these selectors matches, or may match."""
        asked = [(selector, kind_of(selector)) for selector in selectors]
        found: set[_W] = set()
        if not asked:
            return found
        for kinds, group in self._groups.items():
            buckets = [group.get(selector) for selector, kind in asked if kind in kinds]
            if not buckets:
                found |= self._members[kinds]
                continue
            present = [bucket for bucket in buckets if bucket]
            if len(present) == len(buckets):
                found |= set.intersection(*sorted(present, key=len))
        return found
