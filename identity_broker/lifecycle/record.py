"""record: nothing leaves unrecorded.

- `intend` returns when the intents are durable; only then may anything be signed.
- `conclude` queues the outcomes; they are committed with the next group.
- An intent whose outcome never comes is swept to UNCONFIRMED: listed, revocable, never forgotten.
- Sweeping and expiring go in steps, a transaction each: nobody who issues waits for all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from identity_broker.domain.clock import Clock
from identity_broker.domain.credential import (
    CredentialIntent,
    CredentialKind,
    CredentialOutcome,
)
from identity_broker.domain.grant import Grant
from identity_broker.store import STEP, Repositories, Store
from identity_ca.issuer import PreparedX509, X509Credential
from identity_ca.jwt import JwtCredential, PreparedJwt


class Order(NamedTuple):
    """What is about to be signed, by whose permission, for which call."""

    grant: Grant
    prepared: PreparedX509 | PreparedJwt
    correlation_id: str
    instance: str = ""


class Record:
    """Writes the ledger."""

    def __init__(self, store: Store, clock: Clock, *, unconfirmed_after: timedelta) -> None:
        self._store = store
        self._clock = clock
        self._unconfirmed_after = unconfirmed_after

    async def intend(self, orders: Sequence[Order], now: datetime) -> None:
        """Make the intents durable.

        Raises:
            StoreUnavailable: they may or may not be durable; nothing may be signed.
        """
        await self._store.ledger.intend([_intent(*order, now) for order in orders])

    def conclude(
        self,
        grants: Sequence[Grant],
        signed: Sequence[X509Credential | JwtCredential],
        now: datetime,
    ) -> None:
        """Queue the outcomes: issued."""
        self._store.ledger.conclude(
            [
                CredentialOutcome(_id(credential), credential.digest, now, grant.supersedes)
                for grant, credential in zip(grants, signed, strict=True)
            ]
        )

    async def sweep(self) -> int:
        """Mark intents without an outcome as UNCONFIRMED; return how many.

        Raises:
            StoreUnavailable: the database did not answer; what was marked by then stays so.
        """
        limit = self._clock.now() - self._unconfirmed_after

        def sweep(repos: Repositories) -> int:
            return repos.credentials.sweep_unconfirmed(limit, STEP)

        return await self._in_steps(sweep)

    async def expire(self) -> int:
        """Mark what is past its validity as EXPIRED; return how many.

        Raises:
            StoreUnavailable: the database did not answer; what was marked by then stays so.
        """
        now = self._clock.now()

        def expire(repos: Repositories) -> int:
            return repos.credentials.expire(now, STEP)

        return await self._in_steps(expire)

    async def _in_steps(self, step: Callable[[Repositories], int]) -> int:
        total = 0
        while True:
            changed = await self._store.write(step)
            total += changed
            if changed < STEP:
                return total


def _intent(
    grant: Grant,
    prepared: PreparedX509 | PreparedJwt,
    correlation_id: str,
    instance: str,
    now: datetime,
) -> CredentialIntent:
    if isinstance(prepared, PreparedX509):
        kind, identifier = CredentialKind.X509, prepared.serial
        fingerprint = prepared.key_fingerprint
    else:
        kind, identifier, fingerprint = CredentialKind.JWT, prepared.jti, ""
    return CredentialIntent(
        id=identifier,
        kind=kind,
        spiffe_id=prepared.spiffe_id,
        entry_id=grant.entry_id,
        entry_revision=grant.entry_revision,
        node_id=grant.node_id,
        authority_id=prepared.authority_id,
        key_fingerprint=fingerprint,
        tbs_digest=prepared.tbs_digest,
        not_before=prepared.not_before,
        not_after=prepared.not_after,
        recorded_at=now,
        correlation_id=correlation_id,
        instance=instance,
    )


def _id(credential: X509Credential | JwtCredential) -> str:
    return credential.serial if isinstance(credential, X509Credential) else credential.jti
