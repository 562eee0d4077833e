"""`idb hold`: what is on hold, and lifting it."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import click

from identity_broker.cli.confirm import can_ask, confirm, yes_option
from identity_broker.cli.connect import Session
from identity_broker.cli.options import Invocation, pass_invocation
from identity_broker.cli.output import (
    OutputFormat,
    Row,
    Style,
    Text,
    clean,
    distance,
    emit,
    say,
    table,
)
from identity_broker.cli.revocation_text import count
from identity_broker.cli.tree import IdbGroup
from identity_broker.domain.clock import SystemClock

if TYPE_CHECKING:
    from identity_client.admin import Hold

_NAMED = 5


@click.group(cls=IdbGroup)
def hold() -> None:
    """See what is on hold, and lift holds."""


@hold.command("list", connects=True)
@click.option("--all", "include_lifted", is_flag=True, help="Those that are over as well.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=100, show_default=True, help="Newest first."
)
@pass_invocation
def list_holds(invocation: Invocation, include_lifted: bool, limit: int) -> None:
    """List holds, newest first."""
    with Session.open(invocation) as session:
        holds = session.admin.revocations.holds(include_lifted=include_lifted)
        found = list(islice(holds, limit + 1))
    if len(found) > limit:
        found.pop()
        say(f"the newest {limit} are shown; --limit shows more")
    emit(invocation.output, {"holds": found}, lambda: _table(found))


@hold.command(connects=True, examples=["idb hold lift shop-incident"])
@click.argument("name", metavar="NAME")
@yes_option
@pass_invocation
def lift(invocation: Invocation, name: str, *, yes: bool) -> None:
    """Lift a hold: what it stopped is issued again.

    What was revoked for certificate-hold is valid again. Whatever was revoked for another reason
    stays revoked.
    """
    with Session.open(invocation) as session:
        revocations = session.admin.revocations
        if not yes:
            found = next((o for o in revocations.holds() if o.name == name), None)
            # One that does not last, or is not there, is the broker's to answer.
            if found is not None and (invocation.output is not OutputFormat.JSON or can_ask()):
                _tell(found, revocations.get(found.revocation_id).revocation.revoked)
            confirm(f"Lift {clean(name)}?", yes=found is None, otherwise="nothing was lifted")
        lifted = revocations.lift(name)
    if invocation.output is not OutputFormat.JSON:
        say(
            f"{count(lifted.released, 'credential is', 'credentials are')} valid again; "
            f"{count(len(lifted.freed_entry_ids), 'entry', 'entries')} issued from again"
        )
    emit(invocation.output, lifted, lambda: "\n".join(lifted.freed_entry_ids))


def _tell(found: Hold, revoked: int) -> None:
    say(f"{found.name} holds {clean(str(found.subject))}")
    entries = ", ".join(found.held_entry_ids[:_NAMED])
    more = len(found.held_entry_ids) - _NAMED
    if entries:
        say(f"issued from again: {entries}{f' and {more} more' if more > 0 else ''}")
    if found.reason.value == "certificate-hold":
        say(f"valid again: {count(revoked, 'credential')} of {found.revocation_id}, if unexpired")
    else:
        say(f"stays revoked: what {found.revocation_id} revoked for {found.reason.value}")


def _table(found: list[Hold]) -> str:
    now = SystemClock().now()
    rows: list[Row] = [
        [
            one.name,
            str(one.subject),
            one.reason.value,
            str(len(one.held_entry_ids)),
            _state(one),
            distance(one.until, now) if one.until and not one.lifted_at else "-",
            one.revocation_id,
        ]
        for one in found
    ]
    columns = ["hold", "subject", "reason", "entries", "state", "ends", "revocation"]
    return table(columns, rows, empty="nothing is on hold")


def _state(one: Hold) -> Text:
    if one.lifted_at is None:
        return Text("in force", Style.BAD)
    return Text(
        "ended by time" if one.lifted_by == "time" else f"lifted by {one.lifted_by}", Style.DIM
    )
