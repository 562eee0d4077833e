from __future__ import annotations

import asyncio
import os
import select
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from identity_broker.domain.caller import LocalPeer
from identity_broker.errors import Unauthenticated
from identity_broker.localpeer.credentials import process_of
from identity_broker.localpeer.endpoint import open_endpoint
from identity_broker.localpeer.splice import Splice

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def spliced(tmp_path: Path, handler: Handler, limit: int = 64) -> AsyncIterator[Splice]:
    inner = tmp_path / "inner"
    writers: list[asyncio.StreamWriter] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with suppress(ConnectionError):
            await handler(reader, writer)

    server = await asyncio.start_unix_server(handle, inner)
    splice = Splice(open_endpoint(tmp_path / "outer"), inner, limit=limit)
    splice.start()
    try:
        yield splice
    finally:
        await splice.close()
        server.close()
        for writer in writers:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(65536):
        writer.write(chunk)
        await writer.drain()
    writer.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def test_bytes_pass_both_ways_and_half_close_is_passed_on(tmp_path: Path) -> None:
    async with spliced(tmp_path, echo) as splice:
        reader, writer = await asyncio.open_unix_connection(tmp_path / "outer")
        sent = os.urandom(3_000_000)

        async def send() -> None:
            writer.write(sent)
            await writer.drain()
            writer.write_eof()  # the echo must still come back

        received, _ = await asyncio.gather(reader.read(-1), send())
        assert received == sent
        writer.close()
        await until(lambda: splice.count == 0)


async def test_the_server_s_half_close_leaves_the_client_s_direction_open(tmp_path: Path) -> None:
    heard = asyncio.get_running_loop().create_future()

    async def says_goodbye_first(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(b"bye")
        writer.write_eof()
        heard.set_result(await reader.read(-1))
        writer.close()

    async with spliced(tmp_path, says_goodbye_first) as splice:
        reader, writer = await asyncio.open_unix_connection(tmp_path / "outer")
        assert await reader.read(-1) == b"bye"
        writer.write(b"after your end of file")
        writer.write_eof()
        assert await asyncio.wait_for(heard, 5) == b"after your end of file"
        writer.close()
        await until(lambda: splice.count == 0)


async def test_a_slow_reader_pauses_its_writer(tmp_path: Path) -> None:
    written = 0

    async def floods(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        for _ in range(2000):
            writer.write(b"x" * 65536)
            written += 65536
            await writer.drain()
        writer.close()

    async with spliced(tmp_path, floods):
        reader, writer = await asyncio.open_unix_connection(tmp_path / "outer", limit=1024)
        await asyncio.sleep(0.5)
        stuck = written
        assert stuck < 4_000_000  # socket and transport buffers, no more
        await asyncio.sleep(0.2)
        assert written == stuck
        total = 0
        while chunk := await reader.read(1 << 20):
            total += len(chunk)
        assert total == 2000 * 65536
        writer.close()


async def test_either_side_s_loss_ends_both(tmp_path: Path) -> None:
    ended = asyncio.Event()

    async def waits(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(-1)
        ended.set()
        writer.close()

    async with spliced(tmp_path, waits) as splice:
        _, writer = await asyncio.open_unix_connection(tmp_path / "outer")
        await until(lambda: splice.count == 1)
        writer.transport.abort()
        await asyncio.wait_for(ended.wait(), 5)
        await until(lambda: splice.count == 0)

    async def drops(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    other = tmp_path / "other"
    other.mkdir()
    async with spliced(other, drops) as splice:
        reader, writer = await asyncio.open_unix_connection(other / "outer")
        assert await asyncio.wait_for(reader.read(-1), 5) == b""
        writer.close()
        await until(lambda: splice.count == 0)


async def test_one_connection_too_many_is_closed_and_the_others_go_on(tmp_path: Path) -> None:
    async with spliced(tmp_path, echo, limit=2) as splice:
        first = await asyncio.open_unix_connection(tmp_path / "outer")
        second = await asyncio.open_unix_connection(tmp_path / "outer")
        await until(lambda: splice.count == 2)
        reader, writer = await asyncio.open_unix_connection(tmp_path / "outer")
        assert await asyncio.wait_for(reader.read(-1), 5) == b""
        writer.close()
        for reader, writer in (first, second):
            writer.write(b"still here")
            assert await reader.readexactly(10) == b"still here"
            writer.close()
        await until(lambda: splice.count == 0)
        reader, writer = await asyncio.open_unix_connection(tmp_path / "outer")
        writer.write(b"room again")
        assert await reader.readexactly(10) == b"room again"
        writer.close()


async def test_no_file_descriptor_is_left_behind(tmp_path: Path) -> None:
    async with spliced(tmp_path, echo) as splice:

        async def once() -> None:
            reader, writer = await asyncio.open_unix_connection(tmp_path / "outer")
            writer.write(b"x")
            await reader.readexactly(1)
            writer.close()
            await writer.wait_closed()

        await once()
        await until(lambda: splice.count == 0)
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(50):
            await once()
        await until(lambda: splice.count == 0)
        await asyncio.sleep(0.05)
        assert len(list(Path("/proc/self/fd").iterdir())) <= before


async def test_an_inner_server_that_is_gone_costs_only_the_connection(tmp_path: Path) -> None:
    splice = Splice(open_endpoint(tmp_path / "outer"), tmp_path / "nobody")
    splice.start()
    try:
        reader, writer = await asyncio.open_unix_connection(tmp_path / "outer")
        assert await asyncio.wait_for(reader.read(-1), 5) == b""
        writer.close()
        assert splice.count == 0
    finally:
        await splice.close()


async def test_closing_ends_every_connection(tmp_path: Path) -> None:
    async with spliced(tmp_path, echo) as splice:
        reader, writer = await asyncio.open_unix_connection(tmp_path / "outer")
        writer.write(b"x")
        await reader.readexactly(1)
        await splice.close()
        assert splice.count == 0
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        writer.close()
        assert not (tmp_path / "outer").exists()


async def test_the_peer_is_found_by_name_and_unknown_names_are_refused(tmp_path: Path) -> None:
    names: list[str] = []

    async def remembers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        names.append(writer.get_extra_info("peername").removeprefix(b"\0").decode())
        await reader.read(-1)
        writer.close()

    async with spliced(tmp_path, remembers) as splice:
        _, writer = await asyncio.open_unix_connection(tmp_path / "outer")
        await until(lambda: len(names) == 1)
        peer = f"unix-abstract:{names[0]}"
        assert splice.of(peer) == LocalPeer(
            os.getpid(), os.geteuid(), os.getegid(), frozenset(os.getgroups())
        )
        for stranger in (names[0], "unix-abstract:", "unix:", "unix-abstract:idb-0", "ipv4:1:2"):
            with pytest.raises(Unauthenticated):
                splice.of(stranger)
        writer.close()
        await until(lambda: splice.count == 0)
        with pytest.raises(Unauthenticated):
            splice.of(peer)


@pytest.mark.parametrize("groups", [[4242, 4243], list(range(5000, 5300))])
async def test_supplementary_groups_are_the_peers(tmp_path: Path, groups: list[int]) -> None:
    endpoint = open_endpoint(tmp_path / "s")
    code = (
        "import socket,sys\n"
        f"s=socket.socket(socket.AF_UNIX); s.connect({str(tmp_path / 's')!r})\n"
        "print('up',flush=True); sys.stdin.read()"
    )
    root = os.geteuid() == 0  # who alone may choose its groups
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        code,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        extra_groups=groups if root else None,
    )
    assert child.stdout is not None
    assert child.stdin is not None
    await child.stdout.readline()
    connection, _ = endpoint.listening.accept()
    process = process_of(connection)
    try:
        expected = set(groups if root else os.getgroups())
        # Too many to be told apart from none: nobody is let in by them.
        assert process.peer.groups == (expected if len(expected) <= 256 else set())
    finally:
        child.stdin.close()
        await child.wait()
        process.close()
        connection.close()
        endpoint.close()


async def test_a_process_that_has_ended_is_known_to_have(tmp_path: Path) -> None:
    endpoint = open_endpoint(tmp_path / "s")
    code = (
        "import socket,sys\n"
        f"s=socket.socket(socket.AF_UNIX); s.connect({str(tmp_path / 's')!r})\n"
        "print('up',flush=True); sys.stdin.read()"
    )
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        code,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stdin is not None
    await child.stdout.readline()
    connection, _ = endpoint.listening.accept()
    process = process_of(connection)
    try:
        assert process.peer.pid == child.pid
        assert process.is_alive
        child.stdin.close()
        await child.wait()
        if process.pidfd is not None:  # Linux 6.5
            assert select.select([process.pidfd], [], [], 5)[0]
            assert not process.is_alive
    finally:
        process.close()
        connection.close()
        endpoint.close()


def test_nobody_can_connect_before_the_mode_is_set(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        endpoint = open_endpoint(tmp_path / "s")
    finally:
        os.umask(old)
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600
    endpoint.close()


def test_a_file_that_is_another_s_by_now_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    endpoint = open_endpoint(path)
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        endpoint.close()
        assert path.exists()
