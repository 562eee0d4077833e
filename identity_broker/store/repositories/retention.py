"""What is removed for good, in steps small enough not to keep the ledger waiting."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection, delete, func, select, text

from identity_broker.store.mapping import to_micros
from identity_broker.store.tables import DEAD, credentials, outbox

STEP = 5_000
"""Rows one call removes at most."""


class RetentionRepository:
    """Removes what has been kept long enough."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def purge_credentials(self, before: datetime) -> int:
        """Remove expired and revoked credentials whose validity ended before that.

        Returns:
            How many; call again while it is `STEP`.
        """
        old = (
            select(credentials.c.seq)
            .where(text(DEAD), credentials.c.not_after < to_micros(before))
            .order_by(credentials.c.not_after)
            .limit(STEP)
        )
        gone = self._connection.execute(delete(credentials).where(credentials.c.seq.in_(old)))
        return int(gone.rowcount)

    def purge_outbox(self, keep: int) -> int:
        """Remove all but the newest `keep` changes (at least one stays).

        A reader that had not seen one of them learns so from `ChangeFeed.after`.

        Returns:
            How many; call again while it is `STEP`.
        """
        newest = self._connection.execute(select(func.max(outbox.c.seq))).scalar() or 0
        old = (
            select(outbox.c.seq)
            .where(outbox.c.seq <= newest - max(keep, 1))
            .order_by(outbox.c.seq)
            .limit(STEP)
        )
        gone = self._connection.execute(delete(outbox).where(outbox.c.seq.in_(old)))
        return int(gone.rowcount)
