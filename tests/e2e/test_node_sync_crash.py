"""kill -9 under a connected node: it comes back to exactly what it may ask for, nothing missed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from identity_api.broker.v1 import entry_pb2
from support.dying_broker import child
from support.following import FollowingNode, State, following
from support.line import AttestedClient, RunningBroker, running, settings_in


async def _follow_until_it_dies(node: AttestedClient, state: State) -> None:
    follower = FollowingNode(node.channel, state)
    with pytest.raises(grpc.aio.AioRpcError):
        while True:
            await follower.update()


async def _change_until_it_dies(broker: RunningBroker) -> list[str]:
    made = []
    with pytest.raises(grpc.aio.AioRpcError):
        for number in range(200):
            entry = await broker.entry(f"/api/{number}", "web-1")
            made.append(entry.id)
    return made


@pytest.mark.parametrize(
    ("point", "count"),
    [("write:before", 5), ("write:after", 5), ("sync:before", 9), ("sync:after", 9)],
)
async def test_a_node_misses_nothing_of_what_was_acknowledged(
    tmp_path: Path, point: str, count: int
) -> None:
    directory = tmp_path / "idb"
    state = State()
    async with running(settings_in(directory)) as broker:
        node = await broker.join("web-1")
        before = await broker.entry("/before", "web-1")
        svid = (await node.issue(before.id)).svid
        await broker.revoke(id=svid.serial)
        async with following(node, state):
            assert state.paths == {"before"}
    async with child(directory, point, count) as broker:
        dying = AttestedClient(broker, node.key, node.svid, await broker.mtls(node.key, node.svid))
        following_it = asyncio.create_task(_follow_until_it_dies(dying, state))
        made = await _change_until_it_dies(broker)
        await following_it
    # Nothing it was told was not durable.
    async with running(settings_in(directory)) as broker:
        back = AttestedClient(broker, node.key, node.svid, await broker.mtls(node.key, node.svid))
        known = set(state.entries)
        async with following(back, state) as follower:
            allowed = await back.entries.ListAuthorized(entry_pb2.ListAuthorizedRequest())
            assert known <= {entry.id for entry in allowed.entries}
            assert {entry.id: entry.revision for entry in allowed.entries} == {
                entry.id: entry.revision for entry in state.entries.values()
            }
            assert set(state.entries) >= {before.id, *made}
            assert state.revoked == {svid.serial}
            # And what changes from now on reaches it.
            await broker.entry("/after", "web-1")
            await follower.until(lambda now: "after" in now.paths)
