"""Every rule of the linter refuses what breaks it, before a key is touched."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtendedKeyUsageOID

from identity_ca.authority_certificate import issuer_facts
from identity_ca.errors import LintFailed
from identity_ca.keys import KeyAlgorithm, spki_der
from identity_ca.lint import Expectations, lint_tbs
from identity_ca.profile import INTERMEDIATE, WORKLOAD
from identity_ca.serial import new_serial
from identity_ca.spiffe_id import SpiffeId, TrustDomain
from identity_ca.template import encode_authority_tbs, subject_key_id
from support.ca import (
    HOUR,
    Extensions,
    csr_der,
    hierarchy,
    key_usage,
    leaf_extensions,
    replaced,
    without,
    workload_key,
)
from support.ca_material import NOW, TRUST_DOMAIN, WORKLOAD_ID

BELOW = hierarchy()
FACTS = issuer_facts(BELOW.intermediate, BELOW.issuer.key)
SPKI = spki_der(workload_key().public_key)
WHOLE = NOW.replace(microsecond=0)
OWN_NAME = WORKLOAD_ID.dns_san() or ""
GOOD = Expectations(
    issuer=FACTS,
    spiffe_id=WORKLOAD_ID,
    spki=SPKI,
    not_before=WHOLE - timedelta(seconds=10),
    not_after=WHOLE + HOUR,
    dns_names=(OWN_NAME,),
)


def san(*names: x509.GeneralName) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName(names)


URI = x509.UniformResourceIdentifier(str(WORKLOAD_ID))
DNS = x509.DNSName(OWN_NAME)
ALL: Extensions = (
    *replaced(leaf_extensions(), san(URI, DNS), critical=True),
    (x509.SubjectKeyIdentifier(subject_key_id(SPKI)), False),
    (x509.AuthorityKeyIdentifier(FACTS.key_id, None, None), False),
)


def tbs(
    extensions: Extensions = ALL,
    *,
    serial: int | None = None,
    subject: str = "",
    issuer: x509.Name | None = None,
    algorithm: KeyAlgorithm = KeyAlgorithm.EC_P256,
    not_after: timedelta = HOUR,
) -> bytes:
    """To-be-signed bytes by the library's builder: good, but for what the test changes."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name.from_rfc4514_string(subject))
        .issuer_name(BELOW.intermediate.subject if issuer is None else issuer)
        .public_key(workload_key(algorithm).public_key)
        .serial_number(new_serial(NOW) if serial is None else serial)
        .not_valid_before(WHOLE - timedelta(seconds=10))
        .not_valid_after(WHOLE + not_after)
    )
    for value, critical in extensions:
        builder = builder.add_extension(value, critical)
    certificate = builder.sign(BELOW.issuer.key.as_private_key(), hashes.SHA256())
    return certificate.tbs_certificate_bytes


def refused(data: bytes, expected: Expectations = GOOD) -> str:
    with pytest.raises(LintFailed) as caught:
        lint_tbs(data, WORKLOAD, expected)
    assert caught.value.reason == "LINT_FAILED"
    return caught.value.message


def test_the_good_one_passes_in_any_order_of_extensions() -> None:
    lint_tbs(tbs(), WORKLOAD, GOOD)
    lint_tbs(tbs(tuple(reversed(ALL))), WORKLOAD, GOOD)


UNCRITICAL_USAGE = replaced(ALL, key_usage(digital_signature=True), critical=False)
CASES: dict[str, tuple[Extensions, str]] = {
    "X-1 two URIs": (
        replaced(ALL, san(URI, x509.UniformResourceIdentifier("https://a.b/"), DNS), critical=True),
        "X-1",
    ),
    "X-1 no URI": (replaced(ALL, san(DNS), critical=True), "X-1"),
    "X-1 another ID": (
        replaced(
            ALL,
            san(x509.UniformResourceIdentifier("spiffe://example.org/admin"), DNS),
            critical=True,
        ),
        "X-1",
    ),
    "X-4 SAN not critical": (replaced(ALL, san(URI, DNS), critical=False), "X-4"),
    "X-7 a CA": (replaced(ALL, x509.BasicConstraints(True, 0), critical=True), "X-7"),
    "X-7 not critical": (replaced(ALL, x509.BasicConstraints(False, None), critical=False), "X-7"),
    "X-8 key usage not critical": (UNCRITICAL_USAGE, "X-8"),
    "X-8 no key usage": (without(ALL, x509.KeyUsage), "extensions"),
    "X-9 keyCertSign": (
        replaced(ALL, key_usage(digital_signature=True, sign=True), critical=True),
        "X-9",
    ),
    "X-9 no digitalSignature": (replaced(ALL, key_usage(sign=True), critical=True), "X-9"),
    "X-10 serverAuth alone": (
        replaced(ALL, x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False),
        "X-10",
    ),
    "X-10 clientAuth alone": (
        replaced(ALL, x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False),
        "X-10",
    ),
    "another kind of name": (
        replaced(ALL, san(URI, DNS, x509.RFC822Name("a@b.c")), critical=True),
        "URI and DNS",
    ),
    "a DNS name nobody granted": (
        replaced(ALL, san(URI, DNS, x509.DNSName("a.b")), critical=True),
        "the ones granted",
    ),
    "no derived DNS name": (replaced(ALL, san(URI), critical=True), "the ones granted"),
    "subject key id": (
        replaced(ALL, x509.SubjectKeyIdentifier(bytes(20)), critical=False),
        "subject key identifier",
    ),
    "authority key id": (
        replaced(ALL, x509.AuthorityKeyIdentifier(bytes(20), None, None), critical=False),
        "authority key identifier",
    ),
    "a stray extension": ((*ALL, (x509.OCSPNoCheck(), False)), "extensions"),
    "a stray unknown extension": (
        (
            *ALL,
            (
                x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00"),
                True,
            ),
        ),
        "extensions",
    ),
}


@pytest.mark.clause("X-1")
@pytest.mark.clause("X-4")
@pytest.mark.clause("X-7")
@pytest.mark.clause("X-8")
@pytest.mark.clause("X-9")
@pytest.mark.clause("X-10")
@pytest.mark.parametrize("case", CASES)
def test_x_1_to_x_10_wrong_extensions(case: str) -> None:
    extensions, rule = CASES[case]
    assert rule in refused(tbs(extensions))


@pytest.mark.clause("X-3")
def test_x_3_no_path() -> None:
    own = TRUST_DOMAIN.id
    name = own.dns_san() or ""
    bare = replaced(
        ALL,
        san(x509.UniformResourceIdentifier(str(own)), x509.DNSName(name)),
        critical=True,
    )
    expected = dataclasses.replace(GOOD, spiffe_id=own, dns_names=(name,))
    assert "X-3" in refused(tbs(bare), expected)


def test_a_derived_dns_name_of_another_id_is_refused_even_when_granted() -> None:
    other = SpiffeId.parse("spiffe://example.org/admin").dns_san() or ""
    two = replaced(ALL, san(URI, DNS, x509.DNSName(other)), critical=True)
    expected = dataclasses.replace(GOOD, dns_names=(OWN_NAME, other))
    assert "derived" in refused(tbs(two), expected)
    none = replaced(ALL, san(URI), critical=True)
    assert "derived" in refused(tbs(none), dataclasses.replace(GOOD, dns_names=()))


@pytest.mark.parametrize("serial", [1, 1 << 100, (1 << 151) - 1])
def test_short_serials(serial: int) -> None:
    assert "20 octets" in refused(tbs(serial=serial))


def test_other_fields() -> None:
    assert "subject" in refused(tbs(subject="CN=admin"))
    assert "issuer" in refused(tbs(issuer=BELOW.root.subject))
    assert "validity" in refused(tbs(not_after=HOUR + timedelta(seconds=1)))
    assert "proven" in refused(tbs(algorithm=KeyAlgorithm.EC_P384))


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"signature_algorithm": b"\x30\x00"}, "signature algorithm"),
        ({"name": b"\x30\x00"}, "issuer"),
        ({"key_id": bytes(20)}, "authority key identifier"),
        ({"not_before": WHOLE}, "inside the issuer's"),
        ({"not_after": WHOLE + timedelta(minutes=59)}, "inside the issuer's"),
    ],
)
def test_every_fact_of_the_issuer_counts(change: dict[str, object], rule: str) -> None:
    facts = dataclasses.replace(FACTS, **change)  # type: ignore[arg-type]
    assert rule in refused(tbs(), dataclasses.replace(GOOD, issuer=facts))


def test_a_life_longer_than_the_profile() -> None:
    too_long = WORKLOAD.max_ttl + timedelta(seconds=1)
    expected = dataclasses.replace(GOOD, not_after=WHOLE + too_long)
    assert "longer than the profile" in refused(tbs(not_after=too_long), expected)
    exact = dataclasses.replace(GOOD, not_after=WHOLE + WORKLOAD.max_ttl)
    lint_tbs(tbs(not_after=WORKLOAD.max_ttl), WORKLOAD, exact)


def test_a_key_the_profile_does_not_allow() -> None:
    ed25519 = spki_der(workload_key(KeyAlgorithm.ED25519).public_key)
    key_id = x509.SubjectKeyIdentifier(subject_key_id(ed25519))
    data = tbs(replaced(ALL, key_id, critical=False), algorithm=KeyAlgorithm.ED25519)
    assert "profile allows" in refused(data, dataclasses.replace(GOOD, spki=ed25519))


def test_rsa_keys_are_read_too() -> None:
    rsa = spki_der(workload_key(KeyAlgorithm.RSA_2048).public_key)
    key_id = x509.SubjectKeyIdentifier(subject_key_id(rsa))
    data = tbs(replaced(ALL, key_id, critical=False), algorithm=KeyAlgorithm.RSA_2048)
    lint_tbs(data, WORKLOAD, dataclasses.replace(GOOD, spki=rsa))


@pytest.mark.parametrize(
    "damage",
    [
        lambda der: b"",
        lambda der: der[:-1],
        lambda der: der + b"\x00",
        lambda der: der[1:],
        lambda der: b"\x30\x80" + der[4:] + b"\x00\x00",
        lambda der: der.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x01", 1),
        # The extension OID of the key usage twice, instead of the basic constraints'.
        lambda der: der.replace(b"\x55\x1d\x13", b"\x55\x1d\x0f", 1),
        # BOOLEAN TRUE that is not DER.
        lambda der: der.replace(b"\x01\x01\xff", b"\x01\x01\x01", 1),
    ],
)
def test_not_the_der_expected(damage: Callable[[bytes], bytes]) -> None:
    refused(damage(tbs()))


def authority(**changes: object) -> bytes:
    fields: dict[str, object] = {
        "serial": new_serial(NOW),
        "signature_algorithm": FACTS.signature_algorithm,
        "issuer_name": FACTS.name,
        "authority_key_id": FACTS.key_id,
        "subject": SUBJECT,
        "not_before": CA.not_before,
        "not_after": CA.not_after,
        "spki": SPKI,
        "trust_domain": TRUST_DOMAIN,
        "path_length": 0,
    }
    return encode_authority_tbs(**{**fields, **changes})  # type: ignore[arg-type]


SUBJECT = x509.Name.from_rfc4514_string("CN=ca").public_bytes()
CA = dataclasses.replace(
    GOOD, spiffe_id=TRUST_DOMAIN.id, dns_names=(), subject=SUBJECT, path_length=0
)


@pytest.mark.clause("X-5")
@pytest.mark.clause("X-7")
def test_x_5_x_7_authorities() -> None:
    lint_tbs(authority(), INTERMEDIATE, CA)
    limitless = dataclasses.replace(CA, path_length=None)
    lint_tbs(authority(path_length=None), INTERMEDIATE, limitless)
    for data, expected, rule in (
        (authority(path_length=1), CA, "X-7"),
        (authority(path_length=None), CA, "X-7"),
        (authority(trust_domain=TrustDomain("example.com")), CA, "X-5"),
        (authority(), dataclasses.replace(CA, spiffe_id=WORKLOAD_ID), "X-5"),
        (authority(subject=b"\x30\x00"), dataclasses.replace(CA, subject=b"\x30\x00"), "subject"),
        (tbs(), GOOD, "extensions"),
    ):
        with pytest.raises(LintFailed, match=rule):
            lint_tbs(data, INTERMEDIATE, expected)
    assert "extensions" in refused(authority(), CA)


def test_names_constraints_of_an_authority_are_exactly_the_trust_domain() -> None:
    good = authority()
    limit = b"\x30\x11\xa0\x0f\x30\x0d\x86\x0bexample.org"
    assert limit in good
    for wrong in (
        limit.replace(b"example.org", b"example.com"),
        limit.replace(b"\x86", b"\x82"),
        limit.replace(b"\xa0", b"\xa1"),
    ):
        with pytest.raises(LintFailed):
            lint_tbs(good.replace(limit, wrong), INTERMEDIATE, CA)


def test_what_prepare_makes_passes_against_facts_from_the_certificate_alone() -> None:
    prepared = BELOW.issuer.prepare(
        csr=csr_der(), spiffe_id=WORKLOAD_ID, profile=WORKLOAD, ttl=HOUR, now=NOW
    )
    lint_tbs(prepared.tbs, WORKLOAD, GOOD)
