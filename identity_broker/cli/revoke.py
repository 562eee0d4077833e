"""`idb revoke`: end an identity, a credential, a node, a key or an authority, and prove it.

- Exactly one subject; the plan of it is always shown before anything is done.
- `verify` works without a broker.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from identity_broker.cli.confirm import yes_option
from identity_broker.cli.connect import Session
from identity_broker.cli.errors import FileMalformed, NotAcknowledged, UsageRefused
from identity_broker.cli.files import read_input, write_text
from identity_broker.cli.options import Duration, Invocation, pass_invocation
from identity_broker.cli.output import emit, say
from identity_broker.cli.tree import IdbVerb
from identity_broker.domain.clock import SystemClock

if TYPE_CHECKING:
    from identity_client.admin import RevocationStatus, Subject

C = TypeVar("C", bound=Callable[..., Any])

_FILE = click.Path(path_type=Path)
_POLL_SECONDS = 0.25
_pause = threading.Event()

REASONS = [
    "unspecified",
    "key-compromise",
    "ca-compromise",
    "affiliation-changed",
    "superseded",
    "cessation-of-operation",
    "certificate-hold",
    "privilege-withdrawn",
]
_SUBJECTS = [
    ("--spiffe-id", "spiffe_id", "ID", "Everything an identity holds (ID or /path)."),
    ("--serial", "serial", "SERIAL", "One X.509-SVID."),
    ("--jti", "jti", "JTI", "One JWT-SVID."),
    ("--node", "node", "NODE", "A node: its SVIDs and all that was issued through it."),
    ("--entry", "entry", "ENTRY", "Everything issued from a registration entry."),
    (
        "--key-fingerprint",
        "key_fingerprint",
        "HEX",
        "Everything ever issued to a key, which is refused for ever: SHA-256 of its "
        "SubjectPublicKeyInfo.",
    ),
    (
        "--authority",
        "authority",
        "ID",
        "Everything an authority signed; another one takes its place.",
    ),
    (
        "--select",
        "select",
        "EXPR",
        'What all terms select: "spiffe-id=/shop/* kind=x509 node= entry= issued-after=2h '
        'issued-before= owner= label.KEY=VALUE".',
    ),
]


class Moment(click.ParamType[datetime]):
    """A time to come: RFC 3339, or a duration from now."""

    name = "time"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> datetime:
        """Read the time."""
        if isinstance(value, datetime):
            return value
        now = SystemClock().now()
        try:
            moment = _time(value) or now + Duration().convert(value, param, ctx)
        except (click.BadParameter, OverflowError):
            self.fail(f'"{value}" is neither a time like 2030-01-01T00:00:00Z nor like 8h')
        if moment <= now:
            self.fail(f'"{value}" is over already')
        return moment


def _time(text: str) -> datetime | None:
    """A time in UTC; None where it is something else.

    Raises:
        OverflowError: no calendar reaches that far.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)


def _subject_options(function: C) -> C:
    for option, name, metavar, text in reversed(_SUBJECTS):
        function = click.option(option, name, default="", metavar=metavar, help=text)(function)
    return function


@click.group(
    cls=IdbVerb,
    connects=True,
    examples=[
        "idb revoke --spiffe-id /shop/orders --reason key-compromise",
        "idb revoke --entry e-42 --plan",
        "idb revoke --node web-1 --reason certificate-hold --hold-until 8h --yes",
        'idb revoke --select "spiffe-id=/shop/* issued-after=2h" --hold shop-incident',
        "idb revoke status rev-4be1c0ffee15dead --wait 5s",
    ],
)
@_subject_options
@click.option(
    "--reason",
    type=click.Choice(REASONS),
    metavar="REASON",
    help=f"RFC 5280: {', '.join(REASONS)}. certificate-hold alone can be taken back.",
)
@click.option("--comment", default="", metavar="TEXT", help="Your own words, for the record.")
@click.option("--hold", default="", metavar="NAME", help="What the hold is called.")
@click.option(
    "--hold-until",
    type=Moment(),
    metavar="TIME",
    help="When the hold ends by itself: RFC 3339, or like 8h.",
)
@click.option("--no-hold", is_flag=True, help="Stop no issuance: the next SVID is fetched at once.")
@click.option("--plan", "only_plan", is_flag=True, help="Only show what would be hit.")
@click.option(
    "--id",
    "revocation_id",
    default="",
    metavar="ID",
    help="Name it, so that a repeat is the same revocation.",
)
@click.option("--no-wait", is_flag=True, help="Do not wait to see which verifiers have heard.")
@yes_option
@pass_invocation
@click.pass_context
def revoke(
    context: click.Context,
    invocation: Invocation,
    /,
    *,
    reason: str | None,
    comment: str,
    hold: str,
    hold_until: datetime | None,
    no_hold: bool,
    only_plan: bool,
    revocation_id: str,
    no_wait: bool,
    yes: bool,
    **named: str,
) -> None:
    """Revoke, see who has heard, and keep the proof.

    Shows what will be hit and asks. Durable when it says so; connected verifiers refuse from then
    on, on open connections too. --spiffe-id, --node, --entry and --select stop issuance as well:
    with a hold, until idb hold lift.
    """
    options = (reason, comment, hold, hold_until, no_hold, only_plan, revocation_id, no_wait, yes)
    given = [option for option, name, *_ in _SUBJECTS if named[name]]
    if context.invoked_subcommand is not None:
        if given or any(options):
            raise UsageRefused(
                f"{context.invoked_subcommand} is a command of its own: no option stands before it",
                hint=f"idb revoke {context.invoked_subcommand} --help",
            )
        return
    if len(given) != 1:
        raise UsageRefused(
            f"name one thing to revoke, not {' and '.join(given)}"
            if given
            else "name what to revoke",
            hint=f"one of {', '.join(option for option, *_ in _SUBJECTS)}",
        )
    if no_hold and (hold or hold_until):
        raise UsageRefused("--no-hold leaves no hold to name or to end", hint="leave it out")
    if no_hold and reason == "certificate-hold":
        raise UsageRefused(
            "certificate-hold is a hold: it is what can be lifted", hint="leave out --no-hold"
        )
    from identity_broker.cli import revoking
    from identity_broker.domain.revocation import check_name

    # Refused before anything is shown, as the broker would refuse it after.
    for name, what in ((revocation_id, "a revocation's id"), (hold, "the name of a hold")):
        if name:
            check_name(name, what)
    order = revoking.Order(
        reason=reason or "unspecified",
        comment=comment,
        revocation_id=revocation_id,
        hold=hold,
        hold_until=hold_until,
        without_hold=no_hold,
    )
    with Session.open(invocation) as session:
        subject = _subject(session, named)
        if only_plan:
            revoking.show_plan(invocation, session, subject, order)
        else:
            revoking.carry_out(invocation, session, subject, order, yes=yes, wait=not no_wait)


def _subject(session: Session, named: Mapping[str, str]) -> Subject:
    from identity_client.admin import Subject, SubjectKind

    name, value = next((name, value) for name, value in named.items() if value)
    kind = SubjectKind(name.replace("_", "-"))
    if kind is SubjectKind.SPIFFE_ID:
        value = session.spiffe_id(value)
    elif kind is SubjectKind.NODE:
        value = session.node_id(value)
    return Subject(kind, value)


@revoke.command(
    connects=True,
    examples=["idb revoke status rev-4be1c0ffee15dead --wait 5s --statement proof.json"],
)
@click.argument("revocation_id", metavar="ID")
@click.option(
    "--wait",
    type=Duration(),
    default="0s",
    metavar="DURATION",
    help="Wait so long for every connected verifier, and with --statement for the statement.",
)
@click.option(
    "--statement", "statement_file", type=_FILE, metavar="FILE", help="Write the signed statement."
)
@pass_invocation
def status(
    invocation: Invocation, revocation_id: str, wait: timedelta, statement_file: Path | None
) -> None:
    """Say what became of a revocation and which verifiers have acknowledged it.

    Exit code 6: --wait is over, and a connected verifier has not, or there is no statement yet.
    """
    from identity_broker.cli import revocation_text as text

    with Session.open(invocation) as session:
        found = _awaited(session, revocation_id, wait, statement=statement_file is not None)
    now = SystemClock().now()

    def render() -> str:
        proof = "signed; --statement FILE writes it" if found.statement else "not signed yet"
        heard = [*text.propagation_facts(found.propagation), ("statement", proof)]
        parts = [text.revocation_facts(found.revocation, now, heard)]
        if found.propagation.verifiers:
            parts.append(text.verifier_table(found.propagation.verifiers, now))
        return "\n\n".join(parts)

    emit(invocation.output, found, render)
    if statement_file is not None:
        if not found.statement:
            raise NotAcknowledged(
                "there is no signed statement yet",
                hint=f"idb revoke status {revocation_id} --statement FILE --wait 30s",
            )
        write_text(statement_file, found.statement)
        say(f'the statement is in "{statement_file}"; idb revoke verify checks it')
    if wait and found.propagation.silent:
        names = ", ".join(text.silent(found.propagation))
        raise NotAcknowledged(f"it is revoked, and not acknowledged by {names}")


def _awaited(
    session: Session, revocation_id: str, wait: timedelta, *, statement: bool
) -> RevocationStatus:
    """The revocation once everybody has heard, and there is a statement, or `wait` is over."""
    until = time.monotonic() + wait.total_seconds()
    while True:
        left = timedelta(seconds=max(0.0, until - time.monotonic()))
        found = session.admin.revocations.get(revocation_id, wait=left)
        lacking = found.propagation.silent or found.revocation.state.value == "running"
        if time.monotonic() >= until or not (lacking or (statement and not found.statement)):
            return found
        _pause.wait(_POLL_SECONDS)


@revoke.command("list", connects=True)
@click.option(
    "--limit", type=click.IntRange(min=1), default=100, show_default=True, help="Newest first."
)
@pass_invocation
def list_revocations(invocation: Invocation, limit: int) -> None:
    """List revocations, newest first."""
    from identity_broker.cli import revocation_text as text

    with Session.open(invocation) as session:
        found = list(islice(session.admin.revocations.list(), limit + 1))
    if len(found) > limit:
        found.pop()
        say(f"the newest {limit} are shown; --limit shows more")
    now = SystemClock().now()
    emit(invocation.output, {"revocations": found}, lambda: text.revocation_table(found, now))


@revoke.command(examples=["idb revoke verify proof.json --bundle bundle.json"])
@click.argument("file", type=_FILE)
@click.option(
    "--bundle",
    "bundle_file",
    type=_FILE,
    required=True,
    metavar="FILE",
    help="The trust domain's: idb bundle show --format spiffe, or the JSON of /bundle.",
)
@click.option("--trust-domain", metavar="NAME", help="Whose bundle it is; the statement's if none.")
@pass_invocation
def verify(invocation: Invocation, file: Path, bundle_file: Path, trust_domain: str | None) -> None:
    """Verify a revocation's signed statement. Exit code 0: it holds; 3: it does not."""
    from identity_broker.cli import revocation_text as text
    from identity_ca.bundle import TrustBundle
    from identity_ca.spiffe_id import TrustDomain
    from identity_ca.statement import verify_statement

    try:
        statement = read_input(file).decode()
    except UnicodeDecodeError:
        raise FileMalformed(f'"{file}" is no statement: it is not text') from None
    domain = TrustDomain.parse(trust_domain or _claimed_domain(statement, file))
    bundle = TrustBundle.from_jwks(domain, read_input(bundle_file))
    payload = dict(verify_statement(statement, bundle))
    say("it holds")
    emit(
        invocation.output,
        {"verified": True, "statement": payload},
        lambda: text.statement_facts(payload),
    )


def _claimed_domain(statement: str, file: Path) -> str:
    """The trust domain a statement says it is of; whether it may is what the bundle tells."""
    from identity_ca.jose import MalformedJose, b64url_decode, parse_json_object

    try:
        payload = parse_json_object(statement.encode()).get("payload")
        domain = parse_json_object(b64url_decode(str(payload))).get("trust_domain")
    except MalformedJose as exc:
        raise FileMalformed(f'"{file}" is not a revocation\'s statement') from exc
    return str(domain)
