"""`idb demo`: two services leave their shared API key, in three acts."""

from __future__ import annotations

from pathlib import Path

import click

from identity_broker.cli.options import Invocation, pass_invocation
from identity_broker.cli.output import OutputFormat, emit
from identity_broker.cli.tree import IdbCommand


@click.command(cls=IdbCommand)
@click.option(
    "--keep",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Keep what the demonstration made in DIR; a temporary directory if not given.",
)
@pass_invocation
def demo(invocation: Invocation, keep: Path | None) -> None:
    """Watch two services leave their shared API key.

    Three acts with real processes, a real OpenBao and real connections, in about half a minute:
    before, with identities, and an incident. Exit code 0 only if every step held.
    """
    from identity_broker.dev.demo.stage import run_demo

    outcome = run_demo(keep, talk=invocation.output is OutputFormat.TABLE)
    emit(invocation.output, outcome, lambda: "")
