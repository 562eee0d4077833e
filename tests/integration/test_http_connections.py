"""Connections of strangers to the HTTP listener: who keeps us waiting is not waited for."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from identity_broker.server.http.app import build_app
from identity_broker.server.http.connections import ConnectionLimits, network_of
from identity_broker.server.http.listener import HttpListener
from identity_broker.server.http.readiness import Readiness
from identity_broker.telemetry.metrics import Metrics

LIMITS = ConnectionLimits(
    head_seconds=0.5, body_seconds=1.0, stall_seconds=1.5, of_one_network=8, together=20
)
PATIENT = ConnectionLimits(head_seconds=60, body_seconds=60, stall_seconds=60)
HALF_A_HEAD = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
ASKING = HALF_A_HEAD + b"\r\n"
HALF_A_BODY = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc"
IGNORED_BODY = b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
LONG = 200 * 48 * 1024


async def echo(request: Request) -> Response:
    return PlainTextResponse(await request.body())


async def long_answer(_request: Request) -> Response:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(200):
            yield bytes(48 * 1024)

    return StreamingResponse(pieces(), headers={"content-length": str(LONG)})


async def patience(_request: Request) -> Response:
    await asyncio.sleep(2.5)
    return PlainTextResponse("done")


def app() -> Starlette:
    return build_app(
        readiness=Readiness({}, Metrics()),
        metrics=Metrics(),
        bundle=lambda: None,  # type: ignore[arg-type,return-value]
        routes=[
            Route("/echo", echo, methods=["POST"]),
            Route("/long", long_answer),
            Route("/patience", patience),
        ],
    )


class Site:
    """A listener and the connections that a test has made to it."""

    def __init__(self, listener: HttpListener) -> None:
        host, _, port = listener.address.rpartition(":")
        self.where = (host, int(port))
        self._opened: list[socket.socket] = []

    async def connect(self, first: bytes = b"", source: str = "127.0.0.1") -> socket.socket:
        loop = asyncio.get_running_loop()
        made = socket.socket()
        self._opened.append(made)
        made.setblocking(False)
        # A reader's own buffer would hide that it does not read.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 * 1024)
        made.bind((source, 0))
        await loop.sock_connect(made, self.where)
        await loop.sock_sendall(made, first)
        return made

    async def get(self, path: str = "/healthz", source: str = "127.0.0.1") -> int:
        transport = httpx.AsyncHTTPTransport(local_address=source)
        async with httpx.AsyncClient(transport=transport, timeout=5) as client:
            return (await client.get(f"http://{self.where[0]}:{self.where[1]}{path}")).status_code

    def close(self) -> None:
        for one in self._opened:
            one.close()


@asynccontextmanager
async def served(limits: ConnectionLimits = LIMITS) -> AsyncIterator[Site]:
    listener = HttpListener("127.0.0.1:0", app(), limits=limits)
    await listener.start()
    site = Site(listener)
    try:
        yield site
    finally:
        site.close()
        await listener.stop(timedelta(seconds=1))


async def octets_until_closed(one: socket.socket) -> int:
    """Read on until the other end closes; raises TimeoutError when it does not."""
    loop, octets = asyncio.get_running_loop(), 0
    async with asyncio.timeout(10):
        try:
            while piece := await loop.sock_recv(one, 65536):
                octets += len(piece)
        except ConnectionError:
            pass
    return octets


async def seconds_until_closed(one: socket.socket) -> float:
    began = time.monotonic()
    await octets_until_closed(one)
    return time.monotonic() - began


def is_open(one: socket.socket) -> bool:
    try:
        return bool(one.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


@pytest.mark.parametrize(
    ("sent", "limit"),
    [(b"", 0.5), (HALF_A_HEAD, 0.5), (HALF_A_BODY, 1.0), (IGNORED_BODY, 1.0)],
    ids=["silent", "half a head", "half a body", "a body nobody wanted"],
)
async def test_what_does_not_come_in_time_is_not_waited_for(sent: bytes, limit: float) -> None:
    async with served() as site:
        took = await seconds_until_closed(await site.connect(sent))
        assert limit - 0.1 < took < limit + 6


@pytest.mark.parametrize(
    ("sent", "drop", "limit"),
    [(HALF_A_HEAD, b"a: b\r\n", 0.5), (HALF_A_BODY, b"a", 1.0), (IGNORED_BODY, b"a", 1.0)],
)
async def test_drop_by_drop_is_no_sooner_enough(sent: bytes, drop: bytes, limit: float) -> None:
    async with served() as site:
        one = await site.connect(sent)
        loop, began = asyncio.get_running_loop(), time.monotonic()
        with pytest.raises(ConnectionError):
            while time.monotonic() < began + 8:
                await loop.sock_sendall(one, drop)
                await asyncio.sleep(0.05)
        assert limit - 0.1 < time.monotonic() - began < limit + 6


async def test_the_second_head_of_a_connection_has_to_come_in_time_too() -> None:
    async with served() as site:
        one = await site.connect(ASKING)
        await asyncio.sleep(0.8)  # longer than a head may take: nothing is owed in between
        assert is_open(one)
        loop = asyncio.get_running_loop()
        assert b"200 OK" in await loop.sock_recv(one, 65536)
        await loop.sock_sendall(one, HALF_A_HEAD)
        assert 0.4 < await seconds_until_closed(one) < 6


async def test_many_requests_of_one_connection_and_a_long_wait_are_fine() -> None:
    async with served() as site:
        base = f"http://127.0.0.1:{site.where[1]}"
        async with httpx.AsyncClient(base_url=base) as client:
            began = time.monotonic()
            while time.monotonic() < began + 1.5:
                assert (await client.post("/echo", content=b"x" * 100_000)).text == "x" * 100_000
            assert (await client.get("/patience")).text == "done"


async def test_a_reader_that_takes_nothing_is_cut_off() -> None:
    async with served() as site:
        one = await site.connect(b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n")
        began = time.monotonic()
        await asyncio.sleep(1.0)
        assert is_open(one)
        await asyncio.sleep(2.0)
        # What the kernels had is there, but not the rest.
        assert await octets_until_closed(one) < LONG / 2
        assert time.monotonic() - began < 15


async def test_a_reader_that_is_slow_but_reads_gets_it_all() -> None:
    """For longer than one may take nothing."""
    async with served() as site:
        one = await site.connect(b"GET /long HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        loop, began, got = asyncio.get_running_loop(), time.monotonic(), 0
        async with asyncio.timeout(20):
            while piece := await loop.sock_recv(one, 64 * 1024):
                got += len(piece)
                await asyncio.sleep(len(piece) / 3_000_000)
        assert got > LONG
        assert time.monotonic() - began > 2 * LIMITS.stall_seconds


async def test_a_reader_that_takes_nothing_of_a_closed_connection_is_cut_off() -> None:
    """The whole answer is written, and waits in our memory."""
    async with served(replace(LIMITS, of_one_network=1)) as site:
        await site.connect(b"GET /long HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        await asyncio.sleep(0.3)
        with pytest.raises(httpx.HTTPError):
            await site.get()
        async with asyncio.timeout(5):
            while True:
                try:
                    assert await site.get() == 200
                except httpx.HTTPError:
                    await asyncio.sleep(0.1)
                else:
                    break


@pytest.mark.parametrize("sent", [b"", HALF_A_HEAD], ids=["silent", "half a head"])
async def test_idle_connections_of_one_network_make_room_for_its_next(sent: bytes) -> None:
    async with served(replace(PATIENT, of_one_network=8)) as site:
        idle = [await site.connect(sent) for _ in range(8)]
        await asyncio.sleep(0.1)
        assert all(map(is_open, idle))
        more = [await site.connect(sent) for _ in range(3)]
        await asyncio.sleep(0.1)
        assert [is_open(one) for one in idle] == [False] * 3 + [True] * 5
        assert all(map(is_open, more))
        # It is served itself, and so are others, whose places are not touched.
        assert await site.get() == 200
        assert await site.get("/readyz", source="127.0.0.2") == 200
        assert [is_open(one) for one in idle] == [False] * 4 + [True] * 4


async def test_busy_connections_of_one_network_leave_no_room_for_its_next() -> None:
    async with served(replace(PATIENT, of_one_network=8)) as site:
        busy = [await site.connect(HALF_A_BODY) for _ in range(8)]
        await asyncio.sleep(0.1)
        assert await seconds_until_closed(await site.connect(ASKING)) < 5
        assert all(map(is_open, busy))
        assert await site.get(source="127.0.0.2") == 200
        busy.pop().close()
        await asyncio.sleep(0.1)
        assert await site.get() == 200


async def test_all_together_are_bounded_and_the_oldest_idle_one_makes_room() -> None:
    async with served(replace(PATIENT, of_one_network=8, together=20)) as site:
        idle = [
            await site.connect(source=f"127.0.0.{host}") for host in range(3, 6) for _ in range(8)
        ]
        await asyncio.sleep(0.1)
        assert [is_open(one) for one in idle] == [False] * 4 + [True] * 20
        for path in ("/healthz", "/readyz"):
            assert await site.get(path, source="127.0.0.2") == 200


async def test_a_thousand_idle_connections_of_one_host_do_not_keep_others_out() -> None:
    """As the listener is set: no limit is short in this test."""
    async with served(ConnectionLimits()) as site:
        for number in range(600):
            await site.connect(HALF_A_HEAD if number % 2 else b"")
        began = time.monotonic()
        for path in ("/healthz", "/readyz", "/metrics"):
            assert await site.get(path, source="127.0.0.2") == 200
        assert await site.get() == 200
        assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("peer", "network"),
    [
        (("192.0.2.1", 4), "192.0.2.1"),
        (("2001:db8:1:2:3:4:5:6", 4), "2001:db8:1:2::/64"),
        (("fe80::1%eth0", 4), "fe80::/64"),
        (("::ffff:192.0.2.1", 4), "192.0.2.1"),
        (("odd", 4), "odd"),
        (None, ""),
    ],
)
def test_the_network_of_an_address(peer: tuple[str, int] | None, network: str) -> None:
    assert network_of(peer) == network
