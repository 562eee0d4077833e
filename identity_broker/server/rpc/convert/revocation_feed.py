"""What verifiers are told, cut into messages and serialized once for all who are told the same.

- A message is an envelope and a body. The body, nearly all of it, is made and serialized once for a
  `Batch`; the envelope says where, and when, and is each verifier's own. Serialized messages that
  stand behind one another are one message (protobuf's encoding: fields may come in any order).
- A body holds at most `MOST_ITEMS` things, which is less than any client may receive.
- Bodies are made as they are sent: the first verifier waits for its first message, not for all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime, timedelta
from weakref import WeakKeyDictionary

from identity_api.broker.v1 import revocation_feed_pb2 as pb
from identity_broker.domain.caller import Caller
from identity_broker.domain.revocation import IdentityEpoch
from identity_broker.errors import MalformedRequest
from identity_broker.lifecycle.feed import Batch
from identity_broker.lifecycle.followers import Hello
from identity_broker.server.rpc.convert.credentials import to_revocation
from identity_broker.server.rpc.convert.scalars import from_text, to_epoch, to_epoch_ms

MOST_ITEMS = 1000
_MOST_VERSION_BYTES = 64
_NAME = re.compile(r"[A-Za-z0-9._:-]{0,64}")


class Serialized:
    """A message that the pipeline sends as it is."""

    __slots__ = ("_octets",)

    def __init__(self, octets: bytes) -> None:
        self._octets = octets

    def SerializeToString(self) -> bytes:  # noqa: N802  # as protobuf's messages
        """The octets."""
        return self._octets


class Bodies:
    """The bodies of batches, for as long as somebody is told them."""

    def __init__(self) -> None:
        self._made: WeakKeyDictionary[Batch, list[bytes]] = WeakKeyDictionary()
        self.serialized = 0

    def of(self, batch: Batch) -> Iterator[tuple[bytes, bool]]:
        """Each body, and whether it is the last one; at least one."""
        made = self._made.setdefault(batch, [])
        count = max(1, -(-len(batch) // MOST_ITEMS))
        for at in range(count):
            if at == len(made):
                # Somebody else may have been here first, but nobody is two ahead.
                made.append(_body(batch, at).SerializeToString())
                self.serialized += 1
            yield made[at], at == count - 1


def _body(batch: Batch, at: int) -> pb.FollowResponse:
    """The `at`th thousand of a batch: revocations, releases and epochs in this order."""
    start, end = at * MOST_ITEMS, (at + 1) * MOST_ITEMS
    revoked = batch.revocations[start:end]
    start, end = max(0, start - len(batch.revocations)), max(0, end - len(batch.revocations))
    released = batch.released[start:end]
    start, end = max(0, start - len(batch.released)), max(0, end - len(batch.released))
    body = pb.FollowResponse(
        revoked=map(to_revocation, revoked),
        released_ids=released,
        epochs=map(to_epoch_message, batch.epochs[start:end]),
    )
    if at == 0 and batch.denied is not None:
        body.denied_authorities.ids.extend(batch.denied)
        body.denied_authorities.SetInParent()  # none is something to tell, too
    return body


def to_envelope(
    batch: Batch, *, first: bool, complete: bool, now: datetime, heartbeat: float, spread: timedelta
) -> bytes:
    """What goes before a body; of several, only the first may be full.

    Args:
        heartbeat: seconds.
    """
    return pb.FollowResponse(
        sequence=batch.sequence,
        previous=batch.previous if first else batch.sequence,
        full=batch.full and first,
        complete=complete,
        sent_at_ms=to_epoch_ms(now),
        heartbeat_ms=round(heartbeat * 1000),
        reconnect_spread_ms=spread // timedelta(milliseconds=1),
    ).SerializeToString()


def to_epoch_message(epoch: IdentityEpoch) -> pb.IdentityEpoch:
    """Since when an identity's tokens count."""
    return pb.IdentityEpoch(
        spiffe_id=str(epoch.spiffe_id),
        not_before=to_epoch(epoch.not_before),
        expires_at=to_epoch(epoch.expires_at),
    )


def from_hello(message: pb.FollowRequest.Hello, caller: Caller) -> Hello:
    """Who begins to follow.

    Raises:
        MalformedRequest: naming the field.
    """
    if not _NAME.fullmatch(message.name):
        raise MalformedRequest("hello.name is at most 64 letters, digits and . _ : -")
    return Hello(
        caller=caller.name,
        name=message.name,
        version=from_text(message.version, "hello.version", _MOST_VERSION_BYTES),
        resume_from=message.resume_from,
    )
