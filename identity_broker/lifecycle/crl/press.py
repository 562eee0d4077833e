"""Makes one list: entries, a number, the times and a signature.

- No list is signed while it is not known what was revoked: a fresh time would say that it is.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta

from identity_broker.domain.clock import Clock
from identity_broker.lifecycle.crl.document import ListDocument, ListKind
from identity_broker.lifecycle.crl.numbers import ListNumbers
from identity_broker.signing import Signing
from identity_broker.signing.crl import sign_list
from identity_broker.telemetry.metrics import Metrics
from identity_ca.authority import Authority
from identity_ca.distribution import DistributionPoints, Shard

# Verifiers' clocks differ: as for certificates.
BACKDATE = timedelta(seconds=10)


class ListPress:
    """Signs lists of any authority.

    Args:
        up_to_date: raises StoreUnavailable while there may be revocations that nobody told us of.
        validity: from a list's making to its next update.
        points: what the lists' addresses are; None when there is no public one.

    Attributes:
        busy_seconds: of CPU time, that the last list took.
    """

    def __init__(
        self,
        *,
        signing: Signing,
        numbers: ListNumbers,
        up_to_date: Callable[[], Awaitable[None]],
        clock: Clock,
        validity: timedelta,
        points: DistributionPoints | None,
        metrics: Metrics,
    ) -> None:
        self._signing = signing
        self._numbers = numbers
        self._up_to_date = up_to_date
        self._clock = clock
        self._metrics = metrics
        self.validity = validity
        self.points = points
        self.busy_seconds = 0.0

    def now(self) -> datetime:
        """The time by which lists are made."""
        return self._clock.now()

    def is_fresh(self, document: ListDocument | None) -> bool:
        """Whether less than half of a list's life is over."""
        if document is None:
            return False
        # A clock that was set back would keep it for longer than its validity.
        return document.built_at <= self._clock.now() < document.built_at + self.validity / 2

    async def print(
        self,
        authority: Authority,
        kind: ListKind,
        encoded_entries: Sequence[bytes],
        count: int,
        *,
        shard: Shard | None = None,
        base_number: int | None = None,
    ) -> ListDocument:
        """A new list of `count` entries.

        Raises:
            AuthorityUnavailable: its key is lost.
            StoreUnavailable, SigningBackendUnavailable: not now.
            PolicyViolation, InvariantViolated: the authority may not sign lists.
        """
        await self._up_to_date()
        started = time.perf_counter()
        number = await self._numbers.next(authority.id)
        now = self._clock.now()
        signed = await sign_list(
            self._signing,
            authority,
            encoded_entries=encoded_entries,
            number=number,
            this_update=now - BACKDATE,
            next_update=now + self.validity,
            scope_url=self._scope_url(authority.id, shard),
            base_number=base_number,
            delta_url=self._delta_url(authority.id, kind),
        )
        self.busy_seconds = signed.busy_seconds
        self._metrics.crl_seconds.labels(kind.value).observe(time.perf_counter() - started)
        return ListDocument(
            authority_id=authority.id,
            kind=kind,
            der=signed.der,
            number=number,
            built_at=now,
            this_update=now - BACKDATE,
            next_update=now + self.validity,
            entries=count,
            base_number=base_number,
        )

    def _scope_url(self, authority_id: str, shard: Shard | None) -> str:
        if shard is None or self.points is None:
            return ""
        return self.points.shard_url(authority_id, shard)

    def _delta_url(self, authority_id: str, kind: ListKind) -> str:
        if kind is not ListKind.FULL or self.points is None:
            return ""
        return self.points.delta_url(authority_id)
