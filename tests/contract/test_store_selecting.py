"""What a selection selects, on both databases: the same as said in Python, whatever it names."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from identity_broker.domain.credential import (
    Credential,
    CredentialKind,
    CredentialState,
    RevocationReason,
)
from identity_broker.domain.entry import RegistrationEntry
from identity_broker.domain.paging import CredentialFilter
from identity_broker.domain.revocation import IdentityCount, LedgerCount
from identity_broker.domain.selection import Selection
from identity_broker.store import Repositories, Store
from identity_ca.spiffe_id import SpiffeId
from support.store import (
    NOW,
    PARENT,
    SettableClock,
    entry,
    intent,
    issued,
    node,
    revoking,
    selecting,
)

T = TypeVar("T")

HOUR = timedelta(hours=1)
HOLD = RevocationReason.CERTIFICATE_HOLD
STOLEN = RevocationReason.KEY_COMPROMISE
ROWS = 300
IDENTITIES = [
    SpiffeId.parse(f"spiffe://example.org/{path}")
    for path in ("shop", "shop/api", "Shop/api", "shop/api-2", "shop_api", "orders/api")
]
NODES = [node(name).spiffe_id for name in ("web-1", "web-2")]
ENTRIES = [
    entry("plain", spiffe_id=IDENTITIES[1]),
    entry("shop", spiffe_id=IDENTITIES[1], owner="team shop", labels={"env": "prod"}),
    entry("orders", spiffe_id=IDENTITIES[5], owner='a "b"', labels={"env": "prod", "x/y": "ü"}),
    entry("empty", spiffe_id=IDENTITIES[3], labels={"env": ""}),
    entry("Shop", spiffe_id=IDENTITIES[4], owner="team shop"),
]
EXPRESSIONS: dict[str, list[Any]] = {
    "spiffe-id": [
        *IDENTITIES,
        *("spiffe://example.org/shop*", "spiffe://example.org/shop/*", "spiffe://example.org/*"),
        "spiffe://example.org/S*",
    ],
    "node": NODES,
    "entry": [one.id for one in ENTRIES] + ["gone"],
    "owner": ['"team shop"', r'"a \"b\""', "Team"],
    "label.env": ["prod", '""', "Prod"],
    "label.x/y": ["ü"],
    "kind": ["x509", "jwt"],
    "instance": ["pid:1", "pid:2"],
    "authority": ["a" * 40, "b" * 40],
    "key": ["a" * 64, "b" * 64],
    "issued-after": ["1h", "2h"],
    "issued-before": ["1h", "2h"],
    "serial": ["0", "1", "5"],
    "jti": [f"{number:040x}" for number in (2, 4, 6)],
}
expressions = (
    st.sets(st.sampled_from(sorted(EXPRESSIONS)), min_size=1, max_size=4)
    .flatmap(
        lambda names: st.fixed_dictionaries(
            {name: st.sampled_from(EXPRESSIONS[name]) for name in sorted(names)}
        )
    )
    .map(lambda terms: " ".join(f"{name}={value}" for name, value in terms.items()))
)


def drawn(number: int, what: str, options: Sequence[T]) -> T:
    digest = hashlib.sha256(f"{number} {what}".encode()).digest()
    return options[int.from_bytes(digest[:4], "big") % len(options)]


def intent_of(number: int) -> Any:
    recorded_at = NOW - drawn(number, "age", [0, 1, 2, 3]) * HOUR
    lasts = drawn(number, "lasts", [0.5, 3.5])
    return intent(
        f"{number:040x}",
        kind=drawn(number, "kind", list(CredentialKind)),
        spiffe_id=drawn(number, "identity", IDENTITIES),
        entry_id=drawn(number, "entry", [one.id for one in ENTRIES] + ["gone", ""]),
        node_id=drawn(number, "node", [*NODES, None]),
        instance=drawn(number, "instance", ["", "pid:1", "pid:2"]),
        authority_id=drawn(number, "authority", ["a", "b"]) * 40,
        key_fingerprint=drawn(number, "key", ["a", "b", "c"]) * 64,
        recorded_at=recorded_at,
        not_before=recorded_at,
        not_after=recorded_at + lasts * HOUR,
    )


def _created(one: RegistrationEntry, repos: Repositories) -> object:
    return repos.entries.create(one)


async def filled(store: Store) -> None:
    """A ledger in which everything stands beside everything, in every state."""
    for one in ENTRIES:
        await store.write(partial(_created, one))
    intents = [intent_of(number) for number in range(ROWS)]
    await store.ledger.intend(intents)
    fates = ["intent", "issued", "issued", "issued", "revoked", "hold", "unconfirmed"]
    fate = {one.id: drawn(int(one.id, 16), "fate", fates) for one in intents}
    store.ledger.conclude([issued(one) for one in intents if fate[one.id] == "issued"])
    await store.ledger.flush()
    serials = {kind: [one for one, what in fate.items() if what == kind] for kind in fates}

    def age(repos: Repositories) -> None:
        for name, reason in (("revoked", STOLEN), ("hold", HOLD)):
            for serial in serials[name]:
                number = int(serial, 16)
                term = "serial" if intents[number].kind is CredentialKind.X509 else "jti"
                at = intents[number].recorded_at
                revoking(selecting(f"{term}={serial}"), reason, order=name, at=at)(repos)
        repos.credentials.expire(NOW - HOUR)  # some of what is over is not marked yet

    await store.write(age)
    await store.write(lambda repos: repos.credentials.sweep_unconfirmed(NOW - 2.5 * HOUR))


def is_selected(selection: Selection, one: Credential, entries: dict[str, Any]) -> bool:
    """What the terms mean, one after the other."""
    is_x509 = one.intent.kind is CredentialKind.X509
    from_entry: RegistrationEntry | None = entries.get(one.intent.entry_id)
    terms = [
        not selection.spiffe_id or one.intent.spiffe_id == selection.spiffe_id,
        str(one.intent.spiffe_id).startswith(selection.spiffe_id_prefix),
        not selection.node_id or one.intent.node_id == selection.node_id,
        not selection.entry_id or one.intent.entry_id == selection.entry_id,
        not selection.owner or (from_entry and from_entry.owner == selection.owner),
        not selection.kind or one.intent.kind is selection.kind,
        not selection.instance or one.intent.instance == selection.instance,
        not selection.authority_id or one.intent.authority_id == selection.authority_id,
        not selection.key_fingerprint or one.intent.key_fingerprint == selection.key_fingerprint,
        not selection.serial or (one.id == selection.serial and is_x509),
        not selection.jti or (one.id == selection.jti and not is_x509),
        not selection.issued_after or one.intent.recorded_at >= selection.issued_after,
        not selection.issued_before or one.intent.recorded_at < selection.issued_before,
    ]
    terms += [
        from_entry is not None and from_entry.labels.get(key) == value
        for key, value in selection.labels
    ]
    return all(terms)


def counted(found: list[Credential], at: datetime) -> LedgerCount:
    unexpired = [one for one in found if one.intent.not_after > at]
    live = [one for one in unexpired if one.state is not CredentialState.REVOKED]
    whose = Counter(str(one.intent.spiffe_id) for one in live)
    through = Counter(str(one.intent.node_id) for one in live if one.intent.node_id)
    return LedgerCount(
        live_x509=sum(one.intent.kind is CredentialKind.X509 for one in live),
        live_jwt=sum(one.intent.kind is CredentialKind.JWT for one in live),
        already_revoked=len(unexpired) - len(live),
        expired=len(found) - len(unexpired),
        identities=tuple(
            IdentityCount(SpiffeId.parse(spiffe_id), number)
            for spiffe_id, number in sorted(whose.items(), key=lambda item: (-item[1], item[0]))
        ),
        identity_count=len(whose),
        node_ids=tuple(
            SpiffeId.parse(node_id)
            for node_id, _ in sorted(through.items(), key=lambda item: (-item[1], item[0]))
        ),
        node_count=len(through),
    )


class _UndoneError(Exception):
    """Ends a transaction without a trace."""


async def tried(store: Store, work: Callable[[Repositories], T]) -> T:
    """What a write would return; it is undone."""
    answers: list[T] = []

    def write(repos: Repositories) -> None:
        answers.append(work(repos))
        raise _UndoneError

    with pytest.raises(_UndoneError):
        await store.write(write)
    return answers[-1]


@pytest.fixture
def full_url(store_url: str) -> str:
    async def fill() -> None:
        store = Store(store_url, clock=SettableClock())
        await store.open()
        await filled(store)
        await store.close()

    asyncio.run(fill())
    return store_url


def test_the_ledger_selects_what_the_terms_say(full_url: str) -> None:
    loop = asyncio.new_event_loop()
    store = Store(full_url, clock=SettableClock())
    loop.run_until_complete(store.open())
    every = CredentialFilter()
    ledger = loop.run_until_complete(store.read(lambda r: r.credentials.page(every, "", ROWS)))
    entries = {one.id: one for one in ENTRIES}
    assert len(ledger.items) == ROWS
    assert len({one.state for one in ledger.items}) == 5

    @settings(max_examples=60, suppress_health_check=[HealthCheck.nested_given])
    @given(expressions, st.sampled_from([STOLEN, HOLD]), st.sampled_from([None, 1, 7]))
    def check(expression: str, reason: RevocationReason, limit: int | None) -> None:
        selection = selecting(expression)
        found = [one for one in ledger.items if is_selected(selection, one, entries)]
        seen = loop.run_until_complete(store.read(lambda r: r.credentials.count(selection, NOW)))
        assert seen == counted(found, NOW)

        due = {
            one.id
            for one in found
            if one.intent.not_after > NOW
            and (one.state is not CredentialState.REVOKED or (one.reason, reason) == (HOLD, STOLEN))
        }
        step = revoking(selection, reason, order="new", limit=limit)

        def steps(repos: Repositories) -> list[list[str]]:
            taken = [[one.id for one in step(repos)]]
            while limit is not None and len(taken[-1]) == limit:
                taken.append([one.id for one in step(repos)])
            return taken

        taken = loop.run_until_complete(tried(store, steps))
        revoked = [serial for one in taken for serial in one]
        assert set(revoked) == due
        assert len(revoked) == len(due), "each once"
        assert all(len(one) == limit for one in taken[:-1])

        covers = [one.id for one in ENTRIES if selection.covers_entry(one)]
        named = loop.run_until_complete(store.read(lambda r: r.entries.covered_ids(selection)))
        assert list(named) == sorted(covers)
        few = loop.run_until_complete(store.read(lambda r: r.entries.covered_ids(selection, 2)))
        assert list(few) == sorted(covers)[:2]
        number = loop.run_until_complete(store.read(lambda r: r.entries.count_covered(selection)))
        assert number == len(covers)

    try:
        check()
    finally:
        loop.run_until_complete(store.close())
        loop.close()


async def test_identities_and_nodes_are_shown_as_far_as_anybody_reads(store: Store) -> None:
    intents = [
        intent(
            spiffe_id=SpiffeId.parse(f"spiffe://example.org/many/{number % 150:03}"),
            node_id=SpiffeId.parse(f"spiffe://example.org/idb/node/join_token/n{number % 130:03}"),
        )
        for number in range(300)
    ]
    await store.ledger.intend([*intents, intent(), intent(node_id=None, kind=CredentialKind.JWT)])
    seen = await store.read(lambda r: r.credentials.count(selecting("spiffe-id=/many/*"), NOW))
    assert (seen.live_x509, seen.live_jwt, seen.identity_count, seen.node_count) == (
        300,
        0,
        150,
        130,
    )
    assert [str(one.spiffe_id)[-3:] for one in seen.identities] == [f"{n:03}" for n in range(20)]
    assert {one.live for one in seen.identities} == {2}
    # n000 … n039 were used three times, the others twice.
    assert [str(one)[-4:] for one in seen.node_ids] == [f"n{number:03}" for number in range(100)]
    everything = await store.read(lambda r: r.credentials.count(selecting("spiffe-id=/*"), NOW))
    assert (everything.live_x509, everything.live_jwt) == (301, 1)
    assert PARENT in everything.node_ids or everything.node_count == 131


async def test_nodes_are_stranded_whose_own_svid_goes_and_that_have_no_way_back(
    store: Store,
) -> None:
    names = ["lost", "also-lost", "back", "banned", "elsewhere", "revoked", "past"]
    known = {
        name: node(
            name,
            serial=f"{number:040x}",
            reattestable=name == "back",
            banned=name == "banned",
        )
        for number, name in enumerate(names)
    }
    own = [
        intent(
            one.serial,
            spiffe_id=one.spiffe_id,
            node_id=one.spiffe_id,
            authority_id="other" if name == "elsewhere" else "old",
            not_after=NOW if name == "past" else NOW + HOUR,
        )
        for name, one in known.items()
    ]
    # Of an SVID that the node has replaced nobody misses anything.
    before = intent(spiffe_id=known["elsewhere"].spiffe_id, authority_id="old")
    await store.ledger.intend([*own, before])

    def put(repos: Repositories) -> None:
        for one in known.values():
            repos.nodes.upsert(one)

    await store.write(put)
    await store.write(revoking(f"serial={known['revoked'].serial}"))

    def stranded(expression: str, size: int) -> Any:
        return store.read(lambda r: r.nodes.stranded_by(selecting(expression), NOW, size))

    lost, also = known["lost"].spiffe_id, known["also-lost"].spiffe_id
    assert await stranded("authority=old", 9) == ((also, lost), 2)
    assert await stranded("authority=old", 1) == ((also,), 2)
    assert await stranded("spiffe-id=/idb/node/join_token/l* kind=x509", 9) == ((lost,), 1)
    assert await stranded("owner=nobody", 9) == ((), 0)
    assert await stranded("entry=other issued-after=2h", 9) == ((), 0)
