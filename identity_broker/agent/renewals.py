"""Orders what `Svids` has planned: in batches, most urgent first, for as long as the agent runs.

- What is wanted within a tick of a few milliseconds is one call to the broker.
- Nothing is adopted that was not checked (`orders.check_issued`).
- While the broker is away one order is tried now and then, not every one at its own pace.
- Keys that take long to make have a lane of their own and hold up nobody else. It takes one at a
  time, the most urgent there is by then: who waits has at most one of them before it.
- No failure ends it, and an SVID that is still valid outlives all of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from time import monotonic
from typing import Final

from identity_broker.agent.mirror import Mirror
from identity_broker.agent.node import Node
from identity_broker.agent.orders import KeyOrder, algorithm_for, check_issued, make_order
from identity_broker.agent.svids import Entries, SvidKey, Svids
from identity_broker.domain.clock import Clock
from identity_broker.telemetry.logs import get_logger
from identity_broker.telemetry.metrics import AgentMetrics
from identity_ca.keys import KeyAlgorithm
from identity_client.clock import roll
from identity_client.errors import (
    BrokerUnavailable,
    IdentityError,
    IdentityNotReady,
    ProtocolViolation,
)
from identity_client.node.values import IssuedX509, SyncedEntry, X509Request
from identity_client.renewal import retry_delay

_log = get_logger("renewals")

_GATHER_SECONDS: Final = 0.002
_BATCH: Final = 250  # half of what a call may hold: an urgent order never waits long behind one
_FLIGHTS: Final = 3
_BREATH: Final = 4  # keys made or chains checked, a few milliseconds, before others get a turn
_LONGEST_SLEEP: Final = 1.0  # the wall clock may jump
_AWAY: Final = (BrokerUnavailable, IdentityNotReady)

_Order = tuple[SvidKey, SyncedEntry]


def all_entries(mirror: Mirror, clock: Clock) -> Entries:
    """The mirror's entries, as `Svids` takes them."""
    return Entries(len(mirror), lambda: mirror.entries(clock.now()))


class Renewals:
    """The loop that orders X.509-SVIDs.

    Args:
        woken: set when something was planned.
        on_change: told whose SVID is there, was replaced or could not be had.
    """

    def __init__(  # what it joins
        self,
        *,
        node: Node,
        mirror: Mirror,
        svids: Svids,
        clock: Clock,
        metrics: AgentMetrics,
        woken: asyncio.Event,
        on_change: Callable[[Collection[SvidKey]], None],
    ) -> None:
        self._node = node
        self._mirror = mirror
        self._svids = svids
        self._clock = clock
        self._metrics = metrics
        self._on_change = on_change
        self._woken = woken
        self._flights: set[asyncio.Task[None]] = set()
        self._slow_lane: asyncio.Task[None] | None = None
        self._outages = 0
        self._not_before = 0.0
        self.last_error: IdentityError | None = None

    def wake(self) -> None:
        """Look at the plan again: something was added."""
        self._woken.set()

    def kick(self) -> None:
        """The broker answers again: order at once what has failed."""
        self._outages = 0
        self._not_before = 0.0
        self._svids.retry_all(all_entries(self._mirror, self._clock))
        self.wake()

    async def run(self) -> None:
        """Order until cancelled."""
        try:
            while True:
                await self._next()
        finally:
            ending = {*self._flights, *([self._slow_lane] if self._slow_lane else [])}
            for flight in ending:
                flight.cancel()
            await asyncio.gather(*ending, return_exceptions=True)

    async def _next(self) -> None:
        self._woken.clear()
        pause = self._pause()
        if pause > 0:
            try:
                async with asyncio.timeout(pause):
                    await self._woken.wait()
            except TimeoutError:
                pass
            return
        await asyncio.sleep(_GATHER_SECONDS)
        while len(self._flights) >= _FLIGHTS:
            await asyncio.wait(self._flights, return_when=asyncio.FIRST_COMPLETED)
        self._depart()

    def _pause(self) -> float:
        tick = monotonic()
        pause = self._svids.pause(now=self._clock.now(), tick=tick)
        if pause is None:
            return _LONGEST_SLEEP
        return min(max(pause, self._not_before - tick), _LONGEST_SLEEP)

    def _depart(self) -> None:
        """Take a batch, and let it fly."""
        now = self._clock.now()
        slow = False

        def is_slow(key: SvidKey) -> bool:
            nonlocal slow
            entry = self._mirror.entry(key.entry_id, now)
            if entry is None or entry.key_algorithm != KeyAlgorithm.RSA_2048.value:
                return False
            slow = True
            return True

        taken = self._svids.take(now=now, tick=monotonic(), limit=_BATCH, aside=is_slow)
        batch = [order for key in taken if (order := self._order_of(key)) is not None]
        if batch:
            flight = asyncio.create_task(self._fly(batch), name="renewals flight")
            self._flights.add(flight)
            flight.add_done_callback(self._flights.discard)
        if slow and (self._slow_lane is None or self._slow_lane.done()):
            self._slow_lane = asyncio.create_task(self._fly_slowly(), name="renewals slow lane")

    async def _fly_slowly(self) -> None:
        while True:
            pause = self._not_before - monotonic()
            if pause > 0:
                await asyncio.sleep(min(pause, _LONGEST_SLEEP))
                continue
            key = self._svids.take_aside()
            if key is None:
                return
            order = self._order_of(key)
            if order is not None:
                await self._fly([order])

    def _order_of(self, key: SvidKey) -> _Order | None:
        """The order for a key that was taken; None, and nothing to do, if its entry is gone."""
        entry = self._mirror.entry(key.entry_id, self._clock.now())
        if entry is None:
            self._svids.discard(key)
            return None
        return key, entry

    async def _fly(self, batch: Sequence[_Order]) -> None:
        try:
            ready, orders = await self._prepare(batch)
            if ready:
                answers = await self._ask(ready, orders)
                await self._take_in(ready, orders, answers)
        except Exception as exc:  # noqa: BLE001  # the loop outlives a bug; it is tried again
            _log.exception("svid orders failed", count=len(batch), error_type=type(exc).__name__)
            for key, _ in batch:
                self._fail(key, IdentityError("the agent failed; this is a bug"))
        self._on_change([key for key, _ in batch])
        self.wake()

    async def _prepare(self, batch: Sequence[_Order]) -> tuple[list[_Order], list[KeyOrder]]:
        ready, orders = [], []
        for place, (key, entry) in enumerate(batch):
            try:
                orders.append(await make_order(algorithm_for(entry)))
            except IdentityError as error:
                self._fail(key, error)
            else:
                ready.append((key, entry))
            if place % _BREATH == _BREATH - 1:
                await asyncio.sleep(0)
        return ready, orders

    async def _ask(
        self, ready: Sequence[_Order], orders: Sequence[KeyOrder]
    ) -> Sequence[IssuedX509 | IdentityError]:
        requests = [
            X509Request(entry.id, order.csr, key.instance)
            for (key, entry), order in zip(ready, orders, strict=True)
        ]
        started = monotonic()
        answers: Sequence[IssuedX509 | IdentityError]
        try:
            answers = await self._node.issue_x509(requests)
        except IdentityError as error:
            answers = [error] * len(requests)
        self._metrics.agent_order_seconds.observe(monotonic() - started)
        away = [answer for answer in answers if isinstance(answer, _AWAY)]
        if len(away) == len(answers):
            self._outages += 1
            delay = retry_delay(self._outages, dice=roll(), retry_after=away[0].retry_after)
            self._not_before = monotonic() + delay.total_seconds()
            _log.warning(
                "svid orders unanswered",
                count=len(answers),
                reason=away[0].reason,
                detail=away[0].message,
                attempt=self._outages,
            )
        else:
            self._outages = 0
        return answers

    async def _take_in(
        self,
        ready: Sequence[_Order],
        orders: Sequence[KeyOrder],
        answers: Sequence[IssuedX509 | IdentityError],
    ) -> None:
        adopted = 0
        for place, ((key, entry), order, answer) in enumerate(
            zip(ready, orders, answers, strict=True)
        ):
            if isinstance(answer, IdentityError):
                self._fail(key, answer)
            else:
                adopted += self._adopt(key, entry, order, answer)
            if place % _BREATH == _BREATH - 1:
                await asyncio.sleep(0)
        if adopted:
            self.last_error = None
            self._metrics.agent_issued_total.labels("x509").inc(adopted)
            _log.info("svids issued", kind="x509", count=adopted)

    def _adopt(self, key: SvidKey, entry: SyncedEntry, order: KeyOrder, answer: IssuedX509) -> bool:
        bundle = self._mirror.bundle
        if bundle is None:  # withdrawn meanwhile
            self._svids.discard(key)
            return False
        try:
            issued = check_issued(
                answer, order=order, entry=entry, bundle=bundle, now=self._clock.now()
            )
            if not issued.signers.isdisjoint(self._mirror.denied.authorities):
                raise ProtocolViolation(
                    "the authority that signed the SVID is denied", reason="AUTHORITY_DENIED"
                )
        except IdentityError as error:
            self._fail(key, error)
            return False
        held = self._svids.adopt(key, issued, now=self._clock.now(), tick=monotonic())
        if held and self._mirror.denied.is_revoked(issued.identity.serial):
            self._svids.revoke([issued.identity.serial])  # faster than its own delivery
        return held

    def _fail(self, key: SvidKey, error: IdentityError) -> None:
        self.last_error = error
        self._metrics.agent_refused_total.labels("x509", error.reason).inc()
        earlier = self._svids.failure(key)
        if not isinstance(error, _AWAY) and (earlier is None or earlier.reason != error.reason):
            _log.warning(
                "svid refused", entry_id=key.entry_id, reason=error.reason, detail=error.message
            )
        self._svids.fail(
            key,
            reason=error.reason,
            message=error.message,
            retry_after=error.retry_after,
            now=self._clock.now(),
            tick=monotonic(),
        )
