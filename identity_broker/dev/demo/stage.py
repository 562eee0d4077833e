"""The stage of the demonstration: a folder, a broker, an operator's shell, and the three acts.

- Everything is a real process on loopback: OpenBao, the broker, two services, their customers,
  an intruder. Whatever happens, all of them end with the stage.
- The services live with ten-second certificates, so that rotation can be watched.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from identity_broker.dev.demo.actor import Actor, Event, Listener
from identity_broker.dev.demo.program import program_of
from identity_broker.dev.demo.timeline import Moment, Timeline
from identity_broker.dev.errors import DemoStepFailed
from identity_broker.dev.lifeline import tied_to_parent
from identity_broker.dev.state import FILE_NAME, DevState

TRUST_DOMAIN = "shop.example"
_START_SECONDS = 60.0
_STOP_SECONDS = 12.0
_pause = threading.Event()  # never set


@dataclass(frozen=True, slots=True)
class Ran:
    """What a command of the operator did; times are the monotonic clock's."""

    code: int
    document: Mapping[str, Any]
    started: float
    ended: float


class Stage:
    """Where the acts take place. A context manager: leaving it ends every process."""

    def __init__(self, folder: Path, timeline: Timeline) -> None:
        self.folder = folder
        self.timeline = timeline
        self._resources = ExitStack()
        self._dev: DevState | None = None

    @property
    def dev_directory(self) -> Path:
        """Where `idb dev` keeps its things."""
        return self.folder / "dev"

    @property
    def dev(self) -> DevState:
        """The running broker."""
        if self._dev is None:
            raise DemoStepFailed("the broker is not running yet")
        return self._dev

    def actor(self, role: str, asked: Event, *, listener: Listener | None = None) -> Actor:
        """Start a process. Once there is an agent, it finds the way to it in its environment."""
        environment = {}
        if self._dev is not None:
            environment["SPIFFE_ENDPOINT_SOCKET"] = self._dev.workload_api
        actor = Actor(
            role,
            asked,
            self.folder,
            program=self.program(role),
            environment=environment,
            listener=listener,
        )
        self._resources.callback(actor.stop)
        return actor

    def program(self, role: str) -> Path:
        """The executable of a role."""
        return program_of(role, self.folder / "programs")

    def start_dev(self) -> None:
        """Start `idb dev` and wait until it is ready.

        Raises:
            DemoStepFailed: it does not become ready; its last words are told.
        """
        process = subprocess.Popen(
            _idb(
                *("dev", "--dir", str(self.dev_directory)),
                *("--trust-domain", TRUST_DOMAIN, "-o", "json"),
            ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=_environment(),
            start_new_session=True,
            preexec_fn=tied_to_parent(),  # noqa: PLW1509 - does nothing but prctl
        )
        lines: list[str] = []
        reader = threading.Thread(target=_read_lines, args=(process, lines), daemon=True)
        reader.start()
        self._resources.callback(_end, process, reader)
        until = time.monotonic() + _START_SECONDS
        while not (self.dev_directory / FILE_NAME).exists():
            if process.poll() is not None or time.monotonic() > until:
                raise DemoStepFailed("idb dev did not start", problems=tuple(lines[-8:]))
            _pause.wait(0.02)
        self._dev = DevState.load(self.dev_directory)

    def idb(self, *arguments: str, show: bool = True) -> Ran:
        """Run an `idb` command as the operator would, and show it.

        Raises:
            DemoStepFailed: it printed no JSON.
        """
        if show:
            typed = "idb " + " ".join(arguments)
            self.timeline.command(typed.replace(f"{self.folder}/", ""))
        started = time.monotonic()
        done = subprocess.run(
            _idb("--dir", str(self.dev_directory), *arguments, "-o", "json"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=_environment(),
            timeout=_START_SECONDS,
            check=False,
            preexec_fn=tied_to_parent(),
        )
        ended = time.monotonic()
        try:
            document = json.loads(done.stdout or "{}")
        except ValueError as exc:
            raise DemoStepFailed(f"idb {arguments[0]} printed no JSON") from exc
        if done.returncode and not document:
            problems = tuple(done.stderr.splitlines()[-8:])
            raise DemoStepFailed(f"idb {' '.join(arguments[:2])} failed", problems=problems)
        return Ran(done.returncode, document, started, ended)

    def rest(self, seconds: float) -> None:
        """Wait a little."""
        _pause.wait(seconds)

    def close(self) -> None:
        """End everything, in reverse order."""
        self._resources.close()


def run_demo(keep: Path | None, show: Callable[[Moment], None]) -> dict[str, Any]:
    """Play all three acts; return what was measured.

    Raises:
        DemoStepFailed: a step did not hold.
    """
    from identity_broker.dev.demo import acts  # noqa: PLC0415 - acts are made of stages

    timeline = Timeline(show)
    # As Ctrl-C does: through the ends of all blocks, so that every process is ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with _folder(keep) as folder:
        stage = Stage(folder, timeline)
        try:
            measured = acts.play(stage)
        finally:
            stage.close()
    return {
        "held": True,
        "seconds": round(timeline.elapsed, 1),
        "kept_in": str(keep) if keep else None,
        **measured,
        "timeline": [
            {"elapsed": round(one.elapsed, 3), "actor": one.actor, "text": one.text}
            for one in timeline.moments
        ],
    }


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="idb-demo-", ignore_cleanup_errors=True) as name:
            yield Path(name)
        return
    try:
        keep.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise DemoStepFailed(f'"{keep}" cannot be made: {exc.strerror}') from exc
    yield keep.absolute()


def _idb(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "identity_broker.cli.main", *arguments]


def _environment() -> dict[str, str]:
    ours = ("IDB_", "IDENTITY_BROKER_", "SPIFFE_")
    return {name: text for name, text in os.environ.items() if not name.startswith(ours)}


def _read_lines(process: subprocess.Popen[str], lines: list[str]) -> None:
    lines.extend(line.rstrip() for line in process.stderr or ())


def _end(process: subprocess.Popen[str], reader: threading.Thread) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    reader.join(1.0)
    if process.stderr is not None:
        process.stderr.close()
