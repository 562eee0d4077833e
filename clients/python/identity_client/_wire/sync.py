"""Messages of the stream of changes to one value: pieces are joined, and what cannot be is refused.

- Nothing of a message that is refused is kept.
- Order counts within a joined update: what a later piece says of an entry replaces what an earlier
  one said. Within one message a revocation counts more than a release.
- An entry without a selector is refused: every process would match it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from typing import TypeVar

from spiffe import TrustDomain

from identity_api.broker.v1 import (
    credential_pb2,
    node_sync_pb2,
    revocation_feed_pb2,
    types_pb2,
)
from identity_client._wire.convert import time_from_wire
from identity_client.errors import ProtocolViolation
from identity_client.node.values import (
    SyncedBundle,
    SyncedEntry,
    SyncedEpoch,
    SyncedJwtKey,
    SyncedRevocation,
    SyncUpdate,
)

__all__ = ["SYNC_GAP", "UpdateReader"]

SYNC_GAP = "SYNC_GAP"

_T = TypeVar("_T")

_KINDS = {
    credential_pb2.CREDENTIAL_KIND_X509: "x509",
    credential_pb2.CREDENTIAL_KIND_JWT: "jwt",
}
_PATH = re.compile(r"(/(?!\.\.?(/|\Z))[A-Za-z0-9._-]+)+", re.ASCII)
_MAX_ID_BYTES = 2048
# Far beyond any node; a stream that never completes must not fill the memory.
_MAX_JOINED_BYTES = 512 * 1024 * 1024


class UpdateReader:
    """Reads the messages of one stream, in order.

    Args:
        domain: the trust domain everything must be of.
        position: the revision the stream was opened at; 0 when it was to begin with the full state.
        acknowledge: sends an acknowledgement on this stream.
    """

    def __init__(
        self,
        domain: TrustDomain,
        position: int,
        acknowledge: Callable[[int], Awaitable[None]],
    ) -> None:
        self._domain = domain
        self._prefix = f"spiffe://{domain.name}"
        self._at = position or None
        self._acknowledge = acknowledge
        self._joined: _Joined | None = None

    def read(self, message: node_sync_pb2.SyncResponse) -> SyncUpdate | None:
        """The whole update that `message` completes; None while there is more to come.

        Raises:
            ProtocolViolation: reason SYNC_GAP when something before it was missed,
                PROTOCOL_VIOLATION when it cannot be read.
        """
        joined = self._joined
        if joined is None or message.full:
            if not message.full and message.previous != self._at:
                raise ProtocolViolation(
                    f"the broker's changes begin at revision {message.previous}, "
                    f"and this node stands at {self._at or 'nothing'}",
                    reason=SYNC_GAP,
                )
            joined = _Joined(full=message.full, previous=message.previous)
        self._add(joined, message)
        if not message.complete:
            self._joined = joined
            return None
        self._joined = None
        update = self._finished(joined, message)
        self._at = update.revision
        return update

    def _add(self, joined: _Joined, message: node_sync_pb2.SyncResponse) -> None:
        joined.octets += message.ByteSize()
        if joined.octets > _MAX_JOINED_BYTES:
            raise ProtocolViolation("the broker's changes do not come to an end")
        for changed in message.changed:
            entry = self._entry(changed)
            joined.removed.pop(entry.id, None)
            joined.entries[entry.id] = entry
        for entry_id in message.removed_ids:
            joined.entries.pop(entry_id, None)
            joined.removed[entry_id] = None
        if message.HasField("bundle"):
            joined.bundle = self._bundle(message.bundle)
        for released_id in message.released_ids:
            joined.revocations.pop(released_id, None)
            joined.released[released_id] = None
        for revoked in message.revocations:
            joined.released.pop(revoked.id, None)
            joined.revocations[revoked.id] = _revocation(revoked)
        joined.epochs.extend(_epoch(one) for one in message.epochs)
        if message.HasField("denied_authorities"):
            joined.denied_authorities = _authorities(message.denied_authorities.ids)
        if message.HasField("lists"):
            joined.crls = tuple(message.lists.crls)

    def _finished(self, joined: _Joined, last: node_sync_pb2.SyncResponse) -> SyncUpdate:
        if not joined.full and last.revision < joined.previous:
            raise ProtocolViolation("the broker's revision went backwards", reason=SYNC_GAP)
        if joined.full and joined.bundle is None:
            raise ProtocolViolation("the broker's full state lacks the bundle")
        return SyncUpdate(
            revision=last.revision,
            previous=joined.previous,
            full=joined.full,
            entries=tuple(joined.entries.values()),
            removed_ids=tuple(joined.removed),
            bundle=joined.bundle,
            revocations=tuple(joined.revocations.values()),
            released_ids=() if joined.full else tuple(joined.released),
            epochs=tuple(joined.epochs),
            denied_authorities=_always(joined.denied_authorities, full=joined.full),
            crls=_always(joined.crls, full=joined.full),
            entries_digest=last.entries_digest,
            sent_at=_moment(last.sent_at_ms),
            _acknowledge=self._acknowledge,
        )

    def _entry(self, message: types_pb2.RegistrationEntry) -> SyncedEntry:
        selectors = {f"{one.type}:{one.value}" for one in message.selectors if one.type}
        if not message.id or not selectors or len(selectors) != len(message.selectors):
            raise ProtocolViolation("the broker sent an entry without an id or a selector")
        if message.disabled:
            raise ProtocolViolation("the broker sent an entry that is disabled")
        path = message.spiffe_id.removeprefix(self._prefix)
        if (
            path == message.spiffe_id
            or len(message.spiffe_id) > _MAX_ID_BYTES
            or not _PATH.fullmatch(path)
        ):
            raise ProtocolViolation("the broker sent an entry with a SPIFFE ID that is not its own")
        return SyncedEntry(
            id=message.id,
            revision=message.revision,
            spiffe_id=message.spiffe_id,
            selectors=tuple(sorted(selectors)),
            hint=message.hint,
            per_process=message.per_process,
            key_algorithm=message.key_algorithm,
            expires_at=_time(message.expires_at),
            federates_with=tuple(message.federates_with),
            created_at=_time(message.created_at),
            x509_ttl=_ttl(message.x509_ttl_seconds),
            jwt_ttl=_ttl(message.jwt_ttl_seconds),
        )

    def _bundle(self, message: types_pb2.TrustBundle) -> SyncedBundle:
        if message.trust_domain != self._domain.name:
            raise ProtocolViolation("the broker sent the bundle of another trust domain")
        if not message.x509_authorities:
            raise ProtocolViolation("the broker's trust bundle holds no CA certificate")
        return SyncedBundle(
            trust_domain=message.trust_domain,
            x509_authorities=tuple(message.x509_authorities),
            jwt_keys=tuple(
                SyncedJwtKey(one.key_id, one.public_key, time_from_wire(one.expires_at))
                for one in message.jwt_keys
            ),
            sequence=message.sequence,
            refresh_hint=_duration(message.refresh_hint_seconds),
        )


class _Joined:
    """The pieces of one update so far."""

    __slots__ = (
        "bundle",
        "crls",
        "denied_authorities",
        "entries",
        "epochs",
        "full",
        "octets",
        "previous",
        "released",
        "removed",
        "revocations",
    )

    def __init__(self, *, full: bool, previous: int) -> None:
        self.full = full
        self.previous = previous
        self.entries: dict[str, SyncedEntry] = {}
        self.removed: dict[str, None] = {}
        self.bundle: SyncedBundle | None = None
        self.revocations: dict[str, SyncedRevocation] = {}
        self.released: dict[str, None] = {}
        self.epochs: list[SyncedEpoch] = []
        self.denied_authorities: tuple[str, ...] | None = None
        self.crls: tuple[bytes, ...] | None = None
        self.octets = 0


def _revocation(message: revocation_feed_pb2.RevokedCredential) -> SyncedRevocation:
    kind = _KINDS.get(message.kind)
    if kind is None or not message.id:
        raise ProtocolViolation("the broker sent a revocation of nothing that is known")
    return SyncedRevocation(
        id=message.id,
        kind="x509" if kind == "x509" else "jwt",
        # One text for the many credentials of an identity and of an authority.
        spiffe_id=sys.intern(message.spiffe_id),
        expires_at=time_from_wire(message.expires_at),
        revoked_at=time_from_wire(message.revoked_at),
        reason=message.reason,
        authority_id=sys.intern(message.authority_id),
        entry_id=message.entry_id if message.instance else "",
        instance=message.instance if message.entry_id else "",
    )


def _epoch(message: revocation_feed_pb2.IdentityEpoch) -> SyncedEpoch:
    if not message.spiffe_id:
        raise ProtocolViolation("the broker sent an epoch of no identity")
    return SyncedEpoch(
        spiffe_id=message.spiffe_id,
        not_before=time_from_wire(message.not_before),
        expires_at=time_from_wire(message.expires_at),
    )


def _authorities(ids: Sequence[str]) -> tuple[str, ...]:
    if not all(ids):
        raise ProtocolViolation("the broker denies an authority without an id")
    return tuple(ids)


def _always(told: tuple[_T, ...] | None, *, full: bool) -> tuple[_T, ...] | None:
    """What was told; in a full state silence means none."""
    return () if full and told is None else told


def _time(seconds: int) -> datetime | None:
    return time_from_wire(seconds) if seconds else None


def _moment(milliseconds: int) -> datetime:
    seconds, rest = divmod(milliseconds, 1000)
    try:
        return time_from_wire(seconds) + timedelta(milliseconds=rest)
    except OverflowError as exc:
        raise ProtocolViolation("the broker sent a time that is out of range") from exc


def _ttl(seconds: int) -> timedelta | None:
    return _duration(seconds) if seconds else None


def _duration(seconds: int) -> timedelta:
    try:
        return timedelta(seconds=seconds)
    except OverflowError as exc:
        raise ProtocolViolation("the broker sent a duration that is out of range") from exc
