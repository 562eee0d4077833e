"""What entries were before they changed: how far back a node's position can be understood.

- Holds the last changes of the feed, a bounded number; `reaches` says whether a position is in it.
- What an entry was is the entry itself, immutable and shared: the journal costs references.
- A change that concerns no entry, no revocation and no epoch leaves nothing here.
- A credential that was revoked and released is where it was last: in one of the two, never in both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from identity_broker.domain.credential import Revocation
from identity_broker.domain.entry import RegistrationEntry
from identity_broker.domain.revocation import IdentityEpoch
from identity_ca.spiffe_id import SpiffeId

Before = Mapping[str, RegistrationEntry | None]
"""Entry id → the entry as it was; None where there was none."""

MOST_CHANGES = 10_000


@dataclass(frozen=True, slots=True)
class Past:
    """What lies between a position and now.

    Attributes:
        before: every entry that changed since, as it was at the position.
        revocations: what was revoked since, oldest first, and still is.
        released: serials and jtis of what was on hold and is valid again.
        epochs: those that were raised since.
    """

    before: Before
    revocations: Sequence[Revocation]
    released: Sequence[str]
    epochs: Sequence[IdentityEpoch]


@dataclass(frozen=True, slots=True)
class Step:
    """What the feed changed up to `seq`: entries as they were before it, and what is refused."""

    seq: int
    before: Before = field(default_factory=dict)
    revocations: Sequence[Revocation] = ()
    released: Sequence[str] = ()
    epochs: Sequence[IdentityEpoch] = ()

    def __len__(self) -> int:
        return len(self.before) + len(self.revocations) + len(self.released) + len(self.epochs)


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
        revoked: dict[str, Revocation] = {}
        released: dict[str, None] = {}
        epochs: dict[SpiffeId, IdentityEpoch] = {}
        for step in reversed(steps):
            for revocation in step.revocations:
                released.pop(revocation.id, None)
                revoked[revocation.id] = revocation
            for credential_id in step.released:
                revoked.pop(credential_id, None)
                released[credential_id] = None
            epochs.update((epoch.spiffe_id, epoch) for epoch in step.epochs)
        return Past(before, tuple(revoked.values()), tuple(released), tuple(epochs.values()))
