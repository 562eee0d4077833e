"""The whole line with real Envoys: broker, agent, attested processes, the bootstraps we keep.

Two workloads and an intruder are three Envoys of one user, told apart by the program they run.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
)

from identity_api.broker.v1 import types_pb2
from identity_broker.cli.main import cli
from identity_broker.cli.options import Invocation
from support import repository
from support.agent import RunningAgent, running_agent
from support.envoy import RunningEnvoy, presented_serial, running_envoy
from support.line import RunningBroker, running, settings_in
from support.proxied import Application, application, get, load_on

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]
DEPLOY = repository.ROOT / "deploy" / "envoy"
ORDERS = "spiffe://example.org/shop/orders"
STOCK = "spiffe://example.org/shop/stock"


@dataclass
class Shop:
    """A broker, an agent joined to it, an application."""

    broker: RunningBroker
    agent: RunningAgent
    app: Application
    binary: Path
    folder: Path
    resources: AsyncExitStack

    @property
    def socket(self) -> str:
        return self.agent.workload_api.removeprefix("unix://")

    def program(self, name: str) -> Path:
        """An Envoy of its own: another path, which is what the selector looks at."""
        path = self.folder / name
        if not path.exists():
            try:
                os.link(self.binary, path)
            except OSError:
                shutil.copy(self.binary, path)
        return path

    async def register(self, name: str, *, ttl: int = 0) -> None:
        """An entry for the Envoy of that name."""
        await self.broker.entry(
            f"/shop/{name}",
            self.agent.node_name,
            selectors=[types_pb2.Selector(type="unix", value=f"path:{self.program(name)}")],
            x509_ttl_seconds=ttl,
        )

    async def envoy(self, name: str, bootstrap: str) -> RunningEnvoy:
        """Run it, once it listens."""
        envoy = await self.resources.enter_async_context(
            running_envoy(self.program(name), self.folder, bootstrap, name=name)
        )
        await envoy.until(lambda: envoy.state == "LIVE")
        return envoy

    def kept(self, name: str, **there: str) -> str:
        """A bootstrap of deploy/envoy/, with this test's addresses in place of the kept ones."""
        text = (DEPLOY / f"{name}.yaml").read_text()
        for old, new in {"/run/identity-broker/workload.sock": self.socket, **there}.items():
            assert old in text
            text = text.replace(old, new)
        return text

    def printed(self, *arguments: str) -> str:
        """What `idb envoy config` prints."""
        done = CliRunner().invoke(
            cli,
            ["envoy", "config", *arguments, "--workload-api", self.agent.workload_api],
            obj=Invocation(),
        )
        assert done.exit_code == 0, done.output
        return done.stdout


@asynccontextmanager
async def shop_in(folder: Path, binary: Path) -> AsyncIterator[Shop]:
    async with (
        running(settings_in(folder / "broker")) as broker,
        running_agent(broker, folder / "agent") as agent,
        application() as app,
        AsyncExitStack() as resources,
    ):
        yield Shop(broker, agent, app, binary, folder, resources)


@pytest.fixture
async def shop(open_directory: Path, envoy: Path) -> AsyncIterator[Shop]:
    async with shop_in(open_directory, envoy) as made:
        yield made


async def test_the_kept_pair_works_and_survives_rotations_under_load(shop: Shop) -> None:
    """With SVIDs of ten seconds, so that the agent itself rotates them while requests flow."""
    for name in ("orders", "stock"):
        await shop.register(name, ttl=10)
    app_port = shop.app.address.rpartition(":")[2]
    stock = await shop.envoy(
        "stock",
        shop.kept(
            "stock",
            **{"0.0.0.0": "127.0.0.1", "port_value: 8443": "port_value: 0"},
            **{"port_value: 8080": f"port_value: {app_port}"},
        ),
    )
    inbound = stock.address("inbound")
    orders = await shop.envoy(
        "orders",
        shop.kept(
            "orders",
            **{"port_value: 9001": "port_value: 0", "stock.internal": "127.0.0.1"},
            **{"port_value: 8443": f"port_value: {inbound.rpartition(':')[2]}"},
            **{
                "use_downstream_protocol_config:": "common_http_protocol_options: "
                "{max_requests_per_connection: 5}\n        use_downstream_protocol_config:"
            },
        ),
    )
    async with load_on(orders.address("outbound")) as load:
        await load.until(20)
        serials = {await asyncio.to_thread(presented_serial, inbound)}
        async with asyncio.timeout(40):
            while len(serials) < 3:
                serials.add(await asyncio.to_thread(presented_serial, inbound))
                await asyncio.sleep(0.1)
        await load.until(20)
    assert load.failures == []
    assert load.answers.keys() == {(200, ORDERS)}
    handshakes = orders.stat("cluster.peer.ssl.handshake")
    assert handshakes > 50, "the load never had to look at a certificate"
    issued = await shop.broker.ledger(spiffe_id=STOCK)
    assert serials <= {each.id for each in issued}


async def test_another_program_of_the_same_user_is_somebody_else(shop: Shop) -> None:
    for name in ("stock", "orders", "intruder"):
        await shop.register(name)
    stock = await shop.envoy(
        "stock",
        shop.printed(
            *("stock", "--inbound", "127.0.0.1:0", "--app", shop.app.address),
            *("--accept", ORDERS),
        ),
    )
    outbound = {}
    for name in ("orders", "intruder"):
        caller = await shop.envoy(
            name,
            shop.printed(
                *(name, "--outbound", "127.0.0.1:0", "--peer", stock.address("inbound")),
                *("--expect", STOCK),
            ),
        )
        outbound[name] = caller.address("outbound")
    assert await get(outbound["orders"]) == (200, ORDERS)
    assert (await get(outbound["intruder"]))[0] == 503
    assert set(shop.app.seen) == {ORDERS}
    assert stock.stat("listener.127.0.0.1_0.ssl.fail_verify_san") > 0


async def test_a_revoked_certificate_is_replaced_at_once(shop: Shop) -> None:
    """From `idb revoke` to a handshake with the next one: no poll, no restart."""
    await shop.register("stock")
    stock = await shop.envoy(
        "stock",
        shop.printed(
            *("stock", "--inbound", "127.0.0.1:0", "--app", shop.app.address),
            *("--accept", ORDERS, "--check-revocation"),
        ),
    )
    await stock.until(lambda: bool(stock.certificates()))
    inbound = stock.address("inbound")

    async def rotate() -> str:
        await shop.broker.revoke(id=await asyncio.to_thread(presented_serial, inbound))
        return ""

    seconds = sorted(await stock.rotation_seconds("inbound", rotate, times=7))
    print(f"revoked → handshake with the next: median {seconds[3] * 1000:.0f} ms")
    assert seconds[3] < 2


async def test_a_stolen_certificate_is_refused_once_it_is_revoked(shop: Shop) -> None:
    """This very process is the thief: it keeps what was taken back."""
    await shop.register("stock")
    await shop.broker.entry(
        "/shop/stolen",
        shop.agent.node_name,
        selectors=[types_pb2.Selector(type="unix", value=f"path:{Path(sys.executable).resolve()}")],
    )
    stolen = "spiffe://example.org/shop/stolen"
    stock = await shop.envoy(
        "stock",
        shop.printed(
            *("stock", "--inbound", "127.0.0.1:0", "--app", shop.app.address),
            *("--accept", stolen, "--check-revocation"),
        ),
    )
    await stock.until(lambda: bool(stock.certificates() and stock.authorities()))
    inbound = stock.address("inbound")
    (svid,) = (await shop.agent.fetch_x509()).svids
    context, serial = client_with(svid, shop.folder)
    assert await get(inbound, tls=context) == (200, stolen)
    await shop.broker.revoke(id=serial)
    begun = time.monotonic()
    with pytest.raises(OSError):
        while True:
            assert await get(inbound, tls=context, seconds=5) == (200, stolen)
            assert time.monotonic() - begun < 10
    assert stock.stat("listener.127.0.0.1_0.ssl.fail_verify_error") > 0
    print(f"revoked → refused by Envoy: {(time.monotonic() - begun) * 1000:.0f} ms")
    async with asyncio.timeout(10):
        while (again := (await shop.agent.fetch_x509()).svids[0]) == svid:
            await asyncio.sleep(0.05)
    assert await get(inbound, tls=client_with(again, shop.folder)[0]) == (200, stolen)


def client_with(svid: Any, folder: Path) -> tuple[ssl.SSLContext, str]:
    """A TLS client that presents the SVID, and the SVID's serial number."""
    chain = []
    rest: bytes = svid.x509_svid
    while rest:
        size = 4 + int.from_bytes(rest[2:4], "big")
        chain.append(x509.load_der_x509_certificate(rest[:size]))
        rest = rest[size:]
    key = load_der_private_key(svid.x509_svid_key, None)
    both = folder / "stolen.pem"
    both.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        + b"".join(each.public_bytes(Encoding.PEM) for each in chain)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.load_cert_chain(both)
    return context, f"{chain[0].serial_number:040x}"


async def test_an_entry_made_later_reaches_an_envoy_that_waits(shop: Shop) -> None:
    stock = await shop.envoy(
        "stock",
        shop.printed(
            *("stock", "--inbound", "127.0.0.1:0", "--app", shop.app.address),
            *("--accept", ORDERS),
        ),
    )
    assert stock.certificates() == set()
    await shop.register("stock")
    await stock.until(lambda: bool(stock.certificates()), seconds=10)
