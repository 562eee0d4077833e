"""Validation of an X.509-SVID (X509-SVID.md section 5): every way a peer can be refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtensionOID

from identity_ca.bundle import TrustBundle
from identity_ca.chain import find_path, verify_x509_svid
from identity_ca.der import element
from identity_ca.errors import ChainRejected
from identity_ca.keys import KeyAlgorithm, LocalSigningKey, key_fingerprint, signature_hash
from identity_ca.spiffe_id import TrustDomain
from support.ca import (
    SIGNING_ALGORITHMS,
    Extensions,
    ca_extensions,
    forge,
    hierarchy,
    key_usage,
    leaf_extensions,
    replaced,
    uri_san,
    without,
    workload_key,
)
from support.ca_material import DAY, NOW, TRUST_DOMAIN, WORKLOAD_ID, signing_key

BELOW = hierarchy()
ROOT_KEY, CA_KEY, EXTRA_KEY = (signing_key(nth=nth) for nth in (91, 92, 93))
SENTENCE = "the X.509-SVID was rejected: "


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)


def bundle_of(*roots: x509.Certificate) -> TrustBundle:
    return TrustBundle(TRUST_DOMAIN, x509_authorities=tuple(map(der, roots)))


def refused(
    *chain: x509.Certificate, bundle: TrustBundle = BELOW.bundle, after: timedelta = timedelta(0)
) -> str:
    with pytest.raises(ChainRejected) as caught:
        verify_x509_svid([der(each) for each in chain], bundle=bundle, now=NOW + after)
    assert caught.value.reason == "PEER_REJECTED"
    assert caught.value.message.startswith(SENTENCE)
    return caught.value.message.removeprefix(SENTENCE)


def leaf(
    extensions: Extensions | None = None,
    *,
    issuer: x509.Certificate = BELOW.intermediate,
    issuer_key: LocalSigningKey = CA_KEY,
    key: LocalSigningKey | None = None,
    **changes: object,
) -> x509.Certificate:
    return forge(
        subject="",
        key=key or workload_key(),
        issuer=issuer,
        issuer_key=issuer_key,
        extensions=leaf_extensions() if extensions is None else extensions,
        **changes,  # type: ignore[arg-type]
    )


def authority(
    name: str,
    key: LocalSigningKey,
    issuer: x509.Certificate | None,
    issuer_key: LocalSigningKey,
    extensions: Extensions | None = None,
    **changes: object,
) -> x509.Certificate:
    return forge(
        subject=name,
        key=key,
        issuer=issuer,
        issuer_key=issuer_key,
        extensions=ca_extensions() if extensions is None else extensions,
        **changes,  # type: ignore[arg-type]
    )


def test_what_the_issuer_makes_is_valid() -> None:
    credential = BELOW.issue()
    verified = verify_x509_svid(credential.chain, bundle=BELOW.bundle, now=NOW)
    assert verified.spiffe_id == WORKLOAD_ID
    assert verified.serial == credential.serial
    assert verified.not_after == credential.not_after
    assert der(verified.leaf) == credential.chain[0]
    assert key_fingerprint(verified.public_key) == key_fingerprint(workload_key().public_key)


@pytest.mark.parametrize("algorithm", SIGNING_ALGORITHMS[:3])
def test_every_signing_algorithm(algorithm: KeyAlgorithm) -> None:
    below = hierarchy(algorithm=algorithm)
    verify_x509_svid(below.issue().chain, bundle=below.bundle, now=NOW)


@pytest.mark.clause("X-2")
def test_x_2_more_than_one_uri_san() -> None:
    for second in ("spiffe://example.org/b", "https://example.org/", str(WORKLOAD_ID)):
        two = replaced(leaf_extensions(), uri_san(str(WORKLOAD_ID), second), critical=True)
        assert "X-2" in refused(leaf(two), BELOW.intermediate)
    none = replaced(
        leaf_extensions(),
        x509.SubjectAlternativeName([x509.DNSName("example.org")]),
        critical=True,
    )
    assert "X-2" in refused(leaf(none), BELOW.intermediate)
    assert "X-2" in refused(
        leaf(without(leaf_extensions(), x509.SubjectAlternativeName)), BELOW.intermediate
    )


@pytest.mark.clause("X-6")
@pytest.mark.clause("X-12")
def test_x_6_signing_certificates_do_not_authenticate() -> None:
    assert "X-6" in refused(
        authority(
            "ca",
            EXTRA_KEY,
            BELOW.root,
            ROOT_KEY,
            replaced(ca_extensions(), key_usage(digital_signature=True, sign=True), critical=True),
        )
    )
    assert refused(BELOW.intermediate)
    assert refused(BELOW.root)


def certificate_signing_usage(*bits: str) -> x509.KeyUsage:
    """digitalSignature, which every leaf needs, and the bits of a CA that are asked for."""
    every = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    unset = dict.fromkeys((*every, "key_cert_sign", "crl_sign", "encipher_only"), False)
    return x509.KeyUsage(
        **(unset | {"digital_signature": True, "decipher_only": False} | dict.fromkeys(bits, True))
    )


@pytest.mark.clause("X-12")
def test_x_12_a_leaf_that_is_as_it_must_be_is_what_the_next_three_change() -> None:
    same = replaced(leaf_extensions(), certificate_signing_usage(), critical=True)
    verify_x509_svid([der(leaf(same)), der(BELOW.intermediate)], bundle=BELOW.bundle, now=NOW)


@pytest.mark.clause("X-12")
def test_x_12_a_leaf_may_not_be_a_ca() -> None:
    for path_length in (None, 0):
        flag = x509.BasicConstraints(ca=True, path_length=path_length)
        changed = replaced(leaf_extensions(), flag, critical=True)
        assert "X-12" in refused(leaf(changed), BELOW.intermediate)


@pytest.mark.clause("X-12")
def test_x_12_a_leaf_may_not_sign_certificates() -> None:
    usage = certificate_signing_usage("key_cert_sign")
    changed = replaced(leaf_extensions(), usage, critical=True)
    assert "X-12" in refused(leaf(changed), BELOW.intermediate)


@pytest.mark.clause("X-12")
def test_x_12_a_leaf_may_not_sign_revocation_lists() -> None:
    usage = certificate_signing_usage("crl_sign")
    for critical in (True, False):
        changed = replaced(leaf_extensions(), usage, critical=critical)
        assert "X-12" in refused(leaf(changed), BELOW.intermediate)


@pytest.mark.clause("X-11")
def test_x_11_signature_of_another_key() -> None:
    assert "signature does not verify" in refused(leaf(issuer_key=EXTRA_KEY), BELOW.intermediate)
    changed = der(leaf()).replace(b"payments/api", b"payments/apj")
    with pytest.raises(ChainRejected, match="signature does not verify"):
        verify_x509_svid([changed, der(BELOW.intermediate)], bundle=BELOW.bundle, now=NOW)


@pytest.mark.clause("X-11")
def test_x_11_validity_of_every_certificate() -> None:
    good = leaf()
    assert "expired" in refused(good, BELOW.intermediate, after=2 * DAY)
    assert "not valid yet" in refused(good, BELOW.intermediate, after=-DAY)
    long = leaf(not_after=NOW + 400 * DAY)
    assert "expired" in refused(long, BELOW.intermediate, after=31 * DAY)
    assert "expired" in refused(
        leaf(issuer=BELOW.root, issuer_key=ROOT_KEY, not_after=NOW + 400 * DAY), after=366 * DAY
    )


@pytest.mark.clause("X-11")
def test_x_11_the_last_second_counts() -> None:
    good = leaf()
    end = good.not_valid_after_utc
    chain = [der(good), der(BELOW.intermediate)]
    verify_x509_svid(chain, bundle=BELOW.bundle, now=end)
    with pytest.raises(ChainRejected, match="expired"):
        verify_x509_svid(chain, bundle=BELOW.bundle, now=end + timedelta(microseconds=1))


@pytest.mark.clause("X-11")
def test_x_11_nobody_of_the_bundle_issued_it() -> None:
    other = authority("other", EXTRA_KEY, None, EXTRA_KEY)
    assert "no authority" in refused(leaf(issuer=other, issuer_key=EXTRA_KEY))
    # A chain that ends in a root the peer brings along is not trusted for that.
    assert "no authority" in refused(leaf(issuer=other, issuer_key=EXTRA_KEY), other)
    assert "no authority" in refused(leaf())  # the intermediate is missing
    assert "no authority" in refused(leaf(), BELOW.intermediate, bundle=bundle_of())


@pytest.mark.clause("X-11")
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda e: replaced(e, x509.BasicConstraints(False, None), critical=True), "not a CA"),
        (lambda e: without(e, x509.BasicConstraints), "not a CA"),
        (
            lambda e: replaced(e, key_usage(digital_signature=True), critical=True),
            "may not sign certificates",
        ),
        (lambda e: without(e, x509.KeyUsage), "may not sign certificates"),
        (
            lambda e: (
                *e,
                (
                    x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3"), b"\x05\x00"),
                    True,
                ),
            ),
            "unknown critical",
        ),
        (
            lambda e: (*e, (x509.PolicyConstraints(0, None), True)),
            "unknown critical",
        ),
        (
            lambda e: (*e, (x509.InhibitAnyPolicy(0), True)),
            "unknown critical",
        ),
        (
            lambda e: (
                *e,
                (x509.UnrecognizedExtension(x509.ObjectIdentifier("2.5.29.33"), b"\x30\x00"), True),
            ),
            "unknown critical",
        ),
    ],
)
def test_x_11_an_issuer_must_be_a_ca(change: Callable[[Extensions], Extensions], why: str) -> None:
    bad = authority("bad", EXTRA_KEY, BELOW.root, ROOT_KEY, change(ca_extensions()))
    assert why in refused(leaf(issuer=bad, issuer_key=EXTRA_KEY), bad)


@pytest.mark.clause("X-11")
def test_x_11_a_leaf_cannot_issue() -> None:
    stolen = forge(
        subject="leaf",
        key=EXTRA_KEY,
        issuer=BELOW.intermediate,
        issuer_key=CA_KEY,
        extensions=leaf_extensions(),
    )
    assert "not a CA" in refused(
        leaf(issuer=stolen, issuer_key=EXTRA_KEY), stolen, BELOW.intermediate
    )


@pytest.mark.clause("X-11")
def test_x_11_path_length() -> None:
    # Below the intermediate, whose path length is 0.
    second = authority("second", EXTRA_KEY, BELOW.intermediate, CA_KEY)
    assert "path length" in refused(
        leaf(issuer=second, issuer_key=EXTRA_KEY), second, BELOW.intermediate
    )
    free_root = authority(
        "free", signing_key(nth=94), None, signing_key(nth=94), ca_extensions(path_length=None)
    )
    upper = authority("upper", CA_KEY, free_root, signing_key(nth=94), ca_extensions(path_length=1))
    lower = authority("lower", EXTRA_KEY, upper, CA_KEY)
    chain = [leaf(issuer=lower, issuer_key=EXTRA_KEY), upper, lower]  # in no order
    verify_x509_svid([der(each) for each in chain], bundle=bundle_of(free_root), now=NOW)


@pytest.mark.clause("X-11")
def test_x_11_uri_name_constraints_mean_exactly_the_trust_domain() -> None:
    for constraint, valid in (
        ("example.org", True),
        (".example.org", False),  # sub-domains alone
        ("org", False),
        ("xample.org", False),
        ("example.com", False),
    ):
        limits = x509.NameConstraints([x509.UniformResourceIdentifier(constraint)], None)
        limited = authority(
            "limited",
            EXTRA_KEY,
            BELOW.root,
            ROOT_KEY,
            replaced(ca_extensions(trust_domain=None), limits, critical=True),
        )
        chain = [der(leaf(issuer=limited, issuer_key=EXTRA_KEY)), der(limited)]
        if valid:
            verify_x509_svid(chain, bundle=BELOW.bundle, now=NOW)
        else:
            with pytest.raises(ChainRejected, match="name constraints"):
                verify_x509_svid(chain, bundle=BELOW.bundle, now=NOW)


@pytest.mark.clause("X-11")
@pytest.mark.parametrize(
    ("permitted", "excluded", "name", "why"),
    [
        ([x509.DNSName("example.org")], None, x509.DNSName("a.example.org"), ""),
        ([x509.DNSName("example.org")], None, x509.DNSName("example.org"), ""),
        ([x509.DNSName("example.org")], None, x509.DNSName("notexample.org"), "constraints"),
        ([x509.DNSName("example.org")], None, x509.DNSName("example.com"), "constraints"),
        (None, [x509.DNSName("")], x509.DNSName("example.com"), "constraints"),
        (None, [x509.DNSName("bad.org")], x509.DNSName("a.bad.org"), "constraints"),
        (None, [x509.DNSName("bad.org")], x509.DNSName("good.org"), ""),
        (
            None,
            [x509.UniformResourceIdentifier("example.org")],
            x509.DNSName("a.b"),
            "constraints",
        ),
        ([x509.RFC822Name("example.org")], None, x509.RFC822Name("a@example.org"), "supported"),
        ([x509.RFC822Name("example.org")], None, x509.DNSName("a.b"), ""),
    ],
)
def test_x_11_other_name_constraints(
    permitted: list[x509.GeneralName] | None,
    excluded: list[x509.GeneralName] | None,
    name: x509.GeneralName,
    why: str,
) -> None:
    limited = authority(
        "limited",
        EXTRA_KEY,
        BELOW.root,
        ROOT_KEY,
        replaced(
            ca_extensions(trust_domain=None),
            x509.NameConstraints(permitted, excluded),
            critical=True,
        ),
    )
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(WORKLOAD_ID)), name])
    named = leaf(
        replaced(leaf_extensions(), names, critical=True), issuer=limited, issuer_key=EXTRA_KEY
    )
    if why:
        assert why in refused(named, limited)
    else:
        verify_x509_svid([der(named), der(limited)], bundle=BELOW.bundle, now=NOW)


@pytest.mark.clause("X-11")
def test_x_11_the_roots_own_constraints_bind_it() -> None:
    domain = TrustDomain("example.com")
    root = authority(
        "root", EXTRA_KEY, None, EXTRA_KEY, ca_extensions(trust_domain=domain, path_length=None)
    )
    assert "name constraints" in refused(
        leaf(issuer=root, issuer_key=EXTRA_KEY), bundle=bundle_of(root)
    )


@pytest.mark.clause("X-13")
@pytest.mark.parametrize(
    "uri",
    [
        "https://example.org/payments/api",
        "spiffe://example.org",
        "spiffe://example.org/",
        "spiffe://Example.org/payments",
        "SPIFFE://example.org/payments",
        "spiffe://example.org/../a",
        "spiffe://example.org/%2e",
        "spiffe://example.org:443/a",
        "",
    ],
)
def test_x_13_the_uri_must_be_a_spiffe_id_with_a_path(uri: str) -> None:
    wrong = replaced(leaf_extensions(), uri_san(uri), critical=True)
    assert "X-13" in refused(leaf(wrong), BELOW.intermediate)


def test_leaf_usage() -> None:
    for usage in (key_usage(), key_usage(digital_signature=True, sign=True)):
        changed = replaced(leaf_extensions(), usage, critical=True)
        assert "X-" in refused(leaf(changed), BELOW.intermediate)
    assert "X-9" in refused(leaf(without(leaf_extensions(), x509.KeyUsage)), BELOW.intermediate)


def test_another_trust_domain_than_the_bundles() -> None:
    foreign = replaced(leaf_extensions(), uri_san("spiffe://example.com/a"), critical=True)
    assert "another trust domain" in refused(leaf(foreign), BELOW.intermediate)
    bundle = dataclasses.replace(BELOW.bundle, trust_domain=TrustDomain("example.com"))
    assert "another trust domain" in refused(leaf(), BELOW.intermediate, bundle=bundle)


def test_how_much_a_peer_may_send() -> None:
    assert "no certificate" in refused()
    assert "more than 4" in refused(leaf(), *[BELOW.intermediate] * 4)
    verify_x509_svid([der(leaf()), *[der(BELOW.intermediate)] * 3], bundle=BELOW.bundle, now=NOW)
    with pytest.raises(ChainRejected, match="too long"):
        verify_x509_svid([bytes(1 << 20)], bundle=BELOW.bundle, now=NOW)


def test_weak_keys_and_signatures() -> None:
    weak = LocalSigningKey.__new__(LocalSigningKey)
    small = rsa.generate_private_key(65537, 1024)
    object.__setattr__(weak, "public_key", small.public_key())
    assert "weak or unknown key" in refused(leaf(key=weak), BELOW.intermediate)
    key = signing_key(KeyAlgorithm.RSA_2048, 91)
    below = hierarchy(algorithm=KeyAlgorithm.RSA_2048)
    good = forge(
        subject="",
        key=workload_key(),
        issuer=below.root,
        issuer_key=key,
        extensions=leaf_extensions(),
    )
    private_key = key.as_private_key()
    assert isinstance(private_key, rsa.RSAPrivateKey)
    sha256, sha1 = bytes.fromhex("2a864886f70d01010b"), bytes.fromhex("2a864886f70d010105")
    tbs = good.tbs_certificate_bytes.replace(sha256, sha1)
    signature = private_key.sign(tbs, padding.PKCS1v15(), hashes.SHA1())
    whole = der(good)
    forged = whole[:4] + tbs + whole[4 + len(tbs) : -256].replace(sha256, sha1) + signature
    with pytest.raises(ChainRejected, match="weak or unknown algorithm"):
        verify_x509_svid([forged], bundle=below.bundle, now=NOW)


def test_a_good_issuer_is_found_among_bad_ones_of_its_name() -> None:
    name = BELOW.intermediate.subject
    impostor = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(EXTRA_KEY.public_key)
        .serial_number(1)
        .not_valid_before(NOW - DAY)
        .not_valid_after(NOW + DAY)
        .sign(EXTRA_KEY.as_private_key(), signature_hash(EXTRA_KEY.algorithm))
    )
    for chain in (
        [leaf(), impostor, BELOW.intermediate],
        [leaf(), BELOW.intermediate, impostor],
    ):
        verify_x509_svid([der(each) for each in chain], bundle=BELOW.bundle, now=NOW)


def test_certificates_that_name_each_other_do_not_loop() -> None:
    first_name = authority("first", EXTRA_KEY, None, EXTRA_KEY, ca_extensions(path_length=None))
    second = authority("second", CA_KEY, first_name, EXTRA_KEY, ca_extensions(path_length=None))
    first = authority("first", EXTRA_KEY, second, CA_KEY, ca_extensions(path_length=None))
    assert refused(leaf(issuer=first, issuer_key=EXTRA_KEY), first, second, first_name)


def test_old_and_new_root_in_one_bundle() -> None:
    fresh = hierarchy(algorithm=KeyAlgorithm.EC_P384)
    both = bundle_of(BELOW.root, fresh.root)
    for below in (BELOW, fresh):
        verify_x509_svid(below.issue().chain, bundle=both, now=NOW)


def test_a_damaged_anchor_is_a_refusal() -> None:
    bundle = TrustBundle(TRUST_DOMAIN, x509_authorities=(b"not DER",))
    assert "cannot be read" in refused(leaf(), BELOW.intermediate, bundle=bundle)


# --- RFC 5280 section 6.1, the corners -----------------------------------------------------------


def names_only(trust_domain: str) -> x509.NameConstraints:
    return x509.NameConstraints([x509.UniformResourceIdentifier(trust_domain)], None)


@pytest.mark.clause("X-11")
def test_x_11_the_signature_of_every_certificate_counts() -> None:
    """An intermediate that only says that the root issued it, with a leaf that it did issue."""
    impostor = authority("impostor", EXTRA_KEY, BELOW.root, EXTRA_KEY)
    below = leaf(issuer=impostor, issuer_key=EXTRA_KEY)
    assert "a signature does not verify" in refused(below, impostor)
    honest = authority("impostor", EXTRA_KEY, BELOW.root, ROOT_KEY)
    verify_x509_svid([der(below), der(honest)], bundle=BELOW.bundle, now=NOW)


@pytest.mark.clause("X-11")
def test_x_11_the_first_second_counts() -> None:
    good = leaf()
    start = good.not_valid_before_utc
    chain = [der(good), der(BELOW.intermediate)]
    with pytest.raises(ChainRejected, match="not valid yet"):
        verify_x509_svid(chain, bundle=BELOW.bundle, now=start - timedelta(microseconds=1))
    begins = leaf(not_before=NOW.replace(microsecond=0))
    verify_x509_svid(
        [der(begins), der(BELOW.intermediate)],
        bundle=BELOW.bundle,
        now=begins.not_valid_before_utc,
    )


@pytest.mark.clause("X-11")
def test_x_11_path_length_counts_every_certificate_below() -> None:
    key = signing_key(nth=94)
    root = authority("root", key, None, key, ca_extensions(path_length=1))
    unlimited = ca_extensions(path_length=None)
    upper = authority("upper", CA_KEY, root, key, unlimited)
    lower = authority("lower", EXTRA_KEY, upper, CA_KEY, unlimited)
    chain = [leaf(issuer=lower, issuer_key=EXTRA_KEY), lower, upper]
    assert "path length" in refused(*chain, bundle=bundle_of(root))
    wide = authority("root", key, None, key, ca_extensions(path_length=2))
    verify_x509_svid([der(each) for each in chain], bundle=bundle_of(wide), now=NOW)


@pytest.mark.clause("X-11")
def test_x_11_a_self_issued_intermediate_is_neither_counted_nor_named() -> None:
    """A CA that certifies its own next key: same name, so no step down (section 6.1.4 l)."""
    free = ca_extensions(path_length=0, trust_domain=None)
    old = authority(
        "ca", CA_KEY, BELOW.root, ROOT_KEY, replaced(free, names_only("example.org"), critical=True)
    )
    named = replaced(free, uri_san("spiffe://example.com"), critical=False)
    fresh = authority("ca", EXTRA_KEY, old, CA_KEY, named)
    assert fresh.subject == fresh.issuer
    chain = [leaf(issuer=fresh, issuer_key=EXTRA_KEY), fresh, old]
    verify_x509_svid([der(each) for each in chain], bundle=BELOW.bundle, now=NOW)


@pytest.mark.clause("X-11")
def test_x_11_the_end_of_a_path_is_named_even_when_it_is_self_issued() -> None:
    limited = authority(
        "same",
        EXTRA_KEY,
        BELOW.root,
        ROOT_KEY,
        replaced(ca_extensions(trust_domain=None), names_only("example.com"), critical=True),
    )
    end = authority("same", workload_key(), limited, EXTRA_KEY, leaf_extensions())
    assert end.subject == end.issuer
    assert "name constraints" in refused(end, limited)


@pytest.mark.clause("X-11")
@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("spiffe://example.org", ""),
        ("https://somebody@example.org:443/path", ""),
        ("https://EXAMPLE.org", ""),
        ("spiffe://example.com", "name constraints"),
        ("https://example.org@example.com/", "name constraints"),
        ("https://example.com/example.org", "name constraints"),
        ("urn:example.org", "name constraints"),
        ("spiffe://", "name constraints"),
    ],
)
def test_x_11_name_constraints_bind_intermediates(uri: str, why: str) -> None:
    """The root permits URIs of example.org alone, to whoever stands below it."""
    free = ca_extensions(trust_domain=None)
    below = authority(
        "below", EXTRA_KEY, BELOW.root, ROOT_KEY, replaced(free, uri_san(uri), critical=False)
    )
    chain = [leaf(issuer=below, issuer_key=EXTRA_KEY), below]
    if why:
        assert why in refused(*chain)
    else:
        verify_x509_svid([der(each) for each in chain], bundle=BELOW.bundle, now=NOW)


@pytest.mark.clause("X-11")
@pytest.mark.parametrize("permitted", [True, False])
def test_x_11_constraints_on_directory_names_bind_a_subject(permitted: bool) -> None:
    names = [x509.DirectoryName(x509.Name.from_rfc4514_string("CN=elsewhere"))]
    limits = x509.NameConstraints(names if permitted else None, None if permitted else names)
    limited = authority(
        "limited",
        EXTRA_KEY,
        BELOW.root,
        ROOT_KEY,
        replaced(ca_extensions(trust_domain=None), limits, critical=True),
    )
    named = authority("named", workload_key(), limited, EXTRA_KEY, leaf_extensions())
    assert "not supported" in refused(named, limited)
    nameless = leaf(issuer=limited, issuer_key=EXTRA_KEY)
    verify_x509_svid([der(nameless), der(limited)], bundle=BELOW.bundle, now=NOW)


@pytest.mark.clause("X-11")
def test_x_11_critical_extensions_of_a_leaf() -> None:
    policy = x509.PolicyInformation(x509.ObjectIdentifier("1.2.3"), None)
    known = (*leaf_extensions(), (x509.CertificatePolicies([policy]), True))
    verify_x509_svid([der(leaf(known)), der(BELOW.intermediate)], bundle=BELOW.bundle, now=NOW)
    foreign = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3"), b"\x05\x00")
    ignored = (*leaf_extensions(), (foreign, False))
    verify_x509_svid([der(leaf(ignored)), der(BELOW.intermediate)], bundle=BELOW.bundle, now=NOW)
    unknown = (*leaf_extensions(), (foreign, True))
    assert "unknown critical" in refused(leaf(unknown), BELOW.intermediate)


def test_a_damaged_intermediate_does_not_hide_a_good_one() -> None:
    broken = x509.UnrecognizedExtension(ExtensionOID.BASIC_CONSTRAINTS, b"\x05\x00")
    damaged = (
        x509.CertificateBuilder()
        .subject_name(BELOW.intermediate.subject)
        .issuer_name(BELOW.root.subject)
        .public_key(CA_KEY.public_key)
        .serial_number(1)
        .not_valid_before(NOW - DAY)
        .not_valid_after(NOW + DAY)
        .add_extension(broken, critical=True)
        .sign(ROOT_KEY.as_private_key(), signature_hash(ROOT_KEY.algorithm))
    )
    for chain in (
        [leaf(), damaged, BELOW.intermediate],
        [leaf(), BELOW.intermediate, damaged],
    ):
        verify_x509_svid([der(each) for each in chain], bundle=BELOW.bundle, now=NOW)
    assert "cannot be read" in refused(leaf(), damaged)


def signed_by_hand(tbs: bytes, sign: Callable[[bytes], bytes], algorithm: bytes) -> bytes:
    """A certificate of those bytes; `algorithm` is the AlgorithmIdentifier they name."""
    signature = sign(tbs)
    return element(0x30, tbs + algorithm + element(0x03, b"\0" + signature))


def test_only_version_3_is_read() -> None:
    tbs = leaf().tbs_certificate_bytes
    ecdsa = bytes.fromhex("300a06082a8648ce3d040302")
    same = signed_by_hand(tbs, CA_KEY.sign, ecdsa)
    verify_x509_svid([same, der(BELOW.intermediate)], bundle=BELOW.bundle, now=NOW)
    version = bytes.fromhex("a003020102")
    assert tbs[4:9] == version
    for other, why in ((b"", "version 3"), (bytes.fromhex("a003020101"), "cannot be read")):
        changed = element(0x30, other + tbs[9:])
        with pytest.raises(ChainRejected, match=why):
            verify_x509_svid(
                [signed_by_hand(changed, CA_KEY.sign, ecdsa), der(BELOW.intermediate)],
                bundle=BELOW.bundle,
                now=NOW,
            )


def test_rsa_pss_is_as_good_as_its_digest() -> None:
    key = signing_key(KeyAlgorithm.RSA_2048, 91)
    private_key = key.as_private_key()
    assert isinstance(private_key, rsa.RSAPrivateKey)
    below = hierarchy(algorithm=KeyAlgorithm.RSA_2048)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(below.root.subject)
        .public_key(workload_key().public_key)
        .serial_number(1)
        .not_valid_before(NOW - DAY)
        .not_valid_after(NOW + DAY)
    )
    for value, critical in leaf_extensions():
        builder = builder.add_extension(value, critical)
    scheme = padding.PSS(padding.MGF1(hashes.SHA256()), hashes.SHA256.digest_size)
    good = builder.sign(private_key, hashes.SHA256(), rsa_padding=scheme)
    verify_x509_svid([der(good)], bundle=below.bundle, now=NOW)
    # RSASSA-PSS without parameters means SHA-1 (RFC 4055 section 3.1).
    plain = builder.sign(private_key, hashes.SHA256()).tbs_certificate_bytes
    sha256 = bytes.fromhex("300d06092a864886f70d01010b0500")
    pss_of_sha1 = bytes.fromhex("300d06092a864886f70d01010a3000")
    assert plain.count(sha256) == 1
    weak = padding.PSS(padding.MGF1(hashes.SHA1()), hashes.SHA1.digest_size)
    forged = signed_by_hand(
        plain.replace(sha256, pss_of_sha1),
        lambda tbs: private_key.sign(tbs, weak, hashes.SHA1()),
        pss_of_sha1,
    )
    with pytest.raises(ChainRejected, match="weak or unknown algorithm"):
        verify_x509_svid([forged], bundle=below.bundle, now=NOW)


def test_a_path_is_no_longer_than_a_peer_may_send() -> None:
    """Whoever else builds paths, with more at hand: three intermediates, then the anchor."""
    keys = [signing_key(nth=95 + nth) for nth in range(5)]
    free = ca_extensions(path_length=None)
    line = [authority("ca-0", keys[0], None, keys[0], free)]
    for nth in range(1, 5):
        line.append(authority(f"ca-{nth}", keys[nth], line[-1], keys[nth - 1], free))
    anchor, *intermediates = line
    end = leaf(issuer=line[3], issuer_key=keys[3])
    path = find_path(end, intermediates=intermediates, anchors=[anchor], now=NOW)
    assert path == (end, line[3], line[2], line[1], anchor)
    further = leaf(issuer=line[4], issuer_key=keys[4])
    with pytest.raises(ChainRejected, match="no authority"):
        find_path(further, intermediates=intermediates, anchors=[anchor], now=NOW)
