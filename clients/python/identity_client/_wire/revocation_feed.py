"""The feed of revocations on the wire: one call, and its messages turned into values.

- Whatever can be read of a message is read; what cannot is named in `flaw`, and what to make of
  that is for whoever follows to say: a denial is never lost because its neighbour is broken.
- An unknown kind of credential is a credential: it is denied by its id.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, cast

from identity_api.broker.v1 import credential_pb2, revocation_feed_pb2
from identity_client._wire.calls import Duplex
from identity_client.revocation import IdentityEpoch, RevokedCredential

__all__ = ["FEED_METHOD", "FeedCall", "FeedMessage", "message_from_wire"]

FEED_METHOD: Final = "/identity_api.broker.v1.RevocationFeed/Follow"

_MAX_ID: Final = 256
_MAX_SPIFFE_ID: Final = 2048
_MAX_AUTHORITIES: Final = 10_000
# The last second a calendar holds.
_LAST: Final = int(datetime.max.replace(microsecond=0, tzinfo=UTC).timestamp())


@dataclass(frozen=True, slots=True)
class FeedMessage:
    """One message of the feed.

    Attributes:
        sequence: where a verifier stands that has applied it.
        previous: what it builds on.
        full: whether it begins a state that replaces everything.
        complete: whether the state as of `sequence` ends with it.
        revoked: newly denied.
        released: ids that are denied no more.
        epochs: new ones.
        authorities: all authorities that are denied; None where that did not change.
        heartbeat_ms: how often something is said, nothing included.
        spread_ms: how far to spread a reconnection.
        flaw: what of it cannot be read; empty for nothing.
    """

    sequence: int
    previous: int
    full: bool
    complete: bool
    revoked: tuple[RevokedCredential, ...] = field(default=(), repr=False)
    released: tuple[str, ...] = field(default=(), repr=False)
    epochs: tuple[IdentityEpoch, ...] = field(default=(), repr=False)
    authorities: tuple[str, ...] | None = None
    heartbeat_ms: int = 0
    spread_ms: int = 0
    flaw: str = ""


class FeedCall(Duplex):
    """One call of RevocationFeed.Follow."""

    async def hello(self, *, resume_from: int, name: str, version: str) -> None:
        """Sends the first message; why it could not be sent, `read` says."""
        hello = revocation_feed_pb2.FollowRequest.Hello(
            resume_from=resume_from, name=name, version=version
        )
        await self.begin(revocation_feed_pb2.FollowRequest(hello=hello))

    async def read(self, within: float) -> FeedMessage:
        """The next message.

        Args:
            within: seconds after which the stream counts as broken.

        Raises:
            IdentityError: the stream has ended.
        """
        message = await self.next_message(within)
        return message_from_wire(cast("revocation_feed_pb2.FollowResponse", message))

    async def acknowledge(self, sequence: int) -> None:
        """Says what was applied; on a stream that has ended, does nothing."""
        ack = revocation_feed_pb2.FollowRequest.Ack(sequence=sequence)
        await self.send(revocation_feed_pb2.FollowRequest(ack=ack))


def message_from_wire(message: revocation_feed_pb2.FollowResponse) -> FeedMessage:
    """A message of the feed; never raises."""
    flaws: list[str] = []
    authorities: tuple[str, ...] | None = None
    if message.HasField("denied_authorities"):
        authorities = _ids(message.denied_authorities.ids, flaws)[:_MAX_AUTHORITIES]
    return FeedMessage(
        sequence=message.sequence,
        previous=message.previous,
        full=message.full,
        complete=message.complete,
        revoked=tuple(_revoked(message.revoked, flaws)),
        released=_ids(message.released_ids, flaws),
        epochs=tuple(_epochs(message.epochs, flaws)),
        authorities=authorities,
        heartbeat_ms=message.heartbeat_ms,
        spread_ms=message.reconnect_spread_ms,
        flaw="; ".join(dict.fromkeys(flaws)),
    )


def _revoked(
    messages: Iterable[revocation_feed_pb2.RevokedCredential], flaws: list[str]
) -> Iterable[RevokedCredential]:
    for one in messages:
        if not 0 < len(one.id) <= _MAX_ID or len(one.spiffe_id) > _MAX_SPIFFE_ID:
            flaws.append("a revocation without a usable id")
            continue
        yield RevokedCredential(
            id=one.id,
            spiffe_id=one.spiffe_id,
            expires_at=_time(one.expires_at),
            shown_in_tls=one.kind == credential_pb2.CREDENTIAL_KIND_X509,
        )


def _epochs(
    messages: Iterable[revocation_feed_pb2.IdentityEpoch], flaws: list[str]
) -> Iterable[IdentityEpoch]:
    for one in messages:
        if not 0 < len(one.spiffe_id) <= _MAX_SPIFFE_ID:
            flaws.append("an epoch of nobody")
            continue
        yield IdentityEpoch(one.spiffe_id, one.not_before, one.expires_at)


def _ids(ids: Iterable[str], flaws: list[str]) -> tuple[str, ...]:
    usable = tuple(one for one in ids if 0 < len(one) <= _MAX_ID)
    if len(usable) != len(tuple(ids)):
        flaws.append("an unusable id")
    return usable


def _time(seconds: int) -> datetime:
    # An absurd time is as far as a calendar goes: what is denied for longer than anything lives
    # is denied, and what has expired has.
    return datetime.fromtimestamp(min(max(seconds, 0), _LAST), UTC)
