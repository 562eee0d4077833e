"""Revocations passed on: what the broker told this node, for whoever follows on this machine.

- Nothing is composed for one follower: a change is made octets once, and everybody is sent the same
  ones. Of a follower only its place is kept, so a slow one costs next to nothing.
- Whoever falls behind what is remembered, or acknowledges nothing for `PATIENCE_SECONDS`, is let go
  and calls again. Nobody waits for it.
- While the broker is not heard there are no heartbeats, and nothing is called complete: a follower
  denies what it is told at once, and knows from the silence that there may be more. Its stream
  stays, for what was missed comes over it when the broker is back.
- A sequence is the mirror's revision, which is the broker's own: who followed another sender before
  may go on from there.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Final

from identity_broker.agent.denied import DeniedChange
from identity_broker.agent.mirror import Mirror
from identity_broker.agent.relayed import Step, WholeState, parts_of
from identity_broker.domain.clock import Clock
from identity_broker.errors import BrokerError, MalformedRequest, WatchLagged
from identity_broker.telemetry.logs import get_logger
from identity_client._wire import relay as wire
from identity_client.node.values import Verifier

_log = get_logger("relay")

HEARTBEAT_SECONDS: Final = 5.0
"""How often an empty message says that there is nothing new."""
PATIENCE_SECONDS: Final = 30.0
"""A message has to be acknowledged in this time."""
WINDOW: Final = 64
"""Messages under way to one follower at most."""
MOST_STEPS: Final = 1024
"""Changes that are remembered, heartbeats included."""
MOST_OCTETS: Final = 4 * 1024 * 1024
"""And their size; the newest is always remembered."""

_SPREAD_MS: Final = 1000
_LAST_WORD_SECONDS: Final = 1.0  # for the message that is being written when a stream is to end
_TICK_SECONDS: Final = 1.0
_KEEP_FULL_SECONDS: Final = 10.0


@dataclass(slots=True)
class _UnderWay:
    """A message that is not acknowledged yet."""

    sequence: int
    complete: bool
    handed_at: float


class Follower:
    """One who follows.

    Args:
        name: SPIFFE ID, slash, process number.
        stand: the sequence it has everything up to; 0 when it is sent everything.
        end: ends its stream with a refusal.

    Attributes:
        acknowledged: the sequence of the last state that it has applied as a whole.
    """

    def __init__(
        self, relay: Relay, name: str, uid: int, stand: int, end: Callable[[BrokerError], None]
    ) -> None:
        self.name = name
        self.uid = uid
        self.acknowledged = stand
        self._relay = relay
        self._stand = stand
        self._number = relay.number_after(stand) if stand else 0
        self._end = end
        self._under_way: deque[_UnderWay] = deque()
        self._told = stand
        self._woken = asyncio.Event()
        self._done = False
        self._refusal: BrokerError | None = None
        self._refused_at = 0.0

    # --- telling ------------------------------------------------------------------------------

    async def messages(self) -> AsyncIterator[bytes]:
        """What it is to be sent, until it says no more."""
        self._raise()
        if not self._stand:
            full = self._relay.full()
            for place in range(len(full)):
                if not await self._room():
                    return
                yield self._piece_of(full, place)
            self._stand, self._number = full.sequence, full.number
        elif self._number == self._relay.number and self._relay.says_complete():
            yield self._nothing_new()
        while (step := await self._next()) is not None:
            if step.is_heartbeat and self._number + 1 < self._relay.number:
                self._number += 1  # what comes behind it says as much
                continue
            for place, octets in enumerate(step.messages):
                if not await self._room():
                    return
                yield self._message_of(step, place, octets)
            self._stand, self._number = step.sequence, self._number + 1

    def _piece_of(self, full: WholeState, place: int) -> bytes:
        complete = place == len(full) - 1 and self._relay.says_complete()
        self._hand(full.sequence, complete=complete)
        full.used = monotonic()
        header = self._relay.header(
            sequence=full.sequence,
            previous=full.sequence if place else 0,
            full=not place,
            complete=complete,
        )
        return header + full.part(place)

    def _message_of(self, step: Step, place: int, octets: bytes) -> bytes:
        last = place == len(step.messages) - 1
        complete = last and self._relay.says_complete()
        self._hand(step.sequence, complete=complete)
        if not place and step.previous != self._stand:
            octets += wire.previous(self._stand)  # It begins elsewhere, or left a heartbeat out.
        return octets if complete or not last else octets + wire.INCOMPLETE

    def _nothing_new(self) -> bytes:
        previous, self._stand = self._stand, self._relay.sequence
        self._hand(self._stand, complete=True)
        return self._relay.header(sequence=self._stand, previous=previous, complete=True)

    def _hand(self, sequence: int, *, complete: bool) -> None:
        self._told = sequence
        self._under_way.append(_UnderWay(sequence, complete, monotonic()))

    async def _room(self) -> bool:
        """Wait until one more message may be under way; False when there is to be none."""
        self._raise()
        while len(self._under_way) >= WINDOW and not self._done:
            await self._pause()
        return not self._done

    async def _next(self) -> Step | None:
        """The next step, once there is one; None when it says no more.

        Raises:
            WatchLagged: it is not remembered any more.
        """
        while not self._done:
            self._raise()
            step = self._relay.step(self._number)
            if step is not None:
                return step
            await self._pause()
        return None

    async def _pause(self) -> None:
        self._woken.clear()
        await self._woken.wait()
        self._raise()

    def _raise(self) -> None:
        if self._refusal is not None:
            raise self._refusal

    def wake(self) -> None:
        """There is something new."""
        self._woken.set()

    # --- what it says ---------------------------------------------------------------------------

    def acknowledge(self, sequence: int) -> None:
        """It has applied one more message, of that sequence, and all before it.

        Raises:
            MalformedRequest: it was sent no such message.
        """
        before, waited = self.acknowledged, len(self._under_way)
        if not waited or not self._under_way[0].sequence <= sequence <= self._told:
            raise MalformedRequest(f"there is no message {sequence} to be acknowledged")
        while self._under_way and self._under_way[0].sequence < sequence:
            self._applied()
        if self._under_way and self._under_way[0].sequence == sequence:
            self._applied()
        if waited >= WINDOW:
            self.wake()
        if self.acknowledged != before:
            self._relay.progressed()

    def _applied(self) -> None:
        told = self._under_way.popleft()
        if told.complete:
            self.acknowledged = told.sequence

    def finish(self) -> None:
        """It says no more: its stream ends in peace."""
        self._done = True
        self.wake()

    def refuse(self, refusal: BrokerError) -> None:
        """End its stream. The first refusal counts."""
        if self._refusal is None:
            self._refusal = refusal
            self._refused_at = monotonic()
            self.wake()

    def check(self, tick: float) -> None:
        """Let it go if it does not keep up."""
        if self._refusal is not None:
            if tick - self._refused_at > _LAST_WORD_SECONDS:
                self._end(self._refusal)  # It does not read, so it cannot be told.
        elif self._under_way:
            late = tick - self._under_way[0].handed_at
            if late > PATIENCE_SECONDS:
                self.refuse(
                    WatchLagged(detail=f"{self.name} acknowledged nothing for {late:.0f} s")
                )


class Relay:
    """Whom this node tells, and what. Belongs to one event loop.

    Args:
        is_fresh: whether the broker was heard lately, and the mirror is in step with it.
        on_change: called when somebody begins or ends to follow, or has acknowledged something.
    """

    def __init__(
        self,
        mirror: Mirror,
        clock: Clock,
        *,
        is_fresh: Callable[[], bool],
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._mirror = mirror
        self._clock = clock
        self._on_change = on_change
        self._steps: deque[Step] = deque()
        self._octets = 0
        self._followers: dict[Follower, None] = {}
        self._full: WholeState | None = None
        self._owes_complete = False
        self._told_twice_to = 0  # up to here a sequence may mean either of two states
        self._beaten_at = monotonic()
        self.is_fresh = is_fresh
        self.sequence = 0
        self.number = 0

    def __len__(self) -> int:
        return len(self._followers)

    # --- what happened --------------------------------------------------------------------------

    def told(self, change: DeniedChange, *, concerned: bool = False) -> None:
        """The broker was heard, and the mirror has applied what it said.

        Args:
            concerned: it was about what is to be refused, if only what was refused before. Then
                everybody says at once that he has it: somebody may be waiting for that.
        """
        revision = self._mirror.revision
        if revision < self.sequence:
            self._go_back(revision)
        elif not self.sequence:
            self.sequence = revision
        elif change:
            self._append(parts_of(change), is_heartbeat=False)
        elif self._owes_complete or (concerned and revision > self.sequence):
            self.beat()

    def beat(self) -> None:
        """Tell everybody that there is nothing new, if that is known."""
        if self.is_fresh():
            self._append((b"",), is_heartbeat=True)

    async def run(self) -> None:
        """Heartbeats, and an end to who does not keep up; until cancelled."""
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            tick = monotonic()
            if tick - self._beaten_at >= HEARTBEAT_SECONDS:
                self._beaten_at = tick
                self.beat()
            for follower in tuple(self._followers):
                follower.check(tick)
            if self._full is not None and tick - self._full.used > _KEEP_FULL_SECONDS:
                self._full = None

    # --- who follows ----------------------------------------------------------------------------

    def join(
        self, name: str, uid: int, resume_from: int, end: Callable[[BrokerError], None]
    ) -> Follower:
        """Begin to tell somebody, from where it says it stands if that is remembered."""
        stand = resume_from if self._remembers(resume_from) else 0
        follower = Follower(self, name, uid, stand, end)
        self._followers[follower] = None
        self._on_change()
        return follower

    def rename(self, follower: Follower, name: str) -> None:
        """Its process is another identity now."""
        follower.name = name
        self._on_change()

    def leave(self, follower: Follower) -> None:
        """Tell it nothing more."""
        del self._followers[follower]
        self._on_change()

    def progressed(self) -> None:
        """Somebody has acknowledged something."""
        self._on_change()

    def verifiers(self) -> list[Verifier]:
        """Who follows, and up to where; every user's first, then every user's second, and so on.

        Several streams of one process are one verifier, that has what all of them have.
        """
        found: dict[str, tuple[int, int]] = {}
        turns: Counter[int] = Counter()
        for each in self._followers:
            if each.name in found:
                turn, sequence = found[each.name]
                found[each.name] = turn, min(sequence, each.acknowledged)
            else:
                found[each.name] = turns[each.uid], each.acknowledged
                turns[each.uid] += 1
        in_turn = sorted(found.items(), key=lambda item: item[1][0])
        return [Verifier(name, sequence) for name, (_, sequence) in in_turn]

    # --- what followers are told ----------------------------------------------------------------

    def full(self) -> WholeState:
        """The whole state; an earlier one, if all that came since is remembered."""
        if self._full is None or self._full.number < self._first_number:
            self._full = WholeState(
                self._mirror.denied,
                sequence=self.sequence,
                number=self.number,
                tick=monotonic(),
            )
        return self._full

    def step(self, number: int) -> Step | None:
        """The step of that number; None before there is one.

        Raises:
            WatchLagged: it is not remembered any more.
        """
        place = number - self._first_number
        if place < 0:
            raise WatchLagged(detail="what it was not sent yet is not remembered any more")
        return self._steps[place] if place < len(self._steps) else None

    def number_after(self, stand: int) -> int:
        """The first step that says something new to who stands there."""
        for place, step in enumerate(self._steps):
            if step.sequence > stand or (step.previous == stand and not step.is_heartbeat):
                return self._first_number + place
        return self.number

    def says_complete(self) -> bool:
        """Whether a state may be called complete now; if not, it is said later."""
        if self.is_fresh():
            return True
        self._owes_complete = True
        return False

    def header(self, *, sequence: int, previous: int, full: bool = False, complete: bool) -> bytes:
        """What every message says."""
        return wire.Header(
            sequence=sequence,
            previous=previous,
            full=full,
            complete=complete,
            sent_at=self._clock.now(),
            heartbeat_ms=round(HEARTBEAT_SECONDS * 1000),
            spread_ms=_SPREAD_MS,
        ).octets()

    # --- inside -------------------------------------------------------------------------------

    @property
    def _first_number(self) -> int:
        return self.number - len(self._steps)

    def _remembers(self, stand: int) -> bool:
        first = self._steps[0].previous if self._steps else self.sequence
        return max(first, self._told_twice_to + 1) <= stand <= self.sequence

    def _append(self, parts: Sequence[bytes], *, is_heartbeat: bool) -> None:
        revision = self._mirror.revision
        messages = tuple(
            self.header(
                sequence=revision,
                previous=revision if place else self.sequence,
                complete=place == len(parts) - 1,
            )
            + part
            for place, part in enumerate(parts)
        )
        step = Step(self.sequence, revision, messages, is_heartbeat)
        self._steps.append(step)
        self._octets += step.octets
        self.sequence = revision
        self.number += 1
        self._owes_complete = False
        while len(self._steps) > 1 and (
            len(self._steps) > MOST_STEPS or self._octets > MOST_OCTETS
        ):
            self._octets -= self._steps.popleft().octets
        for follower in self._followers:
            follower.wake()

    def _go_back(self, revision: int) -> None:
        """The broker has lost what it told before: everybody begins anew."""
        _log.warning("followers begin anew", count=len(self), sequence=revision)
        self._steps.clear()
        self._octets = 0
        self._full = None
        self._told_twice_to = max(self._told_twice_to, self.sequence)
        self.sequence = revision
        for follower in tuple(self._followers):
            follower.refuse(WatchLagged("the broker went back to an older state"))
