"""Calls refused for who the caller is, on their way to the audit.

- The audit is append-only, and anybody can be refused: what may be written has a budget, for each
  caller and for all of them together. What is beyond it is counted in one log line.
- Strangers and proven callers have budgets and room of their own: no number of strangers keeps a
  banned node's call out of the audit.
- A refusal is put in memory and never slows a call down; like ones become one row.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from identity_broker.domain.buckets import Buckets
from identity_broker.domain.clock import Clock
from identity_broker.domain.events import AuditEvent, AuditKind
from identity_broker.errors import BrokerError
from identity_broker.server.rpc.methods import Rate
from identity_broker.server.rpc.pipeline import RefusedCall
from identity_broker.store import Repositories, Store
from identity_broker.telemetry.logs import get_logger

_log = get_logger("refusals")


@dataclass(frozen=True, slots=True)
class Budget:
    """Rows of the audit: what one caller may cause, and all of them together."""

    each: Rate
    together: Rate


# At its limit, a year of strangers is about two million rows.
STRANGERS: Final = Budget(Rate(1 / 60, 10), Rate(1 / 15, 200))
PROVEN: Final = Budget(Rate(1 / 10, 60), Rate(10, 2000))
_MOST_ROWS: Final = 10_000  # held while the store is away


class Refusals:
    """Collects refusals and writes them to the audit once a second.

    Args:
        monotonic: seconds that only grow.
    """

    def __init__(
        self, store: Store, clock: Clock, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._clock = clock
        self._strangers = _Collected(STRANGERS, monotonic)
        self._proven = _Collected(PROVEN, monotonic)

    def put(self, refused: RefusedCall) -> None:
        """Count a refusal. Never blocks."""
        (self._proven if refused.proven else self._strangers).put(refused)

    async def flush(self) -> None:
        """Write what was collected.

        Raises:
            StoreUnavailable: it is kept for the next time.
        """
        collected = (self._proven, self._strangers)
        for name, part in zip(("identities", "strangers"), collected, strict=True):
            if part.unlisted:
                _log.warning("refusals not audited one by one", caller=name, count=part.unlisted)
                part.unlisted = 0
        rows = [part.taken() for part in collected]
        now = self._clock.now()
        events = [
            AuditEvent(
                at=now,
                kind=AuditKind.CALL_REFUSED,
                actor=row.last.caller,
                subject=row.last.method,
                reason=row.last.reason,
                correlation_id=row.last.correlation_id,
                facts={"count": str(row.count)},
            )
            for part in rows
            for row in part.values()
        ]
        if not events:
            return

        def write(repos: Repositories) -> None:
            for event in events:
                repos.audit.append(event)

        try:
            await self._store.write(write)
        except BrokerError:
            for part, kept in zip(collected, rows, strict=True):
                part.put_back(kept)
            raise


@dataclass(slots=True)
class _Row:
    """Like refusals: how many there were, and the last of them."""

    last: RefusedCall
    count: int


_Key = tuple[str, str, str]


class _Collected:
    """Rows of one sort of callers, within their budget."""

    def __init__(self, budget: Budget, monotonic: Callable[[], float]) -> None:
        self._budget = budget
        self._monotonic = monotonic
        self._rows: dict[_Key, _Row] = {}
        self._each: Buckets[str] = Buckets()
        self._together: Buckets[str] = Buckets(1)
        self.unlisted = 0

    def put(self, refused: RefusedCall) -> None:
        key = (refused.method, refused.caller, refused.reason)
        row = self._rows.get(key)
        if row is not None:
            row.last, row.count = refused, row.count + 1
        elif len(self._rows) < _MOST_ROWS and self._charge(refused.caller):
            self._rows[key] = _Row(refused, 1)
        else:
            self.unlisted += 1

    def taken(self) -> dict[_Key, _Row]:
        rows, self._rows = self._rows, {}
        return rows

    def put_back(self, rows: dict[_Key, _Row]) -> None:
        """Rows that could not be written: paid for, and as many as the budget allowed."""
        for key, row in rows.items():
            newer = self._rows.get(key)
            if newer is None:
                self._rows[key] = row
            else:
                newer.count += row.count

    def _charge(self, caller: str) -> bool:
        now = self._monotonic()
        budget = self._budget
        return _took(self._each, caller, budget.each, now) and _took(
            self._together, "", budget.together, now
        )


def _took(buckets: Buckets[str], key: str, rate: Rate, now: float) -> bool:
    return not buckets.take(key, 1 / rate.per_second, rate.burst / rate.per_second, now)
