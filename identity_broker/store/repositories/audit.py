"""The audit log: append-only; the database itself refuses to change or remove a line."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Connection, func, insert, literal, select

from identity_broker.domain.events import AuditEvent, AuditKind
from identity_broker.domain.paging import Page
from identity_broker.store.mapping import audit_from_row, audit_values, to_micros
from identity_broker.store.repositories import page_keys
from identity_broker.store.tables import audit_events, credentials

_APPEND = insert(audit_events)
_COLUMNS = ["at", "kind", "actor", "subject", "reason", "correlation_id", "facts"]


class AuditRepository:
    """Appends events and reads them back."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def append(self, event: AuditEvent) -> None:
        """Append an event."""
        self._connection.execute(_APPEND, audit_values(event))

    def append_for(self, kind: AuditKind, numbers: Sequence[int], at: datetime) -> None:
        """Append an event for each of those ledger rows, in one statement."""
        c = credentials.c
        events = select(
            literal(to_micros(at)),
            literal(kind.value),
            func.coalesce(c.node_id, "broker"),
            c.id,
            literal(""),
            c.correlation_id,
            literal('{"spiffe_id":"') + c.spiffe_id + literal('"}'),  # no quotes in a SPIFFE ID
        ).where(c.seq.in_(numbers))
        self._connection.execute(insert(audit_events).from_select(_COLUMNS, events.order_by(c.seq)))

    def page(self, after: str, size: int) -> Page[AuditEvent]:
        """A page, oldest first, beginning behind the key `after` (empty: at the oldest).

        Raises:
            PageTokenInvalid: `after` is not a key of a page.
        """
        query = select(audit_events).order_by(audit_events.c.seq).limit(size + 1)
        if after:
            query = query.where(audit_events.c.seq > page_keys.row_number(after))
        rows = list(self._connection.execute(query))
        items = [audit_from_row(row) for row in rows[:size]]
        return Page(items, str(rows[size - 1].seq) if len(rows) > size else "")
