"""JWT-SVIDs by identity and audiences: from memory until half of their life, then made anew.

- However many ask for the same token, the broker is asked once.
- While the broker does not answer, a token is handed out for as long as it is valid; what the
  broker refuses is not.
- A token is dropped when it is revoked, when its key leaves the bundle and when its entry goes.
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

from identity_broker.agent.identity import JwtIdentity
from identity_broker.agent.mirror import EntryChange, Mirror
from identity_broker.agent.node import Node
from identity_broker.domain.clock import Clock
from identity_broker.errors import AgentNotReady, AudienceInvalid, BrokerError, NoIdentity
from identity_broker.telemetry.logs import get_logger
from identity_broker.telemetry.metrics import AgentMetrics
from identity_ca.errors import CAError
from identity_ca.jwt import verify_jwt_svid
from identity_client.errors import (
    IdentityError,
    NotPermitted,
    ProtocolViolation,
    RequestRejected,
)
from identity_client.node.values import IssuedJwt, JwtRequest, SyncedEntry
from identity_client.renewal import renewal_due

_log = get_logger("tokens")

# A token that ends before it could be used is none.
_MIN_LEFT: Final = timedelta(seconds=2)


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
    jti: str
    key_id: str
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


class Tokens:
    """The JWT-SVIDs of one agent. Belongs to one event loop."""

    def __init__(
        self, *, node: Node, mirror: Mirror, clock: Clock, metrics: AgentMetrics, limit: int
    ) -> None:
        self._node = node
        self._mirror = mirror
        self._clock = clock
        self._metrics = metrics
        self._cache = TokenCache(limit)
        self._flights: dict[tuple[TokenKey, str], asyncio.Task[HeldToken]] = {}

    def __len__(self) -> int:
        return len(self._cache)

    async def get(self, entry: SyncedEntry, audiences: Iterable[str]) -> JwtIdentity:
        """A token for an entry.

        Raises:
            NoIdentity, AudienceInvalid: the broker refuses.
            AgentNotReady: none can be had, and none that is valid is at hand.
        """
        key = TokenKey(entry.id, frozenset(audiences))
        held = self._cache.get(key, entry.spiffe_id)
        if held is None or not held.is_fresh(self._clock.now(), monotonic()):
            held = await self._renewed(key, entry)
        return JwtIdentity(entry.spiffe_id, entry.hint, held.token, held.expires_at)

    def follow(self, changes: Iterable[EntryChange]) -> None:
        """Drop the tokens of entries that are gone or changed."""
        changed = {change.entry_id for change in changes}
        if changed:
            self._cache.drop(lambda key, _: key.entry_id in changed)

    def revoke(self, ids: Iterable[str]) -> None:
        """Drop the tokens of these ids."""
        revoked = frozenset(ids)
        if revoked:
            self._cache.drop(lambda _, held: held.jti in revoked)

    def trust(self, key_ids: Iterable[str]) -> None:
        """Drop the tokens that none of these keys verifies."""
        known = frozenset(key_ids)
        self._cache.drop(lambda _, held: held.key_id not in known)

    def sweep(self) -> None:
        """Drop what has expired."""
        now, tick = self._clock.now(), monotonic()
        self._cache.drop(lambda _, held: not held.is_valid(now, tick))

    def clear(self) -> None:
        """Drop every token."""
        self._cache.drop(lambda _key, _held: True)

    async def close(self) -> None:
        """End the calls under way."""
        flights = tuple(self._flights.values())
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)

    # --- inside -------------------------------------------------------------------------------

    async def _renewed(self, key: TokenKey, entry: SyncedEntry) -> HeldToken:
        flight = self._flights.get((key, entry.spiffe_id))
        if flight is None:
            flight = asyncio.create_task(self._order(key, entry), name="jwt order")
            self._flights[key, entry.spiffe_id] = flight
            flight.add_done_callback(lambda done: self._land((key, entry.spiffe_id), done))
        try:
            # Shielded: one caller giving up must not take the answer from the others.
            return await asyncio.shield(flight)
        except (NotPermitted, RequestRejected) as error:
            raise _refusal(error) from error
        except IdentityError as error:
            held = self._cache.get(key, entry.spiffe_id)
            if held is not None and held.is_valid(self._clock.now(), monotonic()):
                return held
            raise AgentNotReady(
                "no JWT-SVID can be had from the broker now",
                detail=str(error),
                retry_after=error.retry_after,
            ) from error

    def _land(self, place: tuple[TokenKey, str], flight: asyncio.Task[HeldToken]) -> None:
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
            self._metrics.agent_refused_total.labels("jwt", error.reason).inc()
            _log.warning(
                "svid refused",
                kind="jwt",
                entry_id=entry.id,
                reason=error.reason,
                detail=error.message,
            )
            raise
        self._metrics.agent_issued_total.labels("jwt").inc()
        self._cache.put(key, held)
        return held

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
        if self._mirror.is_revoked(answer.jti):
            raise ProtocolViolation("the JWT-SVID was revoked at once", reason="CREDENTIAL_REVOKED")
        due = renewal_due(received=now, not_after=verified.expires_at, dice=0.5)
        tick = monotonic()
        return HeldToken(
            token=answer.token,
            spiffe_id=entry.spiffe_id,
            jti=answer.jti,
            key_id=verified.key_id,
            expires_at=verified.expires_at,
            fresh_until=due,
            fresh_until_tick=tick + (due - now).total_seconds(),
            valid_until_tick=tick + (verified.expires_at - now).total_seconds(),
        )


def _refusal(error: NotPermitted | RequestRejected) -> BrokerError:
    if error.reason == AudienceInvalid.reason:
        return AudienceInvalid()
    if error.reason == "ENTRY_NOT_AUTHORIZED":
        return NoIdentity()
    return AgentNotReady("the broker refuses to issue a JWT-SVID", detail=str(error))
