"""Who has a revocation, counted: what is reported of it, and stated.

- The objective is about verifiers that were connected at the commit or came since, and were not
  sent away by the broker. Who was away is named, and neither speaks for it nor against it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from identity_broker.lifecycle.verifiers import Verifier

OBJECTIVE = timedelta(seconds=1)
"""In this time 99 % of the connected verifiers are to have acknowledged."""

UNKNOWN_MS = -1
UNKNOWN_PERMILLE = -1


class VerifierState(StrEnum):
    """What became of a verifier."""

    ACKNOWLEDGED = "acknowledged"
    SILENT = "silent"  # connected, and has not
    GONE = "gone"  # was connected at the commit, is not now, and has not
    AWAY = "away"  # not connected at the commit; may still hold what was revoked


@dataclass(frozen=True, slots=True)
class VerifierStanding:
    """Whether one verifier has a revocation.

    Attributes:
        acknowledged_at: when it said so; None where this process has not seen it.
        latency_ms: from the commit; -1 where this process has not seen both.
        is_judged: whether the objective is about it: it was connected, and was not sent away.
    """

    verifier: Verifier
    state: VerifierState
    acknowledged_at: datetime | None = None
    latency_ms: int = UNKNOWN_MS
    is_judged: bool = True


@dataclass(frozen=True, slots=True)
class PropagationReport:
    """Who has a revocation.

    Attributes:
        verifiers: those connected at its commit or now, and who is away; the silent ones first,
            then those away, then who is gone.
        acknowledged, silent, gone, away: how many of them.
        p50_ms, p99_ms: of the latencies known, of those connected at the commit; -1 where there is
            none.
        within_objective_permille: how many were within the objective, of those it is about: whose
            latency is known, and who is silent or gone; -1 where there are none.
    """

    verifiers: tuple[VerifierStanding, ...]
    acknowledged: int
    silent: int
    gone: int
    away: int
    p50_ms: int
    p99_ms: int
    within_objective_permille: int

    @property
    def told(self) -> int:
        """How many were to be told, or are connected now: all but those away."""
        return len(self.verifiers) - self.away

    @classmethod
    def of(cls, standings: Sequence[VerifierStanding]) -> PropagationReport:
        """Count and order them."""
        ordered = sorted(standings, key=lambda one: (_FIRST[one.state], one.verifier.label))
        judged = [one for one in ordered if one.is_judged]
        latencies = sorted(one.latency_ms for one in judged if one.latency_ms >= 0)
        counts = {state: sum(one.state is state for one in ordered) for state in VerifierState}
        limit = OBJECTIVE // timedelta(milliseconds=1)
        within = sum(one <= limit for one in latencies)
        lacking = (VerifierState.SILENT, VerifierState.GONE)
        number = len(latencies) + sum(one.state in lacking for one in judged)
        return cls(
            verifiers=tuple(ordered),
            acknowledged=counts[VerifierState.ACKNOWLEDGED],
            silent=counts[VerifierState.SILENT],
            gone=counts[VerifierState.GONE],
            away=counts[VerifierState.AWAY],
            p50_ms=_percentile(latencies, 50),
            p99_ms=_percentile(latencies, 99),
            within_objective_permille=1000 * within // number if number else UNKNOWN_PERMILLE,
        )


_FIRST = {
    VerifierState.SILENT: 0,
    VerifierState.AWAY: 1,
    VerifierState.GONE: 2,
    VerifierState.ACKNOWLEDGED: 3,
}


def _percentile(ordered: Sequence[int], percent: int) -> int:
    """The nearest rank; -1 of nothing."""
    return ordered[math.ceil(len(ordered) * percent / 100) - 1] if ordered else UNKNOWN_MS
