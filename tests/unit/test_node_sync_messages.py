"""What a node is told, as it is cut and serialized: once for all, but for what is its own."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from identity_api.broker.v1 import node_sync_pb2 as pb
from identity_broker.domain import names
from identity_broker.domain.credential import CredentialKind, Revocation, RevocationReason
from identity_broker.domain.revocation import IdentityEpoch
from identity_broker.lifecycle.node_stream import Lists, News
from identity_broker.server.rpc.convert import node_sync as convert
from identity_broker.server.rpc.convert.credentials import to_revocation
from identity_ca.spiffe_id import SpiffeId
from support.store import entry
from support.verbs import DOMAIN

NOW = datetime(2030, 1, 1, tzinfo=UTC)
A, B = (names.node_id(DOMAIN, "join_token", name) for name in "ab")
API = SpiffeId.parse("spiffe://example.org/api")


def revocation(number: int, **fields: object) -> Revocation:
    values: dict[str, object] = {
        "id": f"{number:040x}",
        "kind": CredentialKind.X509,
        "spiffe_id": API,
        "revoked_at": NOW,
        "expires_at": NOW,
        "reason": RevocationReason.KEY_COMPROMISE,
        "entry_id": "e1",
        "node_id": A,
        "instance": f"i{number}",
    }
    return Revocation(**(values | fields))  # type: ignore[arg-type]


def news(**fields: object) -> News:
    values: dict[str, object] = {
        "revision": 9,
        "previous": 4,
        "full": False,
        "changed": (),
        "removed_ids": (),
        "bundle": None,
        "revocations": (),
        "released_ids": (),
        "epochs": (),
        "denied_authorities": None,
        "lists": None,
        "entries_digest": 77,
    }
    return News(**(values | fields))  # type: ignore[arg-type]


def told(what: News, node_id: SpiffeId, shared: convert.SharedMessages) -> list[pb.SyncResponse]:
    pieces = convert.to_sync_responses(what, node_id, shared, timedelta(seconds=1), NOW)
    messages = [pb.SyncResponse.FromString(one.SerializeToString()) for one in pieces]
    assert [one.complete for one in messages] == [False] * (len(messages) - 1) + [True]
    assert {one.revision for one in messages} == {what.revision}
    assert messages[-1].entries_digest == what.entries_digest
    assert all(len(one.revocations) + len(one.released_ids) <= 1000 for one in messages)
    assert all(one.ByteSize() < 4 * 1024 * 1024 for one in messages)
    return messages


def test_everything_arrives_and_in_pieces() -> None:
    what = news(
        revocations=tuple(revocation(at) for at in range(2500)),
        released_ids=tuple(f"r{at}" for at in range(1200)),
        epochs=(IdentityEpoch(API, NOW, NOW + timedelta(hours=1)),),
        denied_authorities=("ab",),
        changed=tuple(entry(f"e{at}") for at in range(700)),
        lists=Lists((b"crl",)),
    )
    messages = told(what, B, convert.SharedMessages())
    assert [one.id for message in messages for one in message.revocations] == [
        one.id for one in what.revocations
    ]
    assert [one for message in messages for one in message.released_ids] == list(what.released_ids)
    assert [one.spiffe_id for message in messages for one in message.epochs] == [str(API)]
    [denied] = [one for one in messages if one.HasField("denied_authorities")]
    assert list(denied.denied_authorities.ids) == ["ab"]
    assert sum(len(message.changed) for message in messages) == 700
    assert len(messages) < 8


def test_what_many_are_told_is_serialized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    what = news(revocations=tuple(revocation(at) for at in range(1500)))
    shared = convert.SharedMessages()
    first = told(what, B, shared)
    made = 0

    def counted(*args: object) -> object:
        nonlocal made
        made += 1
        return to_revocation(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(f"{convert.__name__}.to_revocation", counted)
    assert told(what, B, shared) == first
    assert not made


def test_an_instance_is_told_to_its_own_node_alone() -> None:
    what = news(
        revocations=(
            *(revocation(at) for at in range(1000)),
            revocation(2000, singled_out=True),
            revocation(2001),
        )
    )
    shared = convert.SharedMessages()
    for node_id in (B, A, B, A):
        named = [
            (one.instance, one.entry_id)
            for message in told(what, node_id, shared)
            for one in message.revocations
            if one.instance or one.entry_id
        ]
        assert named == ([("i2000", "e1")] if node_id == A else [])


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "_MOST_CHUNKS", 2)
    shared = convert.SharedMessages()
    for at in range(10):
        told(news(revocations=(revocation(at),)), B, shared)
    assert len(shared.revocations._kept) == 2
