"""Hostile statements: whatever the bytes, it holds or is a `StatementRejected`, never an error."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from identity_ca.errors import StatementRejected
from identity_ca.statement import STATEMENT_TYPE, sign_statement, verify_statement
from support.ca_material import b64url, forge, jwt_bundle, signing_key

EXAMPLES = 200
BUNDLE = jwt_bundle()
HEADER = {"alg": "ES256", "kid": "key-1", "typ": STATEMENT_TYPE}
PAYLOAD = {"version": 1, "trust_domain": "example.org", "revocation": {"id": "rev-1"}}
GOOD = sign_statement(PAYLOAD, key=signing_key(), key_id="key-1")

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def verify(text: str) -> bool:
    """Whether it holds; anything but these two outcomes escapes."""
    try:
        verify_statement(text, BUNDLE)
    except StatementRejected as rejection:
        sentence = rejection.message
    else:
        return True
    assert 0 < len(sentence) < 300
    return False


def flattened(compact: str) -> str:
    protected, payload, signature = compact.split(".")
    return json.dumps({"payload": payload, "protected": protected, "signature": signature})


@given(st.text() | st.text(st.characters(categories=["Cs", "L"])))
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_text(text):
    assert not verify(text)


@given(json_values)
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_json(value):
    assert not verify(json.dumps(value))


@given(
    st.dictionaries(
        st.sampled_from(["payload", "protected", "signature", "header", "signatures"]),
        json_values | st.binary(max_size=40).map(b64url),
    )
)
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_members(members):
    assert not verify(json.dumps(members))


@given(
    st.dictionaries(
        st.sampled_from(["alg", "kid", "typ", "crit", "jwk", "x5c"]) | st.text(), json_values
    )
)
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_header_that_is_properly_signed(header):
    told = HEADER | header
    text = flattened(forge(json.dumps(told).encode("utf-8", "surrogatepass"), PAYLOAD))
    assert verify(text) == (told == HEADER)


@given(st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_payload_that_is_properly_signed(payload):
    assert not verify(flattened(forge(HEADER, payload)))


@given(st.data())
@settings(max_examples=EXAMPLES, deadline=None)
def test_a_good_statement_mangled(data):
    parts = json.loads(GOOD)
    name = data.draw(st.sampled_from(sorted(parts)))
    part = parts[name]
    at = data.draw(st.integers(0, len(part) - 1))
    changed = data.draw(st.text(max_size=3))
    parts[name] = part[:at] + changed + part[at + 1 :]
    assert verify(json.dumps(parts)) == (parts[name] == part)


@given(st.dictionaries(st.text(max_size=8), json_values, max_size=4))
@settings(max_examples=EXAMPLES, deadline=None)
def test_what_is_signed_is_read_back(said):
    payload = {k: v for k, v in said.items() if k not in ("sub", "aud")}
    payload["trust_domain"] = "example.org"
    try:
        text = sign_statement(payload, key=signing_key(), key_id="key-1")
    except ValueError:  # NaN, infinity: no JSON, and no statement
        return
    assert dict(verify_statement(text, BUNDLE)) == payload
