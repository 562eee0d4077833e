"""Our encoders answer byte for byte what `cryptography`'s builders sign for the same input."""

from __future__ import annotations

import string
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import AuthorityInformationAccessOID, ExtendedKeyUsageOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from identity_ca.authority_certificate import issuer_facts
from identity_ca.crl import RevokedEntry, build_crl, encode_entry, encode_removal, sign_crl
from identity_ca.der import encode_integer, encode_oid
from identity_ca.distribution import DistributionPoints, leaf_extensions, shard_of
from identity_ca.keys import KeyAlgorithm, signature_hash, spki_der
from identity_ca.spiffe_id import SpiffeId, TrustDomain
from identity_ca.template import (
    EMPTY_NAME,
    LeafTemplate,
    common_name,
    encode_authority_tbs,
    signature_algorithm_der,
    subject_key_id,
)
from support.ca import SIGNING_ALGORITHMS, hierarchy, key_usage, uri_san, workload_key
from support.ca_material import TRUST_DOMAIN, signing_key

serials = st.integers(1, (1 << 159) - 1)
moments = st.datetimes(
    datetime(1951, 1, 1),
    datetime(2120, 1, 1),
    timezones=st.just(UTC),
).map(lambda moment: moment.replace(microsecond=0))
segments = st.text(string.ascii_letters + string.digits, min_size=1, max_size=200)
ids = st.lists(segments, min_size=1, max_size=8).map(
    lambda parts: SpiffeId.from_segments(TRUST_DOMAIN, *parts)
)
labels = st.text(string.ascii_lowercase, min_size=1, max_size=20)
dns_names = st.lists(st.builds("{}.{}".format, labels, labels), max_size=20)
algorithms = st.sampled_from(SIGNING_ALGORITHMS)
bases = st.builds("http://{}:{}".format, labels, st.integers(1, 65535))
points = st.one_of(st.none(), st.builds(DistributionPoints, bases, st.integers(1, 1024)))


@given(
    serials,
    moments,
    st.timedeltas(timedelta(seconds=1), timedelta(days=365)),
    ids,
    dns_names,
    points,
)
@pytest.mark.parametrize("subject_algorithm", SIGNING_ALGORITHMS)
def test_leaf_equals_the_builders(
    subject_algorithm: KeyAlgorithm,
    serial: int,
    not_before: datetime,
    life: timedelta,
    spiffe_id: SpiffeId,
    names: list[str],
    pointing: DistributionPoints | None,
) -> None:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, n) for n in names[:1]])
    below = hierarchy(algorithm=KeyAlgorithm.EC_P256)
    issuer_key, own = below.issuer.key, below.intermediate
    not_after = (not_before + life).replace(microsecond=0)
    subject_key = workload_key(subject_algorithm).public_key
    spki = spki_der(subject_key)
    key_id = subject_key_id(spki)
    facts = issuer_facts(own, issuer_key)
    urls = () if pointing is None else pointing.shard_urls("a1")
    ocsp = "" if pointing is None else pointing.ocsp_url
    encoded = LeafTemplate(
        issuer_name=facts.name,
        authority_key_id=facts.key_id,
        signature_algorithm=facts.signature_algorithm,
        pointers=[leaf_extensions(url, ocsp) for url in urls],
    ).encode(
        serial=serial,
        not_before=not_before,
        not_after=not_after,
        spki=spki,
        spiffe_id=spiffe_id,
        dns_names=names,
        subject=common_name(names[0]) if names else EMPTY_NAME,
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(own.subject)
        .public_key(subject_key)
        .serial_number(serial)
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(key_usage(digital_signature=True), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage(
                [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            ),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier(key_id), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier(facts.key_id, None, None),
            critical=False,
        )
        .add_extension(
            x509.SubjectAlternativeName(
                [
                    x509.UniformResourceIdentifier(str(spiffe_id)),
                    *(x509.DNSName(name) for name in names),
                ]
            ),
            critical=not names,
        )
    )
    if urls:
        builder = builder.add_extension(
            x509.CRLDistributionPoints([point_at(urls[shard_of(serial, len(urls))])]),
            critical=False,
        ).add_extension(
            x509.AuthorityInformationAccess(
                [
                    x509.AccessDescription(
                        AuthorityInformationAccessOID.OCSP, x509.UniformResourceIdentifier(ocsp)
                    )
                ]
            ),
            critical=False,
        )
    built = builder.sign(issuer_key.as_private_key(), signature_hash(issuer_key.algorithm))
    assert encoded == built.tbs_certificate_bytes


def point_at(url: str) -> x509.DistributionPoint:
    return x509.DistributionPoint([x509.UniformResourceIdentifier(url)], None, None, None)


@settings(max_examples=30)
@given(
    serials,
    moments,
    algorithms,
    algorithms,
    st.one_of(st.none(), st.integers(0, 5)),
    st.from_regex(r"[a-z0-9._-]{1,255}", fullmatch=True).map(TrustDomain),
)
def test_authority_equals_the_builders(
    serial: int,
    not_before: datetime,
    issuer_algorithm: KeyAlgorithm,
    subject_algorithm: KeyAlgorithm,
    path_length: int | None,
    trust_domain: TrustDomain,
) -> None:
    issuer_key, subject_key = signing_key(issuer_algorithm, 91), workload_key(subject_algorithm)
    issuer_name = x509.Name.from_rfc4514_string("CN=issuer,O=example.org")
    subject = x509.Name.from_rfc4514_string("CN=subject,O=example.org")
    issuer_key_id = subject_key_id(spki_der(issuer_key.public_key))
    spki = spki_der(subject_key.public_key)
    encoded = encode_authority_tbs(
        serial=serial,
        signature_algorithm=signature_algorithm_der(issuer_algorithm),
        issuer_name=issuer_name.public_bytes(),
        authority_key_id=issuer_key_id,
        subject=subject.public_bytes(),
        not_before=not_before,
        not_after=not_before + timedelta(days=1),
        spki=spki,
        trust_domain=trust_domain,
        path_length=path_length,
    )
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer_name)
        .public_key(subject_key.public_key)
        .serial_number(serial)
        .not_valid_before(not_before)
        .not_valid_after(not_before + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(key_usage(sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier(subject_key_id(spki)), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier(issuer_key_id, None, None), critical=False)
        .add_extension(uri_san(str(trust_domain.id)), critical=False)
        .add_extension(
            x509.NameConstraints([x509.UniformResourceIdentifier(trust_domain.name)], None),
            critical=True,
        )
        .sign(issuer_key.as_private_key(), signature_hash(issuer_algorithm))
    )
    assert encoded == built.tbs_certificate_bytes


revoked = st.builds(
    RevokedEntry,
    serial=serials,
    revoked_at=moments,
    reason=st.sampled_from([None, 0, 1, 2, 3, 4, 5, 6, 9, 10]),
)
REASONS = {
    1: x509.ReasonFlags.key_compromise,
    2: x509.ReasonFlags.ca_compromise,
    3: x509.ReasonFlags.affiliation_changed,
    4: x509.ReasonFlags.superseded,
    5: x509.ReasonFlags.cessation_of_operation,
    6: x509.ReasonFlags.certificate_hold,
    9: x509.ReasonFlags.privilege_withdrawn,
    10: x509.ReasonFlags.aa_compromise,
}
urls = st.text(string.ascii_lowercase, max_size=200).map(lambda path: path and f"http://a/{path}")
reductions = st.one_of(st.none(), st.integers(0, 1 << 60))


@settings(max_examples=60)
@given(
    st.lists(revoked, max_size=12, unique_by=lambda entry: entry.serial),
    st.lists(st.tuples(st.integers(1, 1 << 150), moments), max_size=3),
    st.integers(1 << 60, (1 << 159) - 1),
    moments,
    algorithms,
    urls,
    urls,
    reductions,
)
def test_crl_equals_the_builders(
    entries: list[RevokedEntry],
    removed: list[tuple[int, datetime]],
    number: int,
    this_update: datetime,
    algorithm: KeyAlgorithm,
    scope_url: str,
    delta_url: str,
    base_number: int | None,
) -> None:
    """Full, a part, a delta; a delta alone takes entries back."""
    if base_number is None:
        removed = []
    else:
        delta_url = ""
    issuer = hierarchy(algorithm=KeyAlgorithm.EC_P256).issuer
    if algorithm in (KeyAlgorithm.EC_P384, KeyAlgorithm.RSA_2048):
        issuer = hierarchy(algorithm=algorithm).issuer
    next_update = this_update + timedelta(hours=1)
    der = sign_crl(
        issuer=issuer,
        encoded_entries=[
            b"".join(map(encode_entry, entries)),
            *(encode_removal(serial, at) for serial, at in removed),
        ],
        number=number,
        this_update=this_update,
        next_update=next_update,
        scope_url=scope_url,
        base_number=base_number,
        delta_url=delta_url,
    )
    if not removed:
        again = build_crl(
            issuer=issuer,
            entries=entries,
            number=number,
            this_update=this_update,
            next_update=next_update,
            scope_url=scope_url,
            base_number=base_number,
            delta_url=delta_url,
        )
        assert tbs_of(again) == tbs_of(der)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.certificate.subject)
        .last_update(this_update)
        .next_update(next_update)
        .add_extension(
            x509.AuthorityKeyIdentifier(
                issuer_facts(issuer.certificate, issuer.key).key_id, None, None
            ),
            critical=False,
        )
        .add_extension(x509.CRLNumber(number), critical=False)
    )
    if base_number is not None:
        builder = builder.add_extension(x509.DeltaCRLIndicator(base_number), critical=True)
    if scope_url:
        builder = builder.add_extension(part_at(scope_url), critical=True)
    if delta_url:
        builder = builder.add_extension(x509.FreshestCRL([point_at(delta_url)]), critical=False)
    for entry in entries:
        one = (
            x509.RevokedCertificateBuilder()
            .serial_number(entry.serial)
            .revocation_date(entry.revoked_at)
        )
        if entry.reason:
            one = one.add_extension(x509.CRLReason(REASONS[entry.reason]), critical=False)
        builder = builder.add_revoked_certificate(one.build())
    for serial, at in removed:
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder()
            .serial_number(serial)
            .revocation_date(at)
            .add_extension(x509.CRLReason(x509.ReasonFlags.remove_from_crl), critical=False)
            .build()
        )
    built = builder.sign(issuer.key.as_private_key(), signature_hash(issuer.key.algorithm))
    ours = x509.load_der_x509_crl(der)
    assert ours.tbs_certlist_bytes == built.tbs_certlist_bytes
    public_key = issuer.certificate.public_key()
    assert ours.is_signature_valid(public_key)  # type: ignore[arg-type]
    assert ours.public_bytes(Encoding.DER) == der


def tbs_of(crl: bytes) -> bytes:
    return x509.load_der_x509_crl(crl).tbs_certlist_bytes


def part_at(url: str) -> x509.IssuingDistributionPoint:
    return x509.IssuingDistributionPoint(
        full_name=[x509.UniformResourceIdentifier(url)],
        relative_name=None,
        only_contains_user_certs=True,
        only_contains_ca_certs=False,
        only_some_reasons=None,
        indirect_crl=False,
        only_contains_attribute_certs=False,
    )


@given(st.integers(0, 1 << 200))
def test_integers_are_minimal(value: int) -> None:
    der = encode_integer(value)
    content = der[2:]
    assert int.from_bytes(content, "big", signed=True) == value
    assert len(content) == 1 or not (content[0] == 0 and content[1] < 0x80)


@given(st.tuples(st.integers(0, 2), st.integers(0, 39)), st.lists(st.integers(0, 1 << 40)))
def test_object_identifiers_equal_the_librarys(start: tuple[int, int], rest: list[int]) -> None:
    dotted = ".".join(map(str, (*start, *rest)))
    try:
        oid = x509.ObjectIdentifier(dotted)
    except ValueError:
        return  # the library holds a limit of 63 octets
    san = x509.SubjectAlternativeName([x509.RegisteredID(oid)]).public_bytes()
    assert san[4:] == encode_oid(dotted)[2:]
