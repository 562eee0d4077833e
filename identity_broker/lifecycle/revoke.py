"""revoke: one call ends a credential, an identity or a node.

- Durable when it returns, and reflected in this broker's memory: its next call is refused, on an
  open connection too. Verifiers that watch are told from the same change feed.
- Nothing slips through: after the entries are disabled, what was granted before is waited for and
  revoked too.
- Idempotent: what is revoked already stays as it was.
- Revoking a SPIFFE ID also disables the entries that issue it, unless told otherwise: a revoked
  workload would fetch its next SVID at once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from identity_broker.domain.caller import Caller
from identity_broker.domain.clock import Clock
from identity_broker.domain.credential import (
    Revocation,
    RevocationReason,
    RevocationResult,
)
from identity_broker.domain.events import AuditEvent, AuditKind
from identity_broker.errors import CredentialNotFound
from identity_broker.lifecycle.directory import Directory
from identity_broker.store import Repositories, Store
from identity_ca.spiffe_id import SpiffeId


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
                _event(self._clock, caller, credential_id, reason, comment, len(result.revoked))
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
        # From memory: there is no index by SPIFFE ID, and revoking is rare.
        ids = [entry.id for entry in self._directory.entries() if entry.spiffe_id == spiffe_id]

        def write(repos: Repositories) -> Revoked:
            # Entries first: once this commits, nothing new can be issued that we did not revoke.
            disabled = () if keep_entries else _disable(repos, ids, spiffe_id)
            result = repos.credentials.revoke(
                spiffe_id=spiffe_id, reason=reason, comment=comment, now=now
            )
            if not (result.revoked or result.already_revoked or ids):
                raise CredentialNotFound(
                    f'neither a credential nor an entry is known for "{spiffe_id}"'
                )
            repos.audit.append(
                _event(self._clock, caller, str(spiffe_id), reason, comment, len(result.revoked))
            )
            return Revoked(result.revoked, result.already_revoked, disabled)

        revoked = await self._store.write(write)
        await self._directory.sync()
        if keep_entries:
            return revoked
        return await self._late(
            revoked,
            lambda repos: repos.credentials.revoke(
                spiffe_id=spiffe_id, reason=reason, comment=comment, now=self._clock.now()
            ),
        )

    async def node(
        self, node_id: SpiffeId, comment: str, write: Callable[[Repositories], None]
    ) -> Revoked:
        """Revoke the SVIDs of a node itself, in one transaction with `write`.

        Raises:
            StoreUnavailable: the database did not answer; repeat the call.
        """

        def revoke(repos: Repositories) -> RevocationResult:
            return repos.credentials.revoke(
                spiffe_id=node_id,
                reason=RevocationReason.PRIVILEGE_WITHDRAWN,
                comment=comment,
                now=self._clock.now(),
            )

        def write_and_revoke(repos: Repositories) -> Revoked:
            write(repos)
            result = revoke(repos)
            return Revoked(result.revoked, result.already_revoked)

        revoked = await self._store.write(write_and_revoke)
        await self._directory.sync()
        return await self._late(revoked, revoke)

    async def _late(
        self, revoked: Revoked, again: Callable[[Repositories], RevocationResult]
    ) -> Revoked:
        await self._settled()
        late = await self._store.write(again)
        if late.revoked:
            await self._directory.sync()
        return replace(revoked, revocations=revoked.revocations + late.revoked)


def _disable(repos: Repositories, ids: list[str], spiffe_id: SpiffeId) -> tuple[str, ...]:
    disabled = []
    for entry_id in ids:
        entry = repos.entries.get(entry_id)
        if entry.spiffe_id == spiffe_id and not entry.disabled:
            repos.entries.replace(replace(entry, disabled=True), expected_revision=None)
            disabled.append(entry_id)
    return tuple(disabled)


def _event(
    clock: Clock, caller: Caller, subject: str, reason: RevocationReason, comment: str, count: int
) -> AuditEvent:
    return AuditEvent(
        at=clock.now(),
        kind=AuditKind.CREDENTIAL_REVOKED,
        actor=caller.name,
        subject=subject,
        reason=reason.name,
        facts={"revoked": str(count), "comment": comment},
    )
