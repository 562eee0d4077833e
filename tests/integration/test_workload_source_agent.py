"""The source over the Workload API of a real agent, joined to a real broker."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from identity_api.broker.v1 import credential_pb2, entry_pb2, entry_pb2_grpc, types_pb2
from identity_broker.agent.relay import HEARTBEAT_SECONDS
from identity_client import PeerRevoked, RevocationsStale, SourceState, StalenessPolicy
from identity_client.aio import IdentitySource
from identity_client.integrations.grpc import secure_channel_aio
from identity_client.peer import check_current, peer_from_pem
from support.agent import RunningAgent, running_agent
from support.client import NAMES, echo_server_aio, until
from support.line import RunningBroker, running, settings_in

WEB = "spiffe://example.org/web"
API = "spiffe://example.org/api"
MINE = types_pb2.Selector(type="unix", value=f"uid:{os.getuid()}")


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[RunningBroker]:
    async with running(settings_in(tmp_path / "idb", ca={"key_manager": "memory"})) as one:
        yield one


@pytest.fixture
async def agent(broker: RunningBroker, tmp_path: Path) -> AsyncIterator[RunningAgent]:
    for path in ("/web", "/api"):
        await broker.entry(path, "machine", selectors=[MINE])
    async with running_agent(broker, tmp_path / "agent") as one:
        yield one


@asynccontextmanager
async def ready(agent: RunningAgent, spiffe_id: str) -> AsyncIterator[IdentitySource]:
    source = IdentitySource.from_workload_api(agent.workload_api, spiffe_id=spiffe_id)
    async with source:
        await source.wait_ready(10)
        yield source


async def delete(broker: RunningBroker, spiffe_id: str) -> None:
    entries = await broker.stub(entry_pb2_grpc.EntryStub)
    listed = await entries.List(entry_pb2.ListEntriesRequest())
    ids = [one.id for one in listed.entries if one.spiffe_id == spiffe_id]
    await entries.BatchDelete(entry_pb2.BatchDeleteEntryRequest(ids=ids))


async def test_two_services_call_each_other(agent: RunningAgent) -> None:
    async with ready(agent, WEB) as web, ready(agent, API) as api:
        assert (str(web.snapshot().spiffe_id), str(api.snapshot().spiffe_id)) == (WEB, API)
        assert web.status().revocations_synced
        async with (
            echo_server_aio(api, [WEB]) as address,
            secure_channel_aio(web, address, peer=API) as channel,
        ):
            answer = await channel.unary_unary(NAMES["unary_unary"])(b"hello")
            assert answer == f"hello|{WEB}".encode()
        token = await web.fetch_jwt_svid("orders")
        assert (await web.fetch_jwt_svid("orders")).token == token.token
        assert str(api.validate_jwt_svid(token.token, "orders").spiffe_id) == WEB
        assert str((await api.confirm_jwt_svid(token.token, "orders")).spiffe_id) == WEB


async def test_an_identity_is_gone_as_soon_as_its_entry_is(
    broker: RunningBroker, agent: RunningAgent
) -> None:
    async with ready(agent, WEB) as web, ready(agent, API) as api:
        begun = time.monotonic()
        await delete(broker, WEB)
        await until(lambda: web.status().state is SourceState.WITHDRAWN, seconds=5)
        assert time.monotonic() - begun < 2
        assert api.status().ready
        await broker.entry("/web", "machine", selectors=[MINE])
        await until(lambda: web.status().ready, seconds=5)
        # The last one too: then the whole stream is refused.
        await delete(broker, WEB)
        await delete(broker, API)
        await until(lambda: not api.status().ready and not web.status().ready, seconds=5)
        await broker.entry("/api", "machine", selectors=[MINE])
        await until(lambda: api.status().ready, seconds=5)


async def test_a_revoked_identity_is_replaced_and_refused_by_others(
    broker: RunningBroker, agent: RunningAgent
) -> None:
    async with ready(agent, WEB) as web, ready(agent, API) as api:
        before = web.snapshot()
        old = peer_from_pem(before.x509.chain_pem)
        check_current(old, api.denied)
        await broker.revoke(id=before.serial)
        await until(lambda: web.status().ready and web.snapshot().serial != before.serial)
        await until(lambda: before.serial in api.denied)
        with pytest.raises(PeerRevoked):
            check_current(old, api.denied)
        check_current(peer_from_pem(web.snapshot().x509.chain_pem), api.denied)


async def test_a_revoked_token_is_known_to_everybody(
    broker: RunningBroker, agent: RunningAgent
) -> None:
    async with ready(agent, WEB) as web, ready(agent, API) as api:
        token = await web.fetch_jwt_svid("orders")
        await api.confirm_jwt_svid(token.token, "orders")
        api.validate_jwt_svid(token.token, "orders")
        (issued,) = [
            one for one in await broker.ledger() if one.kind == credential_pb2.CREDENTIAL_KIND_JWT
        ]
        await broker.revoke(jti=issued.id)
        await until(lambda: issued.id in api.denied)
        for verdict in (
            lambda: asyncio.to_thread(api.validate_jwt_svid, token.token, "orders"),
            lambda: api.confirm_jwt_svid(token.token, "orders"),
        ):
            with pytest.raises(PeerRevoked):
                await verdict()


async def test_an_identity_revoked_as_a_whole_takes_its_tokens_with_it(
    broker: RunningBroker, agent: RunningAgent
) -> None:
    async with ready(agent, WEB) as web, ready(agent, API) as api:
        assert api.status().revocations_heard_at is not None
        peer = peer_from_pem(web.snapshot().x509.chain_pem)
        token = await web.fetch_jwt_svid("orders")
        begun = time.monotonic()
        await broker.revoke(spiffe_id=WEB)
        await until(lambda: api.denied.names(WEB), seconds=2)
        assert time.monotonic() - begun < 2
        with pytest.raises(PeerRevoked):
            check_current(peer, api.denied)
        await until(lambda: bool(api.denied.keep().epochs), seconds=2)
        with pytest.raises(PeerRevoked):
            api.validate_jwt_svid(token.token, "orders")


async def test_an_agent_that_was_restarted_is_found_again(
    broker: RunningBroker, tmp_path: Path
) -> None:
    await broker.entry("/web", "machine", selectors=[MINE])
    directory = tmp_path / "agent"
    kept = {"data_dir": str(tmp_path / "kept")}
    async with running_agent(broker, directory, agent=kept) as first:
        settings = first.settings
        source = IdentitySource.from_workload_api(first.workload_api)
        await source.start()
        before = await source.wait_ready(10)
    async with source:
        await until(lambda: source.status().last_error is not None)
        assert source.snapshot().serial == before.serial
        await asyncio.sleep(0.5)
        async with running_agent(broker, directory, settings=settings):
            await until(lambda: source.snapshot().serial != before.serial, seconds=10)
            assert str(source.snapshot().spiffe_id) == WEB


async def test_silence_is_refused_behind_an_agent_whose_broker_is_gone(tmp_path: Path) -> None:
    """The agent still sends the lists it has, good for an hour, and they are no news."""
    policy = StalenessPolicy.refuse(2)
    gone = AsyncExitStack()
    async with AsyncExitStack() as kept:
        settings = settings_in(tmp_path / "idb", ca={"key_manager": "memory"})
        await kept.enter_async_context(gone)
        broker = await gone.enter_async_context(running(settings))
        for path in ("/web", "/api"):
            await broker.entry(path, "machine", selectors=[MINE])
        agent = await kept.enter_async_context(running_agent(broker, tmp_path / "agent"))
        api = await kept.enter_async_context(ready(agent, API))
        address = await kept.enter_async_context(echo_server_aio(api, [WEB]))
        source = await kept.enter_async_context(
            IdentitySource.from_workload_api(agent.workload_api, spiffe_id=WEB, staleness=policy)
        )
        snapshot = await source.wait_ready(10)
        assert source.status().revocations_synced
        assert source.denied.lists_synced
        peer = peer_from_pem(snapshot.x509.chain_pem)
        await gone.aclose()
        # A heartbeat of the agent may still be under way.
        await until(lambda: source.status().revocations_stale, seconds=HEARTBEAT_SECONDS + 4)
        deadline = time.monotonic() + HEARTBEAT_SECONDS + 1
        while time.monotonic() < deadline:
            with pytest.raises(RevocationsStale):
                check_current(peer, source.denied)
            await asyncio.sleep(0.2)
        assert source.status().revocations_stale
        assert source.denied.lists_synced
        async with secure_channel_aio(source, address, peer=API) as channel:
            with pytest.raises(RevocationsStale):
                await channel.unary_unary(NAMES["unary_unary"])(b"hello", timeout=5)
