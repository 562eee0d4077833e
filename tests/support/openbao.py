"""A real OpenBao for tests, and a proxy in front of it that fails in every way a server can.

- One server for the whole session (one per xdist worker); every test gets mounts of its own.
- A test that seals or kills the server brings it back itself, in a `finally`.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import hvac
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from identity_broker.dev.openbao import EmbeddedOpenBao
from identity_ca.backends.vault.auth import AppRoleAuth, AuthMethod, TokenAuth
from identity_ca.backends.vault.policy import VaultLayout
from identity_ca.backends.vault.provision import Provisioned, admin_client, provision
from identity_ca.backends.vault.session import VaultSession, VaultSettings
from identity_ca.spiffe_id import TrustDomain

TRUST_DOMAIN = TrustDomain("example.org")

_numbers = itertools.count(1)


def unique_layout() -> VaultLayout:
    """Names no other test uses."""
    number = next(_numbers)
    return VaultLayout(
        transit_mount=f"transit-{number}",
        pki_mount=f"pki-{number}",
        role=f"broker-{number}",
        policy=f"broker-{number}",
    )


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of a throwaway CA and of one certificate below it."""

    ca: Path
    certificate: Path
    key: Path


def make_tls_files(directory: Path, name: str, *, client: bool = False) -> TlsFiles:
    """A certificate for 127.0.0.1, or for a client called `name`, under a CA of its own."""
    now = datetime.now(UTC)
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} test CA")])

    def certificate(
        subject: x509.Name, public_key: ec.EllipticCurvePublicKey, *, ca: bool
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(ca_name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=1))
            .not_valid_after(now + timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()),
                critical=False,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        )

    root = (
        certificate(ca_name, ca_key.public_key(), ca=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=False,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=True,
                crl_sign=True,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .sign(ca_key, hashes.SHA256())
    )
    usage = ExtendedKeyUsageOID.CLIENT_AUTH if client else ExtendedKeyUsageOID.SERVER_AUTH
    leaf = (
        certificate(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key.public_key(), ca=False
        )
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False
        )
        .sign(ca_key, hashes.SHA256())
    )
    files = TlsFiles(*(directory / f"{name}-{part}.pem" for part in ("ca", "cert", "key")))
    files.ca.write_bytes(root.public_bytes(Encoding.PEM))
    files.certificate.write_bytes(leaf.public_bytes(Encoding.PEM))
    files.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    files.key.chmod(0o600)
    return files


# --- the server -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def openbao_tls(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    """What the server's TLS listener shows."""
    return make_tls_files(tmp_path_factory.mktemp("openbao-tls"), "server")


@pytest.fixture(scope="session")
def openbao(
    tmp_path_factory: pytest.TempPathFactory, openbao_tls: TlsFiles
) -> Iterator[EmbeddedOpenBao]:
    """A running, unsealed OpenBao."""
    server = EmbeddedOpenBao(
        tmp_path_factory.mktemp("openbao"), tls=(openbao_tls.certificate, openbao_tls.key)
    )
    with server:
        yield server


@pytest.fixture(scope="session")
def openbao_admin(openbao: EmbeddedOpenBao) -> Iterator[hvac.Client]:
    """An hvac client with the root token, straight to the server."""
    client = admin_client(openbao.address, openbao.root_token)
    yield client
    client.adapter.close()


@dataclass(frozen=True, slots=True)
class VaultSite:
    """One trust domain, set up on the shared server."""

    address: str
    layout: VaultLayout
    provisioned: Provisioned
    admin: Any = field(repr=False)
    directory: Path

    def auth(self) -> AppRoleAuth:
        """The broker's own login, with a wrapped secret-id made for it."""
        wrapped = self.admin.auth.approle.generate_secret_id(
            self.layout.role, mount_point=self.layout.approle_mount, wrap_ttl="60s"
        )
        file = self.directory / f"wrapped-{next(_numbers)}"
        file.write_text(wrapped["wrap_info"]["token"])
        return AppRoleAuth(
            self.provisioned.role_id,
            wrapped_secret_id_file=file,
            mount=self.layout.approle_mount,
        )


@pytest.fixture
def vault_site(openbao: EmbeddedOpenBao, openbao_admin: hvac.Client, tmp_path: Path) -> VaultSite:
    """Mounts, keys, root, policy and role of this test alone."""
    return make_site(openbao, openbao_admin, tmp_path)


def make_site(openbao: EmbeddedOpenBao, admin: hvac.Client, directory: Path) -> VaultSite:
    """What the fixture `vault_site` gives, for fixtures of another scope."""
    layout = unique_layout()
    return VaultSite(
        address=openbao.address,
        layout=layout,
        provisioned=provision(admin, trust_domain=TRUST_DOMAIN, layout=layout),
        admin=admin,
        directory=directory,
    )


OpenSession = Callable[..., VaultSession]


@pytest.fixture
def open_session(openbao: EmbeddedOpenBao, tmp_path: Path) -> Iterator[OpenSession]:
    """Makes sessions and closes them: `open_session(auth=…, address=…, **settings)`.

    Without `auth` it is the root token's.
    """
    with contextlib.ExitStack() as stack:

        def opened(
            *, auth: AuthMethod | None = None, address: str | None = None, **settings: Any
        ) -> VaultSession:
            settings.setdefault("timeout", 3.0)
            session = VaultSession(
                VaultSettings(address=address or openbao.address, **settings),
                auth or TokenAuth(openbao.root_token_file),
            )
            stack.callback(session.close)
            return session

        yield opened


# --- the proxy ------------------------------------------------------------------------------------

Rewrite = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to requests whose path contains `match`.

    Attributes:
        status: answered instead of the server, with `errors` or `body`.
        delay: seconds before anything is answered or passed on.
        reset: the connection is broken without an answer, before the server hears of it.
        reset_after: the same, after the server has done its work.
        truncate: the server's answer ends in the middle.
        rewrite: changes the server's JSON.
        times: how often; None until `clear`.
    """

    match: str = ""
    status: int | None = None
    errors: tuple[str, ...] = ()
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    reset: bool = False
    reset_after: bool = False
    truncate: bool = False
    drip: float = 0.0
    rewrite: Rewrite | None = None
    times: int | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """One request that reached the proxy."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    at: float = field(default_factory=time.monotonic)

    @property
    def json(self) -> dict[str, Any]:
        found = json.loads(self.body)
        assert isinstance(found, dict)
        return found


class FaultProxy:
    """Stands between a client and the server, on loopback; also a stand-in for a foreign host."""

    def __init__(self, upstream: str) -> None:
        self._upstream = urlsplit(upstream).netloc
        self._lock = threading.Lock()
        self._faults: list[tuple[Fault, list[int]]] = []
        self._server: _Server | None = None
        self._port = 0
        self.seen: list[Seen] = []
        self.connections = 0
        self.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listens, on the same port as before."""
        self._server = _Server(("127.0.0.1", self._port), _Handler)
        self._server.proxy = self
        self._port = self._server.server_address[1]
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    def stop(self) -> None:
        """Refuses connections from now on, and breaks those that are open."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            server.break_connections()

    def inject(self, fault: Fault) -> None:
        with self._lock:
            self._faults.append((fault, [0]))

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def paths(self) -> list[str]:
        """The paths seen so far, without `/v1/`."""
        return [each.path.removeprefix("/v1/") for each in self.seen]

    def fault_for(self, path: str) -> Fault | None:
        with self._lock:
            for fault, used in self._faults:
                if fault.match in path and (fault.times is None or used[0] < fault.times):
                    used[0] += 1
                    return fault
        return None

    def ask_upstream(self, seen: Seen) -> tuple[int, bytes, str]:
        connection = http.client.HTTPConnection(self._upstream, timeout=30)
        try:
            headers = {
                name: value
                for name, value in seen.headers.items()
                if name.lower() not in {"host", "connection", "accept-encoding", "content-length"}
            }
            connection.request(seen.method, seen.path, body=seen.body or None, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read(), answer.getheader("Content-Type", "")
        finally:
            connection.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    proxy: FaultProxy

    def __init__(self, *arguments: Any) -> None:
        self._open: set[socket.socket] = set()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        self.proxy.connections += 1
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def break_connections(self) -> None:
        for each in list(self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        seen = Seen(self.command, self.path, dict(self.headers.items()), body)
        proxy = self.server.proxy
        proxy.seen.append(seen)
        fault = proxy.fault_for(self.path) or Fault()
        if fault.delay:
            time.sleep(fault.delay)
        if fault.reset:
            self._reset()
            return
        if fault.status is not None:
            text = fault.body
            if text is None:
                text = json.dumps({"errors": list(fault.errors)}).encode()
            self._reply(fault.status, text, "application/json", fault)
            return
        status, text, kind = proxy.ask_upstream(seen)
        if fault.reset_after:
            self._reset()
            return
        if fault.rewrite is not None:
            text = json.dumps(fault.rewrite(json.loads(text))).encode()
        self._reply(status, text, kind, fault)

    do_GET = do_POST = do_PUT = do_DELETE = do_LIST = do_HEAD = _answer  # noqa: N815

    def _reply(self, status: int, text: bytes, kind: str, fault: Fault) -> None:
        self.send_response(status)
        for name, value in fault.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if fault.truncate:
            self.wfile.write(text[: len(text) // 2])
            self._reset()
        elif fault.drip:
            for number in range(len(text)):
                self.wfile.write(text[number : number + 1])
                time.sleep(fault.drip)
        else:
            self.wfile.write(text)

    def _reset(self) -> None:
        self.close_connection = True
        # Linger 0: the peer sees a reset, not an orderly end.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def log_message(self, format: str, *arguments: Any) -> None:
        """Quiet."""


@pytest.fixture
def fault_proxy(openbao: EmbeddedOpenBao) -> Iterator[FaultProxy]:
    """In front of the shared server, without a fault."""
    proxy = FaultProxy(openbao.address)
    yield proxy
    proxy.stop()
