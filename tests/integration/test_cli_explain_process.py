"""`idb explain --pid`: which selectors a process has, what they match, what they miss."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from identity_api.broker.v1 import types_pb2
from identity_broker.cli.main import run
from identity_client.agent_client import AgentClient
from support.agent import RunningAgent, running_agent
from support.broker import Ran, run_idb
from support.line import RunningBroker, running, settings_in
from support.workload_api import line_of, probe

MINE = f"unix:uid:{os.getuid()}"


class Machine:
    """A machine with an agent, and a process on it to ask about."""

    def __init__(
        self,
        broker: RunningBroker,
        agent: RunningAgent,
        pid: int,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        self.broker = broker
        self.agent = agent
        self.pid = pid
        self._capsys = capsys

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

    async def explain(self, *arguments: str, pid: int | None = None) -> Ran:
        """`idb explain --pid …` in this process: the same `run`, a second faster."""
        named = () if "--socket" in arguments else ("--socket", str(self.agent.admin_socket))
        with capture_logs():  # The broker and the agent log to stdout here.
            self._capsys.readouterr()
            code = await asyncio.to_thread(
                run, ["explain", "--pid", str(pid or self.pid), *named, *arguments]
            )
            told = self._capsys.readouterr()
        return Ran(code, told.out, told.err)


@pytest.fixture
async def machine(
    open_directory: Path, capsys: pytest.CaptureFixture[str]
) -> AsyncIterator[Machine]:
    settings = settings_in(open_directory / "broker", ca={"key_manager": "memory"})
    process = subprocess.Popen(["/bin/sleep", "120"])
    try:
        async with running(settings) as broker, running_agent(broker, open_directory / "a") as it:
            yield Machine(broker, it, process.pid, capsys)
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
    away = await machine.explain("-o", "json", "--socket", "/nowhere/agent.sock")
    assert (away.code, away.error["reason"]) == (6, "AGENT_UNREACHABLE")


async def test_which_agent_is_asked(machine: Machine) -> None:
    """The command line, then the environment."""
    await machine.register("/shop/orders", MINE)
    here, nowhere = str(machine.agent.admin_socket), "/nowhere/agent.sock"
    for env, arguments, code in ((here, (), 0), (nowhere, (), 6), (nowhere, ("--socket", here), 0)):
        told = await asyncio.to_thread(
            run_idb,
            *("explain", "--pid", str(machine.pid), *arguments),
            env={"IDB_AGENT_SOCKET": env},
        )
        assert told.code == code, told.err


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


@pytest.mark.skipif(os.getuid() != 0, reason="only root can start processes of other users")
async def test_a_user_is_not_told_what_others_entries_ask_for(machine: Machine) -> None:
    own = subprocess.Popen(["/bin/sleep", "60"], user=12345, group=12345, extra_groups=[])
    theirs = "unix:uid:12345"
    try:
        mine = await machine.register("/mine", theirs)
        program = await machine.register("/program", theirs, "unix:path:/usr/bin/orders")
        unit = await machine.register("/unit", theirs, "systemd:id:orders.service")
        hidden = [
            await machine.register("/secret", theirs, "docker:env:PASSWORD=hunter2"),
            await machine.register("/both", theirs, "unix:path:/a", "docker:env:TOKEN=x"),
            await machine.register("/other", MINE),
            await machine.register("/path", "unix:path:/usr/bin/billing"),
        ]
        socket = str(machine.agent.admin_socket)
        async with probe(socket, "explain", str(own.pid), uid=12345) as process:
            told = json.loads(await line_of(process))
        assert told["entries"] == {
            mine: [],
            program: ["unix:path:/usr/bin/orders"],
            unit: ["systemd:id:orders.service"],
        }
        assert told["hidden"] == len(hidden)
        asked = (*("explain", "--pid", str(own.pid)), *("--socket", socket))
        shown = await asyncio.to_thread(run_idb_as, 12345, *asked)
        assert "4 more entries are shown to root and the agent's own user alone" in shown
        assert "PASSWORD" not in shown
        # Root is told everything.
        document = (await machine.explain("-o", "json", pid=own.pid)).json
        assert {each["entry_id"] for each in document["entries"]} == {mine, program, unit, *hidden}
        assert document["hidden"] == 0
    finally:
        own.kill()
        own.wait()


AS_ANOTHER = """
import contextlib, io, os, sys
from identity_broker.cli.main import run
with contextlib.redirect_stdout(io.StringIO()):
    run(sys.argv[2:])  # imports what that user may not be able to read
os.setgroups([]); os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
sys.exit(run(sys.argv[2:]))
"""


def run_idb_as(uid: int, *arguments: str) -> str:
    """What `idb` says to that user."""
    asked = [sys.executable, "-c", AS_ANOTHER, str(uid), *arguments]
    return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60).stdout
