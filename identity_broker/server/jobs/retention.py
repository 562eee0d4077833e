"""Retention: what has been kept long enough goes.

- Ledger rows go `retain_expired` after their validity ended, revoked ones too: by then nobody has
  to be told. Nodes go `retain_expired` after their last SVID expired; a banned one stays, and with
  it the ban.
- Join tokens and epochs go when they expire; of the change feed the newest changes stay.
- Lifted holds go `retain_expired` after they were lifted; closed orders, with their statements, go
  `retain_expired` after they were given, once neither the ledger nor a hold names them.
- Neither the audit log nor blocked keys are ever purged.
- Every step is a transaction of its own, so that issuing goes on in between; what is left when the
  database fails is done the next time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from identity_broker.domain.clock import Clock
from identity_broker.store import STEP, Repositories, Store

KEPT_CHANGES = 100_000
"""Changes that stay in the feed: whoever is further behind starts over."""


@dataclass(frozen=True, slots=True)
class Removed:
    """How many of each went."""

    credentials: int
    nodes: int
    join_tokens: int
    epochs: int
    holds: int
    orders: int
    changes: int


class Retention:
    """Removes what has been kept long enough.

    Args:
        store: where it is kept.
        clock: what tells how long.
        retain_expired: how long ledger rows and nodes are kept past their validity.
        kept_changes: how many changes stay in the feed.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        retain_expired: timedelta,
        *,
        kept_changes: int = KEPT_CHANGES,
    ) -> None:
        self._store = store
        self._clock = clock
        self._retain_expired = retain_expired
        self._kept_changes = kept_changes

    async def run(self) -> Removed:
        """Remove all that is due; return how much it was.

        Raises:
            StoreUnavailable: the database did not answer; what was removed by then is gone.
        """
        now = self._clock.now()
        before = now - self._retain_expired
        return Removed(
            credentials=await self._all(lambda r: r.retention.purge_credentials(before, STEP)),
            nodes=await self._all(lambda r: r.nodes.prune(before, STEP)),
            join_tokens=await self._all(lambda r: r.join_tokens.purge(now, STEP)),
            epochs=await self._all(lambda r: r.retention.purge_epochs(now, STEP)),
            holds=await self._all(lambda r: r.retention.purge_holds(before, STEP)),
            # After what names them.
            orders=await self._all(lambda r: r.retention.purge_orders(before, STEP)),
            # Last: pruning nodes appended changes.
            changes=await self._all(lambda r: r.retention.purge_outbox(self._kept_changes, STEP)),
        )

    async def _all(self, step: Callable[[Repositories], int]) -> int:
        total = 0
        while True:
            removed = await self._store.write(step)
            total += removed
            if removed < STEP:
                return total
