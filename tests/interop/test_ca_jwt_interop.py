"""JWT-SVIDs and two independent readers: PyJWT and py-spiffe.

What we issue, both accept; what PyJWT signs, we accept; what no SPIFFE validator may accept, none
of them does, and where py-spiffe is laxer or stricter than the specification, a test says so.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
import pytest
import spiffe
from cryptography.hazmat.primitives import serialization
from spiffe.bundle.jwt_bundle.jwt_bundle import JwtBundle
from spiffe.errors import PySpiffeError
from spiffe.svid.jwt_svid import JwtSvid

from identity_ca.errors import TokenRejected
from identity_ca.jwt import verify_jwt_svid
from identity_ca.keys import KeyAlgorithm
from support.ca_material import (
    TRUST_DOMAIN,
    WORKLOAD_ID,
    b64url,
    forge,
    jwt_bundle,
    jwt_issuer,
    key_pem,
    signing_key,
)

ALGORITHMS = [KeyAlgorithm.EC_P256, KeyAlgorithm.EC_P384, KeyAlgorithm.RSA_2048]


@pytest.fixture
def now() -> datetime:
    """The libraries read the real clock."""
    return datetime.now(UTC)


def issue(now: datetime, algorithm=KeyAlgorithm.EC_P256, audiences=("reports",)) -> str:
    issuer = jwt_issuer(signing_key(algorithm), not_after=now + timedelta(hours=1))
    return issuer.sign(
        issuer.prepare(
            spiffe_id=WORKLOAD_ID, audiences=audiences, ttl=timedelta(minutes=5), now=now
        )
    ).token


def spiffe_bundle(algorithm=KeyAlgorithm.EC_P256) -> JwtBundle:
    jwks = jwt_bundle(("key-1", signing_key(algorithm))).to_jwks()
    return JwtBundle.parse(spiffe.TrustDomain("example.org"), jwks)


def good_claims(now: datetime, **changes: Any) -> dict[str, Any]:
    good = {
        "sub": str(WORKLOAD_ID),
        "aud": ["reports"],
        "exp": int(now.timestamp()) + 300,
        "iat": int(now.timestamp()),
    }
    return {k: v for k, v in (good | changes).items() if v is not None}


# --- ours, read by others ---------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_pyjwt_verifies_what_we_issue(now, algorithm):
    token = issue(now, algorithm)
    alg = jwt.get_unverified_header(token)["alg"]
    read = jwt.decode(
        token,
        key=signing_key(algorithm).public_key,
        algorithms=[alg],
        audience="reports",
        options={"require": ["sub", "aud", "exp", "iat", "jti"]},
    )
    assert read["sub"] == str(WORKLOAD_ID)
    assert read["exp"] - read["iat"] == 300


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_pyjwt_finds_the_key_in_our_jwks(now, algorithm):
    token = issue(now, algorithm)
    jwks = jwt.PyJWKSet.from_json(jwt_bundle(("key-1", signing_key(algorithm))).to_jwks().decode())
    key = jwks[jwt.get_unverified_header(token)["kid"]]
    assert jwt.decode(token, key=key, algorithms=[key.algorithm_name], audience="reports")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_py_spiffe_validates_what_we_issue(now, algorithm):
    svid = JwtSvid.parse_and_validate(
        issue(now, algorithm), spiffe_bundle(algorithm), {"reports", "billing"}
    )
    assert str(svid.spiffe_id) == str(WORKLOAD_ID)
    assert svid.audience == {"reports"}


def test_py_spiffe_reads_many_audiences(now):
    token = issue(now, audiences=("reports", "https://billing.example/päth", "x" * 512))
    svid = JwtSvid.parse_insecure(token, {"https://billing.example/päth"})
    assert svid.audience == {"reports", "https://billing.example/päth", "x" * 512}


# --- others', read by us ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "alg"),
    [
        (KeyAlgorithm.EC_P256, "ES256"),
        (KeyAlgorithm.EC_P384, "ES384"),
        *(
            (KeyAlgorithm.RSA_2048, f"{family}{bits}")
            for family in ("RS", "PS")
            for bits in (256, 384, 512)
        ),
    ],
)
@pytest.mark.parametrize("headers", [{"kid": "key-1"}, {}, {"kid": "key-1", "typ": "JOSE"}])
def test_we_validate_what_pyjwt_signs(now, algorithm, alg, headers):
    key = signing_key(algorithm)
    token = jwt.encode(good_claims(now), key_pem(key), algorithm=alg, headers=headers)
    bundle = jwt_bundle(("key-1", key))
    verified = verify_jwt_svid(token, bundle=bundle, audience="reports", now=now)
    assert verified.spiffe_id == WORKLOAD_ID


# --- what nobody may accept -------------------------------------------------------------------


def ours_accepts(token: str, now: datetime) -> bool:
    try:
        verify_jwt_svid(token, bundle=jwt_bundle(), audience="reports", now=now)
    except TokenRejected:
        return False
    return True


def py_spiffe_accepts(token: str) -> bool:
    try:
        JwtSvid.parse_and_validate(token, spiffe_bundle(), {"reports"})
    except (PySpiffeError, KeyError):  # py-spiffe 0.3.2 trips over a missing exp
        return False
    return True


HEADER = {"alg": "ES256", "kid": "key-1", "typ": "JWT"}


def unsigned(now: datetime) -> str:
    return jwt.encode(good_claims(now), key="", algorithm="none", headers={"kid": "key-1"})


def hmac_with_public_key(now: datetime) -> str:
    secret = signing_key().public_key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    header = HEADER | {"alg": "HS256"}
    signing_input = ".".join(b64url(json.dumps(p).encode()) for p in (header, good_claims(now)))
    mac = hmac.new(secret, signing_input.encode(), hashlib.sha256).digest()
    return f"{signing_input}.{b64url(mac)}"


def embedded_jwk(now: datetime) -> str:
    attacker = signing_key(nth=3)
    jwk = json.loads(jwt_bundle(("key-1", attacker)).to_jwks())["keys"][0]
    return forge(HEADER | {"jwk": jwk}, good_claims(now), attacker.as_private_key())


def general_json(now: datetime) -> str:
    header, payload, signature = issue(now).split(".")
    return json.dumps(
        {"payload": payload, "signatures": [{"protected": header, "signature": signature}]}
    )


def claims_changed(**changes: object):
    return lambda now: forge(HEADER, good_claims(now, **changes))


REFUSED = {
    "none": unsigned,
    "hs256-with-the-public-key": hmac_with_public_key,
    "embedded-jwk": embedded_jwk,
    "json-serialization": general_json,
    "another-key": lambda now: forge(HEADER, good_claims(now), signing_key(nth=3).as_private_key()),
    "unknown-kid": lambda now: forge(HEADER | {"kid": "key-9"}, good_claims(now)),
    "crit": lambda now: forge(HEADER | {"crit": ["urn:x"], "urn:x": 1}, good_claims(now)),
    "typ": lambda now: forge(HEADER | {"typ": "wit+jwt"}, good_claims(now)),
    "eddsa": lambda now: forge(HEADER | {"alg": "EdDSA"}, good_claims(now)),
    "wrong-aud": claims_changed(aud=["billing"]),
    "no-aud": claims_changed(aud=None),
    "expired": claims_changed(exp=1_700_000_000),
    "no-exp": claims_changed(exp=None),
    "no-sub": claims_changed(sub=None),
    "sub-no-spiffe-id": claims_changed(sub="payments"),
    "another-trust-domain": claims_changed(sub="spiffe://other.org/payments"),
    "not-yet": claims_changed(nbf=4_000_000_000),
    "no-signature": lambda now: issue(now).rpartition(".")[0] + ".",
    "cut": lambda now: issue(now)[:-10],
    "whitespace": lambda now: issue(now).replace(".", ".\n", 1),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_we_refuse_and_py_spiffe_too(now, case):
    token = REFUSED[case](now)
    assert not ours_accepts(token, now)
    assert not py_spiffe_accepts(token)


def test_a_good_token_would_have_been_accepted_by_both(now):
    assert ours_accepts(issue(now), now)
    assert py_spiffe_accepts(issue(now))


LAXER = {
    "duplicate-claims": lambda now: forge(
        HEADER,
        json.dumps(good_claims(now)).replace("{", '{"sub": "spiffe://example.org/x", ', 1).encode(),
    ),
    "jku-header": lambda now: forge(
        HEADER | {"jku": "https://attacker.example/jwks.json"}, good_claims(now)
    ),
    "upper-case-trust-domain": claims_changed(sub="spiffe://EXAMPLE.org/payments/api"),
}


@pytest.mark.parametrize("case", LAXER)
def test_where_we_are_stricter_than_py_spiffe(now, case):
    token = LAXER[case](now)
    assert not ours_accepts(token, now)
    assert py_spiffe_accepts(token)


@pytest.mark.clause("J-5")
def test_j_5_where_py_spiffe_refuses_what_the_specification_allows(now):
    """A token without `kid`: optional by JWT-SVID section 2.2, refused by py-spiffe."""
    token = forge({"alg": "ES256", "typ": "JWT"}, good_claims(now))
    assert ours_accepts(token, now)
    assert not py_spiffe_accepts(token)


def test_the_trust_domain_is_that_of_the_fixture():
    assert str(spiffe_bundle().trust_domain) == TRUST_DOMAIN.name
