"""Selections: one spelling, read back as it was; nothing that is typed gets past the reader."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from identity_broker.domain import names
from identity_broker.domain.credential import CredentialKind
from identity_broker.domain.entry import RegistrationEntry
from identity_broker.domain.revocation import (
    MAX_SUBJECT_BYTES,
    RevocationSubject,
    SubjectKind,
)
from identity_broker.domain.selection import Selection, parse_selection, subject
from identity_broker.domain.selector import Selector
from identity_broker.errors import InvalidSpiffeId, SubjectInvalid
from identity_ca.spiffe_id import SpiffeId, TrustDomain

DOMAIN = TrustDomain("example.org")
NOW = datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
API = SpiffeId.parse("spiffe://example.org/payments/api")

segments = st.from_regex(r"[A-Za-z0-9._-]{1,12}", fullmatch=True).filter(
    lambda text: text not in (".", "..")
)
identities = st.lists(segments, min_size=1, max_size=4).map(
    lambda parts: SpiffeId.from_segments(DOMAIN, *parts)
)
nodes = st.lists(segments, min_size=1, max_size=2).map(
    lambda parts: names.node_id(DOMAIN, "join_token", *parts)
)
prefixes = st.from_regex(r"([A-Za-z0-9._-]{1,8}/){0,3}[A-Za-z0-9._-]{0,8}", fullmatch=True).map(
    lambda path: f"spiffe://example.org/{path}"
)
texts = st.text(
    st.characters(exclude_categories=["C", "Z"]) | st.just(" "), min_size=1, max_size=20
)
instants = st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=st.sampled_from([UTC]))
hexes = st.binary(min_size=32, max_size=32).map(bytes.hex)
words = st.from_regex(r"[!-~]{1,40}", fullmatch=True)
label_keys = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,10}", fullmatch=True)

FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "spiffe_id": identities,
    "spiffe_id_prefix": prefixes,
    "node_id": nodes,
    "entry_id": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,10}", fullmatch=True),
    "owner": texts,
    "labels": st.dictionaries(label_keys, texts | st.just(""), min_size=1, max_size=4).map(
        lambda labels: tuple(sorted(labels.items()))
    ),
    "kind": st.sampled_from(CredentialKind),
    "instance": texts,
    "authority_id": words,
    "key_fingerprint": hexes,
    "serial": hexes.map(lambda digits: digits[:40]),
    "jti": words,
    "issued_after": instants,
    "issued_before": instants,
}
selections = (
    st.sets(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=8)
    .map(lambda chosen: chosen - {"spiffe_id_prefix"} if "spiffe_id" in chosen else chosen)
    .flatmap(lambda chosen: st.fixed_dictionaries({name: FIELDS[name] for name in sorted(chosen)}))
    .map(lambda fields: Selection(**fields))
)
# What people type, and what they mistype.
typed = st.lists(
    st.sampled_from(
        [
            *("spiffe-id=", "node=", "entry=", "owner=", "label.", "label.a=", "kind=", "serial="),
            *("instance=", "authority=", "key=", "jti=", "issued-after=", "issued-before="),
            *("/shop", "/*", "*", "spiffe://", "example.org", '"', "\\", " ", "=", "x509", "2h"),
            *("9999999d", "2030-01-01T00:00:00Z", "0001-01-01T00:00:00+23:59", "ab" * 20, "\x00"),
        ]
    )
    | st.text(max_size=4),
    max_size=12,
).map("".join)


def parse(text: str) -> Selection:
    return parse_selection(text, DOMAIN, NOW)


@given(selections)
def test_a_selection_is_read_back_as_it_was_written(selection: Selection) -> None:
    text = str(selection)
    assert parse(text) == selection
    assert str(parse(text)) == text
    assert Selection.of(RevocationSubject(SubjectKind.SELECT, text)) == selection


@given(st.text() | typed, st.sampled_from(SubjectKind))
@example("label.a" + "=" * 2000, SubjectKind.SELECT)
@example('owner="' + "\\" * 1999, SubjectKind.SELECT)
@example("spiffe-id=/" + "a/" * 900 + "!*", SubjectKind.SELECT)
@example("\ud800", SubjectKind.SELECT)
@example("9" * 5000, SubjectKind.SERIAL)
def test_whatever_is_typed_is_read_or_refused(text: str, kind: SubjectKind) -> None:
    try:
        one = subject(kind, text, trust_domain=DOMAIN, now=NOW)
    except (SubjectInvalid, InvalidSpiffeId):
        return
    assert len(one.value.encode()) <= MAX_SUBJECT_BYTES
    # What was taken is canonical: neither time nor place changes it.
    later = NOW + timedelta(days=1)
    assert subject(kind, one.value, trust_domain=DOMAIN, now=later) == one
    assert str(Selection.of(one))


@given(selections, st.data())
def test_a_selection_covers_the_entries_whose_fields_it_names(
    selection: Selection, data: st.DataObject
) -> None:
    entry = RegistrationEntry(
        id=selection.entry_id or "api",
        spiffe_id=data.draw(identities.filter(lambda one: not names.is_reserved(one))),
        parent_id=SpiffeId.parse("spiffe://example.org/group"),
        selectors=frozenset({Selector("unix", "uid:1")}),
        owner=selection.owner,
        labels=MappingProxyType({"more": "of them", **dict(selection.labels)}),
    )
    of_credentials = {
        *("node_id", "kind", "instance", "authority_id", "key_fingerprint"),
        *("serial", "jti", "issued_after", "issued_before"),
    }
    if any(getattr(selection, name) for name in of_credentials):
        assert selection.covers_entry(entry) is None
        return
    exactly = replace(selection, spiffe_id=entry.spiffe_id, spiffe_id_prefix="")
    begins = replace(selection, spiffe_id=None, spiffe_id_prefix=str(entry.spiffe_id)[:-1])
    for named in (exactly, begins):
        assert named.covers_entry(entry) is True
        if selection.owner:
            assert named.covers_entry(replace(entry, owner="")) is False
        if selection.labels:
            assert named.covers_entry(replace(entry, labels=MappingProxyType({}))) is False
        if selection.entry_id:
            assert named.covers_entry(replace(entry, id="another-one-of-them")) is False
    longer = replace(selection, spiffe_id=None, spiffe_id_prefix=f"{entry.spiffe_id}x")
    assert longer.covers_entry(entry) is False


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("spiffe-id=/a", "spiffe-id=spiffe://example.org/a"),
        ("spiffe-id=/a*", "spiffe-id=spiffe://example.org/a*"),
        (" kind=x509\n spiffe-id=/* ", "spiffe-id=spiffe://example.org/* kind=x509"),
        ("issued-after=2h", "issued-after=2030-01-02T01:04:05.678901Z"),
        ("issued-before=2030-01-01T01:00:00+01:00", "issued-before=2030-01-01T00:00:00Z"),
        ("issued-before=2030-01-01t00:00:00.5z", "issued-before=2030-01-01T00:00:00.500000Z"),
        ('label.b=x owner="a team" label.a=""', 'label.a="" label.b=x owner="a team"'),
        (r'owner="a \"b\" \\"', r'owner="a \"b\" \\"'),
        ("serial=0A:FF", f"serial={'aff':0>40}"),
        (f"key=SHA256:{':'.join(['AB'] * 32)}", f"key={'ab' * 32}"),
    ],
)
def test_expressions_have_one_spelling(text: str, canonical: str) -> None:
    assert str(parse(text)) == canonical


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "would select everything"),
        ("  ", "would select everything"),
        ("payments", "is not TERM=VALUE"),
        ('owner="a"b', "is not TERM=VALUE"),
        ('owner="a', "is not TERM=VALUE"),
        ("colour=red", "nothing a credential can be selected by"),
        ("Owner=a", "is not TERM=VALUE"),
        ("owner=", "owner is printable text"),
        ('owner="a\tb"', "owner is printable text"),
        ("owner=a owner=a", "stands twice"),
        ("spiffe-id=/a spiffe-id=/b*", "stands twice"),
        ("label.a=1 label.a=2", "stands twice"),
        ("label.=1", "not a label name"),
        ("node=/payments/api", "is not a node"),
        ("kind=ssh", "x509 or jwt"),
        ("entry=a/b", "not an entry's id"),
        ("serial=xyz", "40 hexadecimal digits"),
        (f"serial={'a' * 41}", "40 hexadecimal digits"),
        ("serial=", "40 hexadecimal digits"),
        ("key=ab", "64 hexadecimal digits"),
        ("issued-after=yesterday", "how long ago"),
        ("issued-after=2030-01-01", "how long ago"),
        ("issued-after=2030-02-30T00:00:00Z", "how long ago"),
        ("issued-after=2030-01-01T00:00:00", "how long ago"),
        ("issued-after=999999d", "how long ago"),
        ("issued-before=0001-01-01T00:00:00+01:00", "how long ago"),
        (f"owner={'a' * 2048}", "2048 bytes"),
        (f"spiffe-id=/{'a' * 2020}", "2048 bytes"),
    ],
)
def test_an_expression_that_is_none_says_what_is_wrong(text: str, sentence: str) -> None:
    with pytest.raises(SubjectInvalid, match=sentence):
        parse(text)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("spiffe-id=payments", "begins with"),
        ("spiffe-id=spiffe://other.org/a", "nothing outside of spiffe://example.org"),
        ("spiffe-id=spiffe://other.org/*", "nothing outside of spiffe://example.org"),
        ("spiffe-id=spiffe://example.org", "own ID is never issued"),
        ("spiffe-id=*", "what a SPIFFE ID begins with"),
        ("spiffe-id=//*", "what a SPIFFE ID begins with"),
        ("spiffe-id=/a*b*", "what a SPIFFE ID begins with"),
        ("spiffe-id=/a*b", "ID-5"),
        ("node=spiffe://other.org/idb/node/x/y", "nothing outside"),
    ],
)
def test_spiffe_ids_are_of_the_trust_domain(text: str, sentence: str) -> None:
    with pytest.raises(InvalidSpiffeId, match=sentence):
        parse(text)


def test_a_time_zone_does_not_change_a_moment() -> None:
    elsewhere = NOW.astimezone(timezone(timedelta(hours=9)))
    assert parse_selection("issued-after=1h", DOMAIN, elsewhere) == parse("issued-after=1h")


@pytest.mark.parametrize(
    ("kind", "value", "canonical"),
    [
        (SubjectKind.SPIFFE_ID, " /payments/api ", str(API)),
        (SubjectKind.SERIAL, "0xAB", f"{'ab':0>40}"),
        (SubjectKind.JTI, 'a=b"c', 'a=b"c'),
        (SubjectKind.NODE, "/idb/node/a/b", "spiffe://example.org/idb/node/a/b"),
        (SubjectKind.ENTRY, "api", "api"),
        (SubjectKind.KEY_FINGERPRINT, "AB" * 32, "ab" * 32),
        (SubjectKind.AUTHORITY, "ab" * 20, "ab" * 20),
        (SubjectKind.SELECT, "entry=api kind=jwt", "kind=jwt entry=api"),
    ],
)
def test_subjects_have_one_spelling(kind: SubjectKind, value: str, canonical: str) -> None:
    one = subject(kind, value, trust_domain=DOMAIN, now=NOW)
    assert one == RevocationSubject(kind, canonical)
    assert str(Selection.of(one))


def test_one_spiffe_id_is_one_identity() -> None:
    with pytest.raises(SubjectInvalid, match="one identity") as refused:
        subject(SubjectKind.SPIFFE_ID, "/payments/*", trust_domain=DOMAIN, now=NOW)
    assert "spiffe-id=spiffe://example.org/payments/*" in refused.value.hint


@pytest.mark.parametrize(
    ("text", "identity", "node", "singles_out"),
    [
        (f"spiffe-id={API}", API, None, False),
        (f"spiffe-id={API} kind=jwt", None, None, False),
        (f"spiffe-id={API}*", None, None, False),
        (
            "spiffe-id=/idb/node/a/b",
            names.node_id(DOMAIN, "a", "b"),
            names.node_id(DOMAIN, "a", "b"),
            False,
        ),
        ("node=/idb/node/a/b", None, names.node_id(DOMAIN, "a", "b"), False),
        ("node=/idb/node/a/b entry=api", None, None, False),
        ("serial=ab", None, None, True),
        ("jti=ab kind=jwt", None, None, True),
    ],
)
def test_a_selection_knows_what_it_is_all_of(
    text: str, identity: SpiffeId | None, node: SpiffeId | None, singles_out: bool
) -> None:
    selection = parse(text)
    assert (selection.identity, selection.node) == (identity, node)
    assert selection.singles_out is singles_out
