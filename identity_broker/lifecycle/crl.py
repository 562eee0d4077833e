"""Revocation lists: one for each X.509 authority that is trusted, rebuilt as credentials end.

- A list follows a revocation within `GATHER`; when revocations keep coming, lists follow at the
  pace that those who are told can take. It is renewed at half of its validity in any case.
- Numbers only grow, across restarts too: milliseconds since the epoch, counted on where the clock
  stands still or was set back while the broker ran.
- A revoked certificate leaves the list after it stood in one made when it had expired (RFC 5280
  section 3.3).
- A list that cannot be signed leaves the former one in force, and is tried again; an authority
  whose key is lost has none.
- Entries are encoded once: a list of many costs one signature and one hash.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from identity_broker.domain.clock import Clock
from identity_broker.domain.credential import CredentialKind, Revocation
from identity_broker.errors import AuthorityUnavailable, BrokerError
from identity_broker.lifecycle.directory import Directory, Update
from identity_broker.signing import Signing
from identity_broker.signing.crl import sign_list
from identity_broker.telemetry.logs import get_logger
from identity_ca.authority import Authority
from identity_ca.crl import RevokedEntry, encode_entry

_log = get_logger("crl")

VALIDITY = timedelta(hours=1)
GATHER = timedelta(milliseconds=20)
# Verifiers' clocks differ: as for certificates.
_BACKDATE = timedelta(seconds=10)
_LOOK_SECONDS = 5.0
_RETRY_SECONDS = 1.0
_MOST_DOUBLINGS = 5

Listener = Callable[[tuple[bytes, ...]], object]


@dataclass(slots=True)
class _List:
    """One authority's list and what stands in the next.

    `entries` is serial → (encoded entry, the certificate's expiry).
    """

    entries: dict[str, tuple[bytes, datetime]] = field(default_factory=dict)
    der: bytes = b""
    built_at: datetime | None = None
    stale: bool = True
    keyless: bool = False

    def is_due(self, now: datetime, validity: timedelta) -> bool:
        built_at = self.built_at
        if self.keyless:
            return False
        if self.stale or built_at is None:
            return True
        # A clock that was set back would keep it for longer than its validity.
        return not built_at <= now < built_at + validity / 2


class RevocationLists:
    """Makes the lists, and says when they change.

    Args:
        validity: from a list's making to its next update.
        pace: the least time between two rebuilds; asked each time.
    """

    def __init__(
        self,
        *,
        signing: Signing,
        directory: Directory,
        clock: Clock,
        validity: timedelta = VALIDITY,
        pace: Callable[[], timedelta] = lambda: GATHER,
    ) -> None:
        self._signing = signing
        self._clock = clock
        self._validity = validity
        self._pace = pace
        self._lists: dict[str, _List] = {}
        self._current: tuple[bytes, ...] = ()
        self._number = 0
        self._listeners: list[Listener] = []
        self._news = asyncio.Event()
        self._rebuilding = asyncio.Lock()
        self._add(directory.revocations())
        directory.listen(self._on_update)

    @property
    def current(self) -> tuple[bytes, ...]:
        """The lists in force, DER, in the order of their authorities."""
        return self._current

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` with the lists whenever one changes; the returned function stops it."""
        self._listeners.append(listener)

        def stop() -> None:
            with suppress(ValueError):
                self._listeners.remove(listener)

        return stop

    def wake(self, _news: object = None) -> None:
        """Look soon whether a list is due: the authorities have changed."""
        self._news.set()

    async def run(self) -> None:
        """Rebuild what is due until cancelled."""
        failures = await self._attempt(0)
        while True:
            if failures:
                # News does not hurry a key manager that is away.
                await asyncio.sleep(_RETRY_SECONDS * 2 ** min(failures - 1, _MOST_DOUBLINGS))
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_SECONDS):
                        await self._news.wait()
                        await asyncio.sleep(GATHER.total_seconds())
            started, before = time.monotonic(), self._current
            failures = await self._attempt(failures)
            if self._current is not before:
                rest = self._pace().total_seconds() - (time.monotonic() - started)
                await asyncio.sleep(max(rest, 0.0))

    async def start(self) -> None:
        """Make the first lists; what cannot be signed now is left to `run`."""
        await self._attempt(0)

    async def _attempt(self, failures: int) -> int:
        """Rebuild what is due; return how many attempts have failed by now."""
        try:
            await self.rebuild()
        except BrokerError as error:
            _log.warning(
                "revocation list not signed",
                reason=error.reason,
                detail=error.detail,
                attempt=failures + 1,
            )
        except Exception:  # noqa: BLE001  # a bug must not end the lists for good
            _log.exception("revocation list not signed")
        else:
            return 0
        return failures + 1

    async def rebuild(self) -> bool:
        """Make the lists that are due; return whether any changed.

        Raises:
            SigningBackendUnavailable: some could not be signed; the former ones stay.
        """
        async with self._rebuilding:
            self._news.clear()
            now = self._clock.now()
            authorities = [
                authority
                for authority in self._signing.authorities.x509_set.trusted
                if authority.not_after > now
            ]
            failed: BrokerError | None = None
            for authority in authorities:
                known = self._lists.setdefault(authority.id, _List())
                if known.is_due(now, self._validity):
                    try:
                        await self._sign(authority, known, now)
                    except AuthorityUnavailable:
                        known.keyless = True
                        _log.warning("no revocation list without a key", authority_id=authority.id)
                    except BrokerError as error:
                        failed = error
            trusted = {authority.id for authority in authorities}
            for gone in self._lists.keys() - trusted:
                if self._lists[gone].built_at is not None:
                    del self._lists[gone]
            changed = self._publish(authorities)
            if failed is not None:
                raise failed
            return changed

    async def _sign(self, authority: Authority, known: _List, now: datetime) -> None:
        # What is revoked while this is being signed makes the list stale again.
        known.stale = False
        self._number = max(self._number + 1, int(now.timestamp() * 1000))
        try:
            signed = await sign_list(
                self._signing,
                authority,
                encoded_entries=[encoded for encoded, _ in known.entries.values()],
                number=self._number,
                this_update=now - _BACKDATE,
                next_update=now + self._validity,
            )
            known.der = signed.der
        except BaseException:
            known.stale = True
            raise
        known.built_at = now
        expired = [serial for serial, (_, until) in known.entries.items() if until <= now]
        for serial in expired:
            del known.entries[serial]

    def _publish(self, authorities: list[Authority]) -> bool:
        lists = tuple(known.der for item in authorities if (known := self._lists[item.id]).der)
        if lists == self._current:
            return False
        self._current = lists
        for listener in tuple(self._listeners):
            listener(lists)
        return True

    def _on_update(self, update: Update) -> None:
        if self._add(update.revocations) or update.authorities_changed:
            self._news.set()

    def _add(self, revocations: list[Revocation]) -> bool:
        found = False
        for revocation in revocations:
            if revocation.kind is not CredentialKind.X509:
                continue
            known = self._lists.setdefault(revocation.authority_id, _List())
            if revocation.id not in known.entries:
                entry = RevokedEntry(
                    serial=int(revocation.id, 16),
                    revoked_at=revocation.revoked_at,
                    reason=int(revocation.reason),
                )
                known.entries[revocation.id] = (encode_entry(entry), revocation.expires_at)
                known.stale = found = True
        return found
