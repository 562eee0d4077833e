"""A thousand verifiers: what is told is composed and serialized once, whoever is told it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from identity_api.broker.v1 import revocation_feed_pb2 as pb
from identity_broker.domain.credential import RevocationReason
from identity_broker.domain.revocation import RevocationOrder, SubjectKind
from identity_broker.domain.selection import subject
from identity_broker.errors import WatchLagged
from identity_broker.lifecycle import feed as feed_module
from identity_broker.lifecycle.feed import Batch, RevocationFeed
from identity_broker.lifecycle.followers import Follower, Hello
from identity_broker.lifecycle.propagation import Propagation
from identity_broker.lifecycle.revoke import OrderRequest
from identity_broker.lifecycle.verifiers import Verifiers
from identity_broker.server.rpc.convert.revocation_feed import Bodies, to_envelope
from support.verbs import DOMAIN, OPERATOR, Parts

VERIFIERS = 1000
LONG = timedelta(seconds=30)


class Audience:
    """Verifiers that take, parse no byte of and acknowledge whatever they are told."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.verifiers = Verifiers()
        self.feed = RevocationFeed(parts.directory, self.verifiers)
        self.propagation = Propagation(
            self.verifiers, parts.directory, parts.clock, needed=self.feed.needed
        )
        parts.revoke.on_committed.append(self.propagation.begun)
        self.bodies = Bodies()
        self.told: list[Batch] = []
        self.bytes_of: dict[Follower, list[bytes]] = {}
        self.following: list[asyncio.Task[None]] = []

    async def connect(self, count: int, resume_from: int = 0) -> None:
        hellos = [
            Hello("spiffe://example.org/api", f"v{at}", "", resume_from) for at in range(count)
        ]
        followers = await asyncio.gather(*map(self.feed.open, hellos))
        self.following += [asyncio.create_task(self._follow(one)) for one in followers]

    async def _follow(self, follower: Follower) -> None:
        try:
            while (batch := await self.feed.next(follower)) is not None:
                self.told.append(batch)
                first = True
                for body, last in self.bodies.of(batch):
                    envelope = to_envelope(
                        batch,
                        first=first,
                        complete=last,
                        now=self.parts.clock.now(),
                        heartbeat=5,
                        spread=self.feed.spread,
                    )
                    follower.handed(batch.sequence, None, complete=last)
                    self.bytes_of.setdefault(follower, []).append(envelope + body)
                    await asyncio.sleep(0)  # as a write does
                    self.feed.acknowledged(follower, batch.sequence)
                    first = False
        finally:
            self.feed.close(follower)

    async def revoke(self, kind: SubjectKind, value: str) -> RevocationOrder:
        wanted = subject(kind, value, trust_domain=DOMAIN, now=self.parts.clock.now())
        request = OrderRequest(wanted, RevocationReason.KEY_COMPROMISE, without_hold=True)
        return (await self.parts.revoke.order(request, OPERATOR)).order

    async def leave(self) -> None:
        for task in self.following:
            task.cancel()
        await asyncio.gather(*self.following, return_exceptions=True)
        self.following.clear()


@pytest.fixture
async def audience(parts: Parts) -> AsyncIterator[Audience]:
    await parts.admit()
    built = Audience(parts)
    yield built
    await built.leave()
    assert len(built.feed) == len(built.verifiers) == 0


async def test_what_a_thousand_are_told_is_made_once(parts: Parts, audience: Audience) -> None:
    svids = [await parts.svid() for _ in range(3)]
    await audience.revoke(SubjectKind.SERIAL, svids[0].serial)
    await audience.connect(VERIFIERS)
    while len(audience.told) < VERIFIERS:
        await asyncio.sleep(0)
    assert len({id(batch) for batch in audience.told}) == 1
    assert audience.bodies.serialized == 1
    audience.told.clear()
    order = await audience.revoke(SubjectKind.SERIAL, svids[1].serial)
    report = await audience.propagation.settled(order, LONG)
    assert (report.told, report.acknowledged) == (VERIFIERS, VERIFIERS)
    assert len({id(batch) for batch in audience.told}) == 1
    assert len(audience.told) == VERIFIERS
    assert audience.bodies.serialized == 2
    # One message each, and the same but for what is each one's own.
    for octets in audience.bytes_of.values():
        [_, told] = [pb.FollowResponse.FromString(one) for one in octets]
        assert [one.id for one in told.revoked] == [svids[1].serial]
        assert told.complete
        assert told.reconnect_spread_ms == 2000


async def test_all_who_come_back_share_what_they_missed(parts: Parts, audience: Audience) -> None:
    svids = [await parts.svid() for _ in range(2)]
    await audience.revoke(SubjectKind.SERIAL, svids[0].serial)
    at = parts.directory.seq
    order = await audience.revoke(SubjectKind.SERIAL, svids[1].serial)
    await audience.connect(VERIFIERS, resume_from=at)
    report = await audience.propagation.settled(order, LONG)
    assert report.acknowledged == 0  # nobody was connected when it committed
    async with asyncio.timeout(30):
        while (await audience.propagation.report(order)).acknowledged < VERIFIERS:
            await asyncio.sleep(0.01)
    assert {one.latency_ms for one in (await audience.propagation.report(order)).verifiers} == {-1}
    assert audience.bodies.serialized == 1
    assert [one.id for one in audience.told[0].revocations] == [svids[1].serial]


async def test_a_verifier_that_lags_is_told_all_at_once_and_then_let_go(
    parts: Parts, audience: Audience, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "MOST_RECENT", 4)
    monkeypatch.setattr(parts.directory, "journal", type(parts.directory.journal)(4))
    parts.directory.journal.restart(parts.directory.seq)
    audience.feed = RevocationFeed(parts.directory, audience.verifiers)
    follower = await audience.feed.open(Hello("uid:0"))
    await audience.feed.next(follower)
    for _ in range(4):
        await audience.revoke(SubjectKind.SERIAL, (await parts.svid()).serial)
    joined = await audience.feed.next(follower)
    assert joined is not None
    assert len(joined.revocations) == 4
    for _ in range(5):
        await audience.revoke(SubjectKind.SERIAL, (await parts.svid()).serial)
    with pytest.raises(WatchLagged):
        await audience.feed.next(follower)
    audience.feed.close(follower)


async def test_what_is_kept_of_batches_is_bounded(
    parts: Parts, audience: Audience, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "MOST_KEPT", 3)
    for _ in range(8):
        await audience.revoke(SubjectKind.SERIAL, (await parts.svid()).serial)
    last = parts.directory.seq
    for at in range(last - 6, last + 1):
        follower = await audience.feed.open(Hello("uid:0", "", "", at))
        batch = await audience.feed.next(follower)
        assert batch is not None
        assert audience.feed._kept <= 3
        assert sum(1 + len(one) for one in audience.feed._made.values()) <= 3
        audience.feed.close(follower)
