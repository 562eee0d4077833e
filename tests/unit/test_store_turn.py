"""The turn to write: fair, bounded, never lost."""

from __future__ import annotations

import threading
import time

import pytest

from identity_broker.errors import StoreUnavailable
from identity_broker.store.database import WriteTurn


def test_turns_are_given_in_the_order_they_were_asked_for() -> None:
    turn = WriteTurn()
    order: list[int] = []

    def take(number: int) -> None:
        with turn(10):
            order.append(number)

    with turn(1):
        threads = []
        for number in range(20):
            thread = threading.Thread(target=take, args=(number,))
            thread.start()
            threads.append(thread)
            deadline = time.monotonic() + 5
            while len(turn._queue) <= number and time.monotonic() < deadline:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == list(range(20))


def test_who_waits_too_long_is_refused_and_leaves_the_queue() -> None:
    turn = WriteTurn()
    with turn(1):
        started = time.monotonic()
        with pytest.raises(StoreUnavailable), turn(0.05):
            pytest.fail("the turn was taken")
        assert time.monotonic() - started < 2
    with turn(0.05):
        pass


def test_a_turn_is_passed_on_when_its_holder_fails() -> None:
    turn = WriteTurn()
    with pytest.raises(ZeroDivisionError), turn(1):
        raise ZeroDivisionError
    with turn(0.05):
        pass
