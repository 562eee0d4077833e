"""The nodes that may hold what a revocation ended, as the ledger knows them.

- Those through which it was issued, X.509 and JWT, as long as it has not expired; a node that is
  revoked itself in any case.
- Read by the index of what orders have revoked; bounded.
"""

from __future__ import annotations

from typing import Final

from identity_broker.domain.clock import Clock
from identity_broker.domain.revocation import RevocationOrder
from identity_broker.domain.selection import Selection
from identity_broker.store import Store
from identity_ca.spiffe_id import SpiffeId

MOST_NODES: Final = 10_000
"""More than are named as away: most of them are connected."""


class ConcernedNodes:
    """Finds the nodes that an order concerns."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def of(self, order: RevocationOrder) -> tuple[SpiffeId, ...]:
        """The nodes that may hold what the order revoked by now; at most `MOST_NODES`, and itself.

        Raises:
            StoreUnavailable: the database did not answer.
        """
        now = self._clock.now()
        found = set(
            await self._store.read(
                lambda repos: repos.credentials.nodes_of(order.id, now, MOST_NODES)
            )
        )
        itself = Selection.of(order.subject).node
        if itself is not None:
            found.add(itself)
        return tuple(sorted(found, key=str))
