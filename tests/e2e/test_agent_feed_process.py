"""The agent as a real process that passes revocations on: killed with followers, and crowded."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509

from identity_api.broker.v1 import types_pb2
from identity_ca.serial import serial_hex
from identity_client._wire.workload import SECURITY_METADATA, WorkloadApiStub, X509SVIDRequest
from support.agent_process import AgentProcess, agent_process, config_for
from support.feed import until, verifier
from support.line import RunningBroker, running, settings_in

ME = [types_pb2.Selector(type="unix", value=f"uid:{os.getuid()}")]
CROWD = Path(__file__).parents[1] / "support" / "feed_crowd.py"
PROCESSES, STREAMS = 8, 125


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[RunningBroker]:
    settings = settings_in(tmp_path / "broker", ca={"key_manager": "file"})
    async with running(settings) as running_broker:
        await running_broker.entry("/web", "machine", selectors=ME)
        yield running_broker


@asynccontextmanager
async def started(config: Path) -> AsyncIterator[AgentProcess]:
    """An agent process beside this loop, which the broker runs in."""
    context = agent_process(config)
    agent = await asyncio.to_thread(context.__enter__)
    try:
        yield agent
    finally:
        await asyncio.to_thread(context.__exit__, None, None, None)


@asynccontextmanager
async def channel_to(agent: AgentProcess) -> AsyncIterator[grpc.aio.Channel]:
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(f"unix:{agent.socket}", options=options) as channel:
        yield channel


async def svid_of(agent: AgentProcess) -> str:
    """The serial of this process's SVID."""
    async with channel_to(agent) as channel:
        stub: Any = WorkloadApiStub(channel)
        call = stub.FetchX509SVID(
            X509SVIDRequest(), metadata=SECURITY_METADATA, wait_for_ready=True, timeout=20
        )
        answer = await call.read()
        call.cancel()
    leaf = x509.load_der_x509_certificate(answer.svids[0].x509_svid)
    return serial_hex(leaf.serial_number)


async def test_a_killed_agent_tells_everything_again(
    broker: RunningBroker, open_directory: Path
) -> None:
    config = config_for(broker, open_directory / "agent", token=await broker.token("machine"))
    async with started(config) as agent, channel_to(agent) as channel:
        first = await svid_of(agent)
        await broker.revoke(id=first)
        async with verifier(channel) as one, verifier(channel) as other:
            await until(lambda: first in one.denied & other.denied)
            stood = one.complete_at
            await asyncio.to_thread(agent.end, signal.SIGKILL)
            await until(lambda: one.over and other.over)
            assert one.ended is not None
            assert one.ended.code() is grpc.StatusCode.UNAVAILABLE
            assert one.denied == {first}
    # While it is down, something is revoked: whoever comes back hears of it, wherever it stood.
    rows = await broker.ledger(spiffe_id="spiffe://example.org/web")
    (second,) = {each.id for each in rows} - {first} or {None}
    if second is not None:
        await broker.revoke(id=second)
    async with started(config) as agent, channel_to(agent) as channel:
        serial = await svid_of(agent)
        assert serial not in {first, second}
        async with verifier(channel) as fresh, verifier(channel, resume_from=stood) as back:
            known = {first, second} - {None}
            await until(lambda: known <= fresh.denied and fresh.complete_at > 0)
            await until(lambda: known - {first} <= back.denied and back.complete_at > 0)
            status = await asyncio.to_thread(agent.status)
            assert status["followers"] == 2
            assert status["revocations"] >= len(known)
            assert status["revocations_fresh"]
            text = await asyncio.to_thread(agent.idb, "agent", "status")
            assert "up to date" in text.out
            assert await asyncio.to_thread(agent.end, signal.SIGTERM) == 0
            await until(lambda: fresh.over and back.over)


async def test_a_thousand_follow_one_agent(broker: RunningBroker, open_directory: Path) -> None:
    config = config_for(broker, open_directory / "agent", token=await broker.token("machine"))
    async with started(config) as agent, AsyncExitStack() as stack:
        serial = await svid_of(agent)
        before = resident(agent)
        crowd = [
            await asyncio.create_subprocess_exec(
                *(sys.executable, str(CROWD), agent.socket, str(STREAMS)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            for _ in range(PROCESSES)
        ]
        for each in crowd:
            stack.push_async_callback(each.wait)
            stack.callback(each.kill)
        for each in crowd:
            assert (await said(each))["count"] == STREAMS
        status = await asyncio.to_thread(agent.status)
        assert status["followers"] == PROCESSES * STREAMS
        for each in crowd:
            assert each.stdin is not None
            each.stdin.write(f"{serial}\n".encode())
            await each.stdin.drain()
        answer = await broker.revoke(id=serial)
        returned = time.time()
        told = [await said(each) for each in crowd]
        assert [one["count"] for one in told] == [STREAMS] * PROCESSES
        # On an idle machine a few tenths of a second; here tests run beside it.
        assert max(one["at"] for one in told) - returned < 10
        grown = resident(agent) - before
        assert grown < 150 * 1024 * 1024
        await reported(broker, answer.revocation.id)


async def reported(broker: RunningBroker, order_id: str) -> None:
    """Wait until the broker has heard that every process of the crowd denies it."""
    from identity_api.broker.v1 import revocation_pb2

    revocations = await broker.revocations()
    async with asyncio.timeout(20):
        while True:
            found = await revocations.Get(revocation_pb2.GetRevocationRequest(id=order_id))
            behind = [
                each.state == revocation_pb2.VERIFIER_STATE_ACKNOWLEDGED
                for each in found.propagation.verifiers
                if each.kind == "behind"
            ]
            if behind == [True] * PROCESSES:
                return
            await asyncio.sleep(0.1)


def resident(agent: AgentProcess) -> int:
    """Bytes in memory."""
    pages = Path(f"/proc/{agent.process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


async def said(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout is not None
    async with asyncio.timeout(90):
        line = await process.stdout.readline()
    assert line, "it has ended"
    found: dict[str, Any] = json.loads(line)
    return found
