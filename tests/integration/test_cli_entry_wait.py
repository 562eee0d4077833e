"""`idb entry … --wait` and the admin client's wait: read your writes on the agents concerned.

- The agents are real streams of attested nodes, which acknowledge when the test lets them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from identity_api.broker.v1 import node_sync_pb2, node_sync_pb2_grpc
from identity_client.admin import AdminClient, Applied, UnixTarget, client
from identity_client.errors import RequestRejected
from support.broker import Ran, run_idb
from support.line import RunningBroker, node_id, running, settings_in


class Follower:
    """An agent as far as its stream goes."""

    def __init__(self) -> None:
        self.may_acknowledge = asyncio.Event()
        self.may_acknowledge.set()
        self.synced = asyncio.Event()
        self.entries: dict[str, str] = {}
        self._acks: asyncio.Queue[int] = asyncio.Queue()

    async def follow(self, stub: Any) -> None:
        async def steps() -> AsyncIterator[node_sync_pb2.SyncRequest]:
            yield node_sync_pb2.SyncRequest(hello=node_sync_pb2.SyncRequest.Hello())
            while True:
                revision = await self._acks.get()
                await self.may_acknowledge.wait()
                yield node_sync_pb2.SyncRequest(
                    ack=node_sync_pb2.SyncRequest.Ack(revision=revision)
                )

        async for message in stub.Sync(steps()):
            if message.full:
                self.entries.clear()
            for entry in message.changed:
                self.entries[entry.id] = entry.spiffe_id
            for entry_id in message.removed_ids:
                self.entries.pop(entry_id, None)
            self._acks.put_nowait(message.revision)
            if message.complete:
                self.synced.set()


@asynccontextmanager
async def following(broker: RunningBroker, name: str) -> AsyncIterator[Follower]:
    node = await broker.join(name)
    follower = Follower()
    task = asyncio.create_task(follower.follow(node_sync_pb2_grpc.NodeSyncStub(node.channel)))
    try:
        async with asyncio.timeout(10):
            await follower.synced.wait()
        yield follower
    finally:
        task.cancel()
        await asyncio.wait({task})


@pytest.fixture
async def local(tmp_path: Path) -> AsyncIterator[RunningBroker]:
    settings = settings_in(tmp_path / "idb", ca={"key_manager": "memory"})
    async with running(settings) as broker:
        yield broker


async def idb(broker: RunningBroker, *arguments: str) -> Ran:
    socket = str(broker.addresses.admin_socket)
    return await asyncio.to_thread(run_idb, "--socket", socket, *arguments)


def create(entry_id: str, parent: str, *more: str) -> list[str]:
    return [
        *("entry", "create", "--id", entry_id, "--spiffe-id", f"/tests/{entry_id}"),
        *("--parent", parent, "--selector", "unix:uid:1000", *more),
    ]


async def test_a_change_is_applied_when_the_command_returns(local: RunningBroker) -> None:
    async with following(local, "web-1") as agent:
        made = await idb(local, *create("e-1", "web-1", "--wait", "-o", "json"))
        assert made.code == 0, made.err
        assert made.json["id"] == "e-1"
        assert "applied by its agent" in made.err
        assert agent.entries == {"e-1": "spiffe://example.org/tests/e-1"}

        changed = await idb(local, "entry", "update", "e-1", "--disable", "--wait")
        assert changed.code == 0, changed.err
        assert agent.entries == {}
        await idb(local, "entry", "update", "e-1", "--enable", "--wait")
        assert set(agent.entries) == {"e-1"}
        deleted = await idb(local, "entry", "delete", "e-1", "--wait")
        assert (deleted.code, deleted.out) == (0, "e-1\n")
        assert "the one connected agent is up to date" in deleted.err
        assert agent.entries == {}


async def test_an_agent_that_does_not_answer_in_time_is_named(local: RunningBroker) -> None:
    async with following(local, "web-1") as agent:
        agent.may_acknowledge.clear()
        made = await idb(local, *create("e-1", "web-1", "--wait", "--timeout", "1s", "-o", "json"))
        assert made.code == 6
        assert made.json["id"] == "e-1"  # stored, and shown
        assert made.error["reason"] == "NOT_APPLIED_IN_TIME"
        assert node_id("web-1") in made.error["message"]
        assert "idb agent status" in made.error["hint"]
        assert (await idb(local, "entry", "show", "e-1")).code == 0
        # And once it does, a command that waits comes back.
        waiting = asyncio.create_task(idb(local, "entry", "update", "e-1", "--hint", "x", "--wait"))
        await asyncio.sleep(0.5)
        agent.may_acknowledge.set()
        assert (await waiting).code == 0


async def test_a_node_that_is_named_is_waited_for_while_it_is_away(local: RunningBroker) -> None:
    late = await idb(local, *create("e-1", "web-1", "--wait", "--timeout", "1s"))
    assert late.code == 6
    assert "reason: NOT_APPLIED_IN_TIME" in late.err
    waiting = asyncio.create_task(idb(local, *create("e-2", "web-1", "--wait", "--timeout", "30s")))
    await asyncio.sleep(0.5)
    async with following(local, "web-1") as agent:
        done = await waiting
        assert done.code == 0, done.err
        assert set(agent.entries) == {"e-1", "e-2"}


async def test_without_agents_there_is_nobody_to_wait_for(local: RunningBroker) -> None:
    group = [
        *("entry", "create", "--id", "g", "--spiffe-id", "/group/web", "--parent", "broker"),
        *("--selector", "join_token:name:web-1", "--wait"),
    ]
    made = await idb(local, *group)
    assert made.code == 0, made.err
    assert "no agent is connected" in made.err
    assert (await idb(local, "entry", "delete", "g", "--wait")).code == 0


async def test_what_failed_is_the_commands_failure_whatever_the_wait_says(
    local: RunningBroker,
) -> None:
    assert (await idb(local, *create("e-1", "web-1"))).code == 0
    async with following(local, "web-1") as agent:
        agent.may_acknowledge.clear()
        done = await idb(local, "entry", "delete", "e-1", "none", "--wait", "--timeout", "500ms")
        assert done.code == 2  # no such unit of time
        done = await idb(local, "entry", "delete", "e-1", "none", "--wait", "--timeout", "1s")
        assert done.code == 4
        assert done.out == "e-1\n"
        assert "NOT_APPLIED_IN_TIME" in done.err
        assert "ENTRY_NOT_FOUND" in done.err
        # Nothing was changed: nothing to wait for.
        again = await idb(local, "entry", "delete", "none", "--wait")
        assert again.code == 4
        assert "NOT_APPLIED_IN_TIME" not in again.err


async def test_the_admin_client_waits_for_many_and_says_who_is_late(local: RunningBroker) -> None:
    def wait(names: list[str], milliseconds: int) -> Applied:
        with AdminClient(UnixTarget(local.addresses.admin_socket)) as admin:
            return admin.nodes.wait_applied(
                [node_id(name) for name in names], timeout=timedelta(milliseconds=milliseconds)
            )

    async with following(local, "web-1"), following(local, "web-2") as second:
        found = await asyncio.to_thread(wait, [], 5000)
        assert (found.pending, found.connected) == ((), 2)
        assert found.applied == (node_id("web-1"), node_id("web-2"))
        # More than one call's worth of names, most of them nobody's.
        names = ["web-1", *(f"away-{number}" for number in range(130))]
        found = await asyncio.to_thread(wait, names, 300)
        assert len(found.pending) == 130
        assert node_id("web-1") in found.applied
        second.may_acknowledge.clear()
        await local.entry("/late", "web-2")
        found = await asyncio.to_thread(wait, [], 200)
        assert found.pending == (node_id("web-2"),)
        with pytest.raises(RequestRejected):
            await asyncio.to_thread(wait, ["/not a name/"], 200)


async def test_a_long_wait_is_made_of_calls_that_a_broker_takes(
    local: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_AWAIT_SECONDS", 0.2)

    def wait() -> Applied:
        with AdminClient(UnixTarget(local.addresses.admin_socket)) as admin:
            return admin.nodes.wait_applied([node_id("web-1")], timeout=timedelta(seconds=20))

    waiting = asyncio.create_task(asyncio.to_thread(wait))
    await asyncio.sleep(1)
    assert not waiting.done()
    async with following(local, "web-1"):
        found = await waiting
    assert (found.applied, found.pending) == ((node_id("web-1"),), ())
