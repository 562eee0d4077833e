from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import httpx
import pytest

from identity_broker.errors import ConfigError, StoreUnavailable
from identity_broker.server.http.app import build_app
from identity_broker.server.http.listener import HttpListener
from identity_broker.server.http.readiness import Check, Readiness
from identity_broker.telemetry.metrics import Metrics
from identity_ca.errors import BackendUnavailable


@dataclass(frozen=True)
class Published:
    sequence: int = 7
    refresh_hint: timedelta = timedelta(seconds=60)

    def to_spiffe_json(self) -> bytes:
        return b'{"spiffe_sequence":%d}' % self.sequence

    def to_jwks(self) -> bytes:
        return b'{"keys":[]}'


async def fine() -> None:
    return


@asynccontextmanager
async def served(
    checks: Mapping[str, Check], metrics: Metrics | None = None, **options: Any
) -> AsyncIterator[httpx.AsyncClient]:
    metrics = metrics or Metrics()
    app = build_app(
        readiness=Readiness(checks, metrics, timeout_seconds=0.3),
        metrics=metrics,
        bundle=options.pop("bundle", Published),
        **options,
    )
    listener = HttpListener("127.0.0.1:0", app)
    await listener.start()
    try:
        async with httpx.AsyncClient(base_url=f"http://{listener.address}") as client:
            yield client
    finally:
        await listener.stop(timedelta(seconds=2))


async def test_alive_whatever_the_dependencies_do() -> None:
    async def down() -> None:
        raise StoreUnavailable(detail="dsn and password")

    async with served({"store": down}) as client:
        answer = await client.get("/healthz")
        assert (answer.status_code, answer.text) == (200, "ok\n")


async def test_readiness_names_each_dependency_and_no_internals() -> None:
    async def down() -> None:
        raise StoreUnavailable(detail="INTERNALS")

    async def sealed() -> None:
        raise BackendUnavailable("OpenBao is sealed", hint="unseal it", detail="INTERNALS")

    async def slow() -> None:
        await asyncio.sleep(60)

    async def broken() -> None:
        raise KeyError("INTERNALS")

    metrics = Metrics()
    checks = {"store": down, "keys": sealed, "upstream": slow, "odd": broken, "fine": fine}
    async with served(checks, metrics) as client:
        answer = await client.get("/readyz")
        assert answer.status_code == 503
        assert answer.headers["cache-control"] == "no-store"
        body = answer.json()
        assert body["ready"] is False
        found = {name: state.get("reason") for name, state in body["dependencies"].items()}
        assert found == {
            "store": "STORE_UNAVAILABLE",
            "keys": "SIGNING_BACKEND_UNAVAILABLE",
            "upstream": "DEADLINE_EXCEEDED",
            "odd": "INTERNAL",
            "fine": None,
        }
        assert body["dependencies"]["keys"]["hint"] == "unseal it"
        assert "INTERNALS" not in answer.text
        text = (await client.get("/metrics")).text
        assert 'idb_dependency_up{name="store"} 0.0' in text
        assert 'idb_dependency_up{name="fine"} 1.0' in text


async def test_readiness_recovers_and_asks_at_most_once_a_second() -> None:
    asked = 0
    up = False

    async def check() -> None:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0.05)
        if not up:
            raise StoreUnavailable

    async with served({"store": check}) as client:
        answers = await asyncio.gather(*(client.get("/readyz") for _ in range(20)))
        assert {answer.status_code for answer in answers} == {503}
        assert asked == 1
        up = True
        await asyncio.sleep(1.1)
        assert (await client.get("/readyz")).status_code == 200
        assert asked == 2


async def test_a_draining_broker_is_not_ready() -> None:
    async with served({"store": fine}, stopping=lambda: True) as client:
        answer = await client.get("/readyz")
        assert (answer.status_code, answer.json()["stopping"]) == (503, True)


async def test_bundle_and_jwks_with_their_caching() -> None:
    current = [Published()]
    async with served({}, bundle=lambda: current[0]) as client:
        bundle = await client.get("/bundle")
        assert bundle.json() == {"spiffe_sequence": 7}
        assert bundle.headers["content-type"] == "application/json"
        assert bundle.headers["cache-control"] == "public, max-age=60"
        jwks = await client.get("/jwks")
        assert jwks.json() == {"keys": []}
        assert jwks.headers["etag"] != bundle.headers["etag"]
        tag = {"if-none-match": bundle.headers["etag"]}
        assert (await client.get("/bundle", headers=tag)).status_code == 304
        current[0] = Published(sequence=8)
        assert (await client.get("/bundle", headers=tag)).json() == {"spiffe_sequence": 8}


async def test_metrics_are_prometheus_text() -> None:
    metrics = Metrics()
    metrics.issued_total.labels("x509").inc(3)
    metrics.rpc_seconds.labels("/a/b").observe(0.002)
    async with served({}, metrics) as client:
        answer = await client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        assert 'idb_issued_total{kind="x509"} 3.0' in answer.text
        assert 'idb_rpc_seconds_bucket{le="0.0025",method="/a/b"} 1' in answer.text
        assert "process_resident_memory_bytes" in answer.text


async def test_nothing_else_is_served_and_nothing_is_said_of_the_server() -> None:
    async with served({}) as client:
        assert (await client.get("/")).status_code == 404
        assert (await client.get("/metrics/../bundle/x")).status_code == 404
        assert (await client.post("/bundle")).status_code == 405
        answer = await client.get("/healthz")
        assert "server" not in answer.headers


async def test_odd_bytes_do_not_stop_it() -> None:
    async with served({}) as client:
        host, port = client.base_url.host, client.base_url.port
        for junk in (b"\x00\xff\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"a" * 70_000):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(junk)
            writer.write_eof()
            await asyncio.wait_for(reader.read(-1), 5)
            writer.close()
        assert (await client.get("/healthz")).status_code == 200


async def test_a_taken_port_is_a_configuration_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        app = build_app(readiness=Readiness({}, Metrics()), metrics=Metrics(), bundle=Published)
        with pytest.raises(ConfigError, match=f"cannot listen on {address}"):
            await HttpListener(address, app).start()


async def test_signals_stay_the_broker_s() -> None:
    before = signal.getsignal(signal.SIGTERM)
    async with served({}):
        assert signal.getsignal(signal.SIGTERM) is before


async def test_stopping_ends_in_time_with_an_idle_and_a_stuck_connection() -> None:
    async def stuck() -> None:
        await asyncio.sleep(60)

    metrics = Metrics()
    app = build_app(
        readiness=Readiness({"x": stuck}, metrics, timeout_seconds=60),
        metrics=metrics,
        bundle=Published,
    )
    listener = HttpListener("127.0.0.1:0", app)
    await listener.start()
    async with httpx.AsyncClient(base_url=f"http://{listener.address}") as client:
        await client.get("/healthz")
        hanging = asyncio.create_task(client.get("/readyz"))
        await asyncio.sleep(0.1)
        started = asyncio.get_running_loop().time()
        await listener.stop(timedelta(seconds=0.5))
        assert asyncio.get_running_loop().time() - started < 3
        hanging.cancel()
        await asyncio.gather(hanging, return_exceptions=True)
