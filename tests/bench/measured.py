"""What a measurement gives: plain values, without a server or a clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Round:
    """One contender, one round.

    Attributes:
        per_second: credentials (calls, where none are issued) a second.
        server_cpu_us: the server process's CPU time for each of them, in microseconds.
        server_cores, generator_cores: CPU seconds a second.
    """

    per_second: float
    calls_per_second: float
    server_cpu_us: float
    server_cores: float
    generator_cores: float = 0.0
    generator_us_per_call: float = 0.0


@dataclass(frozen=True)
class Latencies:
    """Of calls due at fixed moments, from when each was due; in milliseconds."""

    calls_per_second: float
    calls: int
    p50: float
    p95: float
    p99: float
    longest: float
    unanswered: int

    @classmethod
    def of(cls, rate: float, seconds: Sequence[float], unanswered: int) -> Self:
        """From latencies in seconds; what was never answered counts as endless."""
        ordered = sorted(seconds) + [math.inf] * unanswered

        def at(share: float) -> float:
            if not ordered:
                return math.nan
            return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)] * 1000

        return cls(rate, len(ordered), at(0.5), at(0.95), at(0.99), at(1.0), unanswered)


@dataclass(frozen=True)
class Spread:
    """How long something took, many times over; in milliseconds."""

    samples: int
    p50: float
    p95: float
    p99: float
    longest: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Self:
        """From seconds."""
        found = Latencies.of(0.0, seconds, 0)
        return cls(found.calls, found.p50, found.p95, found.p99, found.longest)
