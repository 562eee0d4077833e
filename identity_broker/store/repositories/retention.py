"""What is removed for good, in steps small enough not to keep the ledger waiting.

The audit log is not among it, nor are blocked keys: nothing removes a line of those.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection, delete, exists, func, insert, select, text, update

from identity_broker.domain.revocation import OrderState
from identity_broker.store.mapping import to_micros
from identity_broker.store.order_tables import holds, identity_epochs, revocation_orders
from identity_broker.store.steps import STEP
from identity_broker.store.tables import DEAD, ORDERED, credentials, outbox, outbox_mark


class RetentionRepository:
    """Removes what has been kept long enough."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def purge_credentials(self, before: datetime, limit: int = STEP) -> int:
        """Remove expired and revoked credentials whose validity ended before that.

        Returns:
            How many; call again while it is `limit`.
        """
        old = (
            select(credentials.c.seq)
            .where(text(DEAD), credentials.c.not_after < to_micros(before))
            .order_by(credentials.c.not_after)
            .limit(limit)
        )
        numbers = self._connection.execute(old).scalars().all()
        self._connection.execute(delete(credentials).where(credentials.c.seq.in_(numbers)))
        return len(numbers)

    def purge_orders(self, before: datetime, limit: int = STEP) -> int:
        """Remove closed orders from before that, once nothing in the ledger or on hold names them.

        Returns:
            How many; call again while it is `limit`.
        """
        o = revocation_orders.c
        old = (
            select(o.seq)
            .where(
                o.state == OrderState.CLOSED.value,
                o.swept,
                o.ordered_at < to_micros(before),
                ~exists().where(text(ORDERED), credentials.c.order_id == o.id),
                ~exists().where(holds.c.order_id == o.id),
            )
            .order_by(o.seq)
            .limit(limit)
        )
        numbers = self._connection.execute(old).scalars().all()
        self._connection.execute(
            delete(revocation_orders).where(revocation_orders.c.seq.in_(numbers))
        )
        return len(numbers)

    def purge_holds(self, before: datetime, limit: int = STEP) -> int:
        """Remove holds that were lifted before that.

        Returns:
            How many; call again while it is `limit`.
        """
        old = (
            select(holds.c.seq)
            .where(holds.c.lifted_at < to_micros(before))
            .order_by(holds.c.seq)
            .limit(limit)
        )
        numbers = self._connection.execute(old).scalars().all()
        self._connection.execute(delete(holds).where(holds.c.seq.in_(numbers)))
        return len(numbers)

    def purge_epochs(self, now: datetime, limit: int = STEP) -> int:
        """Remove epochs that can end no token any more.

        Returns:
            How many; call again while it is `limit`.
        """
        e = identity_epochs.c
        old = (
            select(e.spiffe_id)
            .where(e.expires_at <= to_micros(now))
            .order_by(e.expires_at)
            .limit(limit)
        )
        ids = self._connection.execute(old).scalars().all()
        self._connection.execute(delete(identity_epochs).where(e.spiffe_id.in_(ids)))
        return len(ids)

    def purge_outbox(self, keep: int, limit: int = STEP) -> int:
        """Remove all but the newest `keep` changes (at least one stays).

        A reader that had not seen one of them learns so from `ChangeFeed.after`.

        Returns:
            How many; call again while it is `limit`.
        """
        newest = self._connection.execute(select(func.max(outbox.c.seq))).scalar() or 0
        old = (
            select(outbox.c.seq)
            .where(outbox.c.seq <= newest - max(keep, 1))
            .order_by(outbox.c.seq)
            .limit(limit)
        )
        numbers = self._connection.execute(old).scalars().all()
        if numbers:
            self._connection.execute(delete(outbox).where(outbox.c.seq <= numbers[-1]))
            self._mark(numbers[-1])
        return len(numbers)

    def _mark(self, purged_to: int) -> None:
        marked = self._connection.execute(update(outbox_mark).values(purged_to=purged_to))
        if not marked.rowcount:
            self._connection.execute(insert(outbox_mark).values(id=1, purged_to=purged_to))
