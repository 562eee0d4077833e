"""Long lists of orders, cut to what one call carries; each order gets its own outcome."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

from identity_client.errors import IdentityError

__all__ = ["BATCH_SIZE", "in_batches"]

BATCH_SIZE: Final = 500
"""How many items one call to the broker may carry (svid.proto)."""

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
