"""What `idb server run` and `idb agent run` share: where the log goes, and when to stop."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from identity_broker.errors import ConfigError

if TYPE_CHECKING:
    import asyncio

    from identity_broker.config.settings import LogSettings


@contextmanager
def log_stream(log: LogSettings) -> Iterator[TextIO]:
    """Where the log goes; a file is the process's alone (0600).

    To be entered before gRPC is imported: its own lines, which no program can read, stay out.

    Raises:
        ConfigError: the file cannot be opened.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    if log.file is None:
        yield sys.stderr
        return
    try:
        descriptor = os.open(log.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    except OSError as exc:
        problem = f"log.file: the file cannot be opened ({(exc.strerror or 'unknown').lower()})"
        raise ConfigError("the log file cannot be used", problems=(problem,)) from exc
    with os.fdopen(descriptor, "a", buffering=1, encoding="utf-8") as stream:
        yield stream


def stop_on_signal() -> asyncio.Event:
    """An event that SIGTERM or Ctrl-C sets; a second one while it drains ends the process."""
    import asyncio
    import signal

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        stop.set()
        loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return stop
