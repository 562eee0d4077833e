"""A server that speaks a broker's protocol to one node, and says exactly what a test tells it to.

- It admits every node, with real certificates; what it says on the stream of changes is the test's
  script, message by message, garbage included.
- Nothing here knows the broker: what a hostile or broken one might say has to come from elsewhere.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from spiffe import SpiffeId

from identity_api.broker.v1 import (
    bundle_pb2,
    node_attestation_pb2,
    node_sync_pb2,
    types_pb2,
)
from identity_client._wire.status import refusal_status
from identity_client.attestation import JoinTokenAttestor
from identity_client.clock import utc_now
from identity_client.errors import IdentityError
from identity_client.node import NodeSettings, entry_digest
from identity_client.testing import FakeTrustDomain

_SERVICE = "identity_api.broker.v1"
NODE = SpiffeId("spiffe://example.org/idb/node/join_token/n1")


class Session:
    """One call of the stream, as its script sees it.

    Attributes:
        acks: the revisions the node has acknowledged.
        reports: who follows revocations through it, whenever it said so: name → revision.
    """

    def __init__(self, context: Any, hello: node_sync_pb2.SyncRequest.Hello) -> None:
        self.hello = hello
        self.acks: list[int] = []
        self.reports: list[dict[str, int]] = []
        self._context = context

    async def send(self, message: node_sync_pb2.SyncResponse | bytes) -> None:
        """Say something."""
        octets = message if isinstance(message, bytes) else message.SerializeToString()
        await self._context.write(octets)

    async def refuse(self, error: IdentityError, code: grpc.StatusCode) -> None:
        """End the call as a broker ends what it refuses."""
        await _abort(self._context, error, code)

    async def hang(self) -> None:
        """Say nothing more."""
        await asyncio.Event().wait()


Script = Callable[[Session], Awaitable[None]]


@dataclass
class SyncServer:
    """What a test steers and looks at.

    Attributes:
        scripts: one for each call of the stream; the last one for all that follow.
        sessions: the calls so far.
        renewals, attestations: how many there were.
        refuse_renewal, refuse_attestation: what those are answered with.
    """

    domain: FakeTrustDomain
    scripts: list[Script] = field(default_factory=list)
    sessions: list[Session] = field(default_factory=list)
    attestations: int = 0
    renewals: int = 0
    refuse_renewal: tuple[IdentityError, grpc.StatusCode] | None = None
    refuse_attestation: tuple[IdentityError, grpc.StatusCode] | None = None
    address: str = ""
    bootstrap_address: str = ""

    def settings(self, **changes: Any) -> NodeSettings:
        """Settings of a node of this server."""
        values: dict[str, Any] = {
            "address": self.address,
            "bootstrap_address": self.bootstrap_address,
            "trust_domain": self.domain.trust_domain,
            "attestor": JoinTokenAttestor("idbt_any"),
            "anchors": lambda: self.domain.bundle.roots_pem,
            "rpc_timeout": 5.0,
        }
        return NodeSettings(**(values | changes))

    def bundle(self) -> types_pb2.TrustBundle:
        """The bundle, as a broker would say it."""
        return types_pb2.TrustBundle(
            trust_domain=self.domain.trust_domain.name,
            x509_authorities=[
                one.public_bytes(Encoding.DER) for one in self.domain.bundle.x509_authorities
            ],
            refresh_hint_seconds=300,
            sequence=self.domain.bundle.sequence,
        )

    def full(
        self, revision: int, entries: Iterable[types_pb2.RegistrationEntry] = (), **fields: Any
    ) -> node_sync_pb2.SyncResponse:
        """A full state in one message."""
        entries = list(entries)
        values: dict[str, Any] = {
            "revision": revision,
            "full": True,
            "complete": True,
            "changed": entries,
            "bundle": self.bundle(),
            "lists": node_sync_pb2.SyncResponse.RevocationLists(crls=[b"crl"]),
            "entries_digest": digest_of(entries),
            "sent_at_ms": 1_800_000_000_123,
        }
        return node_sync_pb2.SyncResponse(**(values | fields))

    async def _attest(self, requests: Any, context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            self.attestations += 1
            if self.refuse_attestation is not None:
                await _abort(context, *self.refuse_attestation)
            result = node_attestation_pb2.AttestResponse.Result(
                svid=self._certify(request.begin.csr), bundle=self.bundle(), reattestable=True
            )
            yield node_attestation_pb2.AttestResponse(result=result).SerializeToString()
            return

    async def _renew(self, request: node_attestation_pb2.RenewRequest, context: Any) -> bytes:
        self.renewals += 1
        if self.refuse_renewal is not None:
            await _abort(context, *self.refuse_renewal)
        return node_attestation_pb2.RenewResponse(
            svid=self._certify(request.csr)
        ).SerializeToString()

    async def _bundle(self, _request: bytes, _context: Any) -> bytes:
        return bundle_pb2.GetBundleResponse(bundle=self.bundle()).SerializeToString()

    async def _sync(self, requests: Any, context: Any) -> None:
        first = await anext(requests)
        session = Session(context, first.hello)
        script = self.scripts[min(len(self.sessions), len(self.scripts) - 1)]
        self.sessions.append(session)

        async def listen() -> None:
            async for request in requests:
                if request.WhichOneof("step") == "verifiers":
                    verifiers = request.verifiers.verifiers
                    session.reports.append({each.name: each.revision for each in verifiers})
                else:
                    session.acks.append(request.ack.revision)

        listening = asyncio.create_task(listen())
        try:
            await script(session)
        finally:
            listening.cancel()
            await asyncio.wait({listening})

    def _certify(self, csr: bytes) -> types_pb2.X509Svid:
        """A node SVID for the key of `csr`."""
        now = utc_now()
        names = [x509.UniformResourceIdentifier(str(NODE))]
        usage = dict.fromkeys(
            (
                *("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
                *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
            ),
            False,
        )
        serial = int.from_bytes(b"\x01" + secrets.token_bytes(19))
        authority = self.domain._authority
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(authority.subject)
            .public_key(x509.load_der_x509_csr(csr).public_key())
            .serial_number(serial)
            .not_valid_before(now - timedelta(minutes=1))
            .not_valid_after(now + timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(digital_signature=True, **usage), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage(
                    [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
                ),
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName(names), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(_ec(authority.public_key())),
                critical=False,
            )
        )
        leaf = builder.sign(self.domain._key, hashes.SHA256())
        return types_pb2.X509Svid(
            cert_chain=[leaf.public_bytes(Encoding.DER)],
            spiffe_id=str(NODE),
            serial=f"{serial:040x}",
            not_before=int(leaf.not_valid_before_utc.timestamp()),
            expires_at=int(leaf.not_valid_after_utc.timestamp()),
        )

    def handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        """The services, over octets where the test must be able to send anything."""
        attestation: dict[str, Any] = {
            "Attest": grpc.stream_stream_rpc_method_handler(
                self._attest, node_attestation_pb2.AttestRequest.FromString
            ),
            "Renew": grpc.unary_unary_rpc_method_handler(
                self._renew, node_attestation_pb2.RenewRequest.FromString
            ),
        }
        sync: dict[str, Any] = {
            "Sync": grpc.stream_stream_rpc_method_handler(
                self._sync, node_sync_pb2.SyncRequest.FromString
            )
        }
        bundle: dict[str, Any] = {"Get": grpc.unary_unary_rpc_method_handler(self._bundle)}
        return (
            grpc.method_handlers_generic_handler(f"{_SERVICE}.NodeAttestation", attestation),
            grpc.method_handlers_generic_handler(f"{_SERVICE}.NodeSync", sync),
            grpc.method_handlers_generic_handler(f"{_SERVICE}.Bundle", bundle),
        )


@asynccontextmanager
async def sync_server(*scripts: Script) -> AsyncIterator[SyncServer]:
    """A server with these scripts."""
    site = SyncServer(FakeTrustDomain("example.org"), list(scripts))
    own = site.domain.issue(SpiffeId("spiffe://example.org/idb/broker"), timedelta(hours=1))
    pair = [(own.key_pem, own.chain_pem)]
    unlimited = [("grpc.max_send_message_length", -1)]
    server, bootstrap = (grpc.aio.server(options=unlimited) for _ in range(2))
    for each in (server, bootstrap):
        each.add_generic_rpc_handlers(site.handlers())
    mtls = grpc.ssl_server_credentials(pair, site.domain.bundle.roots_pem, require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", mtls)
    open_port = bootstrap.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(pair))
    site.address = f"127.0.0.1:{port}"
    site.bootstrap_address = f"127.0.0.1:{open_port}"
    await server.start()
    await bootstrap.start()
    try:
        yield site
    finally:
        await server.stop(0)
        await bootstrap.stop(0)


def says(*messages: node_sync_pb2.SyncResponse | bytes) -> Script:
    """Says these, and then nothing more."""

    async def script(session: Session) -> None:
        for message in messages:
            await session.send(message)
        await session.hang()

    return script


def entry(entry_id: str, revision: int = 1, **fields: Any) -> types_pb2.RegistrationEntry:
    """An entry as a broker would say it."""
    values: dict[str, Any] = {
        "id": entry_id,
        "spiffe_id": f"spiffe://example.org/{entry_id}",
        "parent_id": str(NODE),
        "selectors": [types_pb2.Selector(type="unix", value="uid:1000")],
        "revision": revision,
        "created_at": 1_700_000_000,
    }
    return types_pb2.RegistrationEntry(**(values | fields))


def digest_of(entries: Iterable[types_pb2.RegistrationEntry]) -> int:
    """What a broker would name as the digest of these entries."""
    digest = 0
    for one in entries:
        digest ^= entry_digest(one.id, one.revision)
    return digest


def delta(previous: int, revision: int, **fields: Any) -> node_sync_pb2.SyncResponse:
    """A change in one message; an empty one is a heartbeat."""
    values: dict[str, Any] = {
        "previous": previous,
        "revision": revision,
        "complete": True,
        "sent_at_ms": 1_800_000_000_123,
    }
    return node_sync_pb2.SyncResponse(**(values | fields))


async def _abort(context: Any, error: IdentityError, code: grpc.StatusCode) -> None:
    status: Any = refusal_status(error)
    await context.abort(code, error.message, status.trailing_metadata)


def _ec(key: Any) -> ec.EllipticCurvePublicKey:
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key
