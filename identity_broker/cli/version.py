"""`idb version`."""

from __future__ import annotations

import platform
from importlib import metadata

import click

from identity_broker.cli.options import Invocation, pass_invocation
from identity_broker.cli.output import emit
from identity_broker.cli.tree import IdbCommand


@click.command(cls=IdbCommand)
@pass_invocation
def version(invocation: Invocation) -> None:
    """Print the version."""
    found = metadata.version("identity-broker")
    document = {"version": found, "python": platform.python_version()}
    emit(invocation.output, document, lambda: f"idb {found}")
