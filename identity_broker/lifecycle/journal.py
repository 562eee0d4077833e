"""What entries were before they changed: how far back a node's position can be understood.

- Holds the last changes of the feed, a bounded number; `reaches` says whether a position is in it.
- What an entry was is the entry itself, immutable and shared: the journal costs references.
- A change that concerns no entry and no revocation leaves nothing here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from identity_broker.domain.credential import Revocation
from identity_broker.domain.entry import RegistrationEntry

Before = Mapping[str, RegistrationEntry | None]
"""Entry id → the entry as it was; None where there was none."""

MOST_CHANGES = 10_000


@dataclass(frozen=True, slots=True)
class Past:
    """What lies between a position and now.

    Attributes:
        before: every entry that changed since, as it was at the position.
        revocations: what was revoked since, oldest first.
    """

    before: Before
    revocations: Sequence[Revocation]


@dataclass(frozen=True, slots=True)
class Step:
    """What the feed changed up to `seq`: entries as they were before it, and revocations."""

    seq: int
    before: Before
    revocations: Sequence[Revocation]

    def __len__(self) -> int:
        return len(self.before) + len(self.revocations)


class Journal:
    """The last steps of the change feed.

    Args:
        most: how many changes are kept.
    """

    def __init__(self, most: int = MOST_CHANGES) -> None:
        self._most = most
        self._steps: deque[Step] = deque()
        self._changes = 0
        self._base = 0

    def restart(self, seq: int) -> None:
        """Forget everything: the state was read anew, as of `seq`."""
        self._steps.clear()
        self._changes = 0
        self._base = seq

    def note(self, step: Step) -> None:
        """Keep what a step changed; the oldest steps go."""
        if not step:
            return
        self._steps.append(step)
        self._changes += len(step)
        while self._changes > self._most:
            oldest = self._steps.popleft()
            self._changes -= len(oldest)
            self._base = oldest.seq

    def prime(self, base: int, steps: Iterable[Step]) -> None:
        """Begin with what changed before this process was there.

        What entries were is not known then. To take them for what they are is safe: a node that has
        something else says so by its digest.

        Args:
            base: the position from which on the steps are all there are.
            steps: oldest first.
        """
        self.restart(base)
        for step in steps:
            self.note(step)

    def reaches(self, seq: int) -> bool:
        """Whether everything that changed after `seq` is here."""
        return seq >= self._base

    def since(self, seq: int) -> Past:
        """What changed after `seq`; only if the journal reaches it.

        A position inside a step, as another broker's may be, gives all of the step.
        """
        before: dict[str, RegistrationEntry | None] = {}
        steps: list[Step] = []
        for step in reversed(self._steps):
            if step.seq <= seq:
                break
            steps.append(step)
            before.update(step.before)  # going back in time: the oldest stays
        revocations = [item for step in reversed(steps) for item in step.revocations]
        return Past(before, revocations)
