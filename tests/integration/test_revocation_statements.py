"""Closing orders: what is stated, what delays it, and that it happens once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity_broker.domain.credential import RevocationReason
from identity_broker.domain.events import AuditKind
from identity_broker.domain.revocation import OrderState, RevocationOrder, SubjectKind
from identity_broker.domain.selection import subject
from identity_broker.errors import SigningBackendUnavailable, StoreUnavailable
from identity_broker.lifecycle import statement as module
from identity_broker.lifecycle.feed import RevocationFeed
from identity_broker.lifecycle.propagation import Propagation
from identity_broker.lifecycle.propagation_report import (
    PropagationReport,
    VerifierStanding,
    VerifierState,
)
from identity_broker.lifecycle.revoke import OrderRequest
from identity_broker.lifecycle.statement import RevokedIds, Statements, compose
from identity_broker.lifecycle.verifiers import Verifier, VerifierKind, Verifiers
from identity_broker.store import Store
from identity_ca.backends.memory import MemoryKeyManager
from identity_ca.errors import BackendUnavailable
from identity_ca.keys import SigningKey
from identity_ca.statement import verify_statement
from support.store import SettableClock, of, sqlite_url
from support.verbs import DOMAIN, OPERATOR, START, Parts

NOW = datetime(2030, 1, 1, 12, 0, 0, 123_456, tzinfo=UTC)


class AbsentKeys(MemoryKeyManager):
    """Keys whose manager can be away."""

    away = False

    def load(self, key_id: str) -> SigningKey:
        if self.away:
            raise BackendUnavailable("the key manager is away")
        return super().load(key_id)


class Closing:
    """A broker's parts that close orders, without its jobs."""

    def __init__(self, parts: Parts, keys: AbsentKeys) -> None:
        self.parts, self.keys = parts, keys
        self.seconds = 0.0
        self.verifiers = Verifiers()
        feed = RevocationFeed(parts.directory, self.verifiers)
        self.propagation = Propagation(
            self.verifiers, parts.directory, parts.clock, needed=feed.needed
        )
        self.statements = self.new()
        parts.revoke.on_committed += [
            self.propagation.begun,
            self.statements.committed,
        ]

    def new(self) -> Statements:
        return Statements(
            store=self.parts.store,
            signing=self.parts.signing,
            propagation=self.propagation,
            clock=self.parts.clock,
            acknowledge_timeout=timedelta(seconds=10),
            monotonic=lambda: self.seconds,
        )

    def pass_time(self, seconds: float) -> None:
        self.seconds += seconds
        self.parts.clock.time += timedelta(seconds=seconds)

    async def revoke(self, order_id: str) -> None:
        serial = (await self.parts.svid()).serial
        wanted = subject(SubjectKind.SERIAL, serial, trust_domain=DOMAIN, now=START)
        request = OrderRequest(
            wanted, RevocationReason.KEY_COMPROMISE, id=order_id, without_hold=True
        )
        await self.parts.revoke.order(request, OPERATOR)

    async def order(self, order_id: str) -> RevocationOrder:
        return await self.parts.store.read(lambda repos: repos.orders.get(order_id))


@pytest.fixture
async def closing(tmp_path: Path) -> AsyncIterator[Closing]:
    tmp_path.chmod(0o700)
    clock = SettableClock(START)
    store = Store(sqlite_url(tmp_path), clock=clock)
    await store.migrate()
    keys = AbsentKeys()
    parts = Parts(store, clock, keys)
    await parts.directory.load()
    await parts.rotate.start()
    await parts.admit()
    yield Closing(parts, keys)
    keys.away = False
    await parts.close()
    await store.close()


async def test_an_order_that_nobody_is_to_hear_of_is_closed_at_once(closing: Closing) -> None:
    await closing.revoke("one")
    await closing.statements.run()
    order = await closing.order("one")
    assert order.state is OrderState.CLOSED
    stated = verify_statement(order.statement, closing.parts.signing.bundle)
    assert stated["credentials"]["count"] == 1
    page = await closing.parts.store.read(lambda repos: repos.audit.page("", 100))
    [event] = [one for one in page.items if one.kind is AuditKind.REVOCATION_CLOSED]
    assert event.subject == "one"
    digest = hashlib.sha256(order.statement.encode()).hexdigest()
    assert event.facts["statement_sha256"] == digest
    await closing.statements.run()
    assert (await closing.order("one")).statement == order.statement
    # It is long: a list of orders comes without.
    [listed] = (await closing.parts.store.read(lambda repos: repos.orders.page("", 9))).items
    assert listed == replace(order, statement="")


async def test_a_key_manager_that_is_away_only_delays_it(closing: Closing) -> None:
    await closing.revoke("one")
    closing.keys.away = True
    for _ in range(3):
        with pytest.raises(SigningBackendUnavailable):
            await closing.statements.run()
        closing.pass_time(1)
        await closing.statements.run()  # not again so soon
        closing.pass_time(60)
    assert (await closing.order("one")).state is OrderState.COMMITTED
    closing.keys.away = False
    await closing.statements.run()
    assert (await closing.order("one")).state is OrderState.CLOSED


async def test_a_silent_verifier_is_waited_for_so_long(closing: Closing) -> None:
    silent = Verifier(VerifierKind.AGENT, "spiffe://example.org/silent")
    closing.verifiers.enter(silent, lambda _position: False)
    await closing.revoke("one")
    await closing.statements.run()
    closing.pass_time(9.5)
    await closing.statements.run()
    assert (await closing.order("one")).state is OrderState.COMMITTED
    closing.pass_time(1)
    await closing.statements.run()
    order = await closing.order("one")
    assert order.state is OrderState.CLOSED
    stated = verify_statement(order.statement, closing.parts.signing.bundle)
    [verifier] = stated["propagation"]["verifiers"]
    assert (verifier["name"], verifier["state"]) == (silent.name, "silent")


async def test_what_another_broker_commits_is_its_own_to_close_for_a_while(
    closing: Closing,
) -> None:
    closing.parts.revoke.on_committed.clear()  # we hear nothing of it
    await closing.revoke("one")
    for _ in range(2):
        await closing.statements.run()
        assert (await closing.order("one")).state is OrderState.COMMITTED
        closing.pass_time(10.5)
    await closing.statements.run()
    assert (await closing.order("one")).state is OrderState.CLOSED


async def test_of_two_brokers_one_closes(closing: Closing) -> None:
    await closing.revoke("one")
    other = closing.new()
    order = await closing.order("one")
    await closing.statements.run()
    first = (await closing.order("one")).statement
    await other._close(order)
    assert (await closing.order("one")).statement == first


async def test_an_order_that_is_not_swept_is_not_closed(closing: Closing) -> None:
    await closing.revoke("one")
    order = await closing.order("one")
    unswept = replace(order, swept=False)
    await closing.parts.store.write(lambda repos: repos.orders.update(unswept))
    for _ in range(3):
        closing.pass_time(30)
        await closing.statements.run()
    assert (await closing.order("one")).state is OrderState.COMMITTED
    await closing.parts.store.write(lambda repos: repos.orders.update(order))
    await closing.statements.run()
    assert (await closing.order("one")).state is OrderState.CLOSED


async def test_nobody_asks_the_database_for_nothing(
    closing: Closing, monkeypatch: pytest.MonkeyPatch
) -> None:
    await closing.statements.run()
    reads = 0
    read = closing.parts.store.read

    async def counted(*args: object) -> object:
        nonlocal reads
        reads += 1
        return await read(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(closing.parts.store, "read", counted)
    for _ in range(20):
        closing.pass_time(1)
        await closing.statements.run()
    assert reads <= 2
    monkeypatch.undo()
    await closing.revoke("one")
    await closing.statements.run()
    assert (await closing.order("one")).state is OrderState.CLOSED


async def test_a_database_that_is_away_only_delays_it(
    closing: Closing, monkeypatch: pytest.MonkeyPatch
) -> None:
    await closing.revoke("one")

    async def away(*_args: object) -> None:
        raise StoreUnavailable

    monkeypatch.setattr(closing.parts.store, "write", away)
    with pytest.raises(StoreUnavailable):
        await closing.statements.run()
    monkeypatch.undo()
    closing.pass_time(5)
    await closing.statements.run()
    assert (await closing.order("one")).state is OrderState.CLOSED


# --- what is stated -------------------------------------------------------------------------------


def order(**fields: object) -> RevocationOrder:
    values: dict[str, object] = {
        "id": "one",
        "subject": of(SubjectKind.SPIFFE_ID, "spiffe://example.org/api"),
        "reason": RevocationReason.KEY_COMPROMISE,
        "comment": "",
        "actor": "uid:0",
        "ordered_at": NOW,
        "committed_at": NOW + timedelta(milliseconds=7),
        "state": OrderState.COMMITTED,
        "sequence": 11,
    }
    return RevocationOrder(**(values | fields))  # type: ignore[arg-type]


def stated(report: PropagationReport, ids: RevokedIds | None = None) -> dict[str, object]:
    return compose(
        order(),
        ids or RevokedIds.of([]),
        ["e1"],
        report,
        trust_domain="example.org",
        broker_id="spiffe://example.org/idb/broker",
        now=NOW,
    )


def test_times_are_written_to_the_millisecond() -> None:
    payload = json.loads(json.dumps(stated(PropagationReport.of([]))))
    assert payload["issued_at"] == "2030-01-01T12:00:00.123Z"
    assert payload["revocation"]["committed_at"] == "2030-01-01T12:00:00.130Z"
    assert "sub" not in payload
    assert "aud" not in payload


@given(
    st.lists(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1), max_size=9)
)
def test_ids_are_digested_in_one_order(ids: list[str]) -> None:
    forward, backward = RevokedIds.of(ids), RevokedIds.of(ids[::-1])
    assert forward == backward
    lines = "".join(f"{one}\n" for one in sorted(ids))
    assert forward.sha256 == hashlib.sha256(lines.encode()).hexdigest()
    assert forward.count == len(ids)


def test_of_very_many_some_are_named_and_all_are_counted() -> None:
    ids = RevokedIds.of([f"{at:040x}" for at in range(2500)])
    assert (ids.count, len(ids.first)) == (2500, module.MOST_IDS)
    standings = [
        VerifierStanding(
            Verifier(VerifierKind.WORKLOAD, f"spiffe://example.org/{'x' * 200}/{at:06}"),
            VerifierState.ACKNOWLEDGED if at else VerifierState.SILENT,
            NOW,
            at,
        )
        for at in range(8000)
    ]
    payload = stated(PropagationReport.of(standings), ids)
    told = json.loads(json.dumps(payload))["propagation"]
    assert len(json.dumps(told)) < module.MOST_VERIFIER_OCTETS + 1000
    assert told["told"] == 8000
    assert 0 < told["verifiers_left_out"] < 8000
    assert len(told["verifiers"]) + told["verifiers_left_out"] == 8000
    assert told["verifiers"][0]["state"] == "silent"
