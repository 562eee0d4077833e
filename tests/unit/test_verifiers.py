"""Who is connected, and how far one verifier's stream has come."""

from __future__ import annotations

import pytest

from identity_broker.errors import InvariantViolated, MalformedRequest, WatchLagged
from identity_broker.lifecycle import acknowledged
from identity_broker.lifecycle.followers import Follower, Hello
from identity_broker.lifecycle.node_stream import NodeStream
from identity_broker.lifecycle.roster import Roster
from identity_broker.lifecycle.verifiers import Verifier, VerifierKind, Verifiers
from support.verbs import NODE


class Seconds:
    """Monotonic seconds that are set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Seen:
    """Writes down who comes and goes."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def came(self, verifier: Verifier) -> None:
        self.lines.append(f"+{verifier.label}")

    def left(self, verifier: Verifier, *, sent_away: bool) -> None:
        assert not sent_away
        self.lines.append(f"-{verifier.label}")

    def progressed(self, verifier: Verifier) -> None:
        self.lines.append(f"!{verifier.label}")


def always(_position: int) -> bool:
    return True


def test_each_stream_of_a_name_is_a_verifier() -> None:
    counts: list[tuple[VerifierKind, int]] = []
    verifiers = Verifiers(lambda kind, count: counts.append((kind, count)))
    one = verifiers.enter_workload("a", always)
    two = verifiers.enter_workload("a", always)
    assert (one.label, two.label) == ("a", "a#2")
    verifiers.leave(one)
    verifiers.leave(one)
    assert verifiers.enter_workload("a", always) == one
    assert {verifier.label for verifier in verifiers} == {"a", "a#2"}
    verifiers.leave(one)
    verifiers.leave(two)
    assert len(verifiers) == 0
    assert not verifiers._places
    assert counts == [(VerifierKind.WORKLOAD, count) for count in (1, 2, 1, 2, 1, 0)]
    assert not verifiers.has(one, 0)
    agent = Verifier(VerifierKind.AGENT, "a")
    verifiers.enter(agent, always)
    with pytest.raises(InvariantViolated):
        verifiers.enter(agent, always)


def test_a_node_counts_once_and_speaks_for_those_behind_it() -> None:
    seen, verifiers = Seen(), Verifiers()
    verifiers.watch(seen)
    roster = Roster(verifiers=verifiers)
    old, new = (NodeStream(NODE, frozenset()) for _ in range(2))
    roster.enter(old)
    roster.report(old, {"a": 1, "b": 1})
    roster.enter(new)
    assert sorted(seen.lines) == ["+a", "+b", f"+{NODE}"]
    seen.lines.clear()
    roster.report(old, {})  # its newest stream speaks
    assert not seen.lines
    roster.report(new, {"b": 2, "c": 1})
    assert sorted(seen.lines) == ["!b", "+c", "-a"]
    behind = Verifier(VerifierKind.BEHIND, "b", str(NODE))
    assert verifiers.has(behind, 2)
    assert not verifiers.has(behind, 3)
    seen.lines.clear()
    roster.leave(old)
    assert not seen.lines
    roster.leave(new)
    assert sorted(seen.lines) == ["-b", "-c", f"-{NODE}"]
    roster.report(new, {"b": 3})
    assert len(verifiers) == 0


def test_an_acknowledgement_is_of_one_message() -> None:
    follower = Follower(Hello("uid:0"), None)
    with pytest.raises(MalformedRequest):
        follower.acknowledge(0)
    follower.handed(7, None, complete=False)
    assert not follower.acknowledge(7)
    assert not follower.acknowledge(7)  # said twice
    follower.handed(7, None, complete=False)
    follower.handed(7, None, complete=True)
    follower.handed(9, None)
    assert not follower.acknowledge(7)
    assert not follower.has(7)
    assert follower.acknowledge(7)
    assert follower.has(7)
    assert not follower.has(8)
    assert not follower.acknowledge(5)  # said again
    with pytest.raises(MalformedRequest):
        follower.acknowledge(10)
    assert follower.acknowledge(9)
    assert not follower.acknowledge(9)


def test_who_says_less_than_it_could_has_what_it_said() -> None:
    follower = Follower(Hello("uid:0"), 3)
    assert not follower.has(3)  # it says so, and has acknowledged nothing
    for position in (4, 5, 6):
        follower.handed(position, None)
    assert follower.acknowledge(6)
    assert follower.has(6)
    follower.handed(8, None, complete=False)
    follower.handed(8, None)
    follower.handed(9, None)
    assert follower.acknowledge(9)
    assert follower.has(9)


def test_a_slow_reader_that_reads_is_not_let_go() -> None:
    clock = Seconds()
    follower = Follower(Hello("uid:0", "v"), None, monotonic=clock)
    follower.handed(1, None, complete=False)
    for _ in range(10):
        clock.now += acknowledged.PATIENCE_SECONDS - 1
        follower.moved()
        follower.check()
    clock.now += acknowledged.PATIENCE_SECONDS + 1
    with pytest.raises(WatchLagged) as lagged:
        follower.check()
    assert "uid:0 (v)" in lagged.value.detail
