"""The audit log: append-only; the database itself refuses to change or remove a line."""

from __future__ import annotations

from sqlalchemy import Connection, insert, select

from identity_broker.domain.events import AuditEvent
from identity_broker.domain.paging import Page
from identity_broker.errors import PageTokenInvalid
from identity_broker.store.mapping import audit_from_row, audit_values
from identity_broker.store.tables import audit_events

_APPEND = insert(audit_events)


class AuditRepository:
    """Appends events and reads them back."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def append(self, event: AuditEvent) -> None:
        """Append an event."""
        self._connection.execute(_APPEND, audit_values(event))

    def page(self, after: str, size: int) -> Page[AuditEvent]:
        """A page, oldest first, beginning behind the key `after` (empty: at the oldest).

        Raises:
            PageTokenInvalid: `after` is not a key of a page.
        """
        query = select(audit_events).order_by(audit_events.c.seq).limit(size + 1)
        if after:
            if not (after.isascii() and after.isdigit() and len(after) <= 18):
                raise PageTokenInvalid
            query = query.where(audit_events.c.seq > int(after))
        rows = list(self._connection.execute(query))
        items = [audit_from_row(row) for row in rows[:size]]
        return Page(items, str(rows[size - 1].seq) if len(rows) > size else "")
