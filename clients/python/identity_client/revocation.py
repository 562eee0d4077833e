"""The deny set: what was revoked and has not expired yet.

- One writer, any number of reading threads; a look-up is one dictionary access.
- A revocation is never taken back, so a new listing adds to the set and replaces nothing.
- Bounded by expiry: what has expired is refused for that alone and is dropped here.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

__all__ = ["DenySet", "RevokedCredential"]


@dataclass(frozen=True, slots=True)
class RevokedCredential:
    """One revocation, as the broker announced it.

    Attributes:
        id: serial number (lower-case hexadecimal, 40 digits) or jti.
        spiffe_id: whom the credential named.
        expires_at: when the credential would have expired.
    """

    id: str
    spiffe_id: str
    expires_at: datetime


class DenySet:
    """Serial numbers and jtis that must be refused."""

    __slots__ = ("_denied", "_expiries", "synced")

    def __init__(self) -> None:
        self._denied: dict[str, datetime] = {}
        self._expiries: list[tuple[datetime, str]] = []
        # Whether the broker's whole listing has been read and its stream is open.
        self.synced = False

    def __contains__(self, credential_id: object) -> bool:
        return credential_id in self._denied

    def __len__(self) -> int:
        return len(self._denied)

    def __repr__(self) -> str:
        return f"DenySet({len(self._denied)} revoked, synced={self.synced})"

    def add(
        self, revoked: Iterable[RevokedCredential], *, now: datetime
    ) -> tuple[RevokedCredential, ...]:
        """Denies what has not expired, forgets what has; returns what was not denied before."""
        self.prune(now=now)
        fresh = []
        for credential in revoked:
            if credential.expires_at <= now or credential.id in self._denied:
                continue
            self._denied[credential.id] = credential.expires_at
            heapq.heappush(self._expiries, (credential.expires_at, credential.id))
            fresh.append(credential)
        return tuple(fresh)

    def prune(self, *, now: datetime) -> None:
        """Forgets what has expired."""
        while self._expiries and self._expiries[0][0] <= now:
            self._denied.pop(heapq.heappop(self._expiries)[1], None)
