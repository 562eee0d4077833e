"""JWT-SVIDs by identity and audiences, until half of their life.

- The order of the audiences does not matter; the identity does: after a change of identity no
  token of the old one is handed out.
- A token past its half-life is only handed out when no fresh one can be had (`fallback`).
- Bounded: the least recently used goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from spiffe import JwtSvid

from identity_client.jwt_check import is_revoked
from identity_client.renewal import renewal_due
from identity_client.revocation import DenySet

__all__ = ["CachedToken", "JwtCache", "JwtKey"]

JwtKey = tuple[str, frozenset[str]]

_LIMIT = 1024
_MIN_LEFT = timedelta(seconds=2)


@dataclass(frozen=True, slots=True)
class CachedToken:
    """A JWT-SVID, its jti and when it came; the token is never shown."""

    svid: JwtSvid = field(repr=False)
    jti: str
    received: datetime
    expires_at: datetime


class JwtCache:
    """Tokens by (SPIFFE ID, audiences). One thread uses it."""

    def __init__(self, limit: int = _LIMIT) -> None:
        self._tokens: OrderedDict[JwtKey, CachedToken] = OrderedDict()
        self._limit = limit

    def __len__(self) -> int:
        return len(self._tokens)

    def fresh(self, key: JwtKey, *, denied: DenySet, now: datetime) -> JwtSvid | None:
        """A token before its half-life."""
        cached = self._usable(key, denied=denied, now=now)
        if cached is None:
            return None
        due = renewal_due(received=cached.received, not_after=cached.expires_at, dice=0.5)
        return cached.svid if now < due else None

    def fallback(self, key: JwtKey, *, denied: DenySet, now: datetime) -> JwtSvid | None:
        """Any token that is still valid."""
        cached = self._usable(key, denied=denied, now=now)
        return cached.svid if cached else None

    def put(self, key: JwtKey, token: CachedToken) -> None:
        """Keeps a token."""
        self._tokens[key] = token
        self._tokens.move_to_end(key)
        while len(self._tokens) > self._limit:
            self._tokens.popitem(last=False)

    def _usable(self, key: JwtKey, *, denied: DenySet, now: datetime) -> CachedToken | None:
        cached = self._tokens.get(key)
        if cached is None:
            return None
        revoked = cached.jti in denied or is_revoked(cached.svid, denied)
        if revoked or now + _MIN_LEFT >= cached.expires_at:
            del self._tokens[key]
            return None
        self._tokens.move_to_end(key)
        return cached
