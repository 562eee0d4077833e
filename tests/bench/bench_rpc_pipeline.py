"""What the pipeline costs: a unary echo through bare grpc.aio and through the pipeline, interleaved.

Run: python tests/bench/bench_rpc_pipeline.py [--json]
"""

from __future__ import annotations

import asyncio
import io
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import grpc

from identity_api.broker.v1 import bundle_pb2, svid_pb2
from identity_broker.config.settings import LogLevel
from identity_broker.domain.caller import ListenerKind
from identity_broker.server.rpc.limits import RateLimiter
from identity_broker.server.rpc.listener import MtlsListener
from identity_broker.server.rpc.methods import Rate, RateName
from identity_broker.server.rpc.pipeline import build_handlers
from identity_broker.telemetry import logs
from identity_broker.telemetry.metrics import Metrics
from support.rpc import GET, ISSUE, NONE, Shell, everybody

ROUNDS, CALLS = 9, 1500


async def issue(_request: Any, _call: Any) -> svid_pb2.BatchIssueX509Response:
    return svid_pb2.BatchIssueX509Response()


class _Bare(grpc.GenericRpcHandler):
    """The least a typed grpc.aio server can do."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        async def handle(request: Any, _context: Any) -> Any:
            return await issue(request, None)

        return grpc.unary_unary_rpc_method_handler(
            handle,
            svid_pb2.BatchIssueX509Request.FromString,
            svid_pb2.BatchIssueX509Response.SerializeToString,
        )


async def _round(call: Any, request: Any) -> float:
    started = time.process_time()
    for _ in range(CALLS):
        await call(request)
    return (time.process_time() - started) / CALLS * 1e6


class _Context:
    """Stands in for gRPC's context with its measured answers, to time the pipeline alone."""

    def __init__(self, real: Any) -> None:
        self._metadata = real.invocation_metadata()
        self._auth = real.auth_context()
        self._peer = real.peer()

    def invocation_metadata(self) -> Any:
        return self._metadata

    def auth_context(self) -> Any:
        return self._auth

    def peer(self) -> str:
        return str(self._peer)

    def time_remaining(self) -> None:
        return None


async def main() -> None:
    logs.configure(LogLevel.INFO, stream=io.StringIO())
    shell = Shell({ISSUE: issue})
    rates = {RateName.ISSUE: Rate(1e6, 1_000_000)}
    tls = shell.authority.broker()
    client = shell.authority.issue("spiffe://example.org/idb/node/join_token/a")
    captured: list[Any] = []

    def capture(*arguments: Any) -> Any:
        return everybody(*arguments)

    piped = build_handlers(
        {ISSUE: issue},
        listener=ListenerKind.MTLS,
        authenticate=capture,
        limiter=RateLimiter(rates),
        metrics=Metrics(),
        log=logs.get_logger("rpc"),
        stopping=asyncio.Event(),
    )
    results: dict[str, list[float]] = {"bare": [], "pipeline": []}
    request = svid_pb2.BatchIssueX509Request(
        items=[svid_pb2.BatchIssueX509Request.Item(entry_id="e" * 26, csr=b"c" * 240)]
    )
    listeners = {}
    for name, handlers in {"bare": [_Bare()], "pipeline": piped}.items():
        listener = MtlsListener("127.0.0.1:0", current_tls=lambda: tls)
        await listener.start(handlers)
        listeners[name] = listener
    channels = {n: shell.channel(li.address, client) for n, li in listeners.items()}
    calls = {
        n: c.unary_unary(
            ISSUE,
            request_serializer=svid_pb2.BatchIssueX509Request.SerializeToString,
            response_deserializer=svid_pb2.BatchIssueX509Response.FromString,
        )
        for n, c in channels.items()
    }
    for call in calls.values():
        await _round(call, request)
    for _ in range(ROUNDS):
        for name, call in calls.items():
            results[name].append(await _round(call, request))

    # The same wrapper, without gRPC around it.
    wrapper = piped[0].service(type("D", (), {"method": ISSUE})()).unary_unary  # type: ignore[union-attr]

    class Grab(grpc.GenericRpcHandler):
        def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
            async def handle(raw: bytes, context: Any) -> bytes:
                captured.append(_Context(context))
                for call in (context.invocation_metadata, context.auth_context, context.peer):
                    started = time.perf_counter()
                    for _ in range(5000):
                        call()
                    costs[call.__name__] = (time.perf_counter() - started) / 5000 * 1e6
                return bundle_pb2.GetBundleResponse().SerializeToString()

            return grpc.unary_unary_rpc_method_handler(handle)

    costs: dict[str, float] = {}
    listener = MtlsListener("127.0.0.1:0", current_tls=lambda: tls)
    await listener.start([Grab()])
    async with shell.channel(listener.address, client) as channel:
        await channel.unary_unary(GET)(b"")
    await listener.stop(NONE)
    raw = request.SerializeToString()
    alone = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        for _ in range(5000):
            await wrapper(raw, captured[0])
        alone.append((time.perf_counter() - started) / 5000 * 1e6)
    for name, channel in channels.items():
        await channel.close()
        await listeners[name].stop(NONE)

    medians = {name: round(statistics.median(values), 1) for name, values in results.items()}
    report = {
        "unit": "us per call",
        **medians,
        "overhead_median_of_differences": round(
            statistics.median(
                p - b for p, b in zip(results["pipeline"], results["bare"], strict=True)
            ),
            1,
        ),
        "wrapper_alone_with_parse_and_serialize": round(statistics.median(alone), 1),
        "grpc_context": {name: round(cost, 2) for name, cost in costs.items()},
    }
    print(json.dumps(report, indent=None if "--json" in sys.argv else 2))


if __name__ == "__main__":
    asyncio.run(main())
