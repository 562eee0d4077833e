"""Who has heard of a revocation: those connected when it committed, and when each acknowledged it.

- Whoever was not connected then and may hold what was revoked is named too, as away: the nodes
  through which it was issued, and the node itself where one is revoked. Connected means to this
  broker: of a node that follows another one on the same store it is not known.
- The latency runs from the commit to the acknowledgement, both seen by this process; -1 where it
  has not seen both, as after a restart. Whoever is connected now counts as told as well.
- Bounded: the most recent orders are kept, verifier by verifier. Of older ones the verifiers'
  positions answer: whoever stands behind an order has it.
- Nobody has what this broker has not read yet: an order is judged once the directory reflects it.
- The objective is one of connected verifiers. Each is counted once for each order: within the
  objective, late, or never; who was away is not counted. Who left without a word counts as never,
  but for whom the broker itself sent away (revoked, banned, or the broker drains), and for who
  follows behind an agent as the very identity that the order took away: the agent ends its stream.
- Touched by the event loop's thread alone; costs a dictionary entry for a verifier and an order.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from itertools import islice

from identity_broker.domain.clock import Clock
from identity_broker.domain.revocation import RevocationOrder
from identity_broker.domain.selection import Selection
from identity_broker.lifecycle.directory import Directory, Update
from identity_broker.lifecycle.propagation_report import (
    OBJECTIVE,
    UNKNOWN_MS,
    PropagationReport,
    VerifierStanding,
    VerifierState,
)
from identity_broker.lifecycle.verifiers import Verifier, VerifierKind, Verifiers
from identity_ca.spiffe_id import SpiffeId

MOST_ORDERS = 1000
"""Orders that are kept, verifier by verifier."""
MOST_MARKS = 100_000
"""Verifiers of all kept orders together, the last order's aside."""
MOST_SENT_AWAY = 10_000
"""Verifiers that the broker sent away, and that are remembered for an order under way."""
MOST_AWAY = 1000
"""Nodes of one order that are named as away."""

# Who commits an order says so at once; one that is older was taken over from another broker.
_FRESH_SECONDS = 5.0


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
        counted: for the objective; one that was away never is.
        was_away: it was not connected at the commit.
        is_excused: it left, and was sent away, or the order took away what it is.
    """

    since: float
    latency: float | None = None
    before: float = 0.0
    acknowledged_at: datetime | None = None
    counted: bool = False
    was_away: bool = False
    is_excused: bool = False


class _Tracked:
    """An order whose verifiers are followed.

    Attributes:
        seen: whether this process saw it commit.
        since: when its first part committed, monotonic seconds.
        waiting: who is connected and has not acknowledged it.
        over: set while nobody waits.
        concerned: the nodes that may hold what was revoked, as of `looked_at`, a sequence.
    """

    __slots__ = (
        "concerned",
        "looked_at",
        "marks",
        "order",
        "over",
        "seen",
        "sequence",
        "since",
        "waiting",
    )

    def __init__(self, order: RevocationOrder, since: float, *, seen: bool) -> None:
        self.order = order
        self.sequence = order.sequence
        self.since = since
        self.seen = seen
        self.concerned: tuple[Verifier, ...] = ()
        self.looked_at = 0
        self.marks: dict[Verifier, _Mark] = {}
        self.waiting: set[Verifier] = set()
        self.over = asyncio.Event()

    def settle(self) -> None:
        """Look whether anybody is waited for."""
        if self.waiting:
            self.over.clear()
        else:
            self.over.set()


async def _nobody(_order: RevocationOrder) -> Collection[SpiffeId]:
    return ()


class Propagation:
    """Follows recent revocations on their way to the verifiers.

    Args:
        needed: from which position on a verifier has all of a sequence; None where the directory
            does not reflect it (`RevocationFeed.needed`).
        nodes_of: the nodes that may hold what an order revoked.
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
        nodes_of: Callable[[RevocationOrder], Awaitable[Collection[SpiffeId]]] = _nobody,
        on_acknowledged: Callable[[float], object] = lambda _seconds: None,
        on_outcome: Callable[[Outcome], object] = lambda _outcome: None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._verifiers = verifiers
        self._directory = directory
        self._clock = clock
        self._needed = needed
        self._nodes_of = nodes_of
        self._on_acknowledged = on_acknowledged
        self._on_outcome = on_outcome
        self._monotonic = monotonic
        self._orders: dict[str, _Tracked] = {}
        self._marks = 0
        self._awaited: dict[Verifier, set[str]] = {}
        self._commit = asyncio.Event()
        self._unread: set[str] = set()
        self._sent_away: dict[Verifier, datetime] = {}
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
            since -= age or 0.0
            tracked = self._track(order, since, seen=age is not None)
            connected = list(self._verifiers)
            if tracked.seen:
                self._excuse(tracked)
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

    def _excuse(self, tracked: _Tracked) -> None:
        """Enter whom the order itself sent away, before all of it was committed."""
        for verifier, at in self._sent_away.items():
            if at >= tracked.order.ordered_at:
                tracked.marks[verifier] = _Mark(tracked.since, is_excused=True)
                self._marks += 1
                self._awaited.setdefault(verifier, set()).add(tracked.order.id)

    def _age_of(self, order: RevocationOrder) -> float | None:
        """Seconds since the commit; None where it happened without this process."""
        committed_at = order.committed_at
        if committed_at is None or committed_at < self._began_at:
            return None
        age = (self._clock.now() - committed_at).total_seconds()
        return max(0.0, age) if age < _FRESH_SECONDS else None

    async def look(self, order: RevocationOrder) -> Collection[Verifier]:
        """Find out which nodes may hold what the order revoked; asked of the store once.

        Who was not connected at the commit is followed from here on.

        Raises:
            StoreUnavailable: the database did not answer.
        """
        if not order.sequence:
            return ()  # not committed
        tracked = self._orders.get(order.id)
        if tracked is not None and tracked.looked_at >= order.sequence:
            return tracked.concerned
        nodes = await self._nodes_of(order)
        concerned = tuple(Verifier(VerifierKind.AGENT, str(node)) for node in nodes)
        tracked = self._orders.get(order.id)
        if tracked is not None:
            tracked.looked_at, tracked.concerned = order.sequence, concerned
            if tracked.seen:
                self._follow_away(order.id, tracked)
        return concerned

    def _follow_away(self, order_id: str, tracked: _Tracked) -> None:
        now = self._monotonic()
        before = sum(mark.was_away for mark in tracked.marks.values())
        absent = (one for one in tracked.concerned if one not in tracked.marks)
        for verifier in list(islice(absent, MOST_AWAY - before)):
            tracked.marks[verifier] = _Mark(tracked.since, counted=True, was_away=True)
            self._marks += 1
            # It may have come, and even acknowledged it, meanwhile.
            self._expect(order_id, tracked, verifier, tracked.since, now)
        tracked.settle()
        self._forget_oldest()

    async def report(self, order: RevocationOrder) -> PropagationReport:
        """Say who has the order by now.

        Raises:
            StoreUnavailable: the database did not answer.
        """
        concerned = await self.look(order)
        return PropagationReport.of(list(self._standings(order, concerned)))

    async def settled(self, order: RevocationOrder, timeout: timedelta) -> PropagationReport:
        """Wait until every verifier that is connected has the order; say who has.

        Returns at `timeout` in any case. An order that is still running is waited for as well.

        Raises:
            StoreUnavailable: the database did not answer.
        """
        try:
            async with asyncio.timeout(timeout.total_seconds()):
                await self._settle(order)
        except TimeoutError:
            pass  # said in the report
        return await self.report(order)

    def is_settled(self, order: RevocationOrder) -> bool:
        """Whether this process saw the order commit, and waits for no verifier."""
        tracked = self._orders.get(order.id)
        return tracked is not None and tracked.seen and tracked.over.is_set()

    def has_seen(self, order: RevocationOrder) -> bool:
        """Whether this process saw the order commit, lately."""
        tracked = self._orders.get(order.id)
        return tracked is not None and tracked.seen

    def close(self, order: RevocationOrder) -> None:
        """The order's time is over: who is silent or gone never had it, for the objective."""
        tracked = self._orders.get(order.id)
        if tracked is None or not tracked.seen:
            return
        for mark in tracked.marks.values():
            if mark.latency is None and not mark.is_excused:
                self._count(mark, Outcome.NEVER)

    async def _settle(self, order: RevocationOrder) -> None:
        while not order.sequence and order.id not in self._orders:
            await self._commit.wait()
        waited = None
        while (tracked := self._orders.get(order.id)) is not waited or tracked is None:
            if tracked is None:
                if waited is not None:
                    return  # forgotten: there is too much else
                now = self._monotonic()
                tracked = self._track(order, now, seen=False)
                for verifier in self._verifiers:
                    self._expect(order.id, tracked, verifier, now, now)
                tracked.settle()
                self._forget_oldest()
            waited = tracked
            await tracked.over.wait()

    def _track(self, order: RevocationOrder, since: float, *, seen: bool) -> _Tracked:
        tracked = self._orders[order.id] = _Tracked(order, since, seen=seen)
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
        self._sent_away.pop(verifier, None)
        for order_id in self._awaited.get(verifier, ()):
            tracked = self._orders[order_id]
            tracked.marks[verifier].is_excused = False
            tracked.waiting.add(verifier)
            tracked.settle()
        self.progressed(verifier)

    def left(self, verifier: Verifier, *, sent_away: bool) -> None:
        """A verifier is not connected any more: nobody waits for it."""
        if sent_away:
            self._sent_away[verifier] = self._clock.now()
            if len(self._sent_away) > MOST_SENT_AWAY:
                del self._sent_away[next(iter(self._sent_away))]
        for order_id in self._awaited.get(verifier, ()):
            tracked = self._orders[order_id]
            tracked.marks[verifier].is_excused = sent_away or self._took_away(
                tracked.order, verifier
            )
            tracked.waiting.discard(verifier)
            tracked.settle()

    def _took_away(self, order: RevocationOrder, verifier: Verifier) -> bool:
        """Whether the agent ends the verifier's stream because of the order."""
        if verifier.kind is not VerifierKind.BEHIND or not order.hold:
            return False
        identity = verifier.name.rpartition("/")[0]  # without the process's number
        selection = Selection.of(order.subject)
        entry = self._directory.entry(selection.entry_id)
        prefix = selection.spiffe_id_prefix
        return (
            identity == str(selection.spiffe_id)
            or (entry is not None and identity == str(entry.spiffe_id))
            or (bool(prefix) and identity.startswith(prefix))
        )

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

    def _standings(
        self, order: RevocationOrder, concerned: Collection[Verifier]
    ) -> Iterator[VerifierStanding]:
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
        if tracked is None or not tracked.seen:
            absent = (one for one in concerned if one not in marks and one not in self._verifiers)
            for verifier in islice(absent, MOST_AWAY):
                yield VerifierStanding(verifier, VerifierState.AWAY, is_judged=False)

    def _standing(self, verifier: Verifier, mark: _Mark, *, seen: bool) -> VerifierStanding:
        is_judged = not (mark.was_away or mark.is_excused)
        if mark.latency is None:
            state = VerifierState.AWAY if mark.was_away else VerifierState.GONE
            if verifier in self._verifiers:
                state = VerifierState.SILENT
            return VerifierStanding(verifier, state, is_judged=is_judged)
        return VerifierStanding(
            verifier,
            VerifierState.ACKNOWLEDGED,
            mark.acknowledged_at if seen else None,
            math.ceil(round(mark.latency * 1000, 3)) if seen else UNKNOWN_MS,
            is_judged,
        )
