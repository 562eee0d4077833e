"""JWT-SVIDs: how they are made (J-1 to J-3, J-7 to J-9), how they are validated (J-4 to J-13)."""

from __future__ import annotations

import hashlib
import hmac
import json
from base64 import urlsafe_b64decode
from datetime import UTC, datetime, timedelta
from threading import Thread
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from identity_ca.bundle import JwtKey, TrustBundle
from identity_ca.errors import (
    AudienceInvalid,
    BackendUnavailable,
    CAError,
    LintFailed,
    ProfileViolation,
    TokenRejected,
)
from identity_ca.jws import JWS_ALGORITHMS
from identity_ca.jwt import (
    MAX_JWT_TTL,
    MAX_TOKEN_BYTES,
    MIN_AUTHORITY_REMAINING,
    JwtIssuer,
    PreparedJwt,
    VerifiedJwt,
    verify_jwt_svid,
)
from identity_ca.keys import KeyAlgorithm, spki_der
from identity_ca.spiffe_id import SpiffeId
from support.ca_material import (
    DAY,
    NOW,
    TRUST_DOMAIN,
    WORKLOAD_ID,
    b64url,
    claims,
    forge,
    jwt_bundle,
    jwt_issuer,
    signing_key,
)

HEADER = {"alg": "ES256", "kid": "key-1", "typ": "JWT"}
NINE = ["RS256", "RS384", "RS512", "ES256", "ES384", "ES512", "PS256", "PS384", "PS512"]


def prepare(issuer: JwtIssuer | None = None, **changes: Any) -> PreparedJwt:
    arguments: dict[str, Any] = {
        "spiffe_id": WORKLOAD_ID,
        "audiences": ["reports"],
        "ttl": timedelta(minutes=5),
        "now": NOW,
    }
    return (issuer or jwt_issuer()).prepare(**(arguments | changes))


def parts(token: str) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    header, payload, signature = (
        urlsafe_b64decode(part + "=" * (-len(part) % 4)) for part in token.split(".")
    )
    return json.loads(header), json.loads(payload), signature


def verify(token: str, **changes: Any) -> VerifiedJwt:
    arguments: dict[str, Any] = {"bundle": jwt_bundle(), "audience": "reports", "now": NOW}
    return verify_jwt_svid(token, **(arguments | changes))


def refused(token: str, **changes: Any) -> str:
    with pytest.raises(TokenRejected) as rejection:
        verify(token, **changes)
    return rejection.value.message


@pytest.fixture
def token() -> str:
    issuer = jwt_issuer()
    return issuer.sign(prepare(issuer)).token


# --- issuing ----------------------------------------------------------------------------------


@pytest.mark.clause("J-1")
def test_j_1_a_token_is_issued_in_compact_serialization(token):
    assert [bool(part) for part in token.split(".")] == [True, True, True]
    assert not set(token) - set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.")


@pytest.mark.clause("J-2")
def test_j_2_the_header_holds_alg_kid_and_typ_only(token):
    assert parts(token)[0] == {"alg": "ES256", "kid": "key-1", "typ": "JWT"}


@pytest.mark.clause("J-3")
@pytest.mark.parametrize(
    ("algorithm", "alg"),
    [
        (KeyAlgorithm.EC_P256, "ES256"),
        (KeyAlgorithm.EC_P384, "ES384"),
        (KeyAlgorithm.RSA_2048, "RS256"),
    ],
)
def test_j_3_the_key_decides_the_algorithm(algorithm, alg):
    key = signing_key(algorithm)
    issuer = jwt_issuer(key)
    token = issuer.sign(prepare(issuer)).token
    assert issuer.algorithm == alg
    assert parts(token)[0]["alg"] == alg
    assert verify(token, bundle=jwt_bundle(("key-1", key))).spiffe_id == WORKLOAD_ID


@pytest.mark.clause("J-3")
def test_j_3_an_ed25519_key_issues_no_jwt_svid():
    with pytest.raises(ProfileViolation, match="J-3"):
        jwt_issuer(signing_key(KeyAlgorithm.ED25519))


@pytest.mark.clause("J-7")
def test_j_7_the_subject_is_the_spiffe_id(token):
    assert parts(token)[1]["sub"] == "spiffe://example.org/payments/api"


@pytest.mark.clause("J-8")
@pytest.mark.clause("J-9")
def test_the_claims_are_sub_aud_exp_iat_jti():
    prepared = prepare()
    _, payload, _ = parts(prepared.signing_input.decode() + ".AAAA")
    issued = int(NOW.timestamp())
    assert payload == {
        "sub": str(WORKLOAD_ID),
        "aud": ["reports"],
        "exp": issued + 300,
        "iat": issued,
        "jti": prepared.jti,
    }
    assert len(prepared.jti) == 40
    assert prepared.not_before == datetime.fromtimestamp(issued, UTC)
    assert prepared.not_after == prepared.not_before + timedelta(minutes=5)


@pytest.mark.clause("J-8")
@pytest.mark.parametrize(
    "audiences",
    [
        [],
        [""],
        ["a" * 513],
        ["é" * 257],
        ["reports", ""],
        [f"service-{n}" for n in range(33)],
        ["line\nbreak"],
        ["nul\x00"],
        ["\ud800"],
        "reports",
    ],
    ids=["none", "empty", "513", "514-utf8", "one-empty", "33", "lf", "nul", "surrogate", "text"],
)
def test_j_8_unusable_audiences_are_refused(audiences):
    with pytest.raises(AudienceInvalid):
        prepare(audiences=audiences)


@pytest.mark.clause("J-8")
@pytest.mark.parametrize(
    "audiences",
    [["a"], ["a" * 512], ["é" * 256], [f"service-{n}" for n in range(32)], ["https://x/?y=z"]],
)
def test_j_8_usable_audiences_are_embedded(audiences):
    issuer = jwt_issuer()
    token = issuer.sign(prepare(issuer, audiences=audiences)).token
    assert verify(token, audience=audiences[-1]).audiences == tuple(audiences)


def test_an_audience_asked_for_twice_is_embedded_once():
    assert prepare(audiences=["b", "a", "b"]).audiences == ("b", "a")


def test_audiences_that_are_too_long_together_are_refused():
    with pytest.raises(AudienceInvalid, match="longer than 16384"):
        prepare(audiences=[f"{n:0512}" for n in range(32)])


@pytest.mark.clause("J-9")
def test_j_9_a_token_never_outlives_its_authority():
    end = NOW + timedelta(seconds=90, milliseconds=900)
    prepared = prepare(jwt_issuer(not_after=end), ttl=timedelta(hours=1))
    assert prepared.not_after == end.replace(microsecond=0)
    assert prepared.not_after <= end


@pytest.mark.parametrize("left", [timedelta(seconds=59), timedelta(0), -DAY])
def test_an_authority_about_to_expire_prepares_nothing(left):
    with pytest.raises(ProfileViolation, match="about to expire"):
        prepare(jwt_issuer(not_after=NOW + left))


@pytest.mark.parametrize(
    "ttl", [timedelta(0), timedelta(milliseconds=999), -DAY, MAX_JWT_TTL + timedelta(seconds=1)]
)
def test_a_lifetime_outside_the_limits_is_refused_and_not_cut(ttl):
    with pytest.raises(ProfileViolation):
        prepare(jwt_issuer(not_after=NOW + 10 * DAY), ttl=ttl)


@pytest.mark.parametrize("spiffe_id", ["spiffe://example.org", "spiffe://other.org/payments/api"])
def test_an_id_that_is_no_workload_of_the_domain_is_refused(spiffe_id):
    with pytest.raises(ProfileViolation):
        prepare(spiffe_id=SpiffeId.parse(spiffe_id))


def test_the_digest_is_that_of_the_signed_bytes():
    issuer = jwt_issuer()
    prepared = prepare(issuer)
    credential = issuer.sign(prepared)
    signed, _, _ = credential.token.rpartition(".")
    assert signed.encode() == prepared.signing_input
    assert prepared.tbs_digest == hashlib.sha256(signed.encode()).hexdigest()
    assert credential.digest == hashlib.sha256(credential.token.encode()).hexdigest()
    assert (credential.jti, credential.spiffe_id) == (prepared.jti, prepared.spiffe_id)
    assert (credential.not_before, credential.not_after) == (
        prepared.not_before,
        prepared.not_after,
    )


def test_a_prepared_token_is_signed_once():
    issuer = jwt_issuer()
    prepared = prepare(issuer)
    issuer.sign(prepared)
    with pytest.raises(ProfileViolation, match="already"):
        issuer.sign(prepared)


def test_a_prepared_token_is_signed_once_by_many_threads():
    issuer = jwt_issuer()
    prepared = prepare(issuer)
    outcomes: list[str] = []

    def sign() -> None:
        try:
            issuer.sign(prepared)
        except ProfileViolation:
            outcomes.append("refused")
        else:
            outcomes.append("signed")

    threads = [Thread(target=sign) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["refused"] * 15 + ["signed"]


def test_a_prepared_token_is_signed_by_its_own_authority_only():
    with pytest.raises(ProfileViolation, match="another authority"):
        jwt_issuer(key_id="key-2").sign(prepare())


def test_only_an_issuer_prepares():
    prepared = prepare()
    with pytest.raises(TypeError):
        PreparedJwt(
            object(),
            jti="0" * 40,
            spiffe_id=WORKLOAD_ID,
            audiences=("reports",),
            not_before=NOW,
            not_after=NOW,
            signing_input=prepared.signing_input,
            authority_id="key-1",
        )


def test_bytes_changed_after_preparation_are_not_signed():
    issuer = jwt_issuer()
    prepared = prepare(issuer)
    object.__setattr__(prepared, "signing_input", b"something.else")
    with pytest.raises(LintFailed):
        issuer.sign(prepared)


def test_a_failed_signature_leaves_the_token_spent():
    class Failing:
        def __init__(self) -> None:
            self.key_id, self.remote = "transit:idb-jwt@1", True
            self.algorithm, self.public_key = KeyAlgorithm.EC_P256, signing_key().public_key

        def sign_many(self, messages):
            raise BackendUnavailable("no answer")

    issuer = jwt_issuer(Failing())  # type: ignore[arg-type]  # signs nothing
    prepared = prepare(issuer)
    with pytest.raises(BackendUnavailable):
        issuer.sign(prepared)
    with pytest.raises(ProfileViolation):
        issuer.sign(prepared)


def test_a_batch_is_signed_in_order():
    issuer = jwt_issuer()
    prepared = [prepare(issuer, audiences=[f"service-{n}"]) for n in range(5)]
    credentials = issuer.sign_many(prepared)
    assert [c.jti for c in credentials] == [p.jti for p in prepared]
    for number, credential in enumerate(credentials):
        assert verify(credential.token, audience=f"service-{number}").jti == credential.jti


def test_the_token_is_in_no_repr():
    issuer = jwt_issuer()
    prepared = prepare(issuer)
    credential = issuer.sign(prepared)
    signature = credential.token.rpartition(".")[2]
    assert signature not in repr(credential)
    assert credential.token not in repr([credential, prepared])


# --- validating: what holds -------------------------------------------------------------------


def test_a_token_of_our_own_holds(token):
    verified = verify(token)
    assert verified.spiffe_id == WORKLOAD_ID
    assert verified.audiences == ("reports",)
    assert verified.expires_at == NOW.replace(microsecond=0) + timedelta(minutes=5)
    assert verified.key_id == "key-1"
    assert verified.jti == verified.claims["jti"]


def test_the_claims_are_read_only(token):
    with pytest.raises(TypeError):
        verify(token).claims["sub"] = "x"  # type: ignore[index]  # that is the point


_P521 = ec.generate_private_key(ec.SECP521R1())


def private_key_for(alg: str):
    if alg == "ES512":
        return _P521
    algorithm = {"ES256": KeyAlgorithm.EC_P256, "ES384": KeyAlgorithm.EC_P384}.get(
        alg, KeyAlgorithm.RSA_2048
    )
    return signing_key(algorithm).as_private_key()


def bundle_of(private_key, key_id: str = "key-1") -> TrustBundle:
    return TrustBundle(TRUST_DOMAIN, jwt_keys=(JwtKey(key_id, spki_der(private_key.public_key())),))


@pytest.mark.clause("J-3")
@pytest.mark.clause("J-4")
@pytest.mark.parametrize("alg", NINE)
def test_j_4_each_of_the_nine_algorithms_is_accepted(alg):
    key = private_key_for(alg)
    token = forge(HEADER | {"alg": alg}, claims(), key, alg)
    assert verify(token, bundle=bundle_of(key)).spiffe_id == WORKLOAD_ID


@pytest.mark.clause("J-4")
def test_j_4_there_are_no_other_algorithms():
    assert sorted(JWS_ALGORITHMS) == sorted(NINE)


@pytest.mark.clause("J-5")
def test_j_5_kid_is_optional():
    token = forge({"alg": "ES256"}, claims())
    bundle = jwt_bundle(
        ("rsa", signing_key(KeyAlgorithm.RSA_2048)),
        ("other", signing_key(nth=1)),
        ("key-1", signing_key()),
    )
    assert verify(token, bundle=bundle).key_id == "key-1"


@pytest.mark.clause("J-5")
def test_j_5_without_kid_a_key_of_nobody_is_still_refused():
    token = forge({"alg": "ES256"}, claims(), signing_key(nth=2).as_private_key())
    assert "signature" in refused(token)


@pytest.mark.clause("J-6")
@pytest.mark.parametrize("header", [{}, {"typ": "JWT"}, {"typ": "JOSE"}])
def test_j_6_typ_is_optional_and_jwt_or_jose(header):
    verify(forge({"alg": "ES256", "kid": "key-1"} | header, claims()))


@pytest.mark.clause("J-8")
@pytest.mark.parametrize("aud", ["reports", ["reports"], ["billing", "reports"]])
def test_j_8_one_audience_of_ours_is_enough(aud):
    verify(forge(HEADER, claims(aud=aud)), audience=["other", "reports"])


@pytest.mark.clause("J-9")
@pytest.mark.parametrize("late", [0, 299, 309])
def test_j_9_a_token_holds_until_its_expiry_plus_leeway(late):
    now = NOW.replace(microsecond=0) + timedelta(seconds=late)
    verify(forge(HEADER, claims()), now=now)


@pytest.mark.clause("J-10")
@pytest.mark.parametrize("nbf", [0, -3600, 9, 9.5])
def test_j_10_nbf_in_the_past_or_within_leeway_holds(nbf):
    verify(forge(HEADER, claims(nbf=int(NOW.timestamp()) + nbf)))


@pytest.mark.clause("J-10")
def test_j_10_iat_does_not_limit_when_a_token_holds():
    verify(forge(HEADER, claims(iat=int(NOW.timestamp()) + 100_000)))


@pytest.mark.clause("J-13")
def test_j_13_a_token_may_be_presented_twice_and_jti_is_optional(token):
    assert verify(token).jti == verify(token).jti
    assert verify(forge(HEADER, claims())).jti is None


# --- validating: what does not hold -----------------------------------------------------------


def hs256(header: dict[str, Any], secret: bytes) -> str:
    signing_input = ".".join(b64url(json.dumps(p).encode()) for p in (header, claims()))
    return f"{signing_input}.{b64url(hmac.digest(secret, signing_input.encode(), 'sha256'))}"


def public_pem() -> bytes:
    return signing_key().public_key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


@pytest.mark.clause("J-4")
@pytest.mark.parametrize(
    "alg", ["none", "None", "nOnE", "HS256", "HS384", "HS512", "EdDSA", "Ed25519", "ES256K", "", 5]
)
def test_j_4_any_other_algorithm_is_refused_before_anything_else(alg):
    token = forge(HEADER | {"alg": alg}, b"this is not even JSON")
    assert "J-4" in refused(token, bundle=TrustBundle(TRUST_DOMAIN))


@pytest.mark.clause("J-4")
def test_j_4_a_token_without_alg_is_refused():
    assert "J-4" in refused(forge({"kid": "key-1"}, claims()))


@pytest.mark.clause("J-4")
def test_j_4_an_unsigned_token_is_refused():
    unsigned = ".".join(b64url(json.dumps(p).encode()) for p in ({"alg": "none"}, claims()))
    assert "J-1" in refused(f"{unsigned}.")
    assert "J-4" in refused(f"{unsigned}.AAAA")


@pytest.mark.clause("J-4")
@pytest.mark.parametrize("secret", [public_pem(), spki_der(signing_key().public_key)])
def test_j_4_the_public_key_is_no_hmac_secret(secret):
    assert "J-4" in refused(hs256(HEADER | {"alg": "HS256"}, secret))


@pytest.mark.clause("J-4")
@pytest.mark.parametrize("claimed", NINE)
def test_j_4_a_key_verifies_with_the_algorithms_of_its_own_kind_only(claimed):
    for actual in NINE:
        key = private_key_for(actual)
        if actual == claimed:
            continue
        token = forge(HEADER | {"alg": claimed}, claims(), key, actual)
        assert "signature" in refused(token, bundle=bundle_of(key))


@pytest.mark.clause("J-1")
def test_j_1_json_serialization_is_refused(token):
    header, payload, signature = token.split(".")
    general = {"payload": payload, "signatures": [{"protected": header, "signature": signature}]}
    flattened = {"payload": payload, "protected": header, "signature": signature}
    for document in (general, flattened, flattened | {"header": {"kid": "key-1"}}):
        assert refused(json.dumps(document))


@pytest.mark.clause("J-1")
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t + ".",
        lambda t: t + ".AAAA.AAAA",
        lambda t: "." + t,
        lambda t: t.replace(".", "..", 1),
        lambda t: t.rpartition(".")[0],
        lambda t: t + "=",
        lambda t: t + "\n",
        lambda t: " " + t,
        lambda t: "Bearer " + t,
        lambda t: t.replace(".", ". ", 1),
        lambda t: t + "é",
        lambda t: t + "+",
        lambda t: "",
        lambda t: "..",
        lambda t: t[:-1] + chr(ord(t[-1]) ^ 1 | 0x40),
    ],
)
def test_j_1_a_token_with_one_thing_off_is_refused(token, change):
    assert change(token) != token
    assert refused(change(token))


def test_stray_bits_behind_the_signature_are_refused(token):
    """64 octets leave four bits of the last character unused; only one spelling is accepted."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    last = alphabet.index(token[-1])
    assert last % 16 == 0
    for stray in range(1, 16):
        assert "base64url" in refused(token[:-1] + alphabet[last + stray])


@pytest.mark.clause("J-2")
@pytest.mark.parametrize(
    "extra",
    [
        {"jwk": {"kty": "EC"}},
        {"jku": "https://attacker.example/jwks.json"},
        {"x5u": "https://attacker.example/x5u"},
        {"x5c": ["AAAA"]},
        {"crit": ["exp"], "exp": 0},
        {"crit": []},
        {"b64": False},
        {"cty": "JWT"},
        {"zip": "DEF"},
        {"x5t": "AAAA"},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_j_2_any_further_header_is_refused(extra):
    assert "J-2" in refused(forge(HEADER | extra, claims()))


@pytest.mark.clause("J-12")
def test_an_embedded_key_is_never_used():
    attacker = signing_key(nth=3)
    header = {"alg": "ES256", "jwk": {"kty": "EC", "crv": "P-256"}}
    assert refused(forge(header, claims(), attacker.as_private_key()))
    assert refused(forge({"alg": "ES256"}, claims(), attacker.as_private_key()))


@pytest.mark.clause("J-6")
@pytest.mark.parametrize("typ", ["jwt", "JWS", "wit+jwt", "at+jwt", "", None, 5])
def test_j_6_any_other_typ_is_refused(typ):
    assert "J-6" in refused(forge(HEADER | {"typ": typ}, claims()))


@pytest.mark.parametrize("kid", [None, 5, ["key-1"], {}])
def test_a_kid_that_is_no_string_is_refused(kid):
    assert "key ID" in refused(forge(HEADER | {"kid": kid}, claims()))


@pytest.mark.parametrize("kid", ["key-2", "KEY-1", "", "key-1 "])
def test_a_kid_of_no_key_is_refused_though_the_signature_would_hold(kid):
    assert "no key" in refused(forge(HEADER | {"kid": kid}, claims()))


def test_a_kid_of_another_key_is_refused():
    bundle = jwt_bundle(("key-1", signing_key(nth=1)), ("key-2", signing_key()))
    assert "signature" in refused(forge(HEADER, claims()), bundle=bundle)


@pytest.mark.clause("J-8")
@pytest.mark.parametrize(
    "aud",
    [None, [], "", "Reports", ["billing"], "reports ", {"reports": 1}, 5, ["reports", 5], [None]],
)
def test_j_8_a_token_without_our_audience_is_refused(aud):
    assert "J-8" in refused(forge(HEADER, claims(aud=aud)))


@pytest.mark.clause("J-8")
@pytest.mark.parametrize("audience", ["", [], ["reports", ""]])
def test_j_8_without_an_audience_of_our_own_nothing_is_validated(token, audience):
    with pytest.raises(AudienceInvalid):
        verify(token, audience=audience)


@pytest.mark.clause("J-9")
@pytest.mark.parametrize(
    "exp", [None, "1900000000", True, [1], 0, -1, 1e300, 10**400, int(NOW.timestamp()) - 11]
)
def test_j_9_a_token_without_a_future_expiry_is_refused(exp):
    refused(forge(HEADER, claims(exp=exp)))


@pytest.mark.clause("J-9")
def test_j_9_at_expiry_plus_leeway_it_is_over():
    over = NOW.replace(microsecond=0) + timedelta(seconds=310)
    assert "expired" in refused(forge(HEADER, claims()), now=over)
    assert "expired" in refused(
        forge(HEADER, claims()), now=over - timedelta(seconds=10), leeway=timedelta(0)
    )


@pytest.mark.clause("J-9")
@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"1e999", b"-Infinity"])
def test_j_9_an_expiry_that_is_no_number_is_refused(number):
    payload = json.dumps(claims(exp=1)).encode().replace(b'"exp": 1', b'"exp": ' + number)
    assert number in payload
    assert "cannot be read" in refused(forge(HEADER, payload))


@pytest.mark.clause("J-10")
@pytest.mark.parametrize("nbf", [int(NOW.timestamp()) + 12, "0", 1e300, None])
def test_j_10_nbf_in_the_future_or_no_number_is_refused(nbf):
    payload = claims() | {"nbf": nbf}
    refused(forge(HEADER, payload))


@pytest.mark.clause("J-10")
def test_j_10_iat_that_is_no_number_is_refused():
    assert "iat" in refused(forge(HEADER, claims(iat="yesterday")))


@pytest.mark.clause("J-7")
@pytest.mark.parametrize(
    "sub", [None, "", "payments", 5, "spiffe://EXAMPLE.org/a", "spiffe://example.org/../a", "é"]
)
def test_j_7_a_subject_that_is_no_spiffe_id_is_refused(sub):
    assert "subject" in refused(forge(HEADER, claims(sub=sub)))


def test_a_subject_of_another_trust_domain_is_refused():
    assert "trust domain" in refused(forge(HEADER, claims(sub="spiffe://other.org/payments")))


@pytest.mark.parametrize(
    ("header", "payload"),
    [
        (b'{"alg":"ES256","alg":"none"}', None),
        (b'{"alg":"none","alg":"ES256","kid":"key-1"}', None),
        (b'{"alg":"ES256","kid":"key-1","k\\u0069d":"key-2"}', None),
        (None, b'{"sub":"spiffe://example.org/a","sub":"spiffe://example.org/b"}'),
        (None, b'{"deep":{"aud":"a","aud":"b"}}'),
    ],
)
def test_a_member_that_appears_twice_is_refused(header, payload):
    token = forge(header or HEADER, payload or claims())
    assert "twice" in refused(token)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"null",
        b'"{}"',
        b"{",
        b"{} {}",
        b"\xef\xbb\xbf{}",
        b"\xff\xfe{\x00}\x00",
        b"\xff",
        b"{'alg':'ES256'}",
        b'{"a":' * 2500 + b"1" + b"}" * 2500,
        b'{"a":"\\ud800"}',
        b'{"a":' + b"9" * 5000 + b"}",
    ],
)
def test_a_part_that_is_no_strict_json_object_is_refused(raw):
    refused(forge(raw, claims()))
    refused(forge(HEADER, raw))


def test_a_token_over_16_kib_is_refused_unread():
    token = forge(HEADER, claims(note="x" * MAX_TOKEN_BYTES))
    assert "16384" in refused(token)


def test_one_changed_claim_breaks_the_signature(token):
    header, _, signature = token.split(".")
    changed = parts(token)[1] | {"sub": "spiffe://example.org/admin"}
    forged = f"{header}.{b64url(json.dumps(changed).encode())}.{signature}"
    assert "signature" in refused(forged)


@pytest.mark.parametrize("length", [0, 1, 63, 65, 128])
def test_a_signature_of_the_wrong_length_is_refused(token, length):
    body = token.rpartition(".")[0]
    refused(f"{body}.{b64url(bytes(length))}")


def test_a_signature_with_another_spelling_of_the_same_numbers_is_refused(token):
    body, _, signature = token.rpartition(".")
    raw = urlsafe_b64decode(signature + "==")
    for spelled in (raw[:32] + b"\0" + raw[32:], raw[:32] + bytes(40) + raw[32:]):
        assert "signature" in refused(f"{body}.{b64url(spelled)}")


def test_a_signature_of_zeros_is_refused(token):
    body = token.rpartition(".")[0]
    assert "signature" in refused(f"{body}.{b64url(bytes(64))}")


def test_a_der_signature_is_refused(token):
    body = token.rpartition(".")[0]
    assert "signature" in refused(f"{body}.{b64url(signing_key().sign(body.encode()))}")


# --- keys of the bundle -----------------------------------------------------------------------


@pytest.mark.clause("TB-5")
def test_tb_5_without_a_usable_key_every_token_is_refused(token):
    assert "no key" in refused(token, bundle=TrustBundle(TRUST_DOMAIN))


def test_an_expired_key_verifies_nothing(token):
    spki = spki_der(signing_key().public_key)
    for end, holds in ((NOW, True), (NOW - timedelta(seconds=10), False), (NOW + DAY, True)):
        bundle = TrustBundle(TRUST_DOMAIN, jwt_keys=(JwtKey("key-1", spki, end),))
        if holds:
            verify(token, bundle=bundle)
        else:
            assert "no key" in refused(token, bundle=bundle)


def test_an_unreadable_key_verifies_nothing_and_hides_no_other(token):
    broken = JwtKey("broken", b"not a key")
    good = JwtKey("key-1", spki_der(signing_key().public_key))
    anonymous = forge({"alg": "ES256"}, claims())
    verify(anonymous, bundle=TrustBundle(TRUST_DOMAIN, jwt_keys=(broken, good)))
    refused(anonymous, bundle=TrustBundle(TRUST_DOMAIN, jwt_keys=(broken,)))


def test_messages_echo_nothing_of_the_token():
    secret = "hunter2-hunter2"
    for header, payload in (
        (HEADER | {"alg": secret}, claims()),
        (HEADER | {"kid": secret}, claims()),
        (HEADER | {"typ": secret}, claims()),
        (HEADER | {secret: 1}, claims()),
        (HEADER, claims(sub=secret)),
        (HEADER, claims(aud=secret)),
        (HEADER, claims(exp=secret)),
    ):
        with pytest.raises(CAError) as rejection:
            verify(forge(header, payload))
        assert secret not in str(rejection.value)


# --- limits ------------------------------------------------------------------------------------

WHOLE = NOW.replace(microsecond=0)


@pytest.mark.clause("J-10")
def test_j_10_nbf_is_reached_when_the_leeway_says_so():
    token = forge(HEADER, claims(nbf=int(WHOLE.timestamp()) + 10))
    verify(token, now=WHOLE)
    early = WHOLE - timedelta(microseconds=1)
    assert "J-10" in refused(token, now=early)
    assert "J-10" in refused(token, now=WHOLE, leeway=timedelta(seconds=9))


@pytest.mark.clause("J-10")
@pytest.mark.parametrize("name", ["iat", "nbf"])
@pytest.mark.parametrize("value", [True, False])
def test_j_10_a_truth_value_is_no_date(name, value):
    assert f"{name} is not a number" in refused(forge(HEADER, claims(**{name: value})))


@pytest.mark.clause("J-10")
@pytest.mark.parametrize("name", ["exp", "iat", "nbf"])
@pytest.mark.parametrize("value", [253402300800, 253402300800.0, 253402300801, -1])
def test_j_10_a_date_beyond_the_calendar_is_refused(name, value):
    assert f"{name} is out of range" in refused(forge(HEADER, claims(**{name: value})))


@pytest.mark.clause("J-9")
def test_j_9_the_last_second_of_the_calendar_is_an_expiry():
    assert verify(forge(HEADER, claims(exp=253402300799))).expires_at.year == 9999


def test_a_token_of_exactly_16_kib_is_read():
    # Base64 has no length one above a multiple of four: the header's blanks make up for it.
    lengths = {}
    for blanks in range(4):
        header = json.dumps(HEADER).encode() + b" " * blanks
        for filling in range(12040, 12140):
            token = forge(header, claims(note="x" * filling))
            lengths[len(token)] = token
    verify(lengths[MAX_TOKEN_BYTES])
    assert "16384" in refused(lengths[MAX_TOKEN_BYTES + 1])


def test_an_authority_with_exactly_the_least_time_left_prepares():
    end = NOW + MIN_AUTHORITY_REMAINING
    prepare(jwt_issuer(not_after=end))
    with pytest.raises(ProfileViolation, match="about to expire"):
        prepare(jwt_issuer(not_after=end - timedelta(microseconds=1)))


def test_the_longest_and_the_shortest_lifetime_are_granted():
    issuer = jwt_issuer(not_after=NOW + 10 * DAY)
    for ttl in (MAX_JWT_TTL, timedelta(seconds=1)):
        assert prepare(issuer, ttl=ttl).not_after == WHOLE + ttl


def test_what_is_prepared_leaves_room_for_the_longest_signature():
    """RSA-4096's, in base64url: no token that was prepared turns out too long when it is signed."""
    lengths = []
    for last in range(1, 513):
        audiences = [*(f"{n:0512}" for n in range(22)), "a" * last]
        try:
            lengths.append(len(prepare(audiences=audiences).signing_input))
        except AudienceInvalid:
            break
    else:
        pytest.fail("the limit was not reached")
    room = MAX_TOKEN_BYTES - max(lengths) - len(".")
    longest = len(b64url(bytes(512)))
    assert longest <= room < longest + 4


def test_a_key_that_answers_with_too_few_signatures_makes_no_token():
    class Forgetful:
        def __init__(self) -> None:
            self.key_id, self.remote = "transit:idb-jwt@1", True
            self.algorithm, self.public_key = KeyAlgorithm.EC_P256, signing_key().public_key

        def sign_many(self, messages):
            return signing_key().sign_many(messages[1:])

    issuer = jwt_issuer(Forgetful())  # type: ignore[arg-type]  # only ever signs many
    with pytest.raises(ValueError, match="zip"):
        issuer.sign_many([prepare(issuer), prepare(issuer)])
