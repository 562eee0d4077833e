"""The numbers of revocation lists: one row of them for each authority, and they only grow.

- Reserved ahead in the store, so that they grow across restarts, whatever the clock says, and two
  brokers on one store never use the same one. Most lists need no write.
- Milliseconds since the epoch where the clock is ahead of the last number: a number says about when
  the list was made.
"""

from __future__ import annotations

import asyncio

from identity_broker.domain.clock import Clock
from identity_broker.store import Repositories, Store

BLOCK = 60_000
"""How many numbers are reserved at once: a minute's, where lists are made all the time."""


class ListNumbers:
    """Hands out numbers."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._last: dict[str, tuple[int, int]] = {}
        self._reserving = asyncio.Lock()

    async def next(self, authority_id: str) -> int:
        """A number larger than any this authority's lists have had.

        Raises:
            StoreUnavailable: it cannot be reserved; nothing was handed out.
        """
        async with self._reserving:
            last, end = self._last.get(authority_id, (0, 0))
            now = int(self._clock.now().timestamp() * 1000)
            number = max(last + 1, now)
            if number > end:
                number, end = await self._reserve(authority_id, number)
            self._last[authority_id] = (number, end)
            return number

    async def _reserve(self, authority_id: str, wanted: int) -> tuple[int, int]:
        def reserve(repos: Repositories) -> int:
            first = max(wanted, repos.crl_numbers.all().get(authority_id, 0) + 1)
            repos.crl_numbers.reserve(authority_id, first + BLOCK)
            return first

        first = await self._store.write(reserve)
        return first, first + BLOCK
