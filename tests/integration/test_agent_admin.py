"""The agent's own socket: who may ask what, and what is said."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from identity_api.broker.v1 import types_pb2
from identity_client.agent_client import AgentClient, AgentHealth
from support.agent import RunningAgent, running_agent
from support.broker import run_idb
from support.line import RunningBroker, running, settings_in

ME = [types_pb2.Selector(type="unix", value=f"uid:{os.getuid()}")]
NOBODY = 65534
AS_ANOTHER_USER = """
import json, os, sys
from identity_client.agent_client import AgentClient
from identity_client.errors import IdentityError
os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
asked = {}
with AgentClient(sys.argv[1]) as agent:
    for name, call in {
        "status": agent.status,
        "own": lambda: agent.explain_process(os.getpid()),
        "theirs": lambda: agent.explain_process(int(sys.argv[3])),
        "none": lambda: agent.explain_process(2**22 - 1),
    }.items():
        try:
            answer = call()
            asked[name] = getattr(answer, "selectors", ())
        except IdentityError as error:
            asked[name] = error.reason
print(json.dumps(asked))
"""


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[RunningBroker]:
    settings = settings_in(tmp_path / "broker", ca={"key_manager": "memory"})
    async with running(settings) as running_broker:
        yield running_broker


@pytest.fixture
async def agent(broker: RunningBroker, open_directory: Path) -> AsyncIterator[RunningAgent]:
    async with running_agent(broker, open_directory / "agent") as running_one:
        yield running_one


async def test_root_and_the_agent_s_user_hear_everything(
    agent: RunningAgent, broker: RunningBroker
) -> None:
    found = await broker.entry("/web", "machine", selectors=ME)
    other = types_pb2.Selector(type="unix", value="path:/nowhere")
    await broker.entry("/miss", "machine", selectors=[*ME, other])
    await agent.until(lambda: agent.agent.report().x509_svids == 2)

    def ask() -> tuple[Any, Any]:
        with AgentClient(agent.admin_socket) as client:
            return client.status(), client.explain_process(os.getpid())

    status, explained = await asyncio.to_thread(ask)
    assert status.health is AgentHealth.OK
    assert status.node_id == agent.node_id
    assert (status.entries, status.x509_svids, status.overdue) == (2, 2, 0)
    assert status.workload_api == agent.workload_api
    assert f"unix:uid:{os.getuid()}" in explained.selectors
    matching, missing = explained.entries
    assert (matching.entry_id, matching.matches, matching.problem) == (found.id, True, "")
    assert len(matching.serial) == 40
    assert missing.missing == ("unix:path:/nowhere",)
    assert Path(explained.executable) == Path(sys.executable).resolve()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
async def test_another_user_hears_about_its_own_processes_alone(agent: RunningAgent) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", AS_ANOTHER_USER),
        *(str(agent.admin_socket), str(NOBODY), str(os.getpid())),
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    asked = json.loads(out)
    assert asked["status"] == "METHOD_DENIED"
    assert f"unix:uid:{NOBODY}" in asked["own"]
    # Not told apart: whether a process is somebody else's, or not there at all.
    assert asked["theirs"] == asked["none"] == "METHOD_DENIED"


async def test_what_is_wrong_with_a_match_is_said(
    agent: RunningAgent, broker: RunningBroker
) -> None:
    await broker.entry("/each", "machine", selectors=ME, per_process=True)
    await agent.until(lambda: agent.agent.report().entries == 1)

    def problem() -> str:
        with AgentClient(agent.admin_socket) as client:
            (match,) = client.explain_process(os.getpid()).entries
            return match.problem

    assert "made when the process asks" in await asyncio.to_thread(problem)
    await agent.fetch_x509()
    assert await asyncio.to_thread(problem) == ""
    (row,) = [each for each in await broker.ledger() if each.entry_id]
    await broker.revoke(id=row.id)
    await agent.until(lambda: bool(agent.agent._svids._denied))
    assert "revoked" in await asyncio.to_thread(problem)


async def test_the_command_line_says_it_in_words_and_as_a_document(agent: RunningAgent) -> None:
    def run(*arguments: str) -> Any:
        return run_idb("agent", "status", "--socket", str(agent.admin_socket), *arguments)

    told = await asyncio.to_thread(run)
    assert told.code == 0
    assert told.out.splitlines()[0].split() == ["health", "ok"]
    assert agent.node_id in told.out
    document = (await asyncio.to_thread(run, "-o", "json")).json
    assert document["health"] == "ok"
    assert document["connected"] is True
    nobody = await asyncio.to_thread(
        run_idb, "agent", "status", "--socket", "/nowhere/agent.sock", "-o", "json"
    )
    assert nobody.code == 6
    assert nobody.error["reason"] == "AGENT_UNREACHABLE"


def test_a_configuration_is_checked_and_shown(tmp_path: Path) -> None:
    (tmp_path / "root.pem").write_text("x")
    config = tmp_path / "agent.toml"
    config.write_text(
        '[agent]\ntrust_domain = "example.org"\n'
        '[broker]\naddress = "a:1"\nbootstrap_address = "a:2"\n'
        '[trust]\nbundle_file = "root.pem"\n[node]\njoin_token_file = "token"\n'
    )
    assert run_idb("agent", "config", "check", "--config", str(config)).code == 0
    shown = run_idb("agent", "config", "show", "--config", str(config), "-o", "json").json
    assert shown["broker.address"] == "a:1"
    wrong = run_idb(
        *("agent", "config", "check", "--config", str(config)),
        *("--set", "broker.adress=b:1", "--set", "workloads.jwt_svids=0", "-o", "json"),
    )
    assert wrong.code == 2
    assert len(wrong.error["problems"]) == 2
    refused = run_idb("agent", "run", "--config", str(config), "--insecure-bootstrap", "-o", "json")
    assert refused.code == 2
    assert "trust.bundle_url" in str(refused.error["problems"])
