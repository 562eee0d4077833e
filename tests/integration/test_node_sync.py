"""What a connected node is told: everything, then what changes, and nobody waits for a slow one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from identity_api.broker.v1 import (
    authority_pb2,
    entry_pb2,
    entry_pb2_grpc,
    node_pb2,
    node_pb2_grpc,
    node_sync_pb2_grpc,
    revocation_pb2,
    types_pb2,
)
from identity_api.broker.v1 import node_sync_pb2 as pb
from identity_broker.lifecycle import acknowledged, node_stream, roster
from identity_broker.server.app import BoundAddresses, run_broker
from support.following import FollowingNode, State, applied_by, following
from support.line import (
    TRUST_DOMAIN,
    AttestedClient,
    RunningBroker,
    node_id,
    reason_of,
    running,
    settings_in,
)

BROKER_ID = f"spiffe://{TRUST_DOMAIN}/idb/broker"
GROUP = f"spiffe://{TRUST_DOMAIN}/group/web"
# On a machine with other work to do; alone it is a few.
SOON = 5.0


@pytest.fixture
async def one_broker(tmp_path: Path) -> AsyncIterator[RunningBroker]:
    """One kind of store is enough where none is asked."""
    async with running(settings_in(tmp_path / "idb", ca={"key_manager": "memory"})) as broker:
        yield broker


async def entries_of(broker: RunningBroker) -> Any:
    return await broker.stub(entry_pb2_grpc.EntryStub)


async def delete(broker: RunningBroker, *ids: str) -> None:
    stub = await entries_of(broker)
    answer = await stub.BatchDelete(entry_pb2.BatchDeleteEntryRequest(ids=ids))
    assert all(result.status.code == 0 for result in answer.results)


async def update(broker: RunningBroker, entry_id: str, field: str, **values: Any) -> None:
    stub = await entries_of(broker)
    item = entry_pb2.BatchUpdateEntryRequest.Item(
        entry=types_pb2.RegistrationEntry(id=entry_id, **values), fields=[field]
    )
    answer = await stub.BatchUpdate(entry_pb2.BatchUpdateEntryRequest(items=[item]))
    assert answer.results[0].status.code == 0, answer


async def group(broker: RunningBroker, *names: str, **fields: Any) -> str:
    """Register the group of the nodes of these names; return the entry's id."""
    selectors = [types_pb2.Selector(type="join_token", value=f"name:{name}") for name in names]
    entry = await broker.entry("/group/web", "", parent_id=BROKER_ID, selectors=selectors, **fields)
    return str(entry.id)


async def authorized(node: AttestedClient) -> dict[str, int]:
    answer = await node.entries.ListAuthorized(entry_pb2.ListAuthorizedRequest())
    return {entry.id: entry.revision for entry in answer.entries}


def told(follower: FollowingNode) -> dict[str, int]:
    return {entry.id: entry.revision for entry in follower.state.entries.values()}


async def test_the_first_message_is_everything(broker: RunningBroker) -> None:
    node = await broker.join("web-1")
    await broker.join("web-2")
    mine = await broker.entry("/payments/api", "web-1")
    await broker.entry("/other", "web-2")
    svid = (await node.issue(mine.id)).svid
    await broker.revoke(id=svid.serial)
    async with following(node) as follower:
        [message] = follower.messages
        assert message.full
        assert message.complete
        assert not message.previous
        assert message.reconnect_spread_ms == 0
        assert abs(message.sent_at_ms / 1000 - time.time()) < 60
        assert follower.state.paths == {"payments/api"}
        assert follower.state.revoked == {svid.serial}
        bundle = follower.state.bundle
        assert bundle is not None
        assert bundle.trust_domain == TRUST_DOMAIN
        assert follower.state.crls
        assert message.HasField("denied_authorities")
        assert not message.denied_authorities.ids
        assert told(follower) == await authorized(node)


async def test_a_change_is_told_at_once_and_only_to_those_concerned(broker: RunningBroker) -> None:
    one, two = await broker.join("web-1"), await broker.join("web-2")
    async with following(one) as first, following(two) as second:
        began = second.state.revision
        took = []
        entry = types_pb2.RegistrationEntry()
        for number in range(5):
            reading = asyncio.ensure_future(first.update())
            started = time.perf_counter()
            entry = await broker.entry(f"/api/{number}", "web-1")
            [message] = await reading
            took.append(time.perf_counter() - started)
            assert [item.id for item in message.changed] == [entry.id]
            assert not message.full
            assert not message.HasField("bundle")
            assert not message.HasField("lists")
        assert sorted(took)[2] < SOON
        await update(broker, entry.id, "hint", hint="blue")
        [message] = await first.update()
        assert [item.hint for item in message.changed] == ["blue"]
        await update(broker, entry.id, "disabled", disabled=True)
        [message] = await first.update()
        assert list(message.removed_ids) == [entry.id]
        await update(broker, entry.id, "disabled", disabled=False)
        await first.update()
        await update(broker, entry.id, "parent_id", parent_id=node_id("web-2"))
        [message] = await first.update()
        assert list(message.removed_ids) == [entry.id]
        # The other node hears of it now, and for the first time.
        [message] = await second.update()
        assert message.previous == began
        assert told(second) == {entry.id: 5} == await authorized(two)
        started = time.perf_counter()
        await delete(broker, entry.id)
        [message] = await second.update()
        assert time.perf_counter() - started < 2 * SOON
        assert list(message.removed_ids) == [entry.id]
        assert told(first) == await authorized(one)


async def test_a_node_joins_and_leaves_groups_under_its_stream(broker: RunningBroker) -> None:
    one, two = await broker.join("web-1"), await broker.join("web-2")
    async with following(one) as first, following(two) as second:
        below = await broker.entry("/below", "", parent_id=GROUP)
        named = await group(broker, "web-1")
        await first.until(lambda state: "below" in state.paths)
        await update(
            broker,
            named,
            "selectors",
            selectors=[types_pb2.Selector(type="join_token", value="name:web-2")],
        )
        await first.until(lambda state: "below" not in state.paths)
        await second.until(lambda state: "below" in state.paths)
        # Two entries name the group: to leave one of them is not to leave the group.
        again = await broker.entry(
            "/group/web",
            "",
            parent_id=BROKER_ID,
            selectors=[types_pb2.Selector(type="join_token", value="name:web-2")],
            x509_ttl_seconds=60,
            expect="ENTRY_EXISTS",
        )
        assert again.id == named
        await update(broker, below.id, "hint", hint="still here")
        await second.until(lambda state: state.entries[below.id].hint == "still here")
        await delete(broker, named)
        await second.until(lambda state: not state.entries)
        assert await authorized(one) == await authorized(two) == {}


async def test_a_group_s_time_runs_out(broker: RunningBroker) -> None:
    node = await broker.join("web-1")
    await broker.entry("/below", "", parent_id=GROUP)
    await group(broker, "web-1", expires_at=int(time.time()) + 2)
    async with following(node) as follower:
        assert follower.state.paths == {"below"}
        await follower.until(lambda state: not state.entries)
        assert await authorized(node) == {}


async def test_an_expired_entry_is_for_the_node_to_leave_out(broker: RunningBroker) -> None:
    node = await broker.join("web-1")
    entry = await broker.entry("/brief", "web-1", expires_at=int(time.time()) + 1)
    await asyncio.sleep(1.1)
    async with following(node) as follower:
        assert told(follower) == {entry.id: 1}
        assert follower.state.entries[entry.id].expires_at == entry.expires_at
        assert await authorized(node) == {}


async def test_a_node_that_comes_back_is_told_what_it_missed(broker: RunningBroker) -> None:
    node = await broker.join("web-1")
    kept = await broker.entry("/kept", "web-1")
    gone = await broker.entry("/gone", "web-1")
    async with following(node) as follower:
        state = follower.state
        at = state.revision
    new = await broker.entry("/new", "web-1")
    await delete(broker, gone.id)
    brief = await broker.entry("/brief", "web-1")
    await delete(broker, brief.id)
    svid = (await node.issue(kept.id)).svid
    await broker.revoke(id=svid.serial)
    async with following(node, state) as follower:
        [message] = follower.messages
        assert not message.full
        assert message.previous == at
        assert [item.id for item in message.changed] == [new.id]
        assert list(message.removed_ids) == [gone.id]
        assert [item.id for item in message.revocations] == [svid.serial]
        assert message.HasField("bundle")
        assert message.HasField("lists")
        assert told(follower) == await authorized(node)
    async with following(node, state) as follower:
        [message] = follower.messages
        assert not any(
            (message.full, message.changed, message.removed_ids, message.revocations),
        )


@pytest.mark.parametrize("what", ["digest", "future", "group"])
async def test_a_node_in_doubt_is_told_everything(broker: RunningBroker, what: str) -> None:
    node = await broker.join("web-1")
    entry = await broker.entry("/kept", "web-1")
    below = await broker.entry("/below", "", parent_id=GROUP)
    named = await group(broker, "web-1")
    async with following(node) as follower:
        state = follower.state
    assert state.paths == {"kept", "below"}
    if what == "digest":
        del state.entries[entry.id]
    elif what == "future":
        state.revision += 1_000_000
    else:
        await delete(broker, named)
    async with following(node, state) as follower:
        assert follower.messages[0].full
        assert told(follower) == await authorized(node)
        assert (below.id in state.entries) == (what != "group")


async def test_a_broker_that_was_restarted_need_not_tell_everything(tmp_path: Path) -> None:
    settings = settings_in(tmp_path / "idb")
    async with running(settings) as broker:
        node = await broker.join("web-1")
        kept = await broker.entry("/kept", "web-1")
        async with following(node) as follower:
            state = follower.state
        # Missed, and committed before the next broker was there.
        await broker.join("web-2")
        await broker.entry("/other", "web-2")
        revoked = (await node.issue(kept.id)).svid.serial
        await broker.revoke(id=revoked)
    async with running(settings) as broker:
        back = AttestedClient(broker, node.key, node.svid, await broker.mtls(node.key, node.svid))
        async with following(back, state) as follower:
            assert not follower.messages[0].full
            assert state.revoked == {revoked}
        new = await broker.entry("/new", "web-1")
    async with running(settings) as broker:
        back = AttestedClient(broker, node.key, node.svid, await broker.mtls(node.key, node.svid))
        async with following(back, state) as follower:
            # What it was before is not known any more, so it has to be everything.
            assert follower.messages[0].full
            assert told(follower) == await authorized(back)
            assert new.id in state.entries


async def test_a_large_state_comes_in_pieces(broker: RunningBroker) -> None:
    node = await broker.join("web-1")
    stub = await entries_of(broker)
    for batch in range(3):
        request = entry_pb2.BatchCreateEntryRequest(
            entries=[
                types_pb2.RegistrationEntry(
                    spiffe_id=f"spiffe://{TRUST_DOMAIN}/many/{batch}-{number}",
                    parent_id=node_id("web-1"),
                    selectors=[types_pb2.Selector(type="unix", value="uid:1000")],
                    hint=f"{number:04}" * 256 if batch == 0 else "",
                    labels={f"l{at}": "v" * 256 for at in range(16)} if batch == 0 else {},
                )
                for number in range(500)
            ]
        )
        answer = await stub.BatchCreate(request)
        assert {result.status.message for result in answer.results} == {""}
    async with following(node) as follower:
        assert len(follower.messages) > 3
        assert [message.complete for message in follower.messages].count(True) == 1
        assert len(follower.state.entries) == 1500


async def test_a_ban_ends_the_stream_with_its_reason(broker: RunningBroker) -> None:
    nodes = await broker.stub(node_pb2_grpc.NodeStub)
    node = await broker.join("web-1")
    async with following(node) as follower:
        refusing = asyncio.ensure_future(follower.refusal())
        await asyncio.sleep(0)
        started = time.perf_counter()
        await nodes.Ban(node_pb2.BanNodeRequest(spiffe_id=node_id("web-1"), reason="stolen"))
        error = await refusing
        assert time.perf_counter() - started < 1.0
        assert reason_of(error) == "NODE_BANNED"
    again = FollowingNode(node.channel)
    assert reason_of(await again.refusal()) == "NODE_BANNED"


async def test_an_evicted_node_is_told_to_attest_again(broker: RunningBroker) -> None:
    nodes = await broker.stub(node_pb2_grpc.NodeStub)
    node = await broker.join("web-1")
    async with following(node) as follower:
        await nodes.Evict(node_pb2.EvictNodeRequest(spiffe_id=node_id("web-1")))
        assert reason_of(await follower.refusal()) in {"NODE_UNKNOWN", "CREDENTIAL_REVOKED"}


async def test_what_is_released_too_old_or_denied_is_told(one_broker: RunningBroker) -> None:
    broker = one_broker
    node = await broker.join("web-1")
    entry = await broker.entry("/api", "web-1")
    svid = (await node.issue(entry.id)).svid
    hold = revocation_pb2.HoldRequest(name="pause")
    async with following(node) as follower:
        state = follower.state
        await broker.revoke(id=svid.serial, reason=6, hold=hold)
        await follower.until(lambda now: now.revoked)
        away = State(state.revision, dict(state.entries), revoked=set(state.revoked))
        revocations = await broker.revocations()
        await revocations.LiftHold(revocation_pb2.LiftHoldRequest(name="pause"))
        await follower.until(lambda now: not now.revoked)
        await broker.revoke(spiffe_id=entry.spiffe_id)
        await follower.until(lambda now: now.epochs)
        assert state.revoked == {svid.serial}
        assert not state.entries
    async with following(node, away):
        assert away.epochs.keys() == {entry.spiffe_id}
        assert away.revoked == {svid.serial}
    async with following(node) as follower:
        assert follower.messages[0].full
        assert follower.state.epochs.keys() == {entry.spiffe_id}
        authorities = await (await broker.authorities()).List(
            authority_pb2.ListAuthoritiesRequest()
        )
        kind = authority_pb2.AUTHORITY_KIND_JWT
        [jwt] = [one.id for one in authorities.authorities if one.kind == kind]
        await broker.revoke(authority=jwt)
        await follower.until(lambda now: now.denied == [jwt])


# --- read your writes -----------------------------------------------------------------------------


async def test_await_returns_when_the_nodes_have_applied_it(broker: RunningBroker) -> None:
    one, two = await broker.join("web-1"), await broker.join("web-2")
    async with following(one, acknowledges=False) as first, following(two) as second:
        first.acknowledge()
        await broker.entry("/api", "web-1")
        await first.update()
        waiting = asyncio.create_task(applied_by(broker))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        first.acknowledge()
        answer = await waiting
        assert set(answer.applied) == {node_id("web-1"), node_id("web-2")}
        assert not answer.pending
        assert answer.connected == 2
        assert answer.revision >= first.state.revision > second.state.revision
        started = time.perf_counter()
        assert not (await applied_by(broker)).pending
        assert time.perf_counter() - started < 1.0


async def test_await_names_who_has_not_answered(broker: RunningBroker) -> None:
    node = await broker.join("web-1")
    async with following(node, acknowledges=False):
        answer = await applied_by(broker, timeout_ms=100)
        assert list(answer.pending) == [node_id("web-1")]
        assert not answer.applied
        assert answer.connected == 1


async def test_await_waits_for_a_node_that_is_named_and_away(broker: RunningBroker) -> None:
    node = await broker.join("web-1")
    assert list((await applied_by(broker)).applied) == []
    away = await applied_by(broker, node_id("web-1"), timeout_ms=100)
    assert list(away.pending) == [node_id("web-1")]
    assert away.connected == 0
    waiting = asyncio.create_task(applied_by(broker, node_id("web-1")))
    await asyncio.sleep(0.1)
    async with following(node):
        assert list((await waiting).applied) == [node_id("web-1")]


async def test_await_does_not_wait_for_a_node_that_was_banned(broker: RunningBroker) -> None:
    nodes = await broker.stub(node_pb2_grpc.NodeStub)
    node = await broker.join("web-1")
    async with following(node, acknowledges=False):
        waiting = asyncio.create_task(applied_by(broker, timeout_ms=30_000))
        await asyncio.sleep(0.2)
        await nodes.Ban(node_pb2.BanNodeRequest(spiffe_id=node_id("web-1")))
        async with asyncio.timeout(5):
            answer = await waiting
        assert not answer.pending


@pytest.mark.parametrize(
    "request_",
    [
        pb.AwaitNodesRequest(),
        pb.AwaitNodesRequest(timeout_ms=30_001),
        pb.AwaitNodesRequest(timeout_ms=-1),
        pb.AwaitNodesRequest(timeout_ms=1, node_ids=["spiffe://example.org/x"] * 101),
        pb.AwaitNodesRequest(timeout_ms=1, node_ids=[""]),
    ],
)
async def test_await_says_what_is_malformed(
    one_broker: RunningBroker, request_: pb.AwaitNodesRequest
) -> None:
    stub = await one_broker.stub(node_sync_pb2_grpc.NodeSyncStub)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.Await(request_)
    assert reason_of(refused.value) == "MALFORMED_REQUEST"


# --- nodes that do not keep up --------------------------------------------------------------------


async def test_a_quiet_stream_has_a_heartbeat(
    one_broker: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_stream, "HEARTBEAT_SECONDS", 0.2)
    node = await one_broker.join("web-1")
    async with following(node) as follower:
        await one_broker.join("web-2")  # the feed moves, and concerns nobody here
        began = follower.state.revision
        started = time.perf_counter()
        [message] = await follower.update()
        await follower.update()
        assert 0.2 < time.perf_counter() - started < 5
        assert not any((message.changed, message.removed_ids, message.revocations))
        assert message.revision > began


async def test_a_node_that_never_acknowledges_is_let_go(
    one_broker: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acknowledged, "PATIENCE_SECONDS", 0.5)
    node = await one_broker.join("web-1")
    async with following(node, acknowledges=False) as follower:
        started = time.perf_counter()
        assert reason_of(await follower.refusal()) == "WATCH_LAGGED"
        assert time.perf_counter() - started < 5


async def test_a_node_that_never_reads_is_let_go_and_nobody_waits_for_it(
    one_broker: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acknowledged, "PATIENCE_SECONDS", 2.0)
    broker = one_broker
    stub = await entries_of(broker)
    one, two = await broker.join("web-1"), await broker.join("web-2")
    for batch in range(4):  # more than gRPC's windows hold
        await stub.BatchCreate(
            entry_pb2.BatchCreateEntryRequest(
                entries=[
                    types_pb2.RegistrationEntry(
                        spiffe_id=f"spiffe://{TRUST_DOMAIN}/many/{batch}-{number}",
                        parent_id=node_id("web-1"),
                        selectors=[types_pb2.Selector(type="unix", value="uid:1000")],
                        labels={f"l{at}": "v" * 256 for at in range(32)},
                    )
                    for number in range(250)
                ]
            )
        )
    async with following(two) as other:
        stuck = FollowingNode(one.channel)
        await asyncio.sleep(0.5)
        reading = asyncio.ensure_future(other.update())
        started = time.perf_counter()
        await broker.entry("/api", "web-2")
        await reading
        assert time.perf_counter() - started < 4 * SOON
        while (await applied_by(broker, timeout_ms=1)).connected != 1:
            await asyncio.sleep(0.1)
            assert time.perf_counter() - started < 10
        assert reason_of(await stuck.refusal()) == "WATCH_LAGGED"


async def test_changes_that_wait_become_one_message(one_broker: RunningBroker) -> None:
    node = await one_broker.join("web-1")
    async with following(node, acknowledges=False) as follower:
        follower.acknowledge()
        for number in range(acknowledged.WINDOW + 20):
            await one_broker.entry(f"/api/{number}", "web-1")
        for _ in range(acknowledged.WINDOW):
            assert len((await follower.update())[0].changed) == 1
        follower.acknowledge()
        [message] = await follower.update()
        assert len(message.changed) == 20
        assert told(follower) == await authorized(node)


async def test_too_much_that_waits_ends_the_stream(
    one_broker: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_stream, "MOST_WAITING", 10)
    monkeypatch.setattr(acknowledged, "WINDOW", 1)
    node = await one_broker.join("web-1")
    async with following(node, acknowledges=False) as follower:
        for number in range(12):
            await one_broker.entry(f"/api/{number}", "web-1")
        assert reason_of(await follower.refusal()) == "WATCH_LAGGED"


async def test_a_node_has_a_few_streams(one_broker: RunningBroker) -> None:
    node = await one_broker.join("web-1")
    streams = []
    for _ in range(roster.MOST_OF_A_NODE):
        streams.append(FollowingNode(node.channel))
        await streams[-1].update()
    async with following(node) as newest:
        assert reason_of(await streams[0].refusal()) == "WATCH_LAGGED"
        await one_broker.entry("/api", "web-1")
        for stream in (*streams[1:], newest):
            await stream.update()
            assert stream.state.paths == {"api"}
        answer = await applied_by(one_broker)
        assert (answer.connected, len(answer.applied)) == (1, 1)
    for stream in streams:
        stream.call.cancel()


# --- bad input ------------------------------------------------------------------------------------

ACK = pb.SyncRequest(ack=pb.SyncRequest.Ack(revision=1))
HELLO = pb.SyncRequest(hello=pb.SyncRequest.Hello())


def _verifiers(name: str, count: int) -> pb.SyncRequest:
    told = [pb.SyncRequest.Verifier(name=name) for _ in range(count)]
    return pb.SyncRequest(verifiers=pb.SyncRequest.Verifiers(verifiers=told))


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (ACK, []),
        (pb.SyncRequest(), []),
        (pb.SyncRequest(hello=pb.SyncRequest.Hello(version="v" * 65)), []),
        (pb.SyncRequest(hello=pb.SyncRequest.Hello(version="a\nb")), []),
        (HELLO, [HELLO]),
        (HELLO, [pb.SyncRequest()]),
        (HELLO, [pb.SyncRequest(ack=pb.SyncRequest.Ack(revision=10_000_000))]),
        (HELLO, [_verifiers("spiffe://example.org/a", 1001)]),
        (HELLO, [_verifiers("", 1)]),
        *(
            (HELLO, [_verifiers(name, 1)])
            for name in (
                "payments",
                "spiffe://example.org/a",
                "spiffe://example.org/7",
                "spiffe://example.org//7",
                "spiffe://example.org/a/7\n",
                "spiffe://example.org/a/07",
                "spiffe://example.org/a/-7",
                "spiffe://example.org/a/\u0667",
                "spiffe://example.org/a/7/",
                "spiffe://example.org/a/../b/7",
                "spiffe://example.org/./7",
                "spiffe://example.org/a b/7",
                "spiffe://example.org/a (b)/7",
                "spiffe://example.com/a/7",
                "spiffe://example.orgs/a/7",
                "spiffe://example.org/idb/7",
                "spiffe://example.org/idb/broker/7",
                "spiffe://example.org/IDB/node/join_token/web-2/7",
                "spiffe://example.org/" + "a" * 2100 + "/7",
            )
        ),
    ],
)
async def test_what_a_node_may_not_say(
    one_broker: RunningBroker, first: pb.SyncRequest, then: list[pb.SyncRequest]
) -> None:
    node = await one_broker.join("web-1")
    stub: Any = node_sync_pb2_grpc.NodeSyncStub(node.channel)

    async def say() -> Any:
        yield first
        for request in then:
            yield request
        await asyncio.sleep(5)

    call = stub.Sync(say())
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        async with asyncio.timeout(5):
            async for _ in call:
                pass
    assert reason_of(refused.value) == "MALFORMED_REQUEST"


async def test_a_node_that_says_no_more_is_gone(one_broker: RunningBroker) -> None:
    node = await one_broker.join("web-1")
    async with following(node) as follower:
        assert (await applied_by(one_broker)).connected == 1
        follower.say(None)
        assert await follower.call.read() is grpc.aio.EOF
        assert await follower.call.code() is grpc.StatusCode.OK
        assert (await applied_by(one_broker)).connected == 0


async def test_a_broker_that_drains_says_so(tmp_path: Path) -> None:
    settings = settings_in(tmp_path / "idb", ca={"key_manager": "memory"})
    stop = asyncio.Event()
    addresses: asyncio.Future[BoundAddresses] = asyncio.get_running_loop().create_future()
    running_broker = asyncio.create_task(
        run_broker(settings, ready=addresses.set_result, stop=stop)
    )
    async with AsyncExitStack() as resources:
        node = await RunningBroker(await addresses, settings, resources).join("web-1")
        follower = FollowingNode(node.channel)
        await follower.update()
        stop.set()
        assert reason_of(await follower.refusal()) == "BROKER_STOPPING"
    await running_broker


async def test_resuming_with_a_fresh_state_asks_for_everything(one_broker: RunningBroker) -> None:
    node = await one_broker.join("web-1")
    async with following(node, State()) as follower:
        assert follower.messages[0].full
