"""One connected node: what it has still to be told, and what it has acknowledged.

- What is to be told is composed, not queued: changes that wait are joined into one message, so a
  slow node costs a bounded amount of memory and catches up in one step.
- A node that does not acknowledge for `PATIENCE`, or lets too much wait, is let go.
- Whatever a node says it has when it connects: until it has acknowledged the first message of this
  stream, it counts as having applied nothing.
- Touched by the event loop's thread alone; what is told is immutable.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from identity_broker.domain.credential import Revocation
from identity_broker.domain.entry import RegistrationEntry
from identity_broker.errors import BrokerError, MalformedRequest, WatchLagged
from identity_ca.bundle import TrustBundle
from identity_ca.spiffe_id import SpiffeId

HEARTBEAT_SECONDS = 15.0
"""A node that is told nothing for so long gets an empty message."""
PATIENCE_SECONDS = 30.0
"""A message has to be acknowledged in this time."""
WINDOW = 64
"""Messages under way at most; what comes meanwhile is joined."""
MOST_WAITING = 10_000
"""Items that may wait behind one another; a single change may be larger."""


@dataclass(frozen=True, slots=True)
class Resume:
    """Where a node that comes back says it stands."""

    revision: int
    entries_digest: int


@dataclass(frozen=True, slots=True)
class Lists:
    """The revocation lists in force, DER."""

    crls: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class News:
    """One message to a node, whatever its size on the wire.

    Attributes:
        revision: the change feed's position the node stands at once this is applied.
        previous: the revision it builds on; 0 when full.
        full: replaces everything the node has.
        changed: entries new or changed.
        removed_ids: entries that are not the node's any more.
        bundle: when it changed.
        revocations: new ones.
        lists: when they changed.
        entries_digest: of the node's entries once this is applied; see `entry_digest`.
    """

    revision: int
    previous: int
    full: bool
    changed: tuple[RegistrationEntry, ...]
    removed_ids: tuple[str, ...]
    bundle: TrustBundle | None
    revocations: tuple[Revocation, ...]
    lists: Lists | None
    entries_digest: int


class Waiting:
    """Changes that wait for their message, composed into one.

    Attributes:
        since: the position of the earliest; None when nothing waits, 0 for a first message.
        steps: how many were composed.
    """

    __slots__ = (
        "bundle",
        "changed",
        "full",
        "lists",
        "removed",
        "revocations",
        "since",
        "steps",
    )

    def __init__(self) -> None:
        self.since: int | None = None
        self.steps = 0
        self.full = False
        self.changed: dict[str, RegistrationEntry] = {}
        self.removed: dict[str, None] = {}
        self.bundle: TrustBundle | None = None
        self.revocations: list[Revocation] = []
        self.lists: Lists | None = None

    def __len__(self) -> int:
        return len(self.changed) + len(self.removed) + len(self.revocations)

    def put(self, entry: RegistrationEntry) -> None:
        """The entry is new to the node, or has changed."""
        self.removed.pop(entry.id, None)
        self.changed[entry.id] = entry

    def drop(self, entry_id: str) -> None:
        """The entry is not the node's any more."""
        self.changed.pop(entry_id, None)
        self.removed[entry_id] = None

    def revoked(self, revocations: Iterable[Revocation]) -> None:
        """These credentials are revoked."""
        self.revocations.extend(revocations)

    def touch(self, seq: int) -> None:
        """Something was composed in, as of that position."""
        self.steps += 1
        if self.since is None:
            self.since = seq


@dataclass(slots=True)
class _Told:
    """A message under way.

    `since` is the position of the earliest change in it; None for a heartbeat.
    """

    revision: int
    since: int | None
    handed_at: float
    moved_at: float


class NodeStream:
    """What one node is told, in order.

    Args:
        node_id: whose stream it is.
        parents: the parents whose entries the node may have.
        version: of the agent, as it says.
        monotonic: seconds that only grow.
    """

    def __init__(
        self,
        node_id: SpiffeId,
        parents: frozenset[SpiffeId],
        *,
        version: str = "",
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.node_id = node_id
        self.parents = parents
        self.version = version
        self.waiting = Waiting()
        # The first message makes up for all that came before, not just for the latest change.
        self.waiting.since = 0
        self.revision = 0
        self._monotonic = monotonic
        self._under_way: deque[_Told] = deque()
        self._handed_at = monotonic()
        self._news = asyncio.Event()
        self._ended = False
        self._refusal: BrokerError | None = None

    # --- telling ------------------------------------------------------------------------------

    def touch(self, seq: int) -> None:
        """`waiting` was changed, as of that position.

        The stream ends when too much waits behind what the node has not taken.
        """
        self.waiting.touch(seq)
        if self.waiting.steps > 1 and len(self.waiting) > MOST_WAITING:
            self.end(WatchLagged(detail=f"{len(self.waiting)} changes wait for {self.node_id}"))
        self._news.set()

    async def ready(self) -> bool:
        """Wait until there is something to tell, or a heartbeat is due.

        Returns:
            False when the stream has ended in peace.

        Raises:
            BrokerError: why it has ended otherwise.
        """
        try:
            async with asyncio.timeout(self._handed_at + HEARTBEAT_SECONDS - self._monotonic()):
                while not (self._ended or (self.waiting.steps and len(self._under_way) < WINDOW)):
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            self._handed_at = self._monotonic()
        self.check()
        return not self._ended

    def take(self, revision: int, entries_digest: int) -> News:
        """Hand out what waits, as of `revision`; it is under way from now on."""
        waiting, self.waiting = self.waiting, Waiting()
        news = News(
            revision=revision,
            previous=0 if waiting.full else self.revision,
            full=waiting.full,
            changed=tuple(waiting.changed.values()),
            removed_ids=() if waiting.full else tuple(waiting.removed),
            bundle=waiting.bundle,
            revocations=tuple(waiting.revocations),
            lists=waiting.lists,
            entries_digest=entries_digest,
        )
        self.revision = revision
        self._handed_at = self._monotonic()
        self._under_way.append(_Told(revision, waiting.since, self._handed_at, self._handed_at))
        return news

    def moved(self) -> None:
        """A piece of the message handed out last is on its way: the node reads."""
        if self._under_way:
            self._under_way[-1].moved_at = self._monotonic()

    # --- what the node answers ----------------------------------------------------------------

    def acknowledge(self, revision: int) -> list[float]:
        """The node has applied everything up to `revision`.

        Returns:
            The seconds that each message acknowledged by this took.

        Raises:
            MalformedRequest: the node was not told that revision.
        """
        if revision > self.revision:
            raise MalformedRequest(f"ack.revision {revision} was not sent to this node")
        took = []
        now = self._monotonic()
        while self._under_way and self._under_way[0].revision <= revision:
            took.append(now - self._under_way.popleft().handed_at)
        self._news.set()
        return took

    def has_applied(self, seq: int) -> bool:
        """Whether the node has acknowledged everything that it was to be told by `seq`.

        Nothing more is told on a stream that has ended, so nothing can be said of it.
        """
        waits = self.waiting.since
        if self._ended or (waits is not None and waits <= seq):
            return False
        return not any(told.since is not None and told.since <= seq for told in self._under_way)

    # --- ending -------------------------------------------------------------------------------

    def check(self) -> None:
        """Find out whether the node keeps up.

        Raises:
            WatchLagged: it read or acknowledged too slowly.
            BrokerError: the stream was ended.
        """
        if self._refusal is not None:
            raise self._refusal
        if self._under_way:
            late = self._monotonic() - self._under_way[0].moved_at
            if late > PATIENCE_SECONDS:
                raise WatchLagged(
                    detail=f"{self.node_id} acknowledged nothing for {late:.0f} s",
                )

    def end(self, refusal: BrokerError | None = None) -> None:
        """End the stream, in peace or with a refusal. The first end counts."""
        if not self._ended:
            self._ended = True
            self._refusal = refusal
            self._news.set()

    @property
    def ended(self) -> bool:
        """Whether nothing is told any more."""
        return self._ended
