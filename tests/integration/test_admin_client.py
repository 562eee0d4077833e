"""The admin client against a running broker."""

from __future__ import annotations

from pathlib import Path

import pytest

from identity_client.admin import AdminClient, Entry, EntryChange, EntryQuery, MtlsTarget
from identity_client.admin.target import UnixTarget
from identity_client.errors import (
    BrokerUnavailable,
    Conflict,
    ObjectNotFound,
    RequestRejected,
    SettingsInvalid,
)
from support.broker import DevBroker
from support.tls_material import TestAuthority

MORE_THAN_A_BATCH = 505


def test_batches_and_pages_beyond_one_call(dev_broker: DevBroker) -> None:
    owner = dev_broker.unique("owner")
    parent = "spiffe://dev.example.org/idb/node/join_token/pages"
    entries = [
        Entry(
            id=f"{owner}-{number:04}",
            spiffe_id=f"spiffe://dev.example.org/pages/{owner}/{number}",
            parent_id=parent,
            selectors=("unix:uid:1",),
            owner=owner,
        )
        for number in range(MORE_THAN_A_BATCH)
    ]
    admin = dev_broker.admin
    made = admin.entries.create(entries)
    assert [one.value.id for one in made if one.value and not one.error] == [e.id for e in entries]
    listed = list(admin.entries.list(EntryQuery(owner=owner)))
    assert [one.id for one in listed] == [one.id for one in entries]
    changes = [
        EntryChange(Entry(id=one.id, disabled=True), frozenset({"disabled"})) for one in entries[:2]
    ]
    assert [one.value.disabled for one in admin.entries.update(changes) if one.value] == [
        True,
        True,
    ]
    deleted = admin.entries.delete([one.id for one in entries])
    assert all(one.error is None for one in deleted)
    assert list(admin.entries.list(EntryQuery(owner=owner))) == []


def test_an_item_that_exists_comes_with_the_stored_one(dev_broker: DevBroker) -> None:
    name = dev_broker.unique("twice")
    entry = Entry(
        id=name,
        spiffe_id=f"spiffe://dev.example.org/tests/{name}",
        parent_id="spiffe://dev.example.org/idb/broker",
        selectors=("join_token:name:x",),
    )
    first, second = dev_broker.admin.entries.create([entry, entry])
    assert first.error is None
    assert isinstance(second.error, Conflict)
    assert second.error.reason == "ENTRY_EXISTS"
    assert second.value == first.value


def test_refusals_keep_reason_hint_and_id(dev_broker: DevBroker) -> None:
    with pytest.raises(ObjectNotFound) as caught:
        dev_broker.admin.nodes.get("spiffe://dev.example.org/idb/node/join_token/none")
    assert caught.value.reason == "NODE_NOT_FOUND"
    assert caught.value.hint
    assert caught.value.correlation_id
    with pytest.raises(RequestRejected):
        dev_broker.admin.nodes.get("not an id")
    with pytest.raises(ValueError, match="either"):
        dev_broker.admin.credentials.revoke()


def test_a_secret_is_kept_out_of_representations(dev_broker: DevBroker) -> None:
    token = dev_broker.admin.nodes.create_join_token()
    assert token.token not in repr(token)


def test_a_socket_nobody_listens_on(tmp_path: Path) -> None:
    with pytest.raises(BrokerUnavailable, match="no broker listens"):
        AdminClient(UnixTarget(tmp_path / "none.sock"))


def test_files_of_mtls_that_cannot_be_used(tmp_path: Path) -> None:
    junk = tmp_path / "junk"
    junk.write_text("s3cr3t")
    for cert in (tmp_path / "none", junk):
        with pytest.raises(SettingsInvalid) as caught:
            AdminClient(MtlsTarget("127.0.0.1:1", cert, junk, junk))
        assert "s3cr3t" not in str(caught.value)


def test_an_mtls_port_of_another_trust_domain(dev_broker: DevBroker, tmp_path: Path) -> None:
    other = TestAuthority("other.example")
    pair = other.issue("spiffe://other.example/admin")
    files = {"cert": pair.chain_pem, "key": pair.key_pem, "bundle": other.pem}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    target = MtlsTarget(
        dev_broker.state.broker.address, *(tmp_path / name for name in ("cert", "key", "bundle"))
    )
    with AdminClient(target, timeout=5.0) as admin, pytest.raises(BrokerUnavailable) as caught:
        admin.bundle()
    assert caught.value.reason in ("BROKER_TLS_FAILED", "BROKER_UNREACHABLE")
