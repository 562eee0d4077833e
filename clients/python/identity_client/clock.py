"""The wall clock and the dice: the only place where the SDK reads either."""

from __future__ import annotations

import secrets
from datetime import UTC, datetime

__all__ = ["roll", "utc_now"]

_random = secrets.SystemRandom()


def utc_now() -> datetime:
    """Now, aware, in UTC."""
    return datetime.now(UTC)  # noqa: TID251 - this is the adapter


def roll() -> float:
    """Uniform in [0, 1)."""
    return _random.random()
