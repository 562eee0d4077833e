"""One authority's lists: the full one, its parts, and the delta.

- The full list is made ahead, and again when something changed or half of its life is over. Parts
  and delta are made when somebody asks and the last ones are not as good as new ones.
- A list that cannot be signed leaves the former one in force until it expires.
- A revoked certificate leaves after it stood in a full list made when it had expired (RFC 5280
  section 3.3).
- The delta builds on the oldest full list that verifiers may still have and whose changes since
  are known; it always has a higher number than the latest.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from identity_broker.errors import AuthorityNotFound, BrokerError, SigningBackendUnavailable
from identity_broker.lifecycle.crl.document import ListDocument, ListKind
from identity_broker.lifecycle.crl.entries import RevokedEntries
from identity_broker.lifecycle.crl.press import ListPress
from identity_broker.telemetry.logs import get_logger
from identity_ca.authority import Authority
from identity_ca.distribution import Shard

_log = get_logger("crl")

# Making full lists takes at most a tenth of one CPU, and so do parts that nobody should ask for.
_REST_FOR_WORK = 9.0
_RETRY_SECONDS = 1.0
_LEAST_KEPT_OCTETS = 4 * 1024 * 1024
_TURN = 64

_Key = Shard | ListKind
_Position = tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Kept:
    """A part or delta, and the position of what stands in it."""

    document: ListDocument
    position: _Position


class AuthorityLists:
    """The lists of the authority `authority`.

    Attributes:
        entries: what stands in the lists that are made from now on.
        full: the full list in force; None before the first.
        keyless: the authority's key is lost: it has no new lists.
        not_before: of the monotonic clock: no full list is worth its work sooner.
    """

    def __init__(self, authority: Authority, entries: RevokedEntries, press: ListPress) -> None:
        self.authority = authority
        self.entries = entries
        self.full: ListDocument | None = None
        self.keyless = False
        self.not_before = 0.0
        self._press = press
        self._full_position = -1
        self._bases: deque[tuple[ListDocument, int]] = deque()
        self._kept: OrderedDict[_Key, _Kept] = OrderedDict()
        self._signing = asyncio.Lock()
        self._retry_at = 0.0
        self._uncommon_not_before = 0.0

    @property
    def is_due(self) -> bool:
        """Whether a new full list is to be made."""
        return not self.keyless and (
            self._full_position != self.entries.position or not self._press.is_fresh(self.full)
        )

    async def renew(self) -> None:
        """Make a new full list.

        Raises:
            AuthorityUnavailable: the key is lost.
            StoreUnavailable, SigningBackendUnavailable: the former list stays in force.
        """
        position, entries, count = self.entries.position, self.entries.full(), len(self.entries)
        full = await self._press.print(self.authority, ListKind.FULL, entries, count)
        self.full, self._full_position = full, position
        self.not_before = time.monotonic() + self._press.busy_seconds * _REST_FOR_WORK
        self._note_base(full, position)
        for at, name in enumerate(self.entries.expired(full.built_at)):
            if at % _TURN == 0:
                await asyncio.sleep(0)
            self.entries.forget_expired(name, full.built_at)

    def _note_base(self, full: ListDocument, position: int) -> None:
        self._bases.append((full, position))
        self.entries.listed(position)
        while len(self._bases) > 1 and (
            self._bases[0][0].next_update <= full.built_at
            or not self.entries.knows_since(self._bases[0][1])
        ):
            self._bases.popleft()

    async def part(self, shard: Shard) -> ListDocument:
        """The list of that part, made now if need be.

        Raises:
            AuthorityNotFound: there are no parts, for the lists have no public address.
            AuthorityUnavailable, StoreUnavailable, SigningBackendUnavailable: there is none now.
        """
        points = self._press.points
        if points is None:
            raise AuthorityNotFound(
                "there are no partial revocation lists", hint="set revocation.public_url"
            )
        common = shard.of == points.shards

        def make() -> Coroutine[Any, Any, ListDocument]:
            if not common and time.monotonic() < self._uncommon_not_before:
                raise SigningBackendUnavailable(retry_after=_RETRY_SECONDS)
            return self._print_part(shard, common=common)

        return await self._kept_or(shard, lambda: (self.entries.part_position(shard), 0), make)

    async def _print_part(self, shard: Shard, *, common: bool) -> ListDocument:
        entries, count = self.entries.part(shard)
        document = await self._press.print(
            self.authority, ListKind.SHARD, entries, count, shard=shard
        )
        if not common:
            rest = self._press.busy_seconds * _REST_FOR_WORK
            self._uncommon_not_before = time.monotonic() + rest
        return document

    async def delta(self) -> ListDocument:
        """What changed since a full list, made now if need be.

        Raises:
            AuthorityUnavailable, StoreUnavailable, SigningBackendUnavailable: there is none now.
        """

        def make() -> Coroutine[Any, Any, ListDocument]:
            for base, position in self._bases:
                changes = self.entries.changes_since(position)
                if changes is not None:
                    return self._press.print(
                        *(self.authority, ListKind.DELTA, changes, len(changes)),
                        base_number=base.number,
                    )
            raise SigningBackendUnavailable(
                detail="more has changed than fits into a delta", retry_after=_RETRY_SECONDS
            )

        def position() -> _Position:
            return self.entries.position, 0 if self.full is None else self.full.number

        return await self._kept_or(ListKind.DELTA, position, make)

    async def _kept_or(
        self,
        key: _Key,
        position: Callable[[], _Position],
        make: Callable[[], Coroutine[Any, Any, ListDocument]],
    ) -> ListDocument:
        """The list kept under `key`, or what `make` makes; what `make` itself refuses is final."""
        if (found := self._current(key, position())) is not None:
            return found
        async with self._signing:
            # Somebody who waited here before may have made it.
            now_at = position()
            if (found := self._current(key, now_at)) is not None:
                return found
            making = make()
            try:
                document = await self._tried(making)
            except BrokerError as error:
                self._hold_off(key, error)
                former = self._kept.get(key)
                if former is None or former.document.next_update <= self._press.now():
                    raise
                return former.document
            self._keep(key, _Kept(document, now_at))
            return document

    async def _tried(self, making: Coroutine[Any, Any, ListDocument]) -> ListDocument:
        if time.monotonic() < self._retry_at:
            making.close()
            raise SigningBackendUnavailable(retry_after=_RETRY_SECONDS)
        return await making

    def _current(self, key: _Key, position: _Position) -> ListDocument | None:
        kept = self._kept.get(key)
        if kept is None or kept.position != position or not self._press.is_fresh(kept.document):
            return None
        self._kept.move_to_end(key)
        return kept.document

    def _keep(self, key: _Key, kept: _Kept) -> None:
        self._kept[key] = kept
        self._kept.move_to_end(key)
        full = 0 if self.full is None else len(self.full.der)
        room = _LEAST_KEPT_OCTETS + 4 * full
        octets = sum(len(one.document.der) for one in self._kept.values())
        while octets > room and len(self._kept) > 1:
            _, gone = self._kept.popitem(last=False)
            octets -= len(gone.document.der)

    def _hold_off(self, key: _Key, error: BrokerError) -> None:
        if time.monotonic() < self._retry_at:
            return
        self._retry_at = time.monotonic() + _RETRY_SECONDS
        _log.warning(
            "revocation list not signed",
            kind=str(key),
            authority_id=self.authority.id,
            reason=error.reason,
            detail=error.detail,
        )
