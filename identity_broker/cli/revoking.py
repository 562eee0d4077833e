"""How a revocation is carried out: the plan, the question, the order, and who has heard.

- The plan is shown before anything is asked or done.
- Success is told the moment it is durable; whatever comes after can only add to it: a failure to
  learn who has heard is told, and is no failure of the command.
"""

from __future__ import annotations

import shlex
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from identity_broker.cli import revocation_text as text
from identity_broker.cli.confirm import can_ask, confirm
from identity_broker.cli.connect import Session
from identity_broker.cli.options import Invocation
from identity_broker.cli.output import OutputFormat, clean, emit, moment, say
from identity_broker.domain.clock import SystemClock

if TYPE_CHECKING:
    from identity_client.admin import Propagation, Revocation, RevocationPlan, Revoked, Subject

_LIFTABLE = "certificate-hold"
_ACKNOWLEDGED_WITHIN = timedelta(seconds=2)
_POLL_SECONDS = 0.25
_TELL_EVERY = 1.0

_pause = threading.Event()


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What the command line asks for, beside the subject."""

    reason: str
    comment: str = ""
    revocation_id: str = ""
    hold: str = ""
    hold_until: datetime | None = None
    without_hold: bool = False

    def has_hold(self, plan: RevocationPlan) -> bool:
        """Whether a hold comes with it."""
        return (plan.holds or self.reason == _LIFTABLE) and not self.without_hold


def show_plan(invocation: Invocation, session: Session, subject: Subject, order: Order) -> None:
    """Only say what would be hit, on stdout."""
    plan = session.admin.revocations.plan(subject)
    hold = order.has_hold(plan)
    emit(invocation.output, {"plan": plan}, lambda: text.plan_facts(plan, hold=hold))


def carry_out(
    invocation: Invocation,
    session: Session,
    subject: Subject,
    order: Order,
    *,
    yes: bool,
    wait: bool,
) -> None:
    """Show the plan, ask, revoke, follow, and say who has heard."""
    from identity_client.admin import HoldTerms, RevocationReason, SubjectKind
    from identity_client.errors import BrokerUnavailable, IdentityError

    revocations = session.admin.revocations
    plan = revocations.plan(subject)
    # A program that answers for itself reads the plan in the one document.
    if invocation.output is not OutputFormat.JSON or (not yes and can_ask()):
        say(text.plan_facts(plan, hold=order.has_hold(plan), stream=sys.stderr))
    confirm("Revoke?", yes=yes, otherwise="nothing was revoked")
    # Chosen here, so that it can be named whatever becomes of the connection.
    revocation_id = order.revocation_id or revocations.new_id()
    began = time.perf_counter()
    try:
        done = revocations.revoke(
            plan.subject,
            reason=RevocationReason(order.reason),
            comment=order.comment,
            revocation_id=revocation_id,
            hold=HoldTerms(name=order.hold, until=order.hold_until)
            if order.hold or order.hold_until
            else None,
            without_hold=order.without_hold,
        )
    except BrokerUnavailable as lost:
        repeat = f"with --id {revocation_id}"
        if subject.kind is SubjectKind.SELECT:
            # A time like 2h is another one by then.
            repeat += f" --select {shlex.quote(plan.subject.value)}"
        lost.hint = (
            f"whether it was stored is not known: idb revoke status {revocation_id}; "
            f"the same command {repeat} is the same revocation"
        )
        raise
    took = round((time.perf_counter() - began) * 1000)
    talk = invocation.output is not OutputFormat.JSON
    if talk:
        _tell_done(done, plan, order, took)
    document: dict[str, Any] = {
        "plan": plan,
        "revocation": done.revocation,
        "propagation": None,
        "revoked_ids": done.revoked_ids,
        "repeated": done.repeated,
    }
    more: list[tuple[str, Any]] = []
    if wait:
        try:
            document["revocation"] = _follow(session, plan, done.revocation, talk=talk)
            status = revocations.get(revocation_id, wait=_ACKNOWLEDGED_WITHIN)
        except KeyboardInterrupt:
            say(f"it is revoked whatever this command does: idb revoke status {revocation_id}")
            raise
        except IdentityError as unknown:
            say(f"it is revoked; who has heard is not known: {clean(unknown.message)}")
            say(f"hint: idb revoke status {revocation_id}")
        else:
            document |= {"revocation": status.revocation, "propagation": status.propagation}
            more = text.propagation_facts(status.propagation)
            if talk:
                _tell_heard(status.propagation, revocation_id)
    final: Revocation = document["revocation"]
    now = SystemClock().now()
    emit(invocation.output, document, lambda: text.revocation_facts(final, now, more))


def _tell_done(done: Revoked, plan: RevocationPlan, order: Order, milliseconds: int) -> None:
    if done.repeated:
        _tell_repeat(done.revocation, plan, order)
    else:
        _tell_durable(done.revocation, milliseconds)
    _tell_hold(done.revocation, plan)
    for line in text.joining_again(plan):
        say(line)


def _tell_durable(revocation: Revocation, milliseconds: int) -> None:
    if revocation.state.value == "running":
        say(f"ordered, durable after {milliseconds:,} ms: {revocation.id}; it goes on by itself")
    else:
        revoked = text.count(revocation.revoked, "credential")
        say(f"revoked: {revoked}, durable after {milliseconds:,} ms: {revocation.id}")


def _tell_repeat(known: Revocation, plan: RevocationPlan, order: Order) -> None:
    before = f"ordered before, {moment(known.ordered_at, now=SystemClock().now())}: {known.id}"
    if known.state.value == "running":
        say(f"{before}; it goes on by itself")
        return
    say(f"{before}; nothing new was revoked by this command")
    if live := plan.live_x509 + plan.live_jwt:
        say(
            f"{text.count(live, 'credential')} of the subject may still be valid: this revocation "
            "does not end them, one with another --id does"
        )
    if order.comment != known.comment:
        say(f'its comment stays "{clean(known.comment)}"')


def _tell_hold(revocation: Revocation, plan: RevocationPlan) -> None:
    """What the hold does, and what lifting it will do."""
    if not revocation.hold:
        return
    held = len(revocation.held_entry_ids)
    lifting = ["issues again"] if plan.holds else []
    if revocation.reason.value == _LIFTABLE:
        lifting.append("makes valid again what was revoked")
    began = f"{text.count(held, 'entry is', 'entries are')} held; " if held else ""
    say(f"{began}idb hold lift {revocation.hold} {' and '.join(lifting)}")


def _follow(
    session: Session, plan: RevocationPlan, revocation: Revocation, *, talk: bool
) -> Revocation:
    """Wait until all of it is revoked; there is no end to that but Ctrl-C."""
    live = plan.live_x509 + plan.live_jwt
    told = time.monotonic()
    ran = False
    while revocation.state.value == "running":
        ran = True
        _pause.wait(_POLL_SECONDS)
        revocation = session.admin.revocations.get(revocation.id).revocation
        if talk and time.monotonic() - told >= _TELL_EVERY:
            told = time.monotonic()
            say(f"{revocation.revoked:,} of about {live:,} revoked")
    if ran and talk:
        say(f"revoked: {text.count(revocation.revoked, 'credential')}")
    return revocation


def _tell_heard(propagation: Propagation, revocation_id: str) -> None:
    say(text.summary(propagation))
    if propagation.silent:
        say(f"silent: {_listed(text.silent(propagation), propagation.silent)}")
    if propagation.away:
        say(f"away: {_listed(text.away(propagation), propagation.away)}")
        say(
            "what was issued through a node that is away may still be held there, and be accepted "
            "by who is not told; the node is told before anything else once it is back"
        )
    say(f"idb revoke status {revocation_id} says who has heard, and has the signed statement")


def _listed(names: Sequence[str], number: int) -> str:
    more = number - len(names)
    return f"{', '.join(map(clean, names))}{f' and {more:,} more' if more else ''}"
