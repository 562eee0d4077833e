"""Our SPIFFE ID parser and py-spiffe's accept the same IDs.

Known differences, in all of which we refuse (SPIFFE-ID sections 2.1 to 2.4):
- py-spiffe lowers an upper-case scheme or trust domain; we refuse it (ID-3, ID-7).
- py-spiffe has no length limits; we hold 2,048 and 255 bytes (ID-6);
- py-spiffe 0.3.2 lets a line end pass behind the trust domain or a segment (ID-3, ID-5).
"""

from __future__ import annotations

import string

from hypothesis import example, given
from hypothesis import strategies as st
from spiffe import SpiffeId as TheirSpiffeId
from spiffe import TrustDomain as TheirTrustDomain
from spiffe.errors import PySpiffeError

from identity_ca.errors import SpiffeIdError
from identity_ca.spiffe_id import SpiffeId, TrustDomain

segments = st.text(string.ascii_letters + string.digits + "._-", min_size=1, max_size=12).filter(
    lambda text: text not in (".", "..")
)
domains = st.text(string.ascii_lowercase + string.digits + "._-", min_size=1, max_size=40)
valid = st.builds(
    lambda domain, parts: f"spiffe://{domain}" + "".join(f"/{part}" for part in parts),
    domains,
    st.lists(segments, max_size=5),
)
# Near misses: the alphabet of URIs, so that most texts are almost SPIFFE IDs.
near = st.text("aZ0.-_/%2eE:@?#~ \n\tä", max_size=24)
candidates = st.one_of(
    valid,
    near.map(lambda rest: f"spiffe://{rest}"),
    st.builds(lambda domain, rest: f"spiffe://{domain}/{rest}", domains, near),
    st.builds(lambda domain, rest: f"spiffe://{domain}{rest}", domains, near),
    st.text(max_size=40),
)


def ours(text: str) -> str | None:
    try:
        return str(SpiffeId.parse(text))
    except SpiffeIdError:
        return None


def theirs(text: str) -> str | None:
    try:
        return str(TheirSpiffeId(text))
    except PySpiffeError:
        return None


def has_upper_case_authority(text: str) -> bool:
    authority = text[: text.find("/", len("spiffe://"))] if text.count("/") > 2 else text
    return authority != authority.lower()


@given(candidates)
@example("spiffe://example.org/%2e")
@example("spiffe://example.org/a/")
@example("spiffe://example.org//a")
@example("spiffe://example.org/..")
@example("spiffe://exa mple.org/a")
@example("spiffe://example.org/a\n")
@example("spiffe://example.org\n")
@example("SPIFFE://example.org/a")
@example("spiffe://Example.org/a")
def test_accepts_what_py_spiffe_accepts(text: str) -> None:
    if has_upper_case_authority(text) or "\n" in text:
        assert ours(text) is None
    else:
        assert ours(text) == theirs(text)


@given(valid)
def test_round_trip(text: str) -> None:
    parsed = SpiffeId.parse(text)
    assert str(parsed) == text
    assert SpiffeId.parse(str(parsed)) == parsed
    parts = parsed.path.split("/")[1:]
    assert SpiffeId.from_segments(parsed.trust_domain, *parts) == parsed
    assert parsed.member_of(TrustDomain(TheirTrustDomain(text).name))


@given(valid, valid)
def test_equal_exactly_when_the_text_is(first: str, second: str) -> None:
    a, b = SpiffeId.parse(first), SpiffeId.parse(second)
    assert (a == b) == (first == second)
    if a.dns_san() is not None and a.trust_domain == b.trust_domain:
        assert (a.dns_san() == b.dns_san()) == (first == second)
