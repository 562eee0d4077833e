"""`idb dev`: OpenBao, a broker and an agent on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from identity_broker.cli.connect import DEFAULT_DIR
from identity_broker.cli.options import Invocation, dir_option, pass_invocation
from identity_broker.cli.output import OutputFormat, Style, emit, facts, paint, say
from identity_broker.cli.tree import IdbCommand

if TYPE_CHECKING:
    from identity_broker.dev.state import DevState


@click.command(
    cls=IdbCommand,
    params=[
        dir_option(text=f"Where everything is kept; {DEFAULT_DIR} if not given [env: IDB_DIR].")
    ],
    examples=["idb dev --dir .dev", "idb --dir .dev svid fetch"],
)
@click.option(
    "--ca",
    type=click.Choice(["openbao", "local"]),
    help="Where the signing keys live: OpenBao (default), or files.",
)
@click.option("--trust-domain", metavar="NAME", help="dev.example.org if not given.")
@pass_invocation
def dev(invocation: Invocation, ca: str | None, trust_domain: str | None) -> None:
    """Run OpenBao, a broker and an agent on this machine.

    Everything listens on loopback, on free ports, and stores in DIR. A second start on the same
    DIR resumes with the same identities. DIR/dev.json says where everything is, as long as it
    runs. Ctrl-C or SIGTERM ends all of it.
    """
    import os
    from pathlib import Path

    from identity_broker.dev.directory import CaKind
    from identity_broker.dev.tree import DevTree

    directory = invocation.dir or Path(os.environ.get("IDB_DIR") or DEFAULT_DIR)
    tree = DevTree(directory, trust_domain=trust_domain, ca=CaKind(ca) if ca else None, say=say)

    def tell(state: DevState) -> None:
        emit(invocation.output, state.to_document(), lambda: _facts(state))
        if invocation.output is OutputFormat.TABLE:
            say(_next_steps(str(directory)))

    tree.run(tell)


def _facts(state: DevState) -> str:
    return facts(
        [
            ("trust domain", state.trust_domain),
            ("broker", state.broker.address),
            ("bootstrap", state.broker.bootstrap_address),
            ("http", f"http://{state.broker.http_address}"),
            ("admin socket", state.broker.admin_socket),
            ("openbao", state.openbao_address or "- (local CA)"),
            ("workload API", state.workload_api),
            ("node", state.agent.node_id if state.agent else "-"),
            ("bundle file", state.bundle_file),
            ("pid", str(state.pid)),
        ]
    )


def _next_steps(directory: str) -> str:
    import sys

    lines = [
        "",
        paint("next, in another terminal:", Style.HEAD, sys.stderr),
        f"  idb --dir {directory} doctor",
        f"  idb --dir {directory} entry create --spiffe-id /shop/orders "
        "--selector unix:uid:$(id -u) --wait",
        f"  idb --dir {directory} svid fetch",
        "Ctrl-C stops everything; the next start resumes.",
    ]
    return "\n".join(lines)
