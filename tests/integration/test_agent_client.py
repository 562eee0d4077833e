"""The SDK's client of the agent's own socket: a real agent, and sockets that are none."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from identity_api.agent.v1 import agent_pb2
from identity_client.agent_client import AgentClient, AgentHealth
from identity_client.errors import (
    BrokerUnavailable,
    IdentityError,
    NotPermitted,
    RequestRejected,
    SettingsInvalid,
)
from support.agent import RunningAgent, agent_settings, running_agent
from support.client import until
from support.line import RunningBroker, running, settings_in


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[RunningBroker]:
    """SQLite and keys in memory."""
    async with running(settings_in(tmp_path / "idb", ca={"key_manager": "memory"})) as running_one:
        yield running_one


async def asked(agent: RunningAgent, method: str, *arguments: Any) -> Any:
    """Asks in a thread, for the agent runs on this loop."""

    def ask() -> Any:
        with AgentClient(agent.admin_socket) as client:
            return getattr(client, method)(*arguments)

    return await asyncio.to_thread(ask)


async def test_an_agent_that_is_not_ready_says_so_itself(
    broker: RunningBroker, tmp_path: Path
) -> None:
    settings = agent_settings(broker, tmp_path / "agent", token="idbt_made-up")
    async with running_agent(broker, tmp_path / "agent", settings=settings, wait=False) as agent:
        await until(lambda: agent.agent.report().judged.problems != ())
        status = await asked(agent, "status")
        assert status.health is AgentHealth.DOWN
        assert status.problems
        assert (status.node_id, status.revision, status.heard_at) == ("", 0, None)
        with pytest.raises(BrokerUnavailable) as refused:
            await asked(agent, "explain_process", os.getpid())
        assert refused.value.reason == "AGENT_NOT_READY"


async def test_an_agent_says_how_it_is_and_why(broker: RunningBroker, tmp_path: Path) -> None:
    async with running_agent(broker, tmp_path / "agent") as agent:
        mine = {"type": "unix", "value": f"uid:{os.getuid()}"}
        other = {"type": "unix", "value": "path:/no/such/program"}
        for path, selectors in (("/mine", [mine]), ("/other", [mine, other])):
            await broker.entry(path, agent.node_name, selectors=selectors, id=path[1:])
        await agent.fetch_x509()
        status = await asked(agent, "status")
        assert status.health in {AgentHealth.OK, AgentHealth.DEGRADED}
        assert status.node_id == agent.node_id
        assert status.trust_domain == "example.org"
        assert status.connected
        assert status.broker_address == broker.addresses.address
        assert status.workload_api == agent.workload_api
        assert status.node_expires_at is not None
        assert status.started_at is not None
        assert status.heard_at is not None
        assert status.entries == 2
        assert status.x509_svids >= 1
        explained = await asked(agent, "explain_process", os.getpid())
        assert f"unix:uid:{os.getuid()}" in explained.selectors
        assert explained.selectors == tuple(sorted(explained.selectors))
        assert Path(explained.executable).name.startswith("python")
        first, second = explained.entries
        assert (first.entry_id, first.matches, first.missing) == ("mine", True, ())
        assert first.spiffe_id == "spiffe://example.org/mine"
        assert len(first.serial) == 40
        assert (second.entry_id, second.matches) == ("other", False)
        assert second.missing == ("unix:path:/no/such/program",)
        with pytest.raises(RequestRejected):
            await asked(agent, "explain_process", 0)
        with pytest.raises(RequestRejected):
            await asked(agent, "explain_process", 2**31)
        with pytest.raises(NotPermitted) as refused:
            await asked(agent, "explain_process", 2**31 - 1)
        assert refused.value.reason == "METHOD_DENIED"


def test_what_is_no_agent_is_said_before_anything_is_asked(tmp_path: Path) -> None:
    with pytest.raises(BrokerUnavailable) as missing:
        AgentClient(tmp_path / "none.sock")
    assert missing.value.reason == "AGENT_UNREACHABLE"
    assert "idb agent run" in missing.value.hint
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SettingsInvalid, match="is not a socket"):
        AgentClient(file)
    with pytest.raises(SettingsInvalid, match="too long"):
        AgentClient(tmp_path / ("x" * 108))
    left = tmp_path / "left.sock"
    with socket.socket(socket.AF_UNIX) as abandoned:
        abandoned.bind(str(left))
    with pytest.raises(BrokerUnavailable, match="no agent listens"):
        AgentClient(left)


def test_an_agent_that_goes_away_or_is_newer_is_understood(tmp_path: Path) -> None:
    newer = agent_pb2.StatusResponse(health=99, started_at=5)  # type: ignore[arg-type]
    path = tmp_path / "agent.sock"
    with serving(path, newer.SerializeToString()) as stop, AgentClient(path, timeout=5) as client:
        status = client.status()
        assert status.health is AgentHealth.UNKNOWN
        assert (status.node_expires_at, status.heard_at) == (None, None)
        stop()
        with pytest.raises(BrokerUnavailable) as away:
            client.status()
        assert away.value.reason == "AGENT_UNREACHABLE"


def test_an_agent_that_does_not_answer_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen()
        with AgentClient(path, timeout=0.3) as client, pytest.raises(IdentityError) as late:
            client.status()
        assert late.value.reason == "DEADLINE_EXCEEDED"
        assert "broker" not in late.value.message


@contextmanager
def serving(path: Path, answer: bytes) -> Iterator[Any]:
    """Something that answers `answer` to Status."""
    handlers: dict[str, Any] = {
        "Status": grpc.unary_unary_rpc_method_handler(lambda _request, _context: answer)
    }
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=1))
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("identity_api.agent.v1.Agent", handlers),)
    )
    server.add_insecure_port(f"unix:{path}")
    server.start()
    try:
        yield lambda: server.stop(0).wait()
    finally:
        server.stop(0).wait()
