"""issue: from grants to credentials.

- Step 1, prepare: CSR checked, certificate encoded and linted; no key touched.
- Step 2, intend: the ledger is durable.
- Step 3, sign. Step 4, conclude.
- An item that fails in step 1 fails alone; a failure in steps 2 or 3 fails all that were prepared.
- From step 2 on, the work is shielded from cancellation: a caller who hangs up leaves a recorded
  credential, not a half-made one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from identity_broker.domain.clock import Clock
from identity_broker.domain.grant import Grant
from identity_broker.errors import AuthorityUnavailable, BrokerError
from identity_broker.lifecycle.record import Record
from identity_broker.signing import Signing
from identity_ca.issuer import PreparedX509, X509Credential
from identity_ca.jwt import JwtCredential, PreparedJwt

P = TypeVar("P", PreparedX509, PreparedJwt)
C = TypeVar("C", X509Credential, JwtCredential)

# A batch gives way to other calls after this many CSRs (about 0.15 ms each).
_STRETCH = 8


@dataclass(frozen=True, slots=True)
class X509Order:
    """A grant and the CSR that brings the key."""

    grant: Grant
    csr: bytes


@dataclass(frozen=True, slots=True)
class JwtOrder:
    """A grant and the audiences the token is for."""

    grant: Grant
    audiences: Sequence[str]


class Issue:
    """Turns grants into recorded credentials."""

    def __init__(self, signing: Signing, record: Record, clock: Clock) -> None:
        self._signing = signing
        self._record = record
        self._clock = clock
        self._under_way: set[asyncio.Task[Any]] = set()
        self._open = _Open()

    async def x509(
        self, orders: Sequence[X509Order], correlation_id: str = ""
    ) -> list[X509Credential | BrokerError]:
        """Issue X.509-SVIDs; each order's own result, in order."""
        return await self._issue(
            orders,
            lambda order, now: self._signing.prepare_x509(order.grant, order.csr, now),
            self._signing.sign_x509,
            correlation_id,
        )

    async def jwt(
        self, orders: Sequence[JwtOrder], correlation_id: str = ""
    ) -> list[JwtCredential | BrokerError]:
        """Issue JWT-SVIDs; each order's own result, in order."""
        return await self._issue(
            orders,
            lambda order, now: self._signing.prepare_jwt(order.grant, order.audiences, now),
            self._signing.sign_jwt,
            correlation_id,
        )

    async def settled(self) -> None:
        """Return when everything that was granted before this call has its outcome.

        A revocation waits for it: what was granted before the revocation may be recorded after.
        """
        await self._open.settled()

    async def _issue(
        self,
        orders: Sequence[Any],
        prepare: Callable[[Any, datetime], P],
        sign: Callable[[Sequence[P]], Awaitable[list[C]]],
        correlation_id: str,
    ) -> list[C | BrokerError]:
        number = self._open.enter()
        try:
            return await self._prepare_and_issue(number, orders, prepare, sign, correlation_id)
        finally:
            self._open.leave(number)

    async def _prepare_and_issue(
        self,
        number: int,
        orders: Sequence[Any],
        prepare: Callable[[Any, datetime], P],
        sign: Callable[[Sequence[P]], Awaitable[list[C]]],
        correlation_id: str,
    ) -> list[C | BrokerError]:
        now = self._clock.now()
        results: list[C | BrokerError | None] = [None] * len(orders)
        ready: list[int] = []
        prepared: list[P] = []
        for at, order in enumerate(orders):
            if at and at % _STRETCH == 0:
                await asyncio.sleep(0)
            try:
                prepared.append(prepare(order, now))
            except BrokerError as error:
                results[at] = error
            else:
                ready.append(at)
        if ready:
            grants = [orders[at].grant for at in ready]
            for at, result in zip(
                ready,
                await self._shielded(
                    number,
                    self._record_and_sign(grants, prepared, sign, now, correlation_id),
                    len(prepared),
                ),
                strict=True,
            ):
                results[at] = result
        return [result for result in results if result is not None]

    async def _shielded(
        self, number: int, work: Coroutine[Any, Any, list[C]], size: int
    ) -> Sequence[C | BrokerError]:
        task = asyncio.create_task(work)
        # The task holds the call open: it goes on when its caller hangs up.
        self._open.hold(number)
        self._under_way.add(task)
        task.add_done_callback(lambda done: self._ended(done, number))
        try:
            return await asyncio.shield(task)
        except BrokerError as error:
            return [error] * size

    def _ended(self, task: asyncio.Task[Any], number: int) -> None:
        self._under_way.discard(task)
        self._open.leave(number)
        if not task.cancelled():
            # Fetched here too: a caller that hung up will not ask.
            task.exception()

    async def _record_and_sign(
        self,
        grants: Sequence[Grant],
        prepared: Sequence[P],
        sign: Callable[[Sequence[P]], Awaitable[list[C]]],
        now: datetime,
        correlation_id: str,
    ) -> list[C]:
        await self._record.intend(list(zip(grants, prepared, strict=True)), now, correlation_id)
        signed = await sign(prepared)
        self._record.conclude(grants, signed, self._clock.now())
        return signed


class _Open:
    """What is under way, in the order it began; `settled` waits for all of it."""

    __slots__ = ("_last", "_numbers", "_waiting")

    def __init__(self) -> None:
        self._last = 0
        self._numbers: dict[int, int] = {}
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []

    def enter(self) -> int:
        self._last += 1
        self._numbers[self._last] = 1
        return self._last

    def hold(self, number: int) -> None:
        self._numbers[number] += 1

    def leave(self, number: int) -> None:
        holders = self._numbers[number] - 1
        if holders:
            self._numbers[number] = holders
            return
        del self._numbers[number]
        if not self._waiting:
            return
        # Numbers only grow, and a dict keeps their order: the first is the oldest.
        oldest = next(iter(self._numbers), self._last + 1)
        still = []
        for limit, done in self._waiting:
            if oldest <= limit:
                still.append((limit, done))
            elif not done.done():
                done.set_result(None)
        self._waiting = still

    async def settled(self) -> None:
        if self._numbers:
            done = asyncio.get_running_loop().create_future()
            self._waiting.append((self._last, done))
            await done


def one(results: Sequence[C | BrokerError]) -> C:
    """Return the only result, or raise it.

    Raises:
        BrokerError: the order failed.
        AuthorityUnavailable: there is no result.
    """
    for result in results:
        if isinstance(result, BrokerError):
            raise result
        return result
    raise AuthorityUnavailable
