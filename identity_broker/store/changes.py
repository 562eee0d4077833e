"""The change feed: what others, and this process, committed.

- Numbers are in commit order: who has seen `seq` has missed nothing before it.
- A commit of this process wakes waiters at once; other processes' are seen by polling, and only
  while somebody waits.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from identity_broker.domain.events import Change
from identity_broker.errors import WatchLagged
from identity_broker.store.repositories import Repositories

T = TypeVar("T")

POLL_INTERVAL = 0.1
"""Seconds between looks at what other processes committed."""


class Reader(Protocol):
    """Runs a function in a read transaction (`Store.read`)."""

    def __call__(self, fn: Callable[[Repositories], T], /) -> Awaitable[T]: ...


class ChangeFeed:
    """Follows the outbox."""

    def __init__(self, read: Reader) -> None:
        self._read = read
        self._seen = 0
        self._news = asyncio.Event()

    async def after(self, seq: int, limit: int = 1000) -> list[Change]:
        """The changes with a higher number, at most `limit`, lowest first.

        Raises:
            WatchLagged: retention removed some of them; load the whole state, go on from `latest`.
            StoreUnavailable: the database did not answer.
        """

        def read(repos: Repositories) -> list[Change]:
            changes = repos.outbox.after(seq, limit)
            # A gap alone means nothing: a transaction that was undone leaves one too.
            if changes and changes[0].seq > seq + 1:
                purged = repos.outbox.purged_to()
                if purged > seq:
                    raise WatchLagged(detail=f"changes up to {purged} are gone, {seq} was seen")
            return changes

        changes = await self._read(read)
        if changes:
            self.published(changes[-1].seq)
        return changes

    async def latest(self) -> int:
        """The highest number; 0 when nothing ever changed.

        Raises:
            StoreUnavailable: the database did not answer.
        """
        seq = await self._read(lambda repos: repos.outbox.latest())
        self.published(seq)
        return seq

    async def wait(self, seq: int, timeout: float) -> bool:
        """Wait until there is a change with a higher number than `seq`.

        Args:
            seq: the number last seen.
            timeout: seconds to wait.

        Returns:
            Whether there is one.

        Raises:
            StoreUnavailable: the database did not answer.
        """
        deadline = time.monotonic() + timeout
        while self._seen <= seq:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            news = self._news
            try:
                async with asyncio.timeout(min(left, POLL_INTERVAL)):
                    await news.wait()
            except TimeoutError:
                await self.latest()
        return True

    def published(self, seq: int) -> None:
        """Note that changes up to `seq` are committed; on the event loop's thread."""
        if seq > self._seen:
            self._seen = seq
            # A fresh event, so that it never has to be cleared under those who wait for more.
            news, self._news = self._news, asyncio.Event()
            news.set()
