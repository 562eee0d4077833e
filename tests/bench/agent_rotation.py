"""A rotation on its way to those who use it: py-spiffe's X509Source, and a real Envoy.

- It begins with an operator's change of the entry, which has its SVID issued anew with a new key;
  the broker's ledger says when it set out to sign.
- py-spiffe: until the source has the new SVID (its own callback).
- Envoy: until a new TLS handshake is answered with another certificate, that handshake included.
"""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
import subprocess
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from spiffe import X509Source

from bench.agent_site import (
    Admin,
    AgentFiles,
    Site,
    Workload,
    agent_files,
    running,
    spiffe_id,
    until_connected,
)
from bench.measured import Spread
from identity_broker.cli.envoy_bootstrap import Address, Bootstrap, Inbound
from support.envoy import envoy_binary, running_envoy

SOURCE, ISSUED, ENVOY = (
    "changed → py-spiffe's X509Source has it",
    "  of it: broker signs → X509Source has it",
    "changed → Envoy presents it",
)
_OWN = f"unix:uid:{os.getuid()}"
_PATH = "/bench/rotated"
_TTLS = (3600, 3500)
_SECONDS = 30.0


@dataclass(frozen=True)
class Rotation:
    """How long each took; and what could not be measured, and why."""

    spreads: dict[str, Spread]
    missing: dict[str, str]


def measure(place: Site, *, times: int, envoy_times: int) -> Rotation:
    """Rotations, one after the other."""
    missing: dict[str, str] = {}
    binary: Path | None = None
    try:
        binary = envoy_binary()
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        missing[ENVOY] = f"no Envoy: {str(error).splitlines()[0]}"
    with agent_files(place, "rotation") as files, running(files):
        spreads = asyncio.run(_measure(place, files, binary, times, envoy_times))
    return Rotation(spreads, missing)


async def _measure(
    place: Site, files: AgentFiles, binary: Path | None, times: int, envoy_times: int
) -> dict[str, Spread]:
    await until_connected(files)
    draw = random.Random(1)
    found: dict[str, Spread] = {}
    turn = 0
    async with AsyncExitStack() as resources:
        admin = await resources.enter_async_context(Admin.of(place))
        entry = await admin.create(_PATH, files.node_id, _OWN, x509_ttl_seconds=_TTLS[0])
        async with Workload.of(files) as workload:
            await workload.until(lambda held: spiffe_id(_PATH) in held)

        async def rotate() -> str:
            nonlocal turn
            turn += 1
            await admin.set_ttl(entry.id, _TTLS[turn % 2])
            return ""

        source = await asyncio.to_thread(X509Source, socket_path=files.workload_api)
        try:
            rotated: list[tuple[float, float, str]] = []
            for _ in range(times):
                await asyncio.sleep(draw.uniform(0.01, 0.04))
                rotated.append(await _rotation(source, rotate))
        finally:
            await asyncio.to_thread(source.close)
        found[SOURCE] = Spread.of([took for took, _, _ in rotated])
        signed = _signed_at(place, [serial for _, _, serial in rotated])
        found[ISSUED] = Spread.of([at - signed[serial] for _, at, serial in rotated])
        if binary is not None:
            nowhere = Address("127.0.0.1", 9)
            bootstrap = Bootstrap(
                name="bench",
                socket=files.workload_api.removeprefix("unix://"),
                inbound=Inbound(Address("127.0.0.1", 0), nowhere, (spiffe_id(_PATH),)),
            )
            envoy = await resources.enter_async_context(
                running_envoy(binary, place.directory, bootstrap.document())
            )
            await envoy.until(lambda: bool(envoy.certificates()))
            found[ENVOY] = Spread.of(
                await envoy.rotation_seconds("inbound", rotate, times=envoy_times)
            )
    return found


async def _rotation(
    source: X509Source, rotate: Callable[[], Awaitable[str]]
) -> tuple[float, float, str]:
    """Seconds from the change, the wall clock when it had come, and the new serial."""
    loop = asyncio.get_running_loop()
    before = _serial(source)
    come: asyncio.Future[tuple[float, float]] = loop.create_future()

    def settle(at: tuple[float, float]) -> None:
        if not come.done():
            come.set_result(at)

    def told() -> None:
        if _serial(source) != before:
            at = time.perf_counter(), time.time()
            loop.call_soon_threadsafe(settle, at)

    source.subscribe_for_updates(told)
    try:
        begun = time.perf_counter()
        async with asyncio.timeout(_SECONDS):
            await rotate()
            at, wall = await come
    finally:
        source.unsubscribe_for_updates(told)
    return at - begun, wall, _serial(source)


def _serial(source: X509Source) -> str:
    return f"{source.get_x509_context().default_svid.leaf.serial_number:040x}"


def _signed_at(place: Site, serials: list[str]) -> dict[str, float]:
    """When the broker recorded that it would sign each, in seconds since the epoch."""
    with sqlite3.connect(f"file:{place.database}?mode=ro", uri=True) as database:
        rows = database.execute("SELECT id, recorded_at FROM credentials").fetchall()
    wanted = set(serials)
    return {name: micros / 1e6 for name, micros in rows if name in wanted}
