"""An agent whose broker is away, lags, rotates, or evicted it; and an agent that starts again."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import Any

import grpc
import pytest
from cryptography import x509

from identity_api.broker.v1 import node_pb2, node_pb2_grpc, types_pb2
from identity_broker.agent.mirror import Mismatch
from identity_broker.agent.trust import fingerprint
from identity_broker.domain.clock import SystemClock
from identity_client._wire.workload import SECURITY_METADATA, JWTSVIDRequest
from identity_client.errors import SettingsInvalid
from support.agent import RunningAgent, agent_settings, running_agent
from support.line import RunningBroker, reason_of, running, settings_in
from support.machines import MachineCa, client_half
from support.node import fixed, machine_broker

ME = [types_pb2.Selector(type="unix", value=f"uid:{os.getuid()}")]
FILE_KEYS: dict[str, Any] = {"ca": {"key_manager": "file"}}


@asynccontextmanager
async def away_and_back(
    directory: Path, addresses: dict[str, Any], **tables: Any
) -> AsyncIterator[RunningBroker]:
    """The same broker again, where it was."""
    settings = settings_in(directory, server=addresses, **{**FILE_KEYS, **tables})
    async with running(settings) as broker:
        yield broker


async def serial_of(agent: RunningAgent) -> int:
    answer = await agent.fetch_x509()
    return x509.load_der_x509_certificate(answer.svids[0].x509_svid).serial_number


async def leaf_of(call: Any) -> x509.Certificate:
    answer = await call.read()
    return x509.load_der_x509_certificate(answer.svids[0].x509_svid)


async def test_a_broker_that_is_away_at_the_start_is_waited_for(
    tmp_path: Path, open_directory: Path
) -> None:
    directory = tmp_path / "broker"
    async with running(settings_in(directory, **FILE_KEYS)) as broker:
        await broker.entry("/web", "machine", selectors=ME)
        settings = agent_settings(
            broker, open_directory / "agent", token=await broker.token("machine")
        )
        addresses = fixed(broker)
    async with running_agent(broker, open_directory, settings=settings, wait=False) as agent:
        with pytest.raises(grpc.RpcError) as caught:
            await agent.fetch_x509()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert reason_of(caught.value) == "AGENT_NOT_READY"
        report = agent.agent.report()
        assert report.judged.health == "down"
        assert any("not attested" in problem for problem in report.judged.problems)
        async with away_and_back(directory, addresses):
            await agent.until(lambda: agent.agent.report().connected, 40)
            assert (await agent.fetch_x509()).svids[0].spiffe_id == "spiffe://example.org/web"


async def test_what_is_valid_is_served_while_the_broker_is_away_and_renewed_when_it_is_back(
    tmp_path: Path, open_directory: Path
) -> None:
    directory = tmp_path / "broker"
    stack = running(settings_in(directory, **FILE_KEYS))
    broker = await stack.__aenter__()
    addresses = fixed(broker)
    await broker.entry("/web", "machine", selectors=ME, x509_ttl_seconds=20, jwt_ttl_seconds=20)
    async with running_agent(broker, open_directory / "agent") as agent:
        stub = agent.stub()

        async def token() -> str:
            answer = await stub.FetchJWTSVID(
                JWTSVIDRequest(audience=["a"]), metadata=SECURITY_METADATA
            )
            return str(answer.svids[0].svid)

        first, first_token = await serial_of(agent), await token()
        call = agent.x509_stream()
        await call.read()
        await stack.__aexit__(None, None, None)
        # Past half of their life: renewing fails, and they are served all the same.
        await agent.until(lambda: agent.agent.report().overdue > 0, 20)
        assert await serial_of(agent) == first
        assert await token() == first_token
        with pytest.raises(grpc.RpcError) as caught:
            await stub.FetchJWTSVID(
                JWTSVIDRequest(audience=["never asked for before"]), metadata=SECURITY_METADATA
            )
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        report = agent.agent.report()
        assert report.judged.health == "degraded"
        assert not report.connected
        assert any("could not be renewed" in problem for problem in report.judged.problems)
        async with away_and_back(directory, addresses):
            async with asyncio.timeout(30):
                while (await leaf_of(call)).serial_number == first:
                    pass  # The new revocation list comes before the new SVID.
            await agent.until(lambda: agent.agent.report().judged.health == "ok", 20)
            assert await token() != first_token


async def test_a_change_made_while_the_agent_was_away_arrives_with_the_resumed_stream(
    tmp_path: Path, open_directory: Path
) -> None:
    directory = tmp_path / "broker"
    async with running(settings_in(directory, **FILE_KEYS)) as broker:
        addresses = fixed(broker)
        settings = agent_settings(
            broker,
            open_directory / "agent",
            token=await broker.token("machine"),
            agent={"data_dir": str(open_directory / "data")},
        )
        async with running_agent(broker, open_directory, settings=settings) as agent:
            await broker.entry("/before", "machine", selectors=ME)
            await agent.until(lambda: agent.agent.report().entries == 1)
            agent.agent._node.resync()  # asks for everything, and comes to the same
            await agent.until(lambda: agent.agent.report().entries == 1)
            assert len((await agent.fetch_x509()).svids) == 1
    async with away_and_back(directory, addresses) as back:
        await back.entry("/after", "machine", selectors=ME)
        assert settings.node.join_token_file is not None
        settings.node.join_token_file.unlink()
        async with running_agent(back, open_directory, settings=settings) as agent:
            found = {svid.spiffe_id for svid in (await agent.fetch_x509()).svids}
            assert found == {"spiffe://example.org/before", "spiffe://example.org/after"}


async def test_a_lagging_broker_is_not_believed(tmp_path: Path, open_directory: Path) -> None:
    """A stale snapshot is never swapped in; the full state that follows is asked for."""
    async with (
        running(settings_in(tmp_path / "broker", **FILE_KEYS)) as broker,
        running_agent(broker, open_directory / "agent") as agent,
    ):
        await broker.entry("/web", "machine", selectors=ME)
        await agent.until(lambda: agent.agent.report().entries == 1)
        mirror = agent.agent._mirror
        mirror._revision += 1_000  # as if another broker, further on, had told us
        agent.agent._node.resync()
        hearing = agent.agent._follower.hearing
        await agent.until(lambda: hearing.mismatch is Mismatch.STALE)
        assert len((await agent.fetch_x509()).svids) == 1
        assert any("not in step" in each for each in agent.agent.report().judged.problems)
        mirror._stale.since = monotonic() - 61  # it has insisted for a minute
        agent.agent._node.resync()
        await agent.until(lambda: agent.agent.report().judged.health == "ok", 40)
        assert mirror.revision < 1_000


async def test_a_restart_needs_no_new_token_and_a_start_without_a_key_store_does(
    tmp_path: Path, open_directory: Path
) -> None:
    async with running(settings_in(tmp_path / "broker", **FILE_KEYS)) as broker:
        await broker.entry("/web", "machine", selectors=ME)
        data = open_directory / "data"
        settings = agent_settings(
            broker,
            open_directory / "agent",
            token=await broker.token("machine"),
            agent={"data_dir": str(data)},
        )
        async with running_agent(broker, open_directory, settings=settings) as agent:
            before = agent.agent.report().node_serial
            await agent.until((data / "node" / "node.json").exists)
        kept = data / "node" / "node.json"
        assert kept.stat().st_mode & 0o777 == 0o600
        assert settings.node.join_token_file is not None
        settings.node.join_token_file.unlink()
        async with running_agent(broker, open_directory, settings=settings) as agent:
            assert agent.node_id == agent.agent.report().node_id
            assert (await agent.fetch_x509()).svids
            await agent.until(lambda: agent.agent.report().node_serial != before)
        forgetful = replace_data_dir(settings)
        async with running_agent(broker, open_directory, settings=forgetful, wait=False) as agent:
            await agent.until(lambda: agent.agent.report().judged.health == "down")
            await agent.until(
                lambda: any("token" in each for each in agent.agent.report().judged.problems)
            )


def replace_data_dir(settings: Any) -> Any:
    """The same settings, with the keys in memory alone."""
    return settings.model_copy(
        update={"agent": settings.agent.model_copy(update={"data_dir": None})}
    )


async def test_two_agents_do_not_share_a_socket_or_a_key_store(
    tmp_path: Path, open_directory: Path
) -> None:
    async with running(settings_in(tmp_path / "broker", **FILE_KEYS)) as broker:
        settings = agent_settings(
            broker,
            open_directory / "agent",
            token=await broker.token("machine"),
            agent={"data_dir": str(open_directory / "data")},
        )
        async with running_agent(broker, open_directory, settings=settings):
            with pytest.raises(SettingsInvalid):
                async with running_agent(broker, open_directory, settings=settings):
                    pass


async def test_an_evicted_machine_proves_itself_again(open_directory: Path) -> None:
    machines = MachineCa()
    key, certificate = machines.machine()
    async with machine_broker(open_directory, machines) as broker:
        directory = open_directory / "agent"
        directory.mkdir()
        client_half(directory, key, certificate)
        settings = agent_settings(
            broker,
            directory,
            token="",
            node={
                "join_token_file": None,
                "cert_file": str(directory / "machine.pem"),
                "key_file": str(directory / "machine.key"),
            },
        )
        async with running_agent(broker, directory, settings=settings) as agent:
            node = agent.agent.report().node_id
            await broker.entry("/web", "", parent_id=node, selectors=ME)
            await agent.until(lambda: agent.agent.report().entries == 1)
            before = await serial_of(agent)
            nodes = await broker.stub(node_pb2_grpc.NodeStub)
            serial = agent.agent.report().node_serial
            await nodes.Evict(node_pb2.EvictNodeRequest(spiffe_id=node))
            await agent.until(lambda: agent.agent.report().node_serial != serial, 30)
            await agent.until(lambda: agent.agent.report().connected, 30)
            assert agent.agent.report().node_id == node
            assert await serial_of(agent)
            assert before


async def test_svids_follow_a_change_of_the_signing_authority(
    tmp_path: Path, open_directory: Path
) -> None:
    """What leads to an authority that left the bundle is made anew before anybody is told."""
    async with (
        running(settings_in(tmp_path / "broker", **FILE_KEYS)) as broker,
        running_agent(broker, open_directory / "agent") as agent,
    ):
        await broker.entry("/web", "machine", selectors=ME)
        await agent.until(lambda: agent.agent.report().x509_svids == 1)
        call = agent.x509_stream()
        first = await call.read()
        svids, mirror = agent.agent._svids, agent.agent._mirror
        bundle = mirror.bundle
        assert bundle is not None
        # The broker's next word names the authority again: until then nothing may be handed out.
        svids.trust([])
        assert agent.agent.report().x509_svids == 1
        entry = mirror.entries(agent.agent._clock.now())[0]
        (key,) = svids._held
        assert svids.usable(key, entry, agent.agent._clock.now()) is None
        svids.trust(bundle.x509_authorities)
        agent.agent._renewals.wake()
        second = await asyncio.wait_for(call.read(), 10)
        assert second.svids[0].x509_svid != first.svids[0].x509_svid
        call.cancel()


async def test_first_trust_from_an_address_with_a_pinned_root(
    tmp_path: Path, open_directory: Path
) -> None:
    async with running(settings_in(tmp_path / "broker", **FILE_KEYS)) as broker:
        pem = broker.bundle_pem.decode()
        (root,) = (ssl.PEM_cert_to_DER_cert(part) for part in [pem])
        url = f"http://{broker.addresses.http_address}/bundle"
        tables: dict[str, Any] = {
            "trust": {
                "bundle_file": None,
                "bundle_url": url,
                "bundle_fingerprints": [fingerprint(root)],
            }
        }
        async with running_agent(broker, open_directory / "agent", **tables) as agent:
            assert agent.agent.report().judged.health == "ok"
        tables["trust"]["bundle_fingerprints"] = ["00" * 32]
        with pytest.raises(SettingsInvalid) as caught:
            async with running_agent(broker, open_directory / "other", **tables):
                pass
        assert caught.value.reason == "FINGERPRINT_MISMATCH"


async def test_a_clock_that_differs_from_the_broker_s_is_told(
    tmp_path: Path, open_directory: Path
) -> None:
    async with (
        running(settings_in(tmp_path / "broker", **FILE_KEYS)) as broker,
        running_agent(broker, open_directory / "agent") as agent,
    ):
        hearing = agent.agent._follower.hearing
        assert abs(hearing.skew) < 5
        agent.agent._follower._clock = Shifted(timedelta(hours=-1))
        await broker.entry("/web", "machine", selectors=ME)
        await agent.until(lambda: hearing.skew > 3_000)
        (problem,) = agent.agent.report().judged.problems
        assert "behind the broker's" in problem


class Shifted:
    """The system's clock, set wrong."""

    def __init__(self, by: timedelta) -> None:
        self._by = by

    def now(self) -> Any:
        return SystemClock().now() + self._by
