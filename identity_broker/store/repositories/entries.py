"""Registration entries.

- Every change appends its outbox row; the caller cannot forget it.
- `held_by` is never the caller's to say: it is the oldest lasting hold that covers the entry.
- A refused change leaves the transaction usable: a batch goes on with its next item.
- What may not be stored twice is looked for first, so that the refusal can name it; the
  constraints of `tables` hold whatever happens in between.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from sqlalchemy import (
    Connection,
    Select,
    and_,
    bindparam,
    case,
    delete,
    exists,
    func,
    insert,
    or_,
    select,
    text,
    update,
)

from identity_broker.domain.entry import RegistrationEntry
from identity_broker.domain.events import Topic
from identity_broker.domain.paging import EntryFilter, Page
from identity_broker.domain.selection import Selection
from identity_broker.domain.selector import Selector
from identity_broker.errors import (
    EntryExists,
    EntryInvalid,
    EntryNotFound,
    SpiffeIdCaseConflict,
    StaleWrite,
)
from identity_broker.store import mapping
from identity_broker.store.repositories import page_keys, selected
from identity_broker.store.repositories.lasting_holds import LastingHolds
from identity_broker.store.repositories.outbox import OutboxRepository
from identity_broker.store.tables import HELD, entries, entry_selectors, spiffe_ids
from identity_ca.spiffe_id import SpiffeId

_CHUNK = 500
_STREAM = 2_000
_MANY = 10_000  # fewer than either database takes parameters
_NO_SELECTOR = ("", "", "")

# Built once: making a statement anew costs SQLAlchemy more than running it.
_INSERT = insert(entries)
_UPDATE = update(entries).where(entries.c.id == bindparam("entry_id"))
_INSERT_SELECTORS = insert(entry_selectors)
_SAME = select(entries.c.id, entries.c.identity_key).where(
    or_(
        entries.c.id == bindparam("entry_id"),
        entries.c.identity_key == bindparam("identity"),
        entries.c.hint_key == bindparam("hint"),  # of an entry without a hint: never
    )
)
_SPELLING = select(spiffe_ids.c.spelling).where(spiffe_ids.c.folded == bindparam("id_folded"))
_INSERT_SPELLING = insert(spiffe_ids)


class EntryRepository:
    """Stores registration entries."""

    def __init__(
        self,
        connection: Connection,
        outbox: OutboxRepository,
        lasting: LastingHolds,
        now: datetime,
    ) -> None:
        self._connection = connection
        self._outbox = outbox
        self._lasting = lasting
        self._now = now

    def create(self, entry: RegistrationEntry) -> RegistrationEntry:
        """Store a new entry; return it with revision 1, its times and what holds it.

        Raises:
            EntryExists: the id, or SPIFFE ID, parent and selectors together, are stored already;
                its field `entry` is the stored entry.
            SpiffeIdCaseConflict: the SPIFFE ID is stored in another spelling.
            EntryInvalid: another entry below that parent has the same hint.
        """
        entry = replace(
            entry,
            revision=1,
            created_at=entry.created_at or self._now,
            updated_at=entry.created_at or self._now,
            held_by=self._lasting.of_entry(entry),
        )
        self._refuse_duplicate(entry, new=True)
        self._claim_spelling(entry.spiffe_id)
        self._connection.execute(_INSERT, mapping.entry_values(entry))
        self._connection.execute(_INSERT_SELECTORS, mapping.selector_values(entry))
        self._outbox.append(Topic.ENTRY, entry.id)
        return entry

    def replace(
        self, entry: RegistrationEntry, expected_revision: int | None = None
    ) -> RegistrationEntry:
        """Store another version of the entry with that id; return it with its new revision.

        Args:
            entry: its revision and times are ignored, and what holds it.
            expected_revision: the revision the change was made on; None for whatever is there.

        Raises:
            EntryNotFound: there is no entry with that id.
            StaleWrite: it has another revision than expected.
            EntryExists, SpiffeIdCaseConflict, EntryInvalid: as for `create`.
        """
        stored = self.get(entry.id)
        if expected_revision is not None and stored.revision != expected_revision:
            raise StaleWrite(
                f'the entry "{entry.id}" changed since it was read: it is at revision '
                f"{stored.revision}, not {expected_revision}"
            )
        created_at = stored.created_at or self._now
        entry = replace(
            entry,
            revision=stored.revision + 1,
            created_at=created_at,
            updated_at=max(self._now, stored.updated_at or created_at),
            held_by=self._lasting.of_entry(entry),
        )
        self._refuse_duplicate(entry, new=False)
        if entry.spiffe_id != stored.spiffe_id:
            self._claim_spelling(entry.spiffe_id)
        self._connection.execute(_UPDATE, {**mapping.entry_values(entry), "entry_id": entry.id})
        if entry.spiffe_id != stored.spiffe_id:
            self._release_spelling(stored.spiffe_id)
        if entry.selectors != stored.selectors:
            self._connection.execute(
                delete(entry_selectors).where(entry_selectors.c.entry_id == entry.id)
            )
            self._connection.execute(_INSERT_SELECTORS, mapping.selector_values(entry))
        self._outbox.append(Topic.ENTRY, entry.id)
        return entry

    def delete(self, entry_id: str) -> RegistrationEntry:
        """Remove the entry; return what it was.

        Raises:
            EntryNotFound: there is no entry with that id.
        """
        stored = self.get(entry_id)
        self._connection.execute(delete(entries).where(entries.c.id == entry_id))
        self._release_spelling(stored.spiffe_id)
        self._outbox.append(Topic.ENTRY, entry_id)
        return stored

    def get(self, entry_id: str) -> RegistrationEntry:
        """The entry with that id.

        Raises:
            EntryNotFound: there is none.
        """
        found = self._load(select(entries).where(entries.c.id == entry_id))
        if not found:
            raise EntryNotFound(f'no registration entry has the id "{entry_id[:64]}"')
        return found[0]

    def get_many(self, entry_ids: Collection[str]) -> dict[str, RegistrationEntry]:
        """The entries with those ids, by id; unknown ids are left out."""
        found: dict[str, RegistrationEntry] = {}
        wanted = sorted(set(entry_ids))
        for start in range(0, len(wanted), _CHUNK):
            chunk = wanted[start : start + _CHUNK]
            query = select(entries).where(entries.c.id.in_(chunk))
            found.update((entry.id, entry) for entry in self._load(query))
        return found

    def page(self, wanted: EntryFilter, after: str, size: int) -> Page[RegistrationEntry]:
        """A page in the order of ids, beginning behind the id `after` (empty: at the first).

        Raises:
            PageTokenInvalid: `after` is not a key of a page.
        """
        query = select(entries).where(entries.c.id > page_keys.entry_id(after))
        if wanted.spiffe_id is not None:
            query = query.where(entries.c.spiffe_id == str(wanted.spiffe_id))
        if wanted.parent_id is not None:
            query = query.where(entries.c.parent_id == str(wanted.parent_id))
        if wanted.owner:
            query = query.where(entries.c.owner == wanted.owner)
        if wanted.hint:
            query = query.where(entries.c.hint == wanted.hint)
        for selector in wanted.selectors:
            query = query.where(
                exists().where(
                    and_(
                        entry_selectors.c.entry_id == entries.c.id,
                        entry_selectors.c.type == selector.type,
                        entry_selectors.c.value == selector.value,
                    )
                )
            )
        found = self._load(query.order_by(entries.c.id).limit(size + 1))
        items = found[:size]
        return Page(items, items[-1].id if len(found) > size else "")

    def iterate(self) -> Iterator[RegistrationEntry]:
        """Every entry in the order of ids; holds a few thousand rows at a time.

        Two ordered streams, of entries and of selectors, are read side by side.
        """
        rows = self._stream(select(entries).order_by(entries.c.id))
        selectors = self._stream(select(entry_selectors).order_by(entry_selectors.c.entry_id))
        entry_id, kind, value = next(selectors, _NO_SELECTOR)
        for row in rows:
            own = []
            while entry_id == row.id:
                own.append(mapping.selector_from(kind, value))
                entry_id, kind, value = next(selectors, _NO_SELECTOR)
            yield mapping.entry_from_row(row, own)

    # --- on hold ------------------------------------------------------------------------------

    def covered_ids(self, selection: Selection, limit: int | None = None) -> tuple[str, ...]:
        """The ids of entries that the selection covers, sorted; the first `limit`."""
        conditions = selected.of_entries(selection, self._connection.dialect)
        if conditions is None:
            return ()
        query = select(entries.c.id).where(*conditions).order_by(entries.c.id).limit(limit)
        return tuple(self._connection.execute(query).scalars())

    def count_covered(self, selection: Selection) -> int:
        """How many entries the selection covers."""
        conditions = selected.of_entries(selection, self._connection.dialect)
        if conditions is None:
            return 0
        query = select(func.count()).select_from(entries).where(*conditions)
        return int(self._connection.execute(query).scalar_one())

    def hold(self, selection: Selection, name: str) -> None:
        """Name the hold in all that it covers and no older one holds: `HoldRepository.place`."""
        conditions = selected.of_entries(selection, self._connection.dialect)
        if conditions is not None:
            self._change_holds([*conditions, entries.c.held_by == ""], name)

    def release(self, name: str) -> tuple[str, ...]:
        """Hand what the lifted hold held to the next one that covers it: `HoldRepository.lift`.

        Returns:
            The ids of those that no hold covers any more, sorted.
        """
        held = self._load(select(entries).where(text(HELD), entries.c.held_by == name))
        heirs: dict[str, list[str]] = {}
        for entry in held:
            heirs.setdefault(self._lasting.of_entry(entry), []).append(entry.id)
        for heir, ids in heirs.items():
            for start in range(0, len(ids), _CHUNK):
                self._change_holds([entries.c.id.in_(ids[start : start + _CHUNK])], heir)
        return tuple(sorted(heirs.get("", ())))

    def _change_holds(self, conditions: Sequence[Any], name: str) -> None:
        moment = mapping.to_micros(self._now)
        changed = self._connection.execute(
            update(entries)
            .where(*conditions)
            .values(
                held_by=name,
                revision=entries.c.revision + 1,
                updated_at=case(
                    (entries.c.updated_at > moment, entries.c.updated_at), else_=moment
                ),
            )
            .returning(entries.c.id)
        )
        self._outbox.append_all(Topic.ENTRY, sorted(changed.scalars()))

    # --- reading ------------------------------------------------------------------------------

    def _stream(self, query: Select[Any]) -> Iterator[Any]:
        options = {"stream_results": True, "yield_per": _STREAM}
        return iter(self._connection.execute(query, execution_options=options))

    def _load(self, query: Select[Any]) -> list[RegistrationEntry]:
        rows = list(self._connection.execute(query))
        if not rows:
            return []
        selectors: dict[str, list[Selector]] = {row.id: [] for row in rows}
        ids = list(selectors)
        for start in range(0, len(ids), _MANY):
            found = self._connection.execute(
                select(entry_selectors).where(
                    entry_selectors.c.entry_id.in_(ids[start : start + _MANY])
                )
            )
            for row in found:
                selectors[row.entry_id].append(mapping.selector_from(row.type, row.value))
        return [mapping.entry_from_row(row, selectors[row.id]) for row in rows]

    # --- what may not be stored twice ---------------------------------------------------------

    def _refuse_duplicate(self, entry: RegistrationEntry, *, new: bool) -> None:
        identity, hint = mapping.identity_key(entry), mapping.hint_key(entry)
        keys = {"entry_id": entry.id, "identity": identity, "hint": hint}
        rows = self._connection.execute(_SAME, keys).all()
        same_id = [row for row in rows if row.id == entry.id]
        others = [row for row in rows if row.id != entry.id]
        if new and same_id:
            raise _exists(self.get(entry.id), f'an entry with the id "{entry.id}" exists already')
        for row in others:
            if row.identity_key == identity:
                raise _exists(
                    self.get(row.id),
                    f'the entry "{row.id}" has the same SPIFFE ID, parent and selectors already',
                )
        if others:
            raise EntryInvalid(
                f'the entry "{others[0].id}" has the same parent and the same hint already',
                hint="choose another hint: workloads tell their identities apart by it",
                entry_id=others[0].id,
            )

    def _claim_spelling(self, spiffe_id: SpiffeId) -> None:
        spelling = str(spiffe_id)
        folded = spelling.lower()
        stored = self._connection.execute(_SPELLING, {"id_folded": folded}).scalar()
        if stored == spelling:
            return
        if stored is None:
            self._connection.execute(_INSERT_SPELLING, {"folded": folded, "spelling": spelling})
            return
        raise SpiffeIdCaseConflict(
            f'"{stored}" is registered already and differs from "{spelling}" by letter case alone'
        )

    def _release_spelling(self, spiffe_id: SpiffeId) -> None:
        spelling = str(spiffe_id)
        self._connection.execute(
            delete(spiffe_ids).where(
                spiffe_ids.c.spelling == spelling,
                ~exists().where(entries.c.spiffe_id == spelling),
            )
        )


def _exists(stored: RegistrationEntry, sentence: str) -> EntryExists:
    return EntryExists(
        sentence,
        hint=f"idb entry show {stored.id} shows the stored one; idb entry update changes it",
        entry=stored,
    )
