from __future__ import annotations

import asyncio
import os
import socket
import ssl
import stat
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from identity_api.broker.v1 import bundle_pb2, entry_pb2
from identity_broker.domain.caller import Caller, CallerClass, ListenerKind, LocalPeer
from identity_broker.errors import ConfigError, Unauthenticated
from identity_broker.server.rpc.health import Health
from identity_broker.server.rpc.listener import BootstrapListener, LocalListener, MtlsListener
from identity_broker.server.rpc.reflection import reflection_services
from support.rpc import ENTRY_LIST, GET, NONE, WATCH, Shell, empty_bundle, everybody, unix_channel
from support.tls_material import TestAuthority, key_usage

NODE = "spiffe://example.org/idb/node/join_token/a"


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return refused.value


# --- TLS ----------------------------------------------------------------------------------------


async def test_mtls_lets_nobody_in_without_a_certificate_of_the_bundle() -> None:
    shell = Shell({GET: empty_bundle})
    stranger = TestAuthority("another root").issue(NODE)
    async with shell.mtls() as listener:
        for client in (None, stranger):
            async with shell.channel(listener.address, client) as channel:
                error = await refusal(channel.unary_unary(GET)(b"", timeout=5))
                assert error.code() is grpc.StatusCode.UNAVAILABLE
        async with shell.channel(listener.address, shell.authority.issue(NODE)) as channel:
            await channel.unary_unary(GET)(b"")
    assert shell.count(GET, "OK") == 1


@pytest.mark.parametrize(
    "uris",
    [
        (),
        (NODE, "spiffe://example.org/other"),
        ("https://example.org/a",),
        ("spiffe://example.org",),
    ],
)
async def test_a_certificate_that_is_no_svid_is_refused(uris: tuple[str, ...]) -> None:
    shell = Shell({GET: empty_bundle})
    async with (
        shell.mtls() as listener,
        shell.channel(listener.address, shell.authority.issue(*uris)) as channel,
    ):
        error = await refusal(channel.unary_unary(GET)(b"", timeout=5))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert shell.count(GET, "UNAUTHENTICATED") == 1


async def test_a_signing_certificate_is_no_identity() -> None:
    shell = Shell({GET: empty_bundle})
    signer = shell.authority.issue(
        NODE, ca=True, usage=key_usage("digital_signature", "key_cert_sign")
    )
    async with shell.mtls() as listener, shell.channel(listener.address, signer) as channel:
        error = await refusal(channel.unary_unary(GET)(b"", timeout=5))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        assert "leaf" in (error.details() or "")


async def test_the_authenticator_sees_identity_serial_and_expiry() -> None:
    seen: list[Any] = []

    def authenticate(*arguments: Any) -> Caller:
        seen.append(arguments)
        return everybody(*arguments)

    not_after = datetime.now(UTC).replace(microsecond=0) + timedelta(minutes=7)
    shell = Shell({GET: empty_bundle}, authenticate=authenticate)
    client = shell.authority.issue(NODE, not_after=not_after, serial=0xABC)
    async with shell.mtls() as listener, shell.channel(listener.address, client) as channel:
        await channel.unary_unary(GET)(b"")
        await channel.unary_unary(GET)(b"")
    kind, peer, address = seen[0]
    assert kind is ListenerKind.MTLS
    assert str(peer.spiffe_id) == NODE
    assert peer.serial == "abc".rjust(40, "0")
    assert peer.not_after == not_after
    assert peer.authority_key_id == shell.authority.key_id
    assert address.startswith("ipv4:127.0.0.1:")
    assert seen[1][1] is peer  # parsed once


async def test_server_certificate_and_roots_rotate_without_a_restart() -> None:
    first, second = TestAuthority("first"), TestAuthority("second")
    current = [first.broker()]
    shell = Shell({GET: empty_bundle})
    listener = MtlsListener("127.0.0.1:0", current_tls=lambda: current[0])
    await listener.start(shell.handlers(ListenerKind.MTLS))

    async def call(server_root: TestAuthority, client_root: TestAuthority) -> None:
        pair = client_root.issue(NODE)
        credentials = grpc.ssl_channel_credentials(server_root.pem, pair.key_pem, pair.chain_pem)
        options = (("grpc.use_local_subchannel_pool", 1),)
        channel: Any = grpc.aio.secure_channel(listener.address, credentials, options)
        async with channel:
            await channel.unary_unary(GET)(b"", timeout=5)

    try:
        await call(first, first)
        await refusal(call(first, second))
        current[0] = second.broker(roots=second.pem + first.pem)
        await call(second, second)
        await call(second, first)  # both roots count while the bundle holds both
        current[0] = second.broker()
        await refusal(call(second, first))
    finally:
        await listener.stop(NONE)


async def test_material_that_cannot_be_had_leaves_the_last_generation_serving() -> None:
    authority = TestAuthority()
    tls = [authority.broker()]

    def current() -> Any:
        return tls.pop() if tls else 1 / 0

    shell = Shell({GET: empty_bundle}, authority=authority)
    listener = BootstrapListener("127.0.0.1:0", current_tls=current)
    await listener.start(shell.handlers(ListenerKind.BOOTSTRAP))
    try:
        async with shell.channel(listener.address, None) as channel:
            await channel.unary_unary(GET)(b"", timeout=5)
    finally:
        await listener.stop(NONE)


async def test_a_taken_port_is_a_configuration_error() -> None:
    shell = Shell({GET: empty_bundle})
    tls = shell.authority.broker()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        listener = BootstrapListener(address, current_tls=lambda: tls)
        with pytest.raises(ConfigError, match=f"cannot listen on {address}"):
            await listener.start(shell.handlers(ListenerKind.BOOTSTRAP))


async def test_draining_lets_running_calls_end_and_refuses_new_ones() -> None:
    entered = asyncio.Event()

    async def get(_request: Any, _call: Any) -> Any:
        entered.set()
        await asyncio.sleep(0.3)
        return bundle_pb2.GetBundleResponse()

    async def watch(_request: Any, call: Any) -> AsyncIterator[Any]:
        yield bundle_pb2.WatchBundleResponse()
        await call.stopping.wait()

    shell = Shell({GET: get, WATCH: watch})
    tls = shell.authority.broker()
    listener = BootstrapListener("127.0.0.1:0", current_tls=lambda: tls)
    await listener.start(shell.handlers(ListenerKind.BOOTSTRAP))
    async with shell.channel(listener.address, None) as channel:
        stream = channel.unary_stream(WATCH)(b"")
        await stream.read()
        running = channel.unary_unary(GET)(b"")
        await asyncio.wait_for(entered.wait(), 5)
        shell.stopping.set()
        started = asyncio.get_running_loop().time()
        await listener.stop(timedelta(seconds=5))
        assert asyncio.get_running_loop().time() - started < 4
        assert await running == b""
        assert await stream.read() is grpc.aio.EOF
        error = await refusal(channel.unary_unary(GET)(b"", timeout=2))
        assert error.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}


async def test_a_call_that_does_not_end_is_cancelled_after_the_grace() -> None:
    entered, cancelled = asyncio.Event(), asyncio.Event()

    async def get(_request: Any, _call: Any) -> Any:
        entered.set()
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    shell = Shell({GET: get})
    tls = shell.authority.broker()
    listener = BootstrapListener("127.0.0.1:0", current_tls=lambda: tls)
    await listener.start(shell.handlers(ListenerKind.BOOTSTRAP))
    async with shell.channel(listener.address, None) as channel:
        call = channel.unary_unary(GET)(b"")
        waiting = asyncio.create_task(refusal(call))
        await asyncio.wait_for(entered.wait(), 5)
        await listener.stop(timedelta(seconds=0.2))
        await waiting
        await asyncio.wait_for(cancelled.wait(), 5)


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _calls_and_never_reads(address: str, method: str) -> socket.socket:
    """An HTTP/2 peer with room for everything, as far as it says."""
    host, _, port = address.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    connection = context.wrap_socket(socket.create_connection((host, int(port))))
    headers = {
        ":method": "POST",
        ":scheme": "https",
        ":path": method,
        ":authority": "x",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    packed = b"".join(
        b"\0" + bytes([len(key)]) + key.encode() + bytes([len(value)]) + value.encode()
        for key, value in headers.items()
    )
    connection.sendall(
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        + _frame(4, 0, 0, struct.pack(">HI", 4, 2**31 - 1))
        + _frame(8, 0, 0, struct.pack(">I", 2**30))
        + _frame(1, 4, 1, packed)
        + _frame(0, 1, 1, b"\0" * 5)
    )
    return connection


async def test_a_peer_that_reads_nothing_does_not_hold_the_end_up() -> None:
    entered = asyncio.Event()
    long = bundle_pb2.WatchBundleResponse()
    long.bundle.trust_domain = "x" * 500_000

    async def watch(_request: Any, _call: Any) -> AsyncIterator[Any]:
        entered.set()
        while True:
            yield long

    shell = Shell({WATCH: watch})
    tls = shell.authority.broker()
    listener = BootstrapListener("127.0.0.1:0", current_tls=lambda: tls)
    await listener.start(shell.handlers(ListenerKind.BOOTSTRAP))
    bystander = Shell({GET: empty_bundle})
    async with bystander.bootstrap() as other:
        await other.unary_unary(GET)(b"")
        before = len(list(Path("/proc/self/fd").iterdir()))
        with await asyncio.to_thread(_calls_and_never_reads, listener.address, WATCH):
            await asyncio.wait_for(entered.wait(), 5)
            await asyncio.sleep(0.3)  # until nothing more fits into its buffers
            started = asyncio.get_running_loop().time()
            await listener.stop(timedelta(seconds=0.2))
            assert asyncio.get_running_loop().time() - started < 3
        assert len(list(Path("/proc/self/fd").iterdir())) <= before
        # Nothing but that listener's connections was ended.
        await other.unary_unary(GET)(b"", timeout=5)


# --- the admin socket -----------------------------------------------------------------------------


async def test_the_admin_socket_says_which_process_calls(tmp_path: Path) -> None:
    seen: list[Any] = []

    async def entries(_request: Any, call: Any) -> Any:
        seen.append(call.caller)
        return entry_pb2.ListEntriesResponse()

    path = tmp_path / "admin.sock"
    shell = Shell({ENTRY_LIST: entries})
    async with shell.local(path) as listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE((tmp_path / ".admin.sock").stat().st_mode) == 0o700
        async with unix_channel(listener.address) as channel:
            await channel.unary_unary(ENTRY_LIST)(b"")
        assert seen[0].local == LocalPeer(
            os.getpid(), os.geteuid(), os.getegid(), frozenset(os.getgroups())
        )
        # Another process is another pid.
        code = (
            "import grpc,sys\n"
            f"c=grpc.insecure_channel({listener.address!r})\n"
            f"c.unary_unary({ENTRY_LIST!r})(b'',timeout=10); c.close()"
        )
        child = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
        assert await child.wait() == 0
        assert seen[1].local.pid == child.pid
    assert not path.exists()
    assert not (tmp_path / ".admin.sock").exists()


async def test_a_group_may_be_let_in(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    async with Shell({GET: empty_bundle}).local(path, gid=os.getegid()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert path.stat().st_gid == os.getegid()


async def test_the_authenticator_may_refuse_a_user(tmp_path: Path) -> None:
    def authenticate(_listener: Any, peer: Any, _address: str) -> Caller:
        if peer.uid == os.geteuid():
            raise Unauthenticated
        return Caller(frozenset({CallerClass.LOCAL}), "uid")

    shell = Shell({GET: empty_bundle}, authenticate=authenticate)
    async with (
        shell.local(tmp_path / "a.sock") as listener,
        unix_channel(listener.address) as channel,
    ):
        error = await refusal(channel.unary_unary(GET)(b""))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_the_inner_socket_knows_nobody_who_comes_by_himself(tmp_path: Path) -> None:
    async with Shell({GET: empty_bundle}).local(tmp_path / "a.sock"):
        inner = tmp_path / ".a.sock" / "s"
        async with unix_channel(f"unix:{inner}") as channel:
            error = await refusal(channel.unary_unary(GET)(b""))
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_second_broker_does_not_take_a_live_socket(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    shell = Shell({GET: empty_bundle})
    async with shell.local(path) as listener:
        with pytest.raises(ConfigError, match="another process listens"):
            async with shell.local(path):
                pass
        async with unix_channel(listener.address) as channel:
            await channel.unary_unary(GET)(b"")  # and the first one serves on


async def test_a_killed_broker_s_socket_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    code = (
        "import socket,os,sys\n"
        f"s=socket.socket(socket.AF_UNIX); s.bind({str(path)!r}); s.listen()\n"
        "os.kill(os.getpid(), 9)"
    )
    await asyncio.to_thread(subprocess.run, [sys.executable, "-c", code], check=False)
    inner = tmp_path / ".admin.sock"
    inner.mkdir()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(inner / "s"))
    assert path.exists()
    shell = Shell({GET: empty_bundle})
    async with (
        shell.local(path) as listener,
        unix_channel(listener.address) as channel,
    ):
        await channel.unary_unary(GET)(b"")


async def test_a_file_in_the_way_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="is not a socket"):
        async with Shell({GET: empty_bundle}).local(path):
            pass
    assert path.read_text() == "precious"


async def test_a_path_too_long_for_unix_is_a_configuration_error(tmp_path: Path) -> None:
    listener = LocalListener(tmp_path / ("x" * 110))
    with pytest.raises(ConfigError, match="may have at most 104 bytes"):
        await listener.start([])


async def test_a_thousand_calls_over_many_connections(tmp_path: Path) -> None:
    shell = Shell({GET: empty_bundle})
    async with shell.local(tmp_path / "a.sock") as listener:

        async def client() -> None:
            options = (("grpc.use_local_subchannel_pool", 1),)
            async with unix_channel(listener.address, options) as channel:
                for _ in range(25):
                    await channel.unary_unary(GET)(b"")

        await asyncio.gather(*(client() for _ in range(40)))
    assert shell.count(GET, "OK") == 1000


# --- health and reflection -----------------------------------------------------------------------


async def test_health_on_all_three_listeners(tmp_path: Path) -> None:
    health = Health(["identity_api.broker.v1.Svid"])
    shell = Shell(health.services())
    client = shell.authority.issue(NODE)
    serving = health_pb2.HealthCheckResponse.SERVING
    not_serving = health_pb2.HealthCheckResponse.NOT_SERVING

    async def check(channel: grpc.aio.Channel, name: str = "") -> Any:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        return (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status

    async with (
        shell.bootstrap() as bootstrap,
        shell.mtls() as mtls,
        shell.channel(mtls.address, client) as over_mtls,
        shell.local(tmp_path / "a.sock") as local,
        unix_channel(local.address) as over_unix,
    ):
        for channel in (bootstrap, over_mtls, over_unix):
            assert await check(channel) == not_serving
        health.set_all(True)
        for channel in (bootstrap, over_mtls, over_unix):
            assert await check(channel) == serving
            assert await check(channel, "identity_api.broker.v1.Svid") == serving
        health.set("identity_api.broker.v1.Svid", False)
        assert await check(bootstrap, "identity_api.broker.v1.Svid") == not_serving
        assert await check(bootstrap) == serving
        error = await refusal(check(bootstrap, "nothing"))
        assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_health_watchers_are_told_and_let_go() -> None:
    health = Health([])
    shell = Shell(health.services())
    async with shell.bootstrap() as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        health.set("", True)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        unknown = stub.Watch(health_pb2.HealthCheckRequest(service="x"))
        assert (await unknown.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        shell.stopping.set()
        health.set_all(False)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert await watch.read() is grpc.aio.EOF
        assert await unknown.read() is grpc.aio.EOF
        listing = await stub.List(vars(health_pb2)["HealthListRequest"]())
        assert set(listing.statuses) == {""}


async def test_reflection_lists_what_is_served() -> None:
    services = {GET: empty_bundle, **Health([]).services()}
    shell = Shell({**services, **reflection_services(services)})
    async with shell.bootstrap() as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        stream = stub.ServerReflectionInfo(
            iter(
                [
                    reflection_pb2.ServerReflectionRequest(list_services=""),
                    reflection_pb2.ServerReflectionRequest(
                        file_containing_symbol="identity_api.broker.v1.Bundle"
                    ),
                    reflection_pb2.ServerReflectionRequest(file_by_filename="no/such.proto"),
                ]
            )
        )
        listed, described, missing = [answer async for answer in stream]
    assert [service.name for service in listed.list_services_response.service] == [
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "identity_api.broker.v1.Bundle",
    ]
    assert described.file_descriptor_response.file_descriptor_proto
    assert missing.HasField("error_response")
