"""A watcher's queue."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from identity_broker.errors import WatchLagged
from identity_broker.server.rpc.watch import MOST_QUEUED, Subscription, subscription


async def test_items_come_in_order_without_a_task_for_each() -> None:
    watcher: Subscription[int] = Subscription()
    items = watcher.items()
    before = len(asyncio.all_tasks())
    for number in range(10):
        watcher.put(number)
    assert [await anext(items) for _ in range(10)] == list(range(10))
    waiting = asyncio.ensure_future(anext(items))
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == before + 1
    watcher.put(10)
    assert await asyncio.wait_for(waiting, 5) == 10


async def test_a_watcher_that_reads_too_slowly_is_let_go() -> None:
    watcher: Subscription[int] = Subscription()
    for number in range(MOST_QUEUED):
        watcher.put(number)
    items = watcher.items()
    assert await anext(items) == 0
    watcher.put(-1)
    watcher.put(-2)
    with pytest.raises(WatchLagged):
        await anext(items)


async def test_it_listens_for_as_long_as_the_block_runs() -> None:
    listening: list[Callable[[int], None]] = []

    def listen(tell: Callable[[int], None]) -> Callable[[], None]:
        listening.append(tell)
        return listening.clear

    with subscription(listen) as watcher:
        listening[0](7)
        assert await anext(watcher.items()) == 7
    assert not listening
