"""holds: named stops of issuance, until they are lifted or their time is over.

- Lifting is one transaction: what the hold stopped, and what was revoked with it for
  certificateHold, is free or valid again together, or not at all.
- What another lasting hold covers stays held or revoked, by that one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final

from identity_broker.domain.caller import Caller
from identity_broker.domain.clock import Clock
from identity_broker.domain.credential import RevocationReason
from identity_broker.domain.events import AuditEvent, AuditKind
from identity_broker.domain.paging import MAX_PAGE_SIZE, Page
from identity_broker.domain.revocation import LIFTED_BY_TIME, Hold
from identity_broker.domain.selection import Selection
from identity_broker.errors import HoldNotFound
from identity_broker.lifecycle.directory import Directory
from identity_broker.lifecycle.plan import stops_issuance
from identity_broker.store import STEP, Repositories, Store
from identity_broker.telemetry.logs import get_logger

_log = get_logger("holds")

MOST_NAMED: Final = 100


@dataclass(frozen=True, slots=True)
class HoldStatus:
    """A hold and the entries it holds now; at most 100."""

    hold: Hold
    held_entry_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Lifted:
    """What lifting a hold did.

    Attributes:
        released: how many credentials are valid again.
        freed_entry_ids: entries that may be issued from again.
    """

    hold: Hold
    released: int
    freed_entry_ids: tuple[str, ...]


class Holds:
    """The holds of the trust domain."""

    def __init__(self, store: Store, directory: Directory, clock: Clock) -> None:
        self._store = store
        self._directory = directory
        self._clock = clock

    async def page(self, before: str, size: int, *, include_lifted: bool) -> Page[HoldStatus]:
        """Return a page of holds, newest first.

        Raises:
            PageTokenInvalid: `before` is not a key of a page.
            StoreUnavailable: the database did not answer.
        """

        def read(repos: Repositories) -> Page[HoldStatus]:
            page = repos.holds.page(before, size, include_lifted=include_lifted)
            return Page(
                [
                    HoldStatus(hold, repos.holds.held_entry_ids(hold.name, MOST_NAMED))
                    for hold in page.items
                ],
                page.next_key,
            )

        return await self._store.read(read)

    async def lift(self, name: str, caller: Caller) -> Lifted:
        """Lift a hold; one that is lifted already stays so.

        Raises:
            HoldNotFound: there is none with that name.
            StoreUnavailable: repeat the call.
        """
        return await self._lift(name, caller.name)

    async def lift_due(self) -> None:
        """Lift the holds whose time is over.

        Raises:
            StoreUnavailable: they are lifted the next time.
        """
        now = self._clock.now()
        for hold in await self._store.read(lambda repos: repos.holds.due(now)):
            try:
                await self._lift(hold.name, LIFTED_BY_TIME)
            except HoldNotFound:
                continue
            _log.info("hold is over", hold=hold.name)

    async def _lift(self, name: str, by: str) -> Lifted:
        now = self._clock.now()
        lifted = await self._store.write(lambda repos: lift_in(repos, name, now, by))
        await self._directory.sync()
        return lifted


def lift_in(repos: Repositories, name: str, now: datetime, by: str) -> Lifted:
    """Lift a hold in a transaction; one that is lifted already stays so.

    Raises:
        HoldNotFound: there is none with that name.
    """
    before = repos.holds.get(name)
    if before.lifted_at is not None:
        return Lifted(before, 0, ())
    hold, freed = repos.holds.lift(name, now, by)
    released = _release(repos, hold, now)
    repos.audit.append(_event(AuditKind.HOLD_LIFTED, hold, now, len(freed)))
    if released:
        repos.audit.append(_event(AuditKind.CREDENTIAL_RELEASED, hold, now, released))
    return Lifted(hold, released, freed)


def _release(repos: Repositories, hold: Hold, now: datetime) -> int:
    """Make valid again what was revoked with the hold, and can be; return how many are."""
    if hold.reason is not RevocationReason.CERTIFICATE_HOLD:
        return 0
    released: set[str] = set()
    while True:
        step = repos.credentials.release(hold.order_id, now, STEP)
        released.update(step)
        if len(step) < STEP:
            break
    if not released:
        return 0
    for other in _others(repos):
        released -= _taken_over(repos, other, now)
    order = repos.orders.get(hold.order_id)
    repos.orders.update(replace(order, released=order.released + len(released)))
    return len(released)


def _others(repos: Repositories) -> Iterator[Hold]:
    """The lasting holds that credentials were revoked with for certificateHold."""
    before = ""
    while True:
        page = repos.holds.page(before, MAX_PAGE_SIZE)
        yield from (hold for hold in page.items if hold.reason is RevocationReason.CERTIFICATE_HOLD)
        before = page.next_key
        if not before:
            return


def _taken_over(repos: Repositories, hold: Hold, now: datetime) -> set[str]:
    """Revoke what this hold has found revoked already, by the one that is lifted."""
    order = repos.orders.get(hold.order_id)
    if order.committed_at is None:
        return set()  # it is still at it, and finds them
    selection = Selection.of(hold.subject)
    if not stops_issuance(selection):
        # What was issued since is none of its business.
        limit = selection.issued_before or order.committed_at
        selection = replace(selection, issued_before=min(limit, order.committed_at))
    revoked = repos.credentials.revoke(
        selection, order_id=order.id, reason=order.reason, comment=order.comment, now=now
    )
    if revoked:
        repos.orders.update(replace(order, revoked=order.revoked + len(revoked)))
    return {revocation.id for revocation in revoked}


def _event(kind: AuditKind, hold: Hold, now: datetime, count: int) -> AuditEvent:
    return AuditEvent(
        at=now,
        kind=kind,
        actor=hold.lifted_by,
        subject=str(hold.subject),
        reason=hold.reason.name,
        facts={"hold": hold.name, "revocation": hold.order_id, "count": str(count)},
    )
