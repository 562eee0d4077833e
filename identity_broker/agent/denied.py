"""What is to be refused: revoked credentials, tokens older than an epoch, denied authorities.

- Without input, output or clock: the mirror tells it, and it says what of that was new.
- A hundred thousand revoked credentials are nothing unusual: each costs a key of 20 bytes and an
  integer; what many share (identity, authority, reason) is kept once.
- What has expired is forgotten, but not at once: clocks differ, and tokens are accepted for a
  moment longer than they say.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Final, Literal, NamedTuple, cast

from identity_ca.jwt import VerifiedJwt
from identity_client.node.values import SyncedEpoch, SyncedRevocation, SyncUpdate

GRACE: Final = timedelta(minutes=5)
"""How long after its expiry a credential is still refused for being revoked."""

_FORGET_EVERY: Final = timedelta(minutes=1)
_SKEW: Final = timedelta(minutes=1)  # of the broker's clock and ours
_BEGINNING: Final = datetime.min.replace(tzinfo=UTC)
_ID_DIGITS: Final = 40
_HEXADECIMAL: Final = frozenset("0123456789abcdef")
_TIME_BITS: Final = 40
_TIME: Final = (1 << _TIME_BITS) - 1
_TIMES_BITS: Final = 2 * _TIME_BITS
_TIMES: Final = (1 << _TIMES_BITS) - 1

_Key = bytes | str


class Instance(NamedTuple):
    """One process that is to have no other SVID of an entry."""

    entry_id: str
    instance: str


@dataclass(frozen=True, slots=True)
class DeniedChange:
    """What an update did.

    Attributes:
        revoked: what was not revoked before, or for another reason.
        released: ids that were revoked and are not any more.
        denied, pardoned: instances that get no SVID any more, or again.
        epochs: new or raised ones.
        authorities: all that are denied now, when they changed.
    """

    revoked: tuple[SyncedRevocation, ...] = ()
    released: tuple[str, ...] = ()
    denied: frozenset[Instance] = frozenset()
    pardoned: frozenset[Instance] = frozenset()
    epochs: tuple[SyncedEpoch, ...] = ()
    authorities: frozenset[str] | None = None

    def __bool__(self) -> bool:
        return bool(self.revoked or self.released or self.epochs or self.authorities is not None)


class TokenFacts(NamedTuple):
    """What decides whether a JWT-SVID is refused.

    Attributes:
        jti: empty where it has none.
        issued_at: `iat`, seconds since the epoch; None where it has none that is a number.
    """

    spiffe_id: str
    jti: str
    key_id: str
    issued_at: float | None

    @classmethod
    def of(cls, token: VerifiedJwt) -> TokenFacts:
        """Those of a token that was verified."""
        issued_at = token.claims.get("iat")
        is_number = isinstance(issued_at, int | float) and not isinstance(issued_at, bool)
        return cls(
            str(token.spiffe_id), token.jti or "", token.key_id, issued_at if is_number else None
        )


class _Shared(NamedTuple):
    """What many revoked credentials have in common."""

    kind: str
    spiffe_id: str
    authority_id: str
    reason: int


class RevokedCredentials:
    """The revoked credentials of one moment; what comes later does not change it.

    Each is a key and an integer: where its `_Shared` stands, then when it was revoked and when it
    expires, in seconds since the epoch.
    """

    __slots__ = ("_items", "_shared")

    def __init__(self, items: list[tuple[_Key, int]], shared: Sequence[_Shared]) -> None:
        self._items = items
        self._shared = shared

    def __len__(self) -> int:
        return len(self._items)

    def part(self, start: int, stop: int) -> Iterator[SyncedRevocation]:
        """Those from `start` to before `stop`, in the order they were told."""
        for key, packed in islice(self._items, start, stop):
            shared = self._shared[packed >> _TIMES_BITS]
            yield SyncedRevocation(
                id=_text(key),
                kind=cast("Literal['x509', 'jwt']", shared.kind),
                spiffe_id=shared.spiffe_id,
                expires_at=datetime.fromtimestamp(packed & _TIME, UTC),
                revoked_at=datetime.fromtimestamp(packed >> _TIME_BITS & _TIME, UTC),
                reason=shared.reason,
                authority_id=shared.authority_id,
            )


class Denied:
    """All that one node knows is to be refused. Belongs to one event loop."""

    def __init__(self) -> None:
        self._revoked: dict[_Key, int] = {}
        self._shared: list[_Shared] = []
        self._places: dict[_Shared, int] = {}
        self._instances: dict[str, Instance] = {}
        self._epochs: dict[str, SyncedEpoch] = {}
        self._authorities: frozenset[str] = frozenset()
        self._forget_at = _BEGINNING

    # --- what it says -------------------------------------------------------------------------

    def __len__(self) -> int:
        """Revoked credentials; some of them may have expired."""
        return len(self._revoked)

    @property
    def authorities(self) -> frozenset[str]:
        """Ids of authorities whose signatures are refused."""
        return self._authorities

    @property
    def epochs(self) -> tuple[SyncedEpoch, ...]:
        """All that are in force."""
        return tuple(self._epochs.values())

    def credentials(self) -> RevokedCredentials:
        """All revoked credentials at this moment."""
        return RevokedCredentials(list(self._revoked.items()), self._shared)

    def is_revoked(self, credential_id: str) -> bool:
        """Whether the broker told that this serial number or jti is revoked."""
        return _key(credential_id) in self._revoked

    def refuses(self, token: TokenFacts) -> bool:
        """Whether a JWT-SVID that holds is refused all the same: by jti, authority or epoch."""
        if token.key_id in self._authorities or (token.jti and self.is_revoked(token.jti)):
            return True
        epoch = self._epochs.get(token.spiffe_id)
        if epoch is None:
            return False
        # Whoever does not say when it was issued cannot show that it was after the epoch.
        return token.issued_at is None or token.issued_at <= epoch.not_before.timestamp()

    # --- what it is told ----------------------------------------------------------------------

    def apply(self, update: SyncUpdate, now: datetime) -> DeniedChange:
        """Take over what an update says; a full one replaces everything that will not end now."""
        gone = self._missing(update, now) if update.full else update.released_ids
        before = self._instances_now()
        released = tuple(each for each in gone if self._release(each))
        revoked = tuple(each for each in update.revocations if self._add(each, now))
        after = self._instances_now() if revoked or released else before
        return DeniedChange(
            revoked=revoked,
            released=released,
            denied=after - before,
            pardoned=before - after,
            epochs=self._raise(update.epochs, replace=update.full),
            authorities=self._deny(update.denied_authorities),
        )

    def forget(self, now: datetime) -> None:
        """Drop what has expired; to be called now and then."""
        if now < self._forget_at:
            return
        self._forget_at = now + _FORGET_EVERY
        over = now - GRACE
        self._epochs = {name: each for name, each in self._epochs.items() if each.expires_at > over}
        seconds = _seconds(over)
        live = [item for item in self._revoked.items() if item[1] & _TIME > seconds]
        if len(live) == len(self._revoked):
            return
        # All anew: a dictionary does not shrink, and what was shared may not be any more.
        shared, self._shared, self._places = self._shared, [], {}
        self._revoked = {
            key: self._place(shared[packed >> _TIMES_BITS]) << _TIMES_BITS | packed & _TIMES
            for key, packed in live
        }
        self._instances = {
            name: each for name, each in self._instances.items() if self.is_revoked(name)
        }

    # --- inside -------------------------------------------------------------------------------

    def _missing(self, update: SyncUpdate, now: datetime) -> list[str]:
        """What a full state does not name, unless that may be for its end."""
        named = {_key(each.id) for each in update.revocations}
        soon = _seconds(now + _SKEW)
        return [
            _text(key)
            for key, packed in self._revoked.items()
            if key not in named and packed & _TIME > soon
        ]

    def _instances_now(self) -> frozenset[Instance]:
        return frozenset(self._instances.values())

    def _add(self, told: SyncedRevocation, now: datetime) -> bool:
        """Refuse a credential; whether that is news."""
        if told.expires_at <= now - GRACE:
            return False
        shared = _Shared(told.kind, told.spiffe_id, told.authority_id, told.reason)
        times = _seconds(told.revoked_at) << _TIME_BITS | _seconds(told.expires_at)
        packed = self._place(shared) << _TIMES_BITS | times
        key = _key(told.id)
        if told.instance:
            self._instances[told.id] = Instance(told.entry_id, told.instance)
        if self._revoked.get(key) == packed:
            return False
        self._revoked[key] = packed
        return True

    def _release(self, credential_id: str) -> bool:
        self._instances.pop(credential_id, None)
        return self._revoked.pop(_key(credential_id), None) is not None

    def _raise(self, told: Sequence[SyncedEpoch], *, replace: bool) -> tuple[SyncedEpoch, ...]:
        before = {each.spiffe_id: self._epochs.get(each.spiffe_id) for each in told}
        if replace:
            self._epochs = {}
        for each in told:
            known = self._epochs.get(each.spiffe_id)
            if known is None or each.not_before > known.not_before:
                self._epochs[each.spiffe_id] = each
        fresh = {each.spiffe_id: self._epochs[each.spiffe_id] for each in told}
        return tuple(each for name, each in fresh.items() if before.get(name) != each)

    def _deny(self, told: Iterable[str] | None) -> frozenset[str] | None:
        if told is None or (denied := frozenset(told)) == self._authorities:
            return None
        self._authorities = denied
        return denied

    def _place(self, shared: _Shared) -> int:
        place = self._places.get(shared)
        if place is None:
            place = self._places[shared] = len(self._shared)
            self._shared.append(shared)
        return place


def _key(credential_id: str) -> _Key:
    """How an id is kept: as octets if it is written as the broker writes its own."""
    if len(credential_id) == _ID_DIGITS and _HEXADECIMAL.issuperset(credential_id):
        return bytes.fromhex(credential_id)
    return credential_id


def _text(key: _Key) -> str:
    return key.hex() if isinstance(key, bytes) else key


def _seconds(moment: datetime) -> int:
    return max(0, int(moment.timestamp()))
