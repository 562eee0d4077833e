"""Real Envoys that take their identity from our secret discovery, as `idb envoy config` tells them.

What one process may have is steered by the test; the whole line is walked in test_envoy_mesh.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from structlog.testing import capture_logs

from identity_broker.agent.identity import Caller
from identity_broker.cli.envoy_bootstrap import Address, Bootstrap, Inbound, Outbound, Protocol
from identity_broker.cli.yaml_text import to_yaml
from identity_ca.issuer import X509Issuer
from identity_ca.keys import KeyAlgorithm, LocalSigningKey, generate_private_key
from identity_ca.spiffe_id import TrustDomain
from support.envoy import RunningEnvoy, presented_serial, running_envoy
from support.proxied import Application, application, get, load_on
from support.sds import ServedSecrets, secrets_served
from support.workload_identities import FakeIdentities

pytestmark = [pytest.mark.timeout(180)]
ANY = Address("127.0.0.1", 0)
DAY = timedelta(days=1)
ORDERS = "spiffe://example.org/shop/orders"
STOCK = "spiffe://example.org/shop/stock"
INTRUDER = "spiffe://example.org/shop/intruder"


def envoy_named(name: str) -> Callable[[Caller], bool]:
    """The Envoy whose configuration file is called so."""
    return lambda caller: f"/{name}.yaml\0".encode() in caller.process.read("cmdline")


@dataclass
class Mesh:
    """Envoys on one agent socket.

    Attributes:
        change: done to every bootstrap before it is used.
    """

    binary: Path
    folder: Path
    secrets: ServedSecrets
    app: Application
    resources: AsyncExitStack
    change: Callable[[dict[str, Any]], None] = lambda _document: None
    envoys: dict[str, RunningEnvoy] = field(default_factory=dict)

    @property
    def identities(self) -> FakeIdentities:
        return self.secrets.identities

    async def start(self, name: str, **what: Any) -> RunningEnvoy:
        bootstrap = Bootstrap(name=name, socket=what.pop("socket", self.secrets.socket), **what)
        document = bootstrap.document()
        self.change(document)
        self.envoys[name] = await self.resources.enter_async_context(
            running_envoy(self.binary, self.folder, to_yaml(document), name=name)
        )
        return self.envoys[name]

    async def stock(self, *accept: str, **what: Any) -> str:
        """The Envoy before the application; where it listens."""
        inbound = Inbound(ANY, Address.parse(self.app.address), accept or (ORDERS,))
        return await bound(await self.start("stock", inbound=inbound, **what), "inbound")

    async def orders(self, peer: str, *expect: str, name: str = "orders", **what: Any) -> str:
        """The Envoy beside a caller; where it listens."""
        outbound = Outbound(ANY, Address.parse(peer), expect or (STOCK,))
        return await bound(await self.start(name, outbound=outbound, **what), "outbound")


async def bound(envoy: RunningEnvoy, listener: str) -> str:
    """Where the listener is, once it listens."""
    await envoy.until(lambda: envoy.state == "LIVE")
    return envoy.address(listener)


@asynccontextmanager
async def mesh_over(binary: Path, folder: Path, secrets: ServedSecrets) -> AsyncIterator[Mesh]:
    async with application() as app, AsyncExitStack() as resources:
        yield Mesh(binary, folder, secrets, app, resources)


@pytest.fixture
async def mesh(envoy: Path, tmp_path: Path, secrets: ServedSecrets) -> AsyncIterator[Mesh]:
    """Nothing runs yet; orders and stock have their identities."""
    secrets.identities.grant("/shop/orders", who=envoy_named("orders"))
    secrets.identities.grant("/shop/stock", who=envoy_named("stock"))
    async with mesh_over(envoy, tmp_path, secrets) as made:
        yield made


def sotw(document: dict[str, Any]) -> None:
    """The state-of-the-world variant."""
    text = json.dumps(document).replace("DELTA_GRPC", "GRPC")
    document.update(json.loads(text))


def short_connections(document: dict[str, Any]) -> None:
    """A handshake with the peer every few requests."""
    for cluster in document["static_resources"]["clusters"]:
        if cluster["name"] == "peer":
            (options,) = cluster["typed_extension_protocol_options"].values()
            options["common_http_protocol_options"] = {"max_requests_per_connection": 3}


@pytest.mark.parametrize("variant", ["incremental", "state of the world"])
async def test_two_envoys_speak_and_the_application_learns_who_called(
    mesh: Mesh, variant: str
) -> None:
    if variant != "incremental":
        mesh.change = sotw
    outbound = await mesh.orders(await mesh.stock())
    assert await get(outbound) == (200, ORDERS)


async def test_a_rotation_under_load_fails_no_request(mesh: Mesh) -> None:
    mesh.change = short_connections
    stock = mesh.identities.grants[1]
    inbound = await mesh.stock()
    outbound = await mesh.orders(inbound)
    await get(outbound)
    async with load_on(outbound) as load:
        for _ in range(10):
            mesh.identities.rotate()
            await load.until(30)
            assert await asyncio.to_thread(presented_serial, inbound) == stock.identity.serial
    assert load.failures == []
    assert load.answers.keys() == {(200, ORDERS)}


def knows(envoy: RunningEnvoy, roots: set[str]) -> bool:
    return roots <= envoy.authorities()


def presents(envoy: RunningEnvoy, serial: str) -> bool:
    return envoy.certificates() == {serial}


async def test_new_authorities_under_load_fail_no_request(mesh: Mesh) -> None:
    """As the broker does it: known to everybody, then signed with, then the old one goes."""
    mesh.change = short_connections
    identities = mesh.identities
    inbound = await mesh.stock()
    outbound = await mesh.orders(inbound)
    await get(outbound)
    async with load_on(outbound) as load:
        for _ in range(3):
            await load.until(30)
            identities.prepare_authority()
            roots = {
                f"{x509.load_der_x509_certificate(der).serial_number:040x}"
                for der in identities.bundle.x509_authorities
            }
            for envoy in mesh.envoys.values():
                await envoy.until(partial(knows, envoy, roots))
            identities.activate_authority()
            await load.until(30)
            for name, grant in zip(("orders", "stock"), identities.grants, strict=True):
                envoy = mesh.envoys[name]
                await envoy.until(partial(presents, envoy, grant.identity.serial))
            await load.until(20)
            identities.retire_authorities()
            await load.until(30)
    assert load.failures == []
    assert load.answers.keys() == {(200, ORDERS)}


async def test_a_rotation_arrives_at_once(mesh: Mesh) -> None:
    stock = mesh.identities.grants[1]
    inbound = Inbound(ANY, Address.parse(mesh.app.address), (ORDERS,))
    envoy = await mesh.start("stock", inbound=inbound)
    await bound(envoy, "inbound")

    async def rotate() -> str:
        mesh.identities.rotate(stock)
        return stock.identity.serial

    seconds = sorted(await envoy.rotation_seconds("inbound", rotate, times=15))
    print(f"Envoy rotation: median {seconds[7] * 1000:.1f} ms, worst {seconds[-1] * 1000:.1f} ms")
    assert seconds[7] < 0.5


async def test_a_caller_with_another_identity_is_refused(mesh: Mesh) -> None:
    mesh.identities.grant("/shop/intruder", who=envoy_named("intruder"))
    inbound = await mesh.stock()
    intruder = await mesh.orders(inbound, name="intruder")
    status, _ = await get(intruder)
    assert status == 503
    refused = "listener.127.0.0.1_0.ssl.fail_verify_san"
    assert mesh.envoys["stock"].stat(refused) > 0
    assert mesh.app.seen == {}
    # It is the identity: the same Envoy gets through where it is named.
    mesh.identities.grants[-1].who = envoy_named("nobody")
    mesh.identities.grant("/shop/orders", who=envoy_named("intruder"))
    async with asyncio.timeout(10):
        while (await get(intruder)) != (200, ORDERS):
            await asyncio.sleep(0.05)


async def test_a_peer_with_another_identity_is_not_spoken_to(mesh: Mesh) -> None:
    outbound = await mesh.orders(await mesh.stock(), INTRUDER)
    status, _ = await get(outbound)
    assert status == 503
    assert mesh.envoys["orders"].stat("cluster.peer.ssl.fail_verify_san") > 0
    assert mesh.app.seen == {}


async def test_one_without_a_certificate_is_refused(mesh: Mesh) -> None:
    inbound = await mesh.stock()
    with pytest.raises(OSError):
        await get(inbound)
    assert mesh.app.seen == {}


async def test_an_envoy_waits_for_its_identity(mesh: Mesh) -> None:
    identities = mesh.identities
    stock = identities.grants.pop()
    inbound = Inbound(ANY, Address.parse(mesh.app.address), (ORDERS,))
    envoy = await mesh.start("stock", inbound=inbound)
    await envoy.until(lambda: envoy.stat("sds.default.update_failure") > 2)
    await envoy.until(lambda: envoy.state == "LIVE")
    with pytest.raises(OSError):
        presented_serial(envoy.address("inbound"))
    identities.grants.append(stock)
    identities.announce()
    inbound_address = envoy.address("inbound")
    # It asks again after two seconds at the latest.
    await envoy.until(lambda: stock.identity.serial in envoy.certificates(), seconds=5)
    assert await get(await mesh.orders(inbound_address)) == (200, ORDERS)


async def test_envoy_keeps_what_it_has_while_the_agent_is_away(
    envoy: Path, tmp_path: Path, open_directory: Path
) -> None:
    identities = FakeIdentities()
    identities.grant("/shop/orders", who=envoy_named("orders"))
    stock = identities.grant("/shop/stock", who=envoy_named("stock"))
    async with AsyncExitStack() as first:
        secrets = await first.enter_async_context(secrets_served(open_directory, identities))
        mesh = await first.enter_async_context(mesh_over(envoy, tmp_path, secrets))
        mesh.change = short_connections
        inbound = await mesh.stock()
        outbound = await mesh.orders(inbound)
        async with load_on(outbound) as load:
            await load.until(20)
            secrets.service.end_streams()
            await secrets.api.listener.stop(timedelta(0))
            await load.until(50)
            identities.rotate()
            async with secrets_served(open_directory, identities):
                async with asyncio.timeout(15):
                    while await asyncio.to_thread(presented_serial, inbound) != (
                        stock.identity.serial
                    ):
                        await asyncio.sleep(0.05)
                await load.until(20)
        assert load.failures == []
        assert load.answers.keys() == {(200, ORDERS)}


async def test_a_revoked_peer_is_refused_where_that_is_asked_for(mesh: Mesh) -> None:
    """Its Envoy does not hear of its new certificate: a thief would not ask."""
    mesh.change = short_connections
    inbound = await mesh.stock(check_revocation=True)
    outbound = await mesh.orders(inbound)
    assert await get(outbound) == (200, ORDERS)
    orders = mesh.identities.grants[0]
    stolen = orders.identity
    mesh.identities.revoke(orders)
    orders.identity = stolen
    mesh.identities.announce()
    async with asyncio.timeout(10):
        while (await get(outbound))[0] != 503:
            await asyncio.sleep(0.02)
    mesh.identities.rotate(orders)
    async with asyncio.timeout(10):
        while (await get(outbound)) != (200, ORDERS):
            await asyncio.sleep(0.02)


async def test_what_envoy_refuses_is_logged_once_and_mended_by_the_next(mesh: Mesh) -> None:
    stock = mesh.identities.grants[1]
    inbound = Inbound(ANY, Address.parse(mesh.app.address), (ORDERS,))
    envoy = await mesh.start("stock", inbound=inbound)
    address = await bound(envoy, "inbound")
    good = await asyncio.to_thread(presented_serial, address)
    with capture_logs() as logs:
        stock.identity = replace(stock.identity, chain=(b"no certificate",))
        mesh.identities.announce()
        await envoy.until(lambda: envoy.stat("sds.default.update_rejected") == 1)
        await asyncio.sleep(0.5)
        assert envoy.stat("sds.default.update_rejected") == 1
        assert await asyncio.to_thread(presented_serial, address) == good
        mesh.identities.rotate(stock)
        await envoy.until(lambda: presented_serial(address) == stock.identity.serial)
    (line,) = [line for line in logs if line["event"] == "client refused a secret"]
    assert line["names"] == ["default"]
    assert line["error"]
    assert "PRIVATE KEY" not in str(logs)


async def test_grpc_flows_through(mesh: Mesh) -> None:
    servicer = health.aio.HealthServicer()
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    mesh.app.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        outbound = await mesh.orders(await mesh.stock())
        async with grpc.aio.insecure_channel(outbound) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            watch = stub.Watch(health_pb2.HealthCheckRequest())
            await watch.read()
            mesh.identities.rotate()
            await servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            watch.cancel()
    finally:
        await server.stop(0)


async def test_bytes_flow_through(mesh: Mesh) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.readline()).upper())
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    mesh.app.address = "{}:{}".format(*server.sockets[0].getsockname())
    inbound = await mesh.stock(protocol=Protocol.TCP)
    outbound = await mesh.orders(inbound, protocol=Protocol.TCP)
    host, _, port = outbound.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"hello\n")
    async with asyncio.timeout(10):
        assert await reader.read() == b"HELLO\n"
    writer.close()
    server.close()


def unconstrained_root(key: LocalSigningKey) -> x509.Certificate:
    """A self-signed CA certificate of partner.test, as any other software makes it."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "partner")])
    now = datetime.now(UTC)
    key_id = x509.SubjectKeyIdentifier.from_public_key(key.public_key)
    usage = dict.fromkeys(
        (
            *("digital_signature", "content_commitment", "key_encipherment", "key_agreement"),
            *("data_encipherment", "encipher_only", "decipher_only"),
        ),
        False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - DAY)
        .not_valid_after(now + DAY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), critical=True)
        .add_extension(key_id, critical=False)
        .sign(key.as_private_key(), hashes.SHA256())
    )


async def test_a_federated_domain_speaks_for_itself_alone(
    envoy: Path, tmp_path: Path, open_directory: Path
) -> None:
    """A partner's authority makes a certificate with a SPIFFE ID of ours: it is refused.

    The authority's own certificate constrains no names, as ours would: what refuses it is that
    Envoy was told whose authority it is.
    """
    ours, theirs = FakeIdentities("example.org"), FakeIdentities("partner.test")
    key = LocalSigningKey("memory:partner@1", generate_private_key(KeyAlgorithm.EC_P256))
    root = unconstrained_root(key)

    def issuer_for(trust_domain: TrustDomain) -> X509Issuer:
        return X509Issuer(authority_id="partner", trust_domain=trust_domain, key=key, chain=[root])

    theirs._authorities[0].root = root
    theirs._authorities[0].x509 = issuer_for(theirs.trust_domain)
    ours._foreign["partner.test"] = theirs._authorities[0]
    theirs._foreign["example.org"] = ours._authorities[0]
    ours.grant("/shop/stock", who=envoy_named("stock"), federates_with=["partner.test"])
    orders = theirs.grant("/shop/orders", who=envoy_named("orders"), federates_with=["example.org"])
    (open_directory / "b").mkdir()
    async with (
        secrets_served(open_directory, ours) as our_secrets,
        secrets_served(open_directory / "b", theirs) as their_secrets,
        mesh_over(envoy, tmp_path, our_secrets) as mesh,
    ):
        mesh.change = short_connections
        partner = "spiffe://partner.test/shop/orders"
        inbound = await mesh.stock(partner, ORDERS)
        outbound = await mesh.orders(inbound, socket=their_secrets.socket)
        assert await get(outbound) == (200, partner)
        forger = FakeIdentities("example.org")
        forger._authorities[0].x509 = issuer_for(forger.trust_domain)
        orders.identity = forger.grant("/shop/orders").identity
        theirs.announce()
        async with asyncio.timeout(10):
            while (await get(outbound))[0] != 503:
                await asyncio.sleep(0.02)
        assert set(mesh.app.seen) == {partner}
        assert mesh.envoys["stock"].stat("listener.127.0.0.1_0.ssl.fail_verify_error") > 0
