"""A whole node agent in the test's own event loop, joined to the broker of support/line.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import grpc

from identity_broker.agent.app import Agent, AgentAddresses, run_agent
from identity_broker.config.agent_settings import AgentSettings
from identity_broker.config.loading import load_agent
from identity_client._wire.workload import SECURITY_METADATA, WorkloadApiStub, X509SVIDRequest
from support.line import TRUST_DOMAIN, RunningBroker, node_id


def agent_settings(
    broker: RunningBroker, directory: Path, *, token: str, **tables: dict[str, Any]
) -> AgentSettings:
    """Settings of an agent that keeps everything in `directory`."""
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    token_file = directory / "token"
    token_file.write_text(token)
    token_file.chmod(0o600)
    merged: dict[str, dict[str, Any]] = {
        "agent": {
            "trust_domain": TRUST_DOMAIN,
            "runtime_dir": str(directory / "run"),
            "drain_timeout": "1s",
        },
        "broker": {
            "address": broker.addresses.address,
            "bootstrap_address": broker.addresses.bootstrap_address,
        },
        "trust": {"bundle_file": str(broker.settings.server.bundle_file)},
        "node": {"join_token_file": str(token_file)},
    }
    for name, table in tables.items():
        merged[name] = {**merged.get(name, {}), **table}
    return load_agent(None, merged, env={})


@dataclass
class RunningAgent:
    """An agent that is up."""

    addresses: AgentAddresses
    settings: AgentSettings
    node_name: str
    agent: Agent
    _channels: list[grpc.aio.Channel] = field(default_factory=list)

    @property
    def workload_api(self) -> str:
        """As in SPIFFE_ENDPOINT_SOCKET."""
        return self.addresses.workload_api

    @property
    def admin_socket(self) -> Path:
        return self.addresses.admin_socket

    @property
    def node_id(self) -> str:
        return node_id(self.node_name)

    def channel(self) -> grpc.aio.Channel:
        """A connection of its own to the workloads' socket."""
        channel = grpc.aio.insecure_channel(
            self.workload_api.replace("unix://", "unix:"),
            options=[("grpc.use_local_subchannel_pool", 1)],
        )
        self._channels.append(channel)
        return channel

    def stub(self) -> Any:
        """The Workload API, over a connection of its own."""
        return WorkloadApiStub(self.channel())

    def x509_stream(self) -> Any:
        """A FetchX509SVID call of this very process."""
        return self.stub().FetchX509SVID(X509SVIDRequest(), metadata=SECURITY_METADATA)

    async def fetch_x509(self) -> Any:
        """The first answer of a FetchX509SVID call."""
        call = self.x509_stream()
        try:
            return await call.read()
        finally:
            call.cancel()

    async def until(self, holds: Callable[[], bool], seconds: float = 10.0) -> None:
        """Wait until something is so."""
        deadline = monotonic() + seconds
        while not holds():
            assert monotonic() < deadline, "it did not come about"
            await asyncio.sleep(0.005)

    async def in_step(self) -> None:
        """Wait until the broker was heard."""
        await self.until(lambda: self.agent.report().connected)

    async def close(self) -> None:
        """Close the connections that the test opened."""
        for channel in self._channels:
            await channel.close()


@asynccontextmanager
async def running_agent(
    broker: RunningBroker,
    directory: Path,
    *,
    name: str = "machine",
    settings: AgentSettings | None = None,
    wait: bool = True,
    **tables: dict[str, Any],
) -> AsyncIterator[RunningAgent]:
    """Run an agent for as long as the block lasts.

    Args:
        name: the node's, for its join token.
        settings: instead of fresh ones with a fresh token (for a second start).
        wait: until it is in step with the broker.
        tables: settings beside the usual ones.
    """
    if settings is None:
        settings = agent_settings(broker, directory, token=await broker.token(name), **tables)
    stop = asyncio.Event()
    started: asyncio.Future[AgentAddresses] = asyncio.get_running_loop().create_future()
    made: list[Agent] = []
    task = asyncio.create_task(
        run_agent(settings, ready=started.set_result, stop=stop, made=made.append)
    )
    first: set[asyncio.Future[Any]] = {task, started}
    await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        await task
    running = RunningAgent(started.result(), settings, name, made[0])
    try:
        if wait:
            await running.in_step()
        yield running
    finally:
        await running.close()
        stop.set()
        await task
