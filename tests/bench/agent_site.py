"""What the agent's benchmarks run on: a broker, node agents, and machines that have certificates.

- Broker and agents are processes of their own, the real ones; so is everything that stands in for
  other machines.
- Nodes join with certificates of one CA (x509_pop): an agent can be started again without a token,
  and all nodes can be members of one group.
- Whatever is measured is asked for over the admin socket, as `idb entry create` does.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, load_der_private_key

from bench.servers import started, write_config
from identity_api.agent.v1 import agent_pb2, agent_pb2_grpc
from identity_api.broker.v1 import (
    entry_pb2,
    entry_pb2_grpc,
    node_sync_pb2,
    node_sync_pb2_grpc,
    revocation_pb2,
    revocation_pb2_grpc,
    types_pb2,
)
from identity_broker.config.settings import Settings
from identity_broker.dev.child_process import ChildProcess
from identity_broker.dev.tree import to_toml
from identity_broker.domain import names
from identity_broker.server.app import BoundAddresses
from identity_ca.bundle import TrustBundle
from identity_ca.chain import verify_x509_svid
from identity_ca.spiffe_id import TrustDomain
from identity_client._wire.workload import (
    SECURITY_METADATA,
    WorkloadApiStub,
    X509SVIDRequest,
)
from support.line import TRUST_DOMAIN
from support.machines import MachineCa, client_half

DOMAIN = TrustDomain(TRUST_DOMAIN)
BROKER_ID = str(names.broker_id(DOMAIN))
EVERYONE = f"spiffe://{TRUST_DOMAIN}/bench/everyone"
RETRY_SECONDS = 0.01
"""How long a waiting workload pauses before it asks again."""
_UNIX_CHANNEL = (("grpc.use_local_subchannel_pool", 1),)
_SECONDS = 60.0


def local_channel(address: str) -> grpc.aio.Channel:
    """A channel to "unix:///path", with a connection of its own."""
    path = address.removeprefix("unix://")
    return grpc.aio.insecure_channel(f"unix:{path}", options=_UNIX_CHANNEL)


# --- machines -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """One that can become a node."""

    directory: Path
    node_id: str

    @classmethod
    def made(cls, directory: Path, ca: MachineCa) -> Machine:
        """A fresh key and certificate."""
        key, certificate = ca.machine(name=directory.name)
        client_half(directory, key, certificate)
        fingerprint = certificate.fingerprint(hashes.SHA256()).hex()
        return cls(directory, str(names.node_id(DOMAIN, "x509_pop", fingerprint)))


# --- the broker -----------------------------------------------------------------------------------


@dataclass
class Site:
    """A broker process that lets machines in."""

    pid: int
    addresses: BoundAddresses
    settings: Settings
    directory: Path
    machines: MachineCa

    @property
    def bundle_file(self) -> Path:
        """The root certificates, PEM."""
        return self.settings.server.bundle_file

    @property
    def database(self) -> Path:
        """The broker's."""
        return self.settings.server.data_dir / "broker.db"

    def machine(self, name: str) -> Machine:
        """One more machine."""
        return Machine.made(self.directory / name, self.machines)


@contextmanager
def site(
    directory: Path, fill: Callable[[str, MachineCa], Any] = lambda _url, _ca: None
) -> Iterator[Site]:
    """A broker.

    Args:
        fill: called with the database's URL and the machines' CA before the broker starts.
    """
    directory.mkdir(mode=0o700, parents=True)
    machines = MachineCa()
    roots = directory / "machines.pem"
    roots.write_bytes(machines.certificate.public_bytes(Encoding.PEM))
    tables = {"attestors.x509_pop": {"ca_bundle_file": str(roots)}}
    home = directory / "broker"
    # A socket's path is short; a checkout's need not be. `started` writes its own again.
    config = write_config(home, Path(tempfile.gettempdir()), tables)
    fill(Settings.load(config, env={}).database_url, machines)
    with started(home, tables) as (pid, addresses, config, _):
        yield Site(pid, addresses, Settings.load(config, env={}), directory, machines)


class Admin:
    """Somebody who changes things, over one connection to the admin socket."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._entries: Any = entry_pb2_grpc.EntryStub(channel)
        self._sync: Any = node_sync_pb2_grpc.NodeSyncStub(channel)
        self._revocations: Any = revocation_pb2_grpc.RevocationStub(channel)

    @classmethod
    @asynccontextmanager
    async def of(cls, place: Site) -> AsyncIterator[Admin]:
        """Connected."""
        async with local_channel(str(place.addresses.admin_socket)) as channel:
            yield cls(channel)

    async def create(
        self, path: str, parent_id: str, selector: str, **fields: Any
    ) -> types_pb2.RegistrationEntry:
        """Register `path`."""
        kind, _, value = selector.partition(":")
        message = types_pb2.RegistrationEntry(
            spiffe_id=spiffe_id(path),
            parent_id=parent_id,
            selectors=[types_pb2.Selector(type=kind, value=value)],
            **fields,
        )
        answer = await self._entries.BatchCreate(
            entry_pb2.BatchCreateEntryRequest(entries=[message])
        )
        _require(answer.results[0].status)
        return answer.results[0].entry  # type: ignore[no-any-return]

    async def delete(self, entry_id: str) -> None:
        """Remove an entry."""
        answer = await self._entries.BatchDelete(entry_pb2.BatchDeleteEntryRequest(ids=[entry_id]))
        _require(answer.results[0].status)

    async def set_ttl(self, entry_id: str, seconds: int) -> None:
        """Change an entry, so that its SVID is issued anew."""
        entry = types_pb2.RegistrationEntry(id=entry_id, x509_ttl_seconds=seconds)
        answer = await self._entries.BatchUpdate(
            entry_pb2.BatchUpdateEntryRequest(
                items=[
                    entry_pb2.BatchUpdateEntryRequest.Item(entry=entry, fields=["x509_ttl_seconds"])
                ]
            )
        )
        _require(answer.results[0].status)

    async def revoke(self, serial: str) -> None:
        """Revoke one X.509-SVID."""
        kind = revocation_pb2.SUBJECT_KIND_SERIAL
        subject = revocation_pb2.RevocationSubject(kind=kind, value=serial)
        await self._revocations.Revoke(revocation_pb2.RevokeRequest(subject=subject))

    async def revoke_identity(self, name: str) -> revocation_pb2.RevokeResponse:
        """Revoke everything an identity holds."""
        kind = revocation_pb2.SUBJECT_KIND_SPIFFE_ID
        subject = revocation_pb2.RevocationSubject(kind=kind, value=name)
        answer = await self._revocations.Revoke(revocation_pb2.RevokeRequest(subject=subject))
        return answer  # type: ignore[no-any-return]

    async def applied(self, *node_ids: str) -> int:
        """Wait until every connected node has applied what was changed; how many are connected."""
        answer = await self._sync.Await(
            node_sync_pb2.AwaitNodesRequest(node_ids=node_ids, timeout_ms=30_000)
        )
        assert not answer.pending, list(answer.pending)[:3]
        return int(answer.connected)


def spiffe_id(path: str) -> str:
    """Of a path."""
    return f"spiffe://{TRUST_DOMAIN}{path}"


def group_of_all(machines: MachineCa) -> str:
    """The selector that every machine's node has."""
    return f"x509_pop:ca:fingerprint:{machines.certificate.fingerprint(hashes.SHA256()).hex()}"


def _require(status: Any) -> None:
    assert status.code == 0, status


# --- agents ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AgentFiles:
    """What an agent is started from, as often as one likes; it keeps its node's key."""

    config: Path
    log: Path
    node_id: str
    workload_api: str
    admin_socket: str


@contextmanager
def agent_files(
    place: Site, name: str, *, machine: Machine | None = None, **workloads: Any
) -> Iterator[AgentFiles]:
    """An agent's configuration, without limits that could be met.

    Args:
        machine: which one it runs on; None: one more.
        workloads: settings of that table.
    """
    machine = machine or place.machine(name)
    home = machine.directory
    # A socket's path is short; a checkout's need not be.
    runtime = Path(tempfile.mkdtemp(prefix="idb-bench-"))
    runtime.chmod(0o755)
    config = home / "agent.toml"
    (home / "data").mkdir(mode=0o700)
    config.write_text(
        to_toml(
            {
                "agent": {
                    "trust_domain": TRUST_DOMAIN,
                    "runtime_dir": str(runtime),
                    "data_dir": str(home / "data"),
                    "drain_timeout": "1s",
                },
                "broker": {
                    "address": place.addresses.address,
                    "bootstrap_address": place.addresses.bootstrap_address,
                },
                "trust": {"bundle_file": str(place.bundle_file)},
                "node": {
                    "cert_file": str(home / "machine.pem"),
                    "key_file": str(home / "machine.key"),
                },
                "workloads": {"calls_per_second": 1_000_000, "calls_at_once": 1_000_000}
                | workloads,
                "log": {"level": "warning"},
            }
        )
    )
    try:
        yield AgentFiles(
            config,
            home / "agent.log",
            machine.node_id,
            f"unix://{runtime}/workload.sock",
            f"unix://{runtime}/agent.sock",
        )
    finally:
        shutil.rmtree(runtime, ignore_errors=True)


@contextmanager
def running(files: AgentFiles) -> Iterator[int]:
    """`idb agent run` as a process: its pid, once its sockets are bound."""
    process = ChildProcess("agent", "agent", files.config, files.log)
    try:
        process.start(on_wait=lambda: None)
        pid = process.pid
        assert pid is not None, files.log.read_text()[-2000:]
        yield pid
    finally:
        process.stop()


async def status(files: AgentFiles) -> agent_pb2.StatusResponse:
    """What the agent says of itself."""
    async with local_channel(files.admin_socket) as channel:
        stub: Any = agent_pb2_grpc.AgentStub(channel)
        answer: agent_pb2.StatusResponse = await stub.Status(agent_pb2.StatusRequest())
        return answer


async def until_connected(files: AgentFiles) -> None:
    """Wait until the agent follows its broker."""
    async with asyncio.timeout(_SECONDS):
        while not (await status(files)).connected:
            await asyncio.sleep(0.05)


# --- a workload -----------------------------------------------------------------------------------


class Workload:
    """This process as a workload: its FetchX509SVID stream, and when what came.

    A stream that ends is opened again after `RETRY_SECONDS`; until then nothing is held.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._news = asyncio.Event()
        self.held: Mapping[str, Any] = {}
        self.at = 0.0
        self.tries = 0

    @classmethod
    @asynccontextmanager
    async def of(cls, files: AgentFiles) -> AsyncIterator[Workload]:
        """Asking."""
        workload = cls(files.workload_api)
        task = asyncio.create_task(workload._run())
        try:
            yield workload
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def until(self, holds: Callable[[Mapping[str, Any]], bool]) -> float:
        """Wait for SVIDs (by SPIFFE ID) of which that is so; when the message came."""
        async with asyncio.timeout(_SECONDS):
            while not holds(self.held):
                self._news.clear()
                await self._news.wait()
        return self.at

    async def _run(self) -> None:
        async with local_channel(self._address) as channel:
            stub = WorkloadApiStub(channel)
            while True:
                self.tries += 1
                call: Any = stub.FetchX509SVID(X509SVIDRequest(), metadata=SECURITY_METADATA)
                try:
                    while (answer := await call.read()) is not grpc.aio.EOF:
                        self._hold({each.spiffe_id: each for each in answer.svids})
                except grpc.aio.AioRpcError as error:
                    if error.code() not in {
                        grpc.StatusCode.PERMISSION_DENIED,
                        grpc.StatusCode.UNAVAILABLE,
                    }:
                        raise
                self._hold({})
                await asyncio.sleep(RETRY_SECONDS)

    def _hold(self, svids: Mapping[str, Any]) -> None:
        self.at = time.perf_counter()
        self.held = svids
        self._news.set()


def serial_of(svid: Any) -> str:
    """Of an answer's SVID, 40 hexadecimal digits, as the ledger has it."""
    return f"{_certificates(svid.x509_svid)[0].serial_number:040x}"


def verify(svid: Any, expected: str) -> None:
    """Make sure that what was handed out is an SVID of that name, and its key the certificate's.

    Raises:
        AssertionError, CAError: it is not.
    """
    chain = _certificates(svid.x509_svid)
    roots = tuple(
        certificate.public_bytes(Encoding.DER) for certificate in _certificates(svid.bundle)
    )
    proven = verify_x509_svid(
        tuple(certificate.public_bytes(Encoding.DER) for certificate in chain),
        bundle=TrustBundle(DOMAIN, x509_authorities=roots),
        now=datetime.now(UTC),
    )
    assert str(proven.spiffe_id) == expected
    key: Any = load_der_private_key(svid.x509_svid_key, None)
    assert key.public_key() == chain[0].public_key()


def _certificates(joined: bytes) -> Sequence[x509.Certificate]:
    found = []
    while joined:
        # DER: a sequence of more than 255 and fewer than 64 Ki octets.
        size = 4 + int.from_bytes(joined[2:4], "big")
        found.append(x509.load_der_x509_certificate(joined[:size]))
        joined = joined[size:]
    return found
