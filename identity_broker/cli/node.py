"""`idb node`: attested nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from identity_broker.cli.connect import Session
from identity_broker.cli.options import Invocation, pass_invocation
from identity_broker.cli.output import (
    OutputFormat,
    Row,
    Style,
    Text,
    distance,
    emit,
    facts,
    moment,
    say,
    table,
)
from identity_broker.cli.revocation_text import count
from identity_broker.cli.tree import IdbGroup
from identity_broker.domain.clock import SystemClock

if TYPE_CHECKING:
    from identity_client.admin import Node

_ON_HOLD = "on hold: "
_NODE_HELP = "NODE is a SPIFFE ID, ATTESTOR/NAME, or the NAME of a join token."


@click.group(cls=IdbGroup)
def node() -> None:
    """See, ban and evict attested nodes."""


@node.command("list", connects=True)
@click.option("--attestor", default="", help="Those of one attestor: join_token, x509_pop.")
@click.option("--banned/--not-banned", default=None, help="Those that are banned, or are not.")
@pass_invocation
def list_nodes(invocation: Invocation, attestor: str, banned: bool | None) -> None:
    """List attested nodes."""
    with Session.open(invocation) as session:
        nodes = list(session.admin.nodes.list(attestor=attestor, banned=banned))
    now = SystemClock().now()

    def render() -> str:
        rows: list[Row] = [
            [one.spiffe_id, one.attestor, _state(one), distance(one.expires_at, now), one.serial]
            for one in nodes
        ]
        columns = ["node", "attestor", "state", "expires", "serial"]
        return table(columns, rows, empty="no node is attested; idb token generate lets one join")

    emit(invocation.output, {"nodes": nodes}, render)


@node.command(connects=True, epilog=_NODE_HELP)
@click.argument("node_id", metavar="NODE")
@pass_invocation
def show(invocation: Invocation, node_id: str) -> None:
    """Show one node."""
    with Session.open(invocation) as session:
        found = session.admin.nodes.get(session.node_id(node_id))
        why = _why(session, found) if invocation.output is OutputFormat.TABLE else ""
    emit(invocation.output, found, lambda: _facts(found, why))


@node.command(connects=True, epilog=_NODE_HELP)
@click.argument("node_id", metavar="NODE")
@click.option("--reason", default="", metavar="TEXT", help="Why, for the record.")
@pass_invocation
def ban(invocation: Invocation, node_id: str, reason: str) -> None:
    """Refuse a node from now on, on open connections too.

    Its SVIDs and all that was issued through it are revoked. It stays banned until its hold is
    lifted or it is evicted. As idb revoke --node, without a question.
    """
    with Session.open(invocation) as session:
        found, revoked = session.admin.nodes.ban(session.node_id(node_id), reason=reason)
        why = _why(session, found) if invocation.output is OutputFormat.TABLE else ""
    say(f"banned; {count(revoked, 'credential')} revoked")
    if name := _hold(found):
        say(f"idb hold lift {name}, or idb node evict {node_id}, lets it attest again")
    emit(invocation.output, {"node": found, "revoked": revoked}, lambda: _facts(found, why))


@node.command(connects=True, epilog=_NODE_HELP)
@click.argument("node_id", metavar="NODE")
@pass_invocation
def evict(invocation: Invocation, node_id: str) -> None:
    """Forget a node: its SVIDs are revoked, and it may attest again."""
    with Session.open(invocation) as session:
        whole = session.node_id(node_id)
        revoked = session.admin.nodes.evict(whole)
    say(f"evicted; {count(revoked, 'credential')} revoked")
    emit(invocation.output, {"node_id": whole, "revoked": revoked}, lambda: whole)


def _hold(one: Node) -> str:
    """The hold because of which it is banned; empty for none."""
    return one.ban_reason.removeprefix(_ON_HOLD) if one.ban_reason.startswith(_ON_HOLD) else ""


def _why(session: Session, one: Node) -> str:
    """What was said when it was put on hold."""
    if not (name := _hold(one)):
        return ""
    revocations = session.admin.revocations
    hold = next((held for held in revocations.holds() if held.name == name), None)
    if hold is None:
        return ""  # lifted just now
    order = revocations.get(hold.revocation_id).revocation
    return f"{order.reason.value}: {order.comment}" if order.comment else order.reason.value


def _state(one: Node) -> Text:
    if one.banned:
        return Text("banned", Style.BAD)
    if one.svid_revoked:
        return Text("SVID revoked", Style.BAD)
    return Text("attested", Style.GOOD)


def _facts(one: Node, why: str = "") -> str:
    now = SystemClock().now()
    return facts(
        [
            ("node", one.spiffe_id),
            ("state", _state(one)),
            *([("ban reason", one.ban_reason)] if one.ban_reason else []),
            *([("why", why)] if why else []),
            ("attestor", one.attestor),
            ("selectors", "\n".join(one.selectors) or "-"),
            ("attested", moment(one.attested_at, now=now)),
            ("serial", one.serial),
            ("expires", moment(one.expires_at, now=now)),
            ("may attest again", "yes" if one.reattestable else "no"),
        ]
    )
