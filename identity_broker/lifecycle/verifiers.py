"""Who is told of revocations now: agents, workloads with a link of their own, those behind agents.

- A node counts once, however many streams it has. Of workloads every stream counts: a second one
  of the same name is another verifier.
- Nobody is kept who has left; who wants to know of comings and goings watches.
- Touched by the event loop's thread alone.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import count
from typing import Protocol

from identity_broker.errors import InvariantViolated


class VerifierKind(StrEnum):
    """How a verifier is told."""

    AGENT = "agent"  # a node's agent, over NodeSync
    WORKLOAD = "workload"  # any caller of the broker's own feed
    BEHIND = "behind"  # a workload, through its node's agent


@dataclass(frozen=True, slots=True)
class Verifier:
    """One that is told.

    Attributes:
        name: SPIFFE ID; and the name it gave itself, in brackets; or its process number on the
            node it is behind, after a slash.
        node_id: the node it is told through; for `BEHIND`, else empty.
        place: apart from 0, tells it from others of the same name.
    """

    kind: VerifierKind
    name: str
    node_id: str = ""
    place: int = 0

    @property
    def label(self) -> str:
        """The name, and which of that name."""
        return f"{self.name}#{self.place + 1}" if self.place else self.name


Has = Callable[[int], bool]
"""Whether a verifier has applied all that it was to be told by a position."""


class Watcher(Protocol):
    """Who is told of comings and goings."""

    def came(self, verifier: Verifier) -> None: ...

    def left(self, verifier: Verifier, *, sent_away: bool) -> None: ...

    def progressed(self, verifier: Verifier) -> None: ...


@dataclass(slots=True)
class _Here:
    has: Has
    heard_at: float


class Verifiers:
    """The verifiers that are connected.

    Args:
        on_count: told how many there are of a kind, whenever that changes.
        monotonic: seconds that only grow.
    """

    def __init__(
        self,
        on_count: Callable[[VerifierKind, int], object] = lambda _kind, _count: None,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_count = on_count
        self._monotonic = monotonic
        self._here: dict[Verifier, _Here] = {}
        self._places: dict[str, set[int]] = {}
        self._counts: Counter[VerifierKind] = Counter()
        self._watchers: list[Watcher] = []

    def __len__(self) -> int:
        return len(self._here)

    def __iter__(self) -> Iterator[Verifier]:
        """Everybody; nobody may enter or leave meanwhile."""
        return iter(self._here)

    def __contains__(self, verifier: Verifier) -> bool:
        return verifier in self._here

    def has(self, verifier: Verifier, position: int) -> bool:
        """Whether it is here and has applied all that it was to be told by `position`."""
        here = self._here.get(verifier)
        return here is not None and here.has(position)

    def heard_at(self, verifier: Verifier) -> float:
        """When it acknowledged something last, monotonic seconds; only for one that is here."""
        return self._here[verifier].heard_at

    def watch(self, watcher: Watcher) -> None:
        """Tell `watcher` of comings and goings, for good."""
        self._watchers.append(watcher)

    def enter(self, verifier: Verifier, has: Has) -> None:
        """It is connected.

        Raises:
            InvariantViolated: it was already.
        """
        if verifier in self._here:
            raise InvariantViolated(detail=f"verifier {verifier.label} entered twice")
        self._here[verifier] = _Here(has, self._monotonic())
        self._counted(verifier.kind, 1)
        for watcher in self._watchers:
            watcher.came(verifier)

    def enter_workload(self, name: str, has: Has) -> Verifier:
        """A workload with a link of its own is connected: the first free place of its name."""
        taken = self._places.setdefault(name, set())
        place = next(at for at in count() if at not in taken)
        verifier = Verifier(VerifierKind.WORKLOAD, name, place=place)
        self.enter(verifier, has)
        taken.add(place)
        return verifier

    def leave(self, verifier: Verifier, *, sent_away: bool = False) -> None:
        """It is not connected any more. Twice is once.

        Args:
            sent_away: the broker ended its stream, because it is revoked or banned or the broker
                drains (`AcknowledgedStream.sent_away`).
        """
        if self._here.pop(verifier, None) is None:
            return
        self._counted(verifier.kind, -1)
        if verifier.kind is VerifierKind.WORKLOAD:
            taken = self._places[verifier.name]
            taken.discard(verifier.place)
            if not taken:
                del self._places[verifier.name]
        for watcher in self._watchers:
            watcher.left(verifier, sent_away=sent_away)

    def progressed(self, verifier: Verifier) -> None:
        """It has acknowledged something; one that is not here is not heard."""
        here = self._here.get(verifier)
        if here is None:
            return
        here.heard_at = self._monotonic()
        for watcher in self._watchers:
            watcher.progressed(verifier)

    def _counted(self, kind: VerifierKind, change: int) -> None:
        self._counts[kind] += change
        self._on_count(kind, self._counts[kind])
