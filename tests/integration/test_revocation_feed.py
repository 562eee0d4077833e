"""The broker's revocation feed, over the wire: what a verifier is told, and what it may not say."""

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
    credential_pb2,
    node_pb2,
    node_pb2_grpc,
    revocation_feed_pb2_grpc,
    revocation_pb2,
)
from identity_api.broker.v1 import revocation_feed_pb2 as pb
from identity_broker.lifecycle import acknowledged, directory, feed, followers
from identity_broker.server.app import BoundAddresses, run_broker
from support.line import (
    TRUST_DOMAIN,
    RunningBroker,
    node_id,
    reason_of,
    running,
    settings_in,
)
from support.verifying import FollowingVerifier, Known, tokens, verifying, workload

API = f"spiffe://{TRUST_DOMAIN}/api"
SOON = 5.0


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[RunningBroker]:
    settings = settings_in(tmp_path / "idb", ca={"key_manager": "memory"})
    async with running(settings) as running_broker:
        yield running_broker


async def lift(broker: RunningBroker, name: str) -> None:
    revocations = await broker.revocations()
    await revocations.LiftHold(revocation_pb2.LiftHoldRequest(name=name))


async def authorities(broker: RunningBroker) -> dict[str, int]:
    """Id → kind."""
    stub = await broker.authorities()
    answer = await stub.List(authority_pb2.ListAuthoritiesRequest())
    return {one.id: one.kind for one in answer.authorities}


# --- what it is told ------------------------------------------------------------------------------


async def test_the_first_state_is_everything(broker: RunningBroker) -> None:
    node = await broker.join("web-1")
    entry = await broker.entry("/api", "web-1")
    svid = (await node.issue(entry.id)).svid
    await broker.revoke(id=svid.serial, reason=1)
    await broker.revoke(spiffe_id=API)
    async with verifying(await broker.admin()) as verifier:
        [message] = verifier.messages
        assert message.full
        assert message.complete
        assert abs(message.sent_at_ms / 1000 - time.time()) < 60
        assert message.reconnect_spread_ms == 0
        [revoked] = verifier.known.revoked.values()
        assert revoked.id == svid.serial
        assert revoked.kind == credential_pb2.CREDENTIAL_KIND_X509
        assert revoked.spiffe_id == API
        assert revoked.reason == credential_pb2.REVOCATION_REASON_KEY_COMPROMISE
        assert revoked.expires_at == svid.expires_at
        authorities = await (await broker.authorities()).List(
            authority_pb2.ListAuthoritiesRequest()
        )
        assert revoked.authority_id in {one.id for one in authorities.authorities}
        [epoch] = verifier.known.epochs.values()
        assert epoch.spiffe_id == API
        assert abs(epoch.not_before - time.time()) < 60 < epoch.expires_at - epoch.not_before
        assert verifier.known.denied == []


async def test_a_change_is_told_at_once(broker: RunningBroker) -> None:
    node = await broker.join("web-1")
    entry = await broker.entry("/api", "web-1")
    caller = await workload(broker, node, (await broker.entry("/caller", "web-1")).id)
    async with verifying(caller.channel) as verifier, verifying(node.channel) as another:
        for _ in range(3):
            svid = (await node.issue(entry.id)).svid
            started = time.perf_counter()
            await broker.revoke(id=svid.serial)
            message = await verifier.message()
            assert time.perf_counter() - started < SOON
            assert [one.id for one in message.revoked] == [svid.serial]
            assert not message.full
            assert not message.HasField("denied_authorities")
            told = await another.message()
            assert told.sequence == message.sequence
            assert [one.id for one in told.revoked] == [svid.serial]


async def test_an_identity_ends_with_its_tokens_and_an_epoch(broker: RunningBroker) -> None:
    node = await broker.join("web-1")
    entry = await broker.entry("/api", "web-1")
    svid = (await node.issue(entry.id)).svid
    jtis = await tokens(node, entry.id, 3)
    async with verifying(await broker.admin()) as verifier:
        await broker.revoke(spiffe_id=API)
        await verifier.until(lambda known: len(known.revoked) == 4 and known.epochs)
        assert verifier.known.revoked.keys() == {svid.serial, *jtis}
        kinds = {one.kind for one in verifier.known.revoked.values()}
        assert kinds == {credential_pb2.CREDENTIAL_KIND_X509, credential_pb2.CREDENTIAL_KIND_JWT}
        assert verifier.known.epochs.keys() == {API}


async def test_what_was_on_hold_is_released(broker: RunningBroker) -> None:
    node = await broker.join("web-1")
    entry = await broker.entry("/api", "web-1")
    svid = (await node.issue(entry.id)).svid
    async with verifying(await broker.admin()) as verifier:
        hold = revocation_pb2.HoldRequest(name="pause")
        await broker.revoke(id=svid.serial, reason=6, hold=hold)
        await verifier.until(lambda known: known.revoked)
        away = Known(verifier.known.sequence, dict(verifier.known.revoked))
        await lift(broker, "pause")
        await verifier.until(lambda known: not known.revoked)
        assert list(verifier.messages[-1].released_ids) == [svid.serial]
    async with verifying(await broker.admin(), away) as verifier:
        assert not verifier.messages[0].full
        assert not away.revoked


async def test_revoked_and_released_behind_its_back_is_told_as_it_is(broker: RunningBroker) -> None:
    node = await broker.join("web-1")
    entry = await broker.entry("/api", "web-1")
    first, one, other = [(await node.issue(entry.id)).svid.serial for _ in range(3)]
    await broker.revoke(id=first)
    async with verifying(await broker.admin()) as verifier:
        known = verifier.known
    hold = revocation_pb2.HoldRequest(name="pause")
    await broker.revoke(id=one, reason=6, hold=hold)
    await lift(broker, "pause")
    await broker.revoke(id=other, reason=6, hold=revocation_pb2.HoldRequest(name="again"))
    await lift(broker, "again")
    await broker.revoke(id=other)
    async with verifying(await broker.admin(), known) as verifier:
        [message] = verifier.messages
        assert [item.id for item in message.revoked] == [other]
        assert list(message.released_ids) == [one]


@pytest.mark.parametrize("kind", ["x509", "jwt"])
async def test_a_denied_authority_is_told(broker: RunningBroker, kind: str) -> None:
    wanted = {
        "x509": authority_pb2.AUTHORITY_KIND_X509,
        "jwt": authority_pb2.AUTHORITY_KIND_JWT,
    }[kind]
    [authority] = [name for name, kind in (await authorities(broker)).items() if kind == wanted]
    async with verifying(await broker.admin()) as verifier:
        await broker.revoke(authority=authority)
        await verifier.until(lambda known: known.denied)
        assert verifier.known.denied == [authority]
    async with verifying(await broker.admin(), verifier.known) as verifier:
        assert not verifier.messages[0].full
        assert verifier.messages[0].denied_authorities.ids == [authority]


# --- coming back ----------------------------------------------------------------------------------


async def test_a_verifier_that_comes_back_is_told_what_it_missed(broker: RunningBroker) -> None:
    node = await broker.join("web-1")
    entry = await broker.entry("/api", "web-1")
    first, second = [(await node.issue(entry.id)).svid.serial for _ in range(2)]
    await broker.revoke(id=first)
    async with verifying(await broker.admin()) as verifier:
        known = verifier.known
    await broker.revoke(id=second)
    await broker.revoke(spiffe_id=API)
    async with verifying(await broker.admin(), known) as verifier:
        [message] = verifier.messages
        assert not message.full
        assert {one.id for one in message.revoked} == {second}
        assert known.revoked.keys() == {first, second}
        assert known.epochs.keys() == {API}
    async with verifying(await broker.admin(), known) as verifier:
        [message] = verifier.messages
        assert not any((message.full, message.revoked, message.epochs))
        assert message.HasField("denied_authorities")


async def test_entries_that_change_do_not_push_revocations_out(
    broker: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await broker.join("web-1")
    entry = await broker.entry("/api", "web-1")
    svid = (await node.issue(entry.id)).svid
    async with verifying(await broker.admin()) as verifier:
        known = verifier.known
        for number in range(5):
            await broker.entry(f"/other/{number}", "web-1")
        # All stand at the same place, those who came later too.
        async with verifying(await broker.admin()) as late:
            assert late.known.sequence == known.sequence
            await broker.revoke(id=svid.serial)
            assert (await verifier.message()).previous == (await late.message()).previous
    monkeypatch.setattr(feed, "MOST_RECENT", 1)
    async with verifying(await broker.admin(), known) as verifier:
        assert not verifier.messages[0].full


async def test_a_verifier_ahead_of_the_broker_is_told_everything(broker: RunningBroker) -> None:
    node = await broker.join("web-1")
    entry = await broker.entry("/api", "web-1")
    svid = (await node.issue(entry.id)).svid
    await broker.revoke(id=svid.serial)
    known = Known(1_000_000, {"old": pb.RevokedCredential()})
    async with verifying(await broker.admin(), known) as verifier:
        assert verifier.messages[0].full
        assert known.revoked.keys() == {svid.serial}


async def test_a_verifier_too_far_back_is_told_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_in(tmp_path / "idb")
    async with running(settings) as broker:
        node = await broker.join("web-1")
        entry = await broker.entry("/api", "web-1")
        first, second = [(await node.issue(entry.id)).svid.serial for _ in range(2)]
        async with verifying(await broker.admin()) as verifier:
            known = verifier.known
        await broker.revoke(id=first)
        await broker.entry("/other", "web-1")
    monkeypatch.setattr(directory, "MOST_CHANGES", 1)
    async with running(settings) as broker:
        await broker.revoke(id=second)
        async with verifying(await broker.admin(), known) as verifier:
            assert verifier.messages[0].full
            assert known.revoked.keys() == {first, second}


async def test_a_broker_that_was_restarted_goes_on_where_it_was(tmp_path: Path) -> None:
    settings = settings_in(tmp_path / "idb")
    async with running(settings) as broker:
        node = await broker.join("web-1")
        entry = await broker.entry("/api", "web-1")
        first, second = [(await node.issue(entry.id)).svid.serial for _ in range(2)]
        await broker.revoke(id=first)
        async with verifying(await broker.admin()) as verifier:
            known = verifier.known
        await broker.revoke(id=second)
    async with running(settings) as broker, verifying(await broker.admin(), known) as verifier:
        assert not verifier.messages[0].full
        assert [one.id for one in verifier.messages[0].revoked] == [second]
        assert known.revoked.keys() == {first, second}


async def test_a_large_state_comes_in_thousands(broker: RunningBroker) -> None:
    node = await broker.join("web-1")
    entry = await broker.entry("/api", "web-1")
    jtis = await tokens(node, entry.id, 2300)
    async with verifying(await broker.admin()) as verifier:
        await broker.revoke(entry=entry.id)
        await verifier.until(lambda known: len(known.revoked) == len(jtis))
        assert max(len(message.revoked) for message in verifier.messages) <= 1000
    async with verifying(await broker.admin()) as verifier:
        assert [len(message.revoked) for message in verifier.messages] == [1000, 1000, 300]
        assert [message.complete for message in verifier.messages] == [False, False, True]
        assert [message.full for message in verifier.messages] == [True, False, False]
        assert verifier.known.revoked.keys() == set(jtis)


# --- verifiers that do not keep up ----------------------------------------------------------------


async def test_a_quiet_stream_has_a_heartbeat_and_moves_on(
    broker: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(followers, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr("support.verifying.HEARTBEAT_MS", 200)
    async with verifying(await broker.admin()) as verifier:
        began = verifier.known.sequence
        await broker.join("web-1")  # concerns no verifier
        started = time.perf_counter()
        for _ in range(3):
            message = await verifier.message()
            assert not any((message.revoked, message.full, message.HasField("denied_authorities")))
        assert 0.4 < time.perf_counter() - started < 10
        assert verifier.known.sequence > began


async def test_a_verifier_that_never_acknowledges_is_let_go(
    broker: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acknowledged, "PATIENCE_SECONDS", 0.5)
    async with verifying(await broker.admin(), acknowledges=False) as verifier:
        assert reason_of(await verifier.refusal()) == "WATCH_LAGGED"


async def test_a_verifier_that_never_reads_is_let_go_and_nobody_waits_for_it(
    broker: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acknowledged, "PATIENCE_SECONDS", 2.0)
    node = await broker.join("web-1")
    entry = await broker.entry("/a" + "/x" * 900, "web-1")  # so that messages are large
    jtis = await tokens(node, entry.id, 3000)
    stuck = FollowingVerifier(await broker.admin())
    await stuck.update()
    async with verifying(node.channel) as other:
        await broker.revoke(entry=entry.id, order_id="large")
        await other.until(lambda known: len(known.revoked) == len(jtis))
        another = await broker.entry("/api", "web-1")
        svid = (await node.issue(another.id)).svid
        started = time.perf_counter()
        await broker.revoke(id=svid.serial)
        await other.message()
        assert time.perf_counter() - started < SOON
        assert reason_of(await stuck.refusal()) == "WATCH_LAGGED"


async def test_what_waits_for_a_verifier_is_joined(
    broker: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acknowledged, "WINDOW", 1)
    node = await broker.join("web-1")
    entry = await broker.entry("/api", "web-1")
    jtis = await tokens(node, entry.id, 3)
    async with verifying(await broker.admin(), acknowledges=False) as verifier:
        # The first message is under way: what comes now waits, and is joined.
        for jti in jtis:
            await broker.revoke(jti=jti)
        verifier.acknowledge()
        message = await verifier.message()
        assert {one.id for one in message.revoked} == set(jtis)


async def test_one_identity_has_so_many_streams(
    broker: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "MOST_OF_A_CALLER", 2)
    admin = await broker.admin()
    async with verifying(admin), verifying(admin):
        third = FollowingVerifier(admin)
        assert reason_of(await third.refusal()) == "RATE_LIMITED"
    node = await broker.join("web-1")
    async with verifying(node.channel):
        pass


async def test_all_replicas_of_one_identity_come_back_at_once(broker: RunningBroker) -> None:
    admin = await broker.admin()
    replicas = [FollowingVerifier(admin) for _ in range(300)]
    try:
        await asyncio.gather(*(replica.update() for replica in replicas))
        for replica in replicas:
            replica.call.cancel()
        replicas = [FollowingVerifier(admin, replica.known) for replica in replicas]
        await asyncio.gather(*(replica.update() for replica in replicas))
    finally:
        for replica in replicas:
            replica.call.cancel()


# --- who may, and what it may say -----------------------------------------------------------------


async def test_a_stranger_may_not_follow(broker: RunningBroker) -> None:
    stranger = FollowingVerifier(await broker.bootstrap())
    assert reason_of(await stranger.refusal()) == "METHOD_DENIED"


async def test_a_verifier_whose_own_svid_is_revoked_is_ended(broker: RunningBroker) -> None:
    node = await broker.join("web-1")
    entry = await broker.entry("/api", "web-1")
    caller = await workload(broker, node, entry.id)
    async with verifying(caller.channel) as verifier:
        await broker.revoke(id=caller.svid.serial)
        assert reason_of(await verifier.refusal()) == "CREDENTIAL_REVOKED"
    nodes = await broker.stub(node_pb2_grpc.NodeStub)
    async with verifying(node.channel) as verifier:
        await nodes.Ban(node_pb2.BanNodeRequest(spiffe_id=node_id("web-1"), reason="stolen"))
        assert reason_of(await verifier.refusal()) in {"NODE_BANNED", "CREDENTIAL_REVOKED"}


HELLO = pb.FollowRequest(hello=pb.FollowRequest.Hello())


def _ack(sequence: int) -> pb.FollowRequest:
    return pb.FollowRequest(ack=pb.FollowRequest.Ack(sequence=sequence))


BAD: list[list[pb.FollowRequest]] = [
    [_ack(1)],
    [pb.FollowRequest()],
    [pb.FollowRequest(hello=pb.FollowRequest.Hello(name="a b"))],
    [pb.FollowRequest(hello=pb.FollowRequest.Hello(name="n" * 65))],
    [pb.FollowRequest(hello=pb.FollowRequest.Hello(name="../x"))],
    [pb.FollowRequest(hello=pb.FollowRequest.Hello(version="v" * 65))],
    [pb.FollowRequest(hello=pb.FollowRequest.Hello(version="a\nb"))],
    [HELLO, HELLO],
    [HELLO, pb.FollowRequest()],
    [HELLO, _ack(10_000_000)],
]


async def test_what_a_verifier_may_not_say(broker: RunningBroker) -> None:
    stub: Any = revocation_feed_pb2_grpc.RevocationFeedStub(await broker.admin())

    async def say(requests: list[pb.FollowRequest]) -> AsyncIterator[pb.FollowRequest]:
        for request in requests:
            yield request
        await asyncio.sleep(5)

    for requests in BAD:
        call = stub.Follow(say(requests))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async with asyncio.timeout(5):
                async for _ in call:
                    pass
        assert reason_of(refused.value) == "MALFORMED_REQUEST", requests


async def test_a_verifier_that_says_no_more_is_gone(broker: RunningBroker) -> None:
    async with verifying(await broker.admin()) as verifier:
        verifier.say(None)
        assert await verifier.call.read() is grpc.aio.EOF
        assert await verifier.call.code() is grpc.StatusCode.OK


async def test_a_broker_that_drains_says_so(tmp_path: Path) -> None:
    settings = settings_in(tmp_path / "idb", ca={"key_manager": "memory"})
    stop = asyncio.Event()
    addresses: asyncio.Future[BoundAddresses] = asyncio.get_running_loop().create_future()
    running_broker = asyncio.create_task(
        run_broker(settings, ready=addresses.set_result, stop=stop)
    )
    async with AsyncExitStack() as resources:
        broker = RunningBroker(await addresses, settings, resources)
        verifier = FollowingVerifier(await broker.admin())
        await verifier.update()
        stop.set()
        assert reason_of(await verifier.refusal()) == "BROKER_STOPPING"
    await running_broker
