"""Every rule of the linter refuses what breaks it, before a key is touched."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import AuthorityInformationAccessOID, ExtendedKeyUsageOID

from identity_ca.authority_certificate import issuer_facts
from identity_ca.errors import LintFailed
from identity_ca.keys import KeyAlgorithm, spki_der
from identity_ca.lint import Expectations, lint_tbs
from identity_ca.profile import INTERMEDIATE, WORKLOAD, X509Profile
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


CRL_URL = "http://idb.example.org:8082/crl/a1/5-of-64.crl"
OCSP_URL = "http://idb.example.org:8082/ocsp"
POINTING_EXPECTED = dataclasses.replace(GOOD, crl_url=CRL_URL, ocsp_url=OCSP_URL)


def lists_at(*urls: str) -> x509.CRLDistributionPoints:
    return x509.CRLDistributionPoints(
        x509.DistributionPoint([x509.UniformResourceIdentifier(url)], None, None, None)
        for url in urls
    )


def answers_at(
    *urls: str, method: x509.ObjectIdentifier = AuthorityInformationAccessOID.OCSP
) -> x509.AuthorityInformationAccess:
    return x509.AuthorityInformationAccess(
        x509.AccessDescription(method, x509.UniformResourceIdentifier(url)) for url in urls
    )


POINTING: Extensions = (*ALL, (lists_at(CRL_URL), False), (answers_at(OCSP_URL), False))


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


NAMED: Extensions = replaced(ALL, san(URI, DNS, x509.DNSName("api.internal")), critical=False)
NAMED_EXPECTED = dataclasses.replace(
    GOOD,
    dns_names=(OWN_NAME, "api.internal"),
    subject=x509.Name.from_rfc4514_string("CN=api.internal").public_bytes(),
)


def named(subject: str = "CN=api.internal", extensions: Extensions = NAMED) -> bytes:
    return tbs(extensions, subject=subject)


def test_a_common_name_is_one_of_the_dns_names_and_the_san_is_not_critical() -> None:
    lint_tbs(named(), WORKLOAD, NAMED_EXPECTED)
    critical = replaced(NAMED, san(URI, DNS, x509.DNSName("api.internal")), critical=True)
    assert "only there" in refused(named(extensions=critical), NAMED_EXPECTED)
    assert "subject" in refused(named(subject=""), NAMED_EXPECTED)


@pytest.mark.parametrize("subject", ["CN=other", "O=api.internal", "CN=api.internal,O=a"])
def test_no_other_subject_of_a_leaf(subject: str) -> None:
    name = x509.Name.from_rfc4514_string(subject).public_bytes()
    expected = dataclasses.replace(NAMED_EXPECTED, subject=name)
    with pytest.raises(LintFailed):
        lint_tbs(named(subject), WORKLOAD, expected)


def test_where_revocation_is_asked_about() -> None:
    lint_tbs(tbs(POINTING), WORKLOAD, POINTING_EXPECTED)
    lint_tbs(tbs(tuple(reversed(POINTING))), WORKLOAD, POINTING_EXPECTED)


@pytest.mark.parametrize(
    ("extensions", "rule"),
    [
        (ALL, "extensions"),
        (without(POINTING, x509.AuthorityInformationAccess), "extensions"),
        (replaced(POINTING, lists_at(CRL_URL), critical=True), "distribution point"),
        (replaced(POINTING, lists_at(OCSP_URL), critical=False), "distribution point"),
        (replaced(POINTING, lists_at(CRL_URL, CRL_URL), critical=False), "distribution point"),
        (replaced(POINTING, answers_at(OCSP_URL), critical=True), "OCSP"),
        (replaced(POINTING, answers_at(CRL_URL), critical=False), "OCSP"),
        (replaced(POINTING, answers_at(OCSP_URL, OCSP_URL), critical=False), "OCSP"),
        (
            replaced(
                POINTING,
                answers_at(OCSP_URL, method=AuthorityInformationAccessOID.CA_ISSUERS),
                critical=False,
            ),
            "OCSP",
        ),
    ],
)
def test_wrong_places_to_ask(extensions: Extensions, rule: str) -> None:
    assert rule in refused(tbs(extensions), POINTING_EXPECTED)


def test_nowhere_to_ask_unless_told_where() -> None:
    assert "extensions" in refused(tbs(POINTING))


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


# --- the same certificate, written otherwise -----------------------------------------------------
#
# A reader written by hand has to be shown what it must not read. These tests take a good
# certificate apart into all its elements, those inside of extension values included, and put it
# together again with one of them changed and every length around it right.


def shortest(length: int) -> bytes:
    if length < 128:
        return bytes((length,))
    raw = length.to_bytes((length.bit_length() + 7) // 8, "big")
    return bytes((0x80 | len(raw),)) + raw


@dataclasses.dataclass
class Element:
    """One DER element: `inside` where it holds others, else `content`."""

    tag: int
    content: bytes = b""
    inside: list[Element] | None = None
    says: Callable[[int], bytes] = shortest

    def der(self) -> bytes:
        inside = self.inside
        body = self.content if inside is None else b"".join(each.der() for each in inside)
        return bytes((self.tag,)) + self.says(len(body)) + body

    def all(self) -> list[Element]:
        return [self, *(below for each in self.inside or [] for below in each.all())]

    def at(self, *places: int) -> Element:
        found = self
        for place in places:
            assert found.inside is not None
            found = found.inside[place]
        return found


def longer(length: int) -> bytes:
    raw = length.to_bytes((length.bit_length() + 7) // 8 + (length >= 128), "big")
    return bytes((0x80 | len(raw),)) + raw


def elements(data: bytes) -> list[Element]:
    found = []
    while data:
        tag, length, start = data[0], data[1], 2
        if length >= 0x80:
            start += length - 0x80
            length = int.from_bytes(data[2:start], "big")
        content, data = data[start : start + length], data[start + length :]
        assert len(content) == length
        # An OCTET STRING is the value of an extension, and holds DER.
        holds_others = tag & 0x20 or (tag == 0x04 and content[:1] in (b"\x30", b"\x03", b"\x04"))
        if holds_others:
            found.append(Element(tag, inside=elements(content)))
        else:
            found.append(Element(tag, content))
    return found


def taken_apart(data: bytes) -> Element:
    (whole,) = elements(data)
    assert whole.der() == data
    return whole


def extension(whole: Element, oid: str) -> Element:
    """By the last byte of its OID, 2.5.29.x."""
    for each in whole.at(-1, 0).inside or []:
        if each.at(0).content == bytes.fromhex("551d" + oid):
            return each
    raise AssertionError(oid)


KINDS: dict[str, tuple[Callable[[], bytes], X509Profile, Expectations]] = {
    "leaf": (tbs, WORKLOAD, GOOD),
    "named leaf": (named, WORKLOAD, NAMED_EXPECTED),
    "pointing leaf": (lambda: tbs(POINTING), WORKLOAD, POINTING_EXPECTED),
    "authority": (authority, INTERMEDIATE, CA),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("added", [b"\x05\x00", b"\x30\x00", b"\x00"])
def test_nothing_can_be_added_anywhere(kind: str, added: bytes) -> None:
    make, profile, expected = KINDS[kind]
    good = make()
    places = [n for n, each in enumerate(taken_apart(good).all()) if each.inside is not None]
    assert len(places) > 25
    for place in places:
        changed = taken_apart(good)
        inside = changed.all()[place].inside
        assert inside is not None
        inside.append(Element(added[0], says=lambda _: added[1:]))
        with pytest.raises(LintFailed):
            lint_tbs(changed.der(), profile, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_every_length_is_the_shortest(kind: str) -> None:
    make, profile, expected = KINDS[kind]
    good = make()
    for place in range(len(taken_apart(good).all())):
        changed = taken_apart(good)
        changed.all()[place].says = longer
        with pytest.raises(LintFailed):
            lint_tbs(changed.der(), profile, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by", [1, -1])
def test_every_length_is_the_contents(kind: str, by: int) -> None:
    make, profile, expected = KINDS[kind]
    good = make()
    for place in range(len(taken_apart(good).all())):
        changed = taken_apart(good)
        changed.all()[place].says = lambda length: shortest(max(length + by, 0))
        data = changed.der()
        if data == good:  # nothing is not one less than nothing
            continue
        with pytest.raises(LintFailed):
            lint_tbs(data, profile, expected)


@pytest.mark.parametrize("place", [0, 6])
def test_an_extension_cannot_hide_another_of_its_kind(place: int) -> None:
    """Whichever of two a verifier reads, the linter has seen it."""
    changed = taken_apart(tbs())
    extensions = changed.at(-1, 0).inside
    assert extensions is not None
    (usage,) = elements(extension(changed, "0f").der())
    usage.at(-1, 0).content = bytes.fromhex("0106")  # keyCertSign and cRLSign
    extensions.insert(place, usage)
    assert "twice" in refused(changed.der())


def test_a_serial_number_is_positive_and_fills_its_octets() -> None:
    assert "20 octets" in refused(tbs(serial=1 << 151))  # 20 octets, the first of them zero
    changed = taken_apart(tbs())
    changed.at(1).content = b"\xff" + changed.at(1).content[1:]
    assert "20 octets" in refused(changed.der())


def test_the_beginning_counts_as_much_as_the_end() -> None:
    later = dataclasses.replace(GOOD, not_before=WHOLE)
    assert "asked for" in refused(tbs(), later)


def test_a_life_of_no_length_is_refused() -> None:
    moment = WHOLE - timedelta(seconds=10)
    data = tbs(not_after=timedelta(seconds=-10))
    assert "empty" in refused(data, dataclasses.replace(GOOD, not_after=moment))


@pytest.mark.parametrize(
    ("tag", "text"),
    [
        (0x18, b"20260301115950Z"),  # the long form, years before its time
        (0x17, b"26030111595 Z"),
        (0x17, b"2603 1115950Z"),
        (0x17, b"26+301115950Z"),
        (0x17, b"260301115950+"),
        (0x17, b"261301115950Z"),
        (0x17, b"2603011159Z"),
    ],
)
def test_a_time_has_one_form(tag: int, text: bytes) -> None:
    changed = taken_apart(tbs())
    moment = changed.at(4, 0)
    assert (moment.tag, moment.content) == (0x17, b"260301115950Z")
    moment.tag, moment.content = tag, text
    assert "DER of the expected structure" in refused(changed.der())


def test_a_key_is_whole_octets() -> None:
    spki = taken_apart(SPKI)
    assert spki.at(1).content[:1] == b"\x00"
    spki.at(1).content = b"\x01" + spki.at(1).content[1:]
    data = tbs().replace(SPKI, spki.der())
    assert "whole octets" in refused(data, dataclasses.replace(GOOD, spki=spki.der()))


def test_the_length_of_an_rsa_key_cannot_be_padded() -> None:
    """A zero octet in front of a modulus whose top bit is not set makes it look a bit longer."""
    rsa = spki_der(workload_key(KeyAlgorithm.RSA_2048).public_key)
    modulus = rsa.index(b"\x02\x82\x01\x01\x00") + 5
    short = rsa[:modulus] + bytes((rsa[modulus] & 0x7F,)) + rsa[modulus + 1 :]
    key_id = x509.SubjectKeyIdentifier(subject_key_id(short))
    data = tbs(replaced(ALL, key_id, critical=False), algorithm=KeyAlgorithm.RSA_2048)
    expected = dataclasses.replace(GOOD, spki=short)
    assert "profile allows" in refused(data.replace(rsa, short), expected)


def test_an_authority_has_no_name_beside_its_trust_domain() -> None:
    changed = taken_apart(authority())
    names = extension(changed, "11").at(-1, 0).inside
    assert names is not None
    names.append(Element(0x82, b"example.org"))
    with pytest.raises(LintFailed, match="X-5"):
        lint_tbs(changed.der(), INTERMEDIATE, CA)
