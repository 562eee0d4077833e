"""What names nobody: a denied authority, a list, silence. Who is refused then, over real TLS."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from identity_client import (
    IdentitySnapshot,
    PeerRejected,
    PeerRevoked,
    RevocationsStale,
    StalenessPolicy,
    client_ssl_context,
    server_ssl_context,
)
from identity_client._wire.status import error_from_rpc
from identity_client.clock import utc_now
from identity_client.credential import NO_FEDERATION, X509Material
from identity_client.integrations.grpc import secure_channel, secure_channel_aio
from identity_client.integrations.grpc.guard import Unsettled
from identity_client.revocation import DenySet, Issuer, RevocationList
from identity_client.testing import FakeIdentitySource, FakeTrustDomain
from support.client import NAMES, echo_server, echo_server_aio

WEB = "spiffe://example.org/web"
API = "spiffe://example.org/api"
ANOTHER, THIRD = "ab" * 20, "cd" * 20
SOON = 6.0


@pytest.fixture
def domain() -> FakeTrustDomain:
    return FakeTrustDomain("example.org")


@pytest.fixture
def web(domain: FakeTrustDomain) -> FakeIdentitySource:
    return domain.source(WEB)


@pytest.fixture
def api(domain: FakeTrustDomain) -> FakeIdentitySource:
    return domain.source(API)


class Fixed:
    """Shows one certificate whatever happens, and hears of no other's revocation by itself."""

    def __init__(self, snapshot: IdentitySnapshot) -> None:
        self._snapshot = snapshot
        self.denied = DenySet()

    def snapshot(self) -> IdentitySnapshot:
        return self._snapshot

    def deny_authorities(self, *ids: str) -> None:
        """As a source that hears of them, and has an identity of another one."""
        self.denied.deny_authorities(ids)
        self.denied.tell_watchers()


def leaf_of(source: FakeIdentitySource) -> x509.Certificate:
    return x509.load_pem_x509_certificate(source.snapshot().x509.chain_pem)


def without_key_id(domain: FakeTrustDomain, source: FakeIdentitySource) -> Fixed:
    """The source's certificate, signed again without an authority key identifier."""
    snapshot, leaf = source.snapshot(), leaf_of(source)
    builder = x509.CertificateBuilder(
        leaf.issuer,
        leaf.subject,
        leaf.public_key(),
        x509.random_serial_number(),
        leaf.not_valid_before_utc,
        leaf.not_valid_after_utc,
    )
    for one in leaf.extensions:
        if not isinstance(one.value, x509.AuthorityKeyIdentifier):
            builder = builder.add_extension(one.value, one.critical)
    der = builder.sign(domain._key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
    key = serialization.load_pem_private_key(snapshot.x509.key_pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    material = X509Material.from_chain(
        [der], private_key=key, bundle=snapshot.bundle, received=utc_now()
    )
    return Fixed(
        IdentitySnapshot(x509=material, bundle=snapshot.bundle, federated=NO_FEDERATION, revision=1)
    )


def authority_id(source: FakeIdentitySource) -> str:
    return Issuer.of(leaf_of(source)).key_id.hex()


def exchange(server: Any, client: Any) -> bytes:
    """What the server reads of what the client sent; raises what the server's side raises."""
    here, there = socket.socketpair()

    def send() -> None:
        try:
            with client.wrap_socket(there) as connection:
                connection.sendall(b"hello")
                connection.recv(1)
        except OSError:
            there.close()

    sender = threading.Thread(target=send)
    sender.start()
    try:
        with server.wrap_socket(here, server_side=True) as connection:
            return bytes(connection.recv(100))
    finally:
        here.close()
        sender.join()


# --- certificates that do not say whose key signed them ------------------------------------------


def test_who_names_no_key_is_refused_while_an_authority_is_denied(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    verifier = Fixed(api.snapshot())
    nameless = without_key_id(domain, web)
    server = server_ssl_context(verifier, authorize=WEB)
    unnamed = client_ssl_context(nameless, authorize=API)
    assert exchange(server, unnamed) == b"hello"  # Others' SVIDs may rightly lack it.
    verifier.deny_authorities(ANOTHER)
    with pytest.raises(PeerRejected) as refused:
        exchange(server, unnamed)
    assert refused.value.reason == "PEER_REJECTED"
    assert exchange(server, client_ssl_context(web, authorize=API)) == b"hello"
    verifier.deny_authorities()
    assert exchange(server, unnamed) == b"hello"
    verifier.deny_authorities(authority_id(web))
    with pytest.raises(PeerRejected) as refused:
        exchange(server, client_ssl_context(web, authorize=API))
    assert refused.value.reason == "PEER_REVOKED"


def test_an_open_connection_of_who_names_no_key_is_ended(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    here, there = socket.socketpair()
    server = server_ssl_context(api, authorize=WEB)
    client = client_ssl_context(without_key_id(domain, web), authorize=API)
    made: list[Any] = []
    maker = threading.Thread(target=lambda: made.append(client.wrap_socket(there)))
    maker.start()
    with closing(here), closing(there), server.wrap_socket(here, server_side=True) as connection:
        maker.join()
        threading.Timer(0.2, api.deny_authorities, [ANOTHER]).start()
        connection.settimeout(5)
        with pytest.raises(PeerRejected):
            connection.recv(1)
        made[0].close()


def test_a_grpc_caller_that_names_no_key_is_refused_while_an_authority_is_denied(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    with (
        echo_server(api, [WEB]) as address,
        secure_channel(without_key_id(domain, web), address, peer=API) as channel,
    ):
        echo = channel.unary_unary(NAMES["unary_unary"])
        assert echo(b"x", timeout=5)
        api.deny_authorities(ANOTHER)
        with pytest.raises(grpc.RpcError) as refused:
            echo(b"x", timeout=5)
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert error_from_rpc(refused.value).reason == "PEER_REJECTED"
        api.deny_authorities()
        assert echo(b"x", timeout=5)


def test_a_grpc_server_that_names_no_key_is_refused_while_an_authority_is_denied(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    with (
        echo_server(without_key_id(domain, api), [WEB]) as address,
        secure_channel(web, address, peer=API) as channel,
    ):
        echo = channel.unary_unary(NAMES["unary_unary"])
        assert echo(b"x", timeout=5)
        web.deny_authorities(ANOTHER)
        with pytest.raises(PeerRejected) as refused:
            echo(b"x", timeout=5)
        assert refused.value.reason == "PEER_REJECTED"


# --- gRPC clients and a denied authority ---------------------------------------------------------


def test_a_denied_authority_cuts_what_is_unproven_once_and_refuses_its_servers(
    web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    caller, hold = Fixed(web.snapshot()), threading.Event()

    def requests() -> Iterator[bytes]:
        yield b"1"
        hold.wait(30)

    with (
        echo_server(Fixed(api.snapshot()), [WEB]) as address,
        secure_channel(caller, address, peer=API) as channel,
    ):
        chat = channel.stream_stream(NAMES["stream_stream"])
        unproven = chat(requests(), timeout=30)
        assert next(unproven) == b"1"
        begun = time.monotonic()
        caller.deny_authorities(ANOTHER)
        with pytest.raises(grpc.RpcError):
            next(unproven)
        assert time.monotonic() - begun < SOON
        # It was looked at, and is good: whatever else is denied does not disturb it any more.
        proven = chat(requests(), timeout=30)
        assert next(proven) == b"1"
        caller.deny_authorities(ANOTHER, THIRD)
        time.sleep(0.3)
        assert proven.is_active()
        # Until it is its own authority.
        caller.deny_authorities(ANOTHER, authority_id(api))
        with pytest.raises(grpc.RpcError):
            next(proven)
        hold.set()
        with pytest.raises(PeerRevoked) as refused:
            channel.unary_unary(NAMES["unary_unary"])(b"password", timeout=5)
        assert refused.value.reason == "PEER_REVOKED"
        caller.deny_authorities()
        assert channel._guard.known() is None


async def test_a_denied_authority_s_server_is_not_called_aio(
    web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    caller = Fixed(web.snapshot())
    async with (
        echo_server_aio(Fixed(api.snapshot()), [WEB]) as address,
        secure_channel_aio(caller, address, peer=API) as channel,
    ):
        echo = channel.unary_unary(NAMES["unary_unary"])
        assert await echo(b"x", timeout=5)
        await asyncio.to_thread(caller.deny_authorities, ANOTHER)
        assert await echo(b"x", timeout=5)
        await asyncio.to_thread(caller.deny_authorities, authority_id(api))
        with pytest.raises(PeerRevoked):
            await echo(b"password", timeout=5)


def test_a_list_names_nobody_so_that_the_server_is_looked_at(
    web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    """A source of another vendor's Workload API: lists, and no feed."""
    client = Fixed(web.snapshot())
    with (
        echo_server(Fixed(api.snapshot()), [WEB]) as address,
        secure_channel(client, address, peer=API) as channel,
    ):
        echo = channel.unary_unary(NAMES["unary_unary"])
        issuer, until = Issuer.of(leaf_of(api)), time.time() + 3600
        client.denied.replace_lists([RevocationList.of(issuer, [], until)], now=utc_now())
        assert echo(b"x", timeout=5)
        assert channel._guard.known() is None
        client.denied.replace_lists([RevocationList.of(issuer, ["0abc"], until)], now=utc_now())
        assert echo(b"x", timeout=5)
        assert channel._guard.known() is not None
        revoked = RevocationList.of(issuer, ["0abc", api.serial], until)
        client.denied.replace_lists([revoked], now=utc_now())
        with pytest.raises(PeerRevoked):
            echo(b"password", timeout=5)


# --- gRPC clients and silence --------------------------------------------------------------------


@pytest.mark.parametrize("where", ["source", "channel"])
def test_a_client_calls_nobody_where_silence_is_to_be_refused(
    domain: FakeTrustDomain, api: FakeIdentitySource, where: str
) -> None:
    policy = StalenessPolicy.refuse(30)
    web = domain.source(WEB, staleness=policy) if where == "source" else domain.source(WEB)
    own = policy if where == "channel" else None
    with (
        echo_server(api, [WEB]) as address,
        secure_channel(web, address, peer=API, staleness=own) as channel,
    ):
        echo = channel.unary_unary(NAMES["unary_unary"])
        assert echo(b"x", timeout=5)
        web.hear_nothing(31)
        with pytest.raises(RevocationsStale) as refused:
            echo(b"x", timeout=5)
        assert isinstance(refused.value, grpc.RpcError)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert error_from_rpc(refused.value).reason == "REVOCATIONS_STALE"
        with pytest.raises(RevocationsStale):
            list(channel.unary_stream(NAMES["unary_stream"])(b"1", timeout=5))
        web.hear_again()
        assert echo(b"x", timeout=5)


async def test_a_client_calls_nobody_where_silence_is_to_be_refused_aio(
    web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    policy = StalenessPolicy.refuse(30)
    async with (
        echo_server_aio(api, [WEB]) as address,
        secure_channel_aio(web, address, peer=API, staleness=policy) as channel,
        secure_channel_aio(web, address, peer=API) as warning,
    ):
        echo = channel.unary_unary(NAMES["unary_unary"])
        assert await echo(b"x", timeout=5)
        web.hear_nothing(31)
        assert isinstance(channel._guard.known(), Unsettled)
        with pytest.raises(RevocationsStale) as refused:
            await echo(b"x", timeout=5)
        assert isinstance(refused.value, grpc.RpcError)
        assert await warning.unary_unary(NAMES["unary_unary"])(b"x", timeout=5)
        web.hear_again()
        assert await echo(b"x", timeout=5)
