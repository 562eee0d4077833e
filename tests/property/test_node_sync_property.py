"""The stream of changes, as no broker would cut it and as no broker would say it."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime

from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from spiffe import TrustDomain

from identity_api.broker.v1 import credential_pb2, node_sync_pb2, revocation_feed_pb2, types_pb2
from identity_client._wire.sync import UpdateReader
from identity_client.errors import ProtocolViolation
from identity_client.node import SyncUpdate, entry_digest
from support.sync_server import delta, entry

DOMAIN = TrustDomain("example.org")
BUNDLE = types_pb2.TrustBundle(trust_domain="example.org", x509_authorities=[b"ca"], sequence=1)

numbers = st.integers(0, 2**63 - 1) | st.sampled_from([0, 1, 2, 2**63 - 1])
names = st.text(max_size=8) | st.sampled_from(
    ["spiffe://example.org/a", "spiffe://example.org/a/../b", "spiffe://other.org/a", "example.org"]
)


@st.composite
def messages(draw: st.DrawFn) -> node_sync_pb2.SyncResponse:
    """Anything that the protocol's grammar allows, sense or none."""
    message = node_sync_pb2.SyncResponse(
        revision=draw(numbers),
        previous=draw(numbers),
        full=draw(st.booleans()),
        complete=draw(st.booleans()),
        removed_ids=draw(st.lists(names, max_size=2)),
        entries_digest=draw(numbers),
        reconnect_spread_ms=draw(st.integers(-(2**31), 2**31 - 1)),
        sent_at_ms=draw(st.integers(-(2**63), 2**63 - 1)),
    )
    if draw(st.booleans()):
        message.changed.add(
            id=draw(names),
            spiffe_id=draw(names),
            revision=draw(numbers),
            selectors=[types_pb2.Selector(type=draw(names), value=draw(names))],
            expires_at=draw(st.integers(-(2**63), 2**63 - 1)),
            x509_ttl_seconds=draw(st.integers(-(2**31), 2**31 - 1)),
        )
    if draw(st.booleans()):
        message.bundle.CopyFrom(
            types_pb2.TrustBundle(
                trust_domain=draw(names),
                x509_authorities=draw(st.lists(st.binary(max_size=4), max_size=2)),
                refresh_hint_seconds=draw(st.integers(-(2**63), 2**63 - 1)),
                jwt_keys=[types_pb2.JwtKey(expires_at=draw(st.integers(-(2**63), 2**63 - 1)))],
            )
        )
    if draw(st.booleans()):
        message.revocations.append(
            revocation_feed_pb2.RevokedCredential(
                id=draw(names),
                kind=draw(st.sampled_from(credential_pb2.CredentialKind.values())),
                revoked_at=draw(numbers),
                expires_at=draw(numbers),
            )
        )
    return message


async def nobody(_revision: int) -> None:
    """Takes acknowledgements."""


@given(st.lists(messages(), max_size=4), numbers)
def test_whatever_is_said_is_read_or_refused(
    said: list[node_sync_pb2.SyncResponse], position: int
) -> None:
    reader = UpdateReader(DOMAIN, position, nobody)
    stands: int | None = position or None
    with suppress(ProtocolViolation):
        for message in said:
            update = reader.read(message)
            if update is None:
                continue
            assert message.complete
            assert update.full or (update.previous == stands and update.revision >= stands)
            assert not update.full or (update.bundle is not None and update.crls is not None)
            for one in update.entries:
                assert one.spiffe_id.startswith("spiffe://example.org/")
                assert ".." not in one.spiffe_id
                assert one.selectors
            assert not {one.id for one in update.entries} & set(update.removed_ids)
            assert isinstance(update.sent_at, datetime)
            stands = update.revision


@given(st.binary(max_size=60))
def test_octets_are_read_or_refused(octets: bytes) -> None:
    with suppress(ProtocolViolation, DecodeError):
        UpdateReader(DOMAIN, 0, nobody).read(node_sync_pb2.SyncResponse.FromString(octets))


steps = st.lists(
    st.tuples(st.sampled_from(["put", "drop"]), st.sampled_from("abc"), st.integers(1, 3)),
    min_size=1,
    max_size=8,
)


@given(steps, st.integers(1, 4), st.booleans())
def test_pieces_say_what_was_said_step_by_step(
    steps: list[tuple[str, str, int]], size: int, full: bool
) -> None:
    put: dict[str, int] = {}
    dropped: set[str] = set()
    for what, name, revision in steps:
        put.pop(name, None)
        dropped.discard(name)
        if what == "put":
            put[name] = revision
        else:
            dropped.add(name)
    pieces = [
        delta(
            5,
            9,
            full=full and not at,
            complete=False,
            changed=[entry(steps[at][1], steps[at][2])] if steps[at][0] == "put" else [],
            removed_ids=[steps[at][1]] if steps[at][0] == "drop" else [],
        )
        for at in range(len(steps))
    ]
    pieces[0].bundle.CopyFrom(BUNDLE)
    for at in range(1, len(pieces), size):
        pieces[at].previous = 9  # what later pieces name there means nothing
    pieces[-1].complete = True
    reader = UpdateReader(DOMAIN, 5, nobody)
    joined: list[SyncUpdate | None] = [reader.read(piece) for piece in pieces]
    assert joined[:-1] == [None] * (len(pieces) - 1)
    update = joined[-1]
    assert update is not None
    assert (update.previous, update.revision, update.full) == (5, 9, full)
    assert {one.id: one.revision for one in update.entries} == put
    assert set(update.removed_ids) == dropped
    assert update.bundle is not None


def test_a_digest_is_what_the_protocol_says() -> None:
    # printf 'web\\0007' | sha256sum | cut -c1-16
    assert entry_digest("web", 7) == 0x320DCF5471A3CA75
    assert entry_digest("web", 7) != entry_digest("web", 8)
    # The zero octet keeps an id and a revision apart.
    assert entry_digest("e1", 1) != entry_digest("e", 11)
