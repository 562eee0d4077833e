"""Both xDS variants against a client that does anything, in any order.

The model is a client: what it wants, what it was sent. Whatever happens, it ends with exactly what
is there of what it wants, and is never told the same thing twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from identity_broker.agent.sds.resources import CertificateResource, Resource
from identity_broker.agent.sds.subscription import (
    MAX_NAMES,
    Answer,
    DeltaRequest,
    Incremental,
    Receipt,
    Request,
    StateOfTheWorld,
)
from identity_broker.errors import MalformedRequest

NAMES = ("default", "ROOTCA", "spiffe://example.org/a", "spiffe://example.org/b")
names = st.sets(st.sampled_from(NAMES))
worlds = st.dictionaries(st.sampled_from(NAMES), st.sampled_from("123"))
nonces = st.one_of(st.sampled_from(["", "0", "1", "2", "-1", "\uff11", "01", "9" * 400]), st.text())


def resource(name: str, version: str) -> Resource:
    return CertificateResource(name, "", "", (), b"", version)


class World:
    """What is there: a version for each name."""

    def __init__(self, there: Mapping[str, str] | None = None) -> None:
        self.there = dict(there or {})

    def resolve(self, wanted: Iterable[str], wildcard: bool) -> dict[str, Resource]:
        asked = {*wanted, *(self.there if wildcard else ())}
        return {n: resource(n, v) for n, v in sorted(self.there.items()) if n in asked}

    def of(self, wanted: Iterable[str]) -> dict[str, str]:
        return {name: self.there[name] for name in wanted if name in self.there}


def versions(answer: Answer) -> dict[str, str]:
    return {each.name: each.version for each in answer.resources}


class StateOfTheWorldClient(RuleBasedStateMachine):
    """StreamSecrets."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.server = StateOfTheWorld()
        self.has: dict[str, str] = {}
        self.wanted: set[str] | None = None
        self.nonce = ""

    def drain(self) -> None:
        answer = self.server.owed(self.world.resolve)
        if answer:
            assert versions(answer) != self.has, "said again"
            assert answer.nonce != self.nonce
            self.has = versions(answer)
            self.nonce = answer.nonce
        assert self.server.owed(self.world.resolve) is None, "an answer that owes an answer"

    @rule(wanted=names.filter(bool))
    def subscribe(self, wanted: set[str]) -> None:
        self.server.receive(Request(tuple(wanted), self.nonce))
        self.wanted = wanted
        # What it no longer wants, it forgets.
        self.has = {name: version for name, version in self.has.items() if name in wanted}
        self.drain()

    @rule()
    def unsubscribe(self) -> None:
        if self.wanted:
            self.server.receive(Request((), self.nonce))
            self.wanted, self.has = set(), {}
            self.drain()

    @rule(refused=st.booleans(), times=st.integers(1, 5))
    def answer(self, refused: bool, times: int) -> None:
        """However often it is acknowledged or refused, nothing follows."""
        if self.nonce and self.wanted:
            for _ in range(times):
                self.server.receive(Request(tuple(self.wanted), self.nonce, refused))
                assert self.server.owed(self.world.resolve) is None

    @rule(wanted=names, nonce=nonces, refused=st.booleans())
    def speak_of_another_response(self, wanted: set[str], nonce: str, refused: bool) -> None:
        """A nonce that is not the last one changes nothing."""
        if nonce in ("", self.nonce):
            return
        self.server.receive(Request(tuple(wanted), nonce, refused))
        assert self.server.owed(self.world.resolve) is None

    @rule(there=worlds)
    def change(self, there: dict[str, str]) -> None:
        self.world.there = there
        self.drain()

    @invariant()
    def it_has_what_is_there(self) -> None:
        assert self.has == self.world.of(self.wanted or ())


class IncrementalClient(RuleBasedStateMachine):
    """DeltaSecrets."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.server = Incremental()
        self.has: dict[str, str] = {}
        self.wanted: set[str] = set()
        self.nonce = ""
        self.server.receive(DeltaRequest(subscribe=("nothing",)))
        self.take(self.server.owed(self.world.resolve), again={"nothing"})

    def take(self, answer: Answer | None, *, again: Iterable[str] = ()) -> None:
        told: set[str] = set()
        if answer:
            assert versions(answer) or answer.removed
            for name, version in versions(answer).items():
                assert self.has.get(name) != version or name in again, "said again"
                assert name in self.wanted
            assert not set(answer.removed) & versions(answer).keys()
            self.has |= versions(answer)
            for name in answer.removed:
                assert name in self.has or name in again, "taken away twice"
                self.has.pop(name, None)
            told = {*versions(answer), *answer.removed}
            self.nonce = answer.nonce
        assert {*again} <= told, "asked for, and neither given nor denied"
        assert self.server.owed(self.world.resolve) is None, "an answer that owes an answer"

    @rule(more=names, fewer=names)
    def subscribe(self, more: set[str], fewer: set[str]) -> None:
        more -= fewer
        self.server.receive(DeltaRequest(tuple(more), tuple(fewer), nonce=""))
        self.wanted = (self.wanted | more) - fewer
        for name in fewer:
            self.has.pop(name, None)
        self.take(self.server.owed(self.world.resolve), again=more)

    @rule(nonce=nonces, current=st.booleans(), refused=st.booleans())
    def answer(self, nonce: str, current: bool, refused: bool) -> None:
        """Acknowledgements, refusals and nonsense owe nothing."""
        self.server.receive(DeltaRequest(nonce=self.nonce if current else nonce, refused=refused))
        assert self.server.owed(self.world.resolve) is None

    @rule(there=worlds)
    def change(self, there: dict[str, str]) -> None:
        self.world.there = there
        self.take(self.server.owed(self.world.resolve))

    @rule()
    def reconnect(self) -> None:
        """Another stream carries on: only what differs is sent."""
        self.server = Incremental()
        self.nonce = ""
        wanted = {*self.wanted, "nothing"}
        self.server.receive(DeltaRequest(tuple(wanted), held=dict(self.has)))
        absent = wanted - self.has.keys() - self.world.there.keys()
        changed = {n for n, v in self.world.of(wanted).items() if self.has.get(n) != v}
        gone = self.has.keys() - self.world.there.keys()
        answer = self.server.owed(self.world.resolve)
        if answer:
            assert versions(answer).keys() == changed
            assert set(answer.removed) == absent | gone
        self.take(answer, again=absent)

    @invariant()
    def it_has_what_is_there(self) -> None:
        assert self.has == self.world.of(self.wanted)


_ENOUGH = settings(max_examples=40, stateful_step_count=25)
StateOfTheWorldClient.TestCase.settings = _ENOUGH
IncrementalClient.TestCase.settings = _ENOUGH
TestStateOfTheWorldClient = StateOfTheWorldClient.TestCase
TestIncrementalClient = IncrementalClient.TestCase


# --- the corners, one by one ---------------------------------------------------------------------

HERE = World({"default": "1", "ROOTCA": "1"})


def test_a_first_request_without_names_asks_for_everything() -> None:
    for server, request in (
        (StateOfTheWorld(), Request()),
        (StateOfTheWorld(), Request(("*",))),
    ):
        server.receive(request)
        answer = server.owed(HERE.resolve)
        assert answer
        assert versions(answer) == HERE.there
    for delta in (DeltaRequest(), DeltaRequest(("*",))):
        incremental = Incremental()
        incremental.receive(delta)
        answer = incremental.owed(HERE.resolve)
        assert answer
        assert versions(answer) == HERE.there


def test_no_names_after_names_asks_for_nothing() -> None:
    server = StateOfTheWorld()
    server.receive(Request(("default",)))
    answer = server.owed(HERE.resolve)
    assert answer
    server.receive(Request((), answer.nonce))
    assert server.owed(World({"default": "2"}).resolve) is None


def test_what_appears_later_is_sent_then() -> None:
    server = StateOfTheWorld()
    server.receive(Request(("default",)))
    assert server.owed(World().resolve) is None
    assert server.owed(World({"ROOTCA": "1"}).resolve) is None
    answer = server.owed(HERE.resolve)
    assert answer
    assert versions(answer) == {"default": "1"}


def test_the_last_secret_taken_away_is_an_answer_without_any() -> None:
    server = StateOfTheWorld()
    server.receive(Request(("default",)))
    assert server.owed(HERE.resolve)
    answer = server.owed(World().resolve)
    assert answer
    assert answer.resources == ()


def test_the_incremental_variant_says_that_a_name_is_unknown_once() -> None:
    server = Incremental()
    server.receive(DeltaRequest(("default",)))
    answer = server.owed(World().resolve)
    assert answer
    assert answer.removed == ("default",)
    assert server.owed(World().resolve) is None
    later = server.owed(HERE.resolve)
    assert later
    assert versions(later) == {"default": "1"}


def test_everything_is_withdrawn_at_once_and_once() -> None:
    server = Incremental()
    server.receive(DeltaRequest(("default", "ROOTCA")))
    server.owed(HERE.resolve)
    answer = server.withdrawn()
    assert answer
    assert answer.removed == ("ROOTCA", "default")
    assert server.withdrawn() is None


def test_a_response_is_refused_once() -> None:
    """So that a client cannot fill the log with one response."""
    server = StateOfTheWorld()
    server.receive(Request(("default",)))
    answer = server.owed(HERE.resolve)
    assert answer
    refusal = Request(("default",), answer.nonce, refused=True)
    assert [server.receive(refusal) for _ in range(3)] == [
        Receipt.REFUSED,
        Receipt.NOTHING,
        Receipt.NOTHING,
    ]


def test_after_a_refusal_the_next_version_is_sent() -> None:
    server = StateOfTheWorld()
    server.receive(Request(("default",)))
    first = server.owed(HERE.resolve)
    assert first
    server.receive(Request(("default",), first.nonce, refused=True))
    second = server.owed(World({"default": "2"}).resolve)
    assert second
    assert versions(second) == {"default": "2"}


@given(there=worlds, more=worlds)
def test_equal_content_has_an_equal_version(there: dict[str, str], more: dict[str, str]) -> None:
    told = []
    for world in (World(there), World(dict(reversed(there.items()))), World(more)):
        server = StateOfTheWorld()
        server.receive(Request())
        told.append(server.owed(world.resolve))
    first, again, other = told
    if first and again:
        assert first.version == again.version
    if first and other:
        assert (first.version == other.version) == (there == more)


@pytest.mark.parametrize(
    "wanted", [[str(n) for n in range(MAX_NAMES + 1)], ["x" * 2049], ["é" * 1025]]
)
def test_too_much_is_refused(wanted: list[str]) -> None:
    with pytest.raises(MalformedRequest):
        StateOfTheWorld().receive(Request(tuple(wanted)))
    for request in (
        DeltaRequest(tuple(wanted)),
        DeltaRequest(unsubscribe=tuple(wanted)),
        DeltaRequest(held=dict.fromkeys(wanted, "")),
    ):
        with pytest.raises(MalformedRequest):
            Incremental().receive(request)


def test_many_small_requests_cannot_subscribe_to_too_much() -> None:
    server = Incremental()
    server.receive(DeltaRequest(tuple(str(n) for n in range(MAX_NAMES))))
    with pytest.raises(MalformedRequest):
        server.receive(DeltaRequest(("one more",)))
