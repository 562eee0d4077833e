"""A whole agent as relay of revocations: who is told, when, and what the broker hears of it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509

from identity_api.broker.v1 import (
    credential_pb2,
    node_pb2,
    node_pb2_grpc,
    revocation_feed_pb2,
    revocation_pb2,
    types_pb2,
)
from identity_broker.agent import follow, relay
from identity_broker.agent.workload_api.limits import Limits
from identity_ca.serial import serial_hex
from identity_client._wire.workload import (
    SECURITY_METADATA,
    JWTSVIDRequest,
    ValidateJWTSVIDRequest,
)
from support.agent import RunningAgent, agent_settings, running_agent
from support.feed import until, verifier
from support.line import RunningBroker, reason_of, running, settings_in
from support.machines import MachineCa, client_half
from support.node import fixed, machine_broker

ME = [types_pb2.Selector(type="unix", value=f"uid:{os.getuid()}")]
SOMEBODY = [types_pb2.Selector(type="unix", value=f"uid:{os.getuid() + 1}")]
WEB = "spiffe://example.org/web"


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[RunningBroker]:
    async with running(settings_in(tmp_path / "broker", ca={"key_manager": "memory"})) as found:
        yield found


@pytest.fixture
async def agent(broker: RunningBroker, open_directory: Path) -> AsyncIterator[RunningAgent]:
    async with running_agent(broker, open_directory / "agent") as found:
        await broker.entry("/web", "machine", selectors=ME)
        await found.until(lambda: found.agent.report().entries == 1)
        yield found


async def token_of(agent: RunningAgent, audience: str = "a") -> str:
    answer = await agent.stub().FetchJWTSVID(
        JWTSVIDRequest(audience=[audience]), metadata=SECURITY_METADATA
    )
    return str(answer.svids[0].svid)


async def refusal_of(agent: RunningAgent, token: str, audience: str = "a") -> str:
    """Why the agent does not accept a token; empty if it does."""
    try:
        await agent.stub().ValidateJWTSVID(
            ValidateJWTSVIDRequest(svid=token, audience=audience), metadata=SECURITY_METADATA
        )
    except grpc.aio.AioRpcError as error:
        return reason_of(error)
    return ""


def serial_of(svid: Any) -> str:
    leaf = x509.load_der_x509_certificate(svid.x509_svid)
    return serial_hex(leaf.serial_number)


async def svid_of(agent: RunningAgent) -> str:
    """The serial of this process's first SVID."""
    return serial_of((await agent.fetch_x509()).svids[0])


# --- telling --------------------------------------------------------------------------------------


async def test_a_follower_is_told_everything_and_then_each_change_at_once(
    agent: RunningAgent, broker: RunningBroker
) -> None:
    before = await svid_of(agent)
    await broker.revoke(id=before)
    await agent.until(lambda: agent.agent._mirror.denied.is_revoked(before))
    async with verifier(agent.channel()) as one, verifier(agent.channel()) as other:
        await until(lambda: bool(one.complete_at and other.complete_at))
        assert one.messages[0].full
        assert one.denied == other.denied == {before}
        (told,) = one.messages[0].revoked
        assert told.kind == credential_pb2.CREDENTIAL_KIND_X509
        assert told.spiffe_id == WEB
        assert told.expires_at > told.revoked_at > 1_700_000_000
        assert not told.entry_id
        assert not told.instance
        (row,) = [each for each in await broker.ledger(spiffe_id=WEB) if each.id == before]
        assert told.authority_id == row.authority_id
        assert told.reason == row.reason
        now = await svid_of(agent)
        revoked = await broker.revoke(
            id=now, reason=credential_pb2.REVOCATION_REASON_CERTIFICATE_HOLD
        )
        took = await until(lambda: now in one.denied and now in other.denied)
        assert took < 1.0
        assert one.messages[-1].complete
        assert one.messages[-1] == other.messages[-1]
        await broker.lift(revoked.revocation.hold)
        await until(lambda: now not in one.denied and now not in other.denied)
        assert before in one.denied
        token = await token_of(agent)
        await broker.revoke(spiffe_id=WEB, without_hold=True)
        await until(lambda: WEB in one.epochs)
        assert len(one.denied) >= 4  # both SVIDs there are, and the token
        assert await refusal_of(agent, token) == "TOKEN_INVALID"


async def test_a_follower_goes_on_where_it_stood_if_that_is_remembered(
    agent: RunningAgent, broker: RunningBroker
) -> None:
    async with verifier(agent.channel()) as one:
        await until(lambda: bool(one.complete_at))
        stood, denied = one.complete_at, set(one.denied)
    serial = await svid_of(agent)
    await broker.revoke(id=serial)
    await agent.until(lambda: agent.agent._mirror.denied.is_revoked(serial))
    async with (
        verifier(agent.channel(), resume_from=stood) as back,
        verifier(agent.channel(), resume_from=stood + 1_000_000) as elsewhere,
        verifier(agent.channel(), resume_from=1) as late,
    ):
        await until(lambda: serial in back.denied and serial in elsewhere.denied & late.denied)
        assert not any(message.full for message in back.messages)
        assert back.denied == denied | {serial}
        assert elsewhere.messages[0].full
        assert late.messages[0].full
        at = back.complete_at
    # One that has all there is hears so at once, and not only with the next heartbeat.
    async with verifier(agent.channel(), resume_from=at) as again:
        took = await until(lambda: bool(again.messages))
        assert took < 2.0
        assert again.messages[0].complete
        assert not again.messages[0].full


async def test_the_broker_hears_who_follows_and_what_each_has(
    agent: RunningAgent, broker: RunningBroker
) -> None:
    revocations = await broker.revocations()
    name = f"{WEB}/{os.getpid()}"
    async with verifier(agent.channel()) as one:
        await until(lambda: bool(one.complete_at))
        serial = await svid_of(agent)
        await asyncio.sleep(0.5)  # the broker hears of it within 50 ms, and is not idle
        answer = await broker.revoke(id=serial)

        async def standing() -> Any:
            status = await revocations.Get(
                revocation_pb2.GetRevocationRequest(id=answer.revocation.id)
            )
            return {each.name: each for each in status.propagation.verifiers}

        async def acknowledged() -> bool:
            found = (await standing()).get(name)
            return found is not None and found.state == (revocation_pb2.VERIFIER_STATE_ACKNOWLEDGED)

        async with asyncio.timeout(5):
            while not await acknowledged():
                await asyncio.sleep(0.05)
        found = (await standing())[name]
        assert found.kind == "behind"
        assert found.node_id == agent.node_id
        assert 0 <= found.latency_ms < 1000
    await agent.until(lambda: agent.agent.report().followers == 0)


async def test_what_is_revoked_for_a_better_reason_is_acknowledged_at_once(
    agent: RunningAgent, broker: RunningBroker
) -> None:
    revocations = await broker.revocations()
    name = f"{WEB}/{os.getpid()}"
    async with verifier(agent.channel()) as one:
        await until(lambda: bool(one.complete_at))
        serial = await svid_of(agent)
        held = credential_pb2.REVOCATION_REASON_CERTIFICATE_HOLD
        await broker.revoke(id=serial, reason=held)
        await until(lambda: serial in one.denied)
        worse = credential_pb2.REVOCATION_REASON_KEY_COMPROMISE
        answer = await broker.revoke(id=serial, reason=worse)
        assert answer.revocation.revoked == 1
        status = await revocations.Get(
            revocation_pb2.GetRevocationRequest(id=answer.revocation.id, wait_ms=10_000)
        )
        [found] = [each for each in status.propagation.verifiers if each.name == name]
        assert found.state == revocation_pb2.VERIFIER_STATE_ACKNOWLEDGED
        assert found.latency_ms < 1000


# --- who ------------------------------------------------------------------------------------------


async def test_only_callers_with_an_identity_and_the_header_follow(
    agent: RunningAgent, broker: RunningBroker
) -> None:
    async with verifier(agent.channel(), metadata=()) as bare:
        await until(lambda: bare.over)
        assert bare.reason == "SECURITY_HEADER_MISSING"
    # One that is writing when its stream ends learns no reason: grpc.aio makes INTERNAL of it.
    async with verifier(agent.channel(), acks=False) as one:
        await until(lambda: bool(one.complete_at))
        serial = await svid_of(agent)
        # Its identity is put on hold: it is told, and its stream ends.
        revoked = await broker.revoke(spiffe_id=WEB)
        await until(lambda: one.over)
        assert serial in one.denied
        assert one.reason == "NO_IDENTITY"
    async with verifier(agent.channel()) as refused:
        await until(lambda: refused.over)
        assert refused.reason == "NO_IDENTITY"
        assert not refused.messages
    await broker.lift(revoked.revocation.hold)
    await agent.until(lambda: agent.agent.report().entries == 1)
    async with verifier(agent.channel()) as again:
        await until(lambda: serial in again.denied)  # that was not on hold, but revoked


async def test_a_banned_node_passes_nothing_on(agent: RunningAgent, broker: RunningBroker) -> None:
    async with verifier(agent.channel(), acks=False) as one:
        await until(lambda: bool(one.complete_at))
        nodes = await broker.stub(node_pb2_grpc.NodeStub)
        await nodes.Ban(node_pb2.BanNodeRequest(spiffe_id=agent.node_id, reason="test"))
        await until(lambda: one.over)
        assert one.reason == "NO_IDENTITY"


Request = revocation_feed_pb2.FollowRequest


@pytest.mark.parametrize(
    "messages",
    [
        [Request()],
        [Request(ack=Request.Ack(sequence=0))],
        [Request(hello=Request.Hello(name="no spaces"))],
        [Request(hello=Request.Hello(name="x" * 65))],
        [Request(hello=Request.Hello(version="é" * 33))],
        [Request(hello=Request.Hello()), Request(hello=Request.Hello())],
        [Request(hello=Request.Hello()), Request(ack=Request.Ack(sequence=2**63))],
        [Request(hello=Request.Hello()), Request(ack=Request.Ack(sequence=0))],
        [Request(hello=Request.Hello(version="x" * 2000))],
        [b"\xff\xff"],
    ],
    ids=[
        *("nothing", "an ack first", "no name", "a long name", "a long version", "hello twice"),
        *("an ack of what was not sent", "acks of nothing", "a long message", "no message"),
    ],
)
async def test_who_does_not_keep_to_the_protocol_is_refused(
    agent: RunningAgent, messages: list[Any]
) -> None:
    call: Any = agent.channel().stream_stream("/identity_api.broker.v1.RevocationFeed/Follow")(
        metadata=SECURITY_METADATA
    )
    with pytest.raises((grpc.aio.AioRpcError, asyncio.InvalidStateError)):
        async with asyncio.timeout(10):
            for message in messages:
                await call.write(
                    message if isinstance(message, bytes) else message.SerializeToString()
                )
            async for _ in call:
                pass
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_who_says_no_more_is_told_no_more(agent: RunningAgent) -> None:
    async with verifier(agent.channel()) as one:
        await until(lambda: bool(one.complete_at))
        await one.call.done_writing()
        await until(lambda: one.over)
        assert one.ended is None
    await agent.until(lambda: agent.agent.report().followers == 0)


async def test_who_acknowledges_nothing_is_let_go_and_the_others_are_not_held_up(
    agent: RunningAgent, broker: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "PATIENCE_SECONDS", 1.0)
    async with verifier(agent.channel(), acks=False) as mute, verifier(agent.channel()) as one:
        await until(lambda: bool(one.complete_at and mute.messages))
        serial = await svid_of(agent)
        await broker.revoke(id=serial)
        assert await until(lambda: serial in one.denied) < 1.0
        await until(lambda: mute.over)
        assert mute.reason == "WATCH_LAGGED"
        await asyncio.sleep(1.2)
        assert not one.over


async def test_a_process_holds_so_many_streams_and_no_more(agent: RunningAgent) -> None:
    most = Limits().process_streams
    channels = [agent.channel(), agent.channel()]
    async with AsyncExitStack() as stack:
        everybody = [
            await stack.enter_async_context(verifier(channels[number % 2]))
            for number in range(most)
        ]
        await until(lambda: all(one.complete_at for one in everybody), 30)
        assert agent.agent.report().followers == most
        async with verifier(agent.channel()) as refused:
            await until(lambda: refused.over)
            assert refused.reason == "RATE_LIMITED"
        # Those of one process are one to the broker.
        assert len(agent.agent._relay.verifiers()) == 1


# --- the broker away ------------------------------------------------------------------------------


async def test_while_the_broker_is_away_nothing_is_called_complete_and_nothing_is_forgotten(
    tmp_path: Path, open_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "HEARTBEAT_SECONDS", 0.5)
    monkeypatch.setattr(relay, "_TICK_SECONDS", 0.1)
    directory = tmp_path / "broker"
    keys = {"ca": {"key_manager": "file"}}
    stack = running(settings_in(directory, **keys))
    broker = await stack.__aenter__()
    addresses = fixed(broker)
    await broker.entry("/web", "machine", selectors=ME)
    async with running_agent(broker, open_directory / "agent") as agent:
        serial = await svid_of(agent)
        await broker.revoke(id=serial)
        async with verifier(agent.channel()) as one:
            await until(lambda: serial in one.denied and one.complete_at > 0)
            heard = len(one.messages)
            await until(lambda: len(one.messages) >= heard + 2)
            assert all(message.complete for message in one.messages)
            assert one.messages[-1].heartbeat_ms == 500
            await stack.__aexit__(None, None, None)
            await agent.until(lambda: not agent.agent.report().connected)
            silent = len(one.messages)
            await asyncio.sleep(1.5)
            assert len(one.messages) == silent
            assert not one.over
            stood = one.complete_at
            async with (
                verifier(agent.channel()) as late,
                verifier(agent.channel(), resume_from=stood) as back,
            ):
                await until(lambda: serial in late.denied)
                await asyncio.sleep(0.7)
                assert not late.complete_at
                assert not back.messages
                async with running(settings_in(directory, server=addresses, **keys)) as again:
                    await until(lambda: late.complete_at > 0 and bool(back.messages), 30)
                    now = await svid_of(agent)
                    await again.revoke(id=now)
                    everybody = (one, late, back)
                    await until(lambda: all(now in each.denied for each in everybody))
                    assert not any(message.full for message in one.messages[1:])


async def test_a_broker_that_says_nothing_counts_as_away(
    agent: RunningAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "HEARTBEAT_SECONDS", 0.3)
    monkeypatch.setattr(relay, "_TICK_SECONDS", 0.1)
    async with verifier(agent.channel()) as one:
        await until(lambda: len(one.messages) > 2)
        monkeypatch.setattr(follow, "FRESH_SECONDS", 0.0)
        silent = len(one.messages)
        await asyncio.sleep(1.0)
        assert len(one.messages) <= silent + 1
        assert agent.agent.report().connected


async def test_the_agent_that_stops_says_so(broker: RunningBroker, open_directory: Path) -> None:
    async with AsyncExitStack() as stack:
        async with running_agent(broker, open_directory / "agent") as agent:
            await broker.entry("/web", "machine", selectors=ME)
            await agent.until(lambda: agent.agent.report().entries == 1)
            one = await stack.enter_async_context(verifier(agent.channel()))
            await until(lambda: bool(one.complete_at))
            agent._channels.clear()  # it is the agent that ends it
        await until(lambda: one.over)
        assert one.reason == "AGENT_NOT_READY"


# --- what the agent itself refuses ----------------------------------------------------------------


async def test_tokens_of_a_denied_authority_are_refused_and_made_anew(
    agent: RunningAgent, broker: RunningBroker
) -> None:
    token = await token_of(agent)
    (row,) = [
        each
        for each in await broker.ledger(spiffe_id=WEB)
        if each.kind == credential_pb2.CREDENTIAL_KIND_JWT
    ]
    async with verifier(agent.channel()) as one:
        await until(lambda: bool(one.complete_at))
        await broker.revoke(authority=row.authority_id)
        await until(lambda: row.authority_id in one.authorities)
        assert await refusal_of(agent, token) == "TOKEN_INVALID"
        now = await token_of(agent)
        assert now != token
        assert await refusal_of(agent, now) == ""


async def test_svids_of_a_denied_authority_are_made_anew_at_once(open_directory: Path) -> None:
    machines = MachineCa()
    directory = open_directory / "agent"
    directory.mkdir()
    client_half(directory, *machines.machine())
    node = {
        "join_token_file": None,
        "cert_file": str(directory / "machine.pem"),
        "key_file": str(directory / "machine.key"),
    }
    async with machine_broker(open_directory, machines) as broker:
        settings = agent_settings(broker, directory, token="", node=node)
        async with running_agent(broker, directory, settings=settings) as agent:
            node_id = agent.agent.report().node_id
            await broker.entry("/web", "", parent_id=node_id, selectors=ME)
            await agent.until(lambda: agent.agent.report().entries == 1)
            serial = await svid_of(agent)
            (row,) = [each for each in await broker.ledger(spiffe_id=WEB) if each.id == serial]
            node_serial = agent.agent.report().node_serial
            call = agent.x509_stream()
            state = await call.read()
            async with verifier(agent.channel()) as one:
                await until(lambda: bool(one.complete_at))
                await broker.revoke(authority=row.authority_id)
                await until(lambda: row.authority_id in one.authorities)
                await until(lambda: serial in one.denied)
                denied = agent.agent._mirror.denied
                assert row.authority_id in denied.authorities
                async with asyncio.timeout(20):
                    while row.authority_id in await signers(broker, state):
                        state = await call.read()
            # The node's own SVID was of that authority, too.
            await agent.until(lambda: agent.agent.report().node_serial != node_serial, 20)
            await agent.until(lambda: agent.agent.report().connected, 20)


async def signers(broker: RunningBroker, state: Any) -> set[str]:
    """Which authorities signed the SVIDs of a state."""
    rows = {each.id: each for each in await broker.ledger(spiffe_id=WEB)}
    return {rows[serial_of(svid)].authority_id for svid in state.svids}


async def test_an_epoch_ends_tokens_nobody_has_heard_of(
    agent: RunningAgent, broker: RunningBroker
) -> None:
    token = await token_of(agent)
    assert agent.agent.report().jwt_svids == 1
    await asyncio.sleep(1.1)  # it was issued in an earlier second
    await broker.revoke(spiffe_id=WEB, without_hold=True)
    await agent.until(lambda: bool(agent.agent._mirror.denied.epochs))
    agent.agent._mirror.denied._revoked.clear()  # as if its jti were in no ledger
    assert agent.agent.report().jwt_svids == 0
    assert await refusal_of(agent, token) == "TOKEN_INVALID"
    await asyncio.sleep(1.1)
    assert await refusal_of(agent, await token_of(agent)) == ""
