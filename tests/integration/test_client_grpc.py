"""gRPC over the SDK: rotation without a failed call, and who is refused."""

from __future__ import annotations

import asyncio
import threading
import time
from datetime import timedelta

import grpc
import pytest

from identity_client import (
    IdentitySnapshot,
    PeerExpired,
    PeerRejected,
    PeerRevoked,
    SettingsInvalid,
    SourceError,
)
from identity_client._wire.status import error_from_rpc
from identity_client.integrations.grpc import secure_channel, secure_channel_aio
from identity_client.integrations.grpc.channel_arguments import channel_options
from identity_client.revocation import DenySet
from identity_client.testing import FakeIdentitySource, FakeTrustDomain
from support.client import NAMES, echo_server, echo_server_aio

WEB = "spiffe://example.org/web"
API = "spiffe://example.org/api"


@pytest.fixture
def domain() -> FakeTrustDomain:
    return FakeTrustDomain("example.org")


@pytest.fixture
def web(domain: FakeTrustDomain) -> FakeIdentitySource:
    return domain.source(WEB)


@pytest.fixture
def api(domain: FakeTrustDomain) -> FakeIdentitySource:
    return domain.source(API)


def reason_of(error: grpc.RpcError) -> str:
    return error_from_rpc(error).reason


def test_all_four_kinds_of_call(web: FakeIdentitySource, api: FakeIdentitySource) -> None:
    with (
        echo_server(api, [WEB]) as address,
        secure_channel(web, address, peer=API) as channel,
    ):
        for _ in range(2):
            assert channel.unary_unary(NAMES["unary_unary"])(b"a") == b"a|" + WEB.encode()
            assert list(channel.unary_stream(NAMES["unary_stream"])(b"3")) == [b"x"] * 3
            assert channel.stream_unary(NAMES["stream_unary"])(iter([b"1", b"2"])) == b"1,2"
            chat = channel.stream_stream(NAMES["stream_stream"])
            assert list(chat(iter([b"1", b"2"]))) == [b"1", b"2"]
            response, call = channel.unary_unary(NAMES["unary_unary"]).with_call(b"b")
            assert response.startswith(b"b|")
            assert call.code() is grpc.StatusCode.OK
            assert channel.unary_unary(NAMES["unary_unary"]).future(b"c").result(timeout=5)
            web.rotate()


async def test_all_four_kinds_of_call_aio(web: FakeIdentitySource, api: FakeIdentitySource) -> None:
    async with (
        echo_server_aio(api, [WEB]) as address,
        secure_channel_aio(web, address, peer=API) as channel,
    ):
        for _ in range(2):
            assert await channel.unary_unary(NAMES["unary_unary"])(b"a") == b"a|" + WEB.encode()
            repeated = channel.unary_stream(NAMES["unary_stream"])(b"3")
            assert [one async for one in repeated] == [b"x"] * 3
            assert await channel.stream_unary(NAMES["stream_unary"])(iter([b"1", b"2"])) == b"1,2"
            chat = channel.stream_stream(NAMES["stream_stream"])(iter([b"1", b"2"]))
            assert [one async for one in chat] == [b"1", b"2"]
            web.rotate()


def test_rotation_under_load_fails_no_call(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    failed: list[grpc.RpcError] = []
    done = [0]
    stop = threading.Event()
    with (
        echo_server(api, [WEB]) as address,
        secure_channel(web, address, peer=API) as channel,
    ):
        echo = channel.unary_unary(NAMES["unary_unary"])
        repeat = channel.unary_stream(NAMES["unary_stream"])

        def load(streaming: bool) -> None:
            while not stop.is_set():
                try:
                    if streaming:
                        assert len(list(repeat(b"20", timeout=10))) == 20
                    else:
                        echo(b"x", timeout=10)
                except grpc.RpcError as error:
                    failed.append(error)
                done[0] += 1

        threads = [threading.Thread(target=load, args=(n == 0,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(12):
            time.sleep(0.1)
            web.rotate()
            api.rotate()
        stop.set()
        for thread in threads:
            thread.join()
        assert failed == []
        assert done[0] > 50
        echo(b"last")
        assert channel.draining == 0


async def test_rotation_under_load_fails_no_call_aio(
    web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    done = 0
    stopping = False
    async with (
        echo_server_aio(api, [WEB]) as address,
        secure_channel_aio(web, address, peer=API) as channel,
    ):
        echo = channel.unary_unary(NAMES["unary_unary"])
        repeat = channel.unary_stream(NAMES["unary_stream"])

        async def load(streaming: bool) -> None:
            nonlocal done
            while not stopping:
                if streaming:
                    assert len([one async for one in repeat(b"20", timeout=10)]) == 20
                else:
                    await echo(b"x", timeout=10)
                done += 1

        loads = [asyncio.create_task(load(n == 0)) for n in range(4)]
        for _ in range(12):
            await asyncio.sleep(0.1)
            web.rotate()
            api.rotate()
        stopping = True
        await asyncio.gather(*loads)
        assert done > 50
        await echo(b"last")
        await asyncio.sleep(0)
        assert channel.draining == 0


def test_a_new_authority_is_followed_by_both_sides(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    with echo_server(api, [WEB]) as address, secure_channel(web, address, peer=API) as channel:
        echo = channel.unary_unary(NAMES["unary_unary"])
        echo(b"x")
        domain.replace_authority()
        api.rotate()
        web.rotate()
        assert echo(b"x", timeout=5).startswith(b"x|")


def test_the_wrong_server_is_refused_in_the_handshake(
    domain: FakeTrustDomain, web: FakeIdentitySource
) -> None:
    impostor = domain.source("spiffe://example.org/impostor")
    with (
        echo_server(impostor, [WEB]) as address,
        secure_channel(web, address, peer=API) as channel,
        pytest.raises(grpc.RpcError) as refused,
    ):
        channel.unary_unary(NAMES["unary_unary"])(b"x", timeout=5)
    assert reason_of(refused.value) == "BROKER_TLS_FAILED"


def test_a_server_of_another_authority_is_refused(web: FakeIdentitySource) -> None:
    other = FakeTrustDomain("example.org").source(API)
    with (
        echo_server(other, [WEB]) as address,
        secure_channel(web, address, peer=API) as channel,
        pytest.raises(grpc.RpcError) as refused,
    ):
        channel.unary_unary(NAMES["unary_unary"])(b"x", timeout=5)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("authorize", [[], [API], lambda peer: False])
def test_an_unnamed_client_is_refused(
    web: FakeIdentitySource, api: FakeIdentitySource, authorize: object
) -> None:
    with echo_server(api, authorize) as address, secure_channel(web, address, peer=API) as channel:
        for kind, argument in (("unary_unary", b"1"), ("stream_unary", iter([b"1"]))):
            with pytest.raises(grpc.RpcError) as refused:
                getattr(channel, kind)(NAMES[kind])(argument, timeout=5)
            assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
            assert type(error_from_rpc(refused.value)) is PeerRejected
        with pytest.raises(grpc.RpcError):
            list(channel.unary_stream(NAMES["unary_stream"])(b"3", timeout=5))


def test_a_client_without_a_certificate_is_refused(api: FakeIdentitySource) -> None:
    credentials = grpc.ssl_channel_credentials(api.snapshot().bundle.roots_pem)
    options = channel_options(API, None)
    with (
        echo_server(api, lambda peer: True) as address,
        grpc.secure_channel(address, credentials, options) as channel,
        pytest.raises(grpc.RpcError),
    ):
        channel.unary_unary(NAMES["unary_unary"])(b"x", timeout=5)  # type: ignore[arg-type]


def test_a_revoked_client_is_refused_on_an_open_connection(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    stale = web.snapshot()
    with (
        echo_server(api, [WEB]) as address,
        secure_channel(FrozenSource(stale, web), address, peer=API) as channel,
    ):
        echo = channel.unary_unary(NAMES["unary_unary"])
        echo(b"x")
        stream = channel.unary_stream(NAMES["unary_stream"])(b"500", timeout=10)
        next(stream)
        domain.revoke(web)
        with pytest.raises(grpc.RpcError) as refused:
            echo(b"x")
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert type(error_from_rpc(refused.value)) is PeerRevoked
        with pytest.raises(grpc.RpcError) as cut:
            list(stream)
        assert reason_of(cut.value) == "PEER_REVOKED"
        web.rotate()
        with secure_channel(web, address, peer=API) as renewed:
            assert renewed.unary_unary(NAMES["unary_unary"])(b"x")


async def test_a_revoked_client_is_refused_on_an_open_connection_aio(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    frozen = FrozenSource(web.snapshot(), web)
    async with (
        echo_server_aio(api, [WEB]) as address,
        secure_channel_aio(frozen, address, peer=API) as channel,
    ):
        echo = channel.unary_unary(NAMES["unary_unary"])
        await echo(b"x")
        stream = channel.unary_stream(NAMES["unary_stream"])(b"500", timeout=10)
        chat = channel.stream_stream(NAMES["stream_stream"])(timeout=10)
        await chat.write(b"hello")
        assert await chat.read() == b"hello"
        assert await anext(aiter(stream)) == b"x"
        domain.revoke(web)
        with pytest.raises(grpc.RpcError) as refused:
            await echo(b"x")
        assert type(error_from_rpc(refused.value)) is PeerRevoked
        with pytest.raises(grpc.RpcError) as cut:
            async for _ in stream:
                pass
        assert reason_of(cut.value) == "PEER_REVOKED"
        with pytest.raises(grpc.RpcError) as silenced:  # Nobody said anything.
            await chat.read()
        assert reason_of(silenced.value) == "PEER_REVOKED"


def test_a_client_that_expired_on_an_open_connection_is_refused(
    domain: FakeTrustDomain, api: FakeIdentitySource
) -> None:
    brief = domain.source(WEB, ttl=timedelta(seconds=1.5))
    with (
        echo_server(api, [WEB]) as address,
        secure_channel(FrozenSource(brief.snapshot(), brief), address, peer=API) as channel,
    ):
        echo = channel.unary_unary(NAMES["unary_unary"])
        echo(b"x")
        time.sleep(1.6)
        with pytest.raises(grpc.RpcError) as refused:
            echo(b"x")
        assert type(error_from_rpc(refused.value)) is PeerExpired


def test_a_revoked_server_refuses_to_serve(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    ignorant = FrozenSource(web.snapshot(), domain.source(WEB))
    domain.sources.pop()  # It hears nothing of revocations.
    with (
        echo_server(api, [WEB]) as address,
        secure_channel(ignorant, address, peer=API) as channel,
    ):
        echo = channel.unary_unary(NAMES["unary_unary"])
        echo(b"x")
        domain.revoke(api)
        with pytest.raises(grpc.RpcError) as refused:
            echo(b"x")
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert reason_of(refused.value) == "IDENTITY_REVOKED"


def test_a_revoked_client_does_not_even_call(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    with echo_server(api, [WEB]) as address, secure_channel(web, address, peer=API) as channel:
        echo = channel.unary_unary(NAMES["unary_unary"])
        echo(b"x")
        domain.revoke(web)
        with pytest.raises(SourceError):
            echo(b"x")


def test_a_closed_channel_says_so(web: FakeIdentitySource) -> None:
    channel = secure_channel(web, "127.0.0.1:1", peer=API)
    channel.close()
    with pytest.raises(SourceError, match="channel is closed"):
        channel.unary_unary("/a/b")(b"")


def test_the_pinned_name_is_not_an_option(domain: FakeTrustDomain, web: FakeIdentitySource) -> None:
    impostor = domain.source("spiffe://example.org/impostor")
    name = ("grpc.ssl_target_name_override", "anything")
    with (
        echo_server(impostor, [WEB]) as address,
        secure_channel(web, address, peer=API, options=[name]) as channel,
        pytest.raises(grpc.RpcError),
    ):
        channel.unary_unary(NAMES["unary_unary"])(b"x", timeout=5)
    with pytest.raises(SettingsInvalid):
        secure_channel(web, "127.0.0.1:1", peer="api")


def test_connectivity_is_reported_across_generations(
    web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    with echo_server(api, [WEB]) as address, secure_channel(web, address, peer=API) as channel:
        grpc.channel_ready_future(channel).result(timeout=5)
        ready = threading.Event()

        def watch(state: grpc.ChannelConnectivity) -> None:
            if state is grpc.ChannelConnectivity.READY:
                ready.set()

        channel.subscribe(watch, try_to_connect=True)
        assert ready.wait(5)
        ready.clear()
        web.rotate()
        channel.unary_unary(NAMES["unary_unary"])(b"x")
        assert ready.wait(5)
        channel.unsubscribe(watch)


class FrozenSource:
    """A client that goes on with one certificate whatever happens: what a thief does."""

    def __init__(self, snapshot: IdentitySnapshot, source: FakeIdentitySource) -> None:
        self._snapshot = snapshot
        self._denied = source.denied

    def snapshot(self) -> IdentitySnapshot:
        return self._snapshot

    @property
    def denied(self) -> DenySet:
        return self._denied
