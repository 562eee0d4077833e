"""The servers measured: the broker, OpenBao on disk and in memory, cfssl. Real ones, on loopback.

- Each is a process of its own, ended by its pid on the way out, and by the kernel should this
  process be killed.
- All data lies in one directory on disk, so that a commit costs the same for everybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

from identity_api.broker.v1 import types_pb2
from identity_broker.config.settings import Settings
from identity_broker.dev.child_process import ChildProcess
from identity_broker.dev.lifeline import tied_to_parent
from identity_broker.dev.openbao import EmbeddedOpenBao
from identity_broker.dev.state import BrokerAddresses
from identity_broker.dev.tree import to_toml
from identity_broker.server.app import BoundAddresses
from identity_ca.backends.vault.provision import admin_client
from identity_ca.bundle import TrustBundle
from identity_ca.spiffe_id import TrustDomain
from support.line import BROKER_NAME, TRUST_DOMAIN, RunningBroker, key_pem

ENTRIES = 100
_NODE = "bench"
_pause = time.sleep


# --- the broker -----------------------------------------------------------------------------------


@dataclass
class BrokerUnderTest:
    """One broker process on SQLite, with its keys in memory, and a node that may call it.

    Attributes:
        entry_ids, spiffe_ids: what the node may ask for; one is the other's.
    """

    pid: int
    addresses: BoundAddresses
    database: Path
    bundle: TrustBundle
    tls: ssl.SSLContext
    entry_ids: list[str]
    spiffe_ids: list[str]
    start_seconds: float = 0.0


def write_config(
    directory: Path, socket_directory: Path, tables: Mapping[str, dict[str, Any]] | None = None
) -> Path:
    """A configuration: SQLite, memory keys, warnings only, no limit that could be met.

    Args:
        tables: more of it.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    limits = {
        f"{name}_{what}": value
        for name in ("attest", "issue", "read", "write", "watch")
        for what, value in (("per_second", 1_000_000), ("burst", 10_000_000))
    }
    config: dict[str, dict[str, Any]] = {
        "server": {
            "trust_domain": TRUST_DOMAIN,
            "data_dir": str(directory / "data"),
            "address": "127.0.0.1:0",
            "bootstrap_address": "127.0.0.1:0",
            "http_address": "127.0.0.1:0",
            "admin_socket": str(socket_directory / "admin.sock"),
            "drain_timeout": "1s",
        },
        "ca": {"key_manager": "memory", "upstream": "selfsigned"},
        "limits": limits,
        "log": {"level": "warning"},
        **(tables or {}),
    }
    (directory / "data").mkdir(mode=0o700, exist_ok=True)
    path = directory / "broker.toml"
    path.write_text(to_toml(config))
    path.chmod(0o600)
    return path


@contextmanager
def started(
    directory: Path, tables: Mapping[str, dict[str, Any]] | None = None
) -> Iterator[tuple[int, BoundAddresses, Path, float]]:
    """`idb server run` as a process: pid, addresses, configuration, seconds it took to start.

    Data already in `directory` is taken up.

    Args:
        tables: more of its configuration.
    """
    # A socket's path is short; a checkout's need not be.
    socket_directory = Path(tempfile.mkdtemp(prefix="idb-bench-"))
    config = write_config(directory, socket_directory, tables)
    process = ChildProcess("server", "broker", config, directory / "broker.log")
    try:
        began = time.perf_counter()
        bound = BrokerAddresses(**process.start(on_wait=lambda: None))
        seconds = time.perf_counter() - began
        pid = process.pid
        assert pid is not None
        addresses = BoundAddresses(
            bound.address, bound.bootstrap_address, bound.http_address, Path(bound.admin_socket)
        )
        yield pid, addresses, directory / "broker.toml", seconds
    finally:
        process.stop()
        shutil.rmtree(socket_directory, ignore_errors=True)


@contextmanager
def broker(directory: Path) -> Iterator[BrokerUnderTest]:
    """A broker, with a node and its entries."""
    with started(directory) as (pid, addresses, config, seconds):
        settings = Settings.load(config, env={})
        tls, entry_ids, spiffe_ids = asyncio.run(_provision(addresses, settings, directory))
        with urllib.request.urlopen(f"http://{addresses.http_address}/bundle") as answer:
            bundle = TrustBundle.from_spiffe_json(TrustDomain(TRUST_DOMAIN), answer.read())
        yield BrokerUnderTest(
            pid=pid,
            addresses=addresses,
            database=settings.server.data_dir / "broker.db",
            bundle=bundle,
            tls=tls,
            entry_ids=entry_ids,
            spiffe_ids=spiffe_ids,
            start_seconds=seconds,
        )


async def _provision(
    addresses: BoundAddresses, settings: Settings, directory: Path
) -> tuple[ssl.SSLContext, list[str], list[str]]:
    async with AsyncExitStack() as resources:
        running = RunningBroker(addresses, settings, resources)
        node = await running.join(_NODE)
        entries = [
            await running.entry(
                f"/bench/{n}",
                _NODE,
                selectors=[types_pb2.Selector(type="unix", value=f"uid:{1000 + n}")],
            )
            for n in range(ENTRIES)
        ]
        bundle_pem = running.bundle_pem.decode()
    context = ssl.create_default_context(cadata=bundle_pem)
    context.set_alpn_protocols(["h2"])
    # Python's ssl reads a client certificate from files alone.
    chain = b"".join(
        x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM)
        for der in node.svid.cert_chain
    )
    file = directory / "node.pem"
    file.touch(mode=0o600)
    file.write_bytes(key_pem(node.key) + chain)
    context.load_cert_chain(file)
    return context, [entry.id for entry in entries], [entry.spiffe_id for entry in entries]


SERVER_NAME = BROKER_NAME


# --- OpenBao --------------------------------------------------------------------------------------


class InMemoryOpenBao(EmbeddedOpenBao):
    """The same server, keeping nothing: what `bao server -dev` stores in, without its dev mode."""

    def _config(self) -> dict[str, Any]:
        return {**super()._config(), "storage": {"inmem": {}}}


@dataclass(frozen=True)
class OpenBaoUnderTest:
    """A server with a P-256 root and two roles; one stores what it signs, the other does not."""

    pid: int
    address: str
    token: str = field(repr=False)
    ca: x509.Certificate = field(repr=False)
    version: str = ""


@contextmanager
def openbao(directory: Path, *, in_memory: bool) -> Iterator[OpenBaoUnderTest]:
    """An OpenBao with a PKI engine."""
    kind = InMemoryOpenBao if in_memory else EmbeddedOpenBao
    with kind(directory, before_exec=tied_to_parent()) as server:
        client = admin_client(server.address, server.root_token)
        client.sys.enable_secrets_engine("pki", config={"max_lease_ttl": "87600h"})
        root: Any = client.write_data(
            "pki/root/generate/internal",
            data={"common_name": "bench", "key_type": "ec", "key_bits": 256, "ttl": "87600h"},
        )
        for role, unstored in (("stored", False), ("unstored", True)):
            client.write_data(
                f"pki/roles/{role}",
                data={
                    "key_type": "ec",
                    "key_bits": 256,
                    "allow_any_name": True,
                    "allowed_uri_sans": "spiffe://*",
                    "require_cn": False,
                    "use_csr_common_name": False,
                    "use_csr_sans": False,
                    "max_ttl": "24h",
                    "no_store": unstored,
                    "generate_lease": False,
                },
            )
        pid = server.pid
        assert pid is not None
        version = str(client.sys.read_health_status(method="GET")["version"])
        client.adapter.close()
        yield OpenBaoUnderTest(
            pid,
            server.address.removeprefix("http://"),
            server.root_token,
            x509.load_pem_x509_certificate(root["data"]["certificate"].encode()),
            version,
        )


def is_stored(server: OpenBaoUnderTest, serial: int) -> bool:
    """Whether OpenBao can still show that certificate."""
    text = f"{serial:x}"
    text = text.zfill(len(text) + len(text) % 2)
    dashed = "-".join(text[at : at + 2] for at in range(0, len(text), 2))
    client = admin_client(f"http://{server.address}", server.token)
    try:
        return client.read(f"pki/cert/{dashed}") is not None
    finally:
        client.adapter.close()


# --- cfssl ----------------------------------------------------------------------------------------

CFSSL_MISSING = "not installed: apt-get install golang-cfssl"


@dataclass(frozen=True)
class CfsslUnderTest:
    """`cfssl serve` with a P-256 CA; it keeps nothing."""

    pid: int
    address: str
    ca: x509.Certificate = field(repr=False)
    version: str = ""


@contextmanager
def cfssl(directory: Path) -> Iterator[CfsslUnderTest | None]:
    """A cfssl, or None where it is not installed."""
    binary = shutil.which("cfssl")
    if binary is None:
        yield None
        return
    directory.mkdir(mode=0o700, parents=True)
    ca = _own_ca(directory)
    (directory / "config.json").write_text(
        json.dumps(
            {
                "signing": {
                    "default": {
                        "expiry": "1h",
                        "usages": ["digital signature", "server auth", "client auth"],
                    }
                }
            }
        )
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (directory / "cfssl.log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(binary, "serve", "-address", "127.0.0.1", "-port", str(port)),
                *("-ca", "ca.pem", "-ca-key", "ca-key.pem", "-config", "config.json"),
                *("-loglevel", "4"),
            ],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=tied_to_parent(),  # noqa: PLW1509 - does nothing but prctl
        )
    try:
        _wait_for_port(port, process)
        version = subprocess.run(
            [binary, "version"], capture_output=True, text=True, check=False, timeout=10
        ).stdout.split()
        yield CfsslUnderTest(
            process.pid, f"127.0.0.1:{port}", ca, version[1] if len(version) > 1 else "?"
        )
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _own_ca(directory: Path) -> x509.Certificate:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bench")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    (directory / "ca.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    secret = directory / "ca-key.pem"
    secret.touch(mode=0o600)
    secret.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    )
    return certificate


def _wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        if process.poll() is not None:
            break
        _pause(0.05)
    raise RuntimeError("cfssl did not start")
