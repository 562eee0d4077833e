"""Following a stream that says anything, breaks anywhere, or says nothing at all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import grpc
import pytest
from cryptography import x509

from identity_api.broker.v1 import credential_pb2, node_sync_pb2, revocation_feed_pb2, types_pb2
from identity_client.errors import BrokerUnavailable, LimitReached
from identity_client.node import (
    NodeKeeper,
    NodePhase,
    SyncedEntry,
    SyncedEpoch,
    SyncLost,
    SyncPosition,
    SyncUpdate,
    Verifier,
)
from identity_client.node import reports as reports_module
from identity_client.testing import FakeTrustDomain
from support.client import until
from support.node import Held, kept_node
from support.sync_server import (
    Script,
    Session,
    SyncServer,
    delta,
    digest_of,
    entry,
    says,
    sync_server,
)

X509 = credential_pb2.CREDENTIAL_KIND_X509
A, B, C = entry("a"), entry("b"), entry("c")
EPOCH = revocation_feed_pb2.IdentityEpoch(
    spiffe_id="spiffe://example.org/web", not_before=1_800_000_000, expires_at=1_900_000_000
)
DENIED = revocation_feed_pb2.DeniedAuthorities(ids=["ab", "cd"])


@asynccontextmanager
async def following(
    *scripts: Script, **changes: Any
) -> AsyncIterator[tuple[SyncServer, NodeKeeper, Held]]:
    """A node that follows a server with these scripts."""
    options = {"dice": changes.pop("dice")} if "dice" in changes else {}
    async with (
        sync_server(*scripts) as site,
        kept_node(site.settings(**changes), **options) as keeper,
    ):
        mirror = Held()
        task = asyncio.create_task(mirror.run(keeper))
        try:
            yield site, keeper, mirror
        finally:
            await keeper.close()
            # The iteration ends by itself, and whatever failed in it fails the test.
            await asyncio.wait_for(task, 10)


async def refuses(session: Session) -> None:
    """A broker that goes down."""
    await session.refuse(BrokerUnavailable(reason="BROKER_STOPPING"), grpc.StatusCode.UNAVAILABLE)


async def test_everything_a_message_holds_arrives() -> None:
    told = entry(
        "web",
        7,
        selectors=[
            types_pb2.Selector(type="unix", value="user:web"),
            types_pb2.Selector(type="docker", value="label:a:b"),
        ],
        hint="internal",
        per_process=True,
        key_algorithm="ec-p384",
        expires_at=1_900_000_000,
        federates_with=["other.org"],
        x509_ttl_seconds=60,
    )
    revocations = [
        revocation_feed_pb2.RevokedCredential(
            id=f"{kind}",
            kind=kind,
            spiffe_id="spiffe://example.org/web",
            revoked_at=1_800_000_000,
            expires_at=1_900_000_000,
            reason=credential_pb2.REVOCATION_REASON_KEY_COMPROMISE,
            authority_id="ab",
        )
        for kind in (credential_pb2.CREDENTIAL_KIND_X509, credential_pb2.CREDENTIAL_KIND_JWT)
    ]
    scripts: list[Script] = []
    async with sync_server() as site:
        site.scripts = scripts
        scripts.append(
            says(
                site.full(
                    9,
                    [told],
                    revocations=revocations,
                    epochs=[EPOCH],
                    denied_authorities=DENIED,
                ),
                delta(9, 9, entries_digest=digest_of([told])),
            )
        )
        async with kept_node(site.settings(version="1.2.3 " + "é" * 40)) as keeper:
            mirror = Held()
            task = asyncio.create_task(mirror.run(keeper))
            await until(lambda: len(mirror.updates) == 2)
            full, beat = mirror.updates
            (got,) = full.entries
            assert got == SyncedEntry(
                id="web",
                revision=7,
                spiffe_id="spiffe://example.org/web",
                selectors=("docker:label:a:b", "unix:user:web"),
                hint="internal",
                per_process=True,
                key_algorithm="ec-p384",
                expires_at=datetime.fromtimestamp(1_900_000_000, UTC),
                federates_with=("other.org",),
                created_at=datetime.fromtimestamp(1_700_000_000, UTC),
                x509_ttl=timedelta(seconds=60),
                jwt_ttl=None,
            )
            assert [one.kind for one in full.revocations] == ["x509", "jwt"]
            assert {(one.reason, one.authority_id) for one in full.revocations} == {(1, "ab")}
            assert full.epochs == (
                SyncedEpoch(
                    "spiffe://example.org/web",
                    datetime.fromtimestamp(1_800_000_000, UTC),
                    datetime.fromtimestamp(1_900_000_000, UTC),
                ),
            )
            assert full.denied_authorities == ("ab", "cd")
            assert full.released_ids == ()
            assert beat.denied_authorities is None
            assert full.crls == (b"crl",)
            assert full.bundle is not None
            assert full.bundle.trust_domain == "example.org"
            assert full.bundle.x509_authorities == tuple(site.bundle().x509_authorities)
            assert full.bundle.refresh_hint == timedelta(minutes=5)
            assert full.sent_at.microsecond == 123_000
            assert not full.is_heartbeat
            assert beat.is_heartbeat
            assert beat.bundle is None
            assert beat.crls is None
            session = site.sessions[0]
            assert (session.hello.resume_from, session.hello.entries_digest) == (0, 0)
            assert len(session.hello.version.encode()) <= 64
            assert session.hello.version.startswith("1.2.3 é")
            await until(lambda: session.acks == [9, 9])
            await keeper.close()
            await task


def story(site: SyncServer) -> list[node_sync_pb2.SyncResponse]:
    """A full state in three pieces, a change in two, a bundle, a removal."""
    changed = entry("b", 2)
    return [
        site.full(5, [A], complete=False, entries_digest=0),
        node_sync_pb2.SyncResponse(revision=5, previous=5, changed=[B]),
        delta(5, 5, changed=[C], entries_digest=digest_of([A, B, C])),
        node_sync_pb2.SyncResponse(revision=8, previous=5, changed=[changed], removed_ids=["c"]),
        delta(8, 8, changed=[C], entries_digest=digest_of([A, changed, C])),
        delta(8, 9, bundle=site.bundle(), entries_digest=digest_of([A, changed, C])),
        delta(9, 10, removed_ids=["a"], entries_digest=digest_of([changed, C])),
    ]


STANDS_AT = [0, 0, 0, 5, 5, 8, 9, 10]


@pytest.mark.parametrize("cut", range(8))
async def test_a_stream_cut_at_any_message_is_taken_up_where_the_node_stands(cut: int) -> None:
    async with sync_server() as site:
        messages = story(site)

        async def first(session: Session) -> None:
            for message in messages[:cut]:
                await session.send(message)
            await until(lambda: session.acks[-1:] == [STANDS_AT[cut]] or not STANDS_AT[cut])
            await refuses(session)

        async def second(session: Session) -> None:
            stands = session.hello.resume_from
            assert stands == STANDS_AT[cut]
            begin = {0: 0, 5: 3, 8: 5, 9: 6, 10: 7}[stands]
            for message in messages[begin:]:
                await session.send(message)
            await session.hang()

        site.scripts = [first, second]
        async with kept_node(site.settings()) as keeper:
            mirror = Held()
            task = asyncio.create_task(mirror.run(keeper))
            await until(lambda: mirror.revision == 10 and len(site.sessions) == 2)
            assert mirror.reasons == ["BROKER_STOPPING"]
            assert site.sessions[1].hello.entries_digest in {
                0,
                *(u.entries_digest for u in mirror.updates),
            }
            assert sorted(mirror.entries) == ["b", "c"]
            assert mirror.entries["b"].revision == 2
            await keeper.close()
            await task


def unreadable(site: SyncServer) -> dict[str, node_sync_pb2.SyncResponse | bytes]:
    """What no broker should say after revision 5."""
    foreign = FakeTrustDomain("other.org")
    other = site.bundle()
    other.trust_domain = foreign.trust_domain.name
    empty, junk = site.bundle(), site.bundle()
    del empty.x509_authorities[:]
    junk.x509_authorities[:] = [b"junk"]
    endless = site.bundle()
    endless.refresh_hint_seconds = 2**63 - 1
    late = site.bundle()
    late.jwt_keys.add(key_id="k", public_key=b"x", expires_at=2**62)
    selector = types_pb2.Selector(type="unix", value="uid:0")
    return {
        "octets": b"\xff\xff\xff",
        "a gap": delta(6, 7),
        "backwards": delta(5, 4),
        "a full state without a bundle": node_sync_pb2.SyncResponse(
            revision=9, full=True, complete=True
        ),
        "a foreign bundle": delta(5, 6, bundle=other),
        "a foreign full state": site.full(6, bundle=other),
        "an empty bundle": delta(5, 6, bundle=empty),
        "junk for a CA": delta(5, 6, bundle=junk),
        "an endless hint": delta(5, 6, bundle=endless),
        "a late key": delta(5, 6, bundle=late),
        "no id": delta(5, 6, changed=[entry("", spiffe_id="spiffe://example.org/x")]),
        "no selector": delta(5, 6, changed=[entry("x", selectors=[])]),
        "half a selector": delta(
            5, 6, changed=[entry("x", selectors=[selector, types_pb2.Selector(value="uid:1")])]
        ),
        "a selector twice": delta(5, 6, changed=[entry("x", selectors=[selector, selector])]),
        "a disabled entry": delta(5, 6, changed=[entry("x", disabled=True)]),
        "a foreign identity": delta(5, 6, changed=[entry("x", spiffe_id="spiffe://other.org/x")]),
        "a foreign identity that begins alike": delta(
            5, 6, changed=[entry("x", spiffe_id="spiffe://example.org.evil/x")]
        ),
        "a trust domain for an identity": delta(
            5, 6, changed=[entry("x", spiffe_id="spiffe://example.org")]
        ),
        "dots": delta(5, 6, changed=[entry("x", spiffe_id="spiffe://example.org/a/../b")]),
        "a newline": delta(5, 6, changed=[entry("x", spiffe_id="spiffe://example.org/a\n")]),
        "a time beyond the calendar": delta(5, 6, changed=[entry("x", expires_at=2**60)]),
        "a moment beyond the calendar": delta(5, 6, sent_at_ms=253_402_300_799_999 + 1),
        "a revocation of nothing": delta(
            5, 6, revocations=[revocation_feed_pb2.RevokedCredential(kind=X509)]
        ),
        "an epoch of nobody": delta(5, 6, epochs=[revocation_feed_pb2.IdentityEpoch()]),
        "a late epoch": delta(
            5, 6, epochs=[revocation_feed_pb2.IdentityEpoch(spiffe_id="x", not_before=2**60)]
        ),
        "an authority without a name": delta(
            5, 6, denied_authorities=revocation_feed_pb2.DeniedAuthorities(ids=["a", ""])
        ),
        "a revocation of no kind": delta(
            5, 6, revocations=[revocation_feed_pb2.RevokedCredential(id="x")]
        ),
    }


async def test_what_cannot_be_read_ends_the_stream_and_nothing_of_it_is_kept() -> None:
    # One stream for each, in a row: after each the node must ask for everything again.
    async with sync_server() as site:
        hostile = list(unreadable(site).values())
        sound = site.full(5, [A])
        site.scripts = [says(sound, message) for message in hostile]
        site.scripts.append(says(sound))
        states: list[list[str]] = []
        async with kept_node(site.settings(), dice=lambda: 0.0) as keeper:
            trusted = keeper.bundle
            mirror = Held()
            note = lambda: states.append(sorted(mirror.entries))  # noqa: E731
            task = asyncio.create_task(mirror.run(keeper, note))
            await until(lambda: len(site.sessions) == len(hostile) + 1, 30)
            await until(lambda: len(mirror.updates) == len(hostile) + 1)
            assert set(mirror.reasons) == {"PROTOCOL_VIOLATION", "SYNC_GAP"}
            assert mirror.reasons.count("SYNC_GAP") == 2
            assert states == [["a"]] * len(hostile)
            assert {session.hello.resume_from for session in site.sessions} == {0}
            assert keeper.bundle is not None
            assert trusted is not None
            assert keeper.bundle.same_keys(trusted)
            assert keeper.status.phase is NodePhase.ATTESTED
            assert keeper.status.last_error is None
            await keeper.close()
            await task


async def test_a_change_is_no_beginning() -> None:
    async with following(says(delta(0, 3)), says(delta(0, 0))) as (site, _, mirror):
        await until(lambda: len(mirror.reasons) == 2)
        assert mirror.reasons == ["SYNC_GAP", "SYNC_GAP"]
        assert mirror.revision == 0
        assert not mirror.updates
        assert site.sessions[1].hello.resume_from == 0


async def test_a_full_state_in_the_middle_of_a_change_replaces_it() -> None:
    async with sync_server() as site:
        half = node_sync_pb2.SyncResponse(revision=6, previous=5, changed=[C], removed_ids=["a"])
        site.scripts = [says(site.full(5, [A]), half, site.full(7, [A, B]))]
        async with kept_node(site.settings()) as keeper:
            mirror = Held()
            task = asyncio.create_task(mirror.run(keeper))
            await until(lambda: mirror.revision == 7)
            assert sorted(mirror.entries) == ["a", "b"]
            assert len(mirror.updates) == 2
            await keeper.close()
            await task


async def test_large_messages_arrive_and_huge_ones_end_the_stream() -> None:
    # Far above gRPC's default of 4 MiB, and above what the SDK lets in.
    large = [entry(f"e{n}", hint="x" * 1024) for n in range(12_000)]
    async with sync_server() as site:
        site.scripts = [
            says(site.full(5, large), delta(5, 6, removed_ids=["y" * (65 * 1024 * 1024)])),
            says(delta(5, 6, removed_ids=["e0"], entries_digest=digest_of(large[1:]))),
        ]
        async with kept_node(site.settings()) as keeper:
            mirror = Held()
            task = asyncio.create_task(mirror.run(keeper))
            await until(lambda: mirror.revision == 6, 30)
            assert len(mirror.entries) == len(large) - 1
            assert len(mirror.reasons) == 1
            assert isinstance(mirror.losses[0], LimitReached)
            await keeper.close()
            await task


async def test_silence_is_a_broken_stream() -> None:
    async with following(says(), longest_silence=0.3) as (site, keeper, mirror):
        await until(lambda: len(mirror.reasons) >= 2)
        assert set(mirror.reasons) == {"STREAM_SILENT"}
        error = keeper.status.last_error
        assert error is not None
        assert error.reason == "STREAM_SILENT"
        assert keeper.status.phase is NodePhase.ATTESTED
        assert len(site.sessions) >= 2


async def test_a_stream_that_ends_in_peace_is_opened_again() -> None:
    async def ends(session: Session) -> None:
        pass

    async with following(ends) as (_, _, mirror):
        await until(lambda: len(mirror.reasons) >= 2)
        assert set(mirror.reasons) == {"STREAM_ENDED"}


async def test_many_nodes_do_not_come_back_together() -> None:
    opened: list[float] = []

    async with sync_server() as site:

        async def first(session: Session) -> None:
            await session.send(site.full(5, reconnect_spread_ms=1500))
            await until(lambda: session.acks == [5])
            opened.append(time.monotonic())
            await refuses(session)

        async def second(session: Session) -> None:
            opened.append(time.monotonic())
            await session.hang()

        site.scripts = [first, second]
        async with kept_node(site.settings(), dice=lambda: 0.5) as keeper:
            mirror = Held()
            task = asyncio.create_task(mirror.run(keeper))
            await until(lambda: len(opened) == 2)
            assert 0.7 < opened[1] - opened[0] < 1.4
            await keeper.close()
            await task


async def test_resync_asks_for_everything_and_insisting_on_it_is_slowed_down() -> None:
    opened: list[float] = []

    async with sync_server() as site:

        async def script(session: Session) -> None:
            opened.append(time.monotonic())
            await session.send(site.full(5, [A]))
            await session.hang()

        site.scripts = [script]
        async with kept_node(site.settings(), dice=lambda: 0.0) as keeper:
            updates = 0
            async with aclosing(keeper.follow(lambda: SyncPosition(5, 1))) as events:
                async for event in events:
                    assert isinstance(event, SyncUpdate)  # asked for is not lost
                    updates += 1
                    if updates == 6:
                        break
                    keeper.resync()
            assert [s.hello.resume_from for s in site.sessions] == [5, 0, 0, 0, 0, 0]
            pauses = [after - before for before, after in pairwise(opened)]
            assert pauses[0] < 0.1
            assert pauses[-1] > 0.7
            # Left in the middle, the stream is over, and another may begin.
            async with aclosing(keeper.follow(lambda: SyncPosition(5, 1))) as events:
                assert isinstance(await anext(events), SyncUpdate)
            assert site.sessions[-1].hello.resume_from == 5


async def test_resync_from_elsewhere_ends_a_quiet_stream() -> None:
    async with sync_server() as site:
        site.scripts = [says(site.full(5, [A])), says(site.full(6, [A, B]))]
        async with kept_node(site.settings()) as keeper:
            mirror = Held()
            task = asyncio.create_task(mirror.run(keeper))
            await until(lambda: mirror.revision == 5)
            await asyncio.sleep(0.1)
            keeper.resync()
            await until(lambda: mirror.revision == 6)
            assert not mirror.reasons
            await keeper.close()
            await task


async def test_a_node_is_followed_once() -> None:
    async with following(says()) as (_, keeper, _):
        await until(lambda: keeper.serial != "")
        with pytest.raises(RuntimeError):
            await anext(keeper.follow(SyncPosition))


async def test_an_acknowledgement_of_a_lost_stream_does_no_harm() -> None:
    async with sync_server() as site:

        async def first(session: Session) -> None:
            await session.send(site.full(5))
            await refuses(session)

        site.scripts = [first, says(delta(5, 6))]
        async with kept_node(site.settings()) as keeper:
            held: list[SyncUpdate] = []
            async with aclosing(keeper.follow(lambda: SyncPosition(5 if held else 0, 0))) as events:
                async for event in events:
                    if isinstance(event, SyncLost):
                        await held[0].ack()
                    else:
                        held.append(event)
                        await asyncio.sleep(0.1)  # the broker is gone before it is acknowledged
                        await event.ack()
                    if len(held) == 2:
                        break
            await until(lambda: site.sessions[1].acks == [6])


# --- what is revoked ------------------------------------------------------------------------------


def revoked(name: str) -> revocation_feed_pb2.RevokedCredential:
    return revocation_feed_pb2.RevokedCredential(id=name, kind=X509, expires_at=1_900_000_000)


async def test_of_joined_pieces_the_last_word_counts() -> None:
    async with sync_server() as site:
        site.scripts = [
            says(
                site.full(5, revocations=[revoked("a")], released_ids=["b"], complete=False),
                delta(5, 5, revocations=[revoked("b")]),
                delta(5, 8, revocations=[revoked("c"), revoked("d")], complete=False),
                delta(8, 8, released_ids=["c", "a"], complete=False),
                delta(8, 8, revocations=[revoked("a"), revoked("e")], released_ids=["e"]),
                delta(8, 9, denied_authorities=revocation_feed_pb2.DeniedAuthorities()),
            )
        ]
        async with kept_node(site.settings()) as keeper:
            mirror = Held()
            task = asyncio.create_task(mirror.run(keeper))
            await until(lambda: mirror.revision == 9)
            full, change, none_denied = mirror.updates
            assert [one.id for one in full.revocations] == ["a", "b"]
            assert full.released_ids == ()
            assert full.denied_authorities == ()
            assert [one.id for one in change.revocations] == ["d", "a", "e"]
            assert change.released_ids == ("c",)
            assert change.denied_authorities is None
            assert none_denied.denied_authorities == ()
            assert not none_denied.is_heartbeat
            await keeper.close()
            await task


async def test_a_full_state_that_begins_again_has_nothing_of_the_one_before() -> None:
    async with sync_server() as site:
        site.scripts = [
            says(
                site.full(5, [A], revocations=[revoked("a")], complete=False),
                site.full(6, [B], revocations=[revoked("b")]),
            )
        ]
        async with kept_node(site.settings()) as keeper:
            mirror = Held()
            task = asyncio.create_task(mirror.run(keeper))
            await until(lambda: mirror.revision == 6)
            (full,) = mirror.updates
            assert [one.id for one in full.revocations] == ["b"]
            assert sorted(mirror.entries) == ["b"]
            await keeper.close()
            await task


# --- who follows ----------------------------------------------------------------------------------


async def test_reports_are_gathered_sent_on_change_and_again_on_every_stream() -> None:
    verifiers: list[Verifier] = []
    async with sync_server() as site:

        async def first(session: Session) -> None:
            await session.send(site.full(5))
            await until(lambda: len(session.reports) == 2)
            await refuses(session)

        site.scripts = [first, says(delta(5, 6))]
        async with kept_node(site.settings()) as keeper:
            keeper.report_verifiers(lambda: verifiers)  # before there is a stream
            mirror = Held()
            task = asyncio.create_task(mirror.run(keeper))
            await until(lambda: mirror.revision == 5)
            for number in range(20):
                verifiers.append(Verifier(f"w/{number}", number))
                keeper.report_verifiers(lambda: verifiers)
            await until(lambda: len(site.sessions[0].reports) == 1)
            assert len(site.sessions[0].reports[0]) == 20
            keeper.report_verifiers(lambda: verifiers)  # nothing has changed
            await asyncio.sleep(3 * reports_module.GATHER_SECONDS)
            assert len(site.sessions[0].reports) == 1
            verifiers.clear()
            keeper.report_verifiers(lambda: verifiers)
            await until(lambda: len(site.sessions) == 2)
            assert site.sessions[0].reports[1] == {}
            verifiers.append(Verifier("w/1", 6))
            keeper.report_verifiers(lambda: verifiers)
            await until(lambda: site.sessions[1].reports[-1:] == [{"w/1": 6}])
            assert site.sessions[1].acks[-1:] == [6]
            await keeper.close()
            await task


async def test_a_report_has_no_more_than_a_broker_takes(caplog: pytest.LogCaptureFixture) -> None:
    async with following() as (site, keeper, _):
        site.scripts = [says(site.full(5))]
        for count in (1_200, 1_201):
            many = [Verifier(f"w/{number}", count) for number in range(count)]
            keeper.report_verifiers(lambda many=many: many)  # type: ignore[misc]
            await until(
                lambda count=count: bool(  # type: ignore[misc]
                    site.sessions
                    and site.sessions[-1].reports
                    and set(site.sessions[-1].reports[-1].values()) == {count}
                )
            )
        assert len(site.sessions[-1].reports[-1]) == 1_000
        assert "w/0" in site.sessions[-1].reports[-1]
    assert len([one for one in caplog.records if "follow revocations" in one.message]) == 1


async def test_reports_and_acknowledgements_do_not_meet() -> None:
    # gRPC takes one message at a time: a second one would end the stream.
    async with sync_server() as site:

        async def script(session: Session) -> None:
            await session.send(site.full(1))
            for revision in range(1, 300):
                await session.send(delta(revision, revision + 1))
            await session.hang()

        site.scripts = [script]
        async with kept_node(site.settings()) as keeper:
            mirror = Held()
            task = asyncio.create_task(mirror.run(keeper))
            for number in range(60):
                keeper.report_verifiers(
                    lambda number=number: [  # type: ignore[misc]
                        Verifier(f"{each}/{number}", number) for each in range(900)
                    ]
                )
                await asyncio.sleep(0.01)
            await until(lambda: mirror.revision == 300)
            await until(lambda: site.sessions[0].acks[-1:] == [300])
            assert len(site.sessions) == 1
            assert not mirror.reasons
            assert site.sessions[0].reports
            await keeper.close()
            await task


async def test_a_node_whose_authority_is_denied_renews_itself() -> None:
    async with sync_server() as site:
        authority = site.domain.bundle.x509_authorities[0]
        name = x509.SubjectKeyIdentifier.from_public_key(authority.public_key()).digest.hex()
        denies = revocation_feed_pb2.DeniedAuthorities(ids=[name])
        others = revocation_feed_pb2.DeniedAuthorities(ids=["00"])

        async def script(session: Session) -> None:
            await session.send(site.full(5, denied_authorities=others))
            await until(lambda: session.acks == [5])
            assert site.renewals == 0
            await session.send(delta(5, 6, denied_authorities=denies))
            await session.hang()

        site.scripts = [script]
        async with kept_node(site.settings()) as keeper:
            mirror = Held()
            task = asyncio.create_task(mirror.run(keeper))
            await until(lambda: site.renewals == 1)
            await keeper.close()
            await task
