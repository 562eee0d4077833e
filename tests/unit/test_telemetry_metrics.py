from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import generate_latest

from identity_broker.telemetry.loop_metrics import LoopCounter, LoopHistogram

BOUNDS = (0.001, 0.01, 0.1, 1.0)


def lines(registry: CollectorRegistry) -> list[str]:
    """The samples; creation times differ by nature."""
    text = generate_latest(registry).decode().splitlines()
    return [line for line in text if "_created" not in line]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([*BOUNDS, 0.0, 0.5, 7.0]))))
def test_what_is_shown_is_what_prometheus_client_would_show(calls: list[tuple[str, float]]) -> None:
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    their_count = Counter("x_total", "count", ("m",), registry=theirs)
    their_times = Histogram("t_seconds", "times", ("m",), buckets=BOUNDS, registry=theirs)
    our_count = LoopCounter("x", "count", ("m",), ours)
    our_times = LoopHistogram("t_seconds", "times", ("m",), BOUNDS, ours)
    for method, seconds in calls:
        for count in (their_count.labels(method), our_count.labels(method)):
            count.inc()
        for times in (their_times.labels(method), our_times.labels(method)):
            times.observe(seconds)
    assert lines(ours) == lines(theirs)
