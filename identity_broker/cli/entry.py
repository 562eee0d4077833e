"""`idb entry`: registration entries, who may become which identity.

- A batch is reported item by item; the exit code is that of the first item that failed.
- `update` changes what is named on the command line and nothing else.
- With --wait, what was changed is shown first; the wait comes after, and then the first failure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from identity_broker.cli.applied import wait_applied, wait_options
from identity_broker.cli.connect import Session, dev_agent
from identity_broker.cli.entry_document import read_entries
from identity_broker.cli.errors import NotApplied, UsageRefused
from identity_broker.cli.failure import failure_of
from identity_broker.cli.options import Duration, Invocation, parse_pair, pass_invocation
from identity_broker.cli.output import (
    OutputFormat,
    Row,
    Style,
    Text,
    distance,
    duration,
    emit,
    facts,
    moment,
    say,
    table,
)
from identity_broker.cli.tree import IdbGroup
from identity_broker.domain.clock import SystemClock

if TYPE_CHECKING:
    from identity_client.admin import Entry, Outcome

C = TypeVar("C", bound=Callable[..., Any])
T = TypeVar("T")

_PARENT_HELP = (
    "Node that may ask for it: SPIFFE ID, ATTESTOR/NAME, the NAME of a join token, a node "
    'group\'s ID or /path; "broker" for an entry that names a node group.'
)


_REQUIRED = {"spiffe_id": "--spiffe-id", "parent_id": "--parent", "selectors": "--selector"}
_PROGRAM = ("unix:path:", "unix:sha256:")
_KEY_TYPES = ["ec-p256", "ec-p384", "rsa-2048"]


@click.group(cls=IdbGroup)
def entry() -> None:
    """Register who may become which identity."""


def _described(*, flags: str) -> Callable[[C], C]:
    """The options that describe an entry; `flags` "set" for create, "both" for update."""
    either = flags == "both"
    options = [
        click.option("--spiffe-id", metavar="ID", help="Identity to issue: SPIFFE ID or /path."),
        click.option(
            "--parent",
            metavar="NODE",
            help=_PARENT_HELP if either else f"{_PARENT_HELP} [default: the agent of `idb dev`]",
        ),
        click.option(
            "--selector",
            "selectors",
            multiple=True,
            metavar="TYPE:VALUE",
            help="Fact an attestor must vouch for; repeat it, all of them must hold.",
        ),
        click.option("--ttl", type=Duration(), help="Life of its X.509-SVIDs; 0s: the default."),
        click.option("--jwt-ttl", type=Duration(), help="Life of its JWT-SVIDs; 0s: the default."),
        click.option("--dns", "dns_names", multiple=True, metavar="NAME", help="DNS name to add."),
        click.option("--hint", metavar="TEXT", help="Tells a workload's identities apart."),
        click.option(
            "--federates-with",
            multiple=True,
            metavar="DOMAIN",
            help="Trust domain whose bundle it receives.",
        ),
        click.option(
            "--admin/--no-admin" if either else "--admin",
            is_flag=True,
            default=None if either else False,
            help="It may administer the broker over mTLS.",
        ),
        click.option(
            "--downstream/--no-downstream" if either else "--downstream",
            is_flag=True,
            default=None if either else False,
            help="It may run a broker below this one.",
        ),
        click.option(
            "--per-process/--no-per-process" if either else "--per-process",
            is_flag=True,
            default=None if either else False,
            help="One X.509-SVID for each process, to tell instances apart and revoke them alone.",
        ),
        click.option(
            "--key-type",
            type=click.Choice(_KEY_TYPES),
            help="Key that the agent makes; ec-p256 if none.",
        ),
        click.option("--expires-in", type=Duration(), help="When the entry stops counting."),
        click.option("--owner", metavar="TEXT", help="Who answers for it."),
        click.option(
            "--label",
            "labels",
            multiple=True,
            metavar="KEY=VALUE",
            callback=parse_pair,
            help="Free label; repeatable.",
        ),
    ]

    def add(function: C) -> C:
        for option in reversed(options):
            function = option(function)
        return function

    return add


@entry.command(
    connects=True,
    examples=[
        "idb entry create --spiffe-id /shop/orders --parent web-1 --selector unix:uid:1000",
        "idb --dir dev entry create --spiffe-id /shop/orders --selector unix:uid:1000 --wait",
        "idb entry create --file entries.json",
    ],
)
@click.option("--id", "entry_id", default="", metavar="ENTRY", help="Chosen by the broker if none.")
@_described(flags="set")
@click.option("--disabled", is_flag=True, help="Store it, and issue nothing from it yet.")
@click.option(
    "--file",
    type=click.Path(path_type=Path),
    help="JSON entries, as `idb entry list -o json` prints them; - is stdin.",
)
@wait_options
@pass_invocation
def create(
    invocation: Invocation,
    /,
    entry_id: str,
    file: Path | None,
    disabled: bool,
    wait: bool,
    timeout: timedelta,
    **described: Any,
) -> None:
    """Create an entry, or all entries of a file."""
    with Session.open(invocation) as session:
        if file is not None:
            if entry_id or disabled or any(described.values()):
                raise UsageRefused(
                    "--file stands alone: the file says everything about its entries",
                    hint="idb entry create --file FILE",
                )
            entries = read_entries(file)
        else:
            fields = _fields(session, described)
            agent = None if "parent_id" in fields else dev_agent(invocation)
            if agent is not None:
                fields["parent_id"] = agent.node_id
            missing = [option for name, option in _REQUIRED.items() if name not in fields]
            if missing:
                raise UsageRefused(
                    f"an entry needs {missing[0]}",
                    hint="idb entry create --spiffe-id /shop/orders --parent NODE "
                    "--selector unix:uid:1000",
                )
            entries = [_entry({**fields, "id": entry_id, "disabled": disabled})]
        outcomes = session.admin.entries.create(entries)
        _show(invocation, outcomes)
        _hint_at_users(invocation, _done(outcomes))
        if wait:
            _wait(invocation, session, outcomes, timeout, named=_done(outcomes))
    _raise_first(invocation, outcomes, [one.id or one.spiffe_id for one in entries])


@entry.command("list", connects=True)
@click.option("--spiffe-id", default="", metavar="ID", help="Those of one identity (ID or /path).")
@click.option("--parent", default="", metavar="NODE", help="Those below one parent.")
@click.option("--selector", "selectors", multiple=True, metavar="TYPE:VALUE", help="Repeatable.")
@click.option("--owner", default="", metavar="TEXT")
@click.option("--hint", default="", metavar="TEXT")
@pass_invocation
def list_entries(
    invocation: Invocation,
    spiffe_id: str,
    parent: str,
    selectors: tuple[str, ...],
    owner: str,
    hint: str,
) -> None:
    """List entries."""
    from identity_client.admin import EntryQuery

    with Session.open(invocation) as session:
        query = EntryQuery(
            spiffe_id=session.spiffe_id(spiffe_id) if spiffe_id else "",
            parent_id=session.parent_id(parent) if parent else "",
            selectors=selectors,
            owner=owner,
            hint=hint,
        )
        found = list(session.admin.entries.list(query))
    emit(invocation.output, {"entries": found}, lambda: _table(found))


@entry.command(connects=True)
@click.argument("entry_id", metavar="ENTRY")
@pass_invocation
def show(invocation: Invocation, entry_id: str) -> None:
    """Show one entry."""
    with Session.open(invocation) as session:
        found = session.admin.entries.get(entry_id)
    emit(invocation.output, found, lambda: _facts(found))


@entry.command(
    connects=True,
    examples=["idb entry update e-42 --ttl 15m", "idb entry update e-42 --disable"],
)
@click.argument("entry_id", metavar="ENTRY")
@_described(flags="both")
@click.option("--disable/--enable", "disabled", default=None, help="Whether anything is issued.")
@click.option(
    "--revision",
    type=click.IntRange(min=1),
    default=None,
    help="Fail unless this is the entry's current revision.",
)
@wait_options
@pass_invocation
def update(
    invocation: Invocation,
    /,
    entry_id: str,
    disabled: bool | None,
    revision: int | None,
    wait: bool,
    timeout: timedelta,
    **described: Any,
) -> None:
    """Change the named fields of an entry.

    A repeatable option replaces all values of its field. What was issued before stays as it is.
    """
    from identity_client.admin import EntryChange

    with Session.open(invocation) as session:
        fields = _fields(session, described)
        if disabled is not None:
            fields["disabled"] = disabled
        if not fields:
            raise UsageRefused("nothing to change was named", hint="idb entry update --help")
        changed = replace(_entry(fields), id=entry_id, revision=revision or 0)
        outcomes = session.admin.entries.update([EntryChange(changed, frozenset(fields))])
        _show(invocation, outcomes)
        if wait:
            _wait(invocation, session, outcomes, timeout, named=_done(outcomes))
    _raise_first(invocation, outcomes, [entry_id])


@entry.command(connects=True)
@click.argument("entry_ids", metavar="ENTRY...", nargs=-1, required=True)
@wait_options
@pass_invocation
def delete(
    invocation: Invocation, entry_ids: tuple[str, ...], wait: bool, timeout: timedelta
) -> None:
    """Delete entries.

    What was issued from them stays valid until it expires: idb revoke --entry ENTRY ends it.
    """
    with Session.open(invocation) as session:
        outcomes = session.admin.entries.delete(entry_ids)
        deleted = _done(outcomes)
        emit(invocation.output, {"deleted": deleted}, lambda: "\n".join(deleted))
        if wait:
            _wait(invocation, session, outcomes, timeout)
    _raise_first(invocation, outcomes, list(entry_ids))


def _fields(session: Session, described: dict[str, Any]) -> dict[str, Any]:
    """The fields of an entry that the command line names."""
    named = {
        "spiffe_id": "spiffe_id",
        "parent": "parent_id",
        "selectors": "selectors",
        "ttl": "x509_ttl",
        "jwt_ttl": "jwt_ttl",
        "dns_names": "dns_names",
        "hint": "hint",
        "federates_with": "federates_with",
        "admin": "admin",
        "downstream": "downstream",
        "per_process": "per_process",
        "key_type": "key_algorithm",
        "expires_in": "expires_at",
        "owner": "owner",
        "labels": "labels",
    }
    fields: dict[str, Any] = {}
    for option, name in named.items():
        value = described[option]
        if value is None or value in ((), {}):
            continue
        fields[name] = value
    if "spiffe_id" in fields:
        fields["spiffe_id"] = session.spiffe_id(fields["spiffe_id"])
    if "parent_id" in fields:
        fields["parent_id"] = session.parent_id(fields["parent_id"])
    if "expires_at" in fields:
        fields["expires_at"] = _after(fields["expires_at"])
    return fields


def _after(span: timedelta) -> Any:
    try:
        return SystemClock().now() + span
    except OverflowError as exc:
        raise UsageRefused("--expires-in lies beyond the calendar") from exc


def _entry(fields: dict[str, Any]) -> Entry:
    from identity_client.admin import Entry

    return Entry(**fields)


def _done(outcomes: Sequence[Outcome[T]]) -> list[T]:
    return [one.value for one in outcomes if one.error is None and one.value is not None]


def _show(invocation: Invocation, outcomes: Sequence[Outcome[Entry]]) -> None:
    stored = _done(outcomes)
    if len(outcomes) == 1:
        if stored:
            emit(invocation.output, stored[0], lambda: _facts(stored[0]))
    else:
        emit(invocation.output, {"entries": stored}, lambda: _table(stored))


def _hint_at_users(invocation: Invocation, created: Sequence[Entry]) -> None:
    """Tell of entries that name a program and leave open who runs it."""
    if invocation.output is OutputFormat.JSON:
        return
    open_to_all = [
        one.id
        for one in created
        if one.selectors and all(name.startswith(_PROGRAM) for name in one.selectors)
    ]
    if open_to_all:
        more = f" and {len(open_to_all) - 3} more" if len(open_to_all) > 3 else ""
        say(
            f"hint: {', '.join(open_to_all[:3])}{more}: any local user can start the program, with "
            "code of their own in it (LD_PRELOAD); name unix:uid as well"
        )


def _wait(
    invocation: Invocation,
    session: Session,
    outcomes: Sequence[Outcome[T]],
    timeout: timedelta,
    named: Sequence[Entry] = (),
) -> None:
    """Wait for what succeeded; where another item failed, that one is the command's failure."""
    if not _done(outcomes):
        return
    try:
        wait_applied(session, timeout, named)
    except NotApplied as late:
        if all(one.error is None for one in outcomes):
            raise
        failure_of(late).tell(as_json=invocation.output is OutputFormat.JSON)


def _raise_first(
    invocation: Invocation, outcomes: Sequence[Outcome[T]], names: Sequence[str]
) -> None:
    """Tell every failed item; the first one is raised, so its kind is the exit code."""
    failed = [
        (name, one.error)
        for name, one in zip(names, outcomes, strict=True)
        if one.error is not None
    ]
    if not failed:
        return
    if len(outcomes) > 1:
        for name, error in failed:
            error.message = f'"{name}": {error.message}'
    for _, error in failed[1:]:
        failure_of(error).tell(as_json=invocation.output is OutputFormat.JSON)
    raise failed[0][1]


def _table(found: Sequence[Entry]) -> str:
    rows: list[Row] = [
        [one.id, one.spiffe_id, one.parent_id, ", ".join(one.selectors), _state(one)]
        for one in found
    ]
    columns = ["entry", "spiffe id", "parent", "selectors", "state"]
    return table(columns, rows, empty="there is no such entry; idb entry create makes one")


def _state(one: Entry) -> Text:
    if one.held_by:
        return Text(f"held by {one.held_by}", Style.BAD)
    if one.disabled:
        return Text("disabled", Style.BAD)
    if one.expires_at is not None:
        now = SystemClock().now()
        style = Style.BAD if one.expires_at <= now else Style.WARN
        return Text(f"expires {distance(one.expires_at, now)}", style)
    return Text("live", Style.GOOD)


def _facts(one: Entry) -> str:
    now = SystemClock().now()
    flags = [
        name.replace("_", " ")
        for name in ("admin", "downstream", "per_process")
        if getattr(one, name)
    ]
    labels = "\n".join(f"{key}={value}" for key, value in sorted(one.labels.items()))
    pairs: list[tuple[str, str | Text]] = [
        ("entry", one.id),
        ("spiffe id", one.spiffe_id),
        ("parent", one.parent_id),
        ("selectors", "\n".join(one.selectors) or "-"),
        ("state", _state(one)),
        ("x509 ttl", duration(one.x509_ttl) if one.x509_ttl else "default"),
        ("jwt ttl", duration(one.jwt_ttl) if one.jwt_ttl else "default"),
    ]
    optional = [
        ("dns names", "\n".join(one.dns_names)),
        ("hint", one.hint),
        ("federates with", "\n".join(one.federates_with)),
        ("key type", one.key_algorithm),
        ("flags", ", ".join(flags)),
        ("owner", one.owner),
        ("labels", labels),
    ]
    pairs += [(name, value) for name, value in optional if value]
    pairs += [
        ("revision", str(one.revision)),
        ("created", moment(one.created_at, now=now)),
        ("updated", moment(one.updated_at, now=now)),
    ]
    return facts(pairs)
