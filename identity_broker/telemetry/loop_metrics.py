"""A counter and a histogram for the event loop's thread: prometheus_client's without the locks.

- Every call passes here; a lock and a linear search for each would be a quarter of the pipeline.
- Only the event loop's thread may count. Any thread may collect: it sees whole numbers, at worst
  a call apart.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry


class LoopCount:
    """One series of a `LoopCounter`."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def inc(self) -> None:
        """Count one."""
        self.value += 1


class LoopCounter(Collector):
    """A counter with labels; `name` without "_total"."""

    def __init__(
        self, name: str, documentation: str, labels: Sequence[str], registry: CollectorRegistry
    ) -> None:
        self.name, self.documentation, self.label_names = name, documentation, tuple(labels)
        self._series: dict[tuple[str, ...], LoopCount] = {}
        registry.register(self)

    def labels(self, *values: str) -> LoopCount:
        """The series of these label values; keep it where it is used often."""
        found = self._series.get(values)
        if found is None:
            found = self._series[values] = LoopCount()
        return found

    def describe(self) -> Iterable[Metric]:
        """The family without its series."""
        return [CounterMetricFamily(self.name, self.documentation, labels=self.label_names)]

    def collect(self) -> Iterable[Metric]:
        """The family with its series."""
        family = CounterMetricFamily(self.name, self.documentation, labels=self.label_names)
        for values, series in list(self._series.items()):
            family.add_metric(values, series.value)
        return [family]


class LoopTimes:
    """One series of a `LoopHistogram`."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        """Count one call that took so long."""
        self.counts[bisect_left(self._bounds, seconds)] += 1
        self.total += seconds


class LoopHistogram(Collector):
    """A histogram with labels; `bounds` are the upper ends of its buckets, rising."""

    def __init__(
        self,
        name: str,
        documentation: str,
        labels: Sequence[str],
        bounds: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:
        self.name, self.documentation, self.label_names = name, documentation, tuple(labels)
        self._bounds = tuple(bounds)
        self._series: dict[tuple[str, ...], LoopTimes] = {}
        registry.register(self)

    def labels(self, *values: str) -> LoopTimes:
        """The series of these label values; keep it where it is used often."""
        found = self._series.get(values)
        if found is None:
            found = self._series[values] = LoopTimes(self._bounds)
        return found

    def describe(self) -> Iterable[Metric]:
        """The family without its series."""
        return [HistogramMetricFamily(self.name, self.documentation, labels=self.label_names)]

    def collect(self) -> Iterable[Metric]:
        """The family with its series."""
        family = HistogramMetricFamily(self.name, self.documentation, labels=self.label_names)
        ends = [*(str(bound) for bound in self._bounds), "+Inf"]
        for values, series in list(self._series.items()):
            below, buckets = 0, []
            for end, count in zip(ends, series.counts, strict=True):
                below += count
                buckets.append((end, below))
            family.add_metric(values, buckets=buckets, sum_value=series.total)
        return [family]
