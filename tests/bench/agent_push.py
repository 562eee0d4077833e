"""From an operator's change to the process that it concerns: how long.

- From the moment the admin API is called to the moment the message is in the workload's hand, one
  change at a time, at random moments.
- added    the process has an SVID and its stream is open; an entry gives it a second one
- removed  that entry is deleted; the message without the SVID has come
- first    the process has none, and asks again every 10 ms; an entry gives it its first one
- to all   added, but below a group that every connected node is in: all of them are told at once;
           and until every node has acknowledged it
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field

import psutil

from bench.agent_fleet import Fleet, fleet
from bench.agent_site import (
    BROKER_ID,
    EVERYONE,
    Admin,
    AgentFiles,
    Site,
    Workload,
    agent_files,
    group_of_all,
    running,
    spiffe_id,
    until_connected,
    verify,
)
from bench.measured import Spread

CHANGES = ("added", "removed", "first", "to all", "all acknowledged")
_OWN = f"unix:uid:{os.getuid()}"
_STRANGER = f"unix:uid:{os.getuid() + 77_777}"


@dataclass(frozen=True)
class Push:
    """One number of connected agents.

    Attributes:
        agents: connected, the one that is looked at included.
        connect_seconds: until the others had attested and were up to date.
        idle_cores: CPU seconds a second of the broker while nothing changes.
        changes: what happened → how long it took.
        verified: SVIDs looked at in full.
    """

    agents: int
    connect_seconds: float
    idle_cores: float
    changes: dict[str, Spread]
    verified: int


@dataclass
class _Run:
    admin: Admin
    workload: Workload
    files: AgentFiles
    draw: random.Random
    taken: dict[str, list[float]] = field(default_factory=dict)
    verified: int = 0
    number: int = 0

    def note(self, change: str, seconds: float) -> None:
        self.taken.setdefault(change, []).append(seconds)

    async def pause(self) -> None:
        """So that nothing falls into step with anything."""
        await asyncio.sleep(self.draw.uniform(0.005, 0.03))

    async def added(self, change: str, parent_id: str, *, acks: bool = False) -> str:
        """Register one more; the entry's id."""
        self.number += 1
        path = f"/bench/{change.replace(' ', '-')}/{self.number}"
        name = spiffe_id(path)
        begun = time.perf_counter()
        creating = asyncio.create_task(self.admin.create(path, parent_id, _OWN))
        if acks:
            await creating
            await self.admin.applied()
            self.note("all acknowledged", time.perf_counter() - begun)
        self.note(change, await self.workload.until(lambda held: name in held) - begun)
        if self.number % 20 == 1:
            verify(self.workload.held[name], name)
            self.verified += 1
        return (await creating).id

    async def removed(self, entry_id: str, *, note: bool = True) -> None:
        """Delete it again."""
        before = len(self.workload.held)
        begun = time.perf_counter()
        deleting = asyncio.create_task(self.admin.delete(entry_id))
        at = await self.workload.until(lambda held: len(held) == before - 1)
        if note:
            self.note("removed", at - begun)
        await deleting


def measure(
    place: Site, *, others: int, samples: int, to_all: int, idle_seconds: float, name: str
) -> Push:
    """Every change, with so many other agents connected."""
    with (
        agent_files(place, name) as files,
        running(files),
        fleet(place, others) if others else nullcontext() as found,
    ):
        return asyncio.run(_measure(place, files, found, samples, to_all, idle_seconds))


async def _measure(
    place: Site,
    files: AgentFiles,
    found: Fleet | None,
    samples: int,
    to_all: int,
    idle_seconds: float,
) -> Push:
    async with _prepared(place, files) as run:
        connected = await run.admin.applied(files.node_id)
        expected = 1 + (0 if found is None else found.connected)
        assert connected == expected, f"{connected} nodes are connected, not {expected}"
        idle_cores = await _idle_cores(place.pid, idle_seconds)
        base = await run.admin.create("/bench/base", files.node_id, _OWN)
        await run.workload.until(lambda held: base.spiffe_id in held)
        for _ in range(samples):
            await run.pause()
            entry_id = await run.added("added", files.node_id)
            await run.pause()
            await run.removed(entry_id)
        if to_all:
            group = await run.admin.create(
                EVERYONE.removeprefix(spiffe_id("")), BROKER_ID, group_of_all(place.machines)
            )
            for _ in range(to_all):
                await run.pause()
                entry_id = await run.added("to all", EVERYONE, acks=True)
                await run.removed(entry_id, note=False)
                await run.admin.applied()
            await run.admin.delete(group.id)
        await run.removed(base.id, note=False)
        for _ in range(samples // 2):
            await run.pause()
            entry_id = await run.added("first", files.node_id)
            await run.pause()
            await run.removed(entry_id, note=False)
    return Push(
        connected,
        0.0 if found is None else found.start_seconds,
        idle_cores,
        {change: Spread.of(run.taken[change]) for change in CHANGES if change in run.taken},
        run.verified,
    )


async def _idle_cores(pid: int, seconds: float) -> float:
    process = psutil.Process(pid)
    begun, before = time.perf_counter(), process.cpu_times()
    await asyncio.sleep(seconds)
    after = process.cpu_times()
    used = after.user + after.system - before.user - before.system
    return used / (time.perf_counter() - begun)


@asynccontextmanager
async def _prepared(place: Site, files: AgentFiles) -> AsyncIterator[_Run]:
    await until_connected(files)
    async with Admin.of(place) as admin, Workload.of(files) as workload:
        # An entry of somebody else: so that processes are attested even while they match nothing.
        stranger = await admin.create("/bench/stranger", files.node_id, _STRANGER)
        yield _Run(admin, workload, files, random.Random(1))
        await admin.delete(stranger.id)
