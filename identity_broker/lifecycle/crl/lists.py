"""Revocation lists of every authority of the trust domain, made as credentials end.

- Parts and deltas have a revocation as soon as this broker has heard of it. The full list follows
  within `GATHER` while that is cheap; a long one is made as often as a tenth of one CPU allows.
- Nodes are told full lists at the pace that the network can take; those who ask get the newest.
- Numbers only grow, across restarts too; see `numbers`.
- An authority has lists until it expires, trusted or not; one whose key is lost has no new ones.
- A list that cannot be signed leaves the former one in force, and is tried again. None is signed
  while the change feed is lost.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

from identity_broker.domain.clock import Clock
from identity_broker.domain.credential import CredentialKind, Revocation
from identity_broker.errors import (
    AuthorityNotFound,
    AuthorityUnavailable,
    BrokerError,
    SigningBackendUnavailable,
    StoreUnavailable,
)
from identity_broker.lifecycle.crl.authority import AuthorityLists
from identity_broker.lifecycle.crl.document import ListDocument, ListKind
from identity_broker.lifecycle.crl.entries import RevokedEntries
from identity_broker.lifecycle.crl.numbers import ListNumbers
from identity_broker.lifecycle.crl.press import ListPress
from identity_broker.lifecycle.crl.upstream import UpstreamLists
from identity_broker.lifecycle.directory import Directory, Update
from identity_broker.signing import Signing
from identity_broker.store import Store
from identity_broker.telemetry.logs import get_logger
from identity_broker.telemetry.metrics import Metrics
from identity_ca.authority import Authority
from identity_ca.distribution import DistributionPoints, Shard

_log = get_logger("crl")

VALIDITY = timedelta(hours=1)
GATHER = timedelta(milliseconds=20)
MOST_TOLD_OCTETS = 48 * 1024 * 1024
"""Lists that nodes are told of, all together: a message has to hold them."""

_LOOK_SECONDS = 5.0
_RETRY_SECONDS = 1.0
_MOST_DOUBLINGS = 5
_MOST_DOUBLINGS_OF_STORE = 2
_SILENCE_SECONDS = 10.0
_SHARDS_WITHOUT_ADDRESS = 1

Listener = Callable[[tuple[bytes, ...]], object]


class RevocationLists:
    """Makes the lists, and says when they change.

    Args:
        validity: from a list's making to its next update.
        points: the public addresses of lists and responder; without them there are no parts.
        pace: the least time between tellings of lists of so many bytes; asked each time.
    """

    def __init__(
        self,
        *,
        signing: Signing,
        directory: Directory,
        store: Store,
        clock: Clock,
        validity: timedelta = VALIDITY,
        points: DistributionPoints | None = None,
        metrics: Metrics | None = None,
        pace: Callable[[int], timedelta] = lambda _octets: timedelta(0),
    ) -> None:
        self._signing = signing
        self._directory = directory
        self._clock = clock
        self._metrics = metrics or Metrics()
        self._pace = pace
        self._shards = _SHARDS_WITHOUT_ADDRESS if points is None else points.shards
        numbers = ListNumbers(store, clock)
        self._press = ListPress(
            signing=signing,
            numbers=numbers,
            up_to_date=directory.check,
            clock=clock,
            validity=validity,
            points=points,
            metrics=self._metrics,
        )
        self._upstream = UpstreamLists(signing, numbers, clock, validity)
        self._entries: dict[str, RevokedEntries] = {}
        self._authorities: dict[str, AuthorityLists] = {}
        self._current: tuple[bytes, ...] = ()
        self._left_out = 0
        self._tell_at = 0.0
        self._telling: asyncio.TimerHandle | None = None
        self._listeners: list[Listener] = []
        self._news = asyncio.Event()
        self._rebuilding = asyncio.Lock()
        self._failure: BrokerError | None = None
        self._failing_since = 0.0
        self._put(directory.revocations())
        for entries in self._entries.values():
            entries.forget_changes()
        directory.listen(self._on_update)

    # --- asking -----------------------------------------------------------------------------------

    @property
    def points(self) -> DistributionPoints | None:
        """The public addresses of the lists."""
        return self._press.points

    @property
    def current(self) -> tuple[bytes, ...]:
        """The full lists in force that nodes are told of, DER, those of the upstream last."""
        return self._current

    def full_lists(self) -> list[ListDocument]:
        """The full list of every authority that has one, those of the upstream last."""
        own = [one.full for one in self._authorities.values() if one.full is not None]
        return [*own, *self._upstream.current]

    async def document(
        self, authority_id: str, kind: ListKind, shard: Shard | None = None
    ) -> ListDocument:
        """A list of that authority, the newest there is; parts and deltas are made for the asker.

        Raises:
            AuthorityNotFound: no such authority, or it has no such list.
            AuthorityUnavailable, StoreUnavailable, SigningBackendUnavailable: there is none now.
        """
        known = self._authorities.get(authority_id)
        if known is None:
            return self._upstream_list(authority_id, kind)
        if kind is ListKind.DELTA:
            return await known.delta()
        if kind is ListKind.SHARD:
            if shard is None:
                raise AuthorityNotFound("which part of the list is not said")
            return await known.part(shard)
        if known.full is None:
            raise AuthorityUnavailable("there is no revocation list yet", retry_after=1.0)
        return known.full

    def _upstream_list(self, authority_id: str, kind: ListKind) -> ListDocument:
        for one in self._upstream.current:
            if one.authority_id == authority_id and kind is ListKind.FULL:
                return one
        raise AuthorityNotFound("no authority of that id has such a revocation list")

    async def check(self) -> None:
        """Find out whether new lists are being made.

        Raises:
            StoreUnavailable, SigningBackendUnavailable: not for a while; the former ones stand.
        """
        await self._directory.check()
        failure = self._failure
        if failure is not None and time.monotonic() - self._failing_since > _SILENCE_SECONDS:
            raise type(failure)(
                "revocation lists are not being published",
                detail=failure.detail,
                retry_after=_RETRY_SECONDS,
            )

    # --- following --------------------------------------------------------------------------------

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` with `current` when it changes; the returned function stops it."""
        self._listeners.append(listener)

        def stop() -> None:
            with suppress(ValueError):
                self._listeners.remove(listener)

        return stop

    def wake(self, _news: object = None) -> None:
        """Look soon whether a list is due: the authorities have changed."""
        self._news.set()

    async def start(self) -> None:
        """Make the first lists; what cannot be had now is left to `run`."""
        await self._attempt(0)
        await self._look_above()

    async def run(self) -> None:
        """Make what is due until cancelled."""
        # An upstream that does not answer holds nothing up.
        above = asyncio.create_task(self._follow_above())
        try:
            failures = await self._attempt(0)
            while True:
                if failures:
                    # News does not hurry a key manager that is away.
                    await asyncio.sleep(self._hold_off(failures))
                else:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(self._rest()):
                            await self._news.wait()
                            await asyncio.sleep(GATHER.total_seconds())
                failures = await self._attempt(failures)
        finally:
            above.cancel()
            if self._telling is not None:
                self._telling.cancel()
            await asyncio.gather(above, return_exceptions=True)

    async def _follow_above(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                await self._look_above()
            except Exception:  # noqa: BLE001  # a bug must not end the lists for good
                _log.exception("no revocation list from the upstream")

    async def _look_above(self) -> bool:
        return await self._upstream.look() and self._publish()

    def _hold_off(self, failures: int) -> float:
        # Nothing is known of revocations while the store is away: it must not last any longer.
        lost = isinstance(self._failure, StoreUnavailable)
        most = _MOST_DOUBLINGS_OF_STORE if lost else _MOST_DOUBLINGS
        return _RETRY_SECONDS * 2.0 ** min(failures - 1, most)

    def _rest(self) -> float:
        """How long there is nothing to do, unless there is news."""
        waiting = [one.not_before for one in self._authorities.values() if one.is_due]
        soonest = min(waiting, default=0.0) - time.monotonic()
        return min(max(soonest, 0.0), _LOOK_SECONDS) if waiting else _LOOK_SECONDS

    async def _attempt(self, failures: int) -> int:
        """Make what is due and worth it; return how many attempts have failed by now."""
        try:
            await self._renew(paced=True)
        except BrokerError as error:
            self._metrics.crl_failed_total.labels(error.reason).inc()
            _log.warning(
                "revocation list not signed",
                reason=error.reason,
                detail=error.detail,
                attempt=failures + 1,
            )
            self._failed(error)
        except Exception as error:  # noqa: BLE001  # a bug must not end the lists for good
            _log.exception("revocation list not signed")
            self._failed(SigningBackendUnavailable(detail=str(error)))
        else:
            self._failure = None
            return 0
        return failures + 1

    def _failed(self, error: BrokerError) -> None:
        if self._failure is None:
            self._failing_since = time.monotonic()
        self._failure = error

    async def rebuild(self) -> bool:
        """Make the full lists that are due; return whether any changed.

        Raises:
            StoreUnavailable, SigningBackendUnavailable: some could not be; the former ones stay.
        """
        changed = await self._renew(paced=False)
        return await self._look_above() or changed

    async def _renew(self, *, paced: bool) -> bool:
        async with self._rebuilding:
            self._news.clear()
            authorities = self._adopt()
            failed: BrokerError | None = None
            for known in authorities:
                if not known.is_due or (paced and time.monotonic() < known.not_before):
                    continue
                try:
                    await known.renew()
                except AuthorityUnavailable:
                    known.keyless = True
                    _log.warning(
                        "no revocation list without a key", authority_id=known.authority.id
                    )
                except BrokerError as error:
                    failed = error
            changed = self._publish()
            if failed is not None:
                raise failed
            return changed

    def _adopt(self) -> list[AuthorityLists]:
        """The lists of every authority that has not expired."""
        now = self._clock.now()
        living: dict[str, Authority] = {
            one.id: one for one in self._signing.authorities.x509_set if one.not_after > now
        }
        for gone in self._authorities.keys() - living.keys():
            del self._authorities[gone]
            self._entries.pop(gone, None)
        for authority in living.values():
            known = self._authorities.get(authority.id)
            if known is None:
                entries = self._entries_of(authority.id)
                known = AuthorityLists(authority, entries, self._press)
                self._authorities[authority.id] = known
            known.authority = authority
        return [self._authorities[key] for key in living]

    # --- telling ----------------------------------------------------------------------------------

    def _publish(self) -> bool:
        documents = self.full_lists()
        self._metrics.crl_entries.set(sum(one.entries for one in documents))
        self._metrics.crl_bytes.set(sum(len(one.der) for one in documents))
        if documents:
            expires = min(one.next_update for one in documents)
            self._metrics.crl_expires.set(expires.timestamp())
        lists = _that_fit([one.der for one in documents])
        left_out = len(documents) - len(lists)
        if left_out > self._left_out:
            _log.error("revocation lists too long to be told", count=left_out)
        self._left_out = left_out
        if lists == self._current:
            return False
        self._current = lists
        if self._telling is None:
            wait = self._tell_at - time.monotonic()
            if wait <= 0:
                self._tell()
            else:
                self._telling = asyncio.get_running_loop().call_later(wait, self._tell)
        return True

    def _tell(self) -> None:
        self._telling = None
        lists = self._current
        self._tell_at = time.monotonic() + self._pace(sum(map(len, lists))).total_seconds()
        for listener in tuple(self._listeners):
            listener(lists)

    # --- news -------------------------------------------------------------------------------------

    def _on_update(self, update: Update) -> None:
        changed = self._put(update.revocations)
        now = self._clock.now()
        for credential_id in update.released:
            for entries in self._entries.values():
                changed |= entries.release(credential_id, now)
        if changed or update.authorities_changed:
            self._news.set()

    def _put(self, revocations: list[Revocation]) -> bool:
        of: dict[str, list[Revocation]] = {}
        for one in revocations:
            if one.kind is CredentialKind.X509:
                of.setdefault(one.authority_id, []).append(one)
        changed = False
        for authority_id, some in of.items():
            changed |= self._entries_of(authority_id).put(some)
        return changed

    def _entries_of(self, authority_id: str) -> RevokedEntries:
        return self._entries.setdefault(authority_id, RevokedEntries(self._shards))


def _that_fit(lists: list[bytes]) -> tuple[bytes, ...]:
    """As many of them as a node can be told, shorter ones first, in their order."""
    room = MOST_TOLD_OCTETS
    kept: set[int] = set()
    for at in sorted(range(len(lists)), key=lambda at: len(lists[at])):
        if len(lists[at]) <= room:
            room -= len(lists[at])
            kept.add(at)
    return tuple(der for at, der in enumerate(lists) if at in kept)
