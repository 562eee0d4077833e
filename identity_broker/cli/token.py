"""`idb token`: the single-use tokens nodes join with."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import click

from identity_broker.cli.connect import Session
from identity_broker.cli.files import write_secret
from identity_broker.cli.options import Duration, Invocation, pass_invocation
from identity_broker.cli.output import distance, emit, say, to_document
from identity_broker.cli.tree import IdbGroup
from identity_broker.domain.clock import SystemClock


@click.group(cls=IdbGroup)
def token() -> None:
    """Make the tokens that nodes join with."""


@token.command(connects=True, examples=["idb token generate --node web-1 --write web-1.token"])
@click.option(
    "--node", "name", metavar="NAME", default="", help="Name of the node; random if none."
)
@click.option("--ttl", type=Duration(), help="How long it may be used; 10m if not given.")
@click.option(
    "--write",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the token to FILE (0600) instead of printing it.",
)
@pass_invocation
def generate(invocation: Invocation, name: str, ttl: timedelta | None, write: Path | None) -> None:
    """Make a token that attests one node once.

    The token is shown here and never again: the broker keeps its hash only.
    """
    with Session.open(invocation) as session:
        made = session.admin.nodes.create_join_token(ttl=ttl, node_name=name)
    document = to_document(made)
    if write is not None:
        write_secret(write, made.token + "\n")
        document["token"] = None
        document["file"] = str(write)
        say(f"token written to {write} (0600)")
    say(f"node: {made.node_id}")
    say(f"single use, expires {distance(made.expires_at, SystemClock().now())}")
    emit(invocation.output, document, lambda: "" if write is not None else made.token)
