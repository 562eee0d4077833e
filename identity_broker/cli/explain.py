"""`idb explain`: why a node, or a process, would or would not get an identity, by selector.

- About a node, the broker is asked; about a process, the node agent of this machine, which says
  nothing to strangers: root, the agent's own user, and the user the process runs as.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from identity_broker.cli.connect import Session, agent_socket
from identity_broker.cli.errors import UsageRefused, VerdictNegative
from identity_broker.cli.options import Invocation, pass_invocation
from identity_broker.cli.output import Style, clean, emit, mark, paint
from identity_broker.cli.tree import IdbCommand

if TYPE_CHECKING:
    from identity_client.admin import Check, Explanation
    from identity_client.agent_client import EntryMatch, ProcessExplanation


@click.command(
    cls=IdbCommand,
    connects=True,
    examples=[
        "idb explain /shop/orders --node web-1",
        "idb explain --pid 4711",
        "idb explain /shop/orders --pid 4711",
    ],
)
@click.argument("subject", metavar="[ENTRY|SPIFFE-ID]", required=False)
@click.option(
    "--node",
    "node_id",
    metavar="NODE",
    help="SPIFFE ID, ATTESTOR/NAME, or the NAME of a join token.",
)
@click.option(
    "--pid",
    type=click.IntRange(1, 2**31 - 1),
    metavar="PID",
    help="A process of this machine; --socket is its agent's then [env: IDB_AGENT_SOCKET].",
)
@pass_invocation
def explain(
    invocation: Invocation, subject: str | None, node_id: str | None, pid: int | None
) -> None:
    """Say why a node or a process would or would not get an identity.

    About a node, every rule is shown in the order the broker checks it. About a process, its
    selectors are shown, which entries they match, and which selector each of the others misses;
    users other than root and the agent's own are told of the nearest of those only.
    Exit code 0: it would get it from at least one entry; 3: it would not.
    """
    if (node_id is None) == (pid is None):
        raise UsageRefused(
            "either --node or --pid says about whom it is asked",
            hint="idb explain ENTRY --node NODE, or idb explain --pid PID",
        )
    if pid is not None:
        _explain_process(invocation, subject, pid)
    elif subject is None or node_id is None:
        raise UsageRefused("with --node, an entry or a SPIFFE ID must be named")
    else:
        _explain_node(invocation, subject, node_id)


def _explain_node(invocation: Invocation, subject: str, node_id: str) -> None:
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


def _explain_process(invocation: Invocation, subject: str | None, pid: int) -> None:
    from dataclasses import asdict

    from identity_client.agent_client import AgentClient

    with AgentClient(agent_socket(invocation)) as client:
        found = client.explain_process(pid)
    entries = [each for each in found.entries if subject is None or _is_about(each, subject)]
    matches = any(each.matches for each in entries)
    document = {"pid": pid, "matches": matches, **asdict(found), "entries": entries}
    emit(invocation.output, document, lambda: _render_process(pid, found, entries))
    if not matches:
        raise VerdictNegative(
            f"process {pid} would get no identity"
            if subject is None
            else f"process {pid} would not get {subject}",
            hint=_hint(entries, found.hidden),
        )


def _hint(entries: Sequence[EntryMatch], hidden: int) -> str:
    if entries:
        return "a cross marks a selector that the process does not have"
    if hidden:
        return f"{hidden} entries of this node are shown to root and the agent's own user alone"
    return "this node has no such entry: idb entry list shows them all"


def _is_about(entry: EntryMatch, subject: str) -> bool:
    """Whether it is the entry, the SPIFFE ID, or the path of one, that was named."""
    if subject.startswith("/"):
        return entry.spiffe_id.removeprefix("spiffe://").partition("/")[2] == subject[1:]
    return subject in (entry.entry_id, entry.spiffe_id)


def _render_process(pid: int, found: ProcessExplanation, entries: Sequence[EntryMatch]) -> str:
    title = paint(f"process {pid}", Style.HEAD)
    lines = [f"{title}  {clean(found.executable)}".rstrip()]
    lines += [f"  {clean(selector)}" for selector in found.selectors]
    lines += [f"  {paint(clean(problem), Style.BAD)}" for problem in found.problems]
    for each in entries:
        lines += ["", *_entry_lines(each)]
    if found.hidden:
        left_out = f"{found.hidden} more entries are shown to root and the agent's own user alone"
        lines += ["", paint(left_out, Style.DIM)]
    return "\n".join(lines)


def _entry_lines(entry: EntryMatch) -> list[str]:
    title = paint(clean(entry.spiffe_id), Style.HEAD)
    verdict = paint("matches", Style.GOOD) if entry.matches else paint("does not match", Style.BAD)
    lines = [f"{title}  entry {clean(entry.entry_id)}  {verdict}"]
    lines += [f"  {mark(held=False)} {clean(selector)}" for selector in entry.missing]
    if entry.serial:
        lines.append(f"  {mark(held=True)} SVID {clean(entry.serial)}")
    if entry.problem:
        lines.append(f"  {paint(clean(entry.problem), Style.DIM)}")
    return lines


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
