"""Trust bundles in all their formats (X-14, X-15, J-11, J-12, TB-1 to TB-8)."""

from __future__ import annotations

import json
from base64 import b64encode
from datetime import timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from identity_ca.authority_certificate import build_root
from identity_ca.bundle import (
    DEFAULT_REFRESH_HINT,
    MAX_BUNDLE_BYTES,
    JwtKey,
    TrustBundle,
    parse_bundle_map,
)
from identity_ca.chain import verify_x509_svid
from identity_ca.errors import BundleRejected, ChainRejected, TokenRejected
from identity_ca.issuer import X509Issuer
from identity_ca.jose import b64url_decode, b64url_encode
from identity_ca.jwt import verify_jwt_svid
from identity_ca.keys import KeyAlgorithm, LocalSigningKey, spki_der
from identity_ca.profile import WORKLOAD
from identity_ca.spiffe_id import TrustDomain
from support.ca_material import (
    DAY,
    NOW,
    TRUST_DOMAIN,
    WORKLOAD_ID,
    claims,
    der,
    forge,
    jwt_bundle,
    key_pem,
    pem,
    root_certificate,
    signing_key,
)


def a_bundle(**changes: Any) -> TrustBundle:
    members: dict[str, Any] = {
        "trust_domain": TRUST_DOMAIN,
        "x509_authorities": (der(root_certificate()), der(root_certificate(nth=1))),
        "jwt_keys": (
            JwtKey("key-1", spki_der(signing_key().public_key)),
            JwtKey("key-2", spki_der(signing_key(KeyAlgorithm.RSA_2048).public_key)),
            JwtKey("key-3", spki_der(signing_key(KeyAlgorithm.EC_P384).public_key)),
        ),
        "sequence": 7,
        "refresh_hint": timedelta(minutes=2),
    }
    return TrustBundle(**(members | changes))


def document(**changes: Any) -> dict[str, Any]:
    """A good SPIFFE bundle, changed; None takes a member away."""
    good = json.loads(a_bundle().to_spiffe_json())
    return {k: v for k, v in (good | changes).items() if v is not None}


def x509_jwk(**changes: Any) -> dict[str, Any]:
    return changed(document()["keys"][0], changes)


def jwt_jwk(**changes: Any) -> dict[str, Any]:
    return changed(document()["keys"][2], changes)


def changed(jwk: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in (jwk | changes).items() if v is not None}


def read(members: object) -> TrustBundle:
    raw = members if isinstance(members, bytes) else json.dumps(members).encode()
    return TrustBundle.from_spiffe_json(TRUST_DOMAIN, raw)


def refused(members: object) -> str:
    with pytest.raises(BundleRejected) as rejection:
        read(members)
    return rejection.value.message


def issued_chain() -> tuple[bytes, ...]:
    """An X.509-SVID below `root_certificate()`."""
    issuer = X509Issuer(
        authority_id="a",
        trust_domain=TRUST_DOMAIN,
        key=signing_key(),
        chain=[root_certificate()],
    )
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .sign(signing_key(nth=4).as_private_key(), hashes.SHA256())
    )
    prepared = issuer.prepare(
        csr=request.public_bytes(Encoding.DER),
        spiffe_id=WORKLOAD_ID,
        profile=WORKLOAD,
        ttl=timedelta(hours=1),
        now=NOW,
    )
    return issuer.sign(prepared).chain


# --- SPIFFE JSON, written ---------------------------------------------------------------------


@pytest.mark.clause("X-14")
def test_x_14_an_x509_key_has_one_certificate_and_no_kid():
    keys = [k for k in document()["keys"] if k["use"] == "x509-svid"]
    assert len(keys) == 2
    for jwk, authority in zip(keys, a_bundle().x509_authorities, strict=True):
        assert sorted(jwk) == ["crv", "kty", "use", "x", "x5c", "y"]
        assert jwk["x5c"] == [b64encode(authority).decode()]


@pytest.mark.clause("X-14")
def test_x_14_only_ca_certificates_are_published():
    leaf = issued_chain()[0]
    for write in (TrustBundle.to_spiffe_json, TrustBundle.to_pem):
        with pytest.raises(BundleRejected, match="not a CA certificate"):
            write(a_bundle(x509_authorities=(leaf,)))


@pytest.mark.clause("J-11")
def test_j_11_a_jwt_key_has_its_use_and_kid():
    keys = [k for k in document()["keys"] if k["use"] == "jwt-svid"]
    assert [k["kid"] for k in keys] == ["key-1", "key-2", "key-3"]
    assert [k["kty"] for k in keys] == ["EC", "RSA", "EC"]
    assert all("x5c" not in k for k in keys)


@pytest.mark.clause("J-11")
@pytest.mark.parametrize("key_id", ["", "k" * 1025])
def test_j_11_a_jwt_key_without_a_kid_cannot_be_published(key_id):
    with pytest.raises(BundleRejected):
        JwtKey(key_id, spki_der(signing_key().public_key))


def test_two_jwt_keys_cannot_share_a_kid():
    key = JwtKey("key-1", spki_der(signing_key().public_key))
    with pytest.raises(BundleRejected, match="share"):
        TrustBundle(TRUST_DOMAIN, jwt_keys=(key, key))


@pytest.mark.clause("TB-2")
def test_tb_2_the_sequence_is_an_integer_of_64_bits():
    assert document()["spiffe_sequence"] == 7
    top = (1 << 64) - 1
    assert json.loads(a_bundle(sequence=top).to_spiffe_json())["spiffe_sequence"] == top
    for sequence in (-1, top + 1):
        with pytest.raises(BundleRejected):
            a_bundle(sequence=sequence)


@pytest.mark.clause("TB-3")
def test_tb_3_the_refresh_hint_is_an_integer_of_seconds():
    bundle = a_bundle(refresh_hint=timedelta(seconds=90, milliseconds=999))
    hint = json.loads(bundle.to_spiffe_json())["spiffe_refresh_hint"]
    assert hint == 90
    assert type(hint) is int


@pytest.mark.clause("TB-4")
def test_tb_4_keys_is_present_even_when_empty():
    empty = TrustBundle(TRUST_DOMAIN)
    assert json.loads(empty.to_spiffe_json())["keys"] == []
    assert json.loads(empty.to_jwks()) == {"keys": []}
    assert empty.to_pem() == b""


@pytest.mark.clause("TB-6")
def test_tb_6_every_key_has_kty_and_use():
    for jwk in document()["keys"]:
        assert jwk["kty"] in ("EC", "RSA")
        assert jwk["use"] in ("x509-svid", "jwt-svid")


def test_every_key_algorithm_of_an_authority_can_be_written():
    for algorithm in (KeyAlgorithm.EC_P384, KeyAlgorithm.RSA_2048):
        bundle = a_bundle(x509_authorities=(der(root_certificate(algorithm)),), jwt_keys=())
        assert read(bundle.to_spiffe_json()) == bundle


def test_equal_bundles_are_equal_byte_for_byte():
    assert a_bundle().to_spiffe_json() == a_bundle().to_spiffe_json()
    assert a_bundle(sequence=8).to_spiffe_json() != a_bundle().to_spiffe_json()


# --- SPIFFE JSON, read ------------------------------------------------------------------------


def test_what_was_written_reads_back_the_same():
    assert read(a_bundle().to_spiffe_json()) == a_bundle()


@pytest.mark.clause("X-15")
@pytest.mark.parametrize("x5c", [None, []])
def test_x_15_an_x509_key_without_a_certificate_is_ignored(x5c):
    bundle = read(document(keys=[x509_jwk(x5c=x5c), jwt_jwk()]))
    assert bundle.x509_authorities == ()
    assert len(bundle.jwt_keys) == 1


@pytest.mark.clause("X-15")
def test_x_15_only_the_first_certificate_counts():
    first, second = (b64encode(a).decode() for a in a_bundle().x509_authorities)
    bundle = read(document(keys=[x509_jwk(x5c=[first, second])]))
    assert bundle.x509_authorities == a_bundle().x509_authorities[:1]
    assert read(document(keys=[x509_jwk(x5c=[first, "not base64!"])])) == bundle


@pytest.mark.clause("X-14")
def test_x_14_a_kid_on_an_x509_key_is_no_reason_to_refuse_it():
    assert read(document(keys=[x509_jwk(kid="key-1"), jwt_jwk()])).x509_authorities


def test_a_certificate_listed_twice_counts_once():
    assert len(read(document(keys=[x509_jwk(), x509_jwk()])).x509_authorities) == 1


@pytest.mark.clause("J-12")
def test_j_12_only_jwt_svid_keys_validate_jwt_svids():
    token = forge({"alg": "ES256", "kid": "key-1"}, claims())
    anonymous = forge({"alg": "ES256"}, claims())
    verify_jwt_svid(token, bundle=read(document(keys=[jwt_jwk()])), audience="reports", now=NOW)
    for use in ("x509-svid", "wit-svid", "sig", "enc", "JWT-SVID", "jwt-svid ", "", None):
        bundle = read(document(keys=[jwt_jwk(use=use)]))
        assert bundle.jwt_keys == ()
        for one in (token, anonymous):
            with pytest.raises(TokenRejected):
                verify_jwt_svid(one, bundle=bundle, audience="reports", now=NOW)


@pytest.mark.clause("J-12")
def test_j_12_an_x509_authority_validates_no_jwt_svid():
    """The same key is an X.509 authority here and signs the token: that is not enough."""
    bundle = TrustBundle(TRUST_DOMAIN, x509_authorities=(der(root_certificate()),))
    with pytest.raises(TokenRejected):
        verify_jwt_svid(
            forge({"alg": "ES256"}, claims()), bundle=bundle, audience="reports", now=NOW
        )


@pytest.mark.clause("TB-1")
def test_tb_1_undefined_parameters_are_neither_needed_nor_in_the_way():
    extra = {"vendor": {"x": [1, 2.5, None, True]}, "spiffe_new_thing": "y"}
    jwk = {"key_ops": ["verify"], "alg": "ES256", "vendor": []}
    members = document(**extra, keys=[x509_jwk(**jwk), jwt_jwk(**jwk)])
    assert read(members) == read(document(keys=[x509_jwk(), jwt_jwk()]))


@pytest.mark.clause("TB-2")
@pytest.mark.parametrize("sequence", [-1, 1 << 64, 1.0, "7", True, [], {}])
def test_tb_2_a_sequence_that_is_no_64_bit_integer_is_refused(sequence):
    assert "spiffe_sequence" in refused(document(spiffe_sequence=sequence))


@pytest.mark.clause("TB-2")
def test_tb_2_a_sequence_of_64_bits_is_kept_exactly():
    for sequence in (0, 1, 2**53 + 1, 2**63, 2**64 - 1):
        assert read(document(spiffe_sequence=sequence)).sequence == sequence


@pytest.mark.clause("TB-3")
@pytest.mark.parametrize("hint", [-1, 0.5, "60", True, 10**12, 10**30])
def test_tb_3_a_refresh_hint_that_is_no_integer_in_range_is_refused(hint):
    members = document() | {"spiffe_refresh_hint": hint}
    assert "refresh" in refused(members)


def test_sequence_and_refresh_hint_may_be_missing():
    bundle = read(document(spiffe_sequence=None, spiffe_refresh_hint=None))
    assert bundle.sequence == 0
    assert bundle.refresh_hint == DEFAULT_REFRESH_HINT


@pytest.mark.clause("TB-4")
@pytest.mark.parametrize("keys", [None, {}, "", 5, [5], ["x"], [[]], [None]])
def test_tb_4_a_document_without_a_keys_array_is_refused(keys):
    members = document()
    if keys is None:
        del members["keys"]
    else:
        members["keys"] = keys
    refused(members)


@pytest.mark.clause("TB-4")
@pytest.mark.clause("TB-6")
@pytest.mark.parametrize(
    "unknown",
    [
        {"kty": "AKP", "alg": "ML-DSA-65", "pub": "AAAA"},
        {"kty": "oct", "k": "AAAA"},
        {"kty": "ec"},
        {"kty": None},
        {"kty": 5},
        {"kty": ["EC"]},
        {"crv": "secp256k1"},
        {"kty": "OKP", "crv": "X25519"},
        {"kty": "OKP", "crv": "Ed448"},
        {"use": None},
        {"use": "wit-svid"},
        {"use": "X509-SVID"},
        {"use": "Jwt-Svid"},
        {"use": ["jwt-svid"]},
        {"use": 5},
    ],
    ids=str,
)
def test_tb_4_and_tb_6_an_unknown_key_type_or_use_is_ignored(unknown):
    for other in (jwt_jwk(**unknown), x509_jwk(**unknown)):
        for name, value in unknown.items():
            assert other.get(name) == value
        kept = jwt_jwk(kid="kept")
        bundle = read(document(keys=[other, kept]))
        assert [key.key_id for key in bundle.jwt_keys] == ["kept"]
        assert bundle.x509_authorities == ()


def test_a_key_that_no_jwt_svid_could_be_signed_with_is_ignored():
    ed25519 = {"use": "jwt-svid", "kid": "ed", "kty": "OKP", "crv": "Ed25519", "x": "A" * 42 + "A"}
    weak = rsa.generate_private_key(65537, 1024).public_key().public_numbers()
    rsa_1024 = {
        "use": "jwt-svid",
        "kid": "weak",
        "kty": "RSA",
        "n": b64url_encode(weak.n.to_bytes(128, "big")),
        "e": "AQAB",
    }
    huge = rsa_1024 | {"kid": "huge", "n": b64url_encode(b"\xff" * 2049)}
    assert read(document(keys=[ed25519, rsa_1024, huge])).jwt_keys == ()


@pytest.mark.clause("TB-5")
@pytest.mark.parametrize("keys", [[], [{"kty": "AKP", "use": "x509-svid"}, {"use": "jwt-svid"}]])
def test_tb_5_without_a_usable_key_every_svid_is_invalid(keys):
    bundle = read(document(keys=keys))
    assert bundle.x509_authorities == ()
    assert bundle.jwt_keys == ()
    with pytest.raises(ChainRejected):
        verify_x509_svid(issued_chain(), bundle=bundle, now=NOW)
    with pytest.raises(TokenRejected):
        verify_jwt_svid(
            forge({"alg": "ES256", "kid": "key-1"}, claims()),
            bundle=bundle,
            audience="reports",
            now=NOW,
        )


def test_the_keys_of_a_bundle_do_validate():
    """The counterpart of TB-5: with its keys the same SVIDs hold."""
    bundle = read(a_bundle().to_spiffe_json())
    assert verify_x509_svid(issued_chain(), bundle=bundle, now=NOW).spiffe_id == WORKLOAD_ID
    token = forge({"alg": "ES256", "kid": "key-1"}, claims())
    verify_jwt_svid(token, bundle=bundle, audience="reports", now=NOW)


@pytest.mark.parametrize(
    "broken",
    [
        {"x": None},
        {"x": 5},
        {"x": ""},
        {"x": "AAAA"},
        {"x": "A" * 43},
        {"x": "_" * 43},
        {"crv": None},
        {"crv": 5},
        {"crv": "P-384"},
        {"y": "é" * 43},
        {"d": "AAAA"},
    ],
    ids=str,
)
def test_a_known_key_that_is_broken_refuses_the_bundle(broken):
    assert "key 1" in refused(document(keys=[jwt_jwk(), jwt_jwk(kid="b", **broken)]))
    assert "key 0" in refused(document(keys=[x509_jwk(**broken)]))


def test_coordinates_with_another_spelling_of_the_same_number_are_refused():
    """RFC 7518 section 6.2.1.2: always the curve's full length."""
    padded = b64url_encode(b"\0" + b64url_decode(jwt_jwk()["x"]))
    assert "wrong length" in refused(document(keys=[jwt_jwk(x=padded)]))


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
def test_an_authority_without_a_positive_serial_number_is_refused():
    certificate = der(root_certificate())
    serial = root_certificate().serial_number.to_bytes(20, "big")
    negative = certificate.replace(serial, b"\xff" + serial[1:], 1)
    assert negative != certificate
    with pytest.raises(BundleRejected, match="serial"):
        TrustBundle(TRUST_DOMAIN, x509_authorities=(negative,)).to_pem()


@pytest.mark.parametrize("kid", [None, 5, "", "k" * 1025])
@pytest.mark.clause("J-11")
def test_j_11_a_jwt_key_without_a_usable_kid_refuses_the_bundle(kid):
    refused(document(keys=[jwt_jwk(kid=kid)]))


def test_two_jwt_keys_with_one_kid_refuse_the_bundle():
    assert "share" in refused(document(keys=[jwt_jwk(), jwt_jwk()]))


def leaf_b64() -> str:
    return b64encode(issued_chain()[0]).decode()


@pytest.mark.parametrize(
    "x5c",
    [
        "MIIB",
        {},
        [5],
        [None],
        [""],
        ["AAAA"],
        ["not base64!"],
        ["MII\nB"],
        ["é"],
        ["\ud800"],
        [["MIIB"]],
        [leaf_b64],
        [lambda: b64encode(a_bundle().x509_authorities[1]).decode()],
    ],
    ids=lambda x5c: repr(x5c)[:20],
)
def test_an_unusable_certificate_refuses_the_bundle(x5c):
    if isinstance(x5c, list):
        x5c = [item() if callable(item) else item for item in x5c]
    refused(document(keys=[x509_jwk(x5c=x5c)]))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b'{"keys":[]}{}',
        b'\xef\xbb\xbf{"keys":[]}',
        '{"keys":[]}'.encode("utf-16"),
        b'{"keys":[],"note":"\xff"}',
        b'{"keys":[],"keys":[]}',
        b'{"keys":[],"k\\u0065ys":[]}',
        b'{"keys":[{"kty":"EC","kty":"RSA"}]}',
        b'{"keys":[],"vendor":{"a":1,"a":2}}',
        b'{"keys":[],"n":NaN}',
        b'{"keys":[],"n":1e999}',
        b'{"keys":[],"n":"\\udc00"}',
        b'{"keys":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"keys":[],"spiffe_sequence":' + b"9" * 5000 + b"}",
    ],
    ids=lambda raw: repr(raw)[:30],
)
def test_what_is_no_strict_json_object_is_refused(raw):
    refused(raw)


def test_a_document_over_4_mib_is_refused():
    padding = b" " * MAX_BUNDLE_BYTES
    assert str(MAX_BUNDLE_BYTES) in refused(padding + b'{"keys":[]}')
    fitting = b'{"keys":[]}'
    assert read(fitting + b" " * (MAX_BUNDLE_BYTES - len(fitting))).jwt_keys == ()


# --- JWKS -------------------------------------------------------------------------------------


def test_a_jwks_holds_the_jwt_keys_and_nothing_of_spiffe():
    keys = json.loads(a_bundle().to_jwks())
    assert list(keys) == ["keys"]
    assert [(k["kid"], k["use"], k.get("alg")) for k in keys["keys"]] == [
        ("key-1", "sig", "ES256"),
        ("key-2", "sig", None),
        ("key-3", "sig", "ES384"),
    ]
    assert all("x5c" not in k for k in keys["keys"])


def test_a_jwks_reads_back_the_same_keys():
    bundle = TrustBundle.from_jwks(TRUST_DOMAIN, a_bundle().to_jwks())
    assert bundle.jwt_keys == a_bundle().jwt_keys
    assert bundle.x509_authorities == ()


@pytest.mark.clause("J-12")
@pytest.mark.parametrize(
    ("use", "counts"),
    [
        (None, True),
        ("sig", True),
        ("jwt-svid", True),
        ("enc", False),
        ("wit-svid", False),
        ("x509-svid", False),
        ("SIG", False),
    ],
)
def test_j_12_a_jwks_key_for_another_use_is_ignored(use, counts):
    keys = {"keys": [jwt_jwk(use=use)]}
    bundle = TrustBundle.from_jwks(TRUST_DOMAIN, json.dumps(keys).encode())
    assert bool(bundle.jwt_keys) is counts


def test_a_p521_key_is_read_and_written():
    key = JwtKey("p521", spki_der(ec.generate_private_key(ec.SECP521R1()).public_key()))
    bundle = TrustBundle(TRUST_DOMAIN, jwt_keys=(key,))
    assert TrustBundle.from_jwks(TRUST_DOMAIN, bundle.to_jwks()) == bundle
    assert json.loads(bundle.to_jwks())["keys"][0]["alg"] == "ES512"


@pytest.mark.parametrize(
    "public_key_der",
    [b"", b"\x30\x00", spki_der(signing_key(KeyAlgorithm.ED25519).public_key)],
)
def test_a_key_that_cannot_verify_is_not_published(public_key_der):
    bundle = TrustBundle(TRUST_DOMAIN, jwt_keys=(JwtKey("key-1", public_key_der),))
    for write in (bundle.to_jwks, bundle.to_spiffe_json):
        with pytest.raises(BundleRejected):
            write()


# --- PEM --------------------------------------------------------------------------------------


def test_pem_reads_back_the_same_authorities():
    bundle = TrustBundle.from_pem(TRUST_DOMAIN, a_bundle().to_pem())
    assert bundle.x509_authorities == a_bundle().x509_authorities
    assert bundle.jwt_keys == ()


def test_pem_with_text_around_and_repetitions_is_read():
    certificate = pem(root_certificate())
    noisy = b"# our root\n" + certificate + b"\ntext between\n" + certificate
    assert len(TrustBundle.from_pem(TRUST_DOMAIN, noisy).x509_authorities) == 1


def leaf_pem() -> bytes:
    return pem(x509.load_der_x509_certificate(issued_chain()[0]))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (lambda: b"", "no readable"),
        (lambda: b"not PEM", "no readable"),
        (lambda: pem(root_certificate())[:-100], "no readable"),
        (lambda: pem(root_certificate()).replace(b"MII", b"AAA", 1), "no readable"),
        (leaf_pem, "not a CA certificate"),
        (lambda: pem(root_certificate()) + leaf_pem(), "not a CA certificate"),
        (lambda: pem(root_certificate()) + key_pem(signing_key()), "private key"),
        (lambda: b" " * (MAX_BUNDLE_BYTES + 1), "longer than"),
    ],
    ids=["empty", "text", "cut", "damaged", "leaf", "with-leaf", "with-key", "too-long"],
)
def test_pem_that_is_no_set_of_ca_certificates_is_refused(content, sentence):
    with pytest.raises(BundleRejected, match=sentence) as rejection:
        TrustBundle.from_pem(TRUST_DOMAIN, content())
    assert "PRIVATE" not in str(rejection.value)


# --- bundle map -------------------------------------------------------------------------------


def bundle_map(**trust_domains: object) -> bytes:
    named = {name.replace("_", "."): value for name, value in trust_domains.items()}
    return json.dumps({"trust_domains": named}).encode()


@pytest.mark.clause("TB-7")
def test_tb_7_a_bundle_map_gives_each_trust_domain_its_own_bundle():
    other = document(keys=[jwt_jwk(kid="theirs")], spiffe_sequence=9)
    bundles = parse_bundle_map(bundle_map(example_org=document(), other_org=other))
    assert set(bundles) == {TRUST_DOMAIN, TrustDomain("other.org")}
    assert bundles[TRUST_DOMAIN].jwt_keys == a_bundle().jwt_keys
    assert bundles[TRUST_DOMAIN].sequence == 7
    theirs = bundles[TrustDomain("other.org")]
    assert (theirs.trust_domain.name, theirs.sequence) == ("other.org", 9)
    assert theirs.x509_authorities == ()


@pytest.mark.clause("TB-7")
def test_tb_7_a_bundle_map_may_be_empty():
    assert parse_bundle_map(b'{"trust_domains":{}}') == {}


@pytest.mark.clause("TB-7")
@pytest.mark.parametrize(
    "raw",
    [
        b"{}",
        b'{"trust_domains":null}',
        b'{"trust_domains":[]}',
        b'{"keys":[]}',
        b'{"trust_domains":{"example.org":{"keys":[]},"example.org":{"keys":[]}}}',
        b'{"trust_domains":{"example.org":{"keys":[]},"ex\\u0061mple.org":{"keys":[]}}}',
        b'{"trust_domains":{},"trust_domains":{}}',
        b'{"trust_domains":{"Example.org":{"keys":[]}}}',
        b'{"trust_domains":{"spiffe://example.org":{"keys":[]}}}',
        b'{"trust_domains":{"":{"keys":[]}}}',
        b'{"trust_domains":{"example.org":[]}}',
        b'{"trust_domains":{"example.org":{}}}',
        b'{"trust_domains":{"a.org":{"keys":[]},"b.org":{"keys":[{"kty":"EC","use":"jwt-svid"}]}}}',
    ],
)
def test_tb_7_a_bundle_map_with_a_duplicate_or_a_bad_bundle_is_refused(raw):
    with pytest.raises(BundleRejected):
        parse_bundle_map(raw)


@pytest.mark.clause("TB-8")
@pytest.mark.parametrize("hint", [1, 10**9, "not even a number", -5])
def test_tb_8_a_refresh_hint_inside_a_map_changes_nothing(hint):
    bundles = parse_bundle_map(bundle_map(example_org=document(spiffe_refresh_hint=hint)))
    assert bundles[TRUST_DOMAIN].refresh_hint == DEFAULT_REFRESH_HINT


def test_an_authority_with_an_ed25519_key_is_read():
    """No profile of ours makes one; another trust domain may."""
    private_key = ed25519.Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "theirs")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private_key.public_key())
        .serial_number(1)
        .not_valid_before(NOW)
        .not_valid_after(NOW + DAY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(private_key, None)
    )
    bundle = TrustBundle(TRUST_DOMAIN, x509_authorities=(der(certificate),))
    jwk = json.loads(bundle.to_spiffe_json())["keys"][0]
    assert (jwk["kty"], jwk["crv"]) == ("OKP", "Ed25519")
    assert read(bundle.to_spiffe_json()).x509_authorities == bundle.x509_authorities


def test_a_jwt_key_is_found_by_its_exact_id():
    bundle = jwt_bundle(("Key-1", signing_key()), ("key-1", signing_key(nth=1)))
    assert bundle.jwt_key("key-1") == bundle.jwt_keys[1]
    assert bundle.jwt_key("KEY-1") is None


def test_a_root_made_here_is_a_ca_of_its_domain():
    key = LocalSigningKey("memory:r@1", ec.generate_private_key(ec.SECP256R1()))
    root = build_root(key, trust_domain=TRUST_DOMAIN, ttl=DAY, now=NOW)
    assert TrustBundle.from_pem(TRUST_DOMAIN, pem(root)).x509_authorities == (der(root),)


# --- limits ------------------------------------------------------------------------------------


def test_the_longest_kid_is_read():
    assert read(document(keys=[jwt_jwk(kid="k" * 1024)])).jwt_keys[0].key_id == "k" * 1024


def with_padding(count: int) -> str:
    """A CA certificate in base64 that ends with that many `=`; which, its length decides."""
    for octets in range(1, 4):
        name = x509.Name.from_rfc4514_string(f"CN={'a' * octets}")
        limits = x509.BasicConstraints(ca=True, path_length=None)
        key = signing_key(KeyAlgorithm.RSA_2048)  # whose signatures all have one length
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(x509.Name([]))
            .public_key(signing_key().public_key)
            .serial_number(1)
            .not_valid_before(NOW)
            .not_valid_after(NOW + DAY)
            .add_extension(limits, critical=True)
            .sign(key.as_private_key(), hashes.SHA256())
        )
        text = b64encode(der(certificate)).decode()
        if text.count("=") == count:
            return text
    raise AssertionError(count)


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize(
    "change",
    [
        lambda b64: b64[:40] + "\n" + b64[40:],
        lambda b64: b64[:40] + " " + b64[40:],
        lambda b64: "!" + b64,
        lambda b64: b64 + "=",
        lambda b64: b64 + "====",
        lambda b64: b64[:40] + "-_-_" + b64[40:],
        lambda b64: b64 + "\n",
    ],
    ids=["line", "blank", "mark", "pad", "pads", "url", "end"],
)
def test_x5c_is_strict_base64(change, padding):
    """RFC 7517 section 4.7: no line breaks and no other alphabet; nothing is skipped in silence."""
    good = with_padding(padding)
    key = x509_jwk() | {k: jwt_jwk()[k] for k in ("kty", "crv", "x", "y")}
    assert read(document(keys=[key | {"x5c": [good]}])).x509_authorities
    assert '"x5c" is not base64' in refused(document(keys=[key | {"x5c": [change(good)]}]))


def test_x5c_has_one_spelling():
    """The last character of a padded group has bits to spare, and they are zero."""
    good = with_padding(2)
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    other = alphabet[alphabet.index(good[-3]) + 1]
    key = x509_jwk() | {k: jwt_jwk()[k] for k in ("kty", "crv", "x", "y")}
    changed = f"{good[:-3]}{other}=="
    assert '"x5c" is not base64' in refused(document(keys=[key | {"x5c": [changed]}]))


@pytest.mark.parametrize("hint", [315_360_001, 10**15, (1 << 64) - 1])
def test_a_refresh_hint_of_more_than_ten_years_refuses_the_bundle(hint):
    """However long: also where no time span could hold it."""
    assert "refresh hint" in refused(document(spiffe_refresh_hint=hint))
    assert read(document(spiffe_refresh_hint=315_360_000)).refresh_hint == timedelta(days=3650)


@pytest.mark.filterwarnings("error")
def test_a_library_that_warns_of_a_serial_number_is_a_refusal_too():
    certificate = der(root_certificate())
    serial = root_certificate().serial_number.to_bytes(20, "big")
    negative = certificate.replace(serial, b"\xff" + serial[1:], 1)
    assert negative != certificate
    with pytest.raises(BundleRejected):
        TrustBundle(TRUST_DOMAIN, x509_authorities=(negative,)).to_pem()
