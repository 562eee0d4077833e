"""Creating, changing and deleting registration entries."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import TypeVar

from identity_broker.domain.caller import Caller
from identity_broker.domain.clock import Clock
from identity_broker.domain.entry import RegistrationEntry
from identity_broker.domain.events import AuditEvent, AuditKind
from identity_broker.domain.paging import EntryFilter, Page
from identity_broker.errors import BrokerError, EntryInvalid, StoreUnavailable
from identity_broker.lifecycle.directory import Directory
from identity_broker.store import Repositories, Store
from identity_ca.spiffe_id import SpiffeId, TrustDomain

T = TypeVar("T")
S = TypeVar("S")


def new_entry_id() -> str:
    """Return a fresh entry id."""
    return secrets.token_hex(10)


class Entries:
    """The registration entries of the trust domain."""

    def __init__(
        self, store: Store, directory: Directory, trust_domain: TrustDomain, clock: Clock
    ) -> None:
        self._store = store
        self._directory = directory
        self._trust_domain = trust_domain
        self._clock = clock

    async def create(
        self, entries: Sequence[RegistrationEntry], caller: Caller
    ) -> list[RegistrationEntry | BrokerError]:
        """Create entries; each one's own result, in order.

        Raises:
            StoreUnavailable: some may have been created; a repeat answers EntryExists for those.
        """

        def create(repos: Repositories, entry: RegistrationEntry) -> RegistrationEntry:
            self._check(entry.spiffe_id)
            created = repos.entries.create(entry)
            repos.audit.append(self._event(AuditKind.ENTRY_CREATED, created, caller))
            return created

        return await self._each(entries, create)

    async def update(
        self,
        changes: Sequence[tuple[str, int, Callable[[RegistrationEntry], RegistrationEntry]]],
        caller: Caller,
    ) -> list[RegistrationEntry | BrokerError]:
        """Change entries; each is (id, expected revision or 0, change); results in order.

        Raises:
            StoreUnavailable: some may have been changed.
        """

        def update(
            repos: Repositories,
            change: tuple[str, int, Callable[[RegistrationEntry], RegistrationEntry]],
        ) -> RegistrationEntry:
            entry_id, revision, apply = change
            entry = apply(repos.entries.get(entry_id))
            self._check(entry.spiffe_id)
            stored = repos.entries.replace(entry, expected_revision=revision or None)
            repos.audit.append(self._event(AuditKind.ENTRY_UPDATED, stored, caller))
            return stored

        return await self._each(changes, update)

    async def delete(self, ids: Sequence[str], caller: Caller) -> list[str | BrokerError]:
        """Delete entries; each one's own result, in order.

        Raises:
            StoreUnavailable: some may have been deleted.
        """

        def delete(repos: Repositories, entry_id: str) -> str:
            entry = repos.entries.get(entry_id)
            repos.entries.delete(entry_id)
            repos.audit.append(self._event(AuditKind.ENTRY_DELETED, entry, caller))
            return entry_id

        return await self._each(ids, delete)

    async def get(self, entry_id: str) -> RegistrationEntry:
        """Return one entry.

        Raises:
            EntryNotFound: there is none with that id.
        """
        return await self._store.read(lambda repos: repos.entries.get(entry_id))

    async def page(self, wanted: EntryFilter, after: str, size: int) -> Page[RegistrationEntry]:
        """Return a page of entries, by id."""
        return await self._store.read(lambda repos: repos.entries.page(wanted, after, size))

    async def _each(
        self, items: Sequence[T], work: Callable[[Repositories, T], S]
    ) -> list[S | BrokerError]:
        def write(repos: Repositories) -> list[S | BrokerError]:
            results: list[S | BrokerError] = []
            for item in items:
                try:
                    with repos.savepoint():
                        results.append(work(repos, item))
                except BrokerError as error:
                    if isinstance(error, StoreUnavailable):
                        raise
                    results.append(error)
            return results

        results = await self._store.write(write)
        await self._directory.sync()
        return results

    def _check(self, spiffe_id: SpiffeId) -> None:
        if spiffe_id.trust_domain != self._trust_domain:
            raise EntryInvalid(
                f'"{spiffe_id}" is not in this broker\'s trust domain "{self._trust_domain}"',
                hint=f'SPIFFE IDs here begin with "spiffe://{self._trust_domain}/"',
            )

    def _event(self, kind: AuditKind, entry: RegistrationEntry, caller: Caller) -> AuditEvent:
        return AuditEvent(
            at=self._clock.now(),
            kind=kind,
            actor=caller.name,
            subject=entry.id,
            facts={
                "spiffe_id": str(entry.spiffe_id),
                "parent_id": str(entry.parent_id),
                "revision": str(entry.revision),
            },
        )
