"""Watches what we publish about revocation, from outside, and raises an event when it is wrong.

- Every look compares lists, OCSP answers and the ledger as the database has it, not the memory that
  they are made from: see `server.probe`.
- What was revoked a moment ago may not have been published yet: it is left out, and whatever looks
  wrong is looked at a second time before anybody is woken.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from identity_broker.domain.clock import Clock
from identity_broker.domain.credential import (
    Credential,
    CredentialKind,
    CredentialState,
    Revocation,
)
from identity_broker.domain.events import AuditEvent, AuditKind
from identity_broker.domain.paging import CredentialFilter
from identity_broker.server.probe import Expected, Sighting, StatusProbe
from identity_broker.store import Repositories, Store
from identity_broker.telemetry.logs import get_logger
from identity_broker.telemetry.metrics import Metrics
from identity_ca.authority import Authority

_log = get_logger("status_watch")

# Publication takes a quarter of a second; a busy machine is given more.
_SETTLED: Final = timedelta(seconds=5)
_AGAIN_SECONDS: Final = 2.0
_SAMPLES: Final = 64
_ACTOR: Final = "status watch"


@dataclass(frozen=True, slots=True)
class _Ledger:
    """What the database says, beside the memory that lists and answers are made from."""

    revoked: list[Revocation]
    issued: Sequence[Credential]

    @classmethod
    def read(cls, repos: Repositories, now: datetime) -> _Ledger:
        issued = CredentialFilter(
            states=frozenset({CredentialState.ISSUED}), kind=CredentialKind.X509
        )
        return cls(
            repos.credentials.revoked_unexpired(now),
            repos.credentials.page(issued, "", _SAMPLES).items,
        )

    def expected(self, authority: Authority, now: datetime) -> Expected:
        return Expected(
            authority.id,
            authority.chain[0],
            frozenset(
                int(each.id, 16)
                for each in self.revoked
                if each.kind is CredentialKind.X509
                and each.authority_id == authority.id
                and each.revoked_at < now - _SETTLED
                and each.expires_at > now + _SETTLED
            ),
            tuple(
                int(each.id, 16)
                for each in self.issued
                if each.intent.authority_id == authority.id
                and each.intent.not_after > now + _SETTLED
            ),
            is_denied=not authority.trusted,
        )


class StatusWatch:
    """The job.

    Args:
        address: the broker's own HTTP listener; None until it is bound.
        authorities: the X.509 authorities whose lists are published.
    """

    def __init__(
        self,
        *,
        address: Callable[[], str | None],
        authorities: Callable[[], Sequence[Authority]],
        store: Store,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._address = address
        self._authorities = authorities
        self._store = store
        self._clock = clock
        self._metrics = metrics
        self._probe: StatusProbe | None = None
        self._wrong: frozenset[str] = frozenset()

    async def run(self) -> None:
        """Look at everything once.

        Raises:
            StoreUnavailable: the ledger cannot be read, so that nothing can be compared.
        """
        address = self._address()
        if address is None:
            return
        if self._probe is None:
            self._probe = StatusProbe(address)
        sightings = await self._look(self._probe)
        if any(each.problem for each in sightings):
            await asyncio.sleep(_AGAIN_SECONDS)
            sightings = await self._look(self._probe)
        for each in sightings:
            outcome = "wrong" if each.problem else "right"
            self._metrics.status_sightings_total.labels(outcome).inc()
        await self._tell([each for each in sightings if each.problem])

    async def _look(self, probe: StatusProbe) -> list[Sighting]:
        now = self._clock.now()
        ledger = await self._store.read(lambda repos: _Ledger.read(repos, now))
        sightings: list[Sighting] = []
        for authority in self._authorities():
            expected = ledger.expected(authority, now)
            sightings += await asyncio.to_thread(probe.look, expected, now)
        return sightings

    async def _tell(self, wrong: Sequence[Sighting]) -> None:
        """Write down what has become wrong since the last look."""
        before, self._wrong = self._wrong, frozenset(each.check for each in wrong)
        fresh = [each for each in wrong if each.check not in before]
        for each in fresh:
            _log.error("revocation status is wrong", check=each.check, detail=each.problem)
        if not fresh:
            return
        now = self._clock.now()

        def write(repos: Repositories) -> None:
            for each in fresh:
                repos.audit.append(
                    AuditEvent(
                        at=now,
                        kind=AuditKind.STATUS_DISAGREES,
                        actor=_ACTOR,
                        subject=each.check,
                        facts={"problem": each.problem[:512]},
                    )
                )

        await self._store.write(write)
