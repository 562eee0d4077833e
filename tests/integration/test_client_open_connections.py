"""Open connections of a revoked peer: whoever waits for it learns so, at once."""

from __future__ import annotations

import asyncio
import gc
import http.client
import http.server
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import pytest
import requests
from requests.adapters import HTTPAdapter

from identity_client import (
    PeerRejected,
    PeerRevoked,
    RevocationsStale,
    StalenessPolicy,
    client_ssl_context,
    peer_spiffe_id,
    server_ssl_context,
    verify_peer,
)
from identity_client.peer import check_current, peer_from_pem
from identity_client.testing import FakeIdentitySource, FakeTrustDomain

WEB = "spiffe://example.org/web"
API = "spiffe://example.org/api"
SOON = 5.0


@pytest.fixture
def domain() -> FakeTrustDomain:
    return FakeTrustDomain("example.org")


@pytest.fixture
def web(domain: FakeTrustDomain) -> FakeIdentitySource:
    return domain.source(WEB)


@pytest.fixture
def api(domain: FakeTrustDomain) -> FakeIdentitySource:
    return domain.source(API)


@contextmanager
def pair(
    client_context: ssl.SSLContext, server_context: ssl.SSLContext
) -> Iterator[tuple[ssl.SSLSocket, ssl.SSLSocket]]:
    """A client and a server on one connection, both through with their handshakes."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        accepted: list[ssl.SSLSocket] = []

        def accept() -> None:
            plain, _ = listening.accept()
            plain.settimeout(30)
            with suppress(OSError):
                accepted.append(server_context.wrap_socket(plain, server_side=True))

        thread = threading.Thread(target=accept)
        thread.start()
        plain = socket.create_connection(listening.getsockname(), timeout=30)
        with client_context.wrap_socket(plain) as client:
            thread.join()
            if not accepted:
                raise ConnectionError("the server refused the client")
            with accepted[0] as server:
                yield client, server


class Blocked:
    """Something that blocks in a thread, and how it ended."""

    def __init__(self, act: Any) -> None:
        self.error: Exception | None = None
        self.value: Any = None
        self.ended_at = 0.0
        self._act = act
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        time.sleep(0.1)
        assert self._thread.is_alive()

    def _run(self) -> None:
        try:
            self.value = self._act()
        except (OSError, http.client.HTTPException) as error:
            self.error = error
        self.ended_at = time.monotonic()

    def end(self, since: float) -> float:
        """Seconds after `since` that it ended."""
        self._thread.join(5)
        assert not self._thread.is_alive(), "it still waits"
        return self.ended_at - since


def fill(connection: ssl.SSLSocket) -> None:
    """Writes until nobody takes it any more."""
    while True:
        connection.sendall(b"x" * 65536)


@pytest.mark.parametrize(
    "act",
    [
        lambda tls: tls.recv(1),
        lambda tls: tls.recv_into(bytearray(1)),
        lambda tls: tls.read(1),
        lambda tls: tls.makefile("rb").readline(),
        fill,
    ],
)
@pytest.mark.parametrize("blocking", [True, False])
def test_a_server_that_waits_for_a_revoked_client_is_freed(
    domain: FakeTrustDomain,
    web: FakeIdentitySource,
    api: FakeIdentitySource,
    act: Any,
    blocking: bool,
) -> None:
    with pair(client_ssl_context(web, authorize=API), server_ssl_context(api, authorize=WEB)) as (
        client,
        server,
    ):
        server.settimeout(None if blocking else 30)
        waiting = Blocked(lambda: act(server))
        since = time.monotonic()
        domain.revoke(web)
        assert waiting.end(since) < SOON
        assert isinstance(waiting.error, PeerRejected)
        assert waiting.error.reason == "PEER_REVOKED"
        # The other side meets the end of the connection.
        with suppress(OSError):
            while client.recv(65536):
                pass


def test_a_client_that_waits_for_a_revoked_server_is_freed(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    with pair(client_ssl_context(web, authorize=API), server_ssl_context(api, authorize=WEB)) as (
        client,
        _,
    ):
        waiting = Blocked(lambda: client.recv(1))
        since = time.monotonic()
        domain.revoke(api)
        assert waiting.end(since) < SOON
        assert isinstance(waiting.error, PeerRejected)
        with pytest.raises(PeerRejected):
            client.sendall(b"x")


def test_connections_of_others_stay(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    other = domain.source("spiffe://example.org/other")
    context = server_ssl_context(api, authorize=[WEB, "spiffe://example.org/other"])
    with (
        pair(client_ssl_context(web, authorize=API), context) as (_, of_web),
        pair(client_ssl_context(other, authorize=API), context) as (client, server),
    ):
        domain.revoke(web)
        with pytest.raises(PeerRejected):
            of_web.recv(1)
        client.sendall(b"still here")
        assert server.recv(100) == b"still here"
        verify_peer(server, source=api, authorize=str(other.spiffe_id))


def test_a_peer_revoked_before_a_lazy_handshake_is_refused(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    client = client_ssl_context(web, authorize=API)
    api_before = api.snapshot()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        plain = socket.create_connection(listening.getsockname(), timeout=5)
        tls = client.wrap_socket(plain, do_handshake_on_connect=False)
        accepted, _ = listening.accept()
        serving = server_ssl_context(Frozen(api_before, api), authorize=WEB)
        thread = threading.Thread(target=_serve_once, args=(serving, accepted))
        thread.start()
        domain.revoke(api)
        with tls, pytest.raises(PeerRejected, match="revoked"):
            tls.recv(1)
        thread.join()


def _serve_once(context: ssl.SSLContext, accepted: socket.socket) -> None:
    try:
        with context.wrap_socket(accepted, server_side=True) as connection:
            connection.recv(1)
    except OSError:
        accepted.close()


class Frozen:
    """Goes on with a certificate whatever happens, and hears nothing."""

    def __init__(self, snapshot: Any, source: FakeIdentitySource) -> None:
        self._snapshot = snapshot
        self._denied = type(source.denied)()

    def snapshot(self) -> Any:
        return self._snapshot

    @property
    def denied(self) -> Any:
        return self._denied


def test_connections_are_not_kept_by_those_who_watch_them(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    client_context = client_ssl_context(web, authorize=API)
    server_context: Any = server_ssl_context(api, authorize=WEB)
    for _ in range(3):
        with pair(client_context, server_context):
            assert len(server_context._open) == 1
    gc.collect()
    assert len(server_context._open) == 0
    watched = weakref.ref(server_context)
    del server_context
    gc.collect()
    assert watched() is None
    domain.revoke(web)


# --- HTTP keep-alive -----------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        assert isinstance(self.connection, ssl.SSLSocket)
        body = str(peer_spiffe_id(self.connection)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    """One whose threads can be counted."""

    daemon_threads = False
    block_on_close = False
    handling = 0
    errors: list[object]

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        self.handling += 1
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.handling -= 1

    def handle_error(self, request: object, client_address: object) -> None:
        pass


@contextmanager
def https_server(context: ssl.SSLContext) -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(
        server.socket, server_side=True, do_handshake_on_connect=False
    )
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def eventually(condition: Any, seconds: float = SOON) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)


def test_a_keep_alive_connection_of_a_revoked_client_is_closed_by_the_server(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    with https_server(server_ssl_context(api, authorize=WEB)) as server:
        port = server.server_address[1]
        kept = http.client.HTTPSConnection(
            "127.0.0.1", port, context=client_ssl_context(web, authorize=API), timeout=5
        )
        kept.request("GET", "/")
        assert kept.getresponse().read() == WEB.encode()
        assert server.handling == 1
        domain.revoke(web)
        eventually(lambda: server.handling == 0)  # Its thread waited for the next request.
        with pytest.raises((OSError, http.client.HTTPException)):
            kept.request("GET", "/")
            kept.getresponse()
        kept.close()


class PinnedAdapter(HTTPAdapter):
    """requests with our context."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        super().__init__()

    def init_poolmanager(self, *arguments: Any, **keywords: Any) -> None:
        super().init_poolmanager(
            *arguments, ssl_context=self._context, assert_hostname=False, **keywords
        )


def test_pools_drop_connections_to_a_revoked_server_and_go_on_with_the_good_one(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    stolen = Frozen(api.snapshot(), api)
    context = client_ssl_context(web, authorize=API)
    with (
        https_server(server_ssl_context(stolen, authorize=WEB)) as bad,
        https_server(server_ssl_context(api, authorize=WEB)) as good,
        requests.Session() as session,
        httpx.Client(verify=context, trust_env=False) as client,
    ):
        session.trust_env = False
        session.mount("https://", PinnedAdapter(context))
        bad_url, good_url = (f"https://127.0.0.1:{one.server_address[1]}/" for one in (bad, good))
        for url in (bad_url, good_url):
            assert session.get(url, timeout=5).text == WEB
            assert client.get(url, timeout=5).text == WEB
        assert bad.handling == 2
        domain.revoke(api)
        api.rotate()
        eventually(lambda: bad.handling == 0)
        with pytest.raises(requests.exceptions.SSLError, match="revoked"):
            session.get(bad_url, timeout=5)
        with pytest.raises((httpx.HTTPError, PeerRejected)):
            client.get(bad_url, timeout=5)
        assert session.get(good_url, timeout=5).text == WEB


# --- asyncio -------------------------------------------------------------------------------------


@pytest.mark.parametrize("paused", [False, True])
async def test_an_asyncio_server_that_waits_for_a_revoked_client_is_freed(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource, paused: bool
) -> None:
    ended: list[Exception | bytes] = []
    accepted = asyncio.Event()
    done = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set()
        if paused:
            writer.transport.pause_reading()  # type: ignore[attr-defined]
        try:
            ended.append(await reader.read(1))
        except Exception as error:
            ended.append(error)
        writer.close()
        done.set()

    server = await asyncio.start_server(
        serve, "127.0.0.1", 0, ssl=server_ssl_context(api, authorize=WEB)
    )
    async with server:
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=client_ssl_context(web, authorize=API)
        )
        await accepted.wait()
        await asyncio.sleep(0.05)
        # As in real life: from another thread than the connection's.
        await asyncio.to_thread(domain.revoke, web)
        async with asyncio.timeout(SOON):
            await done.wait()
            with pytest.raises((OSError, EOFError)):
                await reader.readexactly(1)
        writer.close()
    if paused:
        assert ended == [b""]
    else:
        (error,) = ended
        assert isinstance(error, PeerRejected)
        assert error.reason == "PEER_REVOKED"


async def test_an_asyncio_client_that_waits_for_a_revoked_server_is_freed(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    hold = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await hold.wait()
        writer.close()

    stolen = Frozen(api.snapshot(), api)
    other = domain.source("spiffe://example.org/other")
    server = await asyncio.start_server(
        serve,
        "127.0.0.1",
        0,
        ssl=server_ssl_context(stolen, authorize=[WEB, str(other.spiffe_id)]),
    )
    async with server:
        port = server.sockets[0].getsockname()[1]
        context = client_ssl_context(web, authorize=API)
        connections = [
            await asyncio.open_connection("127.0.0.1", port, ssl=context) for _ in range(5)
        ]
        waiting = [asyncio.create_task(reader.read(1)) for reader, _ in connections]
        await asyncio.sleep(0.05)
        domain.revoke(api)
        async with asyncio.timeout(SOON):
            ends = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(one, PeerRejected) for one in ends), ends
        assert all(writer.transport.is_closing() for _, writer in connections)
        hold.set()
        for _, writer in connections:
            writer.close()


async def test_a_memory_connection_without_a_loop_s_protocol_is_refused_when_used(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    """As trio and anyio have them: here by hand, and on a loop that has nobody to tell."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_ssl_context(web, authorize=API).wrap_bio(to_client, to_server)
    server = server_ssl_context(api, authorize=WEB).wrap_bio(to_server, to_client, server_side=True)
    for _ in range(3):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    client.write(b"x")
    assert server.read(1) == b"x"
    domain.revoke(web)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    with pytest.raises(PeerRejected):
        server.write(b"y")
    with pytest.raises(PeerRejected):
        server.read(1)


# --- silence -------------------------------------------------------------------------------------


def test_silence_is_refused_in_handshakes_and_on_open_connections(
    web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    strict = server_ssl_context(api, authorize=WEB, staleness=StalenessPolicy.refuse(30))
    usual = server_ssl_context(api, authorize=WEB)
    context = client_ssl_context(web, authorize=API)
    with (
        pair(context, strict) as (to_strict, of_strict),
        pair(context, usual) as (to_usual, of_usual),
    ):
        api.hear_nothing(31)
        to_strict.sendall(b"x")
        with pytest.raises(PeerRejected) as refused:
            of_strict.recv(1)
        assert refused.value.reason == "REVOCATIONS_STALE"
        to_usual.sendall(b"x")
        assert of_usual.recv(1) == b"x"
        assert api.status().revocations_stale is False  # The source itself tolerates a minute.
        with pytest.raises(OSError), pair(context, strict):
            pass
        api.hear_again()
        with pair(context, strict) as (_, again):
            verify_peer(again, source=api, authorize=WEB)


def test_a_source_that_refuses_silence_refuses_it_everywhere(domain: FakeTrustDomain) -> None:
    api = domain.source(API, staleness=StalenessPolicy.refuse(30))
    web = domain.source(WEB)
    token = web.fetch_jwt_svid("orders").token
    peer = peer_from_pem(web.snapshot().x509.chain_pem)
    api.validate_jwt_svid(token, "orders")
    api.hear_nothing(31)
    assert api.status().revocations_stale
    assert not api.status().revocations_synced
    with pytest.raises(RevocationsStale):
        api.validate_jwt_svid(token, "orders")
    api.hear_again()
    api.validate_jwt_svid(token, "orders")
    domain.revoke(web)
    api.hear_nothing(31)
    with pytest.raises(PeerRevoked):  # What is known is said.
        check_current(peer, api.denied)
