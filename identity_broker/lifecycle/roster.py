"""Who is connected, and how far each node has come.

- A node that connects twice counts once: its newest stream speaks for it, and its oldest ends when
  there are too many.
- `applied` answers read-your-writes: every node that was to be told of a change has acknowledged
  it, or is named.
- A node speaks for the workloads behind it: they are connected as long as it is, and says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial

from identity_broker.errors import WatchLagged
from identity_broker.lifecycle.node_stream import NodeStream
from identity_broker.lifecycle.verifiers import Verifier, VerifierKind, Verifiers
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


@dataclass(eq=False, slots=True)
class _Behind:
    """A workload behind a node, and the revision it has acknowledged."""

    verifier: Verifier
    revision: int

    def has(self, position: int) -> bool:
        return self.revision >= position


class Roster:
    """The streams of connected nodes.

    Args:
        on_count: told how many nodes are connected, whenever that changes.
        verifiers: where nodes and the workloads behind them are entered.
    """

    def __init__(
        self,
        on_count: Callable[[int], object] = lambda _count: None,
        verifiers: Verifiers | None = None,
    ) -> None:
        self._on_count = on_count
        self._verifiers = verifiers if verifiers is not None else Verifiers()
        self._nodes: dict[SpiffeId, list[NodeStream]] = {}
        self._behind: dict[SpiffeId, dict[str, _Behind]] = {}
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
        if len(streams) == 1:
            has = partial(self._has_applied, stream.node_id)
            self._verifiers.enter(_agent(stream.node_id), has)
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
            # With its agent goes whoever is behind it.
            self._report(stream.node_id, {}, sent_away=stream.sent_away)
            self._verifiers.leave(_agent(stream.node_id), sent_away=stream.sent_away)
            self._on_count(len(self))

    def report(self, stream: NodeStream, reported: Mapping[str, int]) -> None:
        """The node says who follows revocations through it, and how far each has come.

        Args:
            stream: of a node that speaks with another one as well, only the newest is heard.
            reported: name → the revision it has acknowledged.
        """
        streams = self._nodes.get(stream.node_id)
        if streams and streams[-1] is stream:
            self._report(stream.node_id, reported)

    def _report(
        self, node_id: SpiffeId, reported: Mapping[str, int], *, sent_away: bool = False
    ) -> None:
        behind = self._behind.setdefault(node_id, {})
        if behind.keys() != reported.keys():
            for name in [name for name in behind if name not in reported]:
                self._verifiers.leave(behind.pop(name).verifier, sent_away=sent_away)
        for name, revision in reported.items():
            known = behind.get(name)
            if known is None:
                verifier = Verifier(VerifierKind.BEHIND, name, str(node_id))
                known = behind[name] = _Behind(verifier, revision)
                self._verifiers.enter(verifier, known.has)
            elif known.revision != revision:
                known.revision = revision
                self._verifiers.progressed(known.verifier)
        if not behind:
            del self._behind[node_id]

    def is_behind(self, node_id: SpiffeId, name: str) -> bool:
        """Whether the node has said of somebody of that name that it is behind it."""
        return name in self._behind.get(node_id, ())

    def forget(self, node_id: SpiffeId) -> None:
        """The node is not welcome any more: nobody waits for it."""
        for wait in tuple(self._waits):
            wait.no_more(node_id)

    def progressed(self, stream: NodeStream) -> None:
        """The node has acknowledged something."""
        self._verifiers.progressed(_agent(stream.node_id))
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


def _agent(node_id: SpiffeId) -> Verifier:
    return Verifier(VerifierKind.AGENT, str(node_id))
