"""Statements: what is signed is what is read back, and nothing else is."""

from __future__ import annotations

import json
from typing import Any

import jwt
import pytest

from identity_ca.bundle import TrustBundle
from identity_ca.errors import ProfileViolation, StatementRejected, TokenRejected
from identity_ca.jwt import verify_jwt_svid
from identity_ca.keys import KeyAlgorithm
from identity_ca.spiffe_id import TrustDomain
from identity_ca.statement import STATEMENT_TYPE, sign_statement, verify_statement
from support.ca_material import (
    NOW,
    TRUST_DOMAIN,
    b64url,
    claims,
    forge,
    jws_sign,
    jwt_bundle,
    signing_key,
)

PAYLOAD: dict[str, Any] = {
    "version": 1,
    "trust_domain": "example.org",
    "revocation": {"id": "rev-1", "comment": "stolen — laptop"},
    "credentials": {"count": 2, "ids": ["a", "b"]},
}
HEADER = {"alg": "ES256", "kid": "key-1", "typ": STATEMENT_TYPE}
BUNDLE = jwt_bundle()


def flattened(compact: str, **members: Any) -> str:
    """A compact JWS in the other serialization."""
    protected, payload, signature = compact.split(".")
    parts = {"payload": payload, "protected": protected, "signature": signature}
    return json.dumps({k: v for k, v in (parts | members).items() if v is not None})


def refusal(text: str, bundle: TrustBundle = BUNDLE) -> str:
    with pytest.raises(StatementRejected) as refused:
        verify_statement(text, bundle)
    return refused.value.message


@pytest.mark.parametrize(
    "algorithm", [KeyAlgorithm.EC_P256, KeyAlgorithm.EC_P384, KeyAlgorithm.RSA_2048]
)
def test_what_is_signed_is_read_back(algorithm: KeyAlgorithm) -> None:
    key = signing_key(algorithm)
    text = sign_statement(PAYLOAD, key=key, key_id="k")
    assert verify_statement(text, jwt_bundle(("k", key))) == PAYLOAD
    # Whatever spaces a file was given on its way.
    assert verify_statement(json.dumps(json.loads(text), indent=4), jwt_bundle(("k", key)))


def test_the_bundle_as_it_is_published_verifies_it() -> None:
    published = BUNDLE.to_spiffe_json()
    text = sign_statement(PAYLOAD, key=signing_key(), key_id="key-1")
    assert verify_statement(text, TrustBundle.from_spiffe_json(TRUST_DOMAIN, published)) == PAYLOAD


def test_another_library_verifies_it() -> None:
    text = sign_statement(PAYLOAD, key=signing_key(), key_id="key-1")
    parts = json.loads(text)
    compact = f"{parts['protected']}.{parts['payload']}.{parts['signature']}"
    public_key: Any = signing_key().public_key
    assert json.loads(jwt.PyJWS().decode(compact, public_key, algorithms=["ES256"])) == PAYLOAD


def test_a_statement_is_no_token_and_a_token_no_statement() -> None:
    parts = json.loads(sign_statement(PAYLOAD, key=signing_key(), key_id="key-1"))
    compact = f"{parts['protected']}.{parts['payload']}.{parts['signature']}"
    with pytest.raises(TokenRejected):
        verify_jwt_svid(compact, bundle=BUNDLE, audience="reports", now=NOW)
    token = forge({"alg": "ES256", "kid": "key-1", "typ": "JWT"}, claims())
    assert "type" in refusal(flattened(token))
    # Not even when the authority could be made to sign a token with a statement's type.
    told = claims(trust_domain="example.org")
    assert "subject" in refusal(flattened(forge(HEADER, told)))


@pytest.mark.parametrize("claim", ["sub", "aud"])
def test_what_could_be_a_token_is_not_signed(claim: str) -> None:
    with pytest.raises(ProfileViolation):
        sign_statement(PAYLOAD | {claim: "x"}, key=signing_key(), key_id="key-1")


def test_a_key_without_an_algorithm_signs_nothing() -> None:
    with pytest.raises(ProfileViolation):
        sign_statement(PAYLOAD, key=signing_key(KeyAlgorithm.ED25519), key_id="key-1")


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (HEADER | {"typ": "JWT"}, "type"),
        ({"alg": "ES256", "kid": "key-1"}, "header"),
        (HEADER | {"crit": ["b64"], "b64": False}, "header"),
        (HEADER | {"jwk": {"kty": "EC"}}, "header"),
        (HEADER | {"alg": "none"}, "algorithm"),
        (HEADER | {"alg": "HS256"}, "algorithm"),
        (HEADER | {"alg": 256}, "algorithm"),
        (HEADER | {"alg": "RS256"}, "signature does not hold"),
        (HEADER | {"kid": "key-2"}, "bundle"),
        (HEADER | {"kid": ["key-1"]}, "bundle"),
    ],
)
def test_a_header_that_is_not_ours_is_refused(header: dict[str, Any], words: str) -> None:
    assert words in refusal(flattened(forge(header, PAYLOAD)))


@pytest.mark.parametrize(
    "members",
    [
        {"header": {"kid": "key-1"}},
        {"signatures": []},
        {"signature": None},
        {"signature": 7},
        {"payload": None},
        {"protected": ""},
        {"signature": "="},
        {"payload": "é"},
    ],
)
def test_a_form_that_is_not_ours_is_refused(members: dict[str, Any]) -> None:
    refusal(flattened(forge(HEADER, PAYLOAD), **members))


def test_any_other_payload_is_refused() -> None:
    text = sign_statement(PAYLOAD, key=signing_key(), key_id="key-1")
    parts = json.loads(text)
    parts["payload"] = b64url(json.dumps(PAYLOAD | {"version": 2}).encode())
    assert "signature does not hold" in refusal(json.dumps(parts))


def test_a_payload_that_says_two_things_is_refused() -> None:
    twice = b'{"trust_domain":"example.org","version":1,"version":2}'
    assert "twice" in refusal(flattened(forge(HEADER, twice)))


def test_a_statement_of_another_domain_is_refused() -> None:
    other = TrustBundle(TrustDomain("example.net"), jwt_keys=BUNDLE.jwt_keys)
    text = sign_statement(PAYLOAD, key=signing_key(), key_id="key-1")
    assert "another trust domain" in refusal(text, other)


def test_another_key_under_the_same_name_verifies_nothing() -> None:
    text = sign_statement(PAYLOAD, key=signing_key(), key_id="key-1")
    other = jwt_bundle(("key-1", signing_key(nth=1)))
    assert "signature does not hold" in refusal(text, other)


def test_an_ecdsa_signature_has_one_spelling() -> None:
    text = sign_statement(PAYLOAD, key=signing_key(), key_id="key-1")
    parts = json.loads(text)
    message = f"{parts['protected']}.{parts['payload']}".encode()
    der = signing_key().sign(message)
    assert "does not hold" in refusal(json.dumps(parts | {"signature": b64url(der)}))
    good = jws_sign("ES256", signing_key().as_private_key(), message)
    assert verify_statement(json.dumps(parts | {"signature": b64url(good)}), BUNDLE) == PAYLOAD


def test_a_statement_has_an_end() -> None:
    assert "longer" in refusal(" " * (16 * 1024 * 1024 + 1))
