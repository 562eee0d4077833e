"""The broker and the agent of an `idb dev`: `idb … run` as child processes.

- Each says on stdout, as one line of JSON, where it listens; that line is what makes it ready.
- Its log goes to a file; when it ends by itself, the last lines of it are what is told.
- Nothing of our environment steers it: IDB_… variables are left out.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from identity_broker.dev.errors import DevChildEnded
from identity_broker.dev.lifeline import tied_to_parent

_START_SECONDS = 40.0
_STOP_SECONDS = 5.0
_TAIL_LINES = 12
_ENTRY_POINT = "identity_broker.cli.main"


class ChildProcess:
    """`idb NOUN run`, started from a configuration file.

    Args:
        noun: "server" or "agent".
        title: what people call it: "broker".
        log: where its stderr goes; 0600.
    """

    def __init__(self, noun: str, title: str, config: Path, log: Path) -> None:
        self._noun = noun
        self._title = title
        self._config = config
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Of the running process, or None."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def start(self, *, on_wait: Callable[[], None]) -> dict[str, Any]:
        """Start it; return what it said when it was ready.

        Args:
            on_wait: called now and then meanwhile.

        Raises:
            DevChildEnded: it ended, or did not become ready in time.
        """
        with self._log.open("ab") as log:
            self._log.chmod(0o600)
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    _ENTRY_POINT,
                    self._noun,
                    "run",
                    "--config",
                    str(self._config),
                    "-o",
                    "json",
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env={k: v for k, v in os.environ.items() if not k.startswith("IDB_")},
                # Ctrl-C reaches the whole group of a terminal; the order of ending is ours.
                start_new_session=True,
                preexec_fn=tied_to_parent(),  # noqa: PLW1509 - does nothing but prctl
            )
        return self._read_ready(on_wait)

    def stop(self) -> None:
        """End it, letting running calls finish; returns when it is gone. Twice is harmless."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.stdout is not None:
            process.stdout.close()

    def ended(self) -> DevChildEnded | None:
        """What to tell when it has ended by itself; None while it runs."""
        process = self._process
        code = None if process is None else process.poll()
        if code is None:
            return None
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return self._failed(f"the {self._title} ended with {how}")

    def _read_ready(self, on_wait: Callable[[], None]) -> dict[str, Any]:
        process = self._process
        if process is None or process.stdout is None:  # pragma: no cover - start() made both
            raise self._failed(f"the {self._title} was not started")
        until = time.monotonic() + _START_SECONDS
        line = b""
        descriptor = process.stdout.fileno()
        while not line.endswith(b"\n"):
            if time.monotonic() > until:
                raise self._failed(f"the {self._title} was not ready within {_START_SECONDS:.0f} s")
            if not select.select([descriptor], [], [], 0.2)[0]:
                on_wait()
                continue
            part = os.read(descriptor, 4096)
            if not part:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_STOP_SECONDS)
                raise self.ended() or self._failed(f"the {self._title} closed its output")
            line += part
        try:
            said = json.loads(line)
        except ValueError as exc:
            raise self._failed(f"the {self._title} said what is no JSON") from exc
        if not isinstance(said, dict):
            raise self._failed(f"the {self._title} said what is no JSON object")
        return said

    def _failed(self, message: str) -> DevChildEnded:
        lines: list[str] = []
        with contextlib.suppress(OSError):
            text = self._log.read_bytes()[-16_384:].decode("utf-8", "replace")
            lines = text.splitlines()[-_TAIL_LINES:]
        hint = f"its log: {self._log}"
        tail = [line[:400] for line in lines]
        if lines and lines[-1].startswith('{"error"'):
            # It said why in words; the log lines before add nothing for a person.
            with contextlib.suppress(ValueError, KeyError, TypeError):
                error = json.loads(lines[-1])["error"]
                tail = [f"{error['message']} [{error['reason']}]", *error.get("problems", ())]
                hint = error["hint"] or hint
        return DevChildEnded(message, hint=hint, problems=tuple(tail))
