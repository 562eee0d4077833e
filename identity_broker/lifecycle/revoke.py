"""revoke: one order ends a credential, an identity, a node, a key or an authority.

- Durable when it returns, and reflected in this broker's memory: the next call is refused, on an
  open connection too. Verifiers are told from the same change feed, and nobody waits for them.
- Nothing slips through: once nothing new is granted, what was granted before is waited for and
  revoked too. What another broker on the same store grants before it has read the change (a tenth
  of a second) is revoked a moment later.
- A subject with very many credentials goes on by itself when the call has returned. What a crash
  leaves is gone on with by `resume`, here or by another broker.
- Idempotent: with the same id it is the same order, and what is revoked already stays as it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Final, TypeVar

from identity_broker.domain.caller import Caller
from identity_broker.domain.clock import Clock
from identity_broker.domain.credential import Revocation
from identity_broker.domain.paging import Page
from identity_broker.domain.revocation import (
    OrderState,
    RevocationOrder,
    RevocationSubject,
    SubjectKind,
)
from identity_broker.errors import AuthorityNotFound, BrokerError
from identity_broker.lifecycle.directory import Directory
from identity_broker.lifecycle.holds import Holds, HoldStatus, Lifted
from identity_broker.lifecycle.orders import Also, OrderRequest, Orders, Step
from identity_broker.lifecycle.plan import Plans, RevocationPlan
from identity_broker.store import Repositories, Store
from identity_broker.telemetry.logs import get_logger

T = TypeVar("T")

__all__ = ["OrderRequest", "Ordered", "Revoke"]

_log = get_logger("revoke")

MOST_NAMED: Final = 1000
# How long a call waits for a large order.
_PATIENCE_SECONDS: Final = 5.0
# Twenty times what another broker needs to read the change feed.
_OTHERS_SECONDS: Final = 2.0
# Longer than whoever began an order needs between two steps of it.
_ABANDONED_AFTER: Final = timedelta(seconds=10)

CommitListener = Callable[[RevocationOrder], None]
RevokeAuthority = Callable[[str, str], Awaitable[None]]
"""Ends the trust in an authority, by its id and for an actor; in force here when it returns."""


@dataclass(frozen=True, slots=True)
class Ordered:
    """An order as it is now.

    Attributes:
        revocations: what this call revoked; at most 1,000 of them.
        held_entry_ids: entries its hold holds; at most 1,000.
        repeated: it was ordered before, and not by this call.
    """

    order: RevocationOrder
    revocations: tuple[Revocation, ...]
    held_entry_ids: tuple[str, ...]
    repeated: bool = False


@dataclass(slots=True)
class _Work:
    """What has to be done before an order is reflected here, and what was revoked meanwhile."""

    task: asyncio.Task[None] = field(init=False)
    revocations: list[Revocation] = field(default_factory=list)

    @classmethod
    def of(cls, task: asyncio.Task[None]) -> _Work:
        work = cls()
        work.task = task
        return work

    def took(self, step: Step) -> None:
        self.revocations.extend(step.revocations[: MOST_NAMED - len(self.revocations)])


class Revoke:
    """Ends what must not be trusted any more.

    Args:
        settled: returns when everything granted before the call has its outcome.
        revoke_authority: ends the trust in an authority.

    Attributes:
        on_committed: each is called on the loop, with the order, when all of it is durable, and
            once more when it is swept: more may have been revoked then, and nothing is after it.
            An order that has nothing to sweep is swept from the beginning.
    """

    def __init__(
        self,
        store: Store,
        directory: Directory,
        clock: Clock,
        settled: Callable[[], Awaitable[None]],
        *,
        revoke_authority: RevokeAuthority,
    ) -> None:
        self._store = store
        self._directory = directory
        self._clock = clock
        self._settled = settled
        self._revoke_authority = revoke_authority
        self._orders = Orders(store, clock)
        self._plans = Plans(store, clock)
        self._holds = Holds(store, directory, clock)
        self._working: dict[str, _Work] = {}
        self._sweeping: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._resumed = False
        self.on_committed: list[CommitListener] = []

    async def plan(self, subject: RevocationSubject) -> RevocationPlan:
        """Say what revoking the subject would hit.

        Raises:
            SubjectNotFound: nothing is known of it.
            StoreUnavailable: the database did not answer.
        """
        return await self._plans.of(subject)

    async def order(
        self, request: OrderRequest, caller: Caller, *, also: Also | None = None
    ) -> Ordered:
        """Revoke; a large order may still be running when this returns.

        Args:
            also: done in the transaction that makes the order durable, and may refuse it; the
                subject need not be known then.

        Raises:
            SubjectNotFound: nothing is known of it.
            SubjectInvalid: a name, the comment or the hold.
            HoldExists, RevocationExists: the name is another's.
            StoreUnavailable: repeat the call, with the same id.
            SigningBackendUnavailable: an authority has no successor yet; it is gone on with.
        """
        opening = self._spawn(self._opened(request, caller, also))
        # What was begun outlives its caller, and its caller's patience.
        order, repeated, work = await asyncio.shield(opening)
        if work is not None:
            done, _ = await asyncio.wait({work.task}, timeout=_PATIENCE_SECONDS)
            for task in done:
                task.result()
            found = await self._as_it_is(order.id, tuple(work.revocations))
        else:
            await self._directory.sync()
            found = await self._as_it_is(order.id, ())
        return replace(found, repeated=repeated)

    async def get(self, order_id: str) -> Ordered:
        """Return an order as it is now.

        Raises:
            RevocationNotFound: there is none with that id.
            StoreUnavailable: the database did not answer.
        """
        return await self._as_it_is(order_id, ())

    async def page(self, before: str, size: int) -> Page[RevocationOrder]:
        """Return a page of orders, newest first.

        Raises:
            PageTokenInvalid: `before` is not a key of a page.
            StoreUnavailable: the database did not answer.
        """
        return await self._store.read(lambda repos: repos.orders.page(before, size))

    async def holds(self, before: str, size: int, *, include_lifted: bool) -> Page[HoldStatus]:
        """Return a page of holds, newest first; see `Holds.page`."""
        return await self._holds.page(before, size, include_lifted=include_lifted)

    async def lift(self, name: str, caller: Caller) -> Lifted:
        """Lift a hold; see `Holds.lift`."""
        return await self._holds.lift(name, caller)

    async def lift_due(self) -> None:
        """Lift the holds whose time is over; see `Holds.lift_due`."""
        await self._holds.lift_due()

    async def resume(self) -> None:
        """Go on with what a crash or an outage left unfinished, here or on another broker.

        Raises:
            BrokerError: some of it cannot be gone on with now; the rest was.
        """
        now = self._clock.now()
        failed: BrokerError | None = None
        for order in await self._orders.unfinished():
            since = order.committed_at or order.ordered_at
            is_fresh = timedelta() <= now - since < _ABANDONED_AFTER
            if order.id in self._working or order.id in self._sweeping:
                continue
            if is_fresh and self._resumed:
                continue  # another broker is at it
            try:
                await self._go_on(order)
            except BrokerError as error:
                _log.warning(
                    "revocation not finished yet",
                    subject=str(order.subject),
                    reason=error.reason,
                    detail=error.detail,
                )
                failed = error
        self._resumed = True
        if failed is not None:
            raise failed

    async def close(self) -> None:
        """Leave what is under way to another broker, or to the next start."""
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- the work ---------------------------------------------------------------------------------

    async def _opened(
        self, request: OrderRequest, caller: Caller, also: Also | None
    ) -> tuple[RevocationOrder, bool, _Work | None]:
        """Make the order durable, or find it; its work, if this call is one to wait for it."""
        step = await self._orders.open(request, caller, also)
        order = step.order
        if order.state is OrderState.RUNNING:
            return order, step.repeated, self._begin(step)
        if step.repeated:
            return order, True, None
        self._tell(order)
        work = _Work.of(self._spawn(self._directory.sync()))
        work.took(step)
        return order, False, work

    def _begin(self, step: Step) -> _Work:
        order_id = step.order.id
        known = self._working.get(order_id)
        if known is not None and not step.repeated:
            # A repeat was here first.
            known.took(step)
            return known
        if known is not None:
            return _Work.of(known.task)
        work = self._working[order_id] = _Work()
        work.took(step)
        work.task = self._spawn(self._drive(step, work))
        work.task.add_done_callback(lambda _task: self._working.pop(order_id, None))
        return work

    async def _drive(self, step: Step, work: _Work) -> None:
        """Bring an order to its end: everything that it selects is revoked."""
        order = step.order
        # From here on nothing new is granted here.
        await self._directory.sync()
        if order.subject.kind is SubjectKind.AUTHORITY:
            # It may be forgotten by now; what it signed is revoked all the same.
            with suppress(AuthorityNotFound):
                await self._revoke_authority(order.subject.value, order.actor)
        while step.more:
            step = await self._orders.advance(order.id, commit=False)
            work.took(step)
        if not order.swept:
            await self._settled()  # what was granted before has its outcome
        while step.order.state is OrderState.RUNNING:
            step = await self._orders.advance(order.id, commit=True)
            work.took(step)
        self._tell(step.order)
        await self._directory.sync()

    async def _go_on(self, order: RevocationOrder) -> None:
        _log.warning("revocation resumed", subject=str(order.subject), state=order.state.value)
        if order.state is OrderState.RUNNING:
            await self._begin(Step(order, more=True)).task
        else:
            await self._sweep(order.id)

    def _tell(self, order: RevocationOrder) -> None:
        if not order.swept and order.id not in self._sweeping:
            task = self._spawn(self._sweep_later(order.id))
            self._sweeping[order.id] = task
            task.add_done_callback(lambda _task: self._sweeping.pop(order.id, None))
        for listener in tuple(self.on_committed):
            try:
                listener(order)
            except Exception:  # noqa: BLE001  # a bug in a listener must not stop a revocation
                _log.exception("revocation not passed on", subject=str(order.subject))

    async def _sweep_later(self, order_id: str) -> None:
        await asyncio.sleep(_OTHERS_SECONDS)
        await self._sweep(order_id)

    async def _sweep(self, order_id: str) -> None:
        """Revoke what another broker granted before it had read the change."""
        count = 0
        while True:
            step = await self._orders.sweep(order_id)
            count += len(step.revocations)
            if step.order.swept:
                break
        if count:
            _log.warning("revoked what another broker had under way", count=count)
        self._tell(step.order)
        if count:
            await self._directory.sync()

    async def _as_it_is(self, order_id: str, revocations: tuple[Revocation, ...]) -> Ordered:
        def read(repos: Repositories) -> Ordered:
            order = repos.orders.get(order_id)
            held = repos.holds.held_entry_ids(order.hold, MOST_NAMED) if order.hold else ()
            return Ordered(order, revocations, held)

        return await self._store.read(read)

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        # Fetched here too: a caller that hung up, or lost its patience, will not ask.
        error = task.exception()
        if isinstance(error, BrokerError):
            _log.info("revocation interrupted", reason=error.reason, detail=error.detail)
        elif error is not None:
            _log.error("revocation interrupted", exc_info=error)
