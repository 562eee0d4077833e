"""Calls to the agent's socket, beside the same calls to a bare server of the same kind.

- Cold: a new channel for every call, closed afterwards, off the clock: what a process pays that
  starts, asks once, and goes. Ours and the bare ones take turns.
- Warm: JWT-SVIDs that the agent has in its cache, over connections that stay open, with the load
  generator of the other rows.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import psutil

from bench import agent_bare
from bench.agent_bare import Bare, bare
from bench.agent_site import (
    DOMAIN,
    Admin,
    AgentFiles,
    Site,
    Workload,
    agent_files,
    local_channel,
    running,
    serial_of,
    spiffe_id,
    until_connected,
    verify,
)
from bench.generator import Http2Wire, Wire, closed_loop
from bench.measured import Round, Spread
from identity_ca.bundle import TrustBundle
from identity_ca.jwt import verify_jwt_svid
from identity_client._wire.workload import (
    METHODS,
    SECURITY_METADATA,
    JWTBundlesRequest,
    JWTSVIDRequest,
    JWTSVIDResponse,
    WorkloadApiStub,
    X509SVIDRequest,
)

OURS, BARE, BARE_STREAM = "FetchX509SVID", "bare unary call", "bare stream, first message"
JWT, BARE_UNARY = "FetchJWTSVID", "bare unary call"
_OWN = f"unix:uid:{os.getuid()}"
_NAME = spiffe_id("/bench/caller")
_AUDIENCE = "bench"
_CONNECTIONS = 4


@dataclass(frozen=True)
class Cold:
    """Calls over fresh connections.

    Attributes:
        calls: what → how long it took.
        ratios: ours over the bare unary call, of medians, round by round.
        tail_ratio: of the 99th percentiles, over all rounds.
        answer_bytes: of everybody.
    """

    calls: dict[str, Spread]
    ratios: list[float]
    tail_ratio: float
    answer_bytes: int


@dataclass(frozen=True)
class Warm:
    """Calls over open connections: what → its rounds."""

    at_once: int
    calls: dict[str, list[Round]]
    answer_bytes: int


def measure_cold(place: Site, *, rounds: int, calls: int) -> Cold:
    """FetchX509SVID."""
    with agent_files(place, "cold") as files, running(files), bare() as server:
        return asyncio.run(_cold(place, files, server, rounds, calls))


async def _cold(place: Site, files: AgentFiles, server: Bare, rounds: int, calls: int) -> Cold:
    await _registered(place, files)
    answer = await _fetch(files)
    verify(answer.svids[0], _NAME)
    serial, size = serial_of(answer.svids[0]), answer.ByteSize()
    ask = agent_bare.request(size)

    async def ours() -> float:
        began = time.perf_counter()
        channel = local_channel(files.workload_api)
        call: Any = WorkloadApiStub(channel).FetchX509SVID(
            X509SVIDRequest(), metadata=SECURITY_METADATA
        )
        got = await call.read()
        took = time.perf_counter() - began
        assert serial_of(got.svids[0]) == serial
        call.cancel()
        await channel.close()
        return took

    async def unary() -> float:
        began = time.perf_counter()
        channel = local_channel(server.address)
        method: Any = channel.unary_unary(agent_bare.UNARY)
        got = await method(ask, metadata=SECURITY_METADATA)
        took = time.perf_counter() - began
        assert len(got) == size
        await channel.close()
        return took

    async def stream() -> float:
        began = time.perf_counter()
        channel = local_channel(server.address)
        method: Any = channel.unary_stream(agent_bare.STREAM)
        call = method(ask, metadata=SECURITY_METADATA)
        got = await call.read()
        took = time.perf_counter() - began
        assert len(got) == size
        call.cancel()
        await channel.close()
        return took

    kinds: dict[str, Callable[[], Awaitable[float]]] = {
        OURS: ours,
        BARE: unary,
        BARE_STREAM: stream,
    }
    for kind in kinds.values():
        await kind()
    all_rounds: dict[str, list[Sequence[float]]] = {name: [] for name in kinds}
    for _ in range(rounds):
        taken: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(calls):
            for name, kind in kinds.items():
                taken[name].append(await kind())
        for name, seconds in taken.items():
            all_rounds[name].append(seconds)
    spreads = {
        name: Spread.of([each for seconds in several for each in seconds])
        for name, several in all_rounds.items()
    }
    return Cold(
        spreads,
        [
            Spread.of(mine).p50 / Spread.of(bare_one).p50
            for mine, bare_one in zip(all_rounds[OURS], all_rounds[BARE], strict=True)
        ],
        spreads[OURS].p99 / spreads[BARE].p99,
        size,
    )


async def _registered(place: Site, files: AgentFiles) -> None:
    """One entry for this process, and its SVID made."""
    await until_connected(files)
    async with Admin.of(place) as admin, Workload.of(files) as workload:
        await admin.create("/bench/caller", files.node_id, _OWN)
        await workload.until(lambda held: _NAME in held)


async def _fetch(files: AgentFiles) -> Any:
    async with local_channel(files.workload_api) as channel:
        call: Any = WorkloadApiStub(channel).FetchX509SVID(
            X509SVIDRequest(), metadata=SECURITY_METADATA
        )
        return await call.read()


# --- warm -----------------------------------------------------------------------------------------


def measure_warm(place: Site, *, rounds: int, seconds: float, warm_up: float, at_once: int) -> Warm:
    """Cached FetchJWTSVID."""
    with agent_files(place, "warm") as files, running(files) as pid, bare() as server:
        size, bundle = asyncio.run(_one_token(place, files))
        message = JWTSVIDRequest(audience=[_AUDIENCE]).SerializeToString()
        kinds = {
            JWT: (pid, files.workload_api, METHODS[JWT], message),
            BARE_UNARY: (
                server.pid,
                server.address,
                agent_bare.UNARY,
                agent_bare.request(size),
            ),
        }
        taken: dict[str, list[Round]] = {name: [] for name in kinds}
        for number in range(rounds):
            order = list(kinds)
            for name in order[number % 2 :] + order[: number % 2]:
                server_pid, address, method, sent = kinds[name]

                def wires(
                    address: str = address, method: str = method, sent: bytes = sent
                ) -> Sequence[Wire]:
                    return [
                        Http2Wire(address, None, "localhost", method, [sent], SECURITY_METADATA)
                        for _ in range(_CONNECTIONS)
                    ]

                process = psutil.Process(server_pid)
                cpu: list[float] = []

                def edge(process: psutil.Process = process, cpu: list[float] = cpu) -> None:
                    times = process.cpu_times()
                    cpu.append(times.user + times.system)

                outcome = closed_loop(
                    wires,
                    requests=1,
                    concurrency=at_once,
                    seconds=seconds,
                    warm_up=warm_up,
                    smallest=int(size * 0.9),
                    on_edge=edge,
                )
                if name == JWT:
                    for _, body in outcome.kept[:3]:
                        _verify_token(body, bundle)
                used = cpu[1] - cpu[0]
                taken[name].append(
                    Round(
                        per_second=outcome.calls / outcome.seconds,
                        calls_per_second=outcome.calls / outcome.seconds,
                        server_cpu_us=used / outcome.calls * 1e6,
                        server_cores=used / outcome.seconds,
                        generator_cores=outcome.cpu_seconds / outcome.seconds,
                        generator_us_per_call=outcome.cpu_seconds / outcome.calls * 1e6,
                    )
                )
        return Warm(at_once, taken, size)


async def _one_token(place: Site, files: AgentFiles) -> tuple[int, TrustBundle]:
    await _registered(place, files)
    async with local_channel(files.workload_api) as channel:
        stub = WorkloadApiStub(channel)
        answer: Any = await stub.FetchJWTSVID(
            JWTSVIDRequest(audience=[_AUDIENCE]), metadata=SECURITY_METADATA
        )
        call: Any = stub.FetchJWTBundles(JWTBundlesRequest(), metadata=SECURITY_METADATA)
        bundles = (await call.read()).bundles
    bundle = TrustBundle.from_jwks(DOMAIN, bundles[str(DOMAIN.id)])
    _verify_token(answer.SerializeToString(), bundle)
    return answer.ByteSize(), bundle


def _verify_token(body: bytes, bundle: TrustBundle) -> None:
    (svid,) = JWTSVIDResponse.FromString(body).svids
    proven = verify_jwt_svid(svid.svid, bundle=bundle, audience=_AUDIENCE, now=datetime.now(UTC))
    assert str(proven.spiffe_id) == _NAME
