"""Whatever is asked for: what is issued validates, and stays inside its limits."""

from __future__ import annotations

import contextlib
import json
from datetime import timedelta

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from identity_ca.errors import AudienceInvalid, TokenRejected
from identity_ca.jose import MalformedJose, b64url_decode, b64url_encode, parse_json_object
from identity_ca.jwt import MAX_JWT_TTL, MAX_TOKEN_BYTES, verify_jwt_svid
from identity_ca.keys import KeyAlgorithm
from identity_ca.spiffe_id import SpiffeId
from support.ca_material import NOW, TRUST_DOMAIN, jwt_bundle, jwt_issuer, signing_key

segments = st.text("abcXYZ019-_", min_size=1, max_size=12)
spiffe_ids = st.lists(segments, min_size=1, max_size=5).map(
    lambda found: SpiffeId.from_segments(TRUST_DOMAIN, *found)
)
audiences = st.lists(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=40), min_size=1, max_size=32
)
ttls = st.timedeltas(min_value=timedelta(seconds=1), max_value=MAX_JWT_TTL)
algorithms = st.sampled_from([KeyAlgorithm.EC_P256, KeyAlgorithm.EC_P384])


@given(spiffe_id=spiffe_ids, asked=audiences, ttl=ttls, algorithm=algorithms)
@settings(max_examples=150, deadline=None)
def test_what_is_issued_validates_until_it_expires(spiffe_id, asked, ttl, algorithm):
    key = signing_key(algorithm)
    issuer = jwt_issuer(key, not_after=NOW + timedelta(hours=12))
    try:
        prepared = issuer.prepare(spiffe_id=spiffe_id, audiences=asked, ttl=ttl, now=NOW)
    except AudienceInvalid:
        assert any(not a.isprintable() for a in asked) or sum(map(len, asked)) > 1000
        return
    credential = issuer.sign(prepared)
    assert len(credential.token) <= MAX_TOKEN_BYTES
    assert credential.not_before <= NOW < credential.not_after
    assert credential.not_after <= min(NOW + ttl, issuer.not_after)

    bundle = jwt_bundle(("key-1", key))
    for ours in (asked[0], asked[-1]):
        verified = verify_jwt_svid(
            credential.token, bundle=bundle, audience=ours, now=NOW, leeway=timedelta(0)
        )
        assert verified.spiffe_id == spiffe_id
        assert set(verified.audiences) == set(asked)
        assert verified.expires_at == credential.not_after
        assert verified.jti == prepared.jti
    with pytest.raises(TokenRejected):
        verify_jwt_svid(
            credential.token,
            bundle=bundle,
            audience=asked[0],
            now=credential.not_after,
            leeway=timedelta(0),
        )


@given(position=st.integers(0, 2**31), flip=st.integers(1, 127))
@settings(max_examples=300, deadline=None)
def test_a_token_with_any_one_character_changed_is_refused(position, flip):
    issuer = jwt_issuer()
    token = issuer.sign(
        issuer.prepare(
            spiffe_id=SpiffeId.parse("spiffe://example.org/a"),
            audiences=["reports"],
            ttl=timedelta(minutes=5),
            now=NOW,
        )
    ).token
    position %= len(token)
    changed = token[:position] + chr(ord(token[position]) ^ flip) + token[position + 1 :]
    assume(changed != token)
    with pytest.raises(TokenRejected):
        verify_jwt_svid(changed, bundle=jwt_bundle(), audience="reports", now=NOW)


@given(st.binary(max_size=100))
def test_base64url_has_one_spelling_for_each_value(raw):
    text = b64url_encode(raw)
    assert b64url_decode(text) == raw
    for other in (
        text + "=",
        text + "\n",
        " " + text,
        text + "==",
        text + "A" * (5 - len(text) % 4),
    ):
        with contextlib.suppress(MalformedJose):
            assert b64url_decode(other) != raw


@given(st.text(st.characters(codec="ascii"), max_size=24))
@example("AB")
@example("AAB")
@example("_-8")
def test_no_two_base64url_texts_have_one_value(text):
    try:
        raw = b64url_decode(text)
    except MalformedJose:
        return
    assert b64url_encode(raw) == text


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(
    st.dictionaries(st.text(st.characters(codec="utf-8")), json_values, max_size=5), st.booleans()
)
def test_strict_json_reads_what_json_writes(members, escaped):
    raw = json.dumps(members, ensure_ascii=escaped).encode()
    assert parse_json_object(raw) == members
