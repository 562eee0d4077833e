"""What an agent needs: memory for what it holds, and time until it serves.

- Memory: agents with as many entries as SVIDs, all made before anybody asks; resident set size of
  each process once it holds them all.
- Start: from the start of the process until a workload that waits for it has its SVID. The node's
  key is kept on disk, and the broker is up.
"""

from __future__ import annotations

import asyncio
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from bench import memory
from bench.agent_site import (
    Admin,
    AgentFiles,
    Machine,
    Site,
    Workload,
    agent_files,
    local_channel,
    running,
    site,
    spiffe_id,
    status,
    until_connected,
    verify,
)
from identity_broker.domain.entry import RegistrationEntry
from identity_broker.domain.selector import Selector
from identity_ca.spiffe_id import SpiffeId
from identity_client._wire.workload import SECURITY_METADATA, WorkloadApiStub, X509SVIDRequest
from support.machines import MachineCa

_MIB = 1024 * 1024
_OWN = f"unix:uid:{os.getuid()}"
_NAME = "/bench/started"
_SECONDS = 120.0
_IMPORTS = (
    "import identity_broker.cli.main, identity_broker.cli.agent, identity_broker.config.loading, "
    "identity_broker.agent.app, identity_broker.agent.sds.service"
)


@dataclass(frozen=True)
class AgentFootprint:
    """One agent that holds so many SVIDs.

    Attributes:
        fill_seconds: from its start until it held them all.
        fill_cpu_seconds: of the agent, for it.
    """

    svids: int
    rss_mib: float
    fill_seconds: float
    fill_cpu_seconds: float


@dataclass(frozen=True)
class AgentStart:
    """Medians of several starts, in seconds.

    Attributes:
        first_svid: a waiting workload has its SVID.
        accepting: the socket is there.
        imports: a Python process that imports what the agent does, from its start.
        interpreter: one that imports nothing.
    """

    starts: int
    first_svid: float
    longest: float
    accepting: float
    imports: float
    interpreter: float


# --- memory ---------------------------------------------------------------------------------------


def footprints(directory: Path, sizes: Sequence[int]) -> list[AgentFootprint]:
    """One agent after the other, on a broker that has all entries from the start."""
    machines: dict[int, Machine] = {}

    def fill(url: str, ca: MachineCa) -> None:
        entries = []
        for size in sizes:
            machines[size] = Machine.made(directory / f"agent-{size}", ca)
            entries += [_entry(machines[size], number) for number in range(size)]
        asyncio.run(memory.fill(url, entries))

    with site(directory, fill) as place:
        return [_footprint(place, machines[size], size) for size in sizes]


def _footprint(place: Site, machine: Machine, size: int) -> AgentFootprint:
    with agent_files(place, "", machine=machine, x509_svids=max(1_000, 2 * size)) as files:
        began = time.perf_counter()
        with running(files) as pid:
            asyncio.run(_until_held(files, size))
            seconds = time.perf_counter() - began
            process = psutil.Process(pid)
            times = process.cpu_times()
            time.sleep(0.5)
            return AgentFootprint(
                size, process.memory_info().rss / _MIB, seconds, times.user + times.system
            )


async def _until_held(files: AgentFiles, size: int) -> None:
    async with asyncio.timeout(_SECONDS):
        while (await status(files)).x509_svids < size:
            await asyncio.sleep(0.1)


def _entry(machine: Machine, number: int) -> RegistrationEntry:
    """With the selectors and names a real one has."""
    now = datetime.now(UTC)
    name = f"{machine.directory.name}-{number}"
    return RegistrationEntry(
        id=name,
        spiffe_id=SpiffeId.parse(spiffe_id(f"/ns/team-{number % 97}/sa/{name}")),
        parent_id=SpiffeId.parse(machine.node_id),
        selectors=frozenset(
            {
                Selector("unix", f"uid:{100_000 + number % 50}"),
                Selector("unix", f"path:/opt/team-{number % 97}/bin/service-{number}"),
            }
        ),
        dns_names=(f"service-{number}.example.org",),
        revision=1,
        created_at=now,
        updated_at=now,
    )


# --- start ----------------------------------------------------------------------------------------


def starts(place: Site, *, rounds: int) -> AgentStart:
    """Several, and imports in between."""
    first, accepting, imports, interpreter = [], [], [], []
    with agent_files(place, "start") as files:
        with running(files):
            asyncio.run(_register(place, files))
        for _ in range(rounds):
            interpreter.append(_python("pass"))
            imports.append(_python(_IMPORTS))
            began = time.perf_counter()
            with _spawned(files):
                bound, served = asyncio.run(_wait(files))
            first.append(served - began)
            accepting.append(bound - began)
    return AgentStart(
        rounds,
        statistics.median(first),
        max(first),
        statistics.median(accepting),
        statistics.median(imports),
        statistics.median(interpreter),
    )


def _python(statement: str) -> float:
    """Seconds until a fresh Python has done that."""
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", f"{statement}\nprint('done', flush=True)"], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"done\n"
        return time.perf_counter() - began


@contextmanager
def _spawned(files: AgentFiles) -> Iterator[None]:
    """The agent, not waited for."""
    with (
        files.log.open("ab") as log,
        subprocess.Popen(
            [
                *(sys.executable, "-m", "identity_broker.cli.main", "agent", "run"),
                *("--config", str(files.config), "-o", "json"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
        ) as process,
    ):
        try:
            yield
        finally:
            process.terminate()


async def _register(place: Site, files: AgentFiles) -> None:
    await until_connected(files)
    async with Admin.of(place) as admin, Workload.of(files) as workload:
        await admin.create(_NAME, files.node_id, _OWN)
        await workload.until(lambda held: spiffe_id(_NAME) in held)


async def _wait(files: AgentFiles) -> tuple[float, float]:
    """As a workload that was there first: when it could connect, and when it had its SVID."""
    path = files.workload_api.removeprefix("unix://")
    async with asyncio.timeout(_SECONDS):
        while not _accepts(path):
            await asyncio.sleep(0.002)
        bound = time.perf_counter()
        async with local_channel(files.workload_api) as channel:
            call: Any = WorkloadApiStub(channel).FetchX509SVID(
                X509SVIDRequest(), metadata=SECURITY_METADATA
            )
            answer = await call.read()
            served = time.perf_counter()
            call.cancel()
    verify(answer.svids[0], spiffe_id(_NAME))
    return bound, served


def _accepts(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
        probe.connect(path)
        return True
    return False
