"""Which generation of a connection to use, and when an old one may be closed.

- A new generation begins with the first call after a new snapshot; calls under way keep theirs.
- An old generation is closed when its last call ends, and at the latest when its certificate has
  expired: whatever still runs on it would be refused by the peer anyway.
- Sans-I/O: opening and closing are functions of the caller's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from identity_client.credential import IdentitySnapshot
from identity_client.errors import SourceClosed

__all__ = ["Generation", "Rotation"]

_C = TypeVar("_C")


class Generation(Generic[_C]):
    """One connection, made with one snapshot."""

    __slots__ = ("calls", "connection", "retired", "snapshot")

    def __init__(self, snapshot: IdentitySnapshot, connection: _C) -> None:
        self.snapshot = snapshot
        self.connection = connection
        self.calls = 0
        self.retired = False


class Rotation(Generic[_C]):
    """The generations of one connection. Any thread may use it.

    Args:
        newest: returns the current snapshot, or raises SourceError.
        open_connection: makes a connection with a snapshot; must not block.
        close_connection: closes one that no call uses, or whose certificate has expired.
    """

    def __init__(
        self,
        newest: Callable[[], IdentitySnapshot],
        open_connection: Callable[[IdentitySnapshot], _C],
        close_connection: Callable[[_C], None],
    ) -> None:
        self._newest = newest
        self._open = open_connection
        self._close = close_connection
        self._lock = threading.Lock()
        self._current: Generation[_C] | None = None
        self._retired: list[Generation[_C]] = []
        self._closed = False

    @property
    def draining(self) -> int:
        """How many old generations still have calls under way."""
        return len(self._retired)

    def acquire(self) -> Generation[_C]:
        """The generation for one call; give it back with `release`.

        Raises:
            SourceError: there is no identity to make a connection with.
        """
        snapshot = self._newest()
        with self._lock:
            if self._closed:
                raise SourceClosed("the channel is closed", reason="CHANNEL_CLOSED")
            current = self._current
            finished: list[_C] = []
            # Another thread may have been faster with an even newer snapshot: never go back.
            if current is None or snapshot.revision > current.snapshot.revision:
                current, finished = self._begin(snapshot)
            current.calls += 1
        self._close_all(finished)
        return current

    def release(self, generation: Generation[_C]) -> None:
        """Ends one call's use of a generation."""
        with self._lock:
            generation.calls -= 1
            done = generation.retired and generation.calls == 0 and generation in self._retired
            if done:
                self._retired.remove(generation)
        if done:
            self._close(generation.connection)

    def close(self) -> None:
        """Closes every generation, calls under way included."""
        with self._lock:
            self._closed = True
            open_ones = [one.connection for one in self._retired]
            if self._current is not None:
                open_ones.append(self._current.connection)
            self._current, self._retired = None, []
        self._close_all(open_ones)

    def _begin(self, snapshot: IdentitySnapshot) -> tuple[Generation[_C], list[_C]]:
        previous = self._current
        self._current = Generation(snapshot, self._open(snapshot))
        if previous is not None:
            previous.retired = True
            self._retired.append(previous)
        now = time.time()
        over = [g for g in self._retired if g.calls == 0 or g.snapshot.expires_at <= now]
        self._retired = [g for g in self._retired if g not in over]
        return self._current, [g.connection for g in over]

    def _close_all(self, connections: list[_C]) -> None:
        for connection in connections:
            self._close(connection)
