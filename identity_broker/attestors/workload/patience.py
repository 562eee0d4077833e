"""Threads for work that may never come back: opening and reading files of others.

- A thread cannot be stopped. One that is late is given up: whoever waited is told, and its place
  among those that work is free again. It still counts as a thread, of its user and altogether.
- One user works one thing at a time, and has few threads that are late: his own files keep him
  waiting, and nobody else. A user all of whose threads are late is refused at once.
- Threads are daemons of their own, not the event loop's pool: no other work queues behind them, and
  none keeps the agent from ending.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar, cast

from identity_broker.errors import AttestationFailed

_AT_A_TIME: Final = 4
_MOST_LATE_OF_ONE_USER: Final = 2
_MOST_THREADS: Final = 64
DEFAULT_PATIENCE: Final = 2.0

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class _Job:
    uid: int
    work: Callable[[], object]
    answer: asyncio.Future[Any]
    timer: asyncio.TimerHandle | None = None
    is_late: bool = False


class PatientThreads:
    """A bounded number of threads, shared out among users.

    Args:
        name: of the threads.
        patience: seconds after which a thread is late.
        at_a_time: most threads that work and are not late.
        most: most threads, with those that are late.
    """

    def __init__(
        self,
        name: str,
        *,
        patience: float = DEFAULT_PATIENCE,
        at_a_time: int = _AT_A_TIME,
        most: int = _MOST_THREADS,
    ) -> None:
        self._name = name
        self._patience = patience
        self._at_a_time = at_a_time
        self._most = most
        # The user who has waited longest is the first; each with a turn, and then the next one.
        self._waiting: OrderedDict[int, deque[_Job]] = OrderedDict()
        self._working: Counter[int] = Counter()
        self._late: Counter[int] = Counter()

    @property
    def working(self) -> int:
        """Threads that work and are not late."""
        return self._working.total()

    @property
    def late(self) -> int:
        """Threads that nobody waits for any more, and that have not come back."""
        return self._late.total()

    async def run(self, uid: int, work: Callable[[], T]) -> T:
        """Do the work in a thread, when it is the user's turn; cancelling leaves it alone.

        Raises:
            AttestationFailed: the user's work, or everybody's, does not come back.
            Exception: what the work raised.
        """
        if self._late[uid] >= _MOST_LATE_OF_ONE_USER or self.late >= self._most:
            raise _does_not_answer()
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        job = _Job(uid, work, answer)
        self._waiting.setdefault(uid, deque()).append(job)
        self._start_who_may()
        return cast("T", await answer)

    def _start_who_may(self) -> None:
        for uid in list(self._waiting):
            if self.working >= self._at_a_time or self.working + self.late >= self._most:
                return
            jobs = self._waiting[uid]
            while jobs and jobs[0].answer.done():  # whoever asked has gone
                jobs.popleft()
            if jobs and not self._working[uid]:
                self._start(jobs.popleft())
                self._waiting.move_to_end(uid)
            if not jobs:
                del self._waiting[uid]

    def _start(self, job: _Job) -> None:
        loop = asyncio.get_running_loop()
        self._working[job.uid] += 1
        job.timer = loop.call_later(self._patience, self._give_up, job)
        thread = threading.Thread(
            target=_work, args=(loop, self, job), name=self._name, daemon=True
        )
        try:
            thread.start()
        except RuntimeError as exc:  # the machine has no room for one more
            _take_one(self._working, job.uid)
            job.timer.cancel()
            job.answer.set_exception(AttestationFailed("no thread can be started", detail=str(exc)))

    def _give_up(self, job: _Job) -> None:
        job.is_late = True
        _take_one(self._working, job.uid)
        self._late[job.uid] += 1
        if not job.answer.done():
            job.answer.set_exception(_does_not_answer())
        if self._late[job.uid] >= _MOST_LATE_OF_ONE_USER:
            for waiting in self._waiting.pop(job.uid, ()):
                if not waiting.answer.done():
                    waiting.answer.set_exception(_does_not_answer())
        self._start_who_may()

    def _back(self, job: _Job, result: object, error: BaseException | None) -> None:
        if job.timer is not None:
            job.timer.cancel()
        _take_one(self._late if job.is_late else self._working, job.uid)
        if not job.answer.done():
            if error is None:
                job.answer.set_result(result)
            else:
                job.answer.set_exception(error)
        self._start_who_may()


def _work(loop: asyncio.AbstractEventLoop, threads: PatientThreads, job: _Job) -> None:
    result: object = None
    error: BaseException | None = None
    try:
        result = job.work()
    except BaseException as exc:  # noqa: BLE001  # handed to whoever waits
        error = exc
    try:
        loop.call_soon_threadsafe(threads._back, job, result, error)  # noqa: SLF001  # its thread
    except RuntimeError:
        return  # The loop has ended meanwhile, and with it everybody who waited.


def _take_one(counter: Counter[int], uid: int) -> None:
    counter[uid] -= 1
    if counter[uid] <= 0:
        del counter[uid]


def _does_not_answer() -> AttestationFailed:
    return AttestationFailed("the file system of the program takes too long to answer")
