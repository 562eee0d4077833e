"""Selector syntax: total, in step with what attestors emit, and honest in what it proposes."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from identity_broker.domain.selector import MAX_VALUE_BYTES, Selector
from identity_broker.domain.selector_syntax import FORMS, SelectorSyntax
from identity_broker.errors import EntryInvalid, Kind

SYNTAX = SelectorSyntax()
PROPOSED = re.compile(r'did you mean "(.*)"\?')

PRINTABLE = st.characters(codec="utf-8").filter(str.isprintable)
WORDS = st.text(PRINTABLE, min_size=1, max_size=40)
KEYS = sorted({key for forms in FORMS.values() for key in forms})
# Near the truth: known types and keys, and what people write after them.
NEARLY = st.tuples(
    st.sampled_from([*FORMS, "unx", "podman", "uid", "path", "k8s"]),
    st.sampled_from([*KEYS, "uuid", "labels", "image", ""]),
    st.one_of(
        WORDS,
        st.sampled_from(["", "0", "00", "/", "//", "/a/../..", "A" * 64, "a" * 64, "a:b", "a=b"]),
        st.from_regex(r"(sha256:)?[0-9a-fA-F:]{60,70}", fullmatch=True),
        st.from_regex(r"/?([a-z.]{0,3}/){0,5}[a-z.]{0,3}", fullmatch=True),
    ),
).map(":".join)
ANY = st.one_of(
    NEARLY, st.tuples(st.from_regex(r"[a-z0-9_]{1,12}", fullmatch=True), WORDS).map(":".join)
)

HEX64 = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
NUMBERS = st.integers(0, 2**32 - 2).map(str)
NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.\\ -]{0,30}[A-Za-z0-9$_]", fullmatch=True)
PATHS = st.lists(
    st.text(PRINTABLE.filter(lambda char: char != "/"), min_size=1, max_size=12).filter(
        lambda part: part not in (".", "..") and part == part.strip()
    ),
    min_size=1,
    max_size=6,
).map(lambda parts: "/" + "/".join(parts))
UNITS = st.from_regex(r"[A-Za-z0-9:_.\\@-]{1,60}", fullmatch=True)
EMITTED: dict[str, st.SearchStrategy[str]] = {
    "unix:uid": NUMBERS,
    "unix:gid": NUMBERS,
    "unix:supplementary_gid": NUMBERS,
    "unix:user": NAMES,
    "unix:group": NAMES,
    "unix:supplementary_group": NAMES,
    "unix:path": PATHS,
    "unix:sha256": HEX64,
    "systemd:id": UNITS.map(lambda name: f"{name}.service"),
    "systemd:user_unit": UNITS.map(lambda name: f"{name}.service"),
    "systemd:slice": UNITS.map(lambda name: f"{name}.slice"),
    "docker:label": st.tuples(
        st.from_regex(r"[a-z][a-z0-9._-]{0,30}", fullmatch=True), st.text(PRINTABLE, max_size=40)
    ).map(":".join),
    "docker:env": st.tuples(
        st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,20}", fullmatch=True),
        st.text(PRINTABLE, max_size=40),
    ).map("=".join),
    "docker:image_id": st.from_regex(r"[a-z0-9./:_-]{1,60}", fullmatch=True),
    "docker:image_digest": HEX64.map(lambda digest: f"sha256:{digest}"),
    "join_token:name": st.from_regex(r"[A-Za-z0-9._-]{1,40}", fullmatch=True),
    "x509_pop:serial": st.integers(0, 2**160 - 1).map(lambda number: f"{number:x}"),
    "x509_pop:fingerprint": HEX64,
    "x509_pop:subject:cn": WORDS,
    "x509_pop:san:dns": st.from_regex(r"[A-Za-z0-9*.-]{1,60}", fullmatch=True),
    "x509_pop:ca:fingerprint": HEX64,
}


def taken(text: str) -> bool:
    try:
        SYNTAX.check(Selector.parse(text))
    except EntryInvalid:
        return False
    return True


def test_every_form_has_its_facts() -> None:
    forms = {f"{kind}:{key}" for kind, keys in FORMS.items() for key in keys}
    assert set(EMITTED) == forms


@given(
    st.sampled_from(sorted(EMITTED)).flatmap(lambda form: st.tuples(st.just(form), EMITTED[form]))
)
def test_facts_are_taken(fact: tuple[str, str]) -> None:
    SYNTAX.check(Selector.parse(":".join(fact)))


def refused_well(error: EntryInvalid, text: str) -> None:
    assert error.kind is Kind.INVALID
    assert error.public.isprintable()
    assert error.hint.isprintable()
    assert error.hint
    for meant in PROPOSED.findall(error.hint):
        assert meant != text
        assert taken(meant), meant


@given(ANY)
def test_whatever_is_written_is_taken_or_refused_with_advice_that_holds(text: str) -> None:
    try:
        selector = Selector.parse(text)
    except EntryInvalid:
        return
    try:
        SYNTAX.check(selector)
    except EntryInvalid as error:
        refused_well(error, text)
    else:
        assert selector.type in FORMS


@given(NUMBERS, HEX64, PATHS)
def test_a_fact_has_one_spelling(number: str, digest: str, path: str) -> None:
    """A second spelling of the same thing would be taken and never match."""
    numbers = [f"0{number}", f"+{number}", f" {number}", f"{number} ", f"{number}.0"]
    paths = [f"{path}/", f"/{path}", f"{path}/.", f"/x/..{path}", f"{path}/../x", path[1:]]
    digests = [f"0{digest}", f"sha256:{digest}", f" {digest}"]
    if not digest.isdigit():
        digests.append(digest.upper())
    assert not [one for one in numbers if taken(f"unix:uid:{one}")]
    assert not [one for one in paths if taken(f"unix:path:{one}")]
    assert not [one for one in digests if taken(f"unix:sha256:{one}")]


@given(st.text(max_size=2 * MAX_VALUE_BYTES), st.text(max_size=30))
def test_any_text_at_all(value: str, kind: str) -> None:
    for text in (value, f"unix:{value}", f"docker:label:{value}", f"{kind}:{value}"):
        try:
            selector = Selector.parse(text)
        except EntryInvalid:
            continue
        try:
            SYNTAX.check(selector)
        except EntryInvalid:
            continue
