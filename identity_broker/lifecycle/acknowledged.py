"""A stream whose messages are acknowledged: what nodes and verifiers are told goes through one.

- Bounded: at most `WINDOW` messages are under way. Whoever acknowledges nothing for
  `PATIENCE_SECONDS` is let go, and nobody waits for it.
- Quiet is told from lost: who is told nothing for a heartbeat's time gets an empty message.
- Touched by the event loop's thread alone.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from identity_broker.errors import (
    BrokerError,
    BrokerStopping,
    CredentialRevoked,
    NodeBanned,
    NodeUnknown,
    WatchLagged,
)

PATIENCE_SECONDS = 30.0
"""A message has to be acknowledged in this time."""
WINDOW = 64
"""Messages under way at most; what comes meanwhile is joined."""

_SENT_AWAY = (BrokerStopping, CredentialRevoked, NodeBanned, NodeUnknown)


@dataclass(slots=True)
class UnderWay:
    """A message that was handed out and is not acknowledged.

    Attributes:
        position: where whoever is told stands once it is applied.
        since: the position of the earliest change in it; None for a heartbeat.
        complete: whether the state as of `position` is complete with it.
    """

    position: int
    since: int | None
    complete: bool
    handed_at: float
    moved_at: float


class AcknowledgedStream:
    """What one listener is told, in order; `has_news` is the subclass's to say.

    Args:
        who: whose stream it is, for the operator.
        heartbeat: seconds.
        monotonic: seconds that only grow.
    """

    def __init__(
        self, who: str, heartbeat: float, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._who = who
        self._heartbeat = heartbeat
        self._monotonic = monotonic
        self._under_way: deque[UnderWay] = deque()
        self._handed_at = monotonic()
        self._news = asyncio.Event()
        self._ended = False
        self._refusal: BrokerError | None = None

    @property
    def has_news(self) -> bool:
        """Whether there is something to tell."""
        raise NotImplementedError

    # --- telling ------------------------------------------------------------------------------

    async def ready(self) -> bool:
        """Wait until there is something to tell, or a heartbeat is due.

        Returns:
            False when the stream has ended in peace.

        Raises:
            BrokerError: why it has ended otherwise.
        """
        try:
            async with asyncio.timeout(self._handed_at + self._heartbeat - self._monotonic()):
                while not (self._ended or (self.has_news and len(self._under_way) < WINDOW)):
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            self._handed_at = self._monotonic()
        self.check()
        return not self._ended

    def wake(self) -> None:
        """Something has changed: `ready` looks again."""
        self._news.set()

    def handed(self, position: int, since: int | None, *, complete: bool = True) -> None:
        """A message is under way from now on."""
        now = self._handed_at = self._monotonic()
        self._under_way.append(UnderWay(position, since, complete, now, now))

    def moved(self) -> None:
        """A piece of the message handed out last is on its way: whoever is told reads."""
        if self._under_way:
            self._under_way[-1].moved_at = self._monotonic()

    # --- ending -------------------------------------------------------------------------------

    def check(self) -> None:
        """Find out whether the listener keeps up.

        Raises:
            WatchLagged: it read or acknowledged too slowly.
            BrokerError: the stream was ended.
        """
        if self._refusal is not None:
            raise self._refusal
        if self._under_way:
            late = self._monotonic() - self._under_way[0].moved_at
            if late > PATIENCE_SECONDS:
                raise WatchLagged(detail=f"{self._who} acknowledged nothing for {late:.0f} s")

    def end(self, refusal: BrokerError | None = None) -> None:
        """End the stream, in peace or with a refusal. The first end counts."""
        if not self._ended:
            self._ended = True
            self._refusal = refusal
            self._news.set()

    @property
    def ended(self) -> bool:
        """Whether nothing is told any more."""
        return self._ended

    @property
    def sent_away(self) -> bool:
        """Whether the broker ended it for what the listener is: revoked, banned or unknown by now.

        Or because the broker drains; but not for what the listener failed to do.
        """
        return isinstance(self._refusal, _SENT_AWAY)
