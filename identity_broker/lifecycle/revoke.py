"""revoke: one call ends a credential, an identity or a node.

- Durable when it returns, and reflected in this broker's memory: its next call is refused, on an
  open connection too. Verifiers that watch are told from the same change feed.
- Nothing slips through: after the entries are disabled, what was granted before is waited for and
  revoked too. What another broker on the same store grants before it has read the change (a tenth
  of a second) is revoked a moment later.
- Idempotent: what is revoked already stays as it was.
- Revoking a SPIFFE ID also disables the entries that issue it, unless told otherwise: a revoked
  workload would fetch its next SVID at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime

from identity_broker.domain.caller import Caller
from identity_broker.domain.clock import Clock
from identity_broker.domain.credential import (
    Revocation,
    RevocationReason,
    RevocationResult,
)
from identity_broker.domain.entry import RegistrationEntry
from identity_broker.domain.events import AuditEvent, AuditKind
from identity_broker.domain.paging import MAX_PAGE_SIZE, EntryFilter
from identity_broker.errors import BrokerError, CredentialNotFound
from identity_broker.lifecycle.directory import Directory
from identity_broker.store import Repositories, Store
from identity_broker.telemetry.logs import get_logger
from identity_ca.spiffe_id import SpiffeId

_log = get_logger("revoke")

# Twenty times what another broker needs to read the change feed.
_OTHERS_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Revoked:
    """What a revocation did."""

    revocations: tuple[Revocation, ...]
    already_revoked: int
    disabled_entry_ids: tuple[str, ...] = ()


class Revoke:
    """Ends credentials.

    Args:
        settled: returns when everything granted before the call has its outcome.
    """

    def __init__(
        self,
        store: Store,
        directory: Directory,
        clock: Clock,
        settled: Callable[[], Awaitable[None]],
    ) -> None:
        self._store = store
        self._directory = directory
        self._clock = clock
        self._settled = settled
        self._closing = asyncio.Event()
        self._later: set[asyncio.Task[None]] = set()

    async def credential(
        self, credential_id: str, reason: RevocationReason, comment: str, caller: Caller
    ) -> Revoked:
        """Revoke one credential by serial or jti.

        Raises:
            CredentialNotFound: the ledger has no such credential.
            StoreUnavailable: the database did not answer; repeat the call.
        """
        now = self._clock.now()

        def write(repos: Repositories) -> Revoked:
            result = repos.credentials.revoke(
                ids=[credential_id], reason=reason, comment=comment, now=now
            )
            if not result.revoked and not result.already_revoked:
                # Raises when there is none; one that has expired is simply past revoking.
                repos.credentials.get(credential_id)
            repos.audit.append(
                _event(now, caller, credential_id, reason, comment, len(result.revoked))
            )
            return Revoked(result.revoked, result.already_revoked)

        revoked = await self._store.write(write)
        await self._directory.sync()
        return revoked

    async def identity(
        self,
        spiffe_id: SpiffeId,
        reason: RevocationReason,
        comment: str,
        caller: Caller,
        *,
        keep_entries: bool = False,
    ) -> Revoked:
        """Revoke everything unexpired that a SPIFFE ID holds, and stop issuing it.

        Raises:
            CredentialNotFound: neither the ledger nor the entries know the ID.
            StoreUnavailable: the database did not answer; repeat the call.
        """
        now = self._clock.now()

        def revoke(repos: Repositories) -> RevocationResult:
            return repos.credentials.revoke(
                spiffe_id=spiffe_id, reason=reason, comment=comment, now=self._clock.now()
            )

        def write(repos: Repositories) -> Revoked:
            # Entries first: once this commits, nothing new can be granted.
            entries = _entries_of(repos, spiffe_id)
            disabled = () if keep_entries else _disable(repos, entries)
            result = revoke(repos)
            if not (result.revoked or result.already_revoked or entries):
                raise CredentialNotFound(
                    f'neither a credential nor an entry is known for "{spiffe_id}"'
                )
            repos.audit.append(
                _event(now, caller, str(spiffe_id), reason, comment, len(result.revoked))
            )
            return Revoked(result.revoked, result.already_revoked, disabled)

        revoked = await self._store.write(write)
        await self._directory.sync()
        # With the entries kept there is no line to draw: what is issued next is wanted.
        return revoked if keep_entries else await self._late(revoked, revoke)

    async def node(
        self,
        node_id: SpiffeId,
        comment: str,
        write: Callable[[Repositories], None],
        *,
        issued_through_it: bool,
    ) -> Revoked:
        """Revoke the SVIDs of a node, in one transaction with `write`.

        Args:
            issued_through_it: revoke what workloads got through the node as well.

        Raises:
            StoreUnavailable: the database did not answer; repeat the call.
        """

        def revoke(repos: Repositories) -> RevocationResult:
            now = self._clock.now()
            reason = RevocationReason.PRIVILEGE_WITHDRAWN
            own = repos.credentials.revoke(
                spiffe_id=node_id, reason=reason, comment=comment, now=now
            )
            if not issued_through_it:
                return own
            through = repos.credentials.revoke(
                node_id=node_id, reason=reason, comment=comment, now=now
            )
            return RevocationResult(
                own.revoked + through.revoked, own.already_revoked + through.already_revoked
            )

        def write_and_revoke(repos: Repositories) -> Revoked:
            write(repos)
            result = revoke(repos)
            return Revoked(result.revoked, result.already_revoked)

        revoked = await self._store.write(write_and_revoke)
        await self._directory.sync()
        return await self._late(revoked, revoke)

    async def close(self) -> None:
        """Do at once what was still to be done later."""
        self._closing.set()
        await asyncio.gather(*self._later, return_exceptions=True)

    async def _late(
        self, revoked: Revoked, again: Callable[[Repositories], RevocationResult]
    ) -> Revoked:
        await self._settled()
        late = await self._store.write(again)
        if late.revoked:
            await self._directory.sync()
        task = asyncio.create_task(self._once_more(again))
        self._later.add(task)
        task.add_done_callback(self._later.discard)
        return replace(revoked, revocations=revoked.revocations + late.revoked)

    async def _once_more(self, again: Callable[[Repositories], RevocationResult]) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_OTHERS_SECONDS):
                await self._closing.wait()
        try:
            late = await self._store.write(again)
            if late.revoked:
                _log.warning("revoked what another broker had under way", count=len(late.revoked))
                await self._directory.sync()
        except BrokerError as error:
            _log.error("late revocation failed", reason=error.reason, detail=error.detail)


def _entries_of(repos: Repositories, spiffe_id: SpiffeId) -> list[RegistrationEntry]:
    found: list[RegistrationEntry] = []
    after = ""
    while True:
        page = repos.entries.page(EntryFilter(spiffe_id=spiffe_id), after, MAX_PAGE_SIZE)
        found.extend(page.items)
        after = page.next_key
        if not after:
            return found


def _disable(repos: Repositories, entries: list[RegistrationEntry]) -> tuple[str, ...]:
    live = [entry for entry in entries if not entry.disabled]
    for entry in live:
        repos.entries.replace(replace(entry, disabled=True), expected_revision=None)
    return tuple(entry.id for entry in live)


def _event(
    now: datetime, caller: Caller, subject: str, reason: RevocationReason, comment: str, count: int
) -> AuditEvent:
    return AuditEvent(
        at=now,
        kind=AuditKind.CREDENTIAL_REVOKED,
        actor=caller.name,
        subject=subject,
        reason=reason.name,
        facts={"revoked": str(count), "comment": comment},
    )
