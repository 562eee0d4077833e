"""A thousand other nodes: each attested, over mTLS of its own, following the broker and acking.

    python tests/bench/agent_fleet.py ORDERS.json        # ends when stdin does

- On the wire they are agents; inside, one thread with one epoll and bytes framed by hand. Elsewhere
  they would have their own processors; here they take from the broker what they use, so it is
  little.
- Says on stdout, as one line of JSON, when all are up to date.
"""

from __future__ import annotations

import asyncio
import json
import resource
import select
import ssl
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from bench.generator import (
    _DATA,
    _END_HEADERS,
    _HEADERS,
    Done,
    GeneratorError,
    Http2Wire,
    _frame,
)
from bench.servers import SERVER_NAME
from identity_api.broker.v1 import node_attestation_pb2, node_attestation_pb2_grpc
from identity_api.broker.v1 import node_sync_pb2 as pb
from identity_client.keys import spki_der
from support.line import TRUST_DOMAIN, csr_for, key_pem, new_key
from support.machines import MachineCa, client_half

if TYPE_CHECKING:
    from bench.agent_site import Site

_SYNC = "/identity_api.broker.v1.NodeSync/Sync"
_JOIN_AT_ONCE = 16
_START_SECONDS = 120.0
_MAX_PATIENCE = 60.0


# --- one node -------------------------------------------------------------------------------------


class SyncWire(Http2Wire):
    """One node's connection: says hello, and acknowledges every message that is complete."""

    def __init__(self, address: str, tls: ssl.SSLContext) -> None:
        super().__init__(address, tls, SERVER_NAME, _SYNC, [])
        self.applied = 0
        self._open[1] = (0, 0.0)
        self._out += _frame(_HEADERS, _END_HEADERS, 1, self._first_headers)
        self._say(pb.SyncRequest(hello=pb.SyncRequest.Hello(version="bench")))

    def _say(self, request: pb.SyncRequest) -> None:
        raw = request.SerializeToString()
        message = struct.pack(">BI", 0, len(raw)) + raw
        self._window -= len(message)
        if self._window < 0:
            raise GeneratorError("the broker takes no more acknowledgements")
        self._out += _frame(_DATA, 0, 1, message)

    def _parse(self, data: bytes) -> list[Done]:
        if super()._parse(data):
            raise GeneratorError("the broker ended a node's stream")
        held = self._bodies.pop(1, b"")
        while len(held) >= 5:
            end = 5 + int.from_bytes(held[1:5], "big")
            if len(held) < end:
                break
            message = pb.SyncResponse.FromString(held[5:end])
            held = held[end:]
            if message.complete:
                self.applied += 1
                self._say(pb.SyncRequest(ack=pb.SyncRequest.Ack(revision=message.revision)))
        self._bodies[1] = held
        return []


# --- all of them ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Orders:
    """What the fleet is told."""

    nodes: int
    address: str
    bootstrap_address: str
    bundle_file: str
    ca_key_file: str
    ca_file: str


async def join_all(orders: Orders, directory: Path) -> list[ssl.SSLContext]:
    """Attest every node; the TLS of each."""
    machines = MachineCa()
    machines.key = _private_key(Path(orders.ca_key_file))
    machines.certificate = x509.load_pem_x509_certificate(Path(orders.ca_file).read_bytes())
    bundle = Path(orders.bundle_file).read_bytes()
    gate = asyncio.Semaphore(_JOIN_AT_ONCE)
    async with grpc.aio.secure_channel(
        orders.bootstrap_address,
        grpc.ssl_channel_credentials(bundle),
        options=[("grpc.ssl_target_name_override", SERVER_NAME)],
    ) as channel:
        stub: Any = node_attestation_pb2_grpc.NodeAttestationStub(channel)

        async def one(number: int) -> ssl.SSLContext:
            async with gate:
                return await _join(stub, machines, directory / f"n{number}", bundle)

        return await asyncio.gather(*(one(number) for number in range(orders.nodes)))


def _private_key(path: Path) -> Any:
    return load_pem_private_key(path.read_bytes(), None)


async def _join(stub: Any, machines: MachineCa, home: Path, bundle: bytes) -> ssl.SSLContext:
    key = new_key()
    own = client_half(home, *machines.machine(name=home.name))
    challenges: asyncio.Queue[bytes] = asyncio.Queue()

    async def said() -> AsyncIterator[Any]:
        yield node_attestation_pb2.AttestRequest(
            begin=node_attestation_pb2.AttestRequest.Begin(
                attestor="x509_pop", payload=own.payload(), csr=csr_for(key)
            )
        )
        challenge = await challenges.get()
        yield node_attestation_pb2.AttestRequest(
            challenge_response=own.respond(
                challenge, public_key_der=spki_der(key.public_key()), trust_domain=TRUST_DOMAIN
            )
        )

    svid: Any = None
    async for response in stub.Attest(said()):
        if response.WhichOneof("step") == "challenge":
            challenges.put_nowait(response.challenge)
        else:
            svid = response.result.svid
    assert svid is not None
    context = ssl.create_default_context(cadata=bundle.decode())
    context.set_alpn_protocols(["h2"])
    file = home / "node.pem"  # Python's ssl reads a client certificate from files alone.
    file.touch(mode=0o600)
    file.write_bytes(
        key_pem(key)
        + b"".join(
            x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM)
            for der in svid.cert_chain
        )
    )
    context.load_cert_chain(file)
    return context


def _follow(orders: Orders, contexts: Sequence[ssl.SSLContext], began: float) -> None:
    """Follow until stdin ends."""
    poll = select.epoll()
    poll.register(sys.stdin.fileno(), select.EPOLLIN | select.EPOLLHUP)
    wires: dict[int, SyncWire] = {}
    waiting: set[int] = set()
    for context in contexts:
        wire = SyncWire(orders.address, context)
        wires[wire.socket.fileno()] = wire
        waiting.add(wire.socket.fileno())
        poll.register(wire.socket.fileno(), select.EPOLLIN)
        assert wire.flush()
    until = time.monotonic() + _MAX_PATIENCE
    while True:
        for number, _ in poll.poll(1.0):
            if number == sys.stdin.fileno():
                return
            wire = wires[number]
            wire.receive()
            if not wire.flush():
                raise GeneratorError("the broker does not read")
            if wire.applied and number in waiting:
                waiting.discard(number)
                if not waiting:
                    seconds = time.perf_counter() - began
                    print(json.dumps({"connected": len(wires), "seconds": seconds}), flush=True)
        if waiting and time.monotonic() > until:
            raise GeneratorError(f"{len(waiting)} nodes were told nothing")


def main() -> int:
    """Be the fleet."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    orders = Orders(**json.loads(Path(sys.argv[1]).read_text()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4 * orders.nodes + 256)), hard))
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="idb-bench-") as directory:
        contexts = asyncio.run(join_all(orders, Path(directory)))
    _follow(orders, contexts, began)
    return 0


# --- from outside ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fleet:
    """Nodes that are up to date."""

    pid: int
    connected: int
    start_seconds: float


def written_orders(place: Site, nodes: int, name: str) -> Path:
    """The file that tells so many nodes where to join."""
    ca_key, ca, file = (place.directory / f"{name}.{end}" for end in ("key", "pem", "json"))
    ca_key.touch(mode=0o600)
    ca_key.write_bytes(key_pem(place.machines.key))
    ca.write_bytes(place.machines.certificate.public_bytes(Encoding.PEM))
    orders = Orders(
        nodes,
        place.addresses.address,
        place.addresses.bootstrap_address,
        *map(str, (place.bundle_file, ca_key, ca)),
    )
    file.write_text(json.dumps(vars(orders)))
    return file


@contextmanager
def fleet(place: Site, nodes: int) -> Iterator[Fleet]:
    """So many nodes beside the one that is looked at, in one process."""
    file = written_orders(place, nodes, "fleet")
    process = subprocess.Popen(
        [sys.executable, __file__, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if not select.select([process.stdout], [], [], _START_SECONDS)[0]:
            raise GeneratorError(f"{nodes} nodes did not connect in time")
        line = process.stdout.readline()
        if not line:
            raise GeneratorError("the fleet ended")
        yield Fleet(process.pid, **_renamed(json.loads(line)))
        if process.poll() is not None:
            raise GeneratorError("the fleet ended meanwhile")
    finally:
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _renamed(said: dict[str, Any]) -> dict[str, Any]:
    return {"connected": said["connected"], "start_seconds": said["seconds"]}


if __name__ == "__main__":
    sys.exit(main())
