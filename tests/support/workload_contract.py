"""What stands behind a Workload API, for promises that every implementation keeps.

A `Stage` lets a test register, withdraw and revoke for its own process, and ask like a workload.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest

from identity_api.broker.v1 import entry_pb2, entry_pb2_grpc, types_pb2
from support.agent import RunningAgent, running_agent
from support.line import RunningBroker, running, settings_in
from support.workload_api import ServedWorkloadApi, served
from support.workload_identities import Grant, user


class Stage(Protocol):
    """A Workload API with its levers."""

    @property
    def address(self) -> str:
        """As in SPIFFE_ENDPOINT_SOCKET."""
        ...

    @property
    def stub(self) -> Callable[[], Any]:
        """Makes the standard's calls, over a connection of their own."""
        ...

    async def grant(self, path: str, *, mine: bool = True, hint: str = "") -> Any:
        """Register for this test's user, or for somebody else's."""
        ...

    async def withdraw(self, grant: Any) -> None: ...

    async def revoke(self, serial: int) -> None:
        """Revoke an X.509-SVID."""
        ...


class FakeStage:
    """Over `FakeIdentities`."""

    def __init__(self, api: ServedWorkloadApi) -> None:
        self.address = api.address
        self.stub = api.stub
        self._identities = api.identities

    async def grant(self, path: str, *, mine: bool = True, hint: str = "") -> Grant:
        uid = os.getuid() if mine else os.getuid() + 1
        return self._identities.grant(path, who=user(uid), hint=hint)

    async def withdraw(self, grant: Grant) -> None:
        self._identities.withdraw(grant)

    async def revoke(self, serial: int) -> None:
        (grant,) = (
            each for each in self._identities.grants if int(each.identity.serial, 16) == serial
        )
        self._identities.revoke(grant)


class RealStage:
    """Over a whole agent, joined to a whole broker."""

    def __init__(self, agent: RunningAgent, broker: RunningBroker) -> None:
        self.address = agent.workload_api
        self.stub = agent.stub
        self._broker = broker

    async def grant(
        self, path: str, *, mine: bool = True, hint: str = ""
    ) -> types_pb2.RegistrationEntry:
        uid = os.getuid() if mine else os.getuid() + 1
        selectors = [types_pb2.Selector(type="unix", value=f"uid:{uid}")]
        return await self._broker.entry(path, "machine", selectors=selectors, hint=hint)

    async def withdraw(self, grant: types_pb2.RegistrationEntry) -> None:
        entries = await self._broker.stub(entry_pb2_grpc.EntryStub)
        await entries.BatchDelete(entry_pb2.BatchDeleteEntryRequest(ids=[grant.id]))

    async def revoke(self, serial: int) -> None:
        await self._broker.revoke(id=f"{serial:040x}")


@asynccontextmanager
async def fake_stage(directory: Path) -> AsyncIterator[Stage]:
    async with served(directory) as api:
        yield FakeStage(api)


@asynccontextmanager
async def real_stage(directory: Path) -> AsyncIterator[Stage]:
    settings = settings_in(directory / "broker", ca={"key_manager": "memory"})
    async with (
        running(settings) as broker,
        running_agent(broker, directory / "agent") as agent,
    ):
        yield RealStage(agent, broker)


@pytest.fixture(params=[fake_stage, real_stage], ids=["stand-in", "agent"])
async def stage(request: pytest.FixtureRequest, open_directory: Path) -> AsyncIterator[Stage]:
    """A Workload API on which this process has no identity yet."""
    async with request.param(open_directory) as found:
        yield found
