from __future__ import annotations

from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity_broker.domain.caller import Caller, CallerClass, LocalPeer
from identity_broker.errors import RateLimited
from identity_broker.server.rpc.limits import RateLimiter, network_of
from identity_broker.server.rpc.methods import Rate, RateName
from identity_ca.spiffe_id import SpiffeId


class Hands:
    """A clock moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def node(name: str) -> Caller:
    spiffe_id = SpiffeId.parse(f"spiffe://example.org/idb/node/x/{name}")
    return Caller(frozenset({CallerClass.NODE}), str(spiffe_id), spiffe_id)


ANYONE = Caller(frozenset({CallerClass.ANYONE}), "ipv4:10.0.0.1:5")


def test_a_burst_then_the_rate() -> None:
    clock = Hands()
    limiter = RateLimiter({RateName.ISSUE: Rate(10, 5)}, monotonic=clock)
    for _ in range(5):
        limiter.charge(node("a"), "", "m", RateName.ISSUE)
    with pytest.raises(RateLimited) as refused:
        limiter.charge(node("a"), "", "m", RateName.ISSUE)
    assert refused.value.retry_after == pytest.approx(0.1)
    clock.now += refused.value.retry_after or 0
    limiter.charge(node("a"), "", "m", RateName.ISSUE)
    clock.now += 100
    for _ in range(5):
        limiter.charge(node("a"), "", "m", RateName.ISSUE)


def test_callers_and_methods_have_budgets_of_their_own() -> None:
    limiter = RateLimiter({RateName.READ: Rate(1, 1)}, monotonic=Hands())
    limiter.charge(node("a"), "", "m", RateName.READ)
    limiter.charge(node("b"), "", "m", RateName.READ)
    limiter.charge(node("a"), "", "other", RateName.READ)
    local = Caller(frozenset({CallerClass.LOCAL}), "uid:0", local=LocalPeer(1, 0, 0))
    limiter.charge(local, "unix-abstract:1", "m", RateName.READ)
    with pytest.raises(RateLimited):
        limiter.charge(local, "unix-abstract:2", "m", RateName.READ)


def test_strangers_are_known_by_address_not_by_port() -> None:
    limiter = RateLimiter({RateName.ATTEST: Rate(1, 1)}, monotonic=Hands())
    limiter.charge(ANYONE, "ipv4:10.0.0.1:1111", "m", RateName.ATTEST)
    with pytest.raises(RateLimited):
        limiter.charge(ANYONE, "ipv4:10.0.0.1:2222", "m", RateName.ATTEST)
    limiter.charge(ANYONE, "ipv4:10.0.0.2:1111", "m", RateName.ATTEST)


@pytest.mark.parametrize(
    ("peer", "network"),
    [
        ("ipv4:127.0.0.1:50000", "127.0.0.1"),
        ("ipv6:%5B2001:db8::1%5D:443", "2001:db8::/64"),
        ("ipv6:[2001:db8:0:0:ffff::9]:443", "2001:db8::/64"),
        ("ipv6:[::ffff:10.1.2.3]:443", "10.1.2.3"),
        ("ipv6:[fe80::1%25eth0]:1", "fe80::/64"),
        ("ipv6:nonsense", "nonsense"),
        ("unix:", "unix:"),
        ("", ""),
    ],
)
def test_network_of(peer: str, network: str) -> None:
    assert network_of(peer) == network


def test_a_refused_batch_takes_nothing() -> None:
    limiter = RateLimiter({RateName.ISSUE: Rate(1, 10)}, monotonic=Hands())
    limiter.charge(node("a"), "", "m", RateName.ISSUE, 6)
    with pytest.raises(RateLimited):
        limiter.charge(node("a"), "", "m", RateName.ISSUE, 5)
    limiter.charge(node("a"), "", "m", RateName.ISSUE, 4)


def test_memory_is_bounded_and_strangers_do_not_push_nodes_out() -> None:
    limiter = RateLimiter({RateName.ATTEST: Rate(0.001, 1)}, monotonic=Hands(), capacity=100)
    limiter.charge(node("a"), "", "m", RateName.ATTEST)
    for n in range(1000):
        limiter.charge(ANYONE, f"ipv4:10.0.{n // 250}.{n % 250}:1", "m", RateName.ATTEST)
    assert len(limiter) == 101
    with pytest.raises(RateLimited):
        limiter.charge(node("a"), "", "m", RateName.ATTEST)


def test_a_name_without_a_rate_is_not_limited() -> None:
    limiter = RateLimiter({}, monotonic=Hands())
    for _ in range(1000):
        limiter.charge(ANYONE, "", "m", RateName.READ)
    assert len(limiter) == 0


@given(
    st.lists(st.tuples(st.floats(0, 2), st.integers(1, 5)), max_size=60),
    st.integers(1, 20),
    st.integers(5, 20),
)
def test_no_window_admits_more_than_burst_plus_rate(
    steps: list[tuple[float, int]], rate: int, burst: int
) -> None:
    clock = Hands()
    limiter = RateLimiter({RateName.READ: Rate(rate, burst)}, monotonic=clock)
    admitted: list[tuple[float, int]] = []
    waits: list[tuple[float, int]] = []
    for wait, cost in steps:
        clock.now += wait
        try:
            limiter.charge(node("a"), "", "m", RateName.READ, cost)
        except RateLimited as exc:
            waits.append((exc.retry_after or 0.0, cost))
        else:
            admitted.append((clock.now, cost))
    assert all(0 < wait <= cost / rate + 0.11 for wait, cost in waits)
    for start, (begun, _) in enumerate(admitted):
        spent = 0
        for at, cost in admitted[start:]:
            spent += cost
            assert spent <= burst + rate * (at - begun) + 1e-6


def test_strangers_hold_few_streams_and_identities_are_not_counted() -> None:
    limiter = RateLimiter({}, anonymous_streams=2, anonymous_streams_together=3)
    with ExitStack() as held:
        first = held.enter_context(ExitStack())
        first.enter_context(limiter.stream(ANYONE, "ipv4:10.0.0.1:1"))
        held.enter_context(limiter.stream(ANYONE, "ipv4:10.0.0.1:2"))
        with pytest.raises(RateLimited) as refused:
            held.enter_context(limiter.stream(ANYONE, "ipv4:10.0.0.1:3"))
        assert refused.value.retry_after
        held.enter_context(limiter.stream(ANYONE, "ipv4:10.0.0.2:1"))
        with pytest.raises(RateLimited):
            held.enter_context(limiter.stream(ANYONE, "ipv4:10.0.0.3:1"))
        for _ in range(5):
            held.enter_context(limiter.stream(node("a"), "ipv4:10.0.0.1:4"))
        first.close()
        held.enter_context(limiter.stream(ANYONE, "ipv4:10.0.0.3:1"))
    assert not limiter._streams
