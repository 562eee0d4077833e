"""Who is said to have a revocation, and since when: with time and positions set by hand."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import cast

import pytest

from identity_broker.domain.credential import RevocationReason
from identity_broker.domain.revocation import (
    OrderState,
    RevocationOrder,
    RevocationSubject,
    SubjectKind,
)
from identity_broker.lifecycle import propagation as module
from identity_broker.lifecycle.directory import Directory, Update
from identity_broker.lifecycle.propagation import Outcome, Propagation
from identity_broker.lifecycle.propagation_report import (
    PropagationReport,
    VerifierStanding,
    VerifierState,
)
from identity_broker.lifecycle.verifiers import Verifier, VerifierKind, Verifiers
from identity_broker.store import Store
from identity_ca.spiffe_id import SpiffeId
from support.store import SettableClock, of
from support.verbs import DOMAIN

NOW = datetime(2030, 1, 1, tzinfo=UTC)
ACKNOWLEDGED, SILENT, GONE, AWAY = (
    VerifierState.ACKNOWLEDGED,
    VerifierState.SILENT,
    VerifierState.GONE,
    VerifierState.AWAY,
)
HERE, THERE, ELSEWHERE = (
    f"spiffe://{DOMAIN.name}/idb/node/{name}" for name in ("here", "there", "elsewhere")
)
SHORTLY = timedelta(milliseconds=20)
LONG = timedelta(seconds=10)


class World:
    """Verifiers whose positions are set by hand, in a time that is."""

    def __init__(self) -> None:
        self.clock = SettableClock(NOW)
        self.seconds = 1000.0
        self.directory = Directory(cast("Store", None), DOMAIN, self.clock)
        self.directory.seq = 10
        self.verifiers = Verifiers(monotonic=lambda: self.seconds)
        self.at: dict[Verifier, int] = {}
        self.outcomes: Counter[Outcome] = Counter()
        self.took: list[float] = []
        self.concerned: list[str] = []
        self.asked = 0
        self.propagation = self.new()

    async def nodes_of(self, _order: RevocationOrder) -> list[SpiffeId]:
        self.asked += 1
        return [SpiffeId.parse(name) for name in self.concerned]

    def new(self) -> Propagation:
        return Propagation(
            self.verifiers,
            self.directory,
            self.clock,
            needed=lambda seq: seq if self.directory.seq >= seq else None,
            nodes_of=self.nodes_of,
            on_acknowledged=self.took.append,
            on_outcome=lambda outcome: self.outcomes.update([outcome]),
            monotonic=lambda: self.seconds,
        )

    def enter(self, name: str, at: int = 10) -> Verifier:
        verifier = Verifier(VerifierKind.AGENT, name)
        self.at[verifier] = at
        self.verifiers.enter(verifier, lambda position: self.at[verifier] >= position)
        return verifier

    def acknowledge(self, verifier: Verifier, position: int) -> None:
        self.at[verifier] = position
        self.verifiers.progressed(verifier)

    def pass_time(self, seconds: float) -> None:
        self.seconds += seconds
        self.clock.time += timedelta(seconds=seconds)

    async def read(self, position: int) -> None:
        """The directory reads the change feed."""
        self.directory.seq = position
        self.directory._tell(Update(position))
        await asyncio.sleep(0)

    def order(self, name: str = "one", sequence: int = 11) -> RevocationOrder:
        return RevocationOrder(
            id=name,
            subject=of(SubjectKind.SERIAL, "00" * 20),
            reason=RevocationReason.UNSPECIFIED,
            comment="",
            actor="uid:0",
            ordered_at=self.clock.now(),
            committed_at=self.clock.now(),
            state=OrderState.COMMITTED,
            sequence=sequence,
        )

    async def states(self, order: RevocationOrder) -> dict[str, tuple[VerifierState, int]]:
        report = await self.propagation.report(order)
        return {one.verifier.name: (one.state, one.latency_ms) for one in report.verifiers}


@pytest.fixture
def world() -> World:
    return World()


async def test_the_latency_runs_from_the_commit(world: World) -> None:
    fast, slow, silent = map(world.enter, ("fast", "slow", "silent"))
    order = world.order()
    world.pass_time(0.1)  # it took a moment until we were told
    world.propagation.begun(order)
    await world.read(11)
    world.pass_time(0.2)
    world.acknowledge(fast, 11)
    world.pass_time(2)
    world.acknowledge(slow, 12)
    assert await world.states(order) == {
        "silent": (SILENT, -1),
        "fast": (ACKNOWLEDGED, 300),
        "slow": (ACKNOWLEDGED, 2300),
    }
    assert not world.propagation.is_settled(order)
    world.propagation.close(order)
    world.acknowledge(silent, 11)
    assert world.outcomes == {
        Outcome.WITHIN_OBJECTIVE: 1,
        Outcome.LATE: 1,
        Outcome.NEVER: 1,
    }
    assert len(world.took) == 2
    world.propagation.close(order)
    assert world.outcomes.total() == 3
    assert world.propagation.is_settled(order)


async def test_nobody_has_what_this_broker_has_not_read(world: World) -> None:
    ahead = world.enter("ahead", at=99)
    order = world.order()
    world.propagation.begun(order)
    world.acknowledge(ahead, 100)
    assert await world.states(order) == {"ahead": (SILENT, -1)}
    world.pass_time(0.05)
    await world.read(11)
    # It was to be told nothing of it: it has it from then on.
    assert await world.states(order) == {"ahead": (ACKNOWLEDGED, 50)}


async def test_who_said_so_before_the_whole_was_committed_has_it_at_once(world: World) -> None:
    world.enter("early", at=11)
    await world.read(11)
    world.pass_time(3)
    order = world.order()
    world.propagation.begun(order)
    assert await world.states(order) == {"early": (ACKNOWLEDGED, 0)}


async def test_who_has_gone_is_named_and_not_waited_for(world: World) -> None:
    gone = world.enter("gone")
    order = world.order()
    world.propagation.begun(order)
    await world.read(11)
    waiting = asyncio.create_task(world.propagation.settled(order, LONG))
    await asyncio.sleep(0)
    world.verifiers.leave(gone)
    report = await waiting
    assert (report.gone, report.told) == (1, 1)
    assert report.within_objective_permille == 0
    world.propagation.close(order)
    assert world.outcomes == {Outcome.NEVER: 1}
    # It comes back, is told what it missed, and says so.
    world.pass_time(1)
    world.enter("gone")
    assert await world.states(order) == {"gone": (SILENT, -1)}
    assert not world.propagation.is_settled(order)
    world.pass_time(1)
    world.acknowledge(gone, 11)
    assert await world.states(order) == {"gone": (ACKNOWLEDGED, 2000)}
    assert world.propagation.is_settled(order)
    assert world.outcomes == {Outcome.NEVER: 1}  # counted once


async def test_a_later_part_has_to_be_acknowledged_too(world: World) -> None:
    one, two = world.enter("one"), world.enter("two")
    order = world.order()
    world.propagation.begun(order)
    await world.read(11)
    world.acknowledge(one, 11)
    world.pass_time(2)
    world.propagation.begun(replace(order, swept=True))  # nothing more was found
    assert (await world.states(order))["one"] == (ACKNOWLEDGED, 0)
    world.acknowledge(two, 13)
    later = replace(order, sequence=13)
    world.propagation.begun(later)
    await world.read(13)
    assert (await world.states(later))["one"] == (SILENT, -1)
    assert (await world.states(later))["two"] == (ACKNOWLEDGED, 2000)
    world.pass_time(0.5)
    world.acknowledge(one, 13)
    assert (await world.states(later))["one"] == (ACKNOWLEDGED, 500)
    assert world.outcomes.total() == 2  # each once


async def test_whoever_came_later_is_told_as_well(world: World) -> None:
    order = world.order()
    world.propagation.begun(order)
    await world.read(11)
    world.enter("new", at=10)
    world.enter("newer", at=11)
    assert await world.states(order) == {"new": (SILENT, -1), "newer": (ACKNOWLEDGED, -1)}
    assert world.propagation.is_settled(order)
    assert not world.outcomes


async def test_an_order_that_runs_is_waited_for(world: World) -> None:
    verifier = world.enter("one")
    running = replace(world.order(), sequence=0, state=OrderState.RUNNING, committed_at=None)
    assert await world.states(running) == {"one": (SILENT, -1)}
    waiting = asyncio.create_task(world.propagation.settled(running, LONG))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    world.propagation.begun(world.order())
    await world.read(11)
    world.acknowledge(verifier, 11)
    await waiting
    assert (await world.propagation.settled(world.order(), SHORTLY)).acknowledged == 1


async def test_an_order_may_be_asked_about_before_we_are_told_of_it(world: World) -> None:
    verifier = world.enter("one")
    order = world.order()
    waiting = asyncio.create_task(world.propagation.settled(order, LONG))
    await asyncio.sleep(0)
    world.propagation.begun(order)
    await world.read(11)
    await asyncio.sleep(0)
    assert not waiting.done()
    world.pass_time(0.1)
    world.acknowledge(verifier, 11)
    [standing] = (await waiting).verifiers
    assert standing.latency_ms == 100
    assert world.outcomes == {Outcome.WITHIN_OBJECTIVE: 1}


async def test_the_wait_has_an_end(world: World) -> None:
    world.enter("silent")
    order = world.order()
    world.propagation.begun(order)
    assert (await world.propagation.settled(order, SHORTLY)).silent == 1


async def test_an_order_of_before_this_process_has_no_latencies(world: World) -> None:
    order = world.order()
    world.pass_time(1)
    world.propagation = world.new()
    verifier = world.enter("one")
    world.propagation.begun(replace(order, swept=True))  # it was swept after the restart
    await world.read(11)
    world.acknowledge(verifier, 11)
    assert await world.states(order) == {"one": (ACKNOWLEDGED, -1)}
    assert not world.propagation.has_seen(order)
    assert not world.outcomes


async def test_what_is_kept_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_MARKS", 25)
    monkeypatch.setattr(module, "MOST_ORDERS", 8)
    verifiers = [world.enter(f"v{at}") for at in range(5)]
    orders = [world.order(f"o{at}", 11 + at) for at in range(12)]
    for order in orders:
        world.propagation.begun(order)
    await world.read(30)
    kept = world.propagation
    assert len(kept._orders) == 5
    assert kept._marks == 25
    assert sum(map(len, kept._awaited.values())) == 25
    for verifier in verifiers:
        world.acknowledge(verifier, 30)
    assert not kept._awaited
    # Of those that were forgotten the positions tell.
    assert await world.states(orders[0]) == {one.name: (ACKNOWLEDGED, -1) for one in verifiers}
    monkeypatch.setattr(module, "MOST_MARKS", 1000)
    for verifier in verifiers:
        world.verifiers.leave(verifier)
    for at in range(20):
        kept.begun(world.order(f"p{at}", 31))
    assert len(kept._orders) == 8


def test_ranks_and_shares_are_of_those_who_are_known() -> None:
    def standing(name: str, state: VerifierState, latency: int = -1) -> VerifierStanding:
        return VerifierStanding(Verifier(VerifierKind.AGENT, name), state, None, latency)

    report = PropagationReport.of(
        [
            *(standing(f"a{at}", ACKNOWLEDGED, at) for at in range(1, 98)),
            standing("slow", ACKNOWLEDGED, 1500),
            standing("x", SILENT),
            standing("y", GONE),
            standing("old", ACKNOWLEDGED),
        ]
    )
    assert (report.told, report.acknowledged, report.silent, report.gone) == (101, 99, 1, 1)
    assert (report.p50_ms, report.p99_ms) == (49, 1500)
    assert report.within_objective_permille == 970  # "y" left without a word
    assert [one.verifier.name for one in report.verifiers[:2]] == ["x", "y"]
    empty = PropagationReport.of([standing("old", ACKNOWLEDGED)])
    assert (empty.p50_ms, empty.p99_ms, empty.within_objective_permille) == (-1, -1, -1)


# --- who was away ---------------------------------------------------------------------------------


async def test_a_node_that_was_away_is_named_and_speaks_for_no_objective(world: World) -> None:
    world.concerned = [HERE, THERE]
    here = world.enter(HERE)
    silent = world.enter("silent")
    order = world.order()
    world.propagation.begun(order)
    await world.read(11)
    world.acknowledge(here, 11)
    report = await world.propagation.report(order)
    assert [(one.verifier.name, one.state) for one in report.verifiers] == [
        ("silent", SILENT),
        (THERE, AWAY),
        (HERE, ACKNOWLEDGED),
    ]
    assert (report.told, report.away) == (2, 1)
    assert report.within_objective_permille == 500
    world.acknowledge(silent, 11)
    assert world.propagation.is_settled(order)  # nobody waits for who is away
    world.propagation.close(order)
    assert world.outcomes == {Outcome.WITHIN_OBJECTIVE: 2}
    assert (await world.propagation.report(order)).within_objective_permille == 1000
    assert world.asked == 1


async def test_where_all_who_matter_were_away_no_objective_was_met(world: World) -> None:
    world.concerned = [THERE]
    order = world.order()
    world.propagation.begun(order)
    await world.read(11)
    report = await world.propagation.report(order)
    assert (report.told, report.away, report.within_objective_permille) == (0, 1, -1)


@pytest.mark.parametrize("asked", [True, False], ids=["followed", "asked afterwards"])
async def test_who_was_away_and_comes_back_is_waited_for(world: World, *, asked: bool) -> None:
    world.concerned = [THERE]
    order = world.order()
    world.propagation.begun(order)
    await world.read(11)
    if asked:
        assert await world.states(order) == {THERE: (AWAY, -1)}
    world.pass_time(3600)
    back = world.enter(THERE)
    assert (await world.states(order))[THERE] == (SILENT, -1)
    assert not world.propagation.is_settled(order)
    world.pass_time(1)
    world.acknowledge(back, 11)
    report = await world.propagation.report(order)
    [standing] = report.verifiers
    assert (standing.state, standing.latency_ms) == (ACKNOWLEDGED, 3_601_000)
    assert standing.acknowledged_at == world.clock.now()
    assert world.propagation.is_settled(order)
    # The objective is one of those that were connected.
    assert (report.p50_ms, report.p99_ms, report.within_objective_permille) == (-1, -1, -1)
    assert not world.took
    assert not world.outcomes
    world.verifiers.leave(back)
    assert await world.states(order) == {THERE: (ACKNOWLEDGED, 3_601_000)}


async def test_who_came_back_and_left_without_a_word_is_away_again(world: World) -> None:
    world.concerned = [THERE]
    order = world.order()
    world.propagation.begun(order)
    await world.read(11)
    await world.propagation.look(order)
    world.verifiers.leave(world.enter(THERE))
    assert await world.states(order) == {THERE: (AWAY, -1)}
    world.propagation.close(order)
    assert not world.outcomes


async def test_a_later_part_may_concern_more_nodes(world: World) -> None:
    world.concerned = [THERE]
    order = world.order()
    world.propagation.begun(order)
    await world.read(11)
    await world.propagation.look(order)
    world.concerned = [THERE, ELSEWHERE]
    later = replace(order, sequence=13)
    world.propagation.begun(later)
    await world.read(13)
    assert await world.states(later) == {THERE: (AWAY, -1), ELSEWHERE: (AWAY, -1)}
    assert world.asked == 2


async def test_of_an_order_of_before_this_process_who_is_not_here_is_away(world: World) -> None:
    order = world.order()
    world.pass_time(1)
    world.propagation = world.new()
    world.concerned = [HERE, THERE]
    world.enter(HERE, at=11)
    await world.read(11)
    assert await world.states(order) == {HERE: (ACKNOWLEDGED, -1), THERE: (AWAY, -1)}
    running = replace(order, id="runs", sequence=0, state=OrderState.RUNNING)
    assert THERE not in await world.states(running)


async def test_those_away_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_AWAY", 3)
    world.concerned = [f"{THERE}-{at}" for at in range(10)]
    order = world.order()
    world.propagation.begun(order)
    await world.read(11)
    assert (await world.propagation.report(order)).away == 3
    assert world.propagation._marks == 3
    world.propagation.begun(replace(order, sequence=12))
    assert (await world.propagation.report(replace(order, sequence=12))).away == 3
    unseen = replace(world.order("old"), committed_at=NOW - LONG)
    assert (await world.propagation.report(unseen)).away == 3


# --- who left -------------------------------------------------------------------------------------


async def test_who_was_sent_away_is_excused_until_it_is_back(world: World) -> None:
    banned = world.enter("banned")
    order = world.order()
    world.propagation.begun(order)
    await world.read(11)
    world.verifiers.leave(banned, sent_away=True)
    report = await world.propagation.report(order)
    assert (report.gone, report.within_objective_permille) == (1, -1)
    world.propagation.close(order)
    assert not world.outcomes
    world.verifiers.leave(world.enter("banned"))
    assert (await world.propagation.report(order)).within_objective_permille == 0


async def test_whom_an_order_sent_away_before_its_commit_is_gone_not_away(world: World) -> None:
    world.concerned = [HERE, THERE]
    before, banned = world.enter(THERE), world.enter(HERE)
    world.verifiers.leave(before, sent_away=True)
    world.pass_time(1)
    order = world.order()
    world.pass_time(0.1)
    world.verifiers.leave(banned, sent_away=True)
    world.pass_time(0.1)
    world.propagation.begun(replace(order, committed_at=world.clock.now()))
    await world.read(11)
    assert await world.states(order) == {HERE: (GONE, -1), THERE: (AWAY, -1)}
    world.propagation.close(order)
    assert not world.outcomes
    world.acknowledge(world.enter(HERE), 11)
    assert (await world.states(order))[HERE][0] is ACKNOWLEDGED


@pytest.mark.parametrize(
    ("subject", "hold", "excused"),
    [
        (of(SubjectKind.SPIFFE_ID, f"spiffe://{DOMAIN.name}/shop/orders"), "h", True),
        (of(SubjectKind.SPIFFE_ID, f"spiffe://{DOMAIN.name}/shop/orders"), "", False),
        (of(SubjectKind.SPIFFE_ID, f"spiffe://{DOMAIN.name}/shop"), "h", False),
        (of(SubjectKind.SELECT, f"spiffe-id=spiffe://{DOMAIN.name}/shop/*"), "h", True),
        (of(SubjectKind.SELECT, f"spiffe-id=spiffe://{DOMAIN.name}/else/*"), "h", False),
        (of(SubjectKind.SERIAL, "00" * 20), "h", False),
    ],
)
async def test_who_an_order_took_the_identity_from_is_excused(
    world: World, subject: RevocationSubject, hold: str, *, excused: bool
) -> None:
    verifier = Verifier(
        VerifierKind.BEHIND, f"spiffe://{DOMAIN.name}/shop/orders/4711", node_id=HERE
    )
    world.verifiers.enter(verifier, lambda _position: False)
    order = replace(world.order(), subject=subject, hold=hold)
    world.propagation.begun(order)
    await world.read(11)
    world.verifiers.leave(verifier)
    report = await world.propagation.report(order)
    assert report.gone == 1
    assert report.within_objective_permille == (-1 if excused else 0)
