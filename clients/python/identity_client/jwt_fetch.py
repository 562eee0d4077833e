"""JWT-SVIDs on demand: from the cache, or fetched once however many ask at the same time.

- One flight for each identity and set of audiences; one caller giving up does not end it.
- When no fresh token can be had, a cached one that is still valid is handed out, unless whoever
  issues them has decided against it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from spiffe import JwtSvid

from identity_client.clock import utc_now
from identity_client.errors import IdentityError, NotAuthenticated, NotPermitted, RequestRejected
from identity_client.holder import IdentityHolder
from identity_client.jwt_cache import CachedToken, JwtCache, JwtKey

__all__ = ["JwtFetcher"]

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
        token = await self._issue(key)
        self._cache.put(key, token)
        return token.svid

    def _land(self, key: JwtKey, flight: asyncio.Task[JwtSvid]) -> None:
        self._flights.pop(key, None)
        if not flight.cancelled():
            flight.exception()  # Seen: whoever waited has it; nobody may have waited that long.
