"""`idb explain --pid`: which selectors a process has, what they match, what they miss."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from identity_api.broker.v1 import types_pb2
from identity_client.agent_client import AgentClient
from support.agent import RunningAgent, running_agent
from support.broker import Ran, run_idb
from support.line import RunningBroker, running, settings_in
from support.workload_api import line_of, probe

MINE = f"unix:uid:{os.getuid()}"


class Machine:
    """A machine with an agent, and a process on it to ask about."""

    def __init__(self, broker: RunningBroker, agent: RunningAgent, pid: int) -> None:
        self.broker = broker
        self.agent = agent
        self.pid = pid

    async def register(self, path: str, *selectors: str) -> str:
        entry = await self.broker.entry(
            path,
            "machine",
            selectors=[
                types_pb2.Selector(type=kind, value=value)
                for kind, _, value in (each.partition(":") for each in selectors)
            ],
        )
        known = await asyncio.to_thread(AgentClient, self.agent.admin_socket)
        with known:
            async with asyncio.timeout(10):
                while True:
                    told = await asyncio.to_thread(known.explain_process, self.pid)
                    if entry.id in {each.entry_id for each in told.entries}:
                        return entry.id
                    await asyncio.sleep(0.02)

    async def explain(self, *arguments: str, pid: int | None = None, **env: str) -> Ran:
        return await asyncio.to_thread(
            run_idb,
            *("explain", "--pid", str(pid or self.pid), *arguments),
            env=env or {"IDB_AGENT_SOCKET": str(self.agent.admin_socket)},
        )


@pytest.fixture
async def machine(open_directory: Path) -> AsyncIterator[Machine]:
    settings = settings_in(open_directory / "broker", ca={"key_manager": "memory"})
    process = subprocess.Popen(["/bin/sleep", "120"])
    try:
        async with running(settings) as broker, running_agent(broker, open_directory / "a") as it:
            yield Machine(broker, it, process.pid)
    finally:
        process.kill()
        process.wait()


async def test_what_matches_what_misses_and_by_which_selector(machine: Machine) -> None:
    matching = await machine.register("/shop/orders", MINE)
    await machine.register("/shop/billing", MINE, "unix:path:/usr/bin/billing", "unix:uid:4711")
    told = await machine.explain()
    assert told.code == 0, told.err
    assert f"process {machine.pid}  {Path('/bin/sleep').resolve()}" in told.out
    assert f"  {MINE}\n" in told.out
    blocks = told.out.split("\n\n")
    assert blocks[1].startswith(f"spiffe://example.org/shop/orders  entry {matching}  matches")
    assert "spiffe://example.org/shop/billing" in blocks[2]
    assert "does not match" in blocks[2]
    # Only what it does not have.
    assert "unix:path:/usr/bin/billing" in blocks[2]
    assert "unix:uid:4711" in blocks[2]
    assert MINE not in blocks[2]


async def test_the_exit_code_says_whether_it_would_get_it(machine: Machine) -> None:
    nothing = await machine.explain()
    assert nothing.code == 3
    assert "would get no identity" in nothing.err
    entry = await machine.register("/shop/orders", MINE)
    other = await machine.register("/shop/billing", "unix:uid:4711")
    for subject, code in (
        (entry, 0),
        ("/shop/orders", 0),
        ("spiffe://example.org/shop/orders", 0),
        (other, 3),
        ("/shop/billing", 3),
        ("/shop", 3),
    ):
        assert (await machine.explain(subject)).code == code, subject


async def test_the_document_is_all_that_is_known(machine: Machine) -> None:
    entry = await machine.register("/shop/orders", MINE)
    await machine.register("/shop/billing", "unix:uid:4711")
    document: dict[str, Any] = (await machine.explain("-o", "json")).json
    assert document["pid"] == machine.pid
    assert document["matches"] is True
    assert MINE in document["selectors"]
    assert document["selectors"] == sorted(document["selectors"])
    first, second = document["entries"]
    assert (first["entry_id"], first["matches"], first["missing"]) == (entry, True, [])
    assert (second["matches"], second["missing"]) == (False, ["unix:uid:4711"])


async def test_a_process_that_is_not_there_and_an_agent_that_is_not_there(
    machine: Machine,
) -> None:
    gone = subprocess.Popen(["/bin/true"])
    gone.wait()
    refused = await machine.explain("-o", "json", pid=gone.pid)
    assert (refused.code, refused.error["reason"]) == (3, "METHOD_DENIED")
    away = await machine.explain("-o", "json", IDB_AGENT_SOCKET="/nowhere/agent.sock")
    assert (away.code, away.error["reason"]) == (6, "AGENT_UNREACHABLE")
    # --socket wins over the environment.
    named = await machine.explain(
        *("--socket", str(machine.agent.admin_socket)), IDB_AGENT_SOCKET="/nowhere/agent.sock"
    )
    assert named.code == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ("explain",),
        ("explain", "/a"),
        ("explain", "--node", "n"),
        ("explain", "/a", "--node", "n", "--pid", "1"),
        ("explain", "--pid", "0"),
        ("explain", "--pid", "-1"),
        ("explain", "--pid", "4294967296"),
        ("explain", "--pid", "x"),
    ],
)
def test_what_cannot_be_asked(arguments: tuple[str, ...]) -> None:
    assert run_idb(*arguments).code == 2


def test_no_agent_is_named(tmp_path: Path) -> None:
    if Path("/run/identity-broker/agent.sock").exists():
        pytest.skip("an agent runs on this machine")
    told = run_idb("explain", "--pid", "1", "-o", "json", cwd=tmp_path)
    assert (told.code, told.error["reason"]) == (2, "NO_AGENT_NAMED")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can start processes of other users")
async def test_a_stranger_is_told_nothing_of_others_and_all_of_its_own(machine: Machine) -> None:
    """Nor whether there is such a process."""
    socket = str(machine.agent.admin_socket)
    own = subprocess.Popen(["/bin/sleep", "60"], user=12345, group=12345, extra_groups=[])
    gone = subprocess.Popen(["/bin/true"])
    gone.wait()
    try:
        told = {}
        for pid in (own.pid, machine.pid, gone.pid):
            async with probe(socket, "explain", str(pid), uid=12345) as process:
                told[pid] = json.loads(await line_of(process))
    finally:
        own.kill()
        own.wait()
    assert "unix:uid:12345" in told[own.pid]["selectors"]
    assert told[machine.pid] == told[gone.pid]
    assert told[machine.pid]["end"] == "PERMISSION_DENIED"
