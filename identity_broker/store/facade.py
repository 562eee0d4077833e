"""The store as the rest of the broker sees it: asynchronous, in domain values.

- Database work runs in a few threads; a call waits for one, and for its answer, a bounded time.
- A read sees one snapshot; a write is alone and committed before it returns.
- Every failure of the database is `StoreUnavailable`; what the domain refuses keeps its own error.
- A caller that is cancelled leaves its transaction to finish: it is done or not, never half.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from sqlalchemy.exc import SQLAlchemyError

from identity_broker.domain.clock import Clock
from identity_broker.errors import StoreUnavailable
from identity_broker.store import schema
from identity_broker.store.changes import ChangeFeed
from identity_broker.store.database import Database, Mode
from identity_broker.store.errors import RETRY_AFTER, is_transient, translate
from identity_broker.store.ledger import CommitObserver, Ledger
from identity_broker.store.repositories import Repositories

T = TypeVar("T")

THREADS = 4
"""Transactions at a time, the ledger's apart."""
PATIENCE = 15.0
"""Seconds a caller waits for a thread."""
RUNNING_PATIENCE = 60.0
"""Seconds a transaction may take: loading 100,000 entries on a busy machine fits in."""
_ATTEMPTS = 5
_JITTER = secrets.SystemRandom()


class Store:
    """The broker's database.

    Args:
        url: `sqlite:////absolute/path` or `postgresql://…`.
        clock: what entries' times are taken from.
        on_commit: told of every group commit of the ledger; see `Ledger.observe`.

    Raises:
        ConfigError: the URL names no database the broker can use, or its folder is open to others.
    """

    def __init__(self, url: str, *, clock: Clock, on_commit: CommitObserver | None = None) -> None:
        self._clock = clock
        self._database = Database(url, connections=THREADS + 1)
        self._executor: ThreadPoolExecutor | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = threading.Event()
        self.ledger = Ledger(self._database, on_commit)
        self.changes = ChangeFeed(self.read)

    async def open(self) -> None:
        """Start the threads; connects to nothing yet. The store belongs to the running loop."""
        if self._executor is not None:
            return
        self._loop = asyncio.get_running_loop()
        self._closing.clear()
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="store")
        self.ledger.start(self._loop)

    async def migrate(self) -> None:
        """Bring the schema up to date; opens the store if need be. Safe in many processes at once.

        Raises:
            StoreUnavailable: the database did not answer.
            ConfigError: a newer version of the broker has been here.
        """
        await self.open()
        await self._call(lambda: schema.upgrade(self._database), running=schema.PATIENCE)

    async def close(self) -> None:
        """Write what the ledger has queued, and let go of the database."""
        executor, self._executor = self._executor, None
        if executor is None:
            return
        self._closing.set()
        await self.ledger.close()
        await asyncio.get_running_loop().run_in_executor(None, executor.shutdown)
        self._database.close()

    async def read(self, fn: Callable[[Repositories], T]) -> T:
        """Run `fn` in a store thread in one read transaction.

        `fn` must not return anything that reads later, such as `entries.iterate()` itself.

        Raises:
            StoreUnavailable: the database did not answer.
            MalformedRequest: what is looked for holds a character that cannot be stored.
        """

        def transact() -> T:
            with self._database.transaction(Mode.READ) as connection:
                return fn(Repositories(connection, self._clock.now()))

        return await self._call(transact)

    async def write(self, fn: Callable[[Repositories], T]) -> T:
        """Run `fn` in a store thread in one write transaction; committed when this returns.

        `fn` may run again when the database undid its first run: it must have no other effects.

        Raises:
            StoreUnavailable: the database did not answer; the change may or may not be made.
            MalformedRequest: the change holds a character that cannot be stored.
            BrokerError: what `fn` raised; the change is not made.
        """
        return await self._call(lambda: self._write(fn))

    async def check(self) -> None:
        """Find out whether the database can be written and has this version's schema.

        Raises:
            StoreUnavailable: it cannot, or has not, or the ledger's writer is gone.
        """
        self.ledger.check()

        def look() -> None:
            # A write transaction: a database that can only be read cannot issue anything.
            with self._database.transaction(Mode.APPEND) as connection:
                schema.verify(connection)

        await self._call(look, running=PATIENCE)

    def _write(self, fn: Callable[[Repositories], T]) -> T:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with self._database.raw_transaction(Mode.WRITE) as connection:
                    repos = Repositories(connection, self._clock.now())
                    answer = fn(repos)
            except SQLAlchemyError as error:
                if not is_transient(error) or attempt == _ATTEMPTS:
                    raise translate(error) from error
                self._closing.wait(_JITTER.uniform(0, 0.01 * 2**attempt))
            else:
                self._publish(repos.outbox.appended)
                return answer
        raise AssertionError("unreachable")

    def _publish(self, seq: int) -> None:
        if seq and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.changes.published, seq)

    async def _call(self, work: Callable[[], T], *, running: float = RUNNING_PATIENCE) -> T:
        if self._executor is None:
            raise StoreUnavailable(detail="the store is not open")
        loop = asyncio.get_running_loop()
        limit = asyncio.timeout(PATIENCE)

        def extend() -> None:
            if not future.done():
                limit.reschedule(loop.time() + running)

        def run() -> T:
            loop.call_soon_threadsafe(extend)
            return work()

        try:
            async with limit:
                future = loop.run_in_executor(self._executor, run)
                return await future
        except TimeoutError as error:
            raise StoreUnavailable(
                detail="the database took too long", retry_after=RETRY_AFTER
            ) from error
