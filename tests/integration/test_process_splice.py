"""A local connection is one process's, and no user's connections are at the others' expense."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from identity_broker.errors import BrokerError, CallerUnknown, ProcessChanged, Unauthenticated
from identity_broker.localpeer.credentials import process_of
from identity_broker.localpeer.door import Access, LocalDoor
from identity_broker.localpeer.endpoint import open_endpoint
from identity_broker.localpeer.process import LiveProcess
from identity_broker.localpeer.splice import Splice
from support.processes import Puppet, became

ROOT = os.geteuid() == 0


class Echo:
    """An inner server: greets, then says back what it hears, and remembers both."""

    def __init__(self) -> None:
        self.heard = b""
        self.names: list[str] = []
        self.greeting = b""
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self, path: Path) -> None:
        self._server = await asyncio.start_unix_server(self._serve, path)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        name = writer.get_extra_info("peername").removeprefix(b"\0").decode()
        self.names.append(f"unix-abstract:{name}")
        self._writers.append(writer)
        with suppress(ConnectionError):
            writer.write(self.greeting)
            while chunk := await reader.read(65536):
                self.heard += chunk
                writer.write(chunk)
        writer.close()

    async def stop(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


class Spliced:
    def __init__(self, path: Path, splice: Splice, echo: Echo) -> None:
        self.path = path
        self.splice = splice
        self.echo = echo

    @property
    def peer(self) -> str:
        """The name of the connection made last."""
        return self.echo.names[-1]


@asynccontextmanager
async def spliced(tmp_path: Path, **options: Any) -> AsyncIterator[Spliced]:
    echo = Echo()
    echo.greeting = options.pop("greeting", b"")
    await echo.start(tmp_path / "inner")
    options.setdefault("identify", LiveProcess.of_connection)
    splice = Splice(open_endpoint(tmp_path / "outer", mode=0o666), tmp_path / "inner", **options)
    splice.start()
    try:
        yield Spliced(tmp_path / "outer", splice, echo)
    finally:
        await splice.close()
        await echo.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def do(puppet: Puppet, code: str) -> None:
    """As `puppet.do`, while the loop runs on."""
    await asyncio.to_thread(puppet.do, code)


async def ask(puppet: Puppet, expression: str) -> str:
    return await asyncio.to_thread(puppet.ask, expression)


# --- one sender ---------------------------------------------------------------------------------


async def test_threads_of_the_process_are_the_process(tmp_path: Path) -> None:
    async with spliced(tmp_path) as door:
        with Puppet() as puppet:
            puppet.connect(door.path)
            await do(puppet, "t = threading.Thread(target=s.sendall, args=(b'hello',)); t.start()")
            assert await ask(puppet, "s.recv(100)") == "b'hello'"
            found = door.splice.process(door.peer)
            assert found.peer.pid == puppet.pid
            await until(lambda: door.splice.count == 1)


async def test_a_child_that_inherits_the_connection_is_not_heard(tmp_path: Path) -> None:
    async with spliced(tmp_path) as door:
        with Puppet() as puppet:
            puppet.connect(door.path)
            await do(puppet, "s.sendall(b'mine ')")
            assert await ask(puppet, "s.recv(100)") == "b'mine '"
            await do(
                puppet,
                "child = os.fork()\nif child == 0:\n s.sendall(b'child'); time.sleep(60)",
            )
            assert await ask(puppet, "over(s)") == "True"
            await do(puppet, "os.kill(child, 9); os.waitpid(child, 0)")
            await until(lambda: door.splice.count == 0)
        assert door.echo.heard == b"mine "


async def test_a_process_that_is_passed_the_connection_is_not_heard(tmp_path: Path) -> None:
    async with spliced(tmp_path) as door:
        with Puppet() as giver, Puppet() as taker:
            between = tmp_path / "between"
            await do(
                taker,
                f"l = socket.socket(socket.AF_UNIX); l.bind({str(between)!r}); l.listen()",
            )
            giver.connect(door.path)
            giver.connect(between, "g")
            await do(giver, "s.sendall(b'mine '); assert s.recv(5) == b'mine '")
            await do(giver, "socket.send_fds(g, [b'x'], [s.fileno()])")
            await do(
                taker,
                "c, _ = l.accept(); fd = socket.recv_fds(c, 1, 1)[1][0]; "
                "taken = socket.socket(fileno=fd); taken.sendall(b'stolen')",
            )
            assert await ask(taker, "over(taken)") == "True"
            await until(lambda: door.splice.count == 0)
        assert door.echo.heard == b"mine "


async def test_bytes_of_two_processes_in_one_go_are_told_apart(tmp_path: Path) -> None:
    """Both have been sent before either is received: the kernel keeps them apart."""
    async with spliced(tmp_path) as door:
        with Puppet() as puppet:
            # Nothing runs here between these: the loop is blocked.
            puppet.connect(door.path)
            puppet.do("s.sendall(b'mine ')")
            puppet.do("child = os.fork()\nif child == 0:\n s.sendall(b'child'); os._exit(0)")
            puppet.do("os.waitpid(child, 0); s.sendall(b'mine again')")
            await until(lambda: bool(door.echo.names))
            await until(lambda: door.splice.count == 0)
        assert door.echo.heard == b"mine "


async def test_descriptors_that_are_sent_to_us_are_not_taken(tmp_path: Path) -> None:
    async with spliced(tmp_path) as door:
        with Puppet() as puppet:
            puppet.connect(door.path)
            await do(puppet, "s.sendall(b'x')")
            assert await ask(puppet, "s.recv(1)") == "b'x'"
            before = len(list(Path("/proc/self/fd").iterdir()))
            for _ in range(10):
                await do(puppet, "socket.send_fds(s, [b'y'], [0, 1, 2])")
                assert await ask(puppet, "s.recv(1)") == "b'y'"
            assert len(list(Path("/proc/self/fd").iterdir())) == before


async def test_credentials_that_are_made_up_are_refused_by_the_kernel(tmp_path: Path) -> None:
    if ROOT:
        pytest.skip("root may say of itself that it is another process")
    async with spliced(tmp_path) as door:
        with Puppet() as puppet, Puppet() as other:
            puppet.connect(door.path)
            code = (
                "import struct; s.sendmsg([b'x'], [(socket.SOL_SOCKET, 2, "
                f"struct.pack('iII', {other.pid}, os.getuid(), os.getgid()))])"
            )
            puppet.tell(code)
            assert "PermissionError" in await asyncio.to_thread(puppet.heard)
            await do(puppet, "s.sendall(b'as myself')")
            assert await ask(puppet, "s.recv(100)") == "b'as myself'"


async def test_the_connection_ends_with_its_process_whoever_else_holds_it(tmp_path: Path) -> None:
    async with spliced(tmp_path) as door:
        with Puppet() as puppet, Puppet() as holder:
            between = tmp_path / "between"
            await do(
                holder,
                f"l = socket.socket(socket.AF_UNIX); l.bind({str(between)!r}); l.listen()",
            )
            puppet.connect(door.path)
            puppet.connect(between, "g")
            await do(puppet, "s.sendall(b'x'); s.recv(1); socket.send_fds(g, [b'x'], [s.fileno()])")
            await do(
                holder,
                "c, _ = l.accept(); held = socket.socket(fileno=socket.recv_fds(c, 1, 1)[1][0])",
            )
            process = door.splice.process(door.peer)
            assert process.is_alive
            puppet.kill()
            assert await ask(holder, "over(held)") == "True"
            await until(lambda: door.splice.count == 0)
            with pytest.raises(Unauthenticated):
                door.splice.process(door.peer)


# --- before it was looked at --------------------------------------------------------------------


async def test_a_request_sent_before_an_exec_is_never_heard_as_the_new_program(
    tmp_path: Path,
) -> None:
    """Connect, send, become another program: all of it before the agent gets round to accept."""
    async with spliced(tmp_path, presence=True, greeting=b"settings ") as door:
        with Puppet() as puppet, ExitStack() as kept:
            kept.callback(os.close, os.pidfd_open(puppet.pid))
            puppet.connect(door.path)
            puppet.do("s.sendall(b'request')")
            puppet.tell("os.execv('/bin/sleep', ['sleep', '60'])")
            became(puppet.pid, "sleep")  # the loop has not run since the connect
            await until(lambda: bool(door.echo.names))
            process = door.splice.process(door.peer)
            assert isinstance(process, LiveProcess)
            assert "sleep" in process.link("exe") or "box" in process.link("exe")
            process.check()
            await asyncio.sleep(0.2)
            assert door.echo.heard == b""  # and never will be


async def test_who_is_still_there_is_heard_in_full(tmp_path: Path) -> None:
    async with spliced(tmp_path, presence=True, greeting=b"settings ") as door:
        with Puppet() as puppet:
            puppet.connect(door.path)
            puppet.do("s.sendall(b'preface ')")
            assert await ask(puppet, "s.recv(9)") == "b'settings '"
            assert door.echo.heard == b""
            await do(puppet, "s.sendall(b'settings acknowledged')")
            await until(lambda: door.echo.heard == b"preface settings acknowledged")


async def test_nothing_waits_when_nothing_was_sent_early(tmp_path: Path) -> None:
    async with spliced(tmp_path, presence=True, greeting=b"settings ") as door:
        with Puppet() as puppet:
            puppet.connect(door.path)
            assert await ask(puppet, "s.recv(9)") == "b'settings '"
            await do(puppet, "s.sendall(b'preface')")
            await until(lambda: door.echo.heard == b"preface")


# --- refused, dropped ---------------------------------------------------------------------------


async def test_a_process_that_is_refused_is_told_so_by_what_it_calls(tmp_path: Path) -> None:
    def refuse(_connection: socket.socket) -> LiveProcess:
        raise CallerUnknown("not you", detail="because", hint="go away")

    async with spliced(tmp_path, identify=refuse) as door:
        with Puppet() as puppet:
            puppet.connect(door.path)
            await do(puppet, "s.sendall(b'x')")
            assert await ask(puppet, "s.recv(1)") == "b'x'"  # it can speak to the server
            refusals: list[BrokerError] = []
            for _ in range(2):
                with pytest.raises(CallerUnknown, match="not you") as refused:
                    door.splice.process(door.peer)
                refusals.append(refused.value)
            assert refusals[0] is not refusals[1]
            assert refusals[0].hint == "go away"
        await until(lambda: door.splice.count == 0)


async def test_a_connection_can_be_dropped(tmp_path: Path) -> None:
    async with spliced(tmp_path) as door:
        with Puppet() as puppet, Puppet() as other:
            for each in (puppet, other):
                each.connect(door.path)
                await do(each, "s.sendall(b'x')")
                assert await ask(each, "s.recv(1)") == "b'x'"
            door.splice.drop(door.echo.names[0])
            assert await ask(puppet, "over(s)") == "True"
            await do(other, "s.sendall(b'y')")
            assert await ask(other, "s.recv(1)") == "b'y'"
            await until(lambda: door.splice.count == 1)
            for stranger in (door.echo.names[0], "", "unix-abstract:", "ipv4:1.2.3.4:5"):
                door.splice.drop(stranger)
            assert door.splice.count == 1


async def test_an_exec_after_connect_is_noticed_before_the_next_secret(tmp_path: Path) -> None:
    async with spliced(tmp_path) as door:
        with Puppet() as puppet:
            puppet.connect(door.path)
            await do(puppet, "s.sendall(b'x')")
            assert await ask(puppet, "s.recv(1)") == "b'x'"
            process = door.splice.process(door.peer)
            assert isinstance(process, LiveProcess)
            process.check()
            puppet.tell("os.execv('/bin/sleep', ['sleep', '60'])")
            became(puppet.pid, "sleep")
            with pytest.raises(ProcessChanged):
                process.check()


# --- too many -----------------------------------------------------------------------------------

_FLOOD = """
import os, socket, sys
path, count, uid = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if uid:
    os.setuid(uid)
held = []
made = 0
for _ in range(count):
    s = socket.socket(socket.AF_UNIX)
    try:
        s.connect(path); made += 1
        s.setblocking(False)
        held.append(s)
    except OSError:
        s.close()
    if len(held) > 500:  # keep what is open, let go of what was closed
        still = []
        for each in held:
            try:
                gone = each.recv(1) == b""
            except BlockingIOError:
                gone = False
            except OSError:
                gone = True
            if gone:
                each.close()
            else:
                still.append(each)
        held = still
print(made, flush=True)
sys.stdin.read()
"""


async def test_ten_thousand_connections_of_one_user_leave_the_others_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o711)
    async with spliced(tmp_path, limit=400, limit_per_uid=100) as door:
        reader, writer = await asyncio.open_unix_connection(door.path)

        async def round_trip() -> float:
            started = time.monotonic()
            writer.write(b"?")
            async with asyncio.timeout(10):
                assert await reader.readexactly(1) == b"?"
            return time.monotonic() - started

        await round_trip()
        before = door.splice.count
        flood = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            _FLOOD,
            door.path.name,
            "10000",
            "4242" if ROOT else "0",  # another user, where that can be had
            cwd=tmp_path,  # whose parents are closed to others
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            assert flood.stdout is not None
            made = asyncio.create_task(flood.stdout.readline())
            slowest = 0.0
            most = 0
            while not made.done():
                slowest = max(slowest, await round_trip())
                most = max(most, door.splice.count)
                if ROOT:  # and whoever comes new, as another user than the flood's
                    fresh_reader, fresh = await asyncio.open_unix_connection(door.path)
                    fresh.write(b"!")
                    async with asyncio.timeout(10):
                        assert await fresh_reader.readexactly(1) == b"!"
                    fresh.close()
                    await fresh.wait_closed()
                await asyncio.sleep(0.01)
            assert int(await made) == 10_000
            assert most <= 100 + before + 1
            assert slowest < 5
            await round_trip()
        finally:
            flood.kill()
            await flood.wait()
        await until(lambda: door.splice.count == before)
        # The user's own room is there again.
        writer.close()
        await writer.wait_closed()


async def test_the_total_is_bounded_too(tmp_path: Path) -> None:
    async with spliced(tmp_path, limit=3, limit_per_uid=10) as door:
        open_ones = [await asyncio.open_unix_connection(door.path) for _ in range(5)]
        async with asyncio.timeout(10):
            turned_away = [await reader.read(1) for reader, _ in open_ones[3:]]
        assert turned_away == [b"", b""]
        for _, writer in open_ones:
            writer.close()


# Connects as several users, one after the other: the kernel remembers who each of them was.
_AS = """
def as_user(uid, path, count):
    made = []
    os.seteuid(uid)
    for _ in range(count):
        s = socket.socket(socket.AF_UNIX); s.connect(path); made.append(s)
    os.seteuid(0)
    return made
def live(made):
    alive = 0
    for s in made:
        s.settimeout(2)
        try:
            s.sendall(b"?"); alive += s.recv(1) == b"?"
        except OSError:
            pass
    return alive
"""


@pytest.mark.skipif(not ROOT, reason="only root can be several users")
async def test_users_who_hold_every_connection_make_room_for_others(tmp_path: Path) -> None:
    tmp_path.chmod(0o711)
    async with spliced(tmp_path, limit=40, limit_per_uid=20, identify=process_of) as door:
        with Puppet() as puppet:
            await do(puppet, _AS)
            await do(puppet, f"os.chdir({str(tmp_path)!r})")
            await do(puppet, "a = as_user(4001, 'outer', 20); b = as_user(4002, 'outer', 20)")
            await until(lambda: door.splice.count == 40)
            await do(puppet, "victim = as_user(3001, 'outer', 1)")
            assert await ask(puppet, "live(victim)") == "1"
            await do(puppet, "more = as_user(4001, 'outer', 5) + as_user(4002, 'outer', 5)")
            assert await ask(puppet, "live(more)") in {"0", "1"}  # back to what they had, at most
            assert await ask(puppet, "live(victim)") == "1"
            # Each of many new users gets in, and so do root and the one who is here already.
            await do(puppet, "crowd = [as_user(5000 + n, 'outer', 1)[0] for n in range(10)]")
            await do(puppet, "root = as_user(0, 'outer', 3); victim += as_user(3001, 'outer', 5)")
            assert await ask(puppet, "live(crowd)") == "10"
            assert await ask(puppet, "live(root)") == "3"
            assert await ask(puppet, "live(victim)") == "6"
            assert await ask(puppet, "abs(live(a) - live(b) + live(more))") in {"0", "1", "2"}
            assert door.splice.count == 40
        await until(lambda: door.splice.count == 0)


@pytest.mark.skipif(not ROOT, reason="only root can be several users")
async def test_a_connection_that_is_still_being_joined_can_make_room_too(tmp_path: Path) -> None:
    tmp_path.chmod(0o711)
    async with spliced(tmp_path, limit=8, identify=process_of) as door:
        with Puppet() as puppet:
            await do(puppet, _AS)
            await do(puppet, f"os.chdir({str(tmp_path)!r})")
            before = len(list(Path("/proc/self/fd").iterdir()))
            for _ in range(20):
                # The loop is blocked meanwhile, and then finds all of them at once.
                puppet.do("a = as_user(4001, 'outer', 8); b = as_user(4002, 'outer', 6)")
                assert await ask(puppet, "(live(a), live(b))") == "(4, 4)"
                await do(puppet, "a.clear(); b.clear(); made = None")
                await do(puppet, "import gc; gc.collect()")
                await until(lambda: door.splice.count == 0)
            await until(lambda: len(list(Path("/proc/self/fd").iterdir())) <= before)


async def test_a_door_lets_in_no_more_than_there_are_descriptors_for(tmp_path: Path) -> None:
    script = f"""
import asyncio, resource
from pathlib import Path
from identity_broker.localpeer.door import LocalDoor
from identity_broker.localpeer.process import LiveProcess
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 1000))
async def main():
    inner = []
    async def serve(path):
        async def hold(reader, writer):
            await reader.read()
        inner.append(await asyncio.start_unix_server(hold, path))
    door = LocalDoor(
        Path({str(tmp_path / "d" / "s")!r}), identify=LiveProcess.of_connection, limit=2000
    )
    await door.open(serve)
    print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], flush=True)
    clients = []
    for _ in range(200):
        try:
            clients.append(await asyncio.open_unix_connection(door.path))
        except OSError:
            break
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.2)
    print(door.count, flush=True)
    Path("/proc/self/stat").read_bytes()  # there is a descriptor left for other things
    await door.close()
asyncio.run(main())
"""
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", script],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    soft, count = (int(line) for line in done.stdout.splitlines() if line.isdigit())
    assert soft == 1000
    assert count == (1000 - 256) // 5


async def test_a_door_makes_its_directory_as_it_was_told(tmp_path: Path) -> None:
    echo = Echo()
    old = os.umask(0o077)
    try:
        door = LocalDoor(
            tmp_path / "run" / "s",
            identify=LiveProcess.of_connection,
            access=Access(mode=0o666, directory_mode=0o755),
        )
        await door.open(echo.start)
    finally:
        os.umask(old)
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o755
    assert door.path.stat().st_mode & 0o777 == 0o666
    assert (tmp_path / "run" / ".s").stat().st_mode & 0o777 == 0o700
    with pytest.raises(Unauthenticated):
        door.of("unix-abstract:idb-0")
    door.drop("unix-abstract:idb-0")
    await door.close()
    await echo.stop()
    assert list((tmp_path / "run").iterdir()) == []
