"""A thousand connected nodes: a change costs as much as it concerns nodes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from identity_broker.domain import names
from identity_broker.domain.node import Node
from identity_broker.domain.selector import Selector
from identity_broker.lifecycle.node_stream import News, NodeStream, Resume
from identity_broker.lifecycle.roster import Roster
from identity_broker.lifecycle.sync import NodeSync, entry_digest
from identity_broker.store import Repositories
from identity_ca.spiffe_id import SpiffeId
from support.following import FollowingNode, applied_by
from support.line import node_id, running, settings_in
from support.verbs import DOMAIN, START, Parts

NODES = 1000
GROUP = SpiffeId.from_segments(DOMAIN, "group", "all")
EVERYONE = Selector("join_token", "name:all")


class Fleet:
    """Nodes that take and acknowledge whatever they are told, without a network."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.roster = Roster()
        self.sync = NodeSync(
            directory=parts.directory,
            authorize=parts.authorize,
            roster=self.roster,
            trust_domain=DOMAIN,
            clock=parts.clock,
            bundle=lambda: parts.signing.bundle,
            lists=lambda: (),
        )
        self.ids = [names.node_id(DOMAIN, "join_token", f"n{at}") for at in range(NODES)]
        self.told: list[tuple[SpiffeId, News, float]] = []
        self._following: list[asyncio.Task[None]] = []

    async def attest(self) -> None:
        """Store the nodes."""

        def write(repos: Repositories) -> None:
            for key in self.ids:
                repos.nodes.upsert(
                    Node(
                        spiffe_id=key,
                        attestor="join_token",
                        selectors=frozenset({EVERYONE}),
                        attested_at=START,
                        serial="00" * 20,
                        expires_at=START + timedelta(hours=1),
                        reattestable=False,
                    )
                )

        await self.parts.store.write(write)
        await self.parts.directory.sync()

    async def connect(self, resume: Resume | None = None) -> None:
        """Connect all at once."""
        streams = await asyncio.gather(*(self.sync.open(key, resume) for key in self.ids))
        self._following = [asyncio.create_task(self._follow(stream)) for stream in streams]
        await self.quiet()

    async def _follow(self, stream: NodeStream) -> None:
        try:
            while (news := await self.sync.next(stream)) is not None:
                self.told.append((stream.node_id, news, time.perf_counter()))
                stream.acknowledge(news.revision)
                self.roster.progressed(stream)
        finally:
            self.sync.close(stream)

    async def quiet(self) -> None:
        """Wait until everybody has applied what there is."""
        answer = await self.roster.applied(self.parts.directory.seq, (), timedelta(seconds=30))
        assert not answer.pending

    async def leave(self) -> None:
        for task in self._following:
            task.cancel()
        await asyncio.gather(*self._following, return_exceptions=True)
        assert len(self.roster) == 0


@pytest.fixture
async def fleet(parts: Parts) -> AsyncIterator[Fleet]:
    built = Fleet(parts)
    await built.attest()
    await built.connect()
    assert len(built.roster) == NODES
    built.told.clear()
    yield built
    await built.leave()


async def test_a_change_touches_only_the_streams_it_concerns(parts: Parts, fleet: Fleet) -> None:
    started = time.perf_counter()
    entry = await parts.register("one", "/one", parent_id=fleet.ids[7])
    await fleet.quiet()
    assert time.perf_counter() - started < 1.0
    [(who, news, at)] = fleet.told
    assert who == fleet.ids[7]
    assert [item.id for item in news.changed] == [entry.id]
    assert at - started < 0.25


async def test_a_group_of_all_is_told_to_all(parts: Parts, fleet: Fleet) -> None:
    await parts.register(
        "group",
        "/group/all",
        parent_id=names.broker_id(DOMAIN),
        selectors=frozenset({EVERYONE}),
    )
    await fleet.quiet()
    assert not fleet.told  # nobody is below it yet
    started = time.perf_counter()
    entry = await parts.register("shared", "/shared", parent_id=GROUP)
    await fleet.quiet()
    took = time.perf_counter() - started
    assert {who for who, _, _ in fleet.told} == set(fleet.ids)
    assert len(fleet.told) == NODES
    assert {news.entries_digest for _, news, _ in fleet.told} == {entry_digest(entry.id, 1)}
    assert took < 2.0
    fleet.told.clear()
    await parts.store.write(lambda repos: repos.entries.delete("group"))
    await parts.directory.sync()
    await fleet.quiet()
    assert [news.removed_ids for _, news, _ in fleet.told] == [("shared",)] * NODES


async def test_all_come_back_at_once(
    parts: Parts, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    await parts.register("one", "/one", parent_id=fleet.ids[7])
    await fleet.quiet()
    at = parts.directory.seq
    await fleet.leave()
    fleet.told.clear()
    reads = 0
    after = parts.store.changes.after

    async def counted(seq: int, limit: int = 1000) -> object:
        nonlocal reads
        reads += 1
        return await after(seq, limit)

    monkeypatch.setattr(parts.store.changes, "after", counted)
    await parts.register("two", "/two", parent_id=fleet.ids[8])
    reads = 0
    await fleet.connect(Resume(at, 0))
    assert reads < 10
    full = {who for who, news, _ in fleet.told if news.full}
    # One of them is not where it says it is: it had an entry.
    assert full == {fleet.ids[7]}
    assert fleet.roster.spread == timedelta(seconds=2)


@pytest.mark.slow
async def test_a_thousand_streams_on_the_wire(tmp_path: Path) -> None:
    settings = settings_in(
        tmp_path / "idb",
        ca={"key_manager": "memory"},
        limits={"attest_per_second": 1000, "attest_burst": 1000},
    )
    async with running(settings) as broker:
        nodes = [await broker.join(f"n{at}") for at in range(125)]
        streams = [FollowingNode(node.channel) for node in nodes for _ in range(8)]
        first = [(await stream.update())[0] for stream in streams]
        assert all(message.reconnect_spread_ms <= 2 * 125 for message in first)
        # They open at once, in no order: the last of them saw nearly all the others.
        assert max(message.reconnect_spread_ms for message in first) > 2 * 100
        took = []
        for number in range(20):
            concerned = streams[8 * number : 8 * number + 8]
            reading = [asyncio.ensure_future(stream.update()) for stream in concerned]
            started = time.perf_counter()
            await broker.entry(f"/api/{number}", f"n{number}")
            await asyncio.gather(*reading)
            took.append(time.perf_counter() - started)
        assert sorted(took)[-2] < 0.25, sorted(took)
        answer = await applied_by(broker, node_id("n0"))
        assert answer.connected == len(answer.applied) == 125
        for stream in streams:
            stream.call.cancel()
