"""What supervisors see of an agent over HTTP, and what a bad client gets."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from identity_api.broker.v1 import types_pb2
from identity_broker.agent.app import tell_supervisor
from identity_broker.agent.health import Health, HealthReport
from identity_broker.agent.pages import PageListener, pages
from identity_broker.errors import ConfigError
from support.agent import running_agent
from support.line import running, settings_in


async def test_an_agent_shows_its_health_and_its_metrics(
    tmp_path: Path, open_directory: Path
) -> None:
    me = [types_pb2.Selector(type="unix", value=f"uid:{os.getuid()}")]
    async with (
        running(settings_in(tmp_path / "broker", ca={"key_manager": "memory"})) as broker,
        running_agent(
            broker, open_directory / "agent", agent={"http_address": "127.0.0.1:0"}
        ) as agent,
        httpx.AsyncClient(base_url=f"http://{agent.addresses.http_address}") as client,
    ):
        await broker.entry("/web", "machine", selectors=me)
        await agent.until(lambda: agent.agent.report().x509_svids == 1)
        await agent.fetch_x509()
        ready = await client.get("/readyz")
        assert ready.status_code == 200
        assert ready.json() == {"ready": True, "health": "ok", "problems": []}
        await asyncio.sleep(1.1)  # gauges are set once a second
        shown = (await client.get("/metrics")).text
        for line in (
            "idb_agent_connected 1.0",
            "idb_agent_entries 1.0",
            'idb_agent_svids{kind="x509"} 1.0',
            'idb_agent_issued_total{kind="x509"} 1.0',
        ):
            assert line in shown.splitlines()
        assert "spiffe://" not in shown


async def test_systemd_is_told_when_it_is_ready_and_when_it_stops(
    tmp_path: Path, open_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(open_directory / "notify"))
        supervisor.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(open_directory / "notify"))
        async with running(
            settings_in(tmp_path / "broker", ca={"key_manager": "memory"})
        ) as broker:
            async with running_agent(broker, open_directory / "agent", wait=False):
                assert supervisor.recv(64) == b"READY=1"
            assert supervisor.recv(64) == b"STOPPING=1"


def test_no_supervisor_or_a_dead_one_is_no_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    tell_supervisor("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    tell_supervisor("READY=1")


class Told:
    """A listener on a free port, with a health the test sets."""

    def __init__(self) -> None:
        self.report = HealthReport(Health.OK)
        self.listener = PageListener("127.0.0.1:0", pages(lambda: self.report, lambda: b"m 1\n"))

    async def ask(self, raw: bytes) -> bytes:
        host, _, port = self.listener.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(raw)
            async with asyncio.timeout(10):
                return await reader.read()
        except ConnectionError:
            return b""
        finally:
            writer.close()


@pytest.fixture
async def told() -> AsyncIterator[Told]:
    one = Told()
    await one.listener.start()
    yield one
    await one.listener.stop()


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET /healthz HTTP/1.1", b"200"),
        (b"GET /metrics?x=1 HTTP/1.0", b"200"),
        (b"GET / HTTP/1.1", b"404"),
        (b"GET /../etc/passwd HTTP/1.1", b"404"),
        (b"POST /healthz HTTP/1.1", b"405"),
        (b"GET /healthz", b"400"),
        (b"\x16\x03\x01 \xff HTTP/1.1", b"405"),
        (b"", b"400"),
    ],
)
async def test_every_request_has_its_answer(told: Told, request_line: bytes, status: bytes) -> None:
    answer = await told.ask(request_line + b"\r\nhost: x\r\n\r\n")
    assert answer.split(b" ")[1] == status
    assert b"connection: close" in answer


async def test_what_is_too_long_or_cut_off_gets_none(told: Told) -> None:
    assert await told.ask(b"GET /healthz HTTP/1.1\r\nx: " + b"y" * 10_000 + b"\r\n\r\n") == b""
    host, _, port = told.listener.address.rpartition(":")
    with socket.create_connection((host, int(port))) as half:
        half.sendall(b"GET /hea")
    assert (await told.ask(b"HEAD /healthz HTTP/1.1\r\n\r\n")).endswith(b"\r\n\r\n")


async def test_an_agent_that_is_down_is_not_ready(told: Told) -> None:
    told.report = HealthReport(Health.DOWN, ("nothing was heard",))
    answer = await told.ask(b"GET /readyz HTTP/1.1\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 503")
    assert b"nothing was heard" in answer
    assert (await told.ask(b"GET /healthz HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 200")


async def test_connections_are_bounded_and_a_taken_port_is_said(told: Told) -> None:
    host, _, port = told.listener.address.rpartition(":")
    idle = [socket.create_connection((host, int(port))) for _ in range(70)]
    await asyncio.sleep(0.1)
    assert len(told.listener._open) <= 64
    for each in idle:
        each.close()
    with pytest.raises(ConfigError):
        await PageListener(told.listener.address, {}).start()
