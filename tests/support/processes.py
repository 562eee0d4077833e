"""Real processes that do what a test says, and namespaces to have them in.

- A `Puppet` runs lines of Python, one after the other, and says when each is done.
- `in_pid_namespace` runs a script as the first process of a PID namespace of its own, where it may
  choose the next pid. It needs no privilege where user namespaces are allowed.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Self

import pytest

_LOOP = """
import sys, os, socket, array, threading, time, signal

def over(connection):
    "Whether it has ended, with or without bytes that nobody read."
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True

space = dict(globals())
for line in sys.stdin:
    try:
        exec(compile(eval(line), "puppet", "exec"), space)
        print("ok", flush=True)
    except BaseException as exc:
        print(repr(exc).replace(chr(10), " "), flush=True)
"""


class Puppet:
    """A child process; use as a context manager."""

    def __init__(self, *prefix: str, program: str = sys.executable) -> None:
        """Start it, behind the words of `prefix` ("unshare", "-Ur")."""
        self._popen = subprocess.Popen(
            [*prefix, program, "-c", _LOOP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        return self._popen.pid

    def tell(self, code: str) -> None:
        """Have it run `code`, without waiting for it."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(repr(code) + "\n")
        self._popen.stdin.flush()

    def heard(self) -> str:
        """Wait for what it prints next."""
        assert self._popen.stdout is not None
        return self._popen.stdout.readline().rstrip("\n")

    def do(self, code: str) -> None:
        """Have it run `code`, and wait until it has."""
        self.tell(code)
        answer = self.heard()
        assert answer == "ok", f"{code}: {answer or 'it has ended'}"

    def ask(self, expression: str) -> str:
        """Return what `expression` is, as text."""
        self.tell(f"print({expression}, flush=True)")
        answer = self.heard()
        assert self.heard() == "ok", answer
        return answer

    def connect(self, path: Path, name: str = "s") -> None:
        """Have it connect to `path`, with a descriptor that children and exec keep."""
        self.do(
            f"{name} = socket.socket(socket.AF_UNIX); {name}.connect({str(path)!r}); "
            f"{name}.set_inheritable(True)"
        )

    def kill(self) -> None:
        """End it, and wait until the kernel has forgotten it. Twice is harmless."""
        self._popen.kill()
        self._popen.wait()
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()


def became(pid: int, name: str) -> None:
    """Wait until the process runs the program of that name, and waits for something itself."""
    deadline = time.monotonic() + 10
    while True:
        raw = Path(f"/proc/{pid}/stat").read_text()
        comm, state = raw.partition("(")[2].rpartition(")")[0], raw.rpartition(") ")[2][0]
        if (comm, state) == (name, "S"):
            return
        assert time.monotonic() < deadline, f"it is {comm}, {state}"
        time.sleep(0.005)


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """A listening socket that knows its senders, as an `Endpoint` does."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.setsockopt(socket.SOL_SOCKET, 16, 1)
        listener.bind(str(path))
        listener.listen(64)
        yield listener


@cache
def _may_unshare(options: tuple[str, ...]) -> bool:
    unshare = shutil.which("unshare")
    return (
        unshare is not None
        and subprocess.run([unshare, *options, "true"], check=False, capture_output=True).returncode
        == 0
    )


def unshare(*options: str) -> Sequence[str]:
    """The command that gives a process namespaces of its own; skips where the kernel forbids it."""
    if not _may_unshare(options):
        pytest.skip(f"this kernel lets this user make no such namespaces: unshare {options}")
    return ("unshare", *options)


def in_pid_namespace(script: str, *arguments: object) -> str:
    """Run a script in a PID namespace of its own; what it printed.

    It may `import idb_pids`, for `take(pid, argv)`: starts a program under exactly that pid.
    """
    command = unshare("-Urpf", "--mount-proc", "--kill-child")
    done = subprocess.run(
        [*command, sys.executable, "-P", "-c", _PIDS + script, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


_PIDS = """
import asyncio, os, signal, socket, subprocess, sys, time

def take(pid, argv):
    '''Start a program under that pid, which nobody has any more.'''
    for _ in range(100):
        with open("/proc/sys/kernel/ns_last_pid", "w") as last:
            last.write(str(pid - 1))
        started = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if started.pid == pid:
            return started
        started.kill(); started.wait()
    raise AssertionError(f"pid {pid} is not to be had")

def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
"""


def _cgroup2() -> Path:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.split()[0] == "cgroup2":
            return Path(before.split()[4])
    pytest.skip("this machine has no cgroup v2")


@contextmanager
def in_control_group(path: str, *pids: int) -> Iterator[None]:
    """Have the processes in a control group of that path while the block runs.

    They must have ended when it does. Skips where this user may make none.
    """
    root = _cgroup2()
    made: list[Path] = []
    try:
        folder = root
        for segment in path.strip("/").split("/"):
            folder /= segment
            try:
                folder.mkdir()
                made.append(folder)
            except FileExistsError:
                pass
        for pid in pids:
            (folder / "cgroup.procs").write_text(str(pid))
    except PermissionError:
        _remove(made)
        pytest.skip("this user may not make control groups")
    try:
        yield
    finally:
        _remove(made)


def _remove(folders: list[Path]) -> None:
    for folder in reversed(folders):
        deadline = time.monotonic() + 10
        while True:
            try:
                folder.rmdir()
                break
            except OSError:  # the last process is on its way out
                assert time.monotonic() < deadline, f"{folder} is in use"
                time.sleep(0.01)
