"""Who is connected, and who has applied what."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from identity_broker.domain import names
from identity_broker.errors import MalformedRequest, NodeBanned, WatchLagged
from identity_broker.lifecycle import acknowledged
from identity_broker.lifecycle.node_stream import NodeStream
from identity_broker.lifecycle.roster import MOST_OF_A_NODE, Roster
from support.store import entry
from support.verbs import DOMAIN

A, B = (names.node_id(DOMAIN, "join_token", name) for name in "ab")
SHORTLY = timedelta(milliseconds=20)
LONG = timedelta(seconds=10)


class Seconds:
    """Monotonic seconds that are set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def fresh(node_id: object = A, **options: object) -> NodeStream:
    """A stream that was opened and has told nothing yet."""
    return NodeStream(node_id, frozenset(), **options)  # type: ignore[arg-type]


def stream(node_id: object = A) -> NodeStream:
    """One whose first message was acknowledged."""
    one = fresh(node_id)
    one.touch(0)
    one.take(0, 0)
    one.acknowledge(0)
    return one


def told(roster: Roster, one: NodeStream, seq: int) -> None:
    """Tell it something, up to `seq`."""
    one.waiting.put(entry("a"))
    one.touch(seq)
    one.take(seq, 0)


async def test_an_ended_stream_vouches_for_nothing() -> None:
    roster = Roster()
    one = stream()
    roster.enter(one)
    assert (await roster.applied(5, (), SHORTLY)).applied == (A,)
    one.end(WatchLagged())
    answer = await roster.applied(5, (), SHORTLY)
    assert (answer.applied, answer.pending) == ((), ())
    assert (await roster.applied(5, (A,), SHORTLY)).pending == (A,)


async def test_a_stream_that_breaks_is_waited_for_until_the_node_is_back() -> None:
    roster = Roster()
    one = stream()
    roster.enter(one)
    told(roster, one, 5)
    waiting = asyncio.create_task(roster.applied(5, (), LONG))
    await asyncio.sleep(0)
    one.end()
    roster.leave(one)
    again = fresh()
    roster.enter(again)
    told(roster, again, 5)
    roster.progressed(again)
    await asyncio.sleep(0)
    assert not waiting.done()
    again.acknowledge(5)
    roster.progressed(again)
    assert (await waiting).applied == (A,)


async def test_a_node_that_came_back_has_applied_nothing_before_it_says_so() -> None:
    roster = Roster()
    again = fresh()
    roster.enter(again)
    assert (await roster.applied(10, (), SHORTLY)).pending == (A,)
    again.touch(11)  # as of the feed's position when it connected
    assert (await roster.applied(10, (), SHORTLY)).pending == (A,)
    again.take(11, 0)
    assert (await roster.applied(10, (), SHORTLY)).pending == (A,)
    waiting = asyncio.create_task(roster.applied(10, (), LONG))
    await asyncio.sleep(0)
    again.acknowledge(11)
    roster.progressed(again)
    assert (await waiting).applied == (A,)


async def test_what_is_changed_after_the_call_is_not_waited_for() -> None:
    roster = Roster()
    one = stream()
    roster.enter(one)
    told(roster, one, 5)
    one.acknowledge(5)
    told(roster, one, 6)
    one.waiting.drop("a")
    one.touch(7)
    assert (await roster.applied(5, (), SHORTLY)).applied == (A,)
    assert (await roster.applied(6, (), SHORTLY)).pending == (A,)
    one.acknowledge(6)
    assert (await roster.applied(6, (), SHORTLY)).applied == (A,)
    assert (await roster.applied(7, (), SHORTLY)).pending == (A,)


async def test_a_heartbeat_is_nothing_to_wait_for() -> None:
    roster = Roster()
    one = stream()
    roster.enter(one)
    one.take(9, 0)
    assert (await roster.applied(9, (), SHORTLY)).applied == (A,)


async def test_nobody_waits_for_a_node_that_is_not_welcome() -> None:
    roster = Roster()
    one = stream()
    roster.enter(one)
    told(roster, one, 5)
    waiting = asyncio.create_task(roster.applied(5, (), LONG))
    await asyncio.sleep(0)
    one.end(NodeBanned())
    roster.forget(A)
    answer = await waiting
    assert (answer.applied, answer.pending) == ((), ())


async def test_the_count_is_of_nodes_and_the_newest_stream_speaks() -> None:
    counts: list[int] = []
    roster = Roster(counts.append)
    assert roster.spread == timedelta()
    streams = [stream() for _ in range(MOST_OF_A_NODE + 1)]
    for one in streams:
        roster.enter(one)
    assert len(roster) == 1
    assert roster.spread == timedelta()
    assert [one.ended for one in streams] == [True] + [False] * MOST_OF_A_NODE
    roster.enter(stream(B))
    assert roster.spread == timedelta(milliseconds=4)
    told(roster, streams[1], 5)
    assert (await roster.applied(5, (), SHORTLY)).applied == (A, B)
    for one in (*streams, *streams):
        roster.leave(one)
    assert counts[-1] == len(roster) == 1


def test_messages_are_acknowledged_in_order_and_each_is_timed() -> None:
    clock = Seconds()
    one = fresh(monotonic=clock)
    for seq in (1, 2, 2, 3):
        one.take(seq, 0)
        clock.now += 1
    with pytest.raises(MalformedRequest):
        one.acknowledge(4)
    assert one.acknowledge(2) == [4.0, 3.0, 2.0]
    assert one.acknowledge(1) == []
    clock.now += acknowledged.PATIENCE_SECONDS - 2
    one.check()
    clock.now += 2
    with pytest.raises(WatchLagged):
        one.check()
    one.moved()  # a piece of it went out just now
    one.check()
