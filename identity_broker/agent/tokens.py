"""JWT-SVIDs by identity and audiences: from memory until half of their life, then made anew.

- However many ask for the same token, the broker is asked once.
- While the broker does not answer, a token is handed out for as long as it is valid, and nobody
  waits long for a better one; what the broker refuses is not handed out.
- A token ordered before its entry changed is not held.
- What the broker is bound to refuse is not ordered; what it refused is not ordered again for a
  second, and a line of the log says so now and then.
- A token is dropped when it is revoked by itself, with its authority or with all of its identity
  (`Denied.refuses`), when its key leaves the bundle and when its entry goes.
- The order of the audiences does not matter. Bounded: the least recently used goes first.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from time import monotonic
from typing import Final

from identity_broker.agent.denied import TokenFacts
from identity_broker.agent.identity import JwtIdentity
from identity_broker.agent.mirror import EntryChange, Mirror
from identity_broker.agent.node import Node
from identity_broker.domain.buckets import Buckets
from identity_broker.domain.clock import Clock
from identity_broker.errors import AgentNotReady, AudienceInvalid, BrokerError, NoIdentity
from identity_broker.telemetry.logs import get_logger
from identity_broker.telemetry.metrics import AgentMetrics
from identity_ca.errors import CAError
from identity_ca.jwt import check_audiences, verify_jwt_svid
from identity_ca.spiffe_id import SpiffeId
from identity_client.clock import roll
from identity_client.errors import (
    IdentityError,
    NotPermitted,
    ProtocolViolation,
    RequestRejected,
)
from identity_client.node.values import IssuedJwt, JwtRequest, SyncedEntry
from identity_client.renewal import renewal_due, retry_delay

_log = get_logger("tokens")

# A token that ends before it could be used is none.
_MIN_LEFT: Final = timedelta(seconds=2)
_BETTER_SECONDS: Final = 0.2  # how long an order may take while there is a valid token
_LOST_SECONDS: Final = 2.0  # how long it may take while the broker's stream is broken
_LONGEST_HOLD: Final = timedelta(seconds=5)  # between orders for what is valid yet
_REFUSED_SECONDS: Final = 1.0
_MOST_REFUSED: Final = 1024
_LOG_SECONDS: Final = 10.0  # between two lines about the same entry and reason
_NOT_AUTHORIZED: Final = "ENTRY_NOT_AUTHORIZED"


@dataclass(frozen=True, slots=True)
class TokenKey:
    """What a token is for."""

    entry_id: str
    audiences: frozenset[str]


@dataclass(frozen=True, slots=True)
class HeldToken:
    """A token that was checked, and until when by both clocks it is fresh and valid."""

    token: str = field(repr=False)
    spiffe_id: str
    facts: TokenFacts
    expires_at: datetime
    fresh_until: datetime
    fresh_until_tick: float
    valid_until_tick: float

    def is_fresh(self, now: datetime, tick: float) -> bool:
        """Whether it is in the first half of its life."""
        return now < self.fresh_until and tick < self.fresh_until_tick and self.is_valid(now, tick)

    def is_valid(self, now: datetime, tick: float) -> bool:
        """Whether it can still be used."""
        left = _MIN_LEFT.total_seconds()
        return now + _MIN_LEFT < self.expires_at and tick + left < self.valid_until_tick


class TokenCache:
    """Tokens by what they are for. Without input, output or clock."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._tokens: OrderedDict[TokenKey, HeldToken] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tokens)

    def get(self, key: TokenKey, spiffe_id: str) -> HeldToken | None:
        """The token, fresh or not; one of another SPIFFE ID is dropped."""
        held = self._tokens.get(key)
        if held is None:
            return None
        if held.spiffe_id != spiffe_id:
            del self._tokens[key]
            return None
        self._tokens.move_to_end(key)
        return held

    def remove(self, key: TokenKey) -> None:
        """Hold none for that."""
        self._tokens.pop(key, None)

    def put(self, key: TokenKey, token: HeldToken) -> None:
        """Hold a token."""
        self._tokens[key] = token
        self._tokens.move_to_end(key)
        while len(self._tokens) > self._limit:
            self._tokens.popitem(last=False)

    def drop(self, is_over: Callable[[TokenKey, HeldToken], bool]) -> None:
        """Drop all of which that holds."""
        for key in [key for key, held in self._tokens.items() if is_over(key, held)]:
            del self._tokens[key]


class _Refusals:
    """What the broker refused a moment ago; bounded, the earliest goes first."""

    def __init__(self) -> None:
        self._errors: OrderedDict[TokenKey, tuple[float, NotPermitted | RequestRejected]]
        self._errors = OrderedDict()

    def get(self, key: TokenKey, tick: float) -> NotPermitted | RequestRejected | None:
        """Why an order like that was refused within the last second."""
        for place in (key, TokenKey(key.entry_id, frozenset())):
            until, error = self._errors.get(place, (tick, None))
            if error is not None and tick < until:
                return error
        return None

    def put(self, key: TokenKey, error: NotPermitted | RequestRejected, tick: float) -> None:
        """It was refused; whatever the audiences, if it is the entry that was."""
        if error.reason == _NOT_AUTHORIZED:
            key = TokenKey(key.entry_id, frozenset())
        self._errors[key] = tick + _REFUSED_SECONDS, error
        self._errors.move_to_end(key)
        while len(self._errors) > _MOST_REFUSED:
            self._errors.popitem(last=False)

    def clear(self) -> None:
        """Ask again, whatever was refused."""
        self._errors.clear()


@dataclass(frozen=True, slots=True)
class _Flight:
    """An order under way."""

    task: asyncio.Task[HeldToken]
    since: float

    async def wait(self, seconds: float | None) -> bool:
        """Wait until it has landed, or has taken so long; return whether it has landed.

        It flies on: one caller giving up must not take the answer from the others.
        """
        left = None if seconds is None else max(self.since + seconds - monotonic(), 0.0)
        await asyncio.wait({self.task}, timeout=left)
        return self.task.done()


class Tokens:
    """The JWT-SVIDs of one agent. Belongs to one event loop.

    Args:
        is_connected: whether the broker's stream stands.
    """

    def __init__(  # what it joins
        self,
        *,
        node: Node,
        mirror: Mirror,
        clock: Clock,
        metrics: AgentMetrics,
        limit: int,
        is_connected: Callable[[], bool] = lambda: True,
    ) -> None:
        self._node = node
        self._mirror = mirror
        self._clock = clock
        self._metrics = metrics
        self._cache = TokenCache(limit)
        self._is_connected = is_connected
        self._flights: dict[tuple[TokenKey, str, int], _Flight] = {}
        self._failed = 0
        self._not_before = 0.0
        self._refusals = _Refusals()
        self._log_budget: Buckets[tuple[str, str]] = Buckets(_MOST_REFUSED)

    def __len__(self) -> int:
        return len(self._cache)

    async def get(self, entry: SyncedEntry, audiences: Iterable[str]) -> JwtIdentity:
        """A token for an entry.

        Raises:
            NoIdentity, AudienceInvalid: the broker refuses.
            AgentNotReady: none can be had, and none that is valid is at hand.
        """
        key = TokenKey(entry.id, frozenset(audiences))
        held = self._valid(key, entry)
        if held is None:
            held = await self._answer(self._flight(key, entry), key, entry)
        elif not held.is_fresh(self._clock.now(), monotonic()):
            held = await self._better(key, entry, held)
        return _identity(entry, held)

    def fresh(self, entry: SyncedEntry, audiences: Iterable[str]) -> JwtIdentity | None:
        """A token for an entry, if one is at hand that need not be replaced."""
        held = self._cache.get(TokenKey(entry.id, frozenset(audiences)), entry.spiffe_id)
        if held is None or not held.is_fresh(self._clock.now(), monotonic()):
            return None
        return _identity(entry, held)

    def follow(self, changes: Iterable[EntryChange]) -> None:
        """Drop the tokens of entries that are gone or changed."""
        changed = {change.entry_id for change in changes}
        if changed:
            self._cache.drop(lambda key, _: key.entry_id in changed)
            self._refusals.clear()

    def revoke(self) -> None:
        """Drop the tokens that are to be refused by now."""
        denied = self._mirror.denied
        self._cache.drop(lambda _, held: denied.refuses(held.facts))

    def trust(self, key_ids: Iterable[str]) -> None:
        """Drop the tokens that none of these keys verifies."""
        known = frozenset(key_ids)
        self._cache.drop(lambda _, held: held.facts.key_id not in known)

    def sweep(self) -> None:
        """Drop what has expired."""
        now, tick = self._clock.now(), monotonic()
        self._cache.drop(lambda _, held: not held.is_valid(now, tick))

    def clear(self) -> None:
        """Drop every token."""
        self._cache.drop(lambda _key, _held: True)
        self._refusals.clear()

    async def close(self) -> None:
        """End the calls under way."""
        flights = tuple(flight.task for flight in self._flights.values())
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)

    # --- inside -------------------------------------------------------------------------------

    def _valid(self, key: TokenKey, entry: SyncedEntry) -> HeldToken | None:
        held = self._cache.get(key, entry.spiffe_id)
        return held if held is not None and held.is_valid(self._clock.now(), monotonic()) else None

    async def _better(self, key: TokenKey, entry: SyncedEntry, held: HeldToken) -> HeldToken:
        """A new token if it comes soon, otherwise what is held."""
        is_held_back = monotonic() < self._not_before
        if is_held_back and (key, entry.spiffe_id, entry.revision) not in self._flights:
            return held
        flight = self._flight(key, entry)
        if not await flight.wait(_BETTER_SECONDS):
            still = self._valid(key, entry)  # it may have been revoked meanwhile
            if still is not None:
                return still
        return await self._answer(flight, key, entry)

    async def _answer(self, flight: _Flight, key: TokenKey, entry: SyncedEntry) -> HeldToken:
        if not await flight.wait(None if self._is_connected() else _LOST_SECONDS):
            raise AgentNotReady("the broker cannot be reached for a JWT-SVID", retry_after=1.0)
        try:
            return flight.task.result()
        except (NotPermitted, RequestRejected) as error:
            raise _refusal(error) from error
        except IdentityError as error:
            held = self._valid(key, entry)
            if held is not None:
                return held
            raise AgentNotReady(
                "no JWT-SVID can be had from the broker now",
                detail=str(error),
                retry_after=error.retry_after,
            ) from error

    def _flight(self, key: TokenKey, entry: SyncedEntry) -> _Flight:
        """The order that is under way, or a new one.

        Raises:
            BrokerError: the broker would refuse it.
        """
        place = (key, entry.spiffe_id, entry.revision)
        flight = self._flights.get(place)
        if flight is None:
            refused = self._refusals.get(key, monotonic())
            if refused is not None:
                raise _refusal(refused)
            _check_audiences(key, entry)
            task = asyncio.create_task(self._order(key, entry), name="jwt order")
            flight = self._flights[place] = _Flight(task, monotonic())
            task.add_done_callback(lambda done: self._land(place, done))
        return flight

    def _land(self, place: tuple[TokenKey, str, int], flight: asyncio.Task[HeldToken]) -> None:
        self._flights.pop(place, None)
        if not flight.cancelled():
            flight.exception()  # Seen: whoever waited has it; nobody may have waited that long.

    async def _order(self, key: TokenKey, entry: SyncedEntry) -> HeldToken:
        audiences = tuple(sorted(key.audiences))
        try:
            (answer,) = await self._node.issue_jwt([JwtRequest(entry.id, audiences)])
            if isinstance(answer, IdentityError):
                raise answer
            held = self._checked(answer, entry, key)
        except IdentityError as error:
            self._note(key, error)
            raise
        self._metrics.agent_issued_total.labels("jwt").inc()
        self._failed = 0
        self._not_before = 0.0
        now_is = self._mirror.entry(entry.id, self._clock.now())
        if now_is is not None and now_is.revision == entry.revision:
            self._cache.put(key, held)
        return held

    def _note(self, key: TokenKey, error: IdentityError) -> None:
        """Say that a token could not be had: any process may have it fail as often as it likes."""
        tick = monotonic()
        self._metrics.agent_refused_total.labels("jwt", error.reason).inc()
        if isinstance(error, NotPermitted | RequestRejected):
            self._refusals.put(key, error, tick)
            self._cache.remove(key)
        else:
            self._hold_back(error, tick)
        line = (key.entry_id, error.reason)
        if not self._log_budget.take(line, _LOG_SECONDS, _LOG_SECONDS, tick):
            _log.warning(
                "svid refused",
                kind="jwt",
                entry_id=key.entry_id,
                reason=error.reason,
                detail=error.message,
            )

    def _hold_back(self, error: IdentityError, tick: float) -> None:
        """Order nothing for a while for those who have something valid."""
        if tick >= self._not_before:  # the others of one outage count once
            self._failed += 1
            delay = retry_delay(
                self._failed, dice=roll(), retry_after=error.retry_after, cap=_LONGEST_HOLD
            )
            self._not_before = tick + delay.total_seconds()

    def _checked(self, answer: IssuedJwt, entry: SyncedEntry, key: TokenKey) -> HeldToken:
        """The token, once it is known to be what was ordered.

        Raises:
            ProtocolViolation: it is another's, for others, revoked, or does not verify.
        """
        bundle, now = self._mirror.bundle, self._clock.now()
        if bundle is None:
            raise ProtocolViolation("the node was told to hand out nothing any more")
        try:
            verified = verify_jwt_svid(
                answer.token, bundle=bundle, audience=tuple(key.audiences), now=now
            )
        except CAError as exc:
            raise ProtocolViolation(exc.message, reason="TOKEN_UNTRUSTED") from exc
        if str(verified.spiffe_id) != entry.spiffe_id or set(verified.audiences) != key.audiences:
            raise ProtocolViolation("the broker issued another JWT-SVID than was asked for")
        facts = TokenFacts.of(verified)
        if self._mirror.denied.refuses(facts):
            raise ProtocolViolation("the JWT-SVID was revoked at once", reason="CREDENTIAL_REVOKED")
        due = renewal_due(received=now, not_after=verified.expires_at, dice=0.5)
        tick = monotonic()
        return HeldToken(
            token=answer.token,
            spiffe_id=entry.spiffe_id,
            facts=facts,
            expires_at=verified.expires_at,
            fresh_until=due,
            fresh_until_tick=tick + (due - now).total_seconds(),
            valid_until_tick=tick + (verified.expires_at - now).total_seconds(),
        )


def _identity(entry: SyncedEntry, held: HeldToken) -> JwtIdentity:
    return JwtIdentity(entry.spiffe_id, entry.hint, held.token, held.expires_at)


def _check_audiences(key: TokenKey, entry: SyncedEntry) -> None:
    """Find out whether the broker can issue such a token at all.

    Raises:
        AudienceInvalid: it cannot.
    """
    try:
        check_audiences(tuple(key.audiences), SpiffeId.parse(entry.spiffe_id))
    except CAError as exc:
        raise AudienceInvalid(exc.message, hint=exc.hint) from exc


def _refusal(error: NotPermitted | RequestRejected) -> BrokerError:
    if error.reason == AudienceInvalid.reason:
        return AudienceInvalid()
    if error.reason == _NOT_AUTHORIZED:
        return NoIdentity()
    return AgentNotReady("the broker refuses to issue a JWT-SVID", detail=str(error))
