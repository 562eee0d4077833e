"""`idb server`: the broker itself."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from identity_broker.cli.config import config_option, load_checked, set_option
from identity_broker.cli.options import Invocation, pass_invocation
from identity_broker.cli.output import OutputFormat, emit, facts, say
from identity_broker.cli.tree import IdbGroup
from identity_broker.errors import ConfigError

if TYPE_CHECKING:
    from identity_broker.config.settings import Settings
    from identity_broker.server.app import BoundAddresses


@click.group(cls=IdbGroup)
def server() -> None:
    """Run a broker from a configuration file."""


@server.command(examples=["idb server run --config /etc/identity-broker/broker.toml"])
@config_option
@set_option
@pass_invocation
def run(invocation: Invocation, config_file: Path | None, overrides: dict[str, str]) -> None:
    """Run the broker until SIGTERM or Ctrl-C.

    When it is ready, stdout says where it listens (with -o json: one line); logs go to stderr.
    """
    import asyncio

    settings = load_checked(config_file, overrides)

    def ready(bound: BoundAddresses) -> None:
        document = {
            "address": bound.address,
            "bootstrap_address": bound.bootstrap_address,
            "http_address": bound.http_address,
            "admin_socket": str(bound.admin_socket),
        }
        if invocation.output is OutputFormat.JSON:
            print(json.dumps(document), flush=True)
        else:
            print(facts(list(document.items())), flush=True)

    with _log_stream(settings) as stream:
        asyncio.run(_serve(settings, ready, stream))


async def _serve(
    settings: Settings, ready: Callable[[BoundAddresses], None], stream: TextIO
) -> None:
    """Run the broker until a signal; a second one while it drains ends it at once."""
    import asyncio
    import signal

    from identity_broker.server.app import run_broker
    from identity_broker.telemetry.logs import configure

    configure(settings.log.level, settings.log.format, stream)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        stop.set()
        loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    await run_broker(settings, ready=ready, stop=stop)


@contextmanager
def _log_stream(settings: Settings) -> Iterator[TextIO]:
    """Where the log goes; a file is the broker's alone (0600).

    Raises:
        ConfigError: the file cannot be opened.
    """
    path = settings.log.file
    if path is None:
        yield sys.stderr
        return
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    except OSError as exc:
        problem = f"log.file: the file cannot be opened ({(exc.strerror or 'unknown').lower()})"
        raise ConfigError("the log file cannot be used", problems=(problem,)) from exc
    with os.fdopen(descriptor, "a", buffering=1, encoding="utf-8") as stream:
        yield stream


@server.command()
@config_option
@set_option
@pass_invocation
def check(invocation: Invocation, config_file: Path | None, overrides: dict[str, str]) -> None:
    """Check what a broker would need: configuration, directories, signing backend.

    Nothing is signed and no port is opened. A wrapped secret-id is not spent: with one, the
    log-in to OpenBao is not tried.
    """
    from identity_broker.cli.checks import check_server

    settings = load_checked(config_file, overrides)
    done = check_server(settings)
    for line in done:
        say(f"ok: {line}")
    emit(invocation.output, {"ok": True, "checked": done}, lambda: "")
