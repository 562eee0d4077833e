"""OpenBao sealed, gone, slow, or failing: what callers see, how soon, and the way back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from identity_ca.backends.vault.session import VaultSession, VaultUnavailable
from identity_ca.backends.vault.transit import TransitKey, TransitKeyManager
from identity_ca.errors import BackendUnavailable
from identity_ca.keys import KeyAlgorithm, verify_signature
from support.openbao import Fault, FaultProxy, OpenSession, VaultSite

pytestmark = pytest.mark.openbao

MESSAGE = b"to be signed"
AT_ONCE = 0.3
"""Seconds; generous, for a busy machine. A call that waits takes at least its timeout."""


@pytest.fixture
def session(
    vault_site: VaultSite, open_session: OpenSession, fault_proxy: FaultProxy
) -> VaultSession:
    return open_session(auth=vault_site.auth(), address=fault_proxy.address, timeout=1.5)


@pytest.fixture
def key(vault_site, session) -> TransitKey:
    keys = TransitKeyManager(session, mount=vault_site.layout.transit_mount)
    made = keys.create("x509", KeyAlgorithm.EC_P256)
    made.sign(MESSAGE)
    return made


def failure_of(call: Callable[[], object]) -> tuple[VaultUnavailable, float]:
    """What the call failed with, and how long it took."""
    began = time.monotonic()
    with pytest.raises(VaultUnavailable) as failed:
        call()
    took = time.monotonic() - began
    assert isinstance(failed.value, BackendUnavailable)
    assert failed.value.retry_after is not None
    assert 0 < failed.value.retry_after <= 30
    return failed.value, took


def recovers(key: TransitKey, within: float = 4.0) -> float:
    """Seconds until it signs again, called as a broker under load would."""
    began = time.monotonic()
    while True:
        try:
            signature = key.sign(MESSAGE)
        except BackendUnavailable:
            assert time.monotonic() - began < within, "it did not recover"
            time.sleep(0.02)
        else:
            verify_signature(key.public_key, signature, MESSAGE)
            return time.monotonic() - began


def test_sealed(key, session, openbao):
    openbao.seal()
    try:
        failure, took = failure_of(lambda: key.sign(MESSAGE))
        assert failure.message == "OpenBao is sealed"
        assert "unseal" in failure.hint
        assert took < 1
        again, took = failure_of(lambda: key.sign(MESSAGE))
        assert again.message == "OpenBao is sealed"
        assert again.sealed
        assert took < AT_ONCE
        health = session.health(datetime.now(UTC))
        assert health.sealed
        assert health.initialized
    finally:
        openbao.unseal()
    assert recovers(key) < 3


def test_sealed_at_the_first_login(vault_site, open_session, openbao):
    session = open_session(auth=vault_site.auth())
    openbao.seal()
    try:
        failure, _ = failure_of(lambda: session.get("sys/mounts"))
        assert failure.message == "OpenBao is sealed"
    finally:
        openbao.unseal()


def test_killed_and_started_again(vault_site, open_session, openbao):
    """The same keys and the same token afterwards: storage is on disk."""
    session = open_session(auth=vault_site.auth())
    keys = TransitKeyManager(session, mount=vault_site.layout.transit_mount)
    key = keys.create("x509", KeyAlgorithm.EC_P256)
    openbao.kill()
    try:
        failure, took = failure_of(lambda: key.sign(MESSAGE))
        assert took < 1.5
        assert failure.message in {
            "OpenBao cannot be reached",
            "the connection to OpenBao broke",
        }
        failure_of(lambda: session.health(datetime.now(UTC)))
    finally:
        openbao.start()
    assert recovers(key) < 3
    assert keys.load(key.key_id).key_id == key.key_id


def test_gone(key, fault_proxy):
    fault_proxy.stop()
    _, took = failure_of(lambda: key.sign(MESSAGE))
    assert took < 1.5
    for _ in range(20):
        _, took = failure_of(lambda: key.sign(MESSAGE))
        assert took < AT_ONCE
    fault_proxy.start()
    assert recovers(key) < 3


def test_slow(key, fault_proxy):
    """One caller waits its time; those after it do not."""
    fault_proxy.inject(Fault(match="/sign/", delay=3))
    failure, took = failure_of(lambda: key.sign(MESSAGE))
    assert failure.message == "OpenBao did not answer in time"
    assert 1.4 < took < 2.5
    failure, took = failure_of(lambda: key.sign(MESSAGE))
    assert failure.message == "OpenBao did not answer in time"
    assert took < AT_ONCE
    fault_proxy.clear()
    assert recovers(key) < 3


def test_an_answer_that_drips_in_is_not_waited_for(key, fault_proxy):
    """Every byte comes in time, the whole never does."""
    fault_proxy.inject(Fault(match="/sign/", drip=0.05))
    failure, took = failure_of(lambda: key.sign(MESSAGE))
    assert failure.message == "OpenBao did not answer in time"
    assert took < 4


@pytest.mark.parametrize(
    ("status", "error", "sentence"),
    [
        (429, "rate limit quota exceeded", "OpenBao limits the rate of our calls"),
        (500, "internal error", "OpenBao failed to answer"),
        (500, "local node not active but active cluster node not found", "OpenBao has no active"),
        (501, "", "OpenBao is not initialised"),
        (502, "", "OpenBao failed to answer"),
        (503, "Vault is sealed", "OpenBao is sealed"),
        (503, "", "OpenBao failed to answer"),
    ],
)
def test_an_error_status(key, fault_proxy, status, error, sentence):
    fault_proxy.inject(Fault(match="/sign/", status=status, errors=(error,)))
    failure, took = failure_of(lambda: key.sign(MESSAGE))
    assert failure.message.startswith(sentence)
    assert failure.status == status
    assert took < (2 if status == 429 else 1)
    _, took = failure_of(lambda: key.sign(MESSAGE))
    assert took < AT_ONCE
    fault_proxy.clear()
    assert recovers(key) < 3


def test_a_500_about_one_call_does_not_stop_the_others(key, session, vault_site, fault_proxy):
    session.get(f"{vault_site.layout.transit_mount}/keys/idb-jwt")
    fault_proxy.inject(Fault(match="/keys/idb-jwt", status=500, errors=("of this key",)))
    for _ in range(3):
        failure_of(lambda: session.get(f"{vault_site.layout.transit_mount}/keys/idb-jwt"))
        key.sign(MESSAGE)


def test_a_dead_server_is_asked_by_one_caller_a_second(key, fault_proxy):
    """The breaker: 16 threads calling all the time cause a handful of connections."""
    fault_proxy.inject(Fault(match="/sign/", status=503, errors=("Vault is sealed",)))
    failure_of(lambda: key.sign(MESSAGE))
    before = len(fault_proxy.seen)
    until = time.monotonic() + 2.2
    failed: list[int] = []

    def call() -> None:
        count = 0
        while time.monotonic() < until:
            try:
                key.sign(MESSAGE)
            except BackendUnavailable:
                count += 1
            time.sleep(0.005)
        failed.append(count)

    threads = [threading.Thread(target=call) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failed) == 16
    assert sum(failed) > 200
    assert 1 <= len(fault_proxy.seen) - before <= 3


def test_many_threads_share_a_session(key, fault_proxy):
    """Each signature belongs to the message of its thread."""
    wrong: list[object] = []

    def sign(number: int) -> None:
        for turn in range(10):
            message = f"{number}.{turn}".encode()
            try:
                verify_signature(key.public_key, key.sign(message), message)
            except Exception as exc:
                wrong.append(exc)
                raise

    threads = [threading.Thread(target=sign, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_closing_ends_a_wait(key, session, fault_proxy):
    fault_proxy.inject(Fault(match="/sign/", status=429, headers={"Retry-After": "1"}))
    threading.Timer(0.2, session.close).start()
    began = time.monotonic()
    with pytest.raises(BackendUnavailable):
        key.sign(MESSAGE)
    assert time.monotonic() - began < 0.9


def test_connections_are_used_again(key, fault_proxy):
    before = fault_proxy.connections
    for _ in range(3):
        key.sign(MESSAGE)
        key.sign_many([MESSAGE] * 300)  # an answer of several reads
    assert fault_proxy.connections == before
