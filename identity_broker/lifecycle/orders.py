"""orders: what revoking means in the store, a transaction at a time.

- The first transaction makes the decision durable: the order, its hold, the blocked key and the
  epoch, and the first step of credentials. Whatever dies after it, the order is finished.
- Every transaction reads the order again: two brokers may finish the same one, and the later finds
  nothing left to do.
- What is issued after its hold was lifted is not the order's any more.
- A repeat asks for what the order is: the same subject, reason and hold, while that lasts. Anything
  else under its id is refused, for it would look done.
"""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from identity_broker.domain import names
from identity_broker.domain.caller import Caller
from identity_broker.domain.clock import Clock
from identity_broker.domain.credential import Revocation, RevocationReason
from identity_broker.domain.entry import MAX_JWT_TTL
from identity_broker.domain.events import AuditEvent, AuditKind
from identity_broker.domain.revocation import (
    LIFTED_BY_TIME,
    BlockedKey,
    Hold,
    IdentityEpoch,
    OrderState,
    RevocationOrder,
    RevocationSubject,
    SubjectKind,
    check_name,
)
from identity_broker.domain.selection import Selection
from identity_broker.errors import RevocationExists, SubjectInvalid
from identity_broker.lifecycle.plan import stops_issuance, survey
from identity_broker.store import STEP, Repositories, Store

MAX_COMMENT_BYTES: Final = 512
_ID_OCTETS: Final = 8
# Verifiers' clocks differ from ours.
_CLOCKS_DIFFER: Final = timedelta(minutes=5)
_FOR_GOOD: Final = frozenset({SubjectKind.KEY_FINGERPRINT, SubjectKind.AUTHORITY})

Also = Callable[[Repositories], None]
"""Done in the transaction that makes the order durable."""


@dataclass(frozen=True, slots=True)
class OrderRequest:
    """What is to be revoked.

    Attributes:
        subject: in canonical spelling (`domain.selection.subject`).
        id: makes a repeat the same order; empty for a new random one.
        hold_name: what the hold is called; empty for the order's id.
        hold_until: when it ends by itself; None for never.
        without_hold: stop no issuance.
    """

    subject: RevocationSubject
    reason: RevocationReason = RevocationReason.UNSPECIFIED
    comment: str = ""
    id: str = ""
    hold_name: str = ""
    hold_until: datetime | None = None
    without_hold: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """What one transaction did.

    Attributes:
        order: as it is now.
        revocations: what was revoked.
        more: whether some of what it selects may be left.
        repeated: the order was there already.
    """

    order: RevocationOrder
    revocations: tuple[Revocation, ...] = ()
    more: bool = False
    repeated: bool = False


class Orders:
    """Orders in the store."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def open(self, request: OrderRequest, caller: Caller, also: Also | None) -> Step:
        """Make the order durable, and do its first step; a repeat returns it as it is.

        Raises:
            SubjectNotFound: nothing is known of the subject.
            SubjectInvalid: a name, the comment or the hold.
            HoldExists: the name is another's.
            RevocationExists: the id is another's, or the hold that came with it is over.
            StoreUnavailable: it may or may not be durable.
        """
        now = self._clock.now()
        selection = Selection.of(request.subject)
        order = _order_of(request, caller, now)
        hold = _hold_of(request, order, selection)

        def look(repos: Repositories) -> RevocationOrder:
            known = repos.orders.find(order.id)
            if known is not None:
                return _same(repos, known, order, hold, now)
            if also is not None:
                # Whoever does more than revoking knows what it is about.
                count = repos.credentials.count(selection, now)
            else:
                count = survey(repos, request.subject, selection, now)
            return replace(order, already_revoked=count.already_revoked, expired=count.expired)

        def write(repos: Repositories) -> Step:
            known = repos.orders.find(order.id)
            if known is not None:
                return Step(_same(repos, known, order, hold, now), repeated=True)
            if also is not None:
                also(repos)
            draws_a_line = request.subject.kind in _FOR_GOOD or (
                hold is not None and stops_issuance(selection)
            )
            opened = replace(
                counted, hold=hold.name if hold is not None else "", swept=not draws_a_line
            )
            repos.orders.create(opened)
            _stop(repos, opened, hold)
            if request.subject.kind is SubjectKind.AUTHORITY:
                # First another one has to sign: what this one signs meanwhile would be lost.
                repos.audit.append(_event(AuditKind.CREDENTIAL_REVOKED, opened, now))
                return Step(opened, more=True)
            step = _revoked(repos, opened, selection, now)
            if opened.swept and not step.more:
                step = replace(step, order=_committed(repos, step.order, now))
            repos.orders.update(step.order)
            repos.audit.append(
                _event(AuditKind.CREDENTIAL_REVOKED, opened, now, len(step.revocations))
            )
            return step

        # Counted beside the writers, who need not wait for it.
        counted = await self._store.read(look)
        return await self._store.write(write)

    async def advance(self, order_id: str, *, commit: bool) -> Step:
        """Revoke a step of what is left; with `commit`, the order is committed once nothing is.

        Raises:
            RevocationNotFound: there is no such order.
            StoreUnavailable: repeat the call.
        """

        def write(repos: Repositories) -> Step:
            now = self._clock.now()
            order = repos.orders.get(order_id)
            if order.state is not OrderState.RUNNING:
                return Step(order)
            step = _go_on(repos, order, now)
            if commit and not step.more:
                if order.hold:
                    # What was granted before the hold may have been signed after the first epoch.
                    _raise_epoch(repos, order, now)
                step = replace(step, order=_committed(repos, step.order, now))
            repos.orders.update(step.order)
            return step

        return await self._store.write(write)

    async def sweep(self, order_id: str) -> Step:
        """Revoke a step of what others had under way; the order is swept once nothing is left.

        Raises:
            RevocationNotFound: there is no such order.
            StoreUnavailable: repeat the call.
        """

        def write(repos: Repositories) -> Step:
            now = self._clock.now()
            order = repos.orders.get(order_id)
            if order.swept:
                return Step(order)
            step = _go_on(repos, order, now)
            if step.revocations:
                if order.hold:
                    _raise_epoch(repos, order, now)
                step = replace(step, order=replace(step.order, sequence=repos.outbox.latest()))
            if not step.more:
                step = replace(step, order=replace(step.order, swept=True))
            repos.orders.update(step.order)
            return step

        return await self._store.write(write)

    async def unfinished(self) -> list[RevocationOrder]:
        """Those that are running or not swept, oldest first.

        Raises:
            StoreUnavailable: the database did not answer.
        """
        found = await self._store.read(lambda repos: repos.orders.unfinished())
        return [order for order in found if order.state is OrderState.RUNNING or not order.swept]


# --- what is asked for ----------------------------------------------------------------------------


def _order_of(request: OrderRequest, caller: Caller, now: datetime) -> RevocationOrder:
    if len(request.comment.encode()) > MAX_COMMENT_BYTES:
        raise SubjectInvalid(f"a comment has at most {MAX_COMMENT_BYTES} bytes")
    if request.reason is RevocationReason.CERTIFICATE_HOLD and request.subject.kind in _FOR_GOOD:
        raise SubjectInvalid(
            "a key or an authority is revoked for good: it cannot be put on hold",
            hint="give another reason",
        )
    return RevocationOrder(
        id=check_name(request.id or f"rev-{secrets.token_hex(_ID_OCTETS)}", "a revocation's id"),
        subject=request.subject,
        reason=request.reason,
        comment=request.comment,
        actor=caller.name,
        ordered_at=now,
    )


def _hold_of(request: OrderRequest, order: RevocationOrder, selection: Selection) -> Hold | None:
    """The hold that comes with an order."""
    is_named = bool(request.hold_name or request.hold_until)
    can_be_lifted = order.reason is RevocationReason.CERTIFICATE_HOLD
    if request.without_hold:
        if can_be_lifted:
            raise SubjectInvalid(
                "what is revoked for certificateHold needs a hold: lifting it makes it valid again"
            )
        if is_named:
            raise SubjectInvalid("a hold is both described and refused")
        return None
    if not can_be_lifted and not stops_issuance(selection):
        if is_named:
            raise SubjectInvalid(
                f"revoking by {order.subject.kind} stops no issuance: there is nothing to hold",
                hint="a hold comes with --spiffe-id, --entry, --node and selections of entries, "
                "and with the reason certificateHold",
            )
        return None
    if request.hold_until is not None and request.hold_until <= order.ordered_at:
        raise SubjectInvalid("the hold would be over already")
    return Hold(
        name=check_name(request.hold_name or order.id, "the name of a hold"),
        subject=order.subject,
        order_id=order.id,
        reason=order.reason,
        actor=order.actor,
        created_at=order.ordered_at,
        until=request.hold_until,
    )


def _same(
    repos: Repositories,
    known: RevocationOrder,
    asked: RevocationOrder,
    hold: Hold | None,
    now: datetime,
) -> RevocationOrder:
    """The known order, if it is what is asked for.

    Raises:
        RevocationExists: it is another one, or its hold is over.
    """
    if _is_other_time(known.subject, asked.subject):
        again = shlex.quote(known.subject.value)
        raise RevocationExists(
            f'the revocation "{known.id}" has other times: one like 2h is another whenever it is '
            "typed",
            hint=f"repeat it with --select {again}; another --id is another revocation",
        )
    its_hold = next(iter(repos.holds.get_many([known.hold])), None)
    if differs := list(_differences(known, its_hold, asked, hold)):
        raise RevocationExists(
            f'the revocation "{known.id}" {", ".join(differs)}',
            hint=f"idb revoke status {known.id}; another --id is another revocation",
        )
    if known.hold and (its_hold is None or not its_hold.lasts(now)):
        was_lifted = its_hold is not None and its_hold.lifted_by not in ("", LIFTED_BY_TIME)
        over = "was lifted" if was_lifted else "has ended"
        raise RevocationExists(
            f'the hold of the revocation "{known.id}" {over}: this is another incident',
            hint=f"choose another --id; idb revoke status {known.id} is about the first",
        )
    return known


def _is_other_time(known: RevocationSubject, asked: RevocationSubject) -> bool:
    """Whether two expressions differ by their times alone."""
    if known == asked or {known.kind, asked.kind} != {SubjectKind.SELECT}:
        return False
    one, other = Selection.of(known), Selection.of(asked)
    if (one.issued_after is None) != (other.issued_after is None):
        return False
    if (one.issued_before is None) != (other.issued_before is None):
        return False
    at_its_times = replace(one, issued_after=other.issued_after, issued_before=other.issued_before)
    return at_its_times == other


def _differences(
    known: RevocationOrder, its_hold: Hold | None, asked: RevocationOrder, hold: Hold | None
) -> Iterator[str]:
    """What a known order is and the one that is asked for is not."""
    is_other = known.subject != asked.subject
    if is_other:
        yield f"is of {known.subject}"
    if known.reason is not asked.reason:
        yield f"is for {_spelled(known.reason)}"
    if is_other:
        return  # a hold is of its subject
    if known.hold != (hold.name if hold is not None else ""):
        yield f'has the hold "{known.hold}"' if known.hold else "has no hold"
    # "8h" is another time whenever it is typed.
    elif its_hold and hold and (its_hold.until is None) != (hold.until is None):
        ends = f"ends at {its_hold.until.isoformat()}" if its_hold.until else "has no end"
        yield f"has a hold that {ends}"


def _spelled(reason: RevocationReason) -> str:
    """A reason as it is typed: key-compromise."""
    return reason.name.lower().replace("_", "-")


# --- parts of a transaction -----------------------------------------------------------------------


def _stop(repos: Repositories, order: RevocationOrder, hold: Hold | None) -> None:
    """Let nothing more be issued to the subject, before any of it is revoked."""
    now, subject = order.ordered_at, order.subject
    if hold is not None:
        repos.holds.place(hold)
        repos.audit.append(_event(AuditKind.HOLD_PLACED, order, now))
    if subject.kind is SubjectKind.KEY_FINGERPRINT:
        key = BlockedKey(subject.value, order.id, order.reason, now)
        if repos.blocked_keys.block(key):
            repos.audit.append(_event(AuditKind.KEY_BLOCKED, order, now))
    _raise_epoch(repos, order, now)


def _raise_epoch(repos: Repositories, order: RevocationOrder, now: datetime) -> None:
    """End the tokens of an identity, the ledger's and those it has not heard of.

    An epoch cannot be taken back: what may be valid again is ended one by one.
    """
    identity = Selection.of(order.subject).identity
    if (
        identity is None
        or names.is_reserved(identity)
        or order.reason is RevocationReason.CERTIFICATE_HOLD
    ):
        return
    expires_at = now + MAX_JWT_TTL + _CLOCKS_DIFFER
    repos.epochs.raise_to(IdentityEpoch(identity, now, expires_at))


def _go_on(repos: Repositories, order: RevocationOrder, now: datetime) -> Step:
    selection = _left_to(repos, order)
    if selection is None:
        return Step(order)
    step = _revoked(repos, order, selection, now)
    if step.revocations:
        count = len(step.revocations)
        repos.audit.append(_event(AuditKind.CREDENTIAL_REVOKED, order, now, count))
    return step


def _left_to(repos: Repositories, order: RevocationOrder) -> Selection | None:
    """What the order still selects: with its hold, the right to more than that has ended."""
    selection = Selection.of(order.subject)
    if order.swept:
        # It draws no line, so that what is issued next is wanted.
        selection = _before(selection, order.ordered_at + _CLOCKS_DIFFER)
    lifted_at = repos.holds.get(order.hold).lifted_at if order.hold else None
    if lifted_at is None:
        return selection
    if order.reason is RevocationReason.CERTIFICATE_HOLD or not stops_issuance(selection):
        return None
    return _before(selection, lifted_at)


def _before(selection: Selection, limit: datetime) -> Selection:
    return replace(selection, issued_before=min(limit, selection.issued_before or limit))


def _revoked(
    repos: Repositories, order: RevocationOrder, selection: Selection, now: datetime
) -> Step:
    revoked = repos.credentials.revoke(
        selection,
        order_id=order.id,
        reason=order.reason,
        comment=order.comment,
        now=now,
        limit=STEP,
    )
    counted = replace(order, revoked=order.revoked + len(revoked))
    return Step(counted, revoked, len(revoked) >= STEP)


def _committed(repos: Repositories, order: RevocationOrder, now: datetime) -> RevocationOrder:
    return replace(
        order, state=OrderState.COMMITTED, committed_at=now, sequence=repos.outbox.latest()
    )


def _event(kind: AuditKind, order: RevocationOrder, now: datetime, revoked: int = 0) -> AuditEvent:
    facts = {"revocation": order.id, "comment": order.comment}
    if order.hold:
        facts["hold"] = order.hold
    if kind is AuditKind.CREDENTIAL_REVOKED:
        facts["revoked"] = str(revoked)
    return AuditEvent(
        at=now,
        kind=kind,
        actor=order.actor,
        subject=str(order.subject),
        reason=order.reason.name,
        facts=facts,
    )
