"""`idb credential`: the ledger."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import click

from identity_broker.cli.connect import Session
from identity_broker.cli.options import Invocation, pass_invocation
from identity_broker.cli.output import Style, Text, distance, emit, facts, moment, say, table
from identity_broker.cli.tree import IdbGroup
from identity_broker.domain.clock import SystemClock

if TYPE_CHECKING:
    from identity_client.admin import Credential

_STATES = ["intent", "issued", "unconfirmed", "superseded", "revoked", "expired"]
_COLOURS = {
    "issued": Style.GOOD,
    "revoked": Style.BAD,
    "unconfirmed": Style.WARN,
    "superseded": Style.DIM,
    "expired": Style.DIM,
}


@click.group(cls=IdbGroup)
def credential() -> None:
    """See the ledger."""


@credential.command("list", connects=True)
@click.option("--spiffe-id", default="", metavar="ID", help="Those of one identity (ID or /path).")
@click.option("--node", "node_id", default="", metavar="NODE", help="Those one node asked for.")
@click.option("--entry", "entry_id", default="", metavar="ENTRY", help="Those of one entry.")
@click.option("--state", "states", multiple=True, type=click.Choice(_STATES), help="Repeatable.")
@click.option("--kind", type=click.Choice(["x509", "jwt"]))
@click.option(
    "--limit", type=click.IntRange(min=1), default=100, show_default=True, help="Newest first."
)
@pass_invocation
def list_credentials(
    invocation: Invocation,
    spiffe_id: str,
    node_id: str,
    entry_id: str,
    states: tuple[str, ...],
    kind: str | None,
    limit: int,
) -> None:
    """List every credential the broker set out to issue, newest first."""
    from identity_client.admin import CredentialKind, CredentialQuery, CredentialState

    with Session.open(invocation) as session:
        query = CredentialQuery(
            spiffe_id=session.spiffe_id(spiffe_id) if spiffe_id else "",
            node_id=session.node_id(node_id) if node_id else "",
            entry_id=entry_id,
            states=frozenset(CredentialState(state) for state in states),
            kind=CredentialKind(kind) if kind else None,
        )
        found = list(islice(session.admin.credentials.list(query), limit + 1))
    if len(found) > limit:
        found.pop()
        say(f"the newest {limit} are shown; --limit shows more")
    emit(invocation.output, {"credentials": found}, lambda: _table(found))


@credential.command(connects=True)
@click.argument("credential_id", metavar="ID")
@pass_invocation
def show(invocation: Invocation, credential_id: str) -> None:
    """Show one credential by its serial number or jti."""
    with Session.open(invocation) as session:
        found = session.admin.credentials.get(credential_id)
    emit(invocation.output, found, lambda: _facts(found))


def _table(found: list[Credential]) -> str:
    now = SystemClock().now()
    rows = [
        [
            one.id,
            one.kind.value,
            _state(one),
            one.spiffe_id,
            distance(one.expires_at, now),
            distance(one.recorded_at, now),
        ]
        for one in found
    ]
    columns = ["id", "kind", "state", "spiffe id", "expires", "recorded"]
    for name in ("instance", "revocation_id"):
        if any(getattr(one, name) for one in found):
            columns.append(name.removesuffix("_id"))
            for row, one in zip(rows, found, strict=True):
                row.append(getattr(one, name) or "-")
    return table(columns, rows, empty="the ledger has no such credential")


def _state(one: Credential) -> str | Text:
    style = _COLOURS.get(one.state.value)
    return Text(one.state.value, style) if style else one.state.value


def _facts(one: Credential) -> str:
    now = SystemClock().now()
    pairs: list[tuple[str, str | Text]] = [
        ("id", one.id),
        ("kind", one.kind.value),
        ("state", _state(one)),
        ("spiffe id", one.spiffe_id),
        ("entry", f"{one.entry_id} (revision {one.entry_revision})" if one.entry_id else "-"),
        ("node", one.node_id or "-"),
        ("instance", one.instance or "-"),
        ("authority", one.authority_id),
        ("key fingerprint", one.key_fingerprint or "-"),
        ("to-be-signed digest", one.tbs_digest),
        ("digest", one.digest or "-"),
        ("not before", moment(one.not_before, now=now)),
        ("expires", moment(one.expires_at, now=now)),
        ("recorded", moment(one.recorded_at, now=now)),
    ]
    if one.revoked_at:
        pairs += [
            ("revoked", moment(one.revoked_at, now=now)),
            ("reason", one.reason.value if one.reason else "-"),
            ("comment", one.comment or "-"),
            ("revocation", one.revocation_id or "-"),
        ]
    return facts(pairs)
