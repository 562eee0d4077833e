"""A real broker in a process of its own, and `idb` to talk to it.

- `dev_broker` (session): `idb dev --ca local` on free loopback ports; shared, so tests register
  names of their own (`unique`) and leave what is not theirs alone.
- `run_dev` starts one for a single test: with OpenBao, or to be killed.
- Whatever ends the test process ends the broker too.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from identity_broker.dev.lifeline import tied_to_parent
from identity_broker.dev.state import FILE_NAME, DevState
from identity_client.admin import AdminClient, UnixTarget

START_SECONDS = 60.0
_pause = threading.Event()
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Ran:
    """What an `idb` command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout as JSON."""
        return json.loads(self.out)

    @property
    def error(self) -> dict[str, Any]:
        """The error of a command run with -o json: the last line of stderr."""
        found: dict[str, Any] = json.loads(self.err.splitlines()[-1])["error"]
        return found


def run_idb(
    *arguments: str,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: str = "",
    timeout: float = 60.0,
) -> Ran:
    """Run `idb` as a process of its own, away from any broker the environment names."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("IDB_")}
    done = subprocess.run(
        [sys.executable, "-m", "identity_broker.cli.main", *arguments],
        env={**clean, **(env or {})},
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


@dataclass
class DevBroker:
    """A running `idb dev`."""

    directory: Path
    state: DevState
    process: subprocess.Popen[bytes]
    out: Path
    _clients: list[AdminClient] = field(default_factory=list)

    def idb(self, *arguments: str, stdin: str = "", cwd: Path | None = None) -> Ran:
        """Run `idb --dir DIR …`."""
        return run_idb("--dir", str(self.directory), *arguments, stdin=stdin, cwd=cwd)

    @property
    def admin(self) -> AdminClient:
        """A client over the admin socket; closed with the broker."""
        if not self._clients:
            self._clients.append(AdminClient(UnixTarget(Path(self.state.broker.admin_socket))))
        return self._clients[0]

    def unique(self, name: str) -> str:
        """A name no other test of this process uses."""
        return f"{name}-{os.getpid()}-{next(_numbers)}"

    def stop(self, number: signal.Signals = signal.SIGTERM, timeout: float = 15.0) -> int:
        """Signal `idb dev` and wait for its end; return its exit code."""
        while self._clients:
            self._clients.pop().close()
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout)


@contextmanager
def run_dev(directory: Path, *options: str) -> Iterator[DevBroker]:
    """`idb dev --dir DIR …`, ready; stopped on the way out."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    out = directory.parent / f"{directory.name}.out"
    with out.open("wb") as sink:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "identity_broker.cli.main"),
                *("dev", "--dir", str(directory), *options),
            ],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={k: v for k, v in os.environ.items() if not k.startswith("IDB_")},
            preexec_fn=tied_to_parent(),  # noqa: PLW1509 - does nothing but prctl
        )
    broker: DevBroker | None = None
    try:
        until = time.monotonic() + START_SECONDS
        while not (directory / FILE_NAME).exists():
            if process.poll() is not None or time.monotonic() > until:
                raise AssertionError(f"idb dev did not start:\n{out.read_text()}")
            _pause.wait(0.05)
        broker = DevBroker(directory, DevState.load(directory), process, out)
        yield broker
    finally:
        if broker is not None:
            broker.stop()
        elif process.poll() is None:
            process.terminate()
            process.wait(15)


@pytest.fixture(scope="session")
def dev_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevBroker]:
    """A broker with file keys and SQLite, shared by the tests of this process."""
    with run_dev(tmp_path_factory.mktemp("dev") / "broker", "--ca", "local") as broker:
        yield broker
