"""Whoever follows an agent ends up with what the agent knows: in any order of joining, leaving,
lagging, losing the broker and coming back; and is never told that it has all when it may not.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from identity_api.broker.v1 import revocation_feed_pb2 as pb
from identity_broker.agent import relay as relay_module
from identity_broker.agent import relayed
from identity_broker.agent.denied import DeniedChange
from identity_broker.agent.mirror import Mirror
from identity_broker.agent.relay import WINDOW, Follower, Relay
from identity_broker.domain.clock import SystemClock
from identity_broker.errors import BrokerError, MalformedRequest, WatchLagged
from identity_ca.spiffe_id import TrustDomain
from identity_client.node.values import (
    SyncedBundle,
    SyncedEpoch,
    SyncedRevocation,
    SyncUpdate,
    Verifier,
)

NOW = datetime(2030, 1, 1, tzinfo=UTC)
BUNDLE = SyncedBundle("example.org", (b"root",), (), 1, timedelta(minutes=1))
NAMES = [f"{number:040x}" for number in range(8)]


async def unacknowledged(_revision: int) -> None: ...


def update(revision: int, previous: int, **fields: Any) -> SyncUpdate:
    defaults: dict[str, Any] = {
        "full": False,
        "entries": (),
        "removed_ids": (),
        "bundle": None,
        "revocations": (),
        "released_ids": (),
        "epochs": (),
        "denied_authorities": None,
        "crls": None,
        "entries_digest": 0,
        "sent_at": NOW,
        "_acknowledge": unacknowledged,
    }
    return SyncUpdate(revision=revision, previous=previous, **{**defaults, **fields})


def revoked(name: str, *, spiffe_id: str = "spiffe://example.org/web") -> SyncedRevocation:
    return SyncedRevocation(name, "x509", spiffe_id, NOW + timedelta(days=1), NOW)


class Site:
    """A mirror, its relay, and a broker that is heard or not."""

    def __init__(self) -> None:
        self.mirror = Mirror(TrustDomain("example.org"))
        self.heard = True
        self.reports = 0
        self.relay = Relay(
            self.mirror,
            SystemClock(),
            is_fresh=lambda: self.heard and self.mirror.synced,
            on_change=self.report,
        )
        self.hear(update(5, 0, full=True, bundle=BUNDLE, denied_authorities=()))

    def report(self) -> None:
        self.reports += 1

    def hear(self, told: SyncUpdate, tick: float = 0.0) -> DeniedChange:
        self.heard = True
        changed = self.mirror.apply(told, now=NOW, tick=tick)
        self.relay.told(
            changed.denied, concerned=bool(told.revocations or told.released_ids or told.epochs)
        )
        return changed.denied

    def tell(self, step: int = 1, **fields: Any) -> None:
        """One change of the broker."""
        at = self.mirror.revision
        self.hear(update(at + step, at, **fields))


class Told:
    """One who follows, as the protocol asks."""

    def __init__(self, site: Site, resume_from: int = 0, known: Told | None = None) -> None:
        self.refusals: list[BrokerError] = []
        self.follower: Follower = site.relay.join(
            "spiffe://example.org/web/1", 1, resume_from, self.refusals.append
        )
        self.site = site
        self.stream: AsyncIterator[bytes] = self.follower.messages()
        self.at = resume_from
        self.complete_at = 0
        self.denied: set[str] = set(known.denied) if known else set()
        self.epochs: dict[str, int] = dict(known.epochs) if known else {}
        self.authorities: set[str] = set(known.authorities) if known else set()
        self.unacknowledged: list[int] = []
        self.waiting: asyncio.Task[bytes] | None = None
        self.messages: list[pb.FollowResponse] = []
        self.octets: list[bytes] = []
        self.error: BrokerError | None = None
        self.made_before = False  # the message that waits was made before the broker was lost

    async def read(self) -> bool:
        """Take one message, if there is one."""
        if self.error is not None:
            return False
        if self.waiting is None:
            self.waiting = asyncio.ensure_future(anext(self.stream))
        for _ in range(3):
            await asyncio.sleep(0)
        if not self.waiting.done():
            return False
        task, self.waiting = self.waiting, None
        try:
            self.octets.append(task.result())
            self.apply(pb.FollowResponse.FromString(self.octets[-1]))
        except BrokerError as error:
            self.error = error
            return False
        return True

    def apply(self, message: pb.FollowResponse) -> None:
        self.messages.append(message)
        if message.full:
            self.denied, self.epochs, self.authorities = set(), {}, set()
        else:
            assert message.previous == self.at
            assert message.sequence >= self.at
        self.at = message.sequence
        self.denied |= {each.id for each in message.revoked}
        self.denied -= set(message.released_ids)
        self.epochs |= {each.spiffe_id: each.not_before for each in message.epochs}
        if message.HasField("denied_authorities"):
            self.authorities = set(message.denied_authorities.ids)
        if message.complete:
            assert self.site.heard or self.made_before, "complete, while the broker was not heard"
            self.complete_at = message.sequence
        self.made_before = False
        self.unacknowledged.append(message.sequence)

    async def read_all(self) -> None:
        self.acknowledge_all()
        while await self.read():
            self.acknowledge_all()

    def acknowledge_all(self) -> None:
        for sequence in self.unacknowledged:
            self.follower.acknowledge(sequence)
        self.unacknowledged.clear()

    async def leave(self) -> None:
        self.site.relay.leave(self.follower)
        if self.waiting is not None:
            self.waiting.cancel()
            await asyncio.wait({self.waiting})
        await cast("Any", self.stream).aclose()

    def has_all(self) -> bool:
        denied = self.site.mirror.denied
        return (
            self.denied == {each.id for each in denied.credentials().part(0, 10**6)}
            and self.authorities == denied.authorities
            and self.epochs.items()
            >= {each.spiffe_id: int(each.not_before.timestamp()) for each in denied.epochs}.items()
        )


class Following(RuleBasedStateMachine):
    """A few followers of one relay with a short memory."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(relay_module, "MOST_STEPS", 4)
        self.patch.setattr(relayed, "_MOST_REVOKED", 3)
        self.patch.setattr(relayed, "_MESSAGE_OCTETS", 150)
        self.site = self.run(self._made())
        self.here: list[Told] = []
        self.gone: list[Told] = []

    async def _made(self) -> Site:
        return Site()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    def teardown(self) -> None:
        for each in self.here:
            self.run(each.leave())
        self.patch.undo()
        self.loop.close()

    @rule(
        names=st.lists(st.sampled_from(NAMES), unique=True, max_size=8),
        released=st.lists(st.sampled_from(NAMES), unique=True, max_size=3),
        epochs=st.lists(st.integers(0, 9), max_size=2),
        denied=st.none() | st.frozensets(st.sampled_from("xyz")),
        step=st.integers(0, 3),
    )
    def change(
        self,
        names: list[str],
        released: list[str],
        epochs: list[int],
        denied: frozenset[str] | None,
        step: int,
    ) -> None:
        self.run(
            _soon(
                lambda: self.site.tell(
                    step,
                    revocations=tuple(map(revoked, names)),
                    released_ids=tuple(set(released) - set(names)),
                    epochs=tuple(
                        SyncedEpoch(
                            "spiffe://example.org/web",
                            NOW + timedelta(seconds=at),
                            NOW + timedelta(days=1),
                        )
                        for at in epochs
                    ),
                    denied_authorities=None if denied is None else tuple(denied),
                )
            )
        )

    @rule(names=st.lists(st.sampled_from(NAMES), unique=True, max_size=8), back=st.booleans())
    def replace(self, names: list[str], *, back: bool) -> None:
        """The broker tells everything, an older state if it insists."""
        revision = max(1, self.site.mirror.revision + (-2 if back else 1))
        told = update(
            revision,
            0,
            full=True,
            bundle=BUNDLE,
            revocations=tuple(map(revoked, names)),
            denied_authorities=("x",),
        )

        def insist() -> None:
            self.site.mirror._stale.since = -100.0
            self.site.hear(told)

        self.run(_soon(insist))

    @rule()
    def beat(self) -> None:
        self.run(_soon(self.site.relay.beat))

    @rule()
    def lose_the_broker(self) -> None:
        self.site.heard = False
        for each in self.here:
            each.made_before = each.waiting is not None and each.waiting.done()

    @precondition(lambda self: len(self.here) < 4)
    @rule(data=st.data())
    def join(self, data: st.DataObject) -> None:
        known = data.draw(st.sampled_from(self.gone)) if self.gone else None
        resume = known.complete_at if known is not None else 0
        if known is not None and known.complete_at != known.at:
            known, resume = None, 0
        self.run(_soon(lambda: self.here.append(Told(self.site, resume, known))))

    @precondition(lambda self: self.here)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.here))
        self.here.remove(one)
        self.run(one.leave())
        if one.error is None:
            self.gone = [*self.gone[-3:], one]

    @precondition(lambda self: self.here)
    @rule(data=st.data(), acknowledges=st.booleans())
    def read(self, data: st.DataObject, *, acknowledges: bool) -> None:
        one = data.draw(st.sampled_from(self.here))
        self.run(one.read())
        if acknowledges:
            one.acknowledge_all()

    @rule()
    def catch_up(self) -> None:
        """Everybody reads on: they have all, or were let go."""
        was_heard = self.site.heard
        for one in tuple(self.here):
            self.run(one.read_all())
            if one.error is not None:
                assert isinstance(one.error, WatchLagged)
                self.here.remove(one)
                self.run(one.leave())
                continue
            assert one.has_all() or one.epochs, (one.denied, one.authorities)
            if was_heard:
                assert one.complete_at == one.at
                assert one.follower.acknowledged == one.at

    @invariant()
    def reports_name_everybody_once(self) -> None:
        verifiers = self.site.relay.verifiers()
        assert len(verifiers) == (1 if self.here else 0)


async def _soon(work: Callable[[], Any]) -> None:
    work()


TestFollowing = Following.TestCase
TestFollowing.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


async def test_a_follower_is_sent_no_more_than_a_window() -> None:
    site = Site()
    one = Told(site)
    while await one.read():
        pass
    for number in range(2 * WINDOW):
        site.tell(revocations=(revoked(f"{number:040x}"),))
        while await one.read():
            pass
    assert len(one.messages) == WINDOW
    await one.read_all()
    one.acknowledge_all()
    await one.read_all()
    assert one.has_all()
    with pytest.raises(MalformedRequest):
        one.follower.acknowledge(one.at)
    await one.leave()


async def test_heartbeats_left_out_leave_no_gap() -> None:
    site = Site()
    one = Told(site)
    await one.read_all()
    for _ in range(50):
        site.tell(3)
        site.relay.beat()
    late = Told(site, one.at, one)
    await one.read_all()
    await late.read_all()
    assert one.at == late.at == site.mirror.revision
    assert len(late.messages) == 1
    assert len(one.messages) == 2
    await one.leave()
    await late.leave()


async def test_what_teaches_nothing_new_is_acknowledged_at_once() -> None:
    site = Site()
    one = Told(site)
    again = revoked("a" * 40)
    site.tell(revocations=(again,))
    await one.read_all()
    site.tell(revocations=(again,))
    await one.read_all()
    # Whoever waits for its acknowledgement does not wait for the next heartbeat.
    assert one.follower.acknowledged == site.mirror.revision
    number = site.relay.number
    site.tell()  # about something else
    assert site.relay.number == number
    await one.leave()


async def test_everybody_is_sent_the_same_octets() -> None:
    site = Site()
    followers = [Told(site) for _ in range(3)]
    for one in followers:
        await one.read_all()
    site.tell(revocations=tuple(revoked(f"{n:040x}") for n in range(6_000)))
    for one in followers:
        await one.read_all()
    assert all(one is two for one, two in pairwise(each.octets[1] for each in followers))
    for one in followers:
        assert one.has_all()
        assert [message.complete for message in one.messages] == [True, False, True]
        await one.leave()


async def test_reports_are_fair_to_users() -> None:
    site = Site()
    greedy = [site.relay.join(f"a/{pid}", 1, 0, lambda _: None) for pid in range(1_500)]
    other = site.relay.join("b/1", 2, 0, lambda _: None)
    twice = site.relay.join("b/1", 2, 5, lambda _: None)
    found = site.relay.verifiers()
    assert len(found) == 1_501
    assert Verifier("b/1", 0) in found[:2]
    assert site.reports == 1_502
    for each in (*greedy, other, twice):
        site.relay.leave(each)
    assert not site.relay.verifiers()
