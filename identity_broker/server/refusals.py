"""Calls refused for who the caller is, on their way to the audit.

- Bounded: a flood of refusals is counted, not stored line by line, and never slows a call down.
"""

from __future__ import annotations

from collections import Counter

from identity_broker.domain.clock import Clock
from identity_broker.domain.events import AuditEvent, AuditKind
from identity_broker.errors import BrokerError
from identity_broker.server.rpc.pipeline import RefusedCall
from identity_broker.store import Repositories, Store
from identity_broker.telemetry.logs import get_logger

_log = get_logger("refusals")

_MOST_DISTINCT = 1000


class Refusals:
    """Collects refusals and writes them to the audit once a second."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self._last: dict[tuple[str, str, str], RefusedCall] = {}
        self._unlisted = 0

    def put(self, refused: RefusedCall) -> None:
        """Count a refusal. Never blocks."""
        key = (refused.method, refused.caller, refused.reason)
        if key not in self._counts and len(self._counts) >= _MOST_DISTINCT:
            self._unlisted += 1
            return
        self._counts[key] += 1
        self._last[key] = refused

    async def flush(self) -> None:
        """Write what was collected.

        Raises:
            StoreUnavailable: it is kept for the next time.
        """
        if not self._counts:
            return
        counts, last, unlisted = self._counts, self._last, self._unlisted
        self._counts, self._last, self._unlisted = Counter(), {}, 0
        now = self._clock.now()
        events = [
            AuditEvent(
                at=now,
                kind=AuditKind.CALL_REFUSED,
                actor=refused.caller,
                subject=refused.method,
                reason=refused.reason,
                correlation_id=refused.correlation_id,
                facts={"count": str(counts[key])},
            )
            for key, refused in last.items()
        ]

        def write(repos: Repositories) -> None:
            for event in events:
                repos.audit.append(event)

        try:
            await self._store.write(write)
        except BrokerError:
            for key, refused in last.items():
                for _ in range(counts[key]):
                    self.put(refused)
            raise
        if unlisted:
            _log.warning("refusals not audited one by one", count=unlisted)
