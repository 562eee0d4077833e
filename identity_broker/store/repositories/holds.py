"""Holds: what stops issuance until it is lifted.

- Entries name the oldest lasting hold that covers them; nodes are banned in its name. Placing and
  lifting keep that so, new entries and nodes are looked at when they are stored.
- Lifting undoes what this hold did and nothing else: what another one covers stays held, a ban
  with another reason stays.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING

from sqlalchemy import Connection, insert, select, text, update

from identity_broker.domain.events import Topic
from identity_broker.domain.paging import Page
from identity_broker.domain.revocation import Hold
from identity_broker.domain.selection import Selection
from identity_broker.errors import HoldExists, HoldNotFound
from identity_broker.store.mapping import to_micros
from identity_broker.store.order_mapping import hold_from_row, hold_values
from identity_broker.store.order_tables import LASTING, holds
from identity_broker.store.repositories import page_keys
from identity_broker.store.repositories.lasting_holds import LastingHolds, is_banned_by

if TYPE_CHECKING:
    from identity_broker.store.repositories.entries import EntryRepository
    from identity_broker.store.repositories.nodes import NodeRepository
    from identity_broker.store.repositories.outbox import OutboxRepository
    from identity_ca.spiffe_id import SpiffeId


class HoldRepository:
    """Places and lifts holds."""

    def __init__(
        self,
        connection: Connection,
        outbox: OutboxRepository,
        entries: EntryRepository,
        nodes: NodeRepository,
        lasting: LastingHolds,
    ) -> None:
        self._connection = connection
        self._outbox = outbox
        self._entries = entries
        self._nodes = nodes
        self._lasting = lasting

    def place(self, hold: Hold) -> tuple[str, ...]:
        """Put a new hold in force; return the ids of all entries it covers, sorted.

        Raises:
            HoldExists: another one has its name, be it lifted.
        """
        if self._find(hold.name) is not None:
            raise HoldExists(f'there is a hold "{hold.name}" already')
        self._connection.execute(insert(holds).values(hold_values(hold)))
        self._lasting.forget()
        selection = Selection.of(hold.subject)
        self._entries.hold(selection, hold.name)
        if selection.node is not None:
            self._judge_again(selection.node)
        self._outbox.append(Topic.HOLD, hold.name)
        return self._entries.covered_ids(selection)

    def lift(self, name: str, now: datetime, by: str) -> tuple[Hold, tuple[str, ...]]:
        """End a hold; return it, and the ids of the entries that nothing holds any more, sorted.

        One that is lifted already stays as it was, and frees nothing.

        Args:
            by: who lifts it; "time" when it has ended by itself.

        Raises:
            HoldNotFound: there is none of that name.
        """
        hold = self.get(name)
        if hold.lifted_at is not None:
            return hold, ()
        hold = replace(hold, lifted_at=now, lifted_by=by)
        self._connection.execute(
            update(holds).where(holds.c.name == name).values(lifted_at=to_micros(now), lifted_by=by)
        )
        self._lasting.forget()
        freed = self._entries.release(name)
        node_id = Selection.of(hold.subject).node
        if node_id is not None:
            self._judge_again(node_id, lifted=name)
        self._outbox.append(Topic.HOLD, name)
        return hold, freed

    def get(self, name: str) -> Hold:
        """The hold of that name, lasting or lifted.

        Raises:
            HoldNotFound: there is none.
        """
        hold = self._find(name)
        if hold is None:
            raise HoldNotFound(f'no hold has the name "{name[:64]}"')
        return hold

    def get_many(self, names: Collection[str]) -> list[Hold]:
        """Those of these holds that there are."""
        query = select(holds).where(holds.c.name.in_(sorted(set(names)))).order_by(holds.c.seq)
        return [hold_from_row(row) for row in self._connection.execute(query)]

    def page(self, before: str, size: int, *, include_lifted: bool = False) -> Page[Hold]:
        """A page, newest first, beginning behind the key `before` (empty: at the newest).

        Raises:
            PageTokenInvalid: `before` is not a key of a page.
        """
        query = select(holds).order_by(holds.c.seq.desc()).limit(size + 1)
        if before:
            query = query.where(holds.c.seq < page_keys.row_number(before))
        if not include_lifted:
            query = query.where(text(LASTING))
        rows = list(self._connection.execute(query))
        items = [hold_from_row(row) for row in rows[:size]]
        return Page(items, str(rows[size - 1].seq) if len(rows) > size else "")

    def due(self, now: datetime) -> list[Hold]:
        """Those whose time is over and that nobody has lifted, oldest first."""
        query = (
            select(holds)
            .where(text(LASTING), holds.c.until <= to_micros(now))
            .order_by(holds.c.seq)
        )
        return [hold_from_row(row) for row in self._connection.execute(query)]

    def held_entry_ids(self, name: str, limit: int) -> tuple[str, ...]:
        """The ids of entries that a lasting hold covers, sorted; none of one that is lifted.

        Raises:
            HoldNotFound: there is none of that name.
        """
        hold = self.get(name)
        if hold.lifted_at is not None:
            return ()
        return self._entries.covered_ids(Selection.of(hold.subject), limit)

    def of_node(self, node_id: SpiffeId) -> str:
        """The name of the oldest lasting hold that covers the node; empty for none."""
        return self._lasting.of_node(node_id)

    def _find(self, name: str) -> Hold | None:
        row = self._connection.execute(select(holds).where(holds.c.name == name)).one_or_none()
        return None if row is None else hold_from_row(row)

    def _judge_again(self, node_id: SpiffeId, lifted: str = "") -> None:
        """Ban the node if a hold says so; let it go if it was `lifted` that banned it."""
        node = self._nodes.find(node_id)
        if node is None:
            return
        if lifted and is_banned_by(node, lifted):
            self._nodes.upsert(replace(node, banned=False, ban_reason=""))
        elif not node.banned:
            self._nodes.upsert(node)
