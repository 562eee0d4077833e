"""A process that is held is never confused with another one of its pid."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from identity_broker.domain.caller import LocalPeer
from identity_broker.errors import AttestationFailed, CallerUnknown, ProcessChanged
from identity_broker.localpeer.credentials import ConnectedProcess, process_of
from identity_broker.localpeer.process import Executable, LiveProcess
from support.processes import Puppet, became, in_pid_namespace, listening, unshare

PINNED = hasattr(os, "pidfd_open") and tuple(
    int(part) for part in os.uname().release.split(".")[:2]
) >= (6, 5)
ROOT = os.geteuid() == 0


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with listening(tmp_path / "s") as found:
        yield found


def accepted(listener: socket.socket) -> LiveProcess:
    connection, _ = listener.accept()
    with connection:
        return LiveProcess.of_connection(connection)


def test_who_connected_is_known_and_holds(tmp_path: Path, listener: socket.socket) -> None:
    with Puppet() as puppet:
        puppet.connect(tmp_path / "s")
        with closing(accepted(listener)) as process:
            program = Path(f"/proc/{puppet.pid}/exe").stat()
            assert process.pid == puppet.pid
            assert (process.uid, process.gid) == (os.geteuid(), os.getegid())
            found = process.executable
            assert found == Executable(program.st_dev, program.st_ino, found.mount if found else 0)
            assert process.link("exe") == str(Path(f"/proc/{puppet.pid}/exe").readlink())
            assert process.read("status").startswith(b"Name:\t")
            assert process.start_time > 0
            assert process.pidfd_is_pinned is PINNED
            for _ in range(3):
                process.check()
            assert process.is_alive


def test_its_end_is_noticed_by_every_way_of_asking(tmp_path: Path, listener: socket.socket) -> None:
    with Puppet() as puppet:
        puppet.connect(tmp_path / "s")
        with closing(accepted(listener)) as process:
            puppet.kill()
            assert not process.is_alive
            with pytest.raises(CallerUnknown):
                process.check()
            for ask in (process.read, process.handle, process.link):
                with pytest.raises(CallerUnknown):
                    ask("exe")
            with pytest.raises(CallerUnknown):
                process.read("status")


def test_a_zombie_has_ended(tmp_path: Path, listener: socket.socket) -> None:
    code = (
        f"import socket,os;s=socket.socket(socket.AF_UNIX);s.connect({str(tmp_path / 's')!r});"
        "print('up',flush=True);input()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdin is not None
    child.stdout.readline()
    with closing(accepted(listener)) as process:
        child.kill()
        # Not waited for: it has ended, and its pid is still taken.
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        with pytest.raises(CallerUnknown):
            process.check()
    child.communicate()


def test_exec_of_another_program_is_a_change(tmp_path: Path, listener: socket.socket) -> None:
    with Puppet() as puppet:
        puppet.connect(tmp_path / "s")
        with closing(accepted(listener)) as process:
            puppet.tell("os.execv('/bin/sleep', ['sleep', '60'])")
            became(puppet.pid, "sleep")
            with pytest.raises(ProcessChanged):
                process.check()
            assert process.is_alive  # the same process all the same


def test_exec_of_the_same_program_is_a_change(tmp_path: Path, listener: socket.socket) -> None:
    with Puppet() as puppet:
        puppet.connect(tmp_path / "s")
        with closing(accepted(listener)) as process:
            puppet.tell(
                "os.execv(sys.executable, [sys.executable, '-c', 'print(1, flush=True);input()'])"
            )
            assert puppet.heard() == "1"
            assert process.link("exe") == str(Path(sys.executable).resolve())
            with pytest.raises(ProcessChanged):
                process.check()


def test_another_user_or_group_is_a_change(tmp_path: Path, listener: socket.socket) -> None:
    if not ROOT:
        pytest.skip("only root may become another user")
    (tmp_path / "s").chmod(0o666)
    for become in ("os.setegid(4242)", "os.seteuid(4242)", "os.setuid(4242)"):
        with Puppet() as puppet:
            puppet.connect(tmp_path / "s")
            with closing(accepted(listener)) as process:
                process.check()
                puppet.do(become)
                with pytest.raises(ProcessChanged):
                    process.check()


def test_another_user_since_it_connected_is_refused_at_once(
    tmp_path: Path, listener: socket.socket
) -> None:
    if not ROOT:
        pytest.skip("only root may become another user")
    with Puppet() as puppet:
        puppet.connect(tmp_path / "s")
        puppet.do("os.setuid(4242)")
        connection, _ = listener.accept()
        with connection, pytest.raises(ProcessChanged):
            LiveProcess.of_connection(connection)


def test_a_program_that_was_replaced_is_still_the_same_one(
    tmp_path: Path, listener: socket.socket
) -> None:
    program = tmp_path / "program"
    shutil.copy("/bin/sleep", program)
    shutil.copymode("/bin/sleep", program)
    child = subprocess.Popen([program, "60"])
    try:
        became(child.pid, "program")
        with closing(LiveProcess.of_pid(child.pid)) as process:
            new = tmp_path / "new"
            shutil.copy("/bin/true", new)
            new.replace(program)  # what a package manager does
            process.check()
            assert process.link("exe").endswith("program (deleted)")
            descriptor = process.handle("exe")
            assert os.fstat(descriptor).st_size == Path("/bin/sleep").stat().st_size
            os.close(descriptor)
    finally:
        child.kill()
        child.wait()


def test_by_pid_for_the_curious() -> None:
    with Puppet() as puppet, closing(LiveProcess.of_pid(puppet.pid)) as process:
        assert process.uid == os.geteuid()
        assert process.peer == LocalPeer(
            puppet.pid, os.geteuid(), os.getegid(), frozenset(os.getgroups())
        )
        assert not process.pidfd_is_pinned
        process.check()
    for nobody in (0, -1, 2**22 + 1):
        with pytest.raises(CallerUnknown):
            LiveProcess.of_pid(nobody)


def test_a_process_of_another_user_is_held_without_its_program(
    tmp_path: Path, listener: socket.socket
) -> None:
    if ROOT:
        pytest.skip("root may look at every program")
    with closing(LiveProcess.of_pid(1)) as process:
        assert process.executable is None
        process.check()
        with pytest.raises(AttestationFailed):
            process.handle("exe")


def test_without_a_pidfd_of_the_kernel_the_pid_is_taken_at_its_word(
    tmp_path: Path, listener: socket.socket
) -> None:
    with Puppet() as puppet:
        puppet.connect(tmp_path / "s")
        connection, _ = listener.accept()
        with connection:
            connected = process_of(connection)
            connected.close()
        with closing(LiveProcess.of(ConnectedProcess(connected.peer, None))) as process:
            assert not process.pidfd_is_pinned
            process.check()
            puppet.kill()
            with pytest.raises(CallerUnknown):
                process.check()
        with pytest.raises(CallerUnknown):
            LiveProcess.of(ConnectedProcess(connected.peer, None))


def test_where_the_kernel_says_that_the_caller_has_ended_its_pid_is_not_asked() -> None:
    # Linux 6.5 to 6.15 give no pidfd of a process that was waited for.
    with Puppet() as another:
        peer = LocalPeer(another.pid, os.geteuid(), os.getegid())
        connected = ConnectedProcess(peer, None, had_ended=True)
        assert not connected.is_alive
        with pytest.raises(CallerUnknown):
            LiveProcess.of(connected)


async def test_any_number_wait_for_the_end_and_are_told(
    tmp_path: Path, listener: socket.socket
) -> None:
    with Puppet() as puppet:
        puppet.connect(tmp_path / "s")
        with closing(accepted(listener)) as process:
            told: list[str] = []
            process.when_ended(lambda: told.append("first"))
            process.when_ended(lambda: told.append("second"))
            waiting = [asyncio.create_task(process.ended()) for _ in range(3)]
            await asyncio.sleep(0.05)
            waiting.pop().cancel()
            assert not any(task.done() for task in waiting)
            puppet.kill()
            async with asyncio.timeout(5):
                await asyncio.gather(*waiting)
                await process.ended()  # and whoever comes late
            process.when_ended(lambda: told.append("late"))
            await asyncio.sleep(0)
            assert told == ["first", "second", "late"]


async def test_closing_releases_whoever_waits_and_tells_nobody_of_an_end(
    tmp_path: Path, listener: socket.socket
) -> None:
    told: list[str] = []
    with Puppet() as puppet:
        puppet.connect(tmp_path / "s")
        process = accepted(listener)
        process.when_ended(lambda: told.append("ended"))
        waiting = asyncio.create_task(process.ended())
        await asyncio.sleep(0.01)
        process.close()
        process.close()
        async with asyncio.timeout(5):
            await waiting
        with pytest.raises(CallerUnknown):
            process.check()
        with pytest.raises(CallerUnknown):
            process.read("status")
    await asyncio.sleep(0.05)
    assert told == []


def test_no_descriptor_is_left_behind(tmp_path: Path, listener: socket.socket) -> None:
    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = count()
    for _ in range(20):
        with Puppet() as puppet:
            puppet.connect(tmp_path / "s")
            accepted(listener).close()
            puppet.connect(tmp_path / "s")
            puppet.kill()
            with pytest.raises(CallerUnknown):
                accepted(listener)
    assert count() == before


def test_out_of_descriptors_is_no_verdict(tmp_path: Path, listener: socket.socket) -> None:
    with Puppet() as puppet:
        puppet.connect(tmp_path / "s")
        connection, _ = listener.accept()
        held = []
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
            try:
                while True:
                    held.append(os.dup(0))
            except OSError:
                os.close(held.pop())
            with pytest.raises(OSError, match="Too many open files"):
                LiveProcess.of_connection(connection)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for descriptor in held:
                os.close(descriptor)
            connection.close()


# --- PID namespaces and pids used twice ---------------------------------------------------------


def test_a_caller_in_an_inner_pid_namespace_is_seen_from_outside(
    tmp_path: Path, listener: socket.socket
) -> None:
    with Puppet(*unshare("-Urpf", "--mount-proc", "--kill-child")) as puppet:
        assert puppet.ask("os.getpid()") == "1"
        puppet.connect(tmp_path / "s")
        with closing(accepted(listener)) as process:
            assert process.pid > 1
            assert process.uid == os.geteuid()
            assert b"\nNSpid:\t%d\t1\n" % process.pid in process.read("status")
            process.check()


def test_a_caller_that_the_agent_cannot_see_is_refused(tmp_path: Path) -> None:
    script = """
from identity_broker.errors import CallerUnknown
from identity_broker.localpeer.process import LiveProcess
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(sys.argv[1]); listener.listen()
    connection, _ = listener.accept()
    try:
        LiveProcess.of_connection(connection)
    except CallerUnknown as exc:
        print(exc.detail)
"""
    path = tmp_path / "inner"
    inside = subprocess.Popen(
        [
            *unshare("-Urpf", "--mount-proc", "--kill-child"),
            *(sys.executable, "-c", "import socket, sys" + script, str(path)),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    with socket.socket(socket.AF_UNIX) as outside:
        until_connected(outside, path)
        output, _ = inside.communicate(timeout=30)
    assert output == "its pid is 0: another PID namespace\n"


def test_a_pid_that_is_used_again_is_not_the_caller(tmp_path: Path) -> None:
    """The caller ends; another program gets its pid, while a third process holds the socket."""
    script = """
from identity_broker.errors import CallerUnknown
from identity_broker.localpeer.process import LiveProcess
path = sys.argv[1]
listener = socket.socket(socket.AF_UNIX); listener.bind(path); listener.listen()
code = '''
import os, socket, sys
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])
if os.fork() == 0:
    sys.stdin.read(); s.recv(1); os._exit(0)
print("up", flush=True)
sys.stdin.readline(); os._exit(0)
'''
caller = subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True)
assert caller.stdout.readline() == "up\\n"
connection, _ = listener.accept()
process = LiveProcess.of_connection(connection)
process.check()
caller.kill(); caller.wait()
victim = take(caller.pid, ["sleep", "60"])
until(lambda: os.readlink(f"/proc/{victim.pid}/exe").endswith(("sleep", "coreutils", "busybox")))
assert victim.pid == process.pid
for ask in (process.check, lambda: process.read("status"), lambda: process.handle("exe")):
    try:
        ask()
    except CallerUnknown:
        print("refused")
print(process.is_alive)
"""
    assert in_pid_namespace(script, tmp_path / "s") == "refused\nrefused\nrefused\nFalse\n"


def test_a_pid_that_is_used_again_before_accept_is_not_the_caller(tmp_path: Path) -> None:
    """The same, with the agent slower than the attacker: nothing but the kernel's pidfd helps."""
    script = """
from identity_broker.errors import CallerUnknown
from identity_broker.localpeer.credentials import ConnectedProcess, process_of
from identity_broker.localpeer.process import LiveProcess
path = sys.argv[1]
listener = socket.socket(socket.AF_UNIX); listener.bind(path); listener.listen()
code = '''
import os, socket, sys
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])
if os.fork() == 0:
    sys.stdin.read(); s.recv(1); os._exit(0)
os._exit(0)
'''
caller = subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE)
caller.wait()
victim = take(caller.pid, ["sleep", "60"])
connection, _ = listener.accept()
connected = process_of(connection)
assert connected.peer.pid == victim.pid
try:
    LiveProcess.of(connected).close()
    print("taken for the victim")
except CallerUnknown:
    print("refused")
# What an older kernel cannot tell, and says that it cannot.
mistaken = LiveProcess.of(ConnectedProcess(connected.peer, None))
print(mistaken.pidfd_is_pinned)
"""
    said = in_pid_namespace(script, tmp_path / "s").splitlines()
    if not PINNED:
        pytest.skip("before Linux 6.5 the kernel has no SO_PEERPIDFD: the stated limit")
    assert said == ["refused", "False"]


# --- small --------------------------------------------------------------------------------------


def until_connected(client: socket.socket, path: Path) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            client.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            time.sleep(0.005)
        else:
            return
    raise AssertionError("nobody listens")
