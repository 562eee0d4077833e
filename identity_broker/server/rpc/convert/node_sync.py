"""What a node is told, cut into messages that any client can receive.

- A message holds at most `MOST_ENTRIES` entries or `MOST_REVOCATIONS` things that are refused or
  released, and little more than `MOST_OCTETS` unless one thing alone is larger.
- Only the last one is complete; only the first one is full.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta

from google.protobuf.message import Message

from identity_api.broker.v1 import node_sync_pb2 as pb
from identity_api.broker.v1 import revocation_feed_pb2, types_pb2
from identity_broker.domain.entry import RegistrationEntry
from identity_broker.errors import MalformedRequest
from identity_broker.lifecycle.node_stream import News, Resume
from identity_broker.lifecycle.roster import Applied
from identity_broker.server.rpc.convert.credentials import to_revocation
from identity_broker.server.rpc.convert.entries import to_entry
from identity_broker.server.rpc.convert.revocation_feed import to_epoch_message
from identity_broker.server.rpc.convert.scalars import from_spiffe_id, from_text
from identity_broker.server.rpc.convert.trust import to_bundle
from identity_ca.spiffe_id import SpiffeId

MOST_ENTRIES = 500
MOST_REVOCATIONS = 1000
MOST_OCTETS = 1024 * 1024
MOST_NODES = 100
MOST_VERIFIERS = 1000
LONGEST_WAIT_MS = 30_000
# A SPIFFE ID, a slash and a process number.
_MOST_NAME_BYTES = 2048 + 16
_MOST_KEPT = 10_000


class EntryMessages:
    """Entries' messages, made once for the many nodes that are told of the same entry."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[RegistrationEntry, types_pb2.RegistrationEntry]] = {}

    def of(self, entry: RegistrationEntry) -> types_pb2.RegistrationEntry:
        """The entry's message; not to be changed."""
        kept = self._kept.get(entry.id)
        if kept is not None and kept[0] is entry:
            return kept[1]
        message = to_entry(entry)
        if len(self._kept) >= _MOST_KEPT:
            self._kept.clear()
        self._kept[entry.id] = (entry, message)
        return message


def to_sync_responses(
    news: News, node_id: SpiffeId, entries: EntryMessages, spread: timedelta, now: datetime
) -> Iterator[pb.SyncResponse]:
    """The messages that tell `news` to that node; at least one."""
    pieces = _Pieces(news, spread, now)
    if news.bundle is not None:
        yield from pieces.room(bundle := to_bundle(news.bundle))
        pieces.message.bundle.CopyFrom(bundle)
    if news.lists is not None:
        lists = pb.SyncResponse.RevocationLists(crls=news.lists.crls)
        yield from pieces.room(lists)
        pieces.message.lists.CopyFrom(lists)
    for at in range(0, len(news.removed_ids), MOST_ENTRIES):
        some = news.removed_ids[at : at + MOST_ENTRIES]
        yield from pieces.room(pb.SyncResponse(removed_ids=some), entries=len(some))
        pieces.message.removed_ids.extend(some)
    for entry in news.changed:
        message = entries.of(entry)
        yield from pieces.room(message, entries=1)
        pieces.message.changed.append(message)
    if news.denied_authorities is not None:
        denied = revocation_feed_pb2.DeniedAuthorities(ids=news.denied_authorities)
        yield from pieces.room(denied)
        pieces.message.denied_authorities.CopyFrom(denied)
    for at in range(0, len(news.released_ids), MOST_REVOCATIONS):
        some = news.released_ids[at : at + MOST_REVOCATIONS]
        yield from pieces.room(pb.SyncResponse(released_ids=some), revocations=len(some))
        pieces.message.released_ids.extend(some)
    for epoch in map(to_epoch_message, news.epochs):
        yield from pieces.room(epoch, revocations=1)
        pieces.message.epochs.append(epoch)
    for revocation in news.revocations:
        told = to_revocation(revocation, node_id)
        yield from pieces.room(told, revocations=1)
        pieces.message.revocations.append(told)
    pieces.message.complete = True
    pieces.message.entries_digest = news.entries_digest
    yield pieces.message


class _Pieces:
    """The message being filled, and what is in it."""

    def __init__(self, news: News, spread: timedelta, now: datetime) -> None:
        self._news = news
        self._spread_ms = round(spread / timedelta(milliseconds=1))
        self._now_ms = int(now.timestamp() * 1000)
        self._octets = self._entries = self._revocations = 0
        self.message = self._begin(news.previous, full=news.full)

    def room(
        self, item: Message, *, entries: int = 0, revocations: int = 0
    ) -> Iterator[pb.SyncResponse]:
        """Make room for `item`: yields the message so far if it is full."""
        size = item.ByteSize()
        if (
            (self._octets and self._octets + size > MOST_OCTETS)
            or self._entries + entries > MOST_ENTRIES
            or self._revocations + revocations > MOST_REVOCATIONS
        ):
            yield self.message
            self._octets = self._entries = self._revocations = 0
            self.message = self._begin(self._news.revision, full=False)
        self._octets += size
        self._entries += entries
        self._revocations += revocations

    def _begin(self, previous: int, *, full: bool) -> pb.SyncResponse:
        return pb.SyncResponse(
            revision=self._news.revision,
            previous=previous,
            full=full,
            reconnect_spread_ms=self._spread_ms,
            sent_at_ms=self._now_ms,
        )


def from_hello(message: pb.SyncRequest.Hello) -> Resume | None:
    """Where the node stands; None when it asks for everything."""
    if not message.resume_from:
        return None
    return Resume(message.resume_from, message.entries_digest)


def from_verifiers(message: pb.SyncRequest.Verifiers) -> dict[str, int]:
    """Who follows revocations through the node: name → the revision it has acknowledged.

    Raises:
        MalformedRequest: too many, or one without a proper name.
    """
    if len(message.verifiers) > MOST_VERIFIERS:
        raise MalformedRequest(f"verifiers must hold at most {MOST_VERIFIERS} items")
    reported = {}
    for verifier in message.verifiers:
        name = from_text(verifier.name, "verifiers.name", _MOST_NAME_BYTES)
        if not name.startswith("spiffe://"):
            raise MalformedRequest("verifiers.name begins with a SPIFFE ID")
        reported[name] = verifier.revision
    return reported


def from_await(request: pb.AwaitNodesRequest) -> tuple[list[SpiffeId], timedelta]:
    """Parse which nodes are waited for, and how long.

    Raises:
        MalformedRequest, InvalidSpiffeId: naming the field.
    """
    if len(request.node_ids) > MOST_NODES:
        raise MalformedRequest(f"node_ids must hold at most {MOST_NODES} items")
    if not 1 <= request.timeout_ms <= LONGEST_WAIT_MS:
        raise MalformedRequest(f"timeout_ms must be between 1 and {LONGEST_WAIT_MS}")
    nodes = [from_spiffe_id(item, "node_ids") for item in request.node_ids]
    return nodes, timedelta(milliseconds=request.timeout_ms)


def to_applied(applied: Applied) -> pb.AwaitNodesResponse:
    """How far the nodes have come."""
    return pb.AwaitNodesResponse(
        revision=applied.revision,
        applied=map(str, applied.applied),
        pending=map(str, applied.pending),
        connected=applied.connected,
    )
