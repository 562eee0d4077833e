"""The demonstration's customers: a bounded load on `orders`, and a count of what failed.

- The first line on stdin: {"orders": "host:port", "per_second": 50}.
- The command {"tally": true} is answered with the count since the first order.
"""

from __future__ import annotations

import threading
import time

import grpc

from identity_broker.dev.demo.wire import PLACE, Message, commands, emit, unary

_ITEMS = ("blue kettle", "oak table", "wool blanket", "reading lamp")


class Shop:
    """Places one order after the other until told to stop."""

    def __init__(self, address: str, per_second: float) -> None:
        self._place = unary(grpc.insecure_channel(address), PLACE)
        self._interval = 1.0 / per_second
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._placed = 0
        self._failed = 0

    def run(self) -> None:
        """Place orders."""
        number = 0
        while not self._stop.wait(self._interval):
            number += 1
            self._one(number)

    def tally(self) -> Message:
        """What was placed and what failed so far."""
        with self._lock:
            return {"placed": self._placed, "failed": self._failed}

    def stop(self) -> None:
        """Place no more."""
        self._stop.set()

    def _one(self, number: int) -> None:
        item = _ITEMS[number % len(_ITEMS)]
        started = time.monotonic()
        try:
            self._place({"order": number, "item": item}, timeout=10.0)
        except grpc.RpcError as error:
            emit("order_failed", order=number, reason=error.details(), started=started)
            with self._lock:
                self._failed += 1
        else:
            with self._lock:
                self._placed += 1


def main() -> None:
    """Place orders until stdin closes."""
    told = commands()
    asked = next(told)
    shop = Shop(asked["orders"], asked["per_second"])
    thread = threading.Thread(target=shop.run)
    thread.start()
    emit("ready", address="")
    for _ in told:
        emit("tally", **shop.tally())
    shop.stop()
    thread.join()


if __name__ == "__main__":
    main()
