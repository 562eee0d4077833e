"""issue: from grants to credentials, many calls at a time.

- Step 1, prepare: CSR checked, its key not among the blocked ones, certificate encoded and linted;
  no key touched.
- No JWT-SVID is issued in the second of its identity's epoch: every verifier would refuse it.
- Step 2, intend: the ledger is durable.
- Step 3, sign. Step 4, conclude.
- Calls that arrive while others are being recorded go together in the next *flight*: one group of
  intents, one commit, one round of signatures. A single call waits for nobody.
- An item that fails in step 1 fails alone; a failure in steps 2 or 3 fails all of its flight.
- A flight outlives its callers: one who hangs up leaves a recorded credential, not a half-made one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import ClassVar, Generic, TypeVar

from identity_broker.domain.clock import Clock
from identity_broker.domain.grant import Grant
from identity_broker.domain.revocation import IdentityEpoch
from identity_broker.errors import (
    AuthorityUnavailable,
    BrokerError,
    IdentityEpochNow,
    InvariantViolated,
    KeyBlocked,
)
from identity_broker.lifecycle.record import Order, Record
from identity_broker.signing import Signing
from identity_broker.telemetry.logs import get_logger
from identity_ca.issuer import PreparedX509, X509Credential
from identity_ca.jwt import JwtCredential, PreparedJwt
from identity_ca.spiffe_id import SpiffeId

_log = get_logger("issue")

# Orders in one flight, unless a single call brings more.
_MOST = 256
# A second flight may start beside the first when this many orders wait: then its CSRs are checked
# while the first one is recorded. Fewer are better off together in one.
_ENOUGH = 64
# A flight of remote signatures spends its time waiting: several may.
_REMOTE_FLIGHTS = 4


@dataclass(frozen=True, slots=True)
class X509Order:
    """A grant and the CSR that brings the key; `instance` as in `CredentialIntent`."""

    grant: Grant
    csr: bytes
    instance: str = ""


@dataclass(frozen=True, slots=True)
class JwtOrder:
    """A grant and the audiences the token is for."""

    instance: ClassVar[str] = ""  # a token has no key of its own to tell processes apart by

    grant: Grant
    audiences: Sequence[str]


O = TypeVar("O", bound=X509Order | JwtOrder)  # noqa: E741
P = TypeVar("P", bound=PreparedX509 | PreparedJwt)
C = TypeVar("C", bound=X509Credential | JwtCredential)


class Issue:
    """Turns grants into recorded credentials.

    Args:
        is_key_blocked: whether nothing may be issued to the key with that fingerprint.
        epoch: of an identity, if it has one.
    """

    def __init__(
        self,
        signing: Signing,
        record: Record,
        clock: Clock,
        *,
        is_key_blocked: Callable[[str], bool],
        epoch: Callable[[SpiffeId], IdentityEpoch | None],
    ) -> None:
        self._open = _Open()

        async def prepare_x509(
            orders: Sequence[X509Order], now: datetime
        ) -> list[PreparedX509 | BrokerError]:
            prepared = await signing.prepare_x509_many(
                [(order.grant, order.csr) for order in orders], now
            )
            return [
                KeyBlocked(detail=f"{item.spiffe_id} key {item.key_fingerprint}")
                if isinstance(item, PreparedX509) and is_key_blocked(item.key_fingerprint)
                else item
                for item in prepared
            ]

        async def prepare_jwt(
            orders: Sequence[JwtOrder], now: datetime
        ) -> list[PreparedJwt | BrokerError]:
            early = [_too_early(epoch(order.grant.spiffe_id), now) for order in orders]
            if not any(early):
                return await signing.prepare_jwt_many(_tokens(orders), now)
            others = [order for order, error in zip(orders, early, strict=True) if error is None]
            prepared = iter(await signing.prepare_jwt_many(_tokens(others), now) if others else [])
            return [next(prepared) if error is None else error for error in early]

        self._x509 = _Lane[X509Order, PreparedX509, X509Credential](
            prepare=prepare_x509,
            sign=signing.sign_x509,
            is_remote=lambda: signing.x509_is_remote,
            record=record,
            clock=clock,
            open_calls=self._open,
        )
        self._jwt = _Lane[JwtOrder, PreparedJwt, JwtCredential](
            prepare=prepare_jwt,
            sign=signing.sign_jwt,
            is_remote=lambda: signing.jwt_is_remote,
            record=record,
            clock=clock,
            open_calls=self._open,
        )

    async def x509(
        self, orders: Sequence[X509Order], correlation_id: str = ""
    ) -> list[X509Credential | BrokerError]:
        """Issue X.509-SVIDs; each order's own result, in order."""
        return await self._x509.submit(orders, correlation_id)

    async def jwt(
        self, orders: Sequence[JwtOrder], correlation_id: str = ""
    ) -> list[JwtCredential | BrokerError]:
        """Issue JWT-SVIDs; each order's own result, in order."""
        return await self._jwt.submit(orders, correlation_id)

    async def settled(self) -> None:
        """Return when everything that was granted before this call has its outcome.

        A revocation waits for it: what was granted before the revocation may be recorded after.
        """
        await self._open.settled()


def _tokens(orders: Sequence[JwtOrder]) -> list[tuple[Grant, Sequence[str]]]:
    return [(order.grant, order.audiences) for order in orders]


def _too_early(epoch: IdentityEpoch | None, now: datetime) -> IdentityEpochNow | None:
    """Why no token can be issued yet: its `iat` would be the epoch's second, or before."""
    if epoch is None:
        return None
    # Verifiers compare whole seconds.
    next_second = int(epoch.not_before.timestamp()) + 1
    left = next_second - now.timestamp()
    return IdentityEpochNow(retry_after=left) if left > 0 else None


class _Call(Generic[O, C]):
    """One caller's orders, and where the results go."""

    __slots__ = ("correlation_id", "done", "number", "orders")

    def __init__(
        self,
        orders: Sequence[O],
        correlation_id: str,
        number: int,
        done: asyncio.Future[list[C | BrokerError]],
    ) -> None:
        self.orders = orders
        self.correlation_id = correlation_id
        self.number = number
        self.done = done


class _Lane(Generic[O, P, C]):
    """Credentials of one kind, in flights."""

    def __init__(
        self,
        *,
        prepare: Callable[[Sequence[O], datetime], Awaitable[list[P | BrokerError]]],
        sign: Callable[[Sequence[P]], Awaitable[list[C]]],
        is_remote: Callable[[], bool],
        record: Record,
        clock: Clock,
        open_calls: _Open,
    ) -> None:
        self._prepare = prepare
        self._sign = sign
        self._is_remote = is_remote
        self._record = record
        self._clock = clock
        self._open = open_calls
        self._waiting: deque[_Call[O, C]] = deque()
        self._orders_waiting = 0
        self._flights: set[asyncio.Task[None]] = set()

    async def submit(self, orders: Sequence[O], correlation_id: str) -> list[C | BrokerError]:
        """Return each order's own result, in order."""
        if not orders:
            return []
        done: asyncio.Future[list[C | BrokerError]] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Call(orders, correlation_id, self._open.enter(), done))
        self._orders_waiting += len(orders)
        self._launch()
        return await done

    def _launch(self) -> None:
        while self._waiting and self._may_start():
            flight = asyncio.create_task(self._fly(self._board()))
            self._flights.add(flight)
            flight.add_done_callback(self._landed)

    def _may_start(self) -> bool:
        under_way = len(self._flights)
        if under_way == 0:
            return True
        if self._is_remote():
            return under_way < _REMOTE_FLIGHTS
        return under_way == 1 and self._orders_waiting >= _ENOUGH

    def _board(self) -> list[_Call[O, C]]:
        calls: list[_Call[O, C]] = []
        size = 0
        while self._waiting and (not calls or size + len(self._waiting[0].orders) <= _MOST):
            call = self._waiting.popleft()
            self._orders_waiting -= len(call.orders)
            if call.done.done():
                self._open.leave(call.number)  # hung up before anything was made
                continue
            calls.append(call)
            size += len(call.orders)
        return calls

    def _landed(self, flight: asyncio.Task[None]) -> None:
        self._flights.discard(flight)
        self._launch()

    async def _fly(self, calls: list[_Call[O, C]]) -> None:
        orders = [order for call in calls for order in call.orders]
        results: Sequence[C | BrokerError]
        try:
            results = await self._issued(calls, orders)
        except BrokerError as error:
            results = [error] * len(orders)
        except Exception as error:  # noqa: BLE001  # a bug must not leave callers waiting
            _log.exception("flight failed", count=len(orders))
            results = [InvariantViolated(detail=f"{type(error).__name__}: {error}")] * len(orders)
        finally:
            for call in calls:
                self._open.leave(call.number)
        at = 0
        for call in calls:
            if not call.done.done():
                call.done.set_result(list(results[at : at + len(call.orders)]))
            at += len(call.orders)

    async def _issued(
        self, calls: Sequence[_Call[O, C]], orders: Sequence[O]
    ) -> Sequence[C | BrokerError]:
        now = self._clock.now()
        prepared = await self._prepare(orders, now)
        correlations = [call.correlation_id for call in calls for _ in call.orders]
        intents: list[Order] = []
        ready: list[P] = []
        grants: list[Grant] = []
        for order, item, correlation_id in zip(orders, prepared, correlations, strict=True):
            if not isinstance(item, BrokerError):
                intents.append(Order(order.grant, item, correlation_id, order.instance))
                ready.append(item)
                grants.append(order.grant)
        if not ready:
            return [item for item in prepared if isinstance(item, BrokerError)]
        await self._record.intend(intents, now)
        signed = await self._sign(ready)
        self._record.conclude(grants, signed, self._clock.now())
        issued = iter(signed)
        return [item if isinstance(item, BrokerError) else next(issued) for item in prepared]


class _Open:
    """What is under way, in the order it began; `settled` waits for all of it."""

    __slots__ = ("_last", "_numbers", "_waiting")

    def __init__(self) -> None:
        self._last = 0
        self._numbers: dict[int, None] = {}
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []

    def enter(self) -> int:
        self._last += 1
        self._numbers[self._last] = None
        return self._last

    def leave(self, number: int) -> None:
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
