"""A whole broker in the test's own event loop, and the bare gRPC calls that walk its line."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status

from identity_api.broker.v1 import (
    authority_pb2_grpc,
    bundle_pb2_grpc,
    credential_pb2_grpc,
    entry_pb2_grpc,
    node_attestation_pb2,
    node_attestation_pb2_grpc,
    node_pb2,
    node_pb2_grpc,
    svid_pb2,
    svid_pb2_grpc,
    types_pb2,
)
from identity_broker.config.settings import Settings
from identity_broker.server.app import BoundAddresses, run_broker
from identity_ca.spiffe_id import SpiffeId

if TYPE_CHECKING:
    # A plugin of its own: pytest wants to import it first.
    from support.openbao import VaultSite

# What may be revoked, and how the RPC calls it; of an id it is for its form to say.
SUBJECTS = {
    "id": "",
    "jti": "JTI",
    "spiffe_id": "SPIFFE_ID",
    "node": "NODE",
    "entry": "ENTRY",
    "key": "KEY_FINGERPRINT",
    "authority": "AUTHORITY",
    "select": "SELECT",
}
_SERIAL = re.compile(r"[0-9a-f]{40}")
TRUST_DOMAIN = "example.org"
BROKER_NAME = SpiffeId.parse(f"spiffe://{TRUST_DOMAIN}/idb/broker").dns_san() or ""


def settings_in(directory: Path, **tables: dict[str, Any]) -> Settings:
    """Settings of a broker that keeps everything in `directory` and takes free ports."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.chmod(0o700)
    server: dict[str, Any] = {
        "trust_domain": TRUST_DOMAIN,
        "data_dir": str(directory),
        "address": "127.0.0.1:0",
        "bootstrap_address": "127.0.0.1:0",
        "http_address": "127.0.0.1:0",
        "drain_timeout": "1s",
    }
    merged = {"server": {**server, **tables.pop("server", {})}, **tables}
    return Settings.load(None, merged, env={})


def new_key() -> ec.EllipticCurvePrivateKey:
    """A fresh P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def csr_for(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A CSR without any name, DER."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The key as PKCS #8 PEM."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def reason_of(error: grpc.RpcError) -> str:
    """The stable reason that a refusal carries."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    for detail in status.details if status else ():
        info = ErrorInfo()
        if detail.Unpack(info):
            return str(info.reason)
    return ""


@dataclass
class AttestedClient:
    """A node with its SVID."""

    broker: RunningBroker
    key: ec.EllipticCurvePrivateKey
    svid: types_pb2.X509Svid
    channel: grpc.aio.Channel

    @property
    def svids(self) -> Any:
        return svid_pb2_grpc.SvidStub(self.channel)

    @property
    def entries(self) -> Any:
        return entry_pb2_grpc.EntryStub(self.channel)

    @property
    def attestation(self) -> Any:
        return node_attestation_pb2_grpc.NodeAttestationStub(self.channel)

    @property
    def credentials(self) -> Any:
        return credential_pb2_grpc.CredentialStub(self.channel)

    async def follow(self) -> Any:
        """A call that is told of revocations, and has been told the state they begin with."""
        from identity_api.broker.v1 import revocation_feed_pb2 as feed
        from identity_api.broker.v1 import revocation_feed_pb2_grpc

        call = revocation_feed_pb2_grpc.RevocationFeedStub(self.channel).Follow()
        await call.write(feed.FollowRequest(hello=feed.FollowRequest.Hello()))
        complete = False
        while not complete:
            told: Any = await call.read()
            complete = told.complete
        return call

    async def issue(self, entry_id: str, csr: bytes | None = None) -> Any:
        """Ask for one X.509-SVID; return its result."""
        item = svid_pb2.BatchIssueX509Request.Item(
            entry_id=entry_id, csr=csr_for(new_key()) if csr is None else csr
        )
        response = await self.svids.BatchIssueX509(svid_pb2.BatchIssueX509Request(items=[item]))
        return response.results[0]


@dataclass
class RunningBroker:
    """A broker that is up."""

    addresses: BoundAddresses
    settings: Settings
    resources: AsyncExitStack = field(repr=False)

    @property
    def bundle_pem(self) -> bytes:
        return self.settings.server.bundle_file.read_bytes()

    async def _entered(self, channel: grpc.aio.Channel) -> grpc.aio.Channel:
        return await self.resources.enter_async_context(channel)

    async def admin(self) -> grpc.aio.Channel:
        """A channel to the admin socket."""
        return await self._entered(grpc.aio.insecure_channel(f"unix:{self.addresses.admin_socket}"))

    async def bootstrap(self) -> grpc.aio.Channel:
        """A channel to the bootstrap listener."""
        return await self._entered(
            grpc.aio.secure_channel(
                self.addresses.bootstrap_address,
                grpc.ssl_channel_credentials(self.bundle_pem),
                options=[("grpc.ssl_target_name_override", BROKER_NAME)],
            )
        )

    async def mtls(
        self, key: ec.EllipticCurvePrivateKey, svid: types_pb2.X509Svid
    ) -> grpc.aio.Channel:
        """A channel to the mTLS listener, with an SVID."""
        chain = b"".join(
            x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM)
            for der in svid.cert_chain
        )
        return await self._entered(
            grpc.aio.secure_channel(
                self.addresses.address,
                grpc.ssl_channel_credentials(self.bundle_pem, key_pem(key), chain),
                options=[("grpc.ssl_target_name_override", BROKER_NAME)],
            )
        )

    async def stub(self, kind: Callable[[grpc.aio.Channel], Any]) -> Any:
        """A stub on the admin socket."""
        return kind(await self.admin())

    async def token(self, name: str = "", ttl: int = 0) -> str:
        """A fresh join token."""
        nodes = await self.stub(node_pb2_grpc.NodeStub)
        answer = await nodes.CreateJoinToken(
            node_pb2.CreateJoinTokenRequest(node_name=name, ttl_seconds=ttl)
        )
        return str(answer.token)

    async def attest(
        self, token: str, key: ec.EllipticCurvePrivateKey | None = None
    ) -> AttestedClient:
        """Join with a token."""
        key = key or new_key()
        stub = node_attestation_pb2_grpc.NodeAttestationStub(await self.bootstrap())

        async def begin() -> AsyncIterator[node_attestation_pb2.AttestRequest]:
            yield node_attestation_pb2.AttestRequest(
                begin=node_attestation_pb2.AttestRequest.Begin(
                    attestor="join_token", payload=token.encode(), csr=csr_for(key)
                )
            )

        result = None
        async for response in stub.Attest(begin()):
            result = response.result
        assert result is not None
        return AttestedClient(self, key, result.svid, await self.mtls(key, result.svid))

    async def join(self, name: str) -> AttestedClient:
        """Make a token and join with it."""
        return await self.attest(await self.token(name))

    async def entry(
        self, path: str, node: str, *, expect: str = "", **fields: Any
    ) -> types_pb2.RegistrationEntry:
        """Register `path` below the node named `node`; return the stored entry."""
        entries = await self.stub(entry_pb2_grpc.EntryStub)
        message = types_pb2.RegistrationEntry(
            spiffe_id=f"spiffe://{TRUST_DOMAIN}{path}",
            parent_id=fields.pop("parent_id", node_id(node)),
            selectors=fields.pop("selectors", [types_pb2.Selector(type="unix", value="uid:1000")]),
            **fields,
        )
        response = await entries.BatchCreate(_create(message))
        result = response.results[0]
        assert result.status.reason == expect, result.status
        return types_pb2.RegistrationEntry.FromString(result.entry.SerializeToString())

    async def revocations(self) -> Any:
        """A stub of the Revocation service."""
        from identity_api.broker.v1 import revocation_pb2_grpc

        return await self.stub(revocation_pb2_grpc.RevocationStub)

    async def revoke(self, *, order_id: str = "", **subject: Any) -> Any:
        """Revoke; return the answer.

        Args:
            order_id: the revocation's own id.
            subject: one of `SUBJECTS` and what it is, and other fields of the request.
        """
        from identity_api.broker.v1 import revocation_pb2

        [kind] = subject.keys() & SUBJECTS.keys()
        value = str(subject.pop(kind))
        name = SUBJECTS[kind] or ("SERIAL" if _SERIAL.fullmatch(value) else "JTI")
        kind_value: Any = f"SUBJECT_KIND_{name}"
        revocations = await self.revocations()
        return await revocations.Revoke(
            revocation_pb2.RevokeRequest(
                id=order_id,
                subject=revocation_pb2.RevocationSubject(kind=kind_value, value=value),
                **subject,
            )
        )

    async def lift(self, hold: str) -> Any:
        """Lift a hold; return the answer."""
        from identity_api.broker.v1 import revocation_pb2

        revocations = await self.revocations()
        return await revocations.LiftHold(revocation_pb2.LiftHoldRequest(name=hold))

    async def ledger(self, **wanted: Any) -> list[Any]:
        """What the ledger lists."""
        from identity_api.broker.v1 import credential_pb2

        credentials = await self.stub(credential_pb2_grpc.CredentialStub)
        answer = await credentials.List(credential_pb2.ListCredentialsRequest(**wanted))
        return list(answer.credentials)

    async def authorities(self) -> Any:
        """A stub of the Authority service."""
        return await self.stub(authority_pb2_grpc.AuthorityStub)

    async def bundles(self) -> Any:
        """A stub of the Bundle service, as a stranger."""
        return bundle_pb2_grpc.BundleStub(await self.bootstrap())


def _create(message: types_pb2.RegistrationEntry) -> Any:
    from identity_api.broker.v1 import entry_pb2

    return entry_pb2.BatchCreateEntryRequest(entries=[message])


def node_id(name: str) -> str:
    """The SPIFFE ID of the node that joins under that name."""
    return f"spiffe://{TRUST_DOMAIN}/idb/node/join_token/{name}"


@asynccontextmanager
async def running(settings: Settings, **options: Any) -> AsyncIterator[RunningBroker]:
    """Run a broker for as long as the block lasts; it drains at the end."""
    stop = asyncio.Event()
    addresses: asyncio.Future[BoundAddresses] = asyncio.get_running_loop().create_future()
    broker = asyncio.create_task(
        run_broker(settings, ready=addresses.set_result, stop=stop, **options)
    )
    first: set[asyncio.Future[Any]] = {broker, addresses}
    await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
    if broker.done():
        await broker
    try:
        async with AsyncExitStack() as resources:
            yield RunningBroker(addresses.result(), settings, resources)
    finally:
        stop.set()
        await broker


def openbao_settings(
    directory: Path,
    site: VaultSite,
    address: str,
    *,
    ca: Mapping[str, Any] | None = None,
    **tables: Any,
) -> Settings:
    """Settings of a broker that logs in at `address` with exactly the provisioned AppRole."""
    directory.mkdir(mode=0o700, exist_ok=True)
    role_id = directory / "role-id"
    role_id.write_text(site.provisioned.role_id)
    wrapped = site.admin.auth.approle.generate_secret_id(
        site.layout.role, mount_point=site.layout.approle_mount, wrap_ttl="120s"
    )
    secret_id = directory / "wrapped-secret-id"
    secret_id.write_text(wrapped["wrap_info"]["token"])
    secret_id.chmod(0o600)
    return settings_in(
        directory,
        ca={"key_manager": "transit", "upstream": "vault_pki", "x509_ca_ttl": "24h", **(ca or {})},
        openbao={
            "address": address,
            "timeout": "2s",
            "auth": "approle",
            "role_id_file": str(role_id),
            "wrapped_secret_id_file": str(secret_id),
            "transit_mount": site.layout.transit_mount,
            "x509_key": site.layout.x509_key,
            "jwt_key": site.layout.jwt_key,
            "pki_mount": site.layout.pki_mount,
            "pki_issuer": site.layout.issuer,
        },
        **tables,
    )


@pytest.fixture(
    params=[
        "sqlite-memory",
        pytest.param("postgresql-openbao", marks=[pytest.mark.postgresql, pytest.mark.openbao]),
    ]
)
async def broker(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[RunningBroker]:
    """A broker: on SQLite with keys in memory, and on PostgreSQL with keys in OpenBao."""
    directory = tmp_path / "idb"
    if request.param == "sqlite-memory":
        settings = settings_in(directory, ca={"key_manager": "memory"})
    else:
        site: VaultSite = request.getfixturevalue("vault_site")
        settings = openbao_settings(
            directory,
            site,
            site.address,
            store={"url": request.getfixturevalue("postgres_url")},
        )
    async with running(settings) as running_broker:
        yield running_broker
