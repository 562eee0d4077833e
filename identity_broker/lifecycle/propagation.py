"""Who has heard of a revocation: those connected when it committed, and when each acknowledged it.

- The latency runs from the commit to the acknowledgement, both seen by this process; -1 where it
  has not seen both, as after a restart. Whoever is connected now counts as told as well.
- Bounded: the most recent orders are kept, verifier by verifier. Of older ones the verifiers'
  positions answer: whoever stands behind an order has it.
- Nobody has what this broker has not read yet: an order is judged once the directory reflects it.
- Each verifier is counted once for each order: within the objective, late, or never. Whoever has
  left is not counted: a revocation may be what ended its stream.
- Touched by the event loop's thread alone; costs a dictionary entry for a verifier and an order.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from identity_broker.domain.clock import Clock
from identity_broker.domain.revocation import RevocationOrder
from identity_broker.lifecycle.directory import Directory, Update
from identity_broker.lifecycle.verifiers import Verifier, Verifiers

OBJECTIVE = timedelta(seconds=1)
"""In this time 99 % of the connected verifiers are to have acknowledged."""
MOST_ORDERS = 1000
"""Orders that are kept, verifier by verifier."""
MOST_MARKS = 100_000
"""Verifiers of all kept orders together, the last order's aside."""

UNKNOWN_MS = -1
# Who commits an order says so at once; one that is older was taken over from another broker.
_FRESH_SECONDS = 5.0


class VerifierState(StrEnum):
    """What became of a verifier."""

    ACKNOWLEDGED = "acknowledged"
    SILENT = "silent"  # connected, and has not
    GONE = "gone"  # was connected at the commit, is not now, and has not


@dataclass(frozen=True, slots=True)
class VerifierStanding:
    """Whether one verifier has a revocation.

    Attributes:
        acknowledged_at: when it said so; None where this process has not seen it.
        latency_ms: from the commit; -1 where this process has not seen both.
    """

    verifier: Verifier
    state: VerifierState
    acknowledged_at: datetime | None = None
    latency_ms: int = UNKNOWN_MS


@dataclass(frozen=True, slots=True)
class PropagationReport:
    """Who has a revocation.

    Attributes:
        verifiers: those connected at its commit or now; the silent ones first, then who is gone.
        acknowledged, silent, gone: how many of them.
        p50_ms, p99_ms: of the latencies known; -1 where there is none.
        within_objective_permille: how many were within the objective, of those whose latency is
            known and the silent ones; 1000 where there are none.
    """

    verifiers: tuple[VerifierStanding, ...]
    acknowledged: int
    silent: int
    gone: int
    p50_ms: int
    p99_ms: int
    within_objective_permille: int

    @property
    def told(self) -> int:
        """How many there are."""
        return len(self.verifiers)

    @classmethod
    def of(cls, standings: Sequence[VerifierStanding]) -> PropagationReport:
        """Count and order them."""
        ordered = sorted(standings, key=lambda one: (_FIRST[one.state], one.verifier.label))
        latencies = sorted(one.latency_ms for one in ordered if one.latency_ms >= 0)
        counts = {state: sum(one.state is state for one in ordered) for state in VerifierState}
        limit = OBJECTIVE // timedelta(milliseconds=1)
        within = sum(one <= limit for one in latencies)
        judged = len(latencies) + counts[VerifierState.SILENT]
        return cls(
            verifiers=tuple(ordered),
            acknowledged=counts[VerifierState.ACKNOWLEDGED],
            silent=counts[VerifierState.SILENT],
            gone=counts[VerifierState.GONE],
            p50_ms=_percentile(latencies, 50),
            p99_ms=_percentile(latencies, 99),
            within_objective_permille=1000 * within // judged if judged else 1000,
        )


_FIRST = {VerifierState.SILENT: 0, VerifierState.GONE: 1, VerifierState.ACKNOWLEDGED: 2}


class Outcome(StrEnum):
    """On which side of the objective a verifier was."""

    WITHIN_OBJECTIVE = "within_objective"
    LATE = "late"
    NEVER = "never"


@dataclass(slots=True)
class _Mark:
    """One verifier of one order.

    Attributes:
        since: when the part of the order committed that it acknowledged last, or waits for.
        latency: seconds, the most of all parts; None while it has not acknowledged one.
        before: of the parts before.
    """

    since: float
    latency: float | None = None
    before: float = 0.0
    acknowledged_at: datetime | None = None
    counted: bool = False


class _Tracked:
    """An order whose verifiers are followed.

    Attributes:
        seen: whether this process saw it commit.
        waiting: who is connected and has not acknowledged it.
        over: set while nobody waits.
    """

    __slots__ = ("marks", "over", "seen", "sequence", "waiting")

    def __init__(self, sequence: int, *, seen: bool) -> None:
        self.sequence = sequence
        self.seen = seen
        self.marks: dict[Verifier, _Mark] = {}
        self.waiting: set[Verifier] = set()
        self.over = asyncio.Event()

    def settle(self) -> None:
        """Look whether anybody is waited for."""
        if self.waiting:
            self.over.clear()
        else:
            self.over.set()


class Propagation:
    """Follows recent revocations on their way to the verifiers.

    Args:
        needed: from which position on a verifier has all of a sequence; None where the directory
            does not reflect it (`RevocationFeed.needed`).
        on_acknowledged: told the seconds from a commit to each acknowledgement.
        on_outcome: told, once for each verifier of an order, how it did.
        monotonic: seconds that only grow.
    """

    def __init__(
        self,
        verifiers: Verifiers,
        directory: Directory,
        clock: Clock,
        *,
        needed: Callable[[int], int | None],
        on_acknowledged: Callable[[float], object] = lambda _seconds: None,
        on_outcome: Callable[[Outcome], object] = lambda _outcome: None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._verifiers = verifiers
        self._clock = clock
        self._needed = needed
        self._on_acknowledged = on_acknowledged
        self._on_outcome = on_outcome
        self._monotonic = monotonic
        self._orders: dict[str, _Tracked] = {}
        self._marks = 0
        self._awaited: dict[Verifier, set[str]] = {}
        self._commit = asyncio.Event()
        self._unread: set[str] = set()
        self._began_at = clock.now()
        verifiers.watch(self)
        directory.listen(self._on_update)

    @property
    def connected(self) -> int:
        """How many verifiers are connected to this broker."""
        return len(self._verifiers)

    # --- orders -----------------------------------------------------------------------------------

    def begun(self, order: RevocationOrder) -> None:
        """The order is committed, or more of it is: whoever is connected now is to have it."""
        now = self._monotonic()
        since = now
        tracked = self._orders.get(order.id)
        if tracked is not None and not tracked.seen:
            # Somebody asked about it in the moment between its commit and this.
            self._forget(order.id)
            tracked = None
        if tracked is None:
            age = self._age_of(order)
            tracked = self._track(order, seen=age is not None)
            since -= age or 0.0
            connected = list(self._verifiers)
        elif tracked.sequence >= order.sequence:
            return
        else:
            # A later part: it is asked of those who were there for the first.
            tracked.sequence = order.sequence
            connected = list(tracked.marks)
        if self._needed(order.sequence) is None:
            self._unread.add(order.id)
        for verifier in connected:
            self._expect(order.id, tracked, verifier, since, now)
        tracked.settle()
        self._forget_oldest()
        self._commit.set()
        self._commit = asyncio.Event()

    def _age_of(self, order: RevocationOrder) -> float | None:
        """Seconds since the commit; None where it happened without this process."""
        committed_at = order.committed_at
        if committed_at is None or committed_at < self._began_at:
            return None
        age = (self._clock.now() - committed_at).total_seconds()
        return max(0.0, age) if age < _FRESH_SECONDS else None

    def report(self, order: RevocationOrder) -> PropagationReport:
        """Say who has the order by now."""
        return PropagationReport.of(list(self._standings(order)))

    async def settled(self, order: RevocationOrder, timeout: timedelta) -> PropagationReport:
        """Wait until every verifier that is connected has the order; say who has.

        Returns at `timeout` in any case. An order that is still running is waited for as well.
        """
        try:
            async with asyncio.timeout(timeout.total_seconds()):
                await self._settle(order)
        except TimeoutError:
            pass  # said in the report
        return self.report(order)

    def is_settled(self, order: RevocationOrder) -> bool:
        """Whether this process saw the order commit, and waits for no verifier."""
        tracked = self._orders.get(order.id)
        return tracked is not None and tracked.seen and tracked.over.is_set()

    def has_seen(self, order: RevocationOrder) -> bool:
        """Whether this process saw the order commit, lately."""
        tracked = self._orders.get(order.id)
        return tracked is not None and tracked.seen

    def close(self, order: RevocationOrder) -> None:
        """The order's time is over: who is silent never acknowledged it, for the objective."""
        tracked = self._orders.get(order.id)
        if tracked is None or not tracked.seen:
            return
        for verifier in tracked.waiting:
            self._count(tracked.marks[verifier], Outcome.NEVER)

    async def _settle(self, order: RevocationOrder) -> None:
        while not order.sequence and order.id not in self._orders:
            await self._commit.wait()
        waited = None
        while (tracked := self._orders.get(order.id)) is not waited or tracked is None:
            if tracked is None:
                if waited is not None:
                    return  # forgotten: there is too much else
                tracked = self._track(order, seen=False)
                now = self._monotonic()
                for verifier in self._verifiers:
                    self._expect(order.id, tracked, verifier, now, now)
                tracked.settle()
                self._forget_oldest()
            waited = tracked
            await tracked.over.wait()

    def _track(self, order: RevocationOrder, *, seen: bool) -> _Tracked:
        tracked = self._orders[order.id] = _Tracked(order.sequence, seen=seen)
        return tracked

    def _on_update(self, _update: Update) -> None:
        """The directory has moved: once all who listen know, look at the orders that waited."""
        if self._unread:
            asyncio.get_running_loop().call_soon(self._read)

    def _read(self) -> None:
        for order_id in tuple(self._unread):
            tracked = self._orders.get(order_id)
            if tracked is None or self._needed(tracked.sequence) is not None:
                self._unread.discard(order_id)
            if tracked is not None and order_id not in self._unread:
                for verifier in tuple(tracked.waiting):
                    self.progressed(verifier)

    def _expect(
        self, order_id: str, tracked: _Tracked, verifier: Verifier, since: float, now: float
    ) -> None:
        """The verifier is to have all of the order that is committed."""
        mark = tracked.marks.get(verifier)
        if mark is None:
            mark = tracked.marks[verifier] = _Mark(since)
            self._marks += 1
        if self._has(verifier, tracked):
            if mark.latency is None:
                # It may have said so before the whole of the order was committed.
                at = min(max(self._verifiers.heard_at(verifier), since), now)
                self._acknowledged(tracked, verifier, at)
            return
        if mark.latency is not None:
            # It has the part before, and is to have this one.
            mark.since, mark.before = since, mark.latency
            mark.latency = mark.acknowledged_at = None
        self._awaited.setdefault(verifier, set()).add(order_id)
        if verifier in self._verifiers:
            tracked.waiting.add(verifier)

    def _has(self, verifier: Verifier, tracked: _Tracked) -> bool:
        needed = self._needed(tracked.sequence)
        return needed is not None and self._verifiers.has(verifier, needed)

    def _acknowledged(self, tracked: _Tracked, verifier: Verifier, at: float) -> None:
        mark = tracked.marks[verifier]
        mark.latency = max(mark.before, at - mark.since)
        mark.acknowledged_at = self._clock.now()
        if tracked.seen and not mark.counted:
            self._on_acknowledged(mark.latency)
            within = mark.latency <= OBJECTIVE.total_seconds()
            self._count(mark, Outcome.WITHIN_OBJECTIVE if within else Outcome.LATE)

    def _count(self, mark: _Mark, outcome: Outcome) -> None:
        if not mark.counted:
            mark.counted = True
            self._on_outcome(outcome)

    def _forget_oldest(self) -> None:
        while len(self._orders) > 1 and (
            len(self._orders) > MOST_ORDERS or self._marks > MOST_MARKS
        ):
            self._forget(next(iter(self._orders)))

    def _forget(self, order_id: str) -> None:
        tracked = self._orders.pop(order_id)
        self._marks -= len(tracked.marks)
        for verifier, mark in tracked.marks.items():
            if mark.latency is None:
                self._heard(verifier, order_id)
        tracked.over.set()

    def _heard(self, verifier: Verifier, order_id: str) -> None:
        awaited = self._awaited.get(verifier)
        if awaited is not None:
            awaited.discard(order_id)
            if not awaited:
                del self._awaited[verifier]

    # --- verifiers, as `verifiers.Watcher` --------------------------------------------------------

    def came(self, verifier: Verifier) -> None:
        """A verifier is connected, perhaps again."""
        for order_id in self._awaited.get(verifier, ()):
            tracked = self._orders[order_id]
            tracked.waiting.add(verifier)
            tracked.settle()
        self.progressed(verifier)

    def left(self, verifier: Verifier) -> None:
        """A verifier is not connected any more: nobody waits for it."""
        for order_id in self._awaited.get(verifier, ()):
            tracked = self._orders[order_id]
            tracked.waiting.discard(verifier)
            tracked.settle()

    def progressed(self, verifier: Verifier) -> None:
        """A verifier has acknowledged something."""
        awaited = self._awaited.get(verifier)
        if not awaited:
            return
        now = self._monotonic()
        for order_id in tuple(awaited):
            tracked = self._orders[order_id]
            if self._has(verifier, tracked):
                self._acknowledged(tracked, verifier, now)
                tracked.waiting.discard(verifier)
                tracked.settle()
                self._heard(verifier, order_id)

    # --- reporting --------------------------------------------------------------------------------

    def _standings(self, order: RevocationOrder) -> Iterator[VerifierStanding]:
        tracked = self._orders.get(order.id)
        marks = {} if tracked is None else tracked.marks
        for verifier, mark in marks.items():
            yield self._standing(verifier, mark, seen=tracked is not None and tracked.seen)
        needed = self._needed(order.sequence) if order.sequence else None
        for verifier in self._verifiers:
            if verifier not in marks:
                has = needed is not None and self._verifiers.has(verifier, needed)
                state = VerifierState.ACKNOWLEDGED if has else VerifierState.SILENT
                yield VerifierStanding(verifier, state)

    def _standing(self, verifier: Verifier, mark: _Mark, *, seen: bool) -> VerifierStanding:
        if mark.latency is None:
            here = verifier in self._verifiers
            return VerifierStanding(verifier, VerifierState.SILENT if here else VerifierState.GONE)
        return VerifierStanding(
            verifier,
            VerifierState.ACKNOWLEDGED,
            mark.acknowledged_at if seen else None,
            math.ceil(round(mark.latency * 1000, 3)) if seen else UNKNOWN_MS,
        )


def _percentile(ordered: Sequence[int], percent: int) -> int:
    """The nearest rank; -1 of nothing."""
    return ordered[math.ceil(len(ordered) * percent / 100) - 1] if ordered else UNKNOWN_MS
