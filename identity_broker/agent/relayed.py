"""What is passed on of revocations, as octets: a change, and the whole state of one moment.

- A message is of bounded size, and its content is made octets once for all who are sent it.
- Of a whole state the messages are made as they are sent: a hundred thousand revocations at once
  would hold up everybody else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from identity_broker.agent.denied import Denied, DeniedChange
from identity_client._wire import relay as wire

_MOST_REVOKED: Final = 1000  # in a message: 3 ms of work
_MOST_OTHERS: Final = 2000
_MESSAGE_OCTETS: Final = 256 * 1024

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Step:
    """One change, in messages that all followers get alike; a heartbeat says nothing."""

    previous: int
    sequence: int
    messages: tuple[bytes, ...] = field(repr=False)
    is_heartbeat: bool

    @property
    def octets(self) -> int:
        """Their size."""
        return sum(map(len, self.messages))


class WholeState:
    """The whole state of one moment, made octets as it is sent, once for all who begin together.

    Attributes:
        number: of the step that comes after it.
    """

    def __init__(self, denied: Denied, *, sequence: int, number: int, tick: float) -> None:
        self.sequence = sequence
        self.number = number
        self.used = tick
        change = DeniedChange(epochs=denied.epochs, authorities=denied.authorities)
        self._others = list(_joined(_parts(change)))
        self._credentials = denied.credentials()
        self._revoked: list[bytes | None] = [None] * (-(-len(self._credentials) // _MOST_REVOKED))
        # The last of the others goes with the first of the revoked: mostly one message is enough.
        self._both = self._others.pop() if self._revoked else b""

    def __len__(self) -> int:
        """Messages."""
        return len(self._others) + len(self._revoked)

    def part(self, place: int) -> bytes:
        """What a message says beside its header."""
        if place < len(self._others):
            return self._others[place]
        place -= len(self._others)
        part = self._revoked[place]
        if part is None:
            start = place * _MOST_REVOKED
            part = wire.revoked(self._credentials.part(start, start + _MOST_REVOKED))
            if not place:
                part += self._both
            self._revoked[place] = part
        return part


def parts_of(change: DeniedChange) -> tuple[bytes, ...]:
    """The contents of the messages that say a change."""
    return tuple(_joined(_parts(change)))


def _parts(change: DeniedChange) -> Iterator[bytes]:
    """What a change says, in parts of bounded size."""
    for revoked in _cut(change.revoked, _MOST_REVOKED):
        yield wire.revoked(revoked)
    for released in _cut(change.released, _MOST_OTHERS):
        yield wire.rest(released_ids=released)
    for epochs in _cut(change.epochs, _MOST_OTHERS):
        yield wire.rest(epochs=epochs)
    if change.authorities is not None:
        yield wire.rest(denied_authorities=change.authorities)


def _cut(items: Sequence[_T], length: int) -> Iterator[Sequence[_T]]:
    return (items[start : start + length] for start in range(0, len(items), length))


def _joined(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The parts again, small ones together."""
    together: list[bytes] = []
    octets = 0
    for part in parts:
        if together and octets + len(part) > _MESSAGE_OCTETS:
            yield b"".join(together)
            together, octets = [], 0
        together.append(part)
        octets += len(part)
    if together:
        yield b"".join(together)
