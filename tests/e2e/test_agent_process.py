"""The agent as a real process: killed, stopped, started too early, starved, told wrong times."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import grpc
import pytest
from cryptography import x509
from spiffe import JwtSource, X509Source

from identity_api.broker.v1 import node_pb2, node_pb2_grpc, types_pb2
from identity_client._wire.workload import (
    SECURITY_METADATA,
    WorkloadApiStub,
    X509SVIDRequest,
)
from support.agent_process import AgentProcess, agent_process, config_for
from support.line import RunningBroker, reason_of, running, settings_in
from support.node import fixed

ME = [types_pb2.Selector(type="unix", value=f"uid:{os.getuid()}")]
WEB = "spiffe://example.org/web"
_OPTIONS = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 300))
FAKETIME = next(
    (
        path
        for path in Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")
        if sys.platform == "linux"
    ),
    None,
)


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[RunningBroker]:
    settings = settings_in(tmp_path / "broker", ca={"key_manager": "file"})
    async with running(settings) as running_broker:
        await running_broker.entry("/web", "machine", selectors=ME)
        yield running_broker


@asynccontextmanager
async def started(config: Path, **options: Any) -> AsyncIterator[AgentProcess]:
    """An agent process, started and ended beside this loop, which the broker runs in."""
    context = agent_process(config, **options)
    agent = await asyncio.to_thread(context.__enter__)
    try:
        yield agent
    finally:
        await asyncio.to_thread(context.__exit__, None, None, None)


@asynccontextmanager
async def watching(agent: AgentProcess) -> AsyncIterator[Watcher]:
    watcher = Watcher(agent.socket)
    try:
        yield watcher
    finally:
        await watcher.close()


class Watcher:
    """A workload that keeps its stream open and opens it again, as clients do."""

    def __init__(self, path: str) -> None:
        self.seen: list[tuple[int, str]] = []
        self.errors: list[grpc.RpcError] = []
        options = [
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 300),
        ]
        self._channel = grpc.aio.insecure_channel(f"unix:{path}", options=options)
        self._task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        stub: Any = WorkloadApiStub(self._channel)
        while True:
            try:
                async for answer in stub.FetchX509SVID(
                    X509SVIDRequest(), metadata=SECURITY_METADATA
                ):
                    leaf = x509.load_der_x509_certificate(answer.svids[0].x509_svid)
                    one = (leaf.serial_number, answer.svids[0].spiffe_id)
                    if not self.seen or self.seen[-1] != one:
                        self.seen.append(one)
            except grpc.RpcError as error:
                self.errors.append(error)
            await asyncio.sleep(0.1)

    @property
    def codes(self) -> set[grpc.StatusCode]:
        return {error.code() for error in self.errors}

    async def until(self, holds: Callable[[], bool], seconds: float = 30.0) -> None:
        deadline = monotonic() + seconds
        while not holds():
            assert monotonic() < deadline, f"{self.seen} {self.codes}"
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._channel.close()


def serial_of(source: X509Source) -> int:
    svid = source.get_x509_context().default_svid
    assert str(svid.spiffe_id) == WEB
    return int(svid.leaf.serial_number)


async def test_kill_and_a_start_without_a_token_under_open_clients(
    broker: RunningBroker, open_directory: Path
) -> None:
    """py-spiffe's sources and a bare stream live through it; the sockets of the dead are taken."""
    config = config_for(broker, open_directory / "a", token=await broker.token("machine"))
    async with started(config) as agent, watching(agent) as watcher:
        await watcher.until(lambda: bool(watcher.seen))
        source = await asyncio.to_thread(X509Source, socket_path=agent.workload_api)
        tokens = await asyncio.to_thread(JwtSource, socket_path=agent.workload_api)
        updates: list[int] = []
        source.subscribe_for_updates(lambda: updates.append(serial_of(source)))
        try:
            first = serial_of(source)
            (open_directory / "a" / "token").unlink()
            killed = await asyncio.to_thread(agent.end, signal.SIGKILL)
            assert killed == -signal.SIGKILL
            assert Path(agent.socket).exists()
            async with started(config) as again:
                assert again.workload_api == agent.workload_api
                await watcher.until(lambda: len(watcher.seen) >= 2)
                await watcher.until(lambda: serial_of(source) != first)
                assert updates
                token = await asyncio.to_thread(tokens.fetch_svid, {"a"})
                assert str(token.spiffe_id) == WEB
                assert watcher.codes <= {grpc.StatusCode.UNAVAILABLE}
                status = await asyncio.to_thread(again.status)
                assert status["health"] == "ok"
                assert status["node_id"].endswith("/machine")
        finally:
            await asyncio.to_thread(source.close)
            await asyncio.to_thread(tokens.close)


async def test_sigterm_ends_it_well_and_soon(broker: RunningBroker, open_directory: Path) -> None:
    config = config_for(broker, open_directory / "a", token=await broker.token("machine"))
    async with started(config) as agent, watching(agent) as watcher:
        await watcher.until(lambda: bool(watcher.seen))
        begun = monotonic()
        assert await asyncio.to_thread(agent.end) == 0
        assert monotonic() - begun < 15
        await watcher.until(lambda: bool(watcher.errors))
        assert watcher.errors[0].code() is grpc.StatusCode.UNAVAILABLE
        assert not Path(agent.socket).exists()
        assert not Path(agent.admin_socket).exists()
        assert "Traceback" not in agent.log
        assert "PRIVATE KEY" not in agent.log
        assert "idbt_" not in agent.log


async def test_it_starts_before_its_broker_and_outlives_it(
    tmp_path: Path, open_directory: Path
) -> None:
    directory = tmp_path / "broker"
    tables: dict[str, Any] = {"ca": {"key_manager": "file"}}
    async with running(settings_in(directory, **tables)) as broker:
        await broker.entry("/web", "machine", selectors=ME, x509_ttl_seconds=12)
        config = config_for(broker, open_directory / "a", token=await broker.token("machine"))
        addresses = fixed(broker)
    async with started(config) as agent, watching(agent) as watcher:
        await watcher.until(lambda: bool(watcher.errors))
        assert watcher.codes == {grpc.StatusCode.UNAVAILABLE}
        down = await asyncio.to_thread(agent.idb, "agent", "status", "-o", "json")
        assert down.code == 6
        assert down.json["health"] == "down"
        assert down.error["reason"] == "AGENT_NOT_READY"
        async with running(settings_in(directory, server=addresses, **tables)):
            await watcher.until(lambda: bool(watcher.seen))
        # Away past half of the SVID's life: what is valid is served on, and health says so.
        errors = len(watcher.errors)
        begun = monotonic()
        while (status := await asyncio.to_thread(agent.status))["overdue"] == 0:
            assert monotonic() - begun < 12
        assert status["health"] == "degraded"
        assert len(watcher.errors) == errors
        seen = len(watcher.seen)
        async with running(settings_in(directory, server=addresses, **tables)):
            await watcher.until(lambda: len(watcher.seen) > seen)
            begun = monotonic()
            while (await asyncio.to_thread(agent.status))["health"] != "ok":
                assert monotonic() - begun < 20
        assert len(watcher.errors) == errors


async def test_a_banned_node_s_workloads_lose_their_identities_and_the_agent_stays_up(
    broker: RunningBroker, open_directory: Path
) -> None:
    config = config_for(broker, open_directory / "a", token=await broker.token("machine"))
    async with started(config) as agent, watching(agent) as watcher:
        await watcher.until(lambda: bool(watcher.seen))
        nodes = await broker.stub(node_pb2_grpc.NodeStub)
        node = "spiffe://example.org/idb/node/join_token/machine"
        begun = monotonic()
        await nodes.Ban(node_pb2.BanNodeRequest(spiffe_id=node, reason="stolen"))
        await watcher.until(lambda: bool(watcher.errors))
        assert monotonic() - begun < 8
        assert watcher.errors[0].code() is grpc.StatusCode.PERMISSION_DENIED
        down = await asyncio.to_thread(agent.idb, "agent", "status", "-o", "json")
        assert down.code == 6
        assert any("banned" in problem for problem in down.json["problems"])
        assert agent.process.poll() is None
        # Wanted again: evicted, and a new token lies where the old one was.
        await nodes.Evict(node_pb2.EvictNodeRequest(spiffe_id=node))
        (open_directory / "a" / "token").write_text(await broker.token("machine"))
        seen = len(watcher.seen)
        await watcher.until(lambda: len(watcher.seen) > seen, 60)
        assert watcher.seen[-1][1] == WEB


async def test_a_full_disk_stops_nothing_and_is_told(tmp_path: Path, open_directory: Path) -> None:
    """RLIMIT_FSIZE stands for the disk: no file grows beyond a few bytes."""
    settings = settings_in(
        tmp_path / "broker", ca={"key_manager": "memory"}, svid={"node_ttl": "10s"}
    )
    async with running(settings) as broker:
        await broker.entry("/web", "machine", selectors=ME)
        config = config_for(broker, open_directory / "a", token=await broker.token("machine"))
        kept = open_directory / "a" / "data" / "node" / "node.json"
        async with (
            started(config, prefix=("prlimit", "--fsize=64:unlimited")) as agent,
            watching(agent) as watcher,
        ):
            await watcher.until(lambda: bool(watcher.seen))
            status = await asyncio.to_thread(agent.status)
            assert status["health"] == "degraded"
            assert any("cannot be kept" in problem for problem in status["problems"])
            assert not kept.exists()
            # Somebody makes room: when the node is renewed, its key is kept.
            unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            resource.prlimit(agent.process.pid, resource.RLIMIT_FSIZE, unlimited)
            await watcher.until(kept.exists)
            assert kept.stat().st_mode & 0o777 == 0o600
            begun = monotonic()
            while (await asyncio.to_thread(agent.status))["problems"]:
                assert monotonic() - begun < 10
            assert not watcher.errors


@pytest.mark.slow
@pytest.mark.skipif(FAKETIME is None, reason="libfaketime is not installed")
async def test_clocks_that_jump_take_nothing_that_is_valid_and_everything_comes_back(
    broker: RunningBroker, open_directory: Path
) -> None:
    config = config_for(broker, open_directory / "a", token=await broker.token("machine"))
    clock = open_directory / "clock"
    clock.write_text("+0")
    env = {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "GRPC_VERBOSITY": "NONE",
    }
    async with started(config, env=env) as agent, watching(agent) as watcher:
        await watcher.until(lambda: len(watcher.seen) == 1)
        clock.write_text("+40m")  # past half of the life: renewed at once
        await watcher.until(lambda: len(watcher.seen) == 2)
        clock.write_text("+5h")  # everything has expired here, the broker's certificate too
        await asyncio.sleep(2)
        clock.write_text("+0")
        await watcher.until(lambda: len(watcher.seen) >= 3)
        seen = len(watcher.seen)
        clock.write_text("-1d")  # nothing is valid yet, says this clock
        await asyncio.sleep(2)
        assert len(watcher.seen) == seen
        clock.write_text("+0")
        await broker.entry("/another", "machine", selectors=ME)
        begun = monotonic()
        while agent_entries(await asyncio.to_thread(agent.status)) != 2:
            assert monotonic() - begun < 20
        assert watcher.codes <= {grpc.StatusCode.UNAVAILABLE}
        assert agent.process.poll() is None
        assert not [error for error in watcher.errors if reason_of(error) == "NO_IDENTITY"]


def agent_entries(status: Any) -> int:
    return int(status["entries"])
