"""`idb server`: the broker itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from identity_broker.cli.config import config_option, load_checked, set_option
from identity_broker.cli.foreground import log_stream, stop_on_signal
from identity_broker.cli.options import Invocation, pass_invocation
from identity_broker.cli.output import OutputFormat, emit, facts, say
from identity_broker.cli.tree import IdbGroup

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

    with log_stream(settings.log) as stream:
        asyncio.run(_serve(settings, ready, stream))


async def _serve(
    settings: Settings, ready: Callable[[BoundAddresses], None], stream: TextIO
) -> None:
    """Run the broker until a signal."""
    from identity_broker.server.app import run_broker
    from identity_broker.telemetry.logs import configure

    configure(settings.log.level, settings.log.format, stream)
    await run_broker(settings, ready=ready, stop=stop_on_signal())


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
