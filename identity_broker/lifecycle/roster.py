"""Who is connected, and how far each node has come.

- A node that connects twice counts once: its newest stream speaks for it, and its oldest ends when
  there are too many.
- `applied` answers read-your-writes: every node that was to be told of a change has acknowledged
  it, or is named.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta

from identity_broker.errors import WatchLagged
from identity_broker.lifecycle.node_stream import NodeStream
from identity_ca.spiffe_id import SpiffeId

MOST_OF_A_NODE = 8
"""Streams of one node at a time."""
SPREAD_OF_EACH = timedelta(milliseconds=2)
MOST_SPREAD = timedelta(seconds=10)


@dataclass(frozen=True, slots=True)
class Applied:
    """How far the nodes have come.

    Attributes:
        revision: the position that was waited for.
        applied: nodes that have applied everything they were told by then.
        pending: nodes that were told, or named, and have not.
        connected: how many nodes are connected.
    """

    revision: int
    applied: tuple[SpiffeId, ...]
    pending: tuple[SpiffeId, ...]
    connected: int


@dataclass(eq=False, slots=True)
class _Wait:
    """Somebody waits until these nodes have applied that position."""

    seq: int
    applied: set[SpiffeId]
    missing: set[SpiffeId]
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def answered(self, node_id: SpiffeId) -> None:
        self.applied.add(node_id)
        self.no_more(node_id)

    def no_more(self, node_id: SpiffeId) -> None:
        self.missing.discard(node_id)
        if not self.missing:
            self.over.set()


class Roster:
    """The streams of connected nodes.

    Args:
        on_count: told how many nodes are connected, whenever that changes.
    """

    def __init__(self, on_count: Callable[[int], object] = lambda _count: None) -> None:
        self._on_count = on_count
        self._nodes: dict[SpiffeId, list[NodeStream]] = {}
        self._waits: set[_Wait] = set()

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[NodeStream]:
        """Every stream; nobody may enter or leave meanwhile."""
        for streams in self._nodes.values():
            yield from streams

    def of(self, node_id: SpiffeId) -> tuple[NodeStream, ...]:
        """The streams of a node, oldest first."""
        return tuple(self._nodes.get(node_id, ()))

    @property
    def spread(self) -> timedelta:
        """How far the nodes should spread when all have to come back at once."""
        return min(len(self) * SPREAD_OF_EACH, MOST_SPREAD) if len(self) > 1 else timedelta()

    def enter(self, stream: NodeStream) -> None:
        """A node has connected."""
        streams = self._nodes.setdefault(stream.node_id, [])
        streams.append(stream)
        if len(streams) > MOST_OF_A_NODE:
            streams[0].end(
                WatchLagged(
                    f"this node has opened more than {MOST_OF_A_NODE} streams",
                    hint="run one agent with this identity",
                )
            )
        self._on_count(len(self))

    def leave(self, stream: NodeStream) -> None:
        """The stream is over. Twice is once."""
        streams = self._nodes.get(stream.node_id)
        if streams is None or stream not in streams:
            return
        streams.remove(stream)
        if not streams:
            del self._nodes[stream.node_id]
            self._on_count(len(self))

    def forget(self, node_id: SpiffeId) -> None:
        """The node is not welcome any more: nobody waits for it."""
        for wait in tuple(self._waits):
            wait.no_more(node_id)

    def progressed(self, stream: NodeStream) -> None:
        """The node has acknowledged something."""
        for wait in tuple(self._waits):
            if stream.node_id in wait.missing and self._has_applied(stream.node_id, wait.seq):
                wait.answered(stream.node_id)

    async def applied(self, seq: int, wanted: Iterable[SpiffeId], timeout: timedelta) -> Applied:
        """Wait until the nodes have applied everything they were told by `seq`.

        Args:
            seq: a position that all streams were told of.
            wanted: nodes waited for even while they are not connected.
            timeout: how long to wait.
        """
        connected = (key for key, streams in self._nodes.items() if not streams[-1].ended)
        concerned = {*connected, *wanted}
        applied = {key for key in concerned if self._has_applied(key, seq)}
        wait = _Wait(seq, applied, concerned - applied)
        if wait.missing:
            self._waits.add(wait)
            try:
                async with asyncio.timeout(timeout.total_seconds()):
                    await wait.over.wait()
            except TimeoutError:
                pass  # said in the answer
            finally:
                self._waits.discard(wait)
        return Applied(
            revision=seq,
            applied=tuple(sorted(wait.applied, key=str)),
            pending=tuple(sorted(wait.missing, key=str)),
            connected=len(self),
        )

    def _has_applied(self, node_id: SpiffeId, seq: int) -> bool:
        streams = self._nodes.get(node_id)
        return streams is not None and streams[-1].has_applied(seq)
