"""Entries written through the API: selectors that are checked, keys and processes; instances."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from identity_api.broker.v1 import entry_pb2, entry_pb2_grpc, svid_pb2, types_pb2
from identity_broker.domain.clock import SystemClock
from identity_broker.domain.selector import Selector
from identity_broker.store import Store
from support.line import RunningBroker, csr_for, new_key, node_id, running, settings_in
from support.store import entry as entry_value

ODD = (types_pb2.Selector(type="rack", value="7"), types_pb2.Selector(type="unix", value="uid:one"))
FINE = types_pb2.Selector(type="unix", value="uid:1000")


def message(path: str, *selectors: types_pb2.Selector, **fields: Any) -> Any:
    return types_pb2.RegistrationEntry(
        spiffe_id=f"spiffe://example.org{path}",
        parent_id=node_id("web-1"),
        selectors=selectors or (FINE,),
        **fields,
    )


async def create(broker: RunningBroker, *entries: types_pb2.RegistrationEntry) -> Any:
    stub = await broker.stub(entry_pb2_grpc.EntryStub)
    answer = await stub.BatchCreate(entry_pb2.BatchCreateEntryRequest(entries=entries))
    return answer.results


async def update(broker: RunningBroker, entry_id: str, *names: str, **fields: Any) -> Any:
    stub = await broker.stub(entry_pb2_grpc.EntryStub)
    item = entry_pb2.BatchUpdateEntryRequest.Item(
        entry=types_pb2.RegistrationEntry(id=entry_id, **fields), fields=names or list(fields)
    )
    answer = await stub.BatchUpdate(entry_pb2.BatchUpdateEntryRequest(items=[item]))
    return answer.results[0]


# --- selectors --------------------------------------------------------------------------------


async def test_a_selector_nobody_vouches_for_fails_its_item_alone(broker: RunningBroker) -> None:
    refused, stored, slip = await create(
        broker,
        message("/a", FINE, ODD[0]),
        message("/b"),
        message("/c", types_pb2.Selector(type="unix", value="uuid:1000")),
    )
    assert refused.status.reason == "ENTRY_INVALID"
    assert "rack" in refused.status.message
    assert "entries.selector_types" in refused.status.hint
    assert slip.status.reason == "ENTRY_INVALID"
    assert 'did you mean "unix:uid:1000"?' in slip.status.hint
    assert stored.status.code == 0

    changed = await update(broker, stored.entry.id, selectors=[FINE, ODD[1]])
    assert changed.status.reason == "ENTRY_INVALID"
    moved = await update(
        broker, stored.entry.id, selectors=[types_pb2.Selector(type="unix", value="gid:7")]
    )
    assert [item.value for item in moved.entry.selectors] == ["gid:7"]


async def test_the_configuration_names_types_of_other_attestors(tmp_path: Path) -> None:
    settings = settings_in(tmp_path / "idb", entries={"selector_types": ["rack"]})
    async with running(settings) as broker:
        stored, refused = await create(
            broker, message("/a", ODD[0]), message("/b", types_pb2.Selector(type="rak", value="7"))
        )
        assert stored.status.code == 0
        assert 'did you mean "rack:7"?' in refused.status.hint


async def test_what_an_older_broker_stored_stays_and_is_issued(tmp_path: Path) -> None:
    settings = settings_in(tmp_path / "idb")
    odd = frozenset(Selector(one.type, one.value) for one in ODD)
    store = Store(settings.database_url, clock=SystemClock())
    await store.migrate()
    await store.write(lambda repos: repos.entries.create(entry_value("old", selectors=odd)))
    await store.close()
    async with running(settings) as broker:
        node = await broker.join("web-1")
        assert (await node.issue("old")).status.code == 0
        # Untouched, and touched elsewhere.
        assert (await update(broker, "old", owner="team")).status.code == 0
        # One of them may go, the rest may stay; nothing odd may be added.
        fewer = await update(broker, "old", selectors=[ODD[0], FINE])
        assert fewer.status.code == 0
        again = await update(broker, "old", selectors=[ODD[0], ODD[1]])
        assert again.status.reason == "ENTRY_INVALID"
        found = {f"{one.type}:{one.value}" for one in fewer.entry.selectors}
        assert found == {"rack:7", "unix:uid:1000"}


# --- keys and processes -----------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["", "ec-p256", "ec-p384", "rsa-2048"])
async def test_an_entry_says_what_key_and_for_whom(broker: RunningBroker, algorithm: str) -> None:
    (made,) = await create(broker, message("/a", per_process=True, key_algorithm=algorithm))
    assert (made.entry.per_process, made.entry.key_algorithm) == (True, algorithm)
    node = await broker.join("web-1")
    listed = await node.entries.ListAuthorized(entry_pb2.ListAuthorizedRequest())
    (told,) = listed.entries
    assert (told.per_process, told.key_algorithm) == (True, algorithm)
    fields = ["per_process", "key_algorithm"]
    changed = await update(broker, made.entry.id, *fields, key_algorithm="ec-p384")
    assert (changed.entry.per_process, changed.entry.key_algorithm) == (False, "ec-p384")
    assert changed.entry.revision == made.entry.revision + 1


async def test_keys_that_no_agent_makes_are_refused(broker: RunningBroker) -> None:
    results = await create(
        broker,
        message("/a", key_algorithm="rsa-4096"),
        message("/b", key_algorithm="ed25519"),
        message("/c", key_algorithm="EC-P256"),
        message("/d", key_algorithm="\x00"),
    )
    for result in results:
        assert result.status.reason == "ENTRY_INVALID"
        assert "ec-p256, ec-p384, rsa-2048" in result.status.hint
    group = types_pb2.RegistrationEntry(
        spiffe_id="spiffe://example.org/group/web",
        parent_id="spiffe://example.org/idb/broker",
        selectors=[types_pb2.Selector(type="join_token", value="name:web-1")],
        per_process=True,
    )
    (refused,) = await create(broker, group)
    assert "no processes" in refused.status.message


# --- instances --------------------------------------------------------------------------------


async def test_each_instance_stands_in_the_ledger_and_is_revoked_alone(
    broker: RunningBroker,
) -> None:
    node = await broker.join("web-1")
    entry = await broker.entry("/payments/api", "web-1", per_process=True)
    instances = ["pid 41, started 1187", "größer", "", "x" * 128]
    items = [
        svid_pb2.BatchIssueX509Request.Item(
            entry_id=entry.id, csr=csr_for(new_key()), instance=instance
        )
        for instance in instances
    ]
    answer = await node.svids.BatchIssueX509(svid_pb2.BatchIssueX509Request(items=items))
    serials = [result.svid.serial for result in answer.results]
    recorded = {one.id: one for one in await broker.ledger(entry_id=entry.id)}
    assert [recorded[serial].instance for serial in serials] == instances

    answer = await broker.revoke(id=serials[0])
    assert list(answer.revoked_ids) == [serials[0]]
    states = {one.id: one.state for one in await broker.ledger(entry_id=entry.id)}
    assert len({states[serial] for serial in serials[1:]}) == 1
    assert states[serials[0]] != states[serials[1]]


@pytest.mark.parametrize("instance", ["x" * 129, "é" * 65, "a\nb", "\x00", "\u202e"])
async def test_an_instance_that_cannot_be_kept_fails_its_item_alone(
    broker: RunningBroker, instance: str
) -> None:
    node = await broker.join("web-1")
    entry = await broker.entry("/payments/api", "web-1")
    items = [
        svid_pb2.BatchIssueX509Request.Item(
            entry_id=entry.id, csr=csr_for(new_key()), instance=said
        )
        for said in (instance, "fine")
    ]
    answer = await node.svids.BatchIssueX509(svid_pb2.BatchIssueX509Request(items=items))
    refused, issued = answer.results
    assert refused.status.reason == "MALFORMED_REQUEST"
    assert "instance" in refused.status.message
    assert issued.svid.serial
    ledger = await broker.ledger(entry_id=entry.id)
    assert [one.instance for one in ledger] == ["fine"]


async def test_instances_of_many_calls_at_once_are_not_mixed_up(broker: RunningBroker) -> None:
    node = await broker.join("web-1")
    entry = await broker.entry("/payments/api", "web-1", per_process=True)

    async def issue(number: int) -> tuple[str, str]:
        item = svid_pb2.BatchIssueX509Request.Item(
            entry_id=entry.id, csr=csr_for(new_key()), instance=f"process {number}"
        )
        answer = await node.svids.BatchIssueX509(svid_pb2.BatchIssueX509Request(items=[item]))
        return answer.results[0].svid.serial, f"process {number}"

    asked = dict(await asyncio.gather(*(issue(number) for number in range(40))))
    recorded = await broker.ledger(entry_id=entry.id)
    assert {one.id: one.instance for one in recorded} == asked
