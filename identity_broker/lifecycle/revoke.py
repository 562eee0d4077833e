"""revoke: one order ends a credential, an identity, a node, a key or an authority."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from identity_broker.domain.caller import Caller
from identity_broker.domain.credential import Revocation, RevocationReason
from identity_broker.domain.paging import Page
from identity_broker.domain.revocation import RevocationOrder, RevocationSubject
from identity_broker.lifecycle.holds import HoldStatus, Lifted
from identity_broker.lifecycle.plan import RevocationPlan


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
class Ordered:
    """An order as it is now.

    Attributes:
        revocations: what this call revoked; at most 1,000 of them, and none for a repeat.
        held_entry_ids: entries its hold holds; at most 1,000.
    """

    order: RevocationOrder
    revocations: tuple[Revocation, ...]
    held_entry_ids: tuple[str, ...]


class Revoke:
    """Ends what must not be trusted any more.

    Attributes:
        on_committed: called on the loop, with the order, when all of it is durable; again when more
            was found later.
    """

    on_committed: list[Callable[[RevocationOrder], None]]

    async def plan(self, subject: RevocationSubject) -> RevocationPlan:
        """Say what revoking the subject would hit.

        Raises:
            SubjectNotFound: nothing is known of it.
        """
        raise NotImplementedError

    async def order(self, request: OrderRequest, caller: Caller) -> Ordered:
        """Revoke.

        Raises:
            SubjectNotFound: nothing is known of it.
            SubjectInvalid: a name or the hold.
            HoldExists, RevocationExists: the name is another's.
            StoreUnavailable: repeat the call, with the same id.
        """
        raise NotImplementedError

    async def get(self, order_id: str) -> Ordered:
        """Return an order as it is now.

        Raises:
            RevocationNotFound: there is none with that id.
        """
        raise NotImplementedError

    async def page(self, before: str, size: int) -> Page[RevocationOrder]:
        """Return a page of orders, newest first."""
        raise NotImplementedError

    async def holds(self, before: str, size: int, *, include_lifted: bool) -> Page[HoldStatus]:
        """Return a page of holds, newest first."""
        raise NotImplementedError

    async def lift(self, name: str, caller: Caller) -> Lifted:
        """Lift a hold; one that is lifted already stays so.

        Raises:
            HoldNotFound: there is none with that name.
        """
        raise NotImplementedError

    async def resume(self) -> None:
        """Go on with what a crash or an outage left unfinished."""
        raise NotImplementedError

    async def lift_due(self) -> None:
        """Lift the holds whose time is over."""
        raise NotImplementedError

    async def close(self) -> None:
        """Leave what is under way to the next start."""
        raise NotImplementedError
