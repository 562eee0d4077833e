"""`idb explain`: why a node would or would not get an identity, selector by selector."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from identity_broker.cli.connect import Session
from identity_broker.cli.errors import VerdictNegative
from identity_broker.cli.options import Invocation, pass_invocation
from identity_broker.cli.output import Style, clean, emit, mark, paint
from identity_broker.cli.tree import IdbCommand

if TYPE_CHECKING:
    from identity_client.admin import Check, Explanation


@click.command(cls=IdbCommand, connects=True, examples=["idb explain /shop/orders --node web-1"])
@click.argument("subject", metavar="ENTRY|SPIFFE-ID")
@click.option(
    "--node",
    "node_id",
    required=True,
    metavar="NODE",
    help="SPIFFE ID, ATTESTOR/NAME, or the NAME of a join token.",
)
@pass_invocation
def explain(invocation: Invocation, subject: str, node_id: str) -> None:
    """Say why a node would or would not get an identity.

    Every rule is shown in the order the broker checks it. Exit code 0: it would get it from at
    least one entry; 3: it would not.
    """
    by_id = ":" in subject or subject.startswith("/")
    with Session.open(invocation) as session:
        found = session.admin.entries.explain(
            node_id=session.node_id(node_id),
            entry_id="" if by_id else subject,
            spiffe_id=session.spiffe_id(subject) if by_id else "",
        )
    authorized = any(one.authorized for one in found)
    document = {"authorized": authorized, "explanations": found}
    emit(invocation.output, document, lambda: "\n\n".join(map(_render, found)))
    if not authorized:
        raise VerdictNegative(
            f"the node would not get {subject}",
            hint="the lines marked with a cross say what would have to change",
        )


def _render(one: Explanation) -> str:
    verdict = (
        paint("would be issued", Style.GOOD)
        if one.authorized
        else paint("would not be issued", Style.BAD)
    )
    title = paint(clean(one.entry.spiffe_id), Style.HEAD)
    width = max((len(_rule(check)) for check in one.checks), default=0)
    lines = [f"{title}  entry {clean(one.entry.id)}  {verdict}"]
    for check in one.checks:
        detail = f"  {paint(clean(check.detail), Style.DIM)}" if check.detail else ""
        rule = _rule(check).ljust(width) if detail else _rule(check)
        lines.append(f"  {mark(held=check.held)} {rule}{detail}")
    return "\n".join(lines)


def _rule(check: Check) -> str:
    rule = clean(check.rule)
    if check.selector and check.selector not in check.rule:
        return f"{rule}: {clean(check.selector)}"
    return rule
