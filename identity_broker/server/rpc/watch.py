"""Streams of changes: the full state first, then every change.

- A watcher has a bounded queue; one that reads too slowly is let go with WATCH_LAGGED, and nobody
  else waits for it.
- A watcher subscribes before it reads the state, so no change falls between the two.
- A watch has no end of its own: the pipeline ends it when the caller leaves or the broker drains.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, TypeVar

from identity_broker.errors import WatchLagged

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")

MOST_QUEUED = 1024


class Subscription(Generic[T]):
    """One watcher's queue."""

    def __init__(self) -> None:
        self._queue: deque[T] = deque()
        self._news = asyncio.Event()
        self._lagged = False

    def put(self, item: T) -> None:
        """Queue an item, or mark the watcher as lagging."""
        if len(self._queue) < MOST_QUEUED:
            self._queue.append(item)
        else:
            self._lagged = True
        self._news.set()

    async def items(self) -> AsyncIterator[T]:
        """Yield items, for ever.

        Raises:
            WatchLagged: the watcher read too slowly.
        """
        while True:
            await self._news.wait()
            if self._lagged:
                raise WatchLagged
            if self._queue:
                yield self._queue.popleft()
            else:
                self._news.clear()


@contextmanager
def subscription(
    listen: Callable[[Callable[[T], None]], Callable[[], None]],
) -> Iterator[Subscription[T]]:
    """Subscribe for as long as the block runs."""
    watcher: Subscription[T] = Subscription()
    stop = listen(watcher.put)
    try:
        yield watcher
    finally:
        stop()
