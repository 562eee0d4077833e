"""What one verifier of the broker's own feed is told, in order.

- It is told nothing that depends on who it is: what is told is shared by all who stand at the same
  place; all that is its own is where it stands.
- A message may be one of several that say a state: each is acknowledged, and only with the last is
  the state the verifier's.
- Touched by the event loop's thread alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from identity_broker.errors import MalformedRequest
from identity_broker.lifecycle.acknowledged import AcknowledgedStream

HEARTBEAT_SECONDS = 5.0
"""A verifier that is told nothing for so long gets an empty message."""


@dataclass(frozen=True, slots=True)
class Hello:
    """Who begins to follow, and from where.

    Attributes:
        caller: its SPIFFE ID, or "uid:N".
        name: what it calls itself; may be empty.
        version: of its SDK, as it says.
        resume_from: the sequence it stands at; 0 for nowhere.
    """

    caller: str
    name: str = ""
    version: str = ""
    resume_from: int = 0

    @property
    def verifier_name(self) -> str:
        """What an operator calls it: no name it gives itself looks like another's SPIFFE ID."""
        return f"{self.caller} ({self.name})" if self.name else self.caller


class Follower(AcknowledgedStream):
    """One verifier's stream.

    Attributes:
        stand: the position it stands at once it has applied what was handed out; None before a
            full state was.
        pending: whether something is to be told.
        greeted: whether the first message was handed out.
        acknowledged_to: the position of the last state it has applied as a whole; -1 before.
    """

    def __init__(
        self, hello: Hello, stand: int | None, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(hello.verifier_name, HEARTBEAT_SECONDS, monotonic)
        self.caller = hello.caller
        self.stand = stand
        self.pending = True
        self.greeted = False
        self.acknowledged_to = -1
        self._told_to = -1

    @property
    def has_news(self) -> bool:
        """See `pending`."""
        return self.pending

    def has(self, position: int) -> bool:
        """Whether it has acknowledged a state of that position or a later one."""
        return self.acknowledged_to >= position

    def handed(self, position: int, since: int | None, *, complete: bool = True) -> None:
        """See `AcknowledgedStream`."""
        super().handed(position, since, complete=complete)
        self._told_to = position

    def acknowledge(self, sequence: int) -> bool:
        """The verifier has applied one more message, of that sequence.

        One that acknowledges several with one word has applied those before it, but of a state in
        several messages no more than it said.

        Returns:
            Whether it stands at a new place.

        Raises:
            MalformedRequest: it was sent no such message.
        """
        under_way = self._under_way
        if self._told_to < sequence:
            raise MalformedRequest(f"ack.sequence {sequence} was not sent to this verifier")
        before = self.acknowledged_to
        while under_way and under_way[0].position < sequence:
            self._applied()
        if under_way and under_way[0].position == sequence:
            self._applied()
        self.wake()
        return self.acknowledged_to != before

    def _applied(self) -> None:
        told = self._under_way.popleft()
        if told.complete:
            self.acknowledged_to = told.position
