"""The ledger's hot path: group commit on one thread.

- `intend` returns when its intents are durable. Whoever calls while a commit is under way shares
  the next one; no caller waits for a timer.
- Outcomes ride on the next commit; without one they are committed `LINGER` seconds later. They
  outlive failed commits up to a bound; what is lost beyond it the sweeper marks UNCONFIRMED.
- A failed commit fails every waiter in it; a waiter that is cancelled fails nobody else.
- The event loop pays for a tuple a credential, a queue operation a call and a wake-up a commit.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError

from identity_broker.domain.credential import CredentialIntent, CredentialOutcome
from identity_broker.errors import BrokerError, InvariantViolated, StoreUnavailable
from identity_broker.store.database import Database, Mode
from identity_broker.store.errors import RETRY_AFTER, is_disconnect, is_transient, translate
from identity_broker.store.ledger_statements import insert_intents, write_outcomes
from identity_broker.store.mapping import intent_row
from identity_broker.telemetry.logs import get_logger

LINGER = 0.05
"""Seconds an outcome waits for an intent to share a commit with."""
PATIENCE = 15.0
"""Seconds `intend` waits for a database that does not even fail."""
MAX_ROWS = 2048
"""Intents, and outcomes, in one commit."""
MAX_OUTCOMES = 100_000
"""Outcomes kept while the database is away."""

_EAGER = 512  # outcomes that are worth a commit of their own
_LONGEST_LINGER = 2.0
_ATTEMPTS = 3

_log = get_logger("store.ledger")

_AWAKE, _DOZING, _ASLEEP = range(3)


class _Request:
    """Rows somebody waits for. No rows: a flush."""

    __slots__ = ("deadline", "future", "rows")

    def __init__(
        self, rows: list[tuple[Any, ...]], future: asyncio.Future[None], deadline: float
    ) -> None:
        self.rows = rows
        self.future = future
        self.deadline = deadline


class Ledger:
    """Appends to the ledger. Built by `Store`; used on the loop that opened the store."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._requests: deque[_Request] = deque()
        self._outcomes: deque[CredentialOutcome] = deque()
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._sleep = _AWAKE
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: deque[_Request] = deque()
        self._watchdog: asyncio.TimerHandle | None = None
        # The writer thread's own:
        self._connection: Connection | None = None
        self._committing = False
        self._linger = LINGER

    # --- on the event loop --------------------------------------------------------------------

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the writer thread."""
        self._loop = loop
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="store-ledger", daemon=True)
        self._thread.start()

    async def intend(self, intents: Sequence[CredentialIntent]) -> None:
        """Record intents; all of them or none. Returns when they are durable.

        Raises:
            StoreUnavailable: they may or may not be durable; nothing may be signed.
            InvariantViolated: an id is in the ledger already, or twice among these.
        """
        if intents:
            await self._submit([intent_row(intent) for intent in intents])

    def conclude(self, outcomes: Sequence[CredentialOutcome]) -> None:
        """Queue outcomes; never blocks. They are written with the next commit, soon.

        Raises:
            InvariantViolated: an outcome without a digest.
        """
        for outcome in outcomes:
            if not outcome.digest:
                raise InvariantViolated(detail=f"the outcome of {outcome.id} has no digest")
        self._outcomes.extend(outcomes)
        excess = len(self._outcomes) - MAX_OUTCOMES
        if excess > 0:
            for _ in range(excess):
                self._outcomes.popleft()
            _log.error("ledger outcomes dropped", count=excess)
        if self._sleep == _ASLEEP or (self._sleep == _DOZING and len(self._outcomes) >= _EAGER):
            self._ring()

    async def flush(self) -> None:
        """Return when everything queued so far is durable.

        Raises:
            StoreUnavailable: it is not; outcomes stay queued.
        """
        await self._submit([])

    async def close(self) -> None:
        """Write what is queued, as far as the database lets us, and stop."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._stopping = True
        self._ring()
        await asyncio.get_running_loop().run_in_executor(None, thread.join, PATIENCE)
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog = None
        if self._outcomes:
            _log.error("ledger closed with outcomes unwritten", count=len(self._outcomes))

    async def _submit(self, rows: list[tuple[Any, ...]]) -> None:
        loop = self._loop
        if loop is None or self._thread is None:
            raise StoreUnavailable(detail="the store is not open")
        request = _Request(rows, loop.create_future(), time.monotonic() + PATIENCE)
        self._waiting.append(request)
        if self._watchdog is None:
            self._watchdog = loop.call_later(1.0, self._give_up_on_overdue)
        self._requests.append(request)
        if self._sleep != _AWAKE:
            self._ring()
        await request.future

    def _ring(self) -> None:
        self._sleep = _AWAKE
        self._bell.put(None)

    def _give_up_on_overdue(self) -> None:
        """Fail who waits for a database that hangs: one timer, not one for every caller."""
        self._watchdog = None
        now = time.monotonic()
        while self._waiting and (self._waiting[0].future.done() or self._waiting[0].deadline < now):
            request = self._waiting.popleft()
            if not request.future.done():
                request.future.set_exception(
                    StoreUnavailable(
                        detail=f"no commit within {PATIENCE:g} s", retry_after=RETRY_AFTER
                    )
                )
        if self._waiting and self._loop is not None:
            self._watchdog = self._loop.call_later(1.0, self._give_up_on_overdue)

    @staticmethod
    def _settle(answers: list[tuple[_Request, BrokerError | None]]) -> None:
        for request, error in answers:
            if request.future.done():  # cancelled, or given up on
                continue
            if error is None:
                request.future.set_result(None)
            else:
                request.future.set_exception(error)

    # --- on the writer thread -----------------------------------------------------------------

    def _run(self) -> None:
        try:
            expecting = False
            while True:
                self._wait(doze=expecting)
                if not self._requests and self._stopping:
                    while self._outcomes and self._commit([]):
                        pass
                    return
                requests = self._take()
                succeeded = self._commit(requests)
                # Outcomes of what was just intended come soon: doze, so they need not wake us.
                expecting = succeeded and bool(requests)
        finally:
            self._disconnect()

    def _wait(self, *, doze: bool) -> None:
        """Return when there is something to commit, or to stop for."""
        doze = doze or bool(self._outcomes)
        while not self._requests and not self._stopping:
            healthy = self._linger == LINGER
            if healthy and len(self._outcomes) >= _EAGER:
                return
            self._sleep = _DOZING if doze else _ASLEEP
            if self._pressing(doze=doze):
                doze = True
                continue  # it came between the look and the nap; the bell may not have been rung
            try:
                self._bell.get(timeout=self._linger if doze else None)
            except queue.Empty:
                if self._outcomes:
                    break
                doze = False
            else:
                doze = True
        self._sleep = _AWAKE

    def _pressing(self, *, doze: bool) -> bool:
        return bool(self._requests) or self._stopping or (bool(self._outcomes) and not doze)

    def _take(self) -> list[_Request]:
        requests = []
        rows = 0
        while self._requests and rows < MAX_ROWS:
            request = self._requests.popleft()
            requests.append(request)
            rows += len(request.rows)
        return requests

    def _commit(self, requests: list[_Request]) -> bool:
        """Commit requests and outcomes together; answer every request. Whether it worked."""
        outcomes = [self._outcomes.popleft() for _ in range(min(len(self._outcomes), MAX_ROWS))]
        rows = list(chain.from_iterable(request.rows for request in requests))

        def everything(connection: Connection) -> list[BrokerError | None]:
            insert_intents(connection, rows)
            write_outcomes(connection, outcomes)
            return [None] * len(requests)

        def piecemeal(connection: Connection) -> list[BrokerError | None]:
            answers = [_attempt(connection, insert_intents, r.rows) for r in requests]
            if _attempt(connection, write_outcomes, outcomes) is not None:
                _log.error("ledger outcomes refused by the database", count=len(outcomes))
            return answers

        error: BrokerError | None = None
        answers: list[BrokerError | None] = []
        try:
            try:
                answers = self._transact(everything)
            except (IntegrityError, DataError):
                # Somebody's rows are wrong: find out whose, and keep the others'.
                answers = self._transact(piecemeal)
        except SQLAlchemyError as failure:
            error = translate(failure)
        except BrokerError as failure:
            error = failure
        if error is not None:
            self._outcomes.extendleft(reversed(outcomes))
            self._linger = min(self._linger * 2, _LONGEST_LINGER)
            answers = [error] * len(requests)
        else:
            self._linger = LINGER
        self._answer(list(zip(requests, answers, strict=True)))
        return error is None

    def _transact(
        self, work: Callable[[Connection], list[BrokerError | None]]
    ) -> list[BrokerError | None]:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return self._transact_once(work)
            except SQLAlchemyError as error:
                undone = is_transient(error) or (is_disconnect(error) and not self._committing)
                if not isinstance(error, (IntegrityError, DataError)):
                    self._disconnect()
                if not undone or attempt == _ATTEMPTS:
                    raise
        raise AssertionError("unreachable")

    def _transact_once(
        self, work: Callable[[Connection], list[BrokerError | None]]
    ) -> list[BrokerError | None]:
        self._committing = False
        with self._database.writing(Mode.APPEND):
            if self._connection is None:
                self._connection = self._database.connect(Mode.APPEND)
            with self._connection.begin() as transaction:
                answers = work(self._connection)
                self._committing = True
                transaction.commit()
        return answers

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        try:
            connection.invalidate()
            connection.close()
        except SQLAlchemyError as error:
            _log.debug("ledger connection was lost", detail=str(type(error).__name__))

    def _answer(self, answers: list[tuple[_Request, BrokerError | None]]) -> None:
        if not answers or self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(self._settle, answers)
        except RuntimeError:
            _log.warning("event loop closed before the ledger", count=len(answers))


def _attempt(connection: Connection, work: Callable[..., None], rows: Any) -> BrokerError | None:
    try:
        with connection.begin_nested():
            work(connection, rows)
    except (IntegrityError, DataError) as error:
        return InvariantViolated(detail=translate(error).detail)
    return None
