"""When to renew, and how long to wait after a failure. Pure functions; the caller brings the dice.

- Renewal is due at half of the life that was left when the credential arrived, ±10 %, so that a
  fleet started together does not come back together. The life is counted from arrival and not
  from notBefore, which is backdated and would make a short-lived credential due at once.
- A retry never waits less than the broker asked for, nor longer than the cap.
- The closer the expiry, the shorter the cap: a failing renewal is tried at least about ten times
  in what is left of a credential's life.
"""

from __future__ import annotations

from datetime import datetime, timedelta

__all__ = ["FIRST_DELAY", "MAX_DELAY", "is_urgent", "renewal_due", "retry_delay"]

_HALF = 0.5
_SPREAD = 0.1
FIRST_DELAY = timedelta(milliseconds=200)
MAX_DELAY = timedelta(seconds=30)
_MIN_CAP = timedelta(milliseconds=500)
_MAX_DOUBLINGS = 16


def renewal_due(*, received: datetime, not_after: datetime, dice: float) -> datetime:
    """When to renew a credential.

    Args:
        received: when the credential arrived.
        not_after: when it expires.
        dice: uniform in [0, 1).

    Returns:
        A time between 45 % and 55 % of the remaining life; `received` when none remained.
    """
    life = max(not_after - received, timedelta(0))
    return received + life * _HALF * (1 + _SPREAD * (2 * dice - 1))


def is_urgent(*, received: datetime, not_after: datetime, now: datetime) -> bool:
    """Whether less than a quarter of the life is left: renewal has been failing for a while."""
    return now >= not_after - max(not_after - received, timedelta(0)) / 4


def retry_delay(
    attempt: int,
    *,
    dice: float,
    remaining: timedelta | None = None,
    retry_after: float | None = None,
    cap: timedelta = MAX_DELAY,
) -> timedelta:
    """How long to wait before trying again: exponential, half of it jitter, capped.

    Args:
        attempt: how many attempts have failed in a row, at least 1.
        dice: uniform in [0, 1).
        remaining: life left of the credential being renewed; None when there is none to lose.
        retry_after: seconds the broker asked for; honoured up to MAX_DELAY.
        cap: never wait longer than this for our own reasons.
    """
    if remaining is not None and remaining > timedelta(0):
        cap = min(cap, max(remaining / 10, _MIN_CAP))
    full: timedelta = min(FIRST_DELAY * 2 ** min(attempt - 1, _MAX_DOUBLINGS), cap)
    delay = full * (0.5 + 0.5 * dice)
    if retry_after is not None:
        delay = max(delay, min(timedelta(seconds=retry_after), MAX_DELAY))
    return delay
