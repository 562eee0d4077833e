"""What is to be ordered from the broker next: most urgent first, at most once at a time.

- Without input, output or clocks of its own: the caller brings both times and the dice.
- What is due by the wall clock or by the steady clock is due: neither a clock set back nor a
  machine that slept puts a renewal off.
- A key that was taken is in flight until it has landed; wanting it meanwhile changes nothing,
  redoing it orders it once more when it has landed.
- What is to go another way than the rest is put aside, still by urgency: it is not in flight, and
  whoever wants it more meanwhile moves it forward.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from typing import Generic, TypeVar

_K = TypeVar("_K", bound=Hashable)


class Rank(IntEnum):
    """How urgent an order is."""

    WAITED = 0  # somebody waits and has nothing
    REPLACE = 1  # what is there must not be used any longer, or is not what is registered
    RENEW = 2
    PREFETCH = 3  # nobody has asked yet


@dataclass(slots=True)
class _Plan:
    rank: Rank
    order: float  # within a rank, smaller first
    version: int
    ready: bool


class Schedule(Generic[_K]):
    """Keys, and when each is due."""

    def __init__(self) -> None:
        self._plans: dict[_K, _Plan] = {}
        self._flying: dict[_K, Rank | None] = {}
        self._ready: list[tuple[int, float, int, _K]] = []
        self._aside: list[tuple[int, float, int, _K]] = []
        self._by_tick: list[tuple[float, int, _K]] = []
        self._by_wall: list[tuple[datetime, int, _K]] = []
        self._version = 0

    def __contains__(self, key: _K) -> bool:
        return key in self._plans or key in self._flying

    def __len__(self) -> int:
        return len(self._plans.keys() | self._flying.keys())

    def is_flying(self, key: _K) -> bool:
        """Whether it was taken and has not landed."""
        return key in self._flying

    def is_pending(self, key: _K) -> bool:
        """Whether it is being ordered, or will be as soon as possible."""
        plan = self._plans.get(key)
        return key in self._flying or (plan is not None and plan.ready)

    def want(self, key: _K, rank: Rank) -> None:
        """Order it as soon as possible, unless it is in flight or more urgent already."""
        if key in self._flying:
            return
        plan = self._plans.get(key)
        if plan is None or not plan.ready or rank < plan.rank:
            self._make_ready(key, rank, 0.0)

    def redo(self, key: _K, rank: Rank) -> None:
        """Order it as soon as possible, and once more if it is in flight."""
        if key in self._flying:
            earlier = self._flying[key]
            self._flying[key] = rank if earlier is None else min(rank, earlier)
        else:
            self.want(key, rank)

    def later(  # two clocks, each now and then
        self,
        key: _K,
        rank: Rank,
        *,
        due_tick: float,
        due_at: datetime | None,
        order: float = 0.0,
    ) -> None:
        """Order it at `due_tick`, or at `due_at` if the wall clock gets there first."""
        self._version += 1
        self._plans[key] = _Plan(rank, order, self._version, ready=False)
        heapq.heappush(self._by_tick, (due_tick, self._version, key))
        if due_at is not None:
            heapq.heappush(self._by_wall, (due_at, self._version, key))

    def forget(self, key: _K) -> None:
        """Do not order it; one in flight lands unnoticed."""
        self._plans.pop(key, None)
        self._flying.pop(key, None)

    def take(
        self,
        *,
        now: datetime,
        tick: float,
        limit: int,
        aside: Callable[[_K], bool] = lambda _key: False,
    ) -> list[_K]:
        """The most urgent keys that are due, at most `limit`; in flight from now on.

        Args:
            aside: whether a key is left for `take_aside`.
        """
        self._ripen(now, tick)
        taken: list[_K] = []
        while self._ready and len(taken) < limit:
            item = heapq.heappop(self._ready)
            *_, version, key = item
            if not self._is_current(key, version):
                continue
            if aside(key):
                heapq.heappush(self._aside, item)
            else:
                self._depart(key)
                taken.append(key)
        return taken

    def take_aside(self) -> _K | None:
        """The most urgent key that was put aside; in flight from now on."""
        while self._aside:
            *_, version, key = heapq.heappop(self._aside)
            if self._is_current(key, version):
                self._depart(key)
                return key
        return None

    def land(self, key: _K) -> bool:
        """Note that an order has been answered.

        Returns:
            Whether the answer still counts: False for a key forgotten meanwhile.
        """
        if key not in self._flying:
            return False
        again = self._flying.pop(key)
        if again is not None:
            self._make_ready(key, again, 0.0)
        return True

    def pause(self, *, now: datetime, tick: float) -> float | None:
        """Seconds until something is due; None when nothing is planned but what is aside."""
        self._ripen(now, tick)
        while self._ready and not self._is_current(self._ready[0][3], self._ready[0][2]):
            heapq.heappop(self._ready)
        if self._ready:
            return 0.0
        dues = []
        if self._by_tick:
            dues.append(self._by_tick[0][0] - tick)
        if self._by_wall:
            dues.append((self._by_wall[0][0] - now).total_seconds())
        return max(min(dues), 0.0) if dues else None

    def _depart(self, key: _K) -> None:
        del self._plans[key]
        self._flying[key] = None

    def _ripen(self, now: datetime, tick: float) -> None:
        """Make ready what is due; drop what was planned anew."""
        while self._by_tick:
            due_tick, version, key = self._by_tick[0]
            if self._is_current(key, version):
                if due_tick > tick:
                    break
                self._promote(key)
            heapq.heappop(self._by_tick)
        while self._by_wall:
            due_at, version, key = self._by_wall[0]
            if self._is_current(key, version):
                if due_at > now:
                    break
                self._promote(key)
            heapq.heappop(self._by_wall)

    def _is_current(self, key: _K, version: int) -> bool:
        plan = self._plans.get(key)
        return plan is not None and plan.version == version

    def _promote(self, key: _K) -> None:
        plan = self._plans[key]
        self._make_ready(key, plan.rank, plan.order)

    def _make_ready(self, key: _K, rank: Rank, order: float) -> None:
        self._version += 1
        self._plans[key] = _Plan(rank, order, self._version, ready=True)
        heapq.heappush(self._ready, (int(rank), order, self._version, key))
