"""gRPC and revocation: calls that run end, and a server that shows a revoked SVID is not called."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent import futures
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import grpc
import grpc.aio
import pytest

from identity_client import IdentitySnapshot, PeerRejected, PeerRevoked, StalenessPolicy
from identity_client._wire.status import error_from_rpc
from identity_client.integrations.grpc import (
    authorize_peers,
    authorize_peers_aio,
    secure_channel,
    secure_channel_aio,
    server_credentials,
)
from identity_client.integrations.grpc.guard import ServerGuard
from identity_client.revocation import DenySet
from identity_client.testing import FakeIdentitySource, FakeTrustDomain
from support.client import NAMES, echo_server, echo_server_aio

WEB = "spiffe://example.org/web"
API = "spiffe://example.org/api"
SOON = 5.0
KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


@pytest.fixture
def domain() -> FakeTrustDomain:
    return FakeTrustDomain("example.org")


@pytest.fixture
def web(domain: FakeTrustDomain) -> FakeIdentitySource:
    return domain.source(WEB)


@pytest.fixture
def api(domain: FakeTrustDomain) -> FakeIdentitySource:
    return domain.source(API)


class Thief:
    """Goes on with one certificate whatever happens, and hears nothing of revocations."""

    def __init__(self, snapshot: IdentitySnapshot) -> None:
        self._snapshot = snapshot
        self.denied = DenySet()

    def snapshot(self) -> IdentitySnapshot:
        return self._snapshot


# --- servers: calls of a revoked client ----------------------------------------------------------


class Sleepy:
    """Handlers that say nothing, for as long as they may; threaded and asyncio."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.release = threading.Event()
        self.ended: list[str] = []

    def handlers(self, *, aio: bool) -> grpc.GenericRpcHandler:
        names = ("_aio_" if aio else "_") + "{}"
        makers: dict[str, Any] = {
            "unary_unary": grpc.unary_unary_rpc_method_handler,
            "unary_stream": grpc.unary_stream_rpc_method_handler,
            "stream_unary": grpc.stream_unary_rpc_method_handler,
            "stream_stream": grpc.stream_stream_rpc_method_handler,
        }
        table = {kind: make(getattr(self, names.format(kind))) for kind, make in makers.items()}
        return grpc.method_handlers_generic_handler("test.Sleepy", table)

    def _wait(self, kind: str) -> None:
        self.begun.release()
        self.release.wait(30)
        self.ended.append(kind)

    def _unary_unary(self, request: bytes, context: Any) -> bytes:
        self._wait("unary_unary")
        return b""

    def _unary_stream(self, request: bytes, context: Any) -> Iterator[bytes]:
        yield b"begun"
        self._wait("unary_stream")

    def _stream_unary(self, requests: Iterator[bytes], context: Any) -> bytes:
        self.begun.release()
        try:
            list(requests)
        finally:
            self.ended.append("stream_unary")
        return b""

    def _stream_stream(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        yield b"begun"
        self.begun.release()
        try:
            yield from requests
        finally:
            self.ended.append("stream_stream")

    async def _wait_aio(self, kind: str) -> None:
        self.begun.release()
        try:
            await asyncio.sleep(30)
        finally:
            self.ended.append(kind)

    async def _aio_unary_unary(self, request: bytes, context: Any) -> bytes:
        await self._wait_aio("unary_unary")
        return b""

    async def _aio_unary_stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"begun"
        await self._wait_aio("unary_stream")

    async def _aio_stream_unary(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        self.begun.release()
        try:
            async for _ in requests:
                pass
        finally:
            self.ended.append("stream_unary")
        return b""

    async def _aio_stream_stream(
        self, requests: AsyncIterator[bytes], context: Any
    ) -> AsyncIterator[bytes]:
        yield b"begun"
        self.begun.release()
        try:
            async for one in requests:
                yield one
        finally:
            self.ended.append("stream_stream")


@contextmanager
def sleepy_server(source: Any) -> Iterator[tuple[Sleepy, str, Any]]:
    sleepy, interceptor = Sleepy(), authorize_peers(source, WEB)
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=8), interceptors=[interceptor])
    server.add_generic_rpc_handlers((sleepy.handlers(aio=False),))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(source))
    server.start()
    try:
        yield sleepy, f"127.0.0.1:{port}", interceptor
    finally:
        sleepy.release.set()
        server.stop(0).wait()


@asynccontextmanager
async def sleepy_server_aio(
    source: Any, *, threaded: bool = False
) -> AsyncIterator[tuple[Sleepy, str, Any]]:
    sleepy, interceptor = Sleepy(), authorize_peers_aio(source, WEB)
    server = grpc.aio.server(interceptors=[interceptor])
    server.add_generic_rpc_handlers((sleepy.handlers(aio=not threaded),))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(source))
    await server.start()
    try:
        yield sleepy, f"127.0.0.1:{port}", interceptor
    finally:
        sleepy.release.set()
        await server.stop(0)


def start(channel: Any, kind: str, stop: threading.Event) -> Any:
    """A call of that kind that waits for ever."""

    def requests() -> Iterator[bytes]:
        yield b"1"
        stop.wait(30)

    method = getattr(channel, kind)(f"/test.Sleepy/{kind}")
    if kind == "unary_unary":
        return method.future(b"", timeout=30)
    if kind == "stream_unary":
        return method.future(requests(), timeout=30)
    return method(b"" if kind == "unary_stream" else requests(), timeout=30)


def how_it_ended(call: Any, kind: str) -> Any:
    """Its code, which gRPC gives out once every message was read."""
    if kind.endswith("stream"):
        with suppress(grpc.RpcError):
            list(call)
    return call.code()


def running(interceptor: Any) -> int:
    return len(interceptor._gate._running)


def eventually(condition: Any, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_where_nobody_says_anything_ends_with_its_client(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource, kind: str
) -> None:
    stop = threading.Event()
    with (
        sleepy_server(api) as (sleepy, address, interceptor),
        secure_channel(Thief(web.snapshot()), address, peer=API) as channel,
    ):
        call = start(channel, kind, stop)
        assert sleepy.begun.acquire(timeout=5)
        if kind.endswith("stream"):
            assert next(call) == b"begun"
        assert running(interceptor) == 1
        begun = time.monotonic()
        domain.revoke(web)
        assert how_it_ended(call, kind) is grpc.StatusCode.UNAUTHENTICATED
        assert time.monotonic() - begun < SOON
        assert error_from_rpc(call).reason == "PEER_REVOKED"
        if kind.startswith("stream"):
            eventually(lambda: sleepy.ended == [kind])  # Its handler was woken, too.
        stop.set()
        sleepy.release.set()
        eventually(lambda: sleepy.ended == [kind] and running(interceptor) == 0)


# grpc.aio hands a stream of requests to no thread.
@pytest.mark.parametrize(
    ("kind", "threaded"),
    [*((kind, False) for kind in KINDS), ("unary_unary", True), ("unary_stream", True)],
)
async def test_a_call_where_nobody_says_anything_ends_with_its_client_aio(
    domain: FakeTrustDomain,
    web: FakeIdentitySource,
    api: FakeIdentitySource,
    kind: str,
    threaded: bool,
) -> None:
    stop = threading.Event()
    async with sleepy_server_aio(api, threaded=threaded) as (sleepy, address, interceptor):

        def call_and_wait() -> tuple[Any, float]:
            with secure_channel(Thief(web.snapshot()), address, peer=API) as channel:
                call = start(channel, kind, stop)
                assert sleepy.begun.acquire(timeout=5)
                if kind.endswith("stream"):
                    assert next(call) == b"begun"
                begun = time.monotonic()
                domain.revoke(web)
                how_it_ended(call, kind)
                return call, time.monotonic() - begun

        call, took = await asyncio.to_thread(call_and_wait)
        assert call.code() is grpc.StatusCode.UNAUTHENTICATED
        assert took < SOON
        assert error_from_rpc(call).reason == "PEER_REVOKED"
        stop.set()
        if threaded:
            sleepy.release.set()
        async with asyncio.timeout(5):
            while sleepy.ended != [kind] or running(interceptor):
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("writes", [False, True])
async def test_a_call_that_is_being_answered_ends_all_the_same_aio(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource, writes: bool
) -> None:
    """Whatever moment the revocation meets: the client is never left without an end."""

    async def yielding(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"x" * 100_000
        await asyncio.sleep(30)

    async def writing(request: bytes, context: Any) -> None:
        await context.write(b"x" * 100_000)
        await asyncio.sleep(30)

    server = grpc.aio.server(interceptors=[authorize_peers_aio(api, WEB)])
    behavior: Any = writing if writes else yielding
    handler: Any = grpc.unary_stream_rpc_method_handler(behavior)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("test.Busy", {"Answer": handler}),)
    )
    port = server.add_secure_port("127.0.0.1:0", server_credentials(api))
    await server.start()
    codes: list[Any] = []

    async def ask(channel: Any) -> None:
        call = channel.unary_stream("/test.Busy/Answer")(b"", timeout=20)
        with suppress(grpc.RpcError):
            async for _ in call:
                pass
        codes.append(await call.code())

    try:
        for round_number in range(8):
            thief = Thief(web.snapshot())
            async with secure_channel_aio(thief, f"127.0.0.1:{port}", peer=API) as channel:
                await channel.channel_ready()
                asking = [asyncio.create_task(ask(channel)) for _ in range(20)]
                await asyncio.sleep(round_number * 0.003)
                await asyncio.to_thread(domain.revoke, web)
                async with asyncio.timeout(10):
                    await asyncio.gather(*asking)
            web.rotate()
    finally:
        await server.stop(0)
    assert set(codes) == {grpc.StatusCode.UNAUTHENTICATED}


def test_calls_that_ended_are_forgotten(web: FakeIdentitySource, api: FakeIdentitySource) -> None:
    interceptor: Any = authorize_peers(api, WEB)
    with echo_server(api, [WEB]) as address, secure_channel(web, address, peer=API) as channel:
        del interceptor
        for _ in range(20):
            channel.unary_unary(NAMES["unary_unary"])(b"x")
            stream = channel.unary_stream(NAMES["unary_stream"])(b"100")
            next(stream)
            stream.cancel()
        gates = [one for one in gc.get_objects() if type(one).__name__ == "RunningCalls"]
        eventually(lambda: sum(map(len, gates)) == 0)


def test_a_server_refuses_silence_where_it_is_told_to(
    web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    interceptors = [authorize_peers(api, WEB, staleness=StalenessPolicy.refuse(30))]
    server = grpc.server(futures.ThreadPoolExecutor(2), interceptors=interceptors)
    server.add_generic_rpc_handlers((Sleepy().handlers(aio=False),))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(api))
    server.start()
    try:
        with secure_channel(web, f"127.0.0.1:{port}", peer=API) as channel:
            api.hear_nothing(31)
            with pytest.raises(grpc.RpcError) as refused:
                channel.unary_unary("/test.Sleepy/unary_unary")(b"", timeout=5)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert error_from_rpc(refused.value).reason == "REVOCATIONS_STALE"
    finally:
        server.stop(0).wait()


# --- clients: a revoked server -------------------------------------------------------------------


@contextmanager
def two_faced(source: FakeIdentitySource) -> Iterator[tuple[str, list[Any]]]:
    """A server that shows what a test puts into the list, and serves whoever calls."""
    shown: list[Any] = [source]

    class Now:
        def snapshot(self) -> Any:
            return shown[0].snapshot()

        denied = DenySet()

    with echo_server(Now(), [WEB]) as address:
        yield address, shown


def test_calls_to_a_server_that_is_revoked_are_cut_and_a_good_one_is_served(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    with (
        two_faced(api) as (address, shown),
        secure_channel(web, address, peer=API) as channel,
    ):
        echo = channel.unary_unary(NAMES["unary_unary"])
        assert echo(b"x")
        chat = channel.stream_stream(NAMES["stream_stream"])
        hold = threading.Event()

        def requests() -> Iterator[bytes]:
            yield b"1"
            hold.wait(30)

        call = chat(requests(), timeout=30)
        assert next(call) == b"1"
        shown[0] = Thief(api.snapshot())
        begun = time.monotonic()
        domain.revoke(api)
        with pytest.raises(grpc.RpcError):
            next(call)
        assert time.monotonic() - begun < SOON
        assert call.code() is grpc.StatusCode.CANCELLED
        hold.set()
        # It still shows what was revoked.
        for _ in range(3):
            with pytest.raises(PeerRevoked) as refused:
                echo(b"x", timeout=5)
            assert refused.value.reason == "PEER_REVOKED"
            assert isinstance(refused.value, grpc.RpcError)
            assert error_from_rpc(refused.value).reason == "PEER_REVOKED"
        with pytest.raises(PeerRevoked):
            list(chat(iter([b"1"]), timeout=5))
        # It was given another.
        api.rotate()
        shown[0] = Thief(api.snapshot())
        eventually(lambda: _answers(echo))
        assert list(chat(iter([b"1", b"2"]), timeout=5)) == [b"1", b"2"]
        # And is renewed as usual: a new connection may fail once, the next is good.
        api.rotate()
        shown[0] = Thief(api.snapshot())
        web.rotate()
        eventually(lambda: _answers(echo))


def _answers(echo: Any) -> bool:
    try:
        return bool(echo(b"x", timeout=5))
    except grpc.RpcError:
        return False


def test_a_blocked_call_says_why_it_was_cut(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    with (
        sleepy_server(Thief(api.snapshot())) as (sleepy, address, _),
        secure_channel(web, address, peer=API) as channel,
    ):
        method = channel.unary_unary("/test.Sleepy/unary_unary")
        with futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(method, b"", timeout=30)
            assert sleepy.begun.acquire(timeout=5)
            domain.revoke(api)
            with pytest.raises(PeerRevoked) as cut:
                waiting.result(timeout=SOON)
        assert cut.value.code() is grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]


def test_a_server_between_looks_is_held_to_what_it_showed(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    """Who shows the good certificate to the look and the stolen one to the call gains nothing."""
    stolen = Thief(api.snapshot())
    with two_faced(api) as (address, shown), secure_channel(web, address, peer=API) as channel:
        echo = channel.unary_unary(NAMES["unary_unary"])
        domain.revoke(api)
        api.rotate()
        assert channel._guard.pins() is not None  # looked at, and good
        shown[0] = stolen
        with pytest.raises(grpc.RpcError) as refused:
            echo(b"x", timeout=5)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(PeerRevoked):
            echo(b"x", timeout=5)


def test_another_identity_s_revocation_disturbs_nobody(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    other = domain.source("spiffe://example.org/other")
    with echo_server(api, [WEB]) as address, secure_channel(web, address, peer=API) as channel:
        stream = channel.unary_stream(NAMES["unary_stream"])(b"30", timeout=10)
        next(stream)
        domain.revoke(other)
        assert len(list(stream)) == 29
        assert channel._guard.known() is None


async def test_calls_to_a_server_that_is_revoked_are_cut_and_a_good_one_is_served_aio(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    shown: list[Any] = [api]

    class Now:
        def snapshot(self) -> Any:
            return shown[0].snapshot()

        denied = DenySet()

    async with (
        echo_server_aio(Now(), [WEB]) as address,
        secure_channel_aio(web, address, peer=API) as channel,
    ):
        echo = channel.unary_unary(NAMES["unary_unary"])
        repeat = channel.unary_stream(NAMES["unary_stream"])
        join = channel.stream_unary(NAMES["stream_unary"])
        chat = channel.stream_stream(NAMES["stream_stream"])
        assert await echo(b"x")
        call = chat(timeout=30)
        await call.write(b"1")
        assert await call.read() == b"1"
        shown[0] = Thief(api.snapshot())
        begun = time.monotonic()
        # As in real life: from another thread than the channel's.
        await asyncio.to_thread(domain.revoke, api)
        with pytest.raises(asyncio.CancelledError):
            await call.read()
        assert time.monotonic() - begun < SOON
        for _ in range(2):
            with pytest.raises(PeerRevoked) as refused:
                await echo(b"x", timeout=5)
            assert refused.value.reason == "PEER_REVOKED"
        with pytest.raises(PeerRevoked):
            async for _ in repeat(b"2", timeout=5):
                pass
        api.rotate()
        shown[0] = Thief(api.snapshot())
        await asyncio.sleep(0.3)
        assert await echo(b"x", timeout=5) == b"x|" + WEB.encode()
        assert [one async for one in repeat(b"2", timeout=5)] == [b"x", b"x"]
        assert await join(iter([b"1", b"2"]), timeout=5) == b"1,2"
        assert [one async for one in chat(iter([b"1", b"2"]), timeout=5)] == [b"1", b"2"]


async def test_all_kinds_of_call_wait_for_the_look_aio(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    async with echo_server_aio(api, [WEB]) as address:
        domain.revoke(api)
        api.rotate()
        for kind, expected in (
            ("unary_unary", b"1|" + WEB.encode()),
            ("unary_stream", [b"x"]),
            ("stream_unary", b"1,2"),
            ("stream_stream", [b"1", b"2"]),
        ):
            async with secure_channel_aio(web, address, peer=API) as channel:
                method = getattr(channel, kind)(NAMES[kind])
                request: Any = iter([b"1", b"2"]) if kind.startswith("stream") else b"1"
                call = method(request, timeout=5)
                if isinstance(expected, list):
                    assert [one async for one in call] == expected
                else:
                    assert await call == expected
                assert await call.code() is grpc.StatusCode.OK


@pytest.mark.parametrize(
    ("target", "addresses"),
    [
        ("127.0.0.1:8443", 1),
        ("ipv4:127.0.0.1:8443,127.0.0.2:8443", 2),
        ("ipv6:[::1]:8443", 1),
        ("dns:///localhost:8443", 1),
        ("dns://1.1.1.1/localhost:8443", 1),
        ("localhost", 1),
        ("unix:/run/api.sock", 1),
        ("unix:///run/api.sock", 1),
        ("unix-abstract:api", 1),
    ],
)
def test_a_target_is_looked_at_where_grpc_would_connect(target: str, addresses: int) -> None:
    from identity_client.integrations.grpc.guard import _addresses

    found = list(_addresses(target))
    assert len(found) >= addresses
    assert all(where for _, where in found)


@pytest.mark.parametrize("target", ["xds:///api", "custom://a/b", "api:port", ""])
def test_a_target_that_cannot_be_looked_at_is_refused(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource, target: str
) -> None:
    guard = ServerGuard(web, API, target, lambda doomed, why: None)
    assert guard.pins() is None
    domain.revoke(api)
    with pytest.raises(PeerRejected) as refused:
        guard.pins()
    assert refused.value.reason == "SERVER_UNSEEN"


def test_a_server_that_does_not_answer_is_unavailable(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    domain.revoke(api)
    with secure_channel(web, "127.0.0.1:1", peer=API) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary("/a/b")(b"", timeout=5)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def test_nothing_is_left_behind(
    domain: FakeTrustDomain, web: FakeIdentitySource, api: FakeIdentitySource
) -> None:
    before = {thread.name for thread in threading.enumerate()}
    with echo_server(api, [WEB]) as address:
        for _ in range(3):
            with secure_channel(web, address, peer=API) as channel:
                echo = channel.unary_unary(NAMES["unary_unary"])
                domain.revoke(api)
                with pytest.raises(grpc.RpcError):
                    echo(b"x", timeout=5)
                api.rotate()
                eventually(lambda echo=echo: _answers(echo))
    gc.collect()
    assert len(list(web.denied._watchers)) <= 1  # the collector may be late by one

    def ours() -> set[str]:
        names = {thread.name for thread in threading.enumerate()} - before
        return {name for name in names if name.startswith("identity-")}

    eventually(lambda: not ours())
