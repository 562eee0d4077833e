"""Token buckets in bounded memory: how often somebody may do something.

- A bucket is one number, the moment at which it is full again (GCRA); the one used longest ago is
  forgotten first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final, Generic, TypeVar

DEFAULT_CAPACITY: Final = 65_536

K = TypeVar("K", bound=Hashable)


class Buckets(Generic[K]):
    """A bucket for each key; at most `capacity` of them, the one used longest ago goes first."""

    __slots__ = ("_capacity", "_full_at")

    def __init__(self, capacity: int = DEFAULT_CAPACITY) -> None:
        self._full_at: OrderedDict[K, float] = OrderedDict()
        self._capacity = capacity

    def take(self, key: K, cost: float, depth: float, now: float) -> float:
        """Take from the key's bucket, or nothing at all.

        Args:
            cost: what is taken, in seconds of refilling.
            depth: what the bucket holds, in seconds of refilling.
            now: seconds that only grow.

        Returns:
            0.0 when it was taken, else the seconds until it could be.
        """
        full_at = max(self._full_at.get(key, now), now) + cost
        wait = full_at - now - depth
        if wait > 1e-9:
            return wait
        self._full_at[key] = full_at
        self._full_at.move_to_end(key)
        if len(self._full_at) > self._capacity:
            self._full_at.popitem(last=False)
        return 0.0

    def __len__(self) -> int:
        return len(self._full_at)
