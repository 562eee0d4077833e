"""How much one process, and one user, may ask of the agent; in bounded memory.

- A process has a budget of calls, and its user a larger one for all of its processes together:
  forking buys a little, not everything.
- A stream costs for as long as it is open: a process and a user may hold a bounded number.
- Refusals are Unavailable with a time to come back: a client that behaves waits and succeeds.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, TypeAlias, TypeVar

from identity_broker.agent.identity import Caller
from identity_broker.domain.buckets import Buckets
from identity_broker.errors import RateLimited

_STREAM_RETRY_SECONDS: Final = 5.0
_Process: TypeAlias = tuple[int, int]  # its pid and start time
_K = TypeVar("_K")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one process and one user may do.

    Attributes:
        calls_per_second: of one process, streams being opened included.
        burst: calls of one process at once.
        user_factor: how many times that all processes of one user may do together.
        process_streams: streams of one process open at a time.
        user_streams: and of one user.
    """

    calls_per_second: float = 500.0
    burst: float = 1000.0
    user_factor: float = 4.0
    process_streams: int = 128
    user_streams: int = 2048


class CallerLimits:
    """Says whether a process may call now, and whether it may hold one more stream.

    Args:
        monotonic: seconds that only grow.
    """

    def __init__(
        self, limits: Limits | None = None, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        limits = limits or Limits()
        self._limits = limits
        self._monotonic = monotonic
        self._interval = 1.0 / limits.calls_per_second
        self._depth = limits.burst / limits.calls_per_second
        self._processes: Buckets[_Process] = Buckets()
        self._users: Buckets[int] = Buckets()
        self._process_streams: Counter[_Process] = Counter()
        self._user_streams: Counter[int] = Counter()

    def charge(self, caller: Caller) -> None:
        """Take one call from the budgets of the caller's process and user.

        Raises:
            RateLimited: one of them is spent; `retry_after` says when it will not be.
        """
        now = self._monotonic()
        wait = self._processes.take(_process(caller), self._interval, self._depth, now)
        if not wait:
            user_interval = self._interval / self._limits.user_factor
            wait = self._users.take(caller.uid, user_interval, self._depth, now)
        if wait:
            raise RateLimited(
                "too many calls by this process or user",
                hint="keep a stream open instead of asking again and again",
                # One decimal, rounded up: an exact figure would only invite a stampede.
                retry_after=math.ceil(round(wait * 10, 6)) / 10,
            )

    @contextmanager
    def stream(self, caller: Caller) -> Iterator[None]:
        """Hold a stream open for as long as the block runs.

        Raises:
            RateLimited: the process, or its user, holds as many as it may.
        """
        process, user = _process(caller), caller.uid
        if (
            self._process_streams[process] >= self._limits.process_streams
            or self._user_streams[user] >= self._limits.user_streams
        ):
            raise RateLimited(
                "too many streams are open to this process or user",
                hint="one stream of each kind is enough for a process",
                retry_after=_STREAM_RETRY_SECONDS,
            )
        self._process_streams[process] += 1
        self._user_streams[user] += 1
        try:
            yield
        finally:
            _less(self._process_streams, process)
            _less(self._user_streams, user)

    @property
    def streams(self) -> int:
        """Streams open now."""
        return self._user_streams.total()


def _process(caller: Caller) -> _Process:
    return (caller.process.pid, caller.process.start_time)


def _less(counter: Counter[_K], key: _K) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
