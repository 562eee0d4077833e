"""One revocation list as it is handed out."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum


class ListKind(StrEnum):
    """What a list covers."""

    FULL = "full"
    SHARD = "shard"
    DELTA = "delta"


@dataclass(frozen=True, slots=True)
class ListDocument:
    """A signed list.

    Attributes:
        authority_id: whose it is: the subject key identifier, hexadecimal.
        built_at: when it was signed; `this_update` lies before, for verifiers whose clock is slow.
        entries: how many stand in it.
        base_number: for a delta: the full list it builds on.
        own: whether one of our authorities signed it, which has parts and a delta as well.
    """

    authority_id: str
    kind: ListKind
    der: bytes
    number: int
    built_at: datetime
    this_update: datetime
    next_update: datetime
    entries: int
    base_number: int | None = None
    own: bool = True

    @property
    def etag(self) -> str:
        """Names this list among all that were ever at its address (RFC 9110 section 8.8.3)."""
        return f'"{self.number}"'
