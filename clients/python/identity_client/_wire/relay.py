"""Messages of the revocation feed as a node passes them on: octets, made once for all who follow.

- A message is made in parts, and its parts are put one behind another: protobuf reads that as one
  message, in which the last part counts for what both have.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from identity_api.broker.v1 import credential_pb2
from identity_api.broker.v1 import revocation_feed_pb2 as pb
from identity_client.node.values import SyncedEpoch, SyncedRevocation

__all__ = [
    "FOLLOW",
    "INCOMPLETE",
    "SERVICE_NAME",
    "FollowRequest",
    "Header",
    "previous",
    "rest",
    "revoked",
]

FollowRequest = pb.FollowRequest
SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["RevocationFeed"].full_name
FOLLOW: Final = f"/{SERVICE_NAME}/Follow"
"""The full name of the one method."""

INCOMPLETE: Final = bytes((pb.FollowResponse.COMPLETE_FIELD_NUMBER << 3, 0))
"""A last part that says that more is to come. By hand: what is false is usually left out."""

_KINDS: Final = {
    "x509": credential_pb2.CREDENTIAL_KIND_X509,
    "jwt": credential_pb2.CREDENTIAL_KIND_JWT,
}


@dataclass(frozen=True, slots=True)
class Header:
    """What every message says; see revocation_feed.proto.

    `spread_ms`: `reconnect_spread_ms`.
    """

    sequence: int
    previous: int
    full: bool
    complete: bool
    sent_at: datetime
    heartbeat_ms: int
    spread_ms: int

    def octets(self) -> bytes:
        """The part of a message."""
        return pb.FollowResponse(
            sequence=self.sequence,
            previous=self.previous,
            full=self.full,
            complete=self.complete,
            sent_at_ms=int(self.sent_at.timestamp() * 1000),
            heartbeat_ms=self.heartbeat_ms,
            reconnect_spread_ms=self.spread_ms,
        ).SerializeToString()


def revoked(credentials: Iterable[SyncedRevocation]) -> bytes:
    """The part of a message that says what is revoked."""
    message = pb.FollowResponse()
    for each in credentials:
        message.revoked.add(
            id=each.id,
            kind=_KINDS[each.kind],
            spiffe_id=each.spiffe_id,
            revoked_at=int(each.revoked_at.timestamp()),
            expires_at=int(each.expires_at.timestamp()),
            # An open enumeration: a reason that is new to us is passed on as it is.
            reason=each.reason,
            authority_id=each.authority_id,
        )
    return message.SerializeToString()


def rest(
    *,
    released_ids: Sequence[str] = (),
    epochs: Iterable[SyncedEpoch] = (),
    denied_authorities: Iterable[str] | None = None,
) -> bytes:
    """The part of a message that says everything else."""
    message = pb.FollowResponse(released_ids=released_ids)
    for each in epochs:
        message.epochs.add(
            spiffe_id=each.spiffe_id,
            not_before=int(each.not_before.timestamp()),
            expires_at=int(each.expires_at.timestamp()),
        )
    if denied_authorities is not None:
        message.denied_authorities.SetInParent()
        message.denied_authorities.ids.extend(sorted(denied_authorities))
    return message.SerializeToString()


def previous(sequence: int) -> bytes:
    """A last part that says what the message builds on instead; never 0."""
    return pb.FollowResponse(previous=sequence).SerializeToString()
