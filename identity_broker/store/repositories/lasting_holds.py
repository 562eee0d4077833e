"""The holds that are in force, read once a transaction: whether something new is held by one.

- Holds are few: they are matched here, one after the other, the oldest first.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from sqlalchemy import Connection, select, text

from identity_broker.domain.entry import RegistrationEntry
from identity_broker.domain.node import Node
from identity_broker.domain.revocation import Hold
from identity_broker.domain.selection import Selection
from identity_broker.store.order_mapping import hold_from_row
from identity_broker.store.order_tables import LASTING, holds
from identity_ca.spiffe_id import SpiffeId

_BAN = "on hold: "

_QUERY = select(holds).where(text(LASTING)).order_by(holds.c.seq)


class LastingHolds:
    """What is on hold at `now`."""

    def __init__(self, connection: Connection, now: datetime) -> None:
        self._connection = connection
        self._now = now
        self._loaded: list[tuple[Hold, Selection]] | None = None

    def forget(self) -> None:
        """Read them again when they are next asked for: one was placed or lifted."""
        self._loaded = None

    def of_entry(self, entry: RegistrationEntry) -> str:
        """The name of the oldest that covers the entry; empty for none."""
        for hold, selection in self._all():
            if selection.covers_entry(entry):
                return hold.name
        return ""

    def of_node(self, node_id: SpiffeId) -> str:
        """The name of the oldest that covers the node; empty for none."""
        for hold, selection in self._all():
            if selection.node == node_id:
                return hold.name
        return ""

    def applied_to(self, node: Node) -> Node:
        """The node, banned when a hold covers it and nothing else has banned it."""
        name = "" if node.banned else self.of_node(node.spiffe_id)
        return replace(node, banned=True, ban_reason=f"{_BAN}{name}") if name else node

    def _all(self) -> list[tuple[Hold, Selection]]:
        if self._loaded is None:
            stored = [hold_from_row(row) for row in self._connection.execute(_QUERY)]
            self._loaded = [
                (hold, Selection.of(hold.subject)) for hold in stored if hold.lasts(self._now)
            ]
        return self._loaded


def is_banned_by(node: Node, name: str) -> bool:
    """Whether it is that hold that banned the node."""
    return node.banned and node.ban_reason == f"{_BAN}{name}"
