"""One connected node: what it has still to be told, and what it has acknowledged.

- What is to be told is composed, not queued: changes that wait are joined into one message, so a
  slow node costs a bounded amount of memory and catches up in one step.
- A node that lets too much wait is let go, as is one that acknowledges too slowly.
- Whatever a node says it has when it connects: until it has acknowledged the first message of this
  stream, it counts as having applied nothing.
- Touched by the event loop's thread alone; what is told is immutable.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from identity_broker.domain.credential import Revocation
from identity_broker.domain.entry import RegistrationEntry
from identity_broker.domain.revocation import IdentityEpoch
from identity_broker.errors import MalformedRequest, WatchLagged
from identity_broker.lifecycle.acknowledged import AcknowledgedStream
from identity_ca.bundle import TrustBundle
from identity_ca.spiffe_id import SpiffeId

HEARTBEAT_SECONDS = 15.0
"""A node that is told nothing for so long gets an empty message."""
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
        released_ids: of credentials that are not revoked any more.
        epochs: new ones.
        denied_authorities: all that are, when they changed.
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
    released_ids: tuple[str, ...]
    epochs: tuple[IdentityEpoch, ...]
    denied_authorities: tuple[str, ...] | None
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
        "denied",
        "epochs",
        "full",
        "lists",
        "released",
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
        self.revocations: dict[str, Revocation] = {}
        self.released: dict[str, None] = {}
        self.epochs: dict[SpiffeId, IdentityEpoch] = {}
        self.denied: tuple[str, ...] | None = None
        self.lists: Lists | None = None

    def __len__(self) -> int:
        entries = len(self.changed) + len(self.removed)
        return entries + len(self.revocations) + len(self.released) + len(self.epochs)

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
        for revocation in revocations:
            self.released.pop(revocation.id, None)
            self.revocations[revocation.id] = revocation

    def release(self, credential_ids: Iterable[str]) -> None:
        """These are not revoked any more."""
        for credential_id in credential_ids:
            self.revocations.pop(credential_id, None)
            self.released[credential_id] = None

    def raise_epochs(self, epochs: Iterable[IdentityEpoch]) -> None:
        """Tokens of these identities are too old."""
        self.epochs.update((epoch.spiffe_id, epoch) for epoch in epochs)

    def touch(self, seq: int) -> None:
        """Something was composed in, as of that position."""
        self.steps += 1
        if self.since is None:
            self.since = seq


class NodeStream(AcknowledgedStream):
    """What one node is told, in order.

    Args:
        node_id: whose stream it is.
        parents: the parents whose entries the node may have.
        version: of the agent, as it says.
        monotonic: seconds that only grow.

    Attributes:
        identities: SPIFFE IDs of the node's entries, and the digest of the entries they are of;
            kept for reports.
        said_others: whether the log says that it reports verifiers of other identities.
    """

    def __init__(
        self,
        node_id: SpiffeId,
        parents: frozenset[SpiffeId],
        *,
        version: str = "",
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(str(node_id), HEARTBEAT_SECONDS, monotonic)
        self.node_id = node_id
        self.parents = parents
        self.version = version
        self.waiting = Waiting()
        # The first message makes up for all that came before, not just for the latest change.
        self.waiting.since = 0
        self.revision = 0
        self.identities: tuple[int, frozenset[str]] | None = None
        self.said_others = False

    @property
    def has_news(self) -> bool:
        """Whether anything waits to be told."""
        return self.waiting.steps > 0

    # --- telling ------------------------------------------------------------------------------

    def touch(self, seq: int) -> None:
        """`waiting` was changed, as of that position.

        The stream ends when too much waits behind what the node has not taken.
        """
        self.waiting.touch(seq)
        if self.waiting.steps > 1 and len(self.waiting) > MOST_WAITING:
            self.end(WatchLagged(detail=f"{len(self.waiting)} changes wait for {self.node_id}"))
        self.wake()

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
            revocations=tuple(waiting.revocations.values()),
            released_ids=() if waiting.full else tuple(waiting.released),
            epochs=tuple(waiting.epochs.values()),
            denied_authorities=waiting.denied,
            lists=waiting.lists,
            entries_digest=entries_digest,
        )
        self.revision = revision
        self.handed(revision, waiting.since)
        return news

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
        while self._under_way and self._under_way[0].position <= revision:
            took.append(now - self._under_way.popleft().handed_at)
        self.wake()
        return took

    def has_applied(self, seq: int) -> bool:
        """Whether the node has acknowledged everything that it was to be told by `seq`.

        Nothing more is told on a stream that has ended, so nothing can be said of it.
        """
        waits = self.waiting.since
        if self.ended or (waits is not None and waits <= seq):
            return False
        return not any(told.since is not None and told.since <= seq for told in self._under_way)
