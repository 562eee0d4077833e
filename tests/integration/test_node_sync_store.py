"""Connected nodes when the store is away, shared with another broker, or read anew."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
import pytest

from identity_api.broker.v1 import entry_pb2, entry_pb2_grpc
from identity_broker.config.settings import Settings
from identity_broker.errors import WatchLagged
from identity_broker.lifecycle import directory, followers, node_stream
from identity_broker.store.changes import ChangeFeed
from support.following import FollowingNode, State, following
from support.line import AttestedClient, RunningBroker, reason_of, running, settings_in
from support.postgres import PostgresServer
from support.verifying import FollowingVerifier, closed, verifying

pytestmark = pytest.mark.postgresql


def shared(folder: Path, url: str) -> Settings:
    """Settings of one of several brokers on the same database; they share their keys' folder."""
    keys = folder.parent / "keys"
    keys.mkdir(mode=0o700, exist_ok=True)
    return settings_in(
        folder, ca={"key_manager": "file", "file": {"directory": str(keys)}}, store={"url": url}
    )


async def on(broker: RunningBroker, node: AttestedClient) -> AttestedClient:
    """The same node, calling another broker."""
    return AttestedClient(broker, node.key, node.svid, await broker.mtls(node.key, node.svid))


async def _knows(node: AttestedClient) -> bool:
    """Whether that broker has heard of the node by now."""
    try:
        await node.entries.ListAuthorized(entry_pb2.ListAuthorizedRequest())
    except grpc.aio.AioRpcError as error:
        return reason_of(error) != "NODE_UNKNOWN"
    return True


async def test_a_change_through_one_broker_reaches_the_nodes_of_another(
    tmp_path: Path, postgres_url: str
) -> None:
    async with (
        running(shared(tmp_path / "one", postgres_url)) as one,
        running(shared(tmp_path / "two", postgres_url)) as two,
    ):
        node = await one.join("web-1")
        elsewhere = await on(two, node)
        async with asyncio.timeout(5):
            while not await _knows(elsewhere):
                await asyncio.sleep(0.05)
        async with following(elsewhere) as follower:
            state = follower.state
            reading = asyncio.ensure_future(follower.update())
            started = time.perf_counter()
            entry = await one.entry("/api", "web-1")
            await reading
            assert time.perf_counter() - started < 1.0
            assert set(state.entries) == {entry.id}
            svid = (await node.issue(entry.id)).svid
            await one.revoke(id=svid.serial)
            await follower.until(lambda now: now.revoked == {svid.serial})
        # A position that one broker gave means the same to the other.
        later = await one.entry("/later", "web-1")
        async with following(node, state) as follower:
            [message] = follower.messages
            assert not message.full
            assert [item.id for item in message.changed] == [later.id]


async def test_a_verifier_may_go_from_one_broker_to_another(
    tmp_path: Path, postgres_url: str
) -> None:
    async with (
        running(shared(tmp_path / "one", postgres_url)) as one,
        running(shared(tmp_path / "two", postgres_url)) as two,
    ):
        node = await one.join("web-1")
        entry = await one.entry("/api", "web-1")
        serials = [(await node.issue(entry.id)).svid.serial for _ in range(3)]
        await one.revoke(id=serials[0])
        async with verifying(await two.admin()) as verifier:
            known = verifier.known
            await one.revoke(id=serials[1])
            await verifier.until(lambda now: now.revoked.keys() == set(serials[:2]))
        # Whatever one of them counts on, the other understands.
        await one.entry("/later", "web-1")
        await one.revoke(id=serials[2], order_id="last")
        async with verifying(await one.admin(), known, name="v1") as verifier:
            assert not verifier.messages[0].full
            assert [item.id for item in verifier.messages[0].revoked] == [serials[2]]
        async with verifying(await two.admin(), known) as verifier:
            assert not any((verifier.messages[0].full, verifier.messages[0].revoked))
        # It is closed by the broker that was told to revoke, once.
        first, second = await closed(one, "last"), await closed(two, "last")
        assert first.statement == second.statement


async def _silent(read: Callable[[], Coroutine[Any, Any, Any]]) -> asyncio.Task[Any]:
    """Read until nothing comes any more; return who still reads."""
    while True:
        reading = asyncio.create_task(read())
        done, _ = await asyncio.wait({reading}, timeout=1.5)
        if not done:
            return reading


async def test_what_may_be_stale_is_not_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "_SILENCE_SECONDS", 1.0)
    monkeypatch.setattr(directory, "_POLL_SECONDS", 0.3)
    monkeypatch.setattr(node_stream, "HEARTBEAT_SECONDS", 0.5)
    monkeypatch.setattr(followers, "HEARTBEAT_SECONDS", 0.5)
    monkeypatch.setattr("support.verifying.HEARTBEAT_MS", 500)
    server = PostgresServer()
    await asyncio.to_thread(server.start)
    try:
        settings = settings_in(
            tmp_path / "idb", ca={"key_manager": "memory"}, store={"url": server.url()}
        )
        async with running(settings) as broker:
            node = await broker.join("web-1")
            await broker.entry("/api", "web-1")
            async with following(node) as follower, verifying(node.channel) as verifier:
                await follower.update()  # a heartbeat
                await verifier.update()
                await asyncio.to_thread(server.kill)
                newcomer = FollowingNode(node.channel, State())
                assert reason_of(await newcomer.refusal()) == "STORE_UNAVAILABLE"
                stranger = FollowingVerifier(node.channel)
                assert reason_of(await stranger.refusal()) == "STORE_UNAVAILABLE"
                await asyncio.sleep(1.5)
                # Silence says it; heartbeats sent before it was noticed may still have come.
                reading = [await _silent(follower.update), await _silent(verifier.message)]
                await asyncio.to_thread(server.start)
                # The streams have outlived it.
                await asyncio.gather(*reading)
                async with asyncio.timeout(30):
                    while True:
                        try:
                            await broker.entry("/later", "web-1")
                            break
                        except grpc.aio.AioRpcError:
                            await asyncio.sleep(0.2)
                await follower.until(lambda state: "later" in state.paths)
    finally:
        await asyncio.to_thread(server.stop)


async def test_a_feed_that_no_longer_reaches_back_leaves_the_streams_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(settings_in(tmp_path / "idb", ca={"key_manager": "memory"})) as broker:
        node = await broker.join("web-1")
        gone = await broker.entry("/gone", "web-1")
        async with following(node) as follower:
            after = ChangeFeed.after
            lagged: list[int] = []

            async def lagging(self: ChangeFeed, seq: int, limit: int = 1000) -> object:
                changes = await after(self, seq, limit)
                if changes and not lagged:
                    lagged.append(seq)
                    raise WatchLagged
                return changes

            monkeypatch.setattr(ChangeFeed, "after", lagging)
            stub = await broker.stub(entry_pb2_grpc.EntryStub)
            await stub.BatchDelete(entry_pb2.BatchDeleteEntryRequest(ids=[gone.id]))
            await broker.entry("/new", "web-1")
            await follower.until(lambda state: state.paths == {"new"})
            assert lagged
            state = follower.state
            at = state.revision
        # The journal begins anew there.
        async with following(node, state) as follower:
            assert not follower.messages[0].full
            assert follower.messages[0].previous == at
