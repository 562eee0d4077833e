"""The outbox: what changed, in commit order."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection, func, insert, select

from identity_broker.domain.events import Change, Topic
from identity_broker.store.mapping import change_from_row
from identity_broker.store.tables import outbox, outbox_mark

_APPEND = insert(outbox).returning(outbox.c.seq)


class OutboxRepository:
    """Appends changes and reads them back.

    Writes run one at a time (`database`), so a reader that has seen `seq` has seen all before it.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.appended = 0
        """The last number appended in this transaction; 0 for none."""

    def append(self, topic: Topic, key: str) -> int:
        """Append a change; return its number."""
        row = {"topic": topic.value, "key": key}
        self.appended = int(self._connection.execute(_APPEND, row).scalar_one())
        return self.appended

    def append_all(self, topic: Topic, keys: Iterable[str]) -> None:
        """Append many changes of one topic in one statement."""
        rows = [{"topic": topic.value, "key": key} for key in keys]
        if rows:
            self._connection.execute(insert(outbox), rows)
            self.appended = self.latest()

    def after(self, seq: int, limit: int) -> list[Change]:
        """The changes with a higher number, at most `limit`, lowest first."""
        query = select(outbox).where(outbox.c.seq > seq).order_by(outbox.c.seq).limit(limit)
        return [change_from_row(row) for row in self._connection.execute(query)]

    def latest(self) -> int:
        """The highest number; 0 when nothing ever changed."""
        return int(self._connection.execute(select(func.max(outbox.c.seq))).scalar() or 0)

    def purged_to(self) -> int:
        """The number up to which retention removed changes; 0 when it never did.

        Not the lowest number left: numbers are skipped where a transaction was undone.
        """
        return int(self._connection.execute(select(outbox_mark.c.purged_to)).scalar() or 0)
