"""SSL contexts over real sockets: who passes the handshake, and what rotation does to it."""

from __future__ import annotations

import asyncio
import http.client
import http.server
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
from requests.adapters import HTTPAdapter

from identity_client import (
    PeerRejected,
    PeerRevoked,
    any_of_trust_domain,
    below,
    client_ssl_context,
    peer_spiffe_id,
    server_ssl_context,
    verify_peer,
)
from identity_client.testing import FakeIdentitySource, FakeTrustDomain

WEB = "spiffe://example.org/web"
API = "spiffe://example.org/api"


@pytest.fixture
def domain() -> FakeTrustDomain:
    return FakeTrustDomain("example.org")


@pytest.fixture
def web(domain: FakeTrustDomain) -> FakeIdentitySource:
    return domain.source(WEB)


@pytest.fixture
def api(domain: FakeTrustDomain) -> FakeIdentitySource:
    return domain.source(API)


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


class QuietServer(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass


@contextmanager
def https_server(context: ssl.SSLContext, *, lazy: bool = True) -> Iterator[int]:
    server = QuietServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(
        server.socket, server_side=True, do_handshake_on_connect=not lazy
    )
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def get(port: int, context: ssl.SSLContext) -> bytes:
    connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=5)
    try:
        connection.request("GET", "/")
        return connection.getresponse().read()
    finally:
        connection.close()


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize(
    "rule", [WEB, [WEB, API], below("spiffe://example.org/web"), any_of_trust_domain("example.org")]
)
def test_accepted_peers_meet(
    web: FakeIdentitySource, api: FakeIdentitySource, rule: object, lazy: bool
) -> None:
    with https_server(server_ssl_context(api, authorize=rule), lazy=lazy) as port:  # type: ignore[arg-type]
        assert get(port, client_ssl_context(web, authorize=API)) == WEB.encode()


def test_the_wrong_server_is_refused_before_a_byte_is_sent(
    domain: FakeTrustDomain, web: FakeIdentitySource
) -> None:
    impostor = domain.source("spiffe://example.org/impostor")
    with https_server(server_ssl_context(impostor, authorize=WEB)) as port:
        plain = socket.create_connection(("127.0.0.1", port), timeout=5)
        context = client_ssl_context(web, authorize=API)
        with pytest.raises(PeerRejected, match="impostor") as refused:
            context.wrap_socket(plain)
        assert isinstance(refused.value, ssl.SSLCertVerificationError)
        assert plain.fileno() == -1


def test_a_handshake_left_to_the_first_read_or_write_is_checked_too(
    domain: FakeTrustDomain, web: FakeIdentitySource
) -> None:
    impostor = domain.source("spiffe://example.org/impostor")
    context = client_ssl_context(web, authorize=API)
    with https_server(server_ssl_context(impostor, authorize=WEB)) as port:
        for use in (
            lambda tls: tls.send(b"x"),
            lambda tls: tls.sendall(b"x"),
            lambda tls: tls.write(b"x"),
            lambda tls: tls.recv(1),
            lambda tls: tls.read(1),
            lambda tls: tls.recv_into(bytearray(1)),
        ):
            plain = socket.create_connection(("127.0.0.1", port), timeout=5)
            tls = context.wrap_socket(plain, do_handshake_on_connect=False)
            with tls, pytest.raises(PeerRejected):
                use(tls)


@pytest.mark.parametrize("lazy", [True, False])
def test_the_wrong_client_gets_no_answer_and_the_server_goes_on(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource, lazy: bool
) -> None:
    stranger = domain.source("spiffe://example.org/stranger")
    with https_server(server_ssl_context(api, authorize=WEB), lazy=lazy) as port:
        with pytest.raises(OSError):
            get(port, client_ssl_context(stranger, authorize=API))
        assert get(port, client_ssl_context(web, authorize=API)) == WEB.encode()


def test_other_authorities_and_clients_without_certificates_are_refused(
    web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    foreign = FakeTrustDomain("example.org").source(WEB)
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname = False
    bare.verify_mode = ssl.CERT_NONE
    with https_server(server_ssl_context(api, authorize=WEB)) as port:
        with pytest.raises(ssl.SSLCertVerificationError):
            get(port, client_ssl_context(foreign, authorize=API))
        with pytest.raises(OSError):
            get(port, bare)
        assert get(port, client_ssl_context(web, authorize=API)) == WEB.encode()


def test_verification_cannot_be_switched_off(
    domain: FakeTrustDomain, web: FakeIdentitySource
) -> None:
    impostor = domain.source("spiffe://example.org/impostor")
    context = client_ssl_context(web, authorize=API)
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    server = server_ssl_context(impostor, authorize=WEB)
    with https_server(server) as port, pytest.raises(PeerRejected):
        get(port, context)


def test_rotation_under_load_fails_no_request(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    context = client_ssl_context(web, authorize=API)
    stop = threading.Event()
    failed: list[Exception] = []
    done = [0]

    def load() -> None:
        while not stop.is_set():
            try:
                assert get(port, context) == WEB.encode()
            except (OSError, http.client.HTTPException) as error:
                failed.append(error)
            done[0] += 1

    with https_server(server_ssl_context(api, authorize=WEB)) as port:
        threads = [threading.Thread(target=load) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(40):
            time.sleep(0.03)
            web.rotate()
            api.rotate()
        stop.set()
        for thread in threads:
            thread.join()
    assert failed == []
    assert done[0] > 20


def test_new_connections_use_the_newest_certificate_and_old_ones_stay_open(
    web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    context = client_ssl_context(web, authorize=API)
    with https_server(server_ssl_context(api, authorize=WEB)) as port:
        kept = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=5)
        kept.request("GET", "/")
        kept.getresponse().read()
        before = api.serial
        api.rotate()
        web.rotate()
        kept.request("GET", "/")
        assert kept.getresponse().read() == WEB.encode()
        fresh = context.wrap_socket(socket.create_connection(("127.0.0.1", port), timeout=5))
        with fresh:
            serial = fresh.getpeercert()["serialNumber"].lower()  # type: ignore[index,union-attr]
        kept.close()
    assert serial == api.serial != before


def test_a_root_that_left_the_bundle_is_refused(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    context = client_ssl_context(web, authorize=API)
    with https_server(server_ssl_context(api, authorize=WEB)) as port:
        get(port, context)
        domain.replace_authority()
        web.rotate()
        with pytest.raises(ssl.SSLCertVerificationError):
            get(port, context)
        api.rotate()
        assert get(port, context) == WEB.encode()


def test_a_revoked_client_is_cut_off_on_an_open_connection(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    context = client_ssl_context(web, authorize=API)
    with https_server(server_ssl_context(api, authorize=WEB)) as port:
        kept = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=5)
        kept.request("GET", "/")
        kept.getresponse().read()
        domain.revoke(web)
        with pytest.raises((OSError, http.client.HTTPException)):
            kept.request("GET", "/")
            kept.getresponse()
        kept.close()
        with pytest.raises(ssl.SSLError, match="revoked"):
            get(port, context)  # it does not even try
        web.rotate()
        assert get(port, context) == WEB.encode()


def test_a_revoked_server_is_cut_off_by_its_client(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    context = client_ssl_context(web, authorize=API)
    with https_server(server_ssl_context(api, authorize=WEB)) as port:
        tls = context.wrap_socket(socket.create_connection(("127.0.0.1", port), timeout=5))
        with tls:
            assert verify_peer(tls, source=web, authorize=API) == API
            with pytest.raises(PeerRejected):
                verify_peer(tls, source=web, authorize=WEB)
            domain.revoke(api)
            with pytest.raises(PeerRevoked):
                verify_peer(tls, source=web, authorize=API)
            with pytest.raises(PeerRejected, match="revoked"):
                tls.sendall(b"GET / HTTP/1.1\r\n\r\n")


def test_a_server_without_an_identity_refuses_and_lives(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    context = client_ssl_context(web, authorize=API)
    with https_server(server_ssl_context(api, authorize=WEB)) as port:
        domain.revoke(api)
        with pytest.raises(OSError):
            get(port, context)
        api.rotate()
        assert get(port, context) == WEB.encode()


def test_an_expired_client_is_cut_off_on_an_open_connection(
    domain: FakeTrustDomain, api: FakeIdentitySource
) -> None:
    brief = domain.source(WEB, ttl=timedelta(seconds=2))
    with https_server(server_ssl_context(api, authorize=WEB)) as port:
        kept = http.client.HTTPSConnection(
            "127.0.0.1", port, context=client_ssl_context(brief, authorize=API), timeout=5
        )
        kept.request("GET", "/")
        kept.getresponse().read()
        time.sleep(2.1)
        with pytest.raises((OSError, http.client.HTTPException)):
            kept.request("GET", "/")
            kept.getresponse()
        kept.close()


async def test_asyncio_servers_and_clients(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = peer_spiffe_id(writer.get_extra_info("ssl_object"))
        while line := await reader.readline():
            writer.write(str(peer).encode() + b" " + line)
        writer.close()

    stranger = domain.source("spiffe://example.org/stranger")
    server = await asyncio.start_server(
        serve, "127.0.0.1", 0, ssl=server_ssl_context(api, authorize=WEB)
    )
    async with server:
        port = server.sockets[0].getsockname()[1]
        context = client_ssl_context(web, authorize=API)
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
            writer.write(b"hello\n")
            assert await reader.readline() == f"{WEB} hello\n".encode()
            web.rotate()
            api.rotate()
            writer.write(b"again\n")
            assert await reader.readline() == f"{WEB} again\n".encode()
            writer.close()
            await writer.wait_closed()
        with pytest.raises(PeerRejected):
            await asyncio.open_connection(
                "127.0.0.1", port, ssl=client_ssl_context(web, authorize=WEB)
            )
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=client_ssl_context(stranger, authorize=API)
        )
        writer.write(b"let me in\n")
        with pytest.raises((ConnectionError, ssl.SSLError, EOFError, AssertionError)):
            assert await asyncio.wait_for(reader.readline(), 5) != b""
        writer.close()
        # A peer that is revoked in mid-connection.
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        writer.write(b"hello\n")
        await reader.readline()
        domain.revoke(api)
        writer.write(b"more\n")
        with pytest.raises((ConnectionError, ssl.SSLError, EOFError, AssertionError)):
            assert await asyncio.wait_for(reader.readline(), 5) != b""
        writer.close()


class PinnedAdapter(HTTPAdapter):
    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        super().__init__()

    def init_poolmanager(self, *args: Any, **keywords: Any) -> None:
        super().init_poolmanager(
            *args, **keywords, ssl_context=self._context, assert_hostname=False
        )


def test_requests_and_httpx_take_the_context(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    impostor = domain.source("spiffe://example.org/impostor")
    context = client_ssl_context(web, authorize=API)
    with (
        https_server(server_ssl_context(api, authorize=WEB)) as port,
        https_server(server_ssl_context(impostor, authorize=WEB)) as wrong_port,
        requests.Session() as session,
        httpx.Client(verify=context, trust_env=False) as client,
    ):
        session.trust_env = False
        session.mount("https://", PinnedAdapter(context))
        for _ in range(2):
            assert session.get(f"https://127.0.0.1:{port}/", timeout=5).text == WEB
            assert client.get(f"https://127.0.0.1:{port}/", timeout=5).text == WEB
            web.rotate()
        with pytest.raises(requests.exceptions.SSLError):
            session.get(f"https://127.0.0.1:{wrong_port}/", timeout=5)
        with pytest.raises(httpx.ConnectError):
            client.get(f"https://127.0.0.1:{wrong_port}/", timeout=5)


def test_the_key_leaves_no_file_behind(api: FakeIdentitySource, web: FakeIdentitySource) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    context = client_ssl_context(web, authorize=API)
    for _ in range(5):
        context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO())
        web.rotate()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
