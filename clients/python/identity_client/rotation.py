"""Which generation of a connection to use, and when an old one may be closed.

- A new generation begins with the first call after a new snapshot, or once the server may show
  other certificates than before; calls under way keep theirs.
- A generation whose server is revoked is closed at once, calls under way included.
- An old generation is closed when its last call ends, and at the latest when its certificate has
  expired: whatever still runs on it would be refused by the peer anyway.
- Sans-I/O: opening and closing are functions of the caller's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from identity_client.credential import IdentitySnapshot
from identity_client.errors import PeerRejected, SourceClosed
from identity_client.peer import Peer

__all__ = ["Generation", "Pins", "Rotation"]

_C = TypeVar("_C")


@dataclass(frozen=True, slots=True)
class Pins:
    """The certificates that a server may show, and no others.

    Attributes:
        version: grows with every change.
        peers: whom they name.
        pem: they.
    """

    version: int
    peers: tuple[Peer, ...] = ()
    pem: bytes = field(default=b"", repr=False)


class Generation(Generic[_C]):
    """One connection, made with one snapshot, to whoever the bundle vouches for or `pins` names.

    Attributes:
        cut_because: why it was closed with calls under way; None for most.
    """

    __slots__ = ("calls", "connection", "cut_because", "pins", "retired", "snapshot")

    def __init__(self, snapshot: IdentitySnapshot, pins: Pins | None, connection: _C) -> None:
        self.snapshot = snapshot
        self.pins = pins
        self.connection = connection
        self.calls = 0
        self.retired = False
        self.cut_because: PeerRejected | None = None


class Rotation(Generic[_C]):
    """The generations of one connection. Any thread may use it.

    Args:
        newest: returns the current snapshot, or raises SourceError.
        open_connection: makes a connection with a snapshot; must not block. With pins, the server
            must show one of them.
        close_connection: closes one that no call uses, or whose certificate has expired.
    """

    def __init__(
        self,
        newest: Callable[[], IdentitySnapshot],
        open_connection: Callable[[IdentitySnapshot, Pins | None], _C],
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

    def acquire(self, pins: Pins | None = None) -> Generation[_C]:
        """The generation for one call; give it back with `release`.

        Args:
            pins: what the server may show; None for whatever the bundle vouches for.

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
            if current is None or _is_newer(snapshot, pins, current):
                current, finished = self._begin(snapshot, pins)
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

    def has(self, which: Callable[[Generation[_C]], bool]) -> bool:
        """Whether there is such a generation."""
        with self._lock:
            current = [] if self._current is None else [self._current]
            return any(map(which, (*current, *self._retired)))

    def cut(self, doomed: Callable[[Generation[_C]], bool], why: PeerRejected) -> None:
        """Closes the generations that are doomed, calls under way included."""
        with self._lock:
            current = self._current
            ended = [one for one in self._retired if doomed(one)]
            self._retired = [one for one in self._retired if one not in ended]
            if current is not None and doomed(current):
                current.retired = True
                ended.append(current)
                self._current = None
            for one in ended:
                one.cut_because = why
        self._close_all([one.connection for one in ended])

    def _begin(
        self, snapshot: IdentitySnapshot, pins: Pins | None
    ) -> tuple[Generation[_C], list[_C]]:
        previous = self._current
        self._current = Generation(snapshot, pins, self._open(snapshot, pins))
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


def _is_newer(snapshot: IdentitySnapshot, pins: Pins | None, than: Generation[_C]) -> bool:
    if snapshot.revision != than.snapshot.revision:
        return snapshot.revision > than.snapshot.revision
    if pins is None or than.pins is None:
        return pins is not than.pins
    return pins.version > than.pins.version
