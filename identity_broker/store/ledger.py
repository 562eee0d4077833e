"""The ledger's hot path: group commit on one thread.

- `intend` returns when its intents are durable. Whoever calls while a commit is under way shares
  the next one; no caller waits for a timer.
- Outcomes ride on the next commit; without one they are committed `LINGER` seconds later. They
  outlive failed commits up to a bound; what is lost beyond it the sweeper marks UNCONFIRMED.
- A failed commit fails every waiter in it; a waiter that is cancelled fails nobody else.
- The writer outlives whatever is raised in it: waiters are told, the log is told, it goes on.
- The event loop pays for a tuple a credential, a queue operation a call and a wake-up a commit.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError

from identity_broker.domain.credential import CredentialIntent, CredentialOutcome
from identity_broker.errors import BrokerError, InvariantViolated, StoreUnavailable
from identity_broker.store.database import Database, Mode
from identity_broker.store.errors import RETRY_AFTER, is_disconnect, is_transient, translate
from identity_broker.store.ledger_statements import insert_intents, write_outcomes
from identity_broker.store.mapping import intent_row
from identity_broker.telemetry.logs import get_logger

T = TypeVar("T")

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

CommitObserver = Callable[[int, float], None]
"""Told of every group commit: rows (intents and outcomes) and seconds. Called on the writer's
thread while callers wait: it must be quick and may be called from another thread than it was made
in. What it raises is logged."""

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

    def __init__(self, database: Database, observe: CommitObserver | None = None) -> None:
        self.observe = observe
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
        self._linger = LINGER
        self._thread = threading.Thread(target=self._run, name="store-ledger", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """Rows that wait for a commit: intents somebody waits for, and outcomes."""
        intents = sum(len(one.rows) for one in self._waiting if not one.future.done())
        return intents + len(self._outcomes)

    def check(self) -> None:
        """Find out whether there is a writer.

        Raises:
            StoreUnavailable: there is none: nothing can be recorded until the broker starts again.
        """
        if self._thread is None:
            raise StoreUnavailable(detail="the store is not open")
        if not self._thread.is_alive():
            raise StoreUnavailable(
                detail="the ledger's writer is gone", hint="restart the broker; its log says why"
            )

    async def intend(self, intents: Sequence[CredentialIntent]) -> None:
        """Record intents; all of them or none. Returns when they are durable.

        Raises:
            StoreUnavailable: they may or may not be durable; nothing may be signed.
            InvariantViolated: an id is in the ledger already, or twice among these.
            MalformedRequest: an intent holds a character that cannot be stored.
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
        self.check()
        loop = asyncio.get_running_loop()
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

    def _fail_everybody(self, error: BrokerError) -> None:
        self._settle([(request, error) for request in self._waiting])

    # --- on the writer thread -----------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                try:
                    self._serve()
                except Exception as error:  # noqa: BLE001  # the ledger outlives its bugs
                    _log.exception("ledger writer failed")
                    self._back_off()
                    self._answer_everybody(_broken(error))
                    with suppress(queue.Empty):
                        self._bell.get(timeout=self._linger)
                else:
                    return
        finally:
            self._disconnect()

    def _serve(self) -> None:
        """Commit what comes, until told to stop."""
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
        started = time.perf_counter()
        outcomes = [self._outcomes.popleft() for _ in range(min(len(self._outcomes), MAX_ROWS))]
        rows = list(chain.from_iterable(request.rows for request in requests))

        def everything(connection: Connection) -> list[BrokerError | None]:
            insert_intents(connection, rows)
            write_outcomes(connection, outcomes)
            return [None] * len(requests)

        def piecemeal(connection: Connection) -> list[BrokerError | None]:
            answers = [_attempt(connection, insert_intents, r.rows) for r in requests]
            if _attempt(connection, write_outcomes, outcomes) is not None:
                refused = [
                    one.id for one in outcomes if _attempt(connection, write_outcomes, [one])
                ]
                # The sweeper will mark them UNCONFIRMED.
                _log.error("ledger outcomes refused by the database", count=len(refused))
            return answers

        error: BrokerError | None = None
        answers: list[BrokerError | None] = []
        try:
            try:
                answers = self._transact(everything)
            except Exception as failure:
                if not _is_of_rows(failure):
                    raise
                # Somebody's rows are wrong: find out whose, and keep the others'.
                answers = self._transact(piecemeal)
        except SQLAlchemyError as failure:
            error = translate(failure)
        except BrokerError as failure:
            error = failure
        except Exception as failure:  # noqa: BLE001  # waiters are told, the log is told
            _log.exception("ledger commit failed")
            error = _broken(failure)
        if error is not None:
            self._outcomes.extendleft(reversed(outcomes))
            self._back_off()
            answers = [error] * len(requests)
        else:
            self._linger = LINGER
            if rows or outcomes:
                self._tell(len(rows) + len(outcomes), time.perf_counter() - started)
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

    def _back_off(self) -> None:
        self._linger = min(self._linger * 2, _LONGEST_LINGER)

    def _tell(self, rows: int, seconds: float) -> None:
        if self.observe is None:
            return
        try:
            self.observe(rows, seconds)
        except Exception:  # noqa: BLE001  # whoever counts must not end the counted
            _log.exception("ledger observer failed")

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
        if answers:
            self._on_loop(self._settle, answers)

    def _answer_everybody(self, error: BrokerError) -> None:
        self._on_loop(self._fail_everybody, error)

    def _on_loop(self, tell: Callable[[T], None], what: T) -> None:
        if self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(tell, what)
        except RuntimeError:
            _log.warning("event loop closed before the ledger")


def _attempt(connection: Connection, work: Callable[..., None], rows: Any) -> BrokerError | None:
    try:
        with connection.begin_nested():
            work(connection, rows)
    except (IntegrityError, DataError) as error:
        return translate(error)
    except Exception as error:
        if not _is_of_rows(error):
            raise
        _log.exception("ledger rows refused")
        return _broken(error)
    return None


def _is_of_rows(failure: Exception) -> bool:
    """Whether what was to be written is at fault, not the database.

    A constraint refused it, or a driver could make nothing of a value: not always an error that
    SQLAlchemy knows.
    """
    return isinstance(failure, (IntegrityError, DataError)) or not isinstance(
        failure, (SQLAlchemyError, BrokerError)
    )


def _broken(error: Exception) -> InvariantViolated:
    return InvariantViolated(detail=f"{type(error).__name__} in the ledger's writer")
