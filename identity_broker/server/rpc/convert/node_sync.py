"""What a node is told, cut into messages that any client can receive.

- A message holds at most `MOST_ENTRIES` entries or `MOST_REVOCATIONS` things that are refused or
  released, and little more than `MOST_OCTETS` unless one thing alone is larger.
- Only the last one is complete; only the first one is full.
- What is the same for all nodes is made once: an entry's message, and the octets of a thousand
  revocations, which stand behind the rest of a message as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta

from identity_api.broker.v1 import node_sync_pb2 as pb
from identity_api.broker.v1 import revocation_feed_pb2, types_pb2
from identity_broker.domain.credential import Revocation
from identity_broker.domain.entry import RegistrationEntry
from identity_broker.errors import MalformedRequest
from identity_broker.lifecycle.node_stream import News, Resume
from identity_broker.lifecycle.roster import Applied
from identity_broker.server.rpc.convert.credentials import to_revocation
from identity_broker.server.rpc.convert.entries import to_entry
from identity_broker.server.rpc.convert.revocation_feed import Serialized, to_epoch_message
from identity_broker.server.rpc.convert.scalars import from_spiffe_id
from identity_broker.server.rpc.convert.trust import to_bundle
from identity_ca.spiffe_id import SpiffeId, TrustDomain

MOST_ENTRIES = 500
MOST_REVOCATIONS = 1000
MOST_OCTETS = 1024 * 1024
MOST_NODES = 100
MOST_VERIFIERS = 1000
LONGEST_WAIT_MS = 30_000
# A path that an entry may have (`names.is_reserved`), a slash and a process number.
_BEHIND = re.compile(
    r"(?!/(?i:idb)/)(?:/(?!\.{1,2}/)[A-Za-z0-9._-]+)+/(?:0|[1-9][0-9]{0,9})", re.ASCII
)
_MOST_NAME_BYTES = 2048 + 11
_MOST_KEPT = 10_000
_MOST_CHUNKS = 256


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


class RevocationOctets:
    """Revocations as they stand in a message, serialized once for the many nodes that are told."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, ...], tuple[tuple[Revocation, ...], bytes]] = {}

    def of(self, revocations: tuple[Revocation, ...], node_id: SpiffeId) -> bytes:
        """What a message that tells them to that node is longer by."""
        if any(one.denied_to(node_id) for one in revocations):
            return _serialized(to_revocation(one, node_id) for one in revocations)
        # The same objects, not equal ones: to compare those would cost as much as to serialize.
        key = tuple(map(id, revocations))
        kept = self._kept.get(key)
        if kept is not None:
            return kept[1]
        octets = _serialized(map(to_revocation, revocations))
        if len(self._kept) >= _MOST_CHUNKS:
            del self._kept[next(iter(self._kept))]
        self._kept[key] = (revocations, octets)
        return octets


def _serialized(revoked: Iterable[revocation_feed_pb2.RevokedCredential]) -> bytes:
    return pb.SyncResponse(revocations=revoked).SerializeToString()


class SharedMessages:
    """What is made once for all nodes."""

    def __init__(self) -> None:
        self.entries = EntryMessages()
        self.revocations = RevocationOctets()


def to_sync_responses(
    news: News, node_id: SpiffeId, shared: SharedMessages, spread: timedelta, now: datetime
) -> Iterator[Serialized]:
    """The messages that tell `news` to that node; at least one."""
    pieces = _Pieces(news, spread, now)
    if news.bundle is not None:
        bundle = to_bundle(news.bundle)
        yield from pieces.room(bundle.ByteSize())
        pieces.message.bundle.CopyFrom(bundle)
    if news.lists is not None:
        lists = pb.SyncResponse.RevocationLists(crls=news.lists.crls)
        yield from pieces.room(lists.ByteSize())
        pieces.message.lists.CopyFrom(lists)
    for at in range(0, len(news.removed_ids), MOST_ENTRIES):
        some = news.removed_ids[at : at + MOST_ENTRIES]
        yield from pieces.room(sum(map(len, some)), entries=len(some))
        pieces.message.removed_ids.extend(some)
    for entry in news.changed:
        message = shared.entries.of(entry)
        yield from pieces.room(message.ByteSize(), entries=1)
        pieces.message.changed.append(message)
    yield from _refused(news, node_id, shared.revocations, pieces)
    pieces.message.complete = True
    pieces.message.entries_digest = news.entries_digest
    yield pieces.serialized()


def _refused(
    news: News, node_id: SpiffeId, shared: RevocationOctets, pieces: _Pieces
) -> Iterator[Serialized]:
    """What is not to be trusted any more, and what is again."""
    if news.denied_authorities is not None:
        denied = revocation_feed_pb2.DeniedAuthorities(ids=news.denied_authorities)
        yield from pieces.room(denied.ByteSize())
        pieces.message.denied_authorities.CopyFrom(denied)
    for at in range(0, len(news.released_ids), MOST_REVOCATIONS):
        some = news.released_ids[at : at + MOST_REVOCATIONS]
        yield from pieces.room(sum(map(len, some)), revocations=len(some))
        pieces.message.released_ids.extend(some)
    for epoch in map(to_epoch_message, news.epochs):
        yield from pieces.room(epoch.ByteSize(), revocations=1)
        pieces.message.epochs.append(epoch)
    for at in range(0, len(news.revocations), MOST_REVOCATIONS):
        chunk = news.revocations[at : at + MOST_REVOCATIONS]
        octets = shared.of(chunk, node_id)
        yield from pieces.room(len(octets), revocations=len(chunk))
        pieces.behind.append(octets)


class _Pieces:
    """The message being filled, and what is in it.

    Attributes:
        behind: what stands behind it, serialized.
    """

    def __init__(self, news: News, spread: timedelta, now: datetime) -> None:
        self._news = news
        self._spread_ms = round(spread / timedelta(milliseconds=1))
        self._now_ms = int(now.timestamp() * 1000)
        self._begin(news.previous, full=news.full)

    def room(self, octets: int, *, entries: int = 0, revocations: int = 0) -> Iterator[Serialized]:
        """Make room for something of that size: yields the message so far if it is full."""
        if (
            (self._octets and self._octets + octets > MOST_OCTETS)
            or self._entries + entries > MOST_ENTRIES
            or self._revocations + revocations > MOST_REVOCATIONS
        ):
            yield self.serialized()
            self._begin(self._news.revision, full=False)
        self._octets += octets
        self._entries += entries
        self._revocations += revocations

    def serialized(self) -> Serialized:
        """The message so far."""
        return Serialized(b"".join((self.message.SerializeToString(), *self.behind)))

    def _begin(self, previous: int, *, full: bool) -> None:
        self._octets = self._entries = self._revocations = 0
        self.behind: list[bytes] = []
        self.message = pb.SyncResponse(
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


def check_verifiers(message: pb.SyncRequest.Verifiers) -> None:
    """Find out whether it is worth parsing; costs the same whatever is in it.

    Raises:
        MalformedRequest: too many.
    """
    if len(message.verifiers) > MOST_VERIFIERS:
        raise MalformedRequest(f"verifiers must hold at most {MOST_VERIFIERS} items")


def from_verifiers(message: pb.SyncRequest.Verifiers, trust_domain: TrustDomain) -> dict[str, int]:
    """Who follows revocations through the node: name → the revision it has acknowledged.

    Raises:
        MalformedRequest: too many; or one whose name is not a SPIFFE ID that an entry may have, a
            slash and a process number.
    """
    check_verifiers(message)
    prefix = f"spiffe://{trust_domain}"
    reported = {}
    for verifier in message.verifiers:
        name = verifier.name
        if (
            len(name) > _MOST_NAME_BYTES
            or not name.startswith(prefix)
            or _BEHIND.fullmatch(name, len(prefix)) is None
        ):
            raise MalformedRequest(
                "verifiers.name is a workload's SPIFFE ID, a slash and its process number"
            )
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
