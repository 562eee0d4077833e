"""Streams of changes: the full state first, then every change.

- A watcher has a bounded queue; one that reads too slowly is let go with WATCH_LAGGED, and nobody
  else waits for it.
- A watcher subscribes before it reads the state, so no change falls between the two.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, TypeVar

from identity_broker.errors import WatchLagged

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")

_MOST_QUEUED = 1024


class Subscription(Generic[T]):
    """One watcher's queue."""

    def __init__(self, stopping: asyncio.Event) -> None:
        self._queue: asyncio.Queue[T] = asyncio.Queue(_MOST_QUEUED)
        self._stopping = stopping
        self._lagged = False

    def put(self, item: T) -> None:
        """Queue an item, or mark the watcher as lagging."""
        try:
            self._queue.put_nowait(item)
        except asyncio.QueueFull:
            self._lagged = True

    async def items(self) -> AsyncIterator[T]:
        """Yield items until the server drains.

        Raises:
            WatchLagged: the watcher read too slowly.
        """
        stop = asyncio.ensure_future(self._stopping.wait())
        try:
            while not self._stopping.is_set():
                take = asyncio.ensure_future(self._queue.get())
                try:
                    await asyncio.wait({take, stop}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not take.done():
                        take.cancel()
                if self._lagged:
                    raise WatchLagged
                if take.done() and not take.cancelled():
                    yield take.result()
        finally:
            stop.cancel()


@contextmanager
def subscription(
    listen: Callable[[Callable[[T], None]], Callable[[], None]], stopping: asyncio.Event
) -> Iterator[Subscription[T]]:
    """Subscribe for as long as the block runs."""
    watcher: Subscription[T] = Subscription(stopping)
    stop = listen(watcher.put)
    try:
        yield watcher
    finally:
        stop()
