"""Signs remotely, in bounded threads.

- What waits while all flights are under way goes together with the next: one round trip.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from identity_broker.signing.errors import translate
from identity_ca.errors import CAError

P = TypeVar("P")
C = TypeVar("C")


class Lane(Generic[P, C]):
    """Signs remotely; what waits while all flights are under way goes together with the next."""

    def __init__(self, pool: ThreadPoolExecutor, *, flights: int, most: int = 250) -> None:
        self._pool = pool
        self._free = max(1, flights)
        self._most = most
        self._waiting: list[
            tuple[Callable[[Sequence[P]], list[C]], Sequence[P], asyncio.Future[list[C]]]
        ] = []
        self._flying: set[asyncio.Task[None]] = set()

    async def submit(self, sign: Callable[[Sequence[P]], list[C]], orders: Sequence[P]) -> list[C]:
        """Return the signed orders, in order."""
        done: asyncio.Future[list[C]] = asyncio.get_running_loop().create_future()
        self._waiting.append((sign, orders, done))
        self._launch()
        return await done

    def _launch(self) -> None:
        while self._free and self._waiting:
            sign = self._waiting[0][0]
            load, size = [], 0
            # One flight is one authority's; a replaced authority's orders fly apart.
            while self._waiting and self._waiting[0][0] == sign and size < self._most:
                load.append(self._waiting.pop(0))
                size += len(load[-1][1])
            self._free -= 1
            task = asyncio.get_running_loop().create_task(self._fly(sign, load))
            self._flying.add(task)
            task.add_done_callback(self._flying.discard)

    async def _fly(
        self,
        sign: Callable[[Sequence[P]], list[C]],
        load: list[tuple[Callable[[Sequence[P]], list[C]], Sequence[P], asyncio.Future[list[C]]]],
    ) -> None:
        orders = [order for _, part, _ in load for order in part]
        try:
            signed = await asyncio.get_running_loop().run_in_executor(self._pool, sign, orders)
        except BaseException as error:
            failure = translate(error) if isinstance(error, CAError) else error
            for _, _, done in load:
                if not done.done():
                    done.set_exception(failure)
            if not isinstance(error, Exception):
                raise
        else:
            at = 0
            for _, part, done in load:
                if not done.done():
                    done.set_result(signed[at : at + len(part)])
                at += len(part)
        finally:
            self._free += 1
            self._launch()
