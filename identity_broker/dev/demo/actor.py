"""A process on the demonstration's stage: started, listened to, told what to do, ended.

- Its events arrive on a thread and are waited for with a deadline; one that ends early fails the
  wait at once, with the last lines it wrote on stderr.
- It cannot outlive the stage.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from identity_broker.dev.errors import DemoStepFailed
from identity_broker.dev.lifeline import tied_to_parent

Event = dict[str, Any]
Listener = Callable[[Event], None]

_TAIL_LINES = 8
_STOP_SECONDS = 3.0


class Actor:
    """One process of the demonstration.

    Args:
        role: the module it runs.
        asked: the first line on its stdin.
        program: the Python to run it with; this one when None.
        environment: what it finds in its environment beside ours.
    """

    def __init__(
        self,
        role: str,
        asked: Event,
        folder: Path,
        *,
        program: Path | None = None,
        environment: Mapping[str, str] | None = None,
        listener: Listener | None = None,
    ) -> None:
        self.role = role
        self._log = folder / f"{role}.log"
        self._events: list[Event] = []
        self._changed = threading.Condition()
        self._listener = listener
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(program or sys.executable), "-m", f"identity_broker.dev.demo.{role}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                # gRPC's own log lines would say in other words what the events say.
                env={**os.environ, "GRPC_VERBOSITY": "NONE", **(environment or {})},
                start_new_session=True,
                preexec_fn=tied_to_parent(),  # noqa: PLW1509 - does nothing but prctl
            )
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        self.tell(**asked)  # on stdin: an API key has no place on a command line

    def wait_for(self, event: str, *, seconds: float = 30.0, after: int = 0, **facts: Any) -> Event:
        """The first event of that name with those facts, at or behind position `after`.

        Raises:
            DemoStepFailed: it did not come, or the process ended.
        """
        until = time.monotonic() + seconds
        with self._changed:
            while True:
                found = self._find(event, after, facts)
                if found is not None:
                    return found
                if self._process.poll() is not None and not self._thread.is_alive():
                    raise self._failed(f"{self.role} ended unexpectedly")
                left = until - time.monotonic()
                if left <= 0:
                    raise self._failed(f'{self.role} did not say "{event}" in {seconds:.0f} s')
                self._changed.wait(min(left, 0.5))

    def tell(self, **command: Any) -> int:
        """Send a command; return the position from which its answer can be waited for."""
        with self._changed:
            position = len(self._events)
        if self._process.stdin is None:  # pragma: no cover - it was opened as a pipe
            raise self._failed(f"{self.role} cannot be spoken to")
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except OSError as exc:
            raise self._failed(f"{self.role} ended unexpectedly") from exc
        return position

    def count(self, event: str) -> int:
        """How many events of that name came so far."""
        with self._changed:
            return sum(one["event"] == event for one in self._events)

    def last(self, event: str) -> Event:
        """The newest event of that name.

        Raises:
            DemoStepFailed: there is none.
        """
        with self._changed:
            found = [one for one in self._events if one["event"] == event]
        if not found:
            raise self._failed(f'{self.role} did not say "{event}"')
        return found[-1]

    def stop(self) -> None:
        """End it; twice is harmless."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):  # what was unsent has nobody to read it
                self._process.stdin.close()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._thread.join(_STOP_SECONDS)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _listen(self) -> None:
        if self._process.stdout is None:  # pragma: no cover - it was opened as a pipe
            return
        for line in self._process.stdout:
            event = json.loads(line)
            with self._changed:
                self._events.append(event)
                self._changed.notify_all()
            if self._listener is not None:
                self._listener(event)
        with self._changed:
            self._changed.notify_all()

    def _find(self, event: str, after: int, facts: Event) -> Event | None:
        for one in self._events[after:]:
            if one["event"] == event and facts.items() <= one.items():
                return one
        return None

    def _failed(self, message: str) -> DemoStepFailed:
        try:
            lines = self._log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        except OSError:
            lines = []
        return DemoStepFailed(message, hint=f"its log: {self._log}", problems=tuple(lines))
