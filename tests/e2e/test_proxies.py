"""nginx and HAProxy with identities from the agent: `idb svid fetch --watch --write --exec`.

A client and a service with identities of their own stand before and behind the proxy; requests go
on all the time while every identity is rotated, and none may fail.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest
from cryptography import x509

from identity_api.broker.v1 import types_pb2
from identity_client import X509Material, client_ssl_context, peer_spiffe_id, server_ssl_context
from identity_client.aio import IdentitySource
from identity_client.testing import FakeTrustDomain
from support.agent import RunningAgent, running_agent
from support.line import RunningBroker, openbao_settings, running, settings_in
from support.lists import below_a_file
from support.proxies import Proxy
from support.svid_watch import watching

PROXY = "spiffe://example.org/edge"
CLIENT = "spiffe://example.org/client"
SERVICE = "spiffe://example.org/service"


@pytest.fixture
async def broker(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[RunningBroker]:
    """Below an upstream: proxies check the whole chain, and need a list of each authority."""
    if request.param == "openbao":
        site = request.getfixturevalue("vault_site")
        settings = openbao_settings(tmp_path / "idb", site, site.address)
    else:
        settings = settings_in(tmp_path / "idb", **below_a_file(tmp_path / "upstream"))
    async with running(settings) as one:
        yield one


@pytest.fixture
async def agent(broker: RunningBroker, tmp_path: Path) -> AsyncIterator[RunningAgent]:
    """An agent whose workloads, all of this user, live ten seconds."""
    for path in ("/edge", "/client", "/service"):
        await broker.entry(
            path,
            "machine",
            selectors=[types_pb2.Selector(type="unix", value=f"uid:{os.getuid()}")],
            x509_ttl_seconds=10,
        )
    async with running_agent(broker, tmp_path / "agent") as one:
        yield one


@asynccontextmanager
async def service(agent: RunningAgent) -> AsyncIterator[int]:
    """A service that only the proxy may call, and that says whom it sees; yields its port."""
    async with IdentitySource.from_workload_api(agent.workload_api, spiffe_id=SERVICE) as source:
        await source.wait_ready(10)

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(OSError, asyncio.IncompleteReadError, ssl.SSLError):
                await reader.readuntil(b"\r\n\r\n")
                seen = str(peer_spiffe_id(writer.get_extra_info("ssl_object"))).encode()
                writer.write(
                    b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
                    % (len(seen), seen)
                )
                await writer.drain()
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

        context = server_ssl_context(source, authorize=PROXY)
        server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
        async with server:
            yield server.sockets[0].getsockname()[1]


async def ask(port: int, context: ssl.SSLContext) -> tuple[str, str]:
    """One request on a connection of its own: what came back, and who answered."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        writer.write(b"GET / HTTP/1.1\r\nHost: edge\r\nConnection: close\r\n\r\n")
        answered = str(peer_spiffe_id(writer.get_extra_info("ssl_object")))
        answer = (await reader.read()).decode()
        return answer, answered
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


@pytest.mark.slow
@pytest.mark.openbao
@pytest.mark.parametrize(
    ("kind", "broker"), [("nginx", "disk"), ("haproxy", "openbao")], indirect=["broker"]
)
async def test_a_proxy_rotates_without_a_failed_request(
    broker: RunningBroker, agent: RunningAgent, tmp_path: Path, kind: str
) -> None:
    proxy = Proxy.installed(kind, tmp_path / "proxy")
    files = tmp_path / "svids"
    async with AsyncExitStack() as stack:
        behind = await stack.enter_async_context(service(agent))
        client = await stack.enter_async_context(
            IdentitySource.from_workload_api(agent.workload_api, spiffe_id=CLIENT)
        )
        await client.wait_ready(10)
        watch = await stack.enter_async_context(
            watching(
                *("--workload-api", agent.workload_api, "--spiffe-id", PROXY),
                *("--write", str(files), "--exec", proxy.hook),
            )
        )
        first = await watch.document(1)
        await stack.enter_async_context(proxy.running(files, behind=behind, behind_id=SERVICE))
        context = client_ssl_context(client, authorize=PROXY)

        served, serials = 0, {first["serial"]}
        shown: set[str] = set()
        async with asyncio.timeout(60):
            while len(shown) < 3:
                answer, answered = await ask(proxy.port, context)
                assert answer.startswith("HTTP/1.1 200"), (answer, proxy.said())
                assert answer.endswith(PROXY), answer  # The service saw the proxy's identity.
                assert answered == PROXY
                served += 1
                shown.add(await serial_shown(proxy.port, context))
        serials |= {one["serial"] for one in watch.documents}
        assert shown <= serials
        assert served > 20
        assert all(one["exec_exit_code"] == 0 for one in watch.documents), watch.talk
        assert len(watch.documents) >= 3

        # Who is not of the trust domain gets no answer, whatever name is shown.
        stranger = FakeTrustDomain("example.org").source(CLIENT).snapshot().x509
        assert not await is_served(proxy.port, stranger)

        # Nor does who was revoked, as soon as the list is here and was read.
        stolen = client.snapshot().x509
        assert await is_served(proxy.port, stolen)
        await broker.revoke(id=stolen.serial)
        async with asyncio.timeout(4):  # It would live for five more seconds at least.
            while await is_served(proxy.port, stolen):
                await asyncio.sleep(0.02)


async def is_served(port: int, material: X509Material) -> bool:
    """Whether whoever holds `material` gets an answer."""
    try:
        answer, _ = await ask(port, _careless(material))
    except OSError:
        return False
    return answer.startswith("HTTP/1.1 200")


async def serial_shown(port: int, context: ssl.SSLContext) -> str:
    """The serial number of the certificate that the proxy shows."""
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return f"{x509.load_der_x509_certificate(der).serial_number:040x}"
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def _careless(material: X509Material) -> ssl.SSLContext:
    """A client that shows a certificate and believes any server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with tempfile.NamedTemporaryFile() as file:
        file.write(material.chain_pem + material.key_pem)
        file.flush()
        context.load_cert_chain(file.name)
    return context
