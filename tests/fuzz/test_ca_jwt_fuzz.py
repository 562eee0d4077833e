"""Hostile tokens: whatever the bytes, the answer is a `TokenRejected` and never another error."""

from __future__ import annotations

import json
import string
from datetime import timedelta

from hypothesis import given, settings
from hypothesis import strategies as st

from identity_ca.errors import CAError, TokenRejected
from identity_ca.jwt import verify_jwt_svid
from identity_ca.spiffe_id import SpiffeId
from support.ca_material import NOW, b64url, claims, forge, jwt_bundle, jwt_issuer

EXAMPLES = 200
BUNDLE = jwt_bundle()
HEADER = {"alg": "ES256", "kid": "key-1", "typ": "JWT"}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def verify(token: str) -> None:
    """Returns for a token that holds, too; anything but these two outcomes escapes."""
    try:
        verify_jwt_svid(token, bundle=BUNDLE, audience="reports", now=NOW)
    except TokenRejected as rejection:
        sentence = rejection.message
    else:
        return
    assert 0 < len(sentence) < 300


@given(st.text())
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_text(token):
    verify(token)


@given(st.text(string.ascii_letters + string.digits + "-_.", max_size=200))
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_text_of_the_right_alphabet(token):
    verify(token)


@given(st.binary(max_size=80), st.binary(max_size=80), st.binary(max_size=80))
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_three_parts(header, payload, signature):
    verify(".".join(map(b64url, (header, payload, signature))))


@given(
    st.dictionaries(st.sampled_from(["alg", "kid", "typ", "crit", "jwk"]) | st.text(), json_values)
)
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_header(header):
    verify(forge(json.dumps(HEADER | header).encode("utf-8", "surrogatepass"), claims()))


@given(
    st.dictionaries(
        st.sampled_from(["sub", "aud", "exp", "nbf", "iat", "jti", "iss"]) | st.text(),
        json_values | st.sampled_from(["reports", "spiffe://example.org/a", 1e308, -1, 2**63]),
        max_size=6,
    )
)
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_claims_that_are_properly_signed(changes):
    """The signature holds, so every check behind it sees hostile values."""
    verify(forge(HEADER, json.dumps(claims() | changes).encode()))


@given(st.binary(max_size=200))
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_payload_that_is_properly_signed(payload):
    verify(forge(HEADER, payload))


@given(st.data())
@settings(max_examples=EXAMPLES, deadline=None)
def test_a_good_token_mangled(data):
    token = forge(HEADER, claims())
    start = data.draw(st.integers(0, len(token)))
    end = data.draw(st.integers(start, min(len(token), start + 20)))
    verify(token[:start] + data.draw(st.text(max_size=10)) + token[end:])


@given(st.lists(st.text(), max_size=5) | st.text(), st.timedeltas(), st.text())
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_request_to_prepare(audiences, ttl, path):
    issuer = jwt_issuer()
    try:
        spiffe_id = SpiffeId.parse(f"spiffe://example.org/{path}")
        issuer.prepare(spiffe_id=spiffe_id, audiences=audiences, ttl=ttl, now=NOW)
    except CAError:
        return
    assert timedelta(seconds=1) <= ttl
