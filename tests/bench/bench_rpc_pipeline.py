"""What the pipeline and the splice cost, beside bare grpc.aio in the same run.

- A unary call over mTLS: bare handler, then through the pipeline (limits, metrics, log at info).
- A unary call over a Unix socket: straight to the inner socket, then through the splice.
- Short rounds, interleaved; client and server share the process. CPU time of the process for the
  pipeline (wall time would show what else the machine does), wall time for the splice. The lower
  quartile of the rounds is reported: noise only ever adds.

Run: python tests/bench/bench_rpc_pipeline.py
"""

from __future__ import annotations

import asyncio
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import grpc

from identity_api.broker.v1 import svid_pb2
from identity_broker.config.settings import LogLevel
from identity_broker.domain.caller import ListenerKind, LocalPeer
from identity_broker.server.rpc.listener import LocalListener, MtlsListener
from identity_broker.server.rpc.methods import Rate, RateName
from identity_broker.telemetry import logs
from support.rpc import GET, ISSUE, NONE, Shell, empty_bundle, everybody, unix_channel

ROUNDS, CALLS = 60, 150


async def issue(_request: Any, _call: Any) -> svid_pb2.BatchIssueX509Response:
    return svid_pb2.BatchIssueX509Response()


class Bare(grpc.GenericRpcHandler):
    """The least a typed grpc.aio server can do."""

    def __init__(self) -> None:
        async def handle(request: Any, _context: Any) -> Any:
            return await issue(request, None)

        self._handler = grpc.unary_unary_rpc_method_handler(
            handle,
            svid_pb2.BatchIssueX509Request.FromString,
            svid_pb2.BatchIssueX509Response.SerializeToString,
        )

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return self._handler


async def interleaved(
    calls: Mapping[str, Callable[[], Any]], clock: Callable[[], float]
) -> dict[str, float]:
    """Microseconds a call, lower quartile of the rounds."""
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            started = clock()
            for _ in range(CALLS):
                await call()
            rounds[name].append((clock() - started) / CALLS * 1e6)
    return {name: round(sorted(times)[ROUNDS // 4], 1) for name, times in rounds.items()}


async def pipeline() -> dict[str, float]:
    shell = Shell({ISSUE: issue}, rates={RateName.ISSUE: Rate(1e6, 1_000_000)})
    tls = shell.authority.broker()
    client = shell.authority.issue("spiffe://example.org/idb/node/join_token/a")
    raw = svid_pb2.BatchIssueX509Request(
        items=[svid_pb2.BatchIssueX509Request.Item(entry_id="e" * 26, csr=b"c" * 240)]
    ).SerializeToString()
    served: dict[str, list[grpc.GenericRpcHandler]] = {
        "bare": [Bare()],
        "pipeline": shell.handlers(ListenerKind.MTLS),
    }
    listeners, channels, calls = [], [], {}
    for name, handlers in served.items():
        listener = MtlsListener("127.0.0.1:0", current_tls=lambda: tls)
        await listener.start(handlers)
        channel = shell.channel(listener.address, client)
        method = channel.unary_unary(ISSUE)
        listeners.append(listener)
        channels.append(channel)
        calls[name] = partial(method, raw)
    found = await interleaved(calls, time.process_time)
    for channel in channels:
        await channel.close()
    for listener in listeners:
        await listener.stop(NONE)
    return {**found, "overhead": round(found["pipeline"] - found["bare"], 1)}


class _Trusting(LocalListener):
    """Knows whoever comes to the inner socket by himself, so that both ways can be timed."""

    def of(self, peer: str) -> LocalPeer:
        return LocalPeer(1, 0, 0) if peer == "unix:" else super().of(peer)


async def splice() -> dict[str, float]:
    shell = Shell({GET: empty_bundle}, authenticate=everybody)
    with tempfile.TemporaryDirectory() as directory:
        listener = _Trusting(Path(directory) / "a.sock")
        await listener.start(shell.handlers(ListenerKind.LOCAL, listener))
        inner = unix_channel(f"unix:{directory}/.a.sock/s")
        outer = unix_channel(listener.address)
        through = {"inner socket": inner.unary_unary(GET), "spliced": outer.unary_unary(GET)}
        found = await interleaved(
            {name: partial(call, b"") for name, call in through.items()},
            time.perf_counter,
        )
        await inner.close()
        await outer.close()
        await listener.stop(NONE)
    return {**found, "overhead": round(found["spliced"] - found["inner socket"], 1)}


def log_lines() -> dict[str, float]:
    found = {}
    for level in (LogLevel.INFO, LogLevel.WARNING):
        logs.configure(level, stream=io.StringIO())
        log = logs.get_logger("rpc")
        times = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            for _ in range(CALLS):
                log.info("rpc", reason="OK", duration_ms=1.234)
            times.append((time.perf_counter() - started) / CALLS * 1e6)
        found[f"info line at level {level}"] = round(sorted(times)[ROUNDS // 4], 2)
    return found


async def main() -> None:
    lines = log_lines()
    logs.configure(LogLevel.INFO, stream=io.StringIO())
    report = {"unit": "us", "mtls": await pipeline(), "local": await splice(), "log": lines}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    asyncio.run(main())
