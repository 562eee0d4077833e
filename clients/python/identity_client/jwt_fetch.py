"""JWT-SVIDs on demand: from the cache, or fetched once however many ask at the same time.

- One flight for each identity and set of audiences; one caller giving up does not end it.
- A token of the very second in which its identity's older ones were revoked counts as one of
  them (`iat` has whole seconds): it is not handed out, and another is fetched a second later.
- When no fresh token can be had, a cached one that is still valid is handed out, unless whoever
  issues them has decided against it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from spiffe import JwtSvid

from identity_client.clock import utc_now
from identity_client.errors import (
    IdentityError,
    IdentityRevoked,
    NotAuthenticated,
    NotPermitted,
    RequestRejected,
)
from identity_client.holder import IdentityHolder
from identity_client.jwt_cache import CachedToken, JwtCache, JwtKey
from identity_client.jwt_check import is_revoked

__all__ = ["JwtFetcher"]

_MOST_ISSUED: Final = 3
# Whatever the issuer's clock says, its next second has begun by then.
_NEXT_SECOND: Final = 1.05
# Decisions; anything else may be waited out with a token that is still valid.
_DECIDED = (NotPermitted, NotAuthenticated, RequestRejected)


class JwtFetcher:
    """The JWT-SVIDs of one source. Belongs to one event loop.

    Args:
        holder: knows who we are and what is denied.
        issue: obtains a new token for (SPIFFE ID, audiences); raises IdentityError.
    """

    def __init__(
        self, holder: IdentityHolder, issue: Callable[[JwtKey], Awaitable[CachedToken]]
    ) -> None:
        self._holder = holder
        self._issue = issue
        self._cache = JwtCache()
        self._flights: dict[JwtKey, asyncio.Task[JwtSvid]] = {}

    @property
    def flights(self) -> tuple[asyncio.Task[JwtSvid], ...]:
        """What is under way; to be cancelled when the source closes."""
        return tuple(self._flights.values())

    async def fetch(self, audiences: Sequence[str]) -> JwtSvid:
        """A JWT-SVID for `audiences`.

        Raises:
            IdentityRevoked: what is issued is revoked.
            SourceError: there is no identity to issue it for.
            IdentityError: it could not be issued and no cached one is valid.
        """
        if not audiences or not all(audiences):
            raise RequestRejected(
                "a JWT-SVID needs at least one audience", reason="AUDIENCE_INVALID"
            )
        snapshot = self._holder.snapshot()
        key = (str(snapshot.spiffe_id), frozenset(audiences))
        denied = self._holder.denied
        cached = self._cache.fresh(key, denied=denied, now=utc_now())
        if cached is not None:
            return cached
        flight = self._flights.get(key)
        if flight is None:
            flight = asyncio.create_task(self._fly(key))
            self._flights[key] = flight
            flight.add_done_callback(lambda done: self._land(key, done))
        try:
            # Shielded: one caller giving up must not take the answer from the others.
            return await asyncio.shield(flight)
        except IdentityError as error:
            valid = self._cache.fallback(key, denied=denied, now=utc_now())
            if valid is None or isinstance(error, _DECIDED):
                raise
            return valid

    async def _fly(self, key: JwtKey) -> JwtSvid:
        denied = self._holder.denied
        for attempt in range(_MOST_ISSUED):
            if attempt:
                await asyncio.sleep(_NEXT_SECOND)
            token = await self._issue(key)
            if not (token.jti in denied or is_revoked(token.svid, denied)):
                self._cache.put(key, token)
                return token.svid
        raise IdentityRevoked(f'every JWT-SVID that is issued for "{key[0]}" is revoked')

    def _land(self, key: JwtKey, flight: asyncio.Task[JwtSvid]) -> None:
        self._flights.pop(key, None)
        if not flight.cancelled():
            flight.exception()  # Seen: whoever waited has it; nobody may have waited that long.
