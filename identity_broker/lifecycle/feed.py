"""The broker's own feed of revocations: what every verifier that follows it is told.

- A verifier is told what it lacks, or everything, and then each change as it commits. All who stand
  at the same place are told the same `Batch`, made once: a thousand cost little more than one.
- A change is pushed from the change feed's update itself; nobody who revokes waits for a verifier.
- A verifier that comes back gets what it missed where a journal reaches, else everything.
- A state that may be stale is never sent: `open` reads the change feed first, and while the feed is
  lost there are no heartbeats.
- Positions never go back, and those of one stream follow one another without a gap.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from weakref import WeakValueDictionary

from identity_broker.domain.credential import Revocation
from identity_broker.domain.revocation import IdentityEpoch
from identity_broker.errors import BrokerStopping, RateLimited, StoreUnavailable, WatchLagged
from identity_broker.lifecycle import followers
from identity_broker.lifecycle.directory import Directory, Update
from identity_broker.lifecycle.followers import Follower, Hello
from identity_broker.lifecycle.journal import Journal, Past, Step
from identity_broker.lifecycle.verifiers import Verifier, Verifiers
from identity_broker.telemetry.logs import get_logger

_log = get_logger("feed")

MOST_RECENT = 100_000
"""Changes that are remembered for verifiers that lag; references, shared with the directory."""
MOST_KEPT = 50_000
"""Items of all batches that are kept while nobody is being told them."""
MOST_OF_A_CALLER = 2000
"""Streams of one identity at a time."""
SPREAD_OF_EACH = timedelta(milliseconds=2)
MOST_SPREAD = timedelta(seconds=10)
_STOPPING_RETRY_SECONDS = 1.0
_CROWDED_RETRY_SECONDS = 30.0

_Key = tuple[int | None, bool]


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Batch:
    """What takes a verifier from one place to another; shared, whatever its size on the wire.

    Attributes:
        sequence: where it stands once this is applied.
        previous: where it has to stand before; 0 when full.
        full: replaces everything it was told before.
        revocations: new ones.
        released: ids of credentials that are not revoked any more.
        epochs: new ones.
        denied: all authorities that are denied, when they changed.
    """

    sequence: int
    previous: int
    full: bool
    revocations: tuple[Revocation, ...] = ()
    released: tuple[str, ...] = ()
    epochs: tuple[IdentityEpoch, ...] = ()
    denied: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.revocations) + len(self.released) + len(self.epochs)


class RevocationFeed:
    """Keeps verifiers up to date.

    Args:
        verifiers: where those who follow are entered.
        monotonic: seconds that only grow.
    """

    def __init__(
        self,
        directory: Directory,
        verifiers: Verifiers,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._verifiers = verifiers
        self._monotonic = monotonic
        self._followers: dict[Follower, Verifier] = {}
        self._callers: Counter[str] = Counter()
        # What concerns verifiers alone: entries that change do not push it out.
        self._journal = Journal(MOST_RECENT)
        self._journal.restart(directory.seq)
        self._position = self._news_at = self._denied_at = directory.seq
        self._denied = directory.denied_authorities()
        self._advanced_at = monotonic()
        self._made: dict[_Key, Batch] = {}
        self._kept = 0
        self._being_told: WeakValueDictionary[_Key, Batch] = WeakValueDictionary()
        directory.listen(self._on_update)

    def __len__(self) -> int:
        return len(self._followers)

    @property
    def spread(self) -> timedelta:
        """How far verifiers should spread when all have to come back at once."""
        count = len(self)
        return min(count * SPREAD_OF_EACH, MOST_SPREAD) if count > 1 else timedelta()

    def needed(self, sequence: int) -> int | None:
        """The position from which on a verifier has all that was to be told by `sequence`.

        Less than `sequence` where the last changes before it concern no verifier; None where the
        directory does not reflect it yet.
        """
        if self._directory.seq < sequence:
            return None
        return min(self._news_at, sequence)

    # --- one verifier -----------------------------------------------------------------------------

    async def open(self, hello: Hello) -> Follower:
        """Begin to tell a verifier; the first batch is what it lacks, or everything.

        Raises:
            RateLimited: its identity follows too often already.
            StoreUnavailable: the state may be stale, and is not sent.
        """
        await self._directory.sync()
        await self._directory.check()
        # No await from here on: the place and the subscription are of one moment.
        if self._callers[hello.caller] >= MOST_OF_A_CALLER:
            raise RateLimited(
                f"more than {MOST_OF_A_CALLER} verifiers follow with this identity",
                retry_after=_CROWDED_RETRY_SECONDS,
            )
        stand = hello.resume_from if self._reaches(hello.resume_from) else None
        follower = Follower(hello, stand, monotonic=self._monotonic)
        self._callers[hello.caller] += 1
        self._followers[follower] = self._verifiers.enter_workload(
            hello.verifier_name, follower.has
        )
        _log.info(
            "verifier connected",
            caller=hello.caller,
            version=hello.version,
            sequence=self._position,
            state="full" if stand is None else "resumed",
        )
        return follower

    async def next(self, follower: Follower) -> Batch | None:
        """Wait for the next batch of a verifier; None when its stream has ended in peace.

        Raises:
            WatchLagged: it reads or acknowledges too slowly.
            BrokerStopping: the broker drains.
        """
        while await follower.ready():
            if not follower.pending:
                try:
                    await self._directory.check()
                except StoreUnavailable:
                    continue  # a heartbeat would say that the verifier's state is fresh
                self._advance()
            batch = self._batch(follower.stand, first=not follower.greeted)
            follower.stand, follower.pending, follower.greeted = batch.sequence, False, True
            return batch
        return None

    def acknowledged(self, follower: Follower, sequence: int) -> None:
        """The verifier has applied a message of that sequence.

        Raises:
            MalformedRequest: it was sent no such message.
        """
        if follower.acknowledge(sequence):
            self._verifiers.progressed(self._followers[follower])

    def close(self, follower: Follower) -> None:
        """Tell the verifier nothing more. Twice is once."""
        follower.end()
        verifier = self._followers.pop(follower, None)
        if verifier is None:
            return
        self._verifiers.leave(verifier, sent_away=follower.sent_away)
        self._callers[follower.caller] -= 1
        if not self._callers[follower.caller]:
            del self._callers[follower.caller]

    def stop(self) -> None:
        """The broker drains: every verifier is to call again."""
        for follower in tuple(self._followers):
            follower.end(BrokerStopping(retry_after=_STOPPING_RETRY_SECONDS))

    # --- all of them ------------------------------------------------------------------------------

    def _on_update(self, update: Update) -> None:
        denied = self._directory.denied_authorities()
        if not (update.revocations or update.released or update.epochs or denied != self._denied):
            return
        if update.seq <= self._position:
            # The same position says something else: the clock was set back.
            self._journal.restart(update.seq)
            for follower in self._followers:
                follower.stand = None
        self._journal.note(
            Step(
                update.seq,
                revocations=tuple(update.revocations),
                released=tuple(update.released),
                epochs=tuple(update.epochs),
            )
        )
        if denied != self._denied:
            self._denied, self._denied_at = denied, update.seq
        self._news_at = update.seq
        self._move_to(update.seq)
        for follower in self._followers:
            follower.pending = True
            follower.wake()

    def _advance(self) -> None:
        """Move on over changes that concern no verifier, now and then.

        It keeps where verifiers stand within reach of the change feed, and them together.
        """
        now = self._monotonic()
        if self._directory.seq > self._position and (
            now - self._advanced_at >= followers.HEARTBEAT_SECONDS
        ):
            self._advanced_at = now
            self._move_to(self._directory.seq)

    def _move_to(self, position: int) -> None:
        self._position = position
        self._forget_made()
        self._being_told = WeakValueDictionary()

    def _forget_made(self) -> None:
        self._made.clear()
        self._kept = 0

    # --- what they are told -----------------------------------------------------------------------

    def _reaches(self, position: int) -> bool:
        """Whether all is known that changed after a position; 0 is none."""
        if not 0 < position <= self._directory.seq:
            return False
        return self._journal.reaches(position) or self._directory.journal.reaches(position)

    def _batch(self, stand: int | None, *, first: bool) -> Batch:
        """What takes a verifier from where it stands to now.

        Raises:
            WatchLagged: what it missed is not remembered any more.
        """
        key = (stand, first)
        batch = self._made.get(key) or self._being_told.get(key)
        if batch is None:
            batch = self._full() if stand is None else self._since(stand, first=first)
            self._being_told[key] = batch
            self._keep(key, batch)
        return batch

    def _keep(self, key: _Key, batch: Batch) -> None:
        """Keep a batch for whoever stands at the same place next; bounded."""
        items = 1 + len(batch)
        if self._kept + items > MOST_KEPT:
            self._forget_made()
        if items <= MOST_KEPT:
            self._made[key] = batch
            self._kept += items

    def _full(self) -> Batch:
        return Batch(
            sequence=self._position,
            previous=0,
            full=True,
            revocations=tuple(self._directory.revocations()),
            epochs=tuple(self._directory.epochs()),
            denied=self._denied,
        )

    def _since(self, stand: int, *, first: bool) -> Batch:
        past = self._past(stand)
        return Batch(
            # Ahead of us by changes that concern no verifier, or by another broker's count.
            sequence=max(self._position, stand),
            previous=stand,
            full=False,
            revocations=tuple(past.revocations),
            released=tuple(past.released),
            epochs=tuple(past.epochs),
            denied=self._denied if first or stand < self._denied_at else None,
        )

    def _past(self, stand: int) -> Past:
        for journal in (self._journal, self._directory.journal):
            if journal.reaches(stand):
                return journal.since(stand)
        raise WatchLagged(detail=f"what changed after {stand} is not remembered any more")
