"""SPIFFE libraries of others against our Workload API, unchanged: py-spiffe and spiffe-tls.

py-spiffe runs in this very process, in threads; spiffe-tls in two processes of its own. With the
stand-in for the agent's identities, and with a whole agent and broker.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from spiffe import JwtSource, SpiffeId, TrustDomain, WorkloadApiClient, X509Source
from spiffe.bundle.jwt_bundle.jwt_bundle import JwtBundle
from spiffe.svid.jwt_svid import JwtSvid
from spiffe.workloadapi.errors import FetchJwtSvidError, FetchX509SvidError, ValidateJwtSvidError

from identity_client import PeerRejected, client_ssl_context, server_ssl_context
from identity_client.aio import IdentitySource
from identity_client.errors import ObjectNotFound, SourceError
from identity_client.revocation import Issuer
from identity_client.testing import FakeTrustDomain
from support.workload_api import ServedWorkloadApi, line_of
from support.workload_contract import Stage

OWN = TrustDomain("example.org")
OTHER = TrustDomain("other.org")
SERVICE = Path(__file__).parents[1] / "support" / "tls_service.py"
T = TypeVar("T")


async def in_thread(function: Callable[..., T], *arguments: Any, **more: Any) -> T:
    async with asyncio.timeout(30):
        return await asyncio.to_thread(function, *arguments, **more)


async def eventually(condition: Callable[[], bool], seconds: float = 10) -> float:
    """Seconds until it held."""
    began = time.perf_counter()
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)
    return time.perf_counter() - began


@asynccontextmanager
async def client_of(stage: Stage, *paths: str) -> AsyncIterator[WorkloadApiClient]:
    """py-spiffe's client, in a process that has these identities."""
    for path in paths:
        await stage.grant(path)
    with WorkloadApiClient(stage.address) as client:

        def ids() -> set[str]:
            try:
                return {str(each.spiffe_id) for each in client.fetch_x509_svids(timeout=5)}
            except FetchX509SvidError:
                return set()

        async with asyncio.timeout(10):
            while await in_thread(ids) < {f"spiffe://example.org{path}" for path in paths}:
                await asyncio.sleep(0.02)
        yield client


# --- py-spiffe: the client ------------------------------------------------------------------------


async def test_py_spiffe_fetches_x509(stage: Stage) -> None:
    async with client_of(stage, "/a", "/b") as client:
        svids = await in_thread(client.fetch_x509_svids)
        assert {str(each.spiffe_id) for each in svids} == {
            "spiffe://example.org/a",
            "spiffe://example.org/b",
        }
        default = await in_thread(client.fetch_x509_svid)
        assert default.spiffe_id == svids[0].spiffe_id
        context = await in_thread(client.fetch_x509_context)
        assert context.default_svid.spiffe_id == svids[0].spiffe_id
        bundles = await in_thread(client.fetch_x509_bundles)
        bundle = bundles.get_bundle_for_trust_domain(OWN)
        assert bundle
        assert bundle == context.x509_bundle_set.get_bundle_for_trust_domain(OWN)
        (root,) = bundle.x509_authorities
        default.cert_chain[-1].verify_directly_issued_by(root)


async def test_py_spiffe_fetches_and_validates_jwt(stage: Stage) -> None:
    async with client_of(stage, "/a", "/b") as client:
        subject = SpiffeId("spiffe://example.org/b")
        svid = await in_thread(client.fetch_jwt_svid, {"reports", "billing"}, subject)
        assert svid.spiffe_id == subject
        assert svid.audience == {"reports", "billing"}
        every = await in_thread(client.fetch_jwt_svids, {"reports"})
        assert len({each.spiffe_id for each in every}) == len(every) == 2
        bundles = await in_thread(client.fetch_jwt_bundles)
        bundle = bundles.get_bundle_for_trust_domain(OWN)
        assert bundle
        # Read by py-spiffe with the bundle, and by our agent without.
        assert JwtSvid.parse_and_validate(svid.token, bundle, {"billing"}).spiffe_id == subject
        validated = await in_thread(client.validate_jwt_svid, svid.token, "billing")
        assert validated.spiffe_id == subject
        with pytest.raises(ValidateJwtSvidError):
            await in_thread(client.validate_jwt_svid, svid.token, "another")
        with pytest.raises(FetchJwtSvidError):
            await in_thread(
                client.fetch_jwt_svid, {"reports"}, SpiffeId("spiffe://example.org/not-mine")
            )


async def test_py_spiffe_is_told_that_there_is_nothing(stage: Stage) -> None:
    with WorkloadApiClient(stage.address) as client:
        with pytest.raises(FetchX509SvidError, match="PERMISSION_DENIED"):
            await in_thread(client.fetch_x509_svid)
        with pytest.raises(FetchJwtSvidError, match="PERMISSION_DENIED"):
            await in_thread(client.fetch_jwt_svid, {"x"})


def test_py_spiffe_reads_a_jwk_set_without_keys() -> None:
    """What the agent sends for a trust domain that has no JWT key."""
    assert not JwtBundle.parse(OWN, b'{"keys":[]}').jwt_authorities


# --- py-spiffe: the sources -----------------------------------------------------------------------


async def test_py_spiffe_s_x509_source_follows_a_revocation_and_a_registration(
    stage: Stage,
) -> None:
    async with client_of(stage, "/a"):
        source = await in_thread(X509Source, socket_path=stage.address, timeout_in_seconds=10)
        try:

            def serial() -> int:
                return source.get_x509_context().default_svid.leaf.serial_number

            first = serial()
            await stage.revoke(first)
            assert await eventually(lambda: serial() != first) < 5
            updates: list[None] = []
            source.subscribe_for_updates(lambda: updates.append(None))
            await stage.grant("/b")
            assert await eventually(lambda: bool(updates)) < 5
        finally:
            await in_thread(source.close)


async def test_py_spiffe_s_x509_source_waits_for_its_registration(stage: Stage) -> None:
    making = asyncio.create_task(
        in_thread(X509Source, socket_path=stage.address, timeout_in_seconds=20)
    )
    await asyncio.sleep(0.3)
    assert not making.done()
    await stage.grant("/late")
    source = await making
    try:
        svid = source.get_x509_context().default_svid
        assert str(svid.spiffe_id) == "spiffe://example.org/late"
    finally:
        await in_thread(source.close)


async def test_py_spiffe_s_jwt_source(stage: Stage) -> None:
    async with client_of(stage, "/a"):
        source = await in_thread(JwtSource, socket_path=stage.address, timeout_in_seconds=10)
        try:
            svid = await in_thread(source.fetch_svid, {"reports"})
            bundle = source.get_bundle_for_trust_domain(OWN)
            assert bundle
            assert JwtSvid.parse_and_validate(svid.token, bundle, {"reports"}).spiffe_id == (
                SpiffeId("spiffe://example.org/a")
            )
        finally:
            await in_thread(source.close)


@pytest.mark.clause("API-5")
async def test_py_spiffe_forgets_a_federated_bundle_that_is_gone(
    workload_api: ServedWorkloadApi,
) -> None:
    identities = workload_api.identities
    identities.federate("other.org")
    identities.grant("/a", federates_with=["other.org"])
    source = await in_thread(X509Source, socket_path=workload_api.address, timeout_in_seconds=10)
    jwts = await in_thread(JwtSource, socket_path=workload_api.address, timeout_in_seconds=10)
    try:
        foreign = source.get_bundle_for_trust_domain(OTHER)
        assert foreign
        (root,) = foreign.x509_authorities
        assert (root.public_bytes(Encoding.DER),) == identities.federated[
            "other.org"
        ].x509_authorities
        assert jwts.get_bundle_for_trust_domain(OTHER)
        identities.unfederate("other.org")
        await eventually(lambda: source.get_bundle_for_trust_domain(OTHER) is None)
        await eventually(lambda: jwts.get_bundle_for_trust_domain(OTHER) is None)
        assert source.get_bundle_for_trust_domain(OWN)
    finally:
        await in_thread(source.close)
        await in_thread(jwts.close)


async def test_py_spiffe_s_source_outlives_a_rotated_authority(
    workload_api: ServedWorkloadApi,
) -> None:
    workload_api.identities.grant("/a")
    source = await in_thread(X509Source, socket_path=workload_api.address, timeout_in_seconds=10)
    try:

        def roots() -> int:
            bundle = source.get_bundle_for_trust_domain(OWN)
            return len(bundle.x509_authorities) if bundle else 0

        workload_api.identities.rotate_authority()
        await eventually(lambda: roots() == 2)
        workload_api.identities.retire_authorities()
        await eventually(lambda: roots() == 1)
        bundle = source.get_bundle_for_trust_domain(OWN)
        chain = source.get_x509_context().default_svid.cert_chain
        assert bundle
        (root,) = bundle.x509_authorities
        chain[-1].verify_directly_issued_by(root)
    finally:
        await in_thread(source.close)


# --- our SDK --------------------------------------------------------------------------------------


@pytest.mark.clause("API-11")
async def test_our_sdk_follows_what_becomes_of_its_identity(stage: Stage) -> None:
    async with IdentitySource.from_workload_api(stage.address) as source:
        assert not source.status().ready
        grant = await stage.grant("/a")
        first = await source.wait_ready(timeout=10)
        assert str(first.spiffe_id) == "spiffe://example.org/a"
        token = await source.fetch_jwt_svid("reports")
        assert source.validate_jwt_svid(token.token, "reports").spiffe_id == first.spiffe_id
        await stage.revoke(int(first.serial, 16))

        def is_replaced() -> bool:
            try:
                return source.snapshot().serial != first.serial
            except SourceError:
                return False

        await eventually(is_replaced)
        await eventually(
            lambda: source.denied.denies(first.serial, Issuer.of(first.svid.leaf)),
        )
        await stage.withdraw(grant)

        def is_over() -> bool:
            try:
                source.snapshot()
            except SourceError:
                return True
            return False

        await eventually(is_over)


@pytest.mark.clause("API-11")
async def test_whoever_is_ready_knows_the_jwt_bundle_as_well(
    workload_api: ServedWorkloadApi,
) -> None:
    """Both streams are refused until there is an entry, and each is tried again on its own."""

    async def greet_itself(source: IdentitySource) -> None:
        await source.wait_ready(timeout=10)
        token = await source.fetch_jwt_svid("reports")
        source.validate_jwt_svid(token.token, "reports")

    sources = [IdentitySource.from_workload_api(workload_api.address) for _ in range(8)]
    async with AsyncExitStack() as stack:
        for source in sources:
            await stack.enter_async_context(source)
        await asyncio.sleep(1.5)
        workload_api.identities.grant("/a")
        await asyncio.gather(*(greet_itself(source) for source in sources))


@pytest.mark.clause("API-7")
async def test_a_peer_is_verified_with_the_bundle_of_its_own_trust_domain(
    workload_api: ServedWorkloadApi,
) -> None:
    """And without one it is untrusted: our SDK's mTLS knows peers of its own domain alone."""
    identities = workload_api.identities
    identities.federate("other.org")
    identities.grant("/a", federates_with=["other.org"])
    stranger = FakeTrustDomain("other.org")

    async def greet(server_source: Any, client_source: Any, server_id: str) -> bytes:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await reader.read(100))
            writer.close()

        context = server_ssl_context(server_source, authorize=lambda _peer: True)
        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
        port = server.sockets[0].getsockname()[1]
        try:
            reader, writer = await asyncio.open_connection(
                "127.0.0.1",
                port,
                ssl=client_ssl_context(client_source, authorize=server_id),
                server_hostname="localhost",
            )
            writer.write(b"hello")
            try:
                return await reader.read(100)
            finally:
                writer.close()
        finally:
            server.close()

    async with IdentitySource.from_workload_api(workload_api.address) as source:
        await source.wait_ready(timeout=10)
        me = "spiffe://example.org/a"
        assert await greet(source, source, me) == b"hello"
        foreign_root = source.x509_bundle("other.org").x509_authorities
        assert {each.public_bytes(Encoding.DER) for each in foreign_root} == set(
            identities.federated["other.org"].x509_authorities
        )
        with stranger.source("spiffe://other.org/b") as theirs:
            with pytest.raises((OSError, PeerRejected)):
                await greet(theirs, source, "spiffe://other.org/b")
            with pytest.raises((OSError, PeerRejected)):
                assert await greet(source, theirs, me) == b"hello"
        identities.unfederate("other.org")

        def is_forgotten() -> bool:
            try:
                source.x509_bundle("other.org")
            except ObjectNotFound:
                return True
            return False

        await eventually(is_forgotten)


# --- spiffe-tls -----------------------------------------------------------------------------------


@asynccontextmanager
async def service(address: str, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", str(SERVICE), *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={"PATH": os.environ["PATH"], "SPIFFE_ENDPOINT_SOCKET": address},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def told_by(process: asyncio.subprocess.Process) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(await line_of(process, 30))
    return answer


async def asked(process: asyncio.subprocess.Process, word: str) -> dict[str, Any]:
    assert process.stdin
    process.stdin.write(f"{word}\n".encode())
    return await told_by(process)


def runs(argument: str) -> Callable[[Any], bool]:
    """Processes whose command line has that argument."""
    return lambda caller: argument.encode() in caller.process.read("cmdline").split(b"\0")


async def test_spiffe_tls_between_two_processes_survives_rotation_and_revocation(
    workload_api: ServedWorkloadApi,
) -> None:
    identities = workload_api.identities
    web = identities.grant("/web", who=runs("client"))
    api = identities.grant("/api", who=runs("server"))
    ids = "spiffe://example.org/web", "spiffe://example.org/api"
    async with service(workload_api.address, "server", ids[0]) as server:
        port = str((await told_by(server))["port"])
        async with service(workload_api.address, "client", port, ids[1]) as client:
            assert await told_by(client) == {"id": ids[0]}

            async def greeted() -> tuple[str, str]:
                """The serials that the client and the server were shown."""
                of_server = await asked(client, "world")
                assert of_server["answer"] == "hello world"
                return of_server["serial"], (await told_by(server))["serial"]

            assert await greeted() == (api.identity.serial, web.identity.serial)
            for change in (
                identities.rotate,
                lambda: identities.revoke(api),
                identities.activate_authority,
            ):
                if change == identities.activate_authority:
                    # A root is believed by everybody before anything is signed below it.
                    identities.prepare_authority()
                    await asyncio.sleep(1)
                change()
                expected = api.identity.serial, web.identity.serial
                async with asyncio.timeout(10):
                    while await greeted() != expected:  # every one of them succeeds
                        await asyncio.sleep(0.02)


async def test_spiffe_tls_refuses_who_is_not_meant(workload_api: ServedWorkloadApi) -> None:
    workload_api.identities.grant("/mallory", who=runs("client"))
    workload_api.identities.grant("/api", who=runs("server"))
    async with service(workload_api.address, "server", "spiffe://example.org/web") as server:
        port = str((await told_by(server))["port"])
        arguments = "client", port, "spiffe://example.org/api"
        async with service(workload_api.address, *arguments) as client:
            assert await told_by(client) == {"id": "spiffe://example.org/mallory"}
            assert client.stdin
            client.stdin.write(b"world\n")
            assert await told_by(server) == {"refused": True}
