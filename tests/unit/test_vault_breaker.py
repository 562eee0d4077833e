"""The circuit breaker, with a clock of its own."""

from __future__ import annotations

import pytest

from identity_ca.backends.vault.breaker import CircuitBreaker
from identity_ca.backends.vault.wire import VaultUnavailable


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> CircuitBreaker:
    return CircuitBreaker(1.0, clock=clock)


SEALED = VaultUnavailable("OpenBao is sealed", hint="unseal it", status=503, sealed=True)


def refusal(breaker: CircuitBreaker) -> VaultUnavailable:
    with pytest.raises(VaultUnavailable) as refused:
        breaker.enter(patience=10)
    return refused.value


def test_a_working_server_is_asked_by_everybody(breaker):
    assert [breaker.enter(patience=10) for _ in range(5)] == [False] * 5


def test_after_a_failure_everybody_is_refused_with_its_reason(breaker, clock):
    breaker.failed(SEALED)
    clock.now += 0.4
    refused = refusal(breaker)
    assert (refused.message, refused.hint, refused.sealed) == (
        "OpenBao is sealed",
        "unseal it",
        True,
    )
    assert refused.retry_after == pytest.approx(0.6)


def test_one_caller_probes_when_the_time_is_up(breaker, clock):
    breaker.failed(SEALED)
    clock.now += 1
    assert breaker.enter(patience=10) is True
    refused = refusal(breaker)
    assert refused.retry_after is not None
    assert refused.retry_after > 0


def test_a_probe_that_succeeds_closes_it(breaker, clock):
    breaker.failed(SEALED)
    clock.now += 1
    breaker.enter(patience=10)
    breaker.succeeded()
    assert breaker.enter(patience=10) is False


def test_a_probe_that_fails_opens_it_again(breaker, clock):
    breaker.failed(SEALED)
    clock.now += 1
    breaker.enter(patience=10)
    breaker.failed(VaultUnavailable("gone"))
    assert refusal(breaker).message == "gone"
    clock.now += 1
    assert breaker.enter(patience=10) is True


def test_a_probe_that_never_reports_is_given_up(breaker, clock):
    breaker.failed(SEALED)
    clock.now += 1
    breaker.enter(patience=10)
    clock.now += 9.9
    refusal(breaker)
    clock.now += 0.2
    assert breaker.enter(patience=10) is True


@pytest.mark.parametrize(("asked", "pause"), [(7.0, 7.0), (0.2, 1.0), (3600.0, 30.0)])
def test_a_rate_limit_keeps_it_open_as_long_as_the_server_asks(breaker, clock, asked, pause):
    breaker.failed(VaultUnavailable("slower", status=429, retry_after=asked))
    clock.now += pause - 0.01
    refusal(breaker)
    clock.now += 0.02
    assert breaker.enter(patience=10) is True
