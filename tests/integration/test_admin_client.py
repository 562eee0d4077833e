"""The admin client against a running broker."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import grpc
import pytest

from identity_api.broker.v1 import revocation_pb2 as pb
from identity_api.broker.v1 import revocation_pb2_grpc
from identity_client._wire.status import error_from_rpc
from identity_client.admin import (
    AdminClient,
    Entry,
    EntryChange,
    EntryQuery,
    HoldTerms,
    MtlsTarget,
    RevocationReason,
    Subject,
    SubjectKind,
)
from identity_client.admin.target import UnixTarget
from identity_client.clock import utc_now
from identity_client.errors import (
    BrokerUnavailable,
    Conflict,
    ObjectNotFound,
    RequestRejected,
    SettingsInvalid,
)
from support.broker import DevBroker
from support.losing import losing_answers
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


def _registered(dev_broker: DevBroker, name: str) -> Subject:
    """An identity with an entry and nothing issued."""
    spiffe_id = f"spiffe://dev.example.org/tests/{name}"
    entry = Entry(
        id=name,
        spiffe_id=spiffe_id,
        parent_id="spiffe://dev.example.org/idb/node/join_token/none",
        selectors=("unix:uid:1",),
    )
    (made,) = dev_broker.admin.entries.create([entry])
    assert made.error is None
    return Subject(SubjectKind.SPIFFE_ID, spiffe_id)


def test_a_revocation_from_its_plan_to_the_lifting_of_its_hold(dev_broker: DevBroker) -> None:
    name = dev_broker.unique("planned")
    subject, revocations = _registered(dev_broker, name), dev_broker.admin.revocations
    plan = revocations.plan(subject)
    assert (plan.subject, plan.holds, plan.held_entry_ids) == (subject, True, (name,))
    assert dev_broker.admin.entries.get(name).held_by == ""

    until = utc_now().replace(microsecond=0) + timedelta(hours=1)
    done = revocations.revoke(
        subject,
        reason=RevocationReason.CERTIFICATE_HOLD,
        comment="a test",
        revocation_id=f"id-{name}",
        hold=HoldTerms(name=f"hold-{name}", until=until),
    )
    assert (done.revocation.id, done.revocation.hold) == (f"id-{name}", f"hold-{name}")
    assert (done.revocation.comment, done.revoked_ids) == ("a test", ())
    assert done.revocation.state in ("committed", "closed")
    assert dev_broker.admin.entries.get(name).held_by == f"hold-{name}"

    found = revocations.get(f"id-{name}", wait=timedelta(seconds=1))
    assert found.revocation.sequence >= done.revocation.sequence > 0
    assert found.propagation.silent == 0
    assert f"id-{name}" in [one.id for one in revocations.list()]
    (held,) = (one for one in revocations.holds() if one.name == f"hold-{name}")
    assert (held.until, held.held_entry_ids, held.subject) == (until, (name,), subject)

    lifted = revocations.lift(held.name)
    assert (lifted.freed_entry_ids, lifted.hold.name) == ((name,), held.name)
    assert lifted.hold.lifted_by
    assert dev_broker.admin.entries.get(name).held_by == ""
    assert held.name not in [one.name for one in revocations.holds()]
    (over,) = (o for o in revocations.holds(include_lifted=True) if o.name == held.name)
    assert over.lifted_at is not None
    assert revocations.lift(held.name).freed_entry_ids == ()


def test_the_same_id_is_the_same_revocation(dev_broker: DevBroker) -> None:
    name = dev_broker.unique("repeat")
    subject, revocations = _registered(dev_broker, name), dev_broker.admin.revocations
    first = revocations.revoke(subject, revocation_id=f"id-{name}")
    again = revocations.revoke(subject, revocation_id=f"id-{name}")
    assert again.revocation.ordered_at == first.revocation.ordered_at
    other = _registered(dev_broker, dev_broker.unique("repeat"))
    with pytest.raises(Conflict) as caught:
        revocations.revoke(other, revocation_id=f"id-{name}")
    assert caught.value.reason == "REVOCATION_EXISTS"
    with pytest.raises(Conflict) as caught:
        revocations.revoke(other, hold=HoldTerms(name=f"id-{name}"))
    assert caught.value.reason == "HOLD_EXISTS"


@pytest.mark.parametrize(
    ("subject", "reason"),
    [
        (Subject(SubjectKind.UNKNOWN, "x"), "MALFORMED_REQUEST"),
        (Subject(SubjectKind.SERIAL, ""), "MALFORMED_REQUEST"),
        (Subject(SubjectKind.SERIAL, "not hex"), "SUBJECT_INVALID"),
        (Subject(SubjectKind.KEY_FINGERPRINT, "ab"), "SUBJECT_INVALID"),
        (Subject(SubjectKind.SELECT, "colour=red"), "SUBJECT_INVALID"),
        (Subject(SubjectKind.SELECT, "x" * 3000), "MALFORMED_REQUEST"),
        (Subject(SubjectKind.SPIFFE_ID, "spiffe://dev.example.org/a/../b"), "SPIFFE_ID_INVALID"),
    ],
    ids=str,
)
def test_what_cannot_be_revoked(dev_broker: DevBroker, subject: Subject, reason: str) -> None:
    for attempt in (dev_broker.admin.revocations.plan, dev_broker.admin.revocations.revoke):
        with pytest.raises(RequestRejected) as caught:
            attempt(subject)
        assert caught.value.reason == reason


def test_revocations_and_holds_come_page_by_page(dev_broker: DevBroker) -> None:
    subject = _registered(dev_broker, dev_broker.unique("pages"))
    revocations = dev_broker.admin.revocations
    made = [revocations.revoke(subject).revocation.id for _ in range(5)]
    assert [one.id for one in revocations.list()][:5] == made[::-1]
    options = [("grpc.default_authority", "localhost")]
    socket = dev_broker.state.broker.admin_socket
    with grpc.insecure_channel(f"unix:{socket}", options=options) as channel:
        stub = revocation_pb2_grpc.RevocationStub(channel)
        listed: list[str] = []
        token = ""
        while len(listed) < 5:
            page = stub.List(pb.ListRevocationsRequest(page_size=2, page_token=token))
            assert len(page.revocations) == 2
            listed += [one.id for one in page.revocations]
            token = page.next_page_token
        assert listed[:5] == made[::-1]
        held = stub.ListHolds(pb.ListHoldsRequest(page_size=3))
        assert [one.name for one in held.holds] == made[:1:-1]
        # A token is good for the list that it came with.
        with pytest.raises(grpc.RpcError) as caught:
            stub.ListHolds(pb.ListHoldsRequest(page_size=2, page_token=token))
        assert error_from_rpc(caught.value).reason == "PAGE_TOKEN_INVALID"


def test_an_answer_that_was_lost_is_asked_for_once_more(
    dev_broker: DevBroker, tmp_path: Path
) -> None:
    """The broker revokes, the connection breaks before the answer: the repeat is the same one."""
    subject = _registered(dev_broker, dev_broker.unique("lost"))
    relay = tmp_path / "relay.sock"
    with (
        losing_answers(relay, Path(dev_broker.state.broker.admin_socket), times=1) as lost,
        AdminClient(UnixTarget(relay)) as admin,
    ):
        done = admin.revocations.revoke(subject)
    assert lost() == 1
    found = [one for one in dev_broker.admin.revocations.list() if one.subject == subject]
    assert [one.id for one in found] == [done.revocation.id]


def test_a_broker_that_never_answers_is_asked_twice(dev_broker: DevBroker, tmp_path: Path) -> None:
    subject = _registered(dev_broker, dev_broker.unique("mute"))
    relay = tmp_path / "relay.sock"
    with (
        losing_answers(relay, Path(dev_broker.state.broker.admin_socket), times=9) as lost,
        AdminClient(UnixTarget(relay)) as admin,
        pytest.raises(BrokerUnavailable),
    ):
        admin.revocations.revoke(subject, revocation_id="rev-of-a-mute-broker")
    assert lost() == 2
    assert dev_broker.admin.revocations.get("rev-of-a-mute-broker").revocation.subject == subject


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
