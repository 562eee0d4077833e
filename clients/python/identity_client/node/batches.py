"""Long lists of orders, cut to what one call carries; each order gets its own outcome.

- What is refused for the second that it is, because every token of the identity issued until now
  was just revoked, is ordered once more in the next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

from identity_client.errors import IdentityError

__all__ = ["BATCH_SIZE", "in_batches", "past_epochs"]

BATCH_SIZE: Final = 500
"""How many items one call to the broker may carry (svid.proto)."""

_EPOCH: Final = "IDENTITY_EPOCH"
_LONGEST_EPOCH: Final = 2.0

_Order = TypeVar("_Order")
_Outcome = TypeVar("_Outcome")


async def in_batches(
    orders: Sequence[_Order],
    issue: Callable[[Sequence[_Order]], Awaitable[list[_Outcome | IdentityError]]],
) -> list[_Outcome | IdentityError]:
    """The outcome of every order, in order; a batch that fails as a whole fails each of its own."""
    outcomes: list[_Outcome | IdentityError] = []
    for start in range(0, len(orders), BATCH_SIZE):
        batch = orders[start : start + BATCH_SIZE]
        try:
            outcomes += await issue(batch)
        except IdentityError as error:
            outcomes += [error] * len(batch)
    return outcomes


async def past_epochs(
    orders: Sequence[_Order],
    issue: Callable[[Sequence[_Order]], Awaitable[list[_Outcome | IdentityError]]],
) -> list[_Outcome | IdentityError]:
    """The outcome of every order, in order; once more for those that came a second too early."""
    outcomes = await issue(orders)
    early = {
        at: outcome
        for at, outcome in enumerate(outcomes)
        if isinstance(outcome, IdentityError) and outcome.reason == _EPOCH
    }
    if early:
        wait = max(error.retry_after or 1.0 for error in early.values())
        await asyncio.sleep(min(wait, _LONGEST_EPOCH))
        again = await issue([orders[at] for at in early])
        for at, outcome in zip(early, again, strict=True):
            outcomes[at] = outcome
    return outcomes
