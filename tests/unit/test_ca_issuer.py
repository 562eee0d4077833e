"""X.509-SVIDs as they are issued (X509-SVID.md, the issuer's clauses), and every refusal."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from identity_ca.authority_certificate import build_root
from identity_ca.errors import (
    CsrRejected,
    KeyTooWeak,
    LintFailed,
    ProfileViolation,
    UpstreamRejected,
)
from identity_ca.issuer import MIN_ISSUER_REMAINING, PreparedX509, X509Credential, X509Issuer
from identity_ca.keys import KeyAlgorithm, key_fingerprint
from identity_ca.profile import BROKER, INTERMEDIATE, NODE, WORKLOAD
from identity_ca.serial import serial_hex
from identity_ca.spiffe_id import SpiffeId, TrustDomain
from identity_ca.template import LeafTemplate
from support.ca import (
    HOUR,
    SIGNING_ALGORITHMS,
    ca_extensions,
    csr_der,
    forge,
    hierarchy,
    leaf_extensions,
    weak_requests,
    without,
    workload_key,
)
from support.ca_material import NOW, TRUST_DOMAIN, WORKLOAD_ID, signing_key

SECOND = timedelta(seconds=1)


def leaf_of(credential: X509Credential) -> x509.Certificate:
    return x509.load_der_x509_certificate(credential.chain[0])


def prepare(
    issuer: X509Issuer | None = None,
    *,
    csr: bytes | None = None,
    spiffe_id: SpiffeId = WORKLOAD_ID,
    ttl: timedelta = HOUR,
    now: datetime = NOW,
    dns_names: tuple[str, ...] = (),
) -> PreparedX509:
    return (issuer or hierarchy().issuer).prepare(
        csr=csr or csr_der(),
        spiffe_id=spiffe_id,
        profile=WORKLOAD,
        ttl=ttl,
        now=now,
        dns_names=dns_names,
    )


@pytest.fixture(scope="module")
def leaf() -> x509.Certificate:
    return leaf_of(hierarchy().issue(dns_names=["api.internal", "payments.example.org"]))


@pytest.mark.clause("X-1")
def test_x_1_exactly_one_uri_san(leaf: x509.Certificate) -> None:
    san = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert san.get_values_for_type(x509.UniformResourceIdentifier) == [str(WORKLOAD_ID)]
    assert san.get_values_for_type(x509.DNSName) == [
        WORKLOAD_ID.dns_san(),
        "api.internal",
        "payments.example.org",
    ]
    assert len(list(san)) == 4


@pytest.mark.clause("X-3")
def test_x_3_a_leaf_needs_a_path() -> None:
    with pytest.raises(ProfileViolation, match="X-3"):
        prepare(spiffe_id=TRUST_DOMAIN.id)


@pytest.mark.clause("X-4")
def test_x_4_no_subject_and_so_a_critical_san() -> None:
    leaf = leaf_of(hierarchy().issue())
    assert list(leaf.subject) == []
    assert leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).critical


def test_the_first_dns_name_asked_for_is_the_common_name(leaf: x509.Certificate) -> None:
    assert leaf.subject.rfc4514_string() == "CN=api.internal"
    assert not leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).critical
    longest = f"{'a' * 56}.example"
    for name, subject in ((longest, f"CN={longest}"), (f"a{longest}", "")):
        again = leaf_of(hierarchy().issue(dns_names=[name, "b.example"]))
        assert again.subject.rfc4514_string() == subject
        san = again.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        assert san.critical is (subject == "")
        assert san.value.get_values_for_type(x509.DNSName)[1:] == [name, "b.example"]


@pytest.mark.clause("X-5")
def test_x_5_signing_certificates_name_the_trust_domain_without_a_path() -> None:
    for certificate in (hierarchy().root, hierarchy().intermediate):
        san = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = san.get_values_for_type(x509.UniformResourceIdentifier)
        assert uris == ["spiffe://example.org"]
        assert SpiffeId.parse(uris[0]).path == ""


@pytest.mark.clause("X-7")
def test_x_7_ca_flag(leaf: x509.Certificate) -> None:
    for certificate, is_ca in (
        (leaf, False),
        (hierarchy().root, True),
        (hierarchy().intermediate, True),
    ):
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        assert constraints.value.ca is is_ca
        assert constraints.critical


@pytest.mark.clause("X-8")
def test_x_8_key_usage_is_present_and_critical(leaf: x509.Certificate) -> None:
    for certificate in (leaf, hierarchy().root, hierarchy().intermediate):
        assert certificate.extensions.get_extension_for_class(x509.KeyUsage).critical


@pytest.mark.clause("X-9")
def test_x_9_key_usage_bits(leaf: x509.Certificate) -> None:
    usage = leaf.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.digital_signature
    assert not usage.key_cert_sign
    assert not usage.crl_sign
    assert not usage.key_encipherment
    for certificate in (hierarchy().root, hierarchy().intermediate):
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
        assert usage.key_cert_sign
        assert usage.crl_sign
        assert not usage.digital_signature


@pytest.mark.clause("X-10")
def test_x_10_extended_key_usage_is_both(leaf: x509.Certificate) -> None:
    usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]


@pytest.mark.parametrize("ca", SIGNING_ALGORITHMS[:3])
@pytest.mark.parametrize("subject", SIGNING_ALGORITHMS[:3])
def test_every_pair_of_algorithms_verifies(ca: KeyAlgorithm, subject: KeyAlgorithm) -> None:
    below = hierarchy(algorithm=ca)
    leaf = leaf_of(below.issue(algorithm=subject))
    leaf.verify_directly_issued_by(below.intermediate)
    below.intermediate.verify_directly_issued_by(below.root)
    assert key_fingerprint(leaf.public_key()) == key_fingerprint(workload_key(subject).public_key)


def test_what_a_credential_says_is_what_is_in_it() -> None:
    prepared = prepare()
    credential = hierarchy().issuer.sign(prepared)
    leaf = leaf_of(credential)
    assert credential.chain[1:] == (hierarchy().intermediate.public_bytes(Encoding.DER),)
    assert credential.digest == hashlib.sha256(credential.chain[0]).hexdigest()
    assert credential.serial == prepared.serial == serial_hex(leaf.serial_number)
    assert credential.not_before == prepared.not_before == leaf.not_valid_before_utc
    assert credential.not_after == prepared.not_after == leaf.not_valid_after_utc
    assert credential.spiffe_id == prepared.spiffe_id == WORKLOAD_ID
    assert prepared.key_fingerprint == key_fingerprint(leaf.public_key())
    assert prepared.authority_id == "x509-1"
    assert leaf.tbs_certificate_bytes == prepared.tbs
    assert prepared.tbs_digest == hashlib.sha256(leaf.tbs_certificate_bytes).hexdigest()


def test_key_identifiers_link_leaf_and_issuer(leaf: x509.Certificate) -> None:
    authority = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    own = hierarchy().intermediate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    assert authority.key_identifier == own.value.digest
    assert leaf.issuer == hierarchy().intermediate.subject


def test_validity_is_backdated_by_ten_seconds_in_whole_seconds() -> None:
    prepared = prepare(now=NOW + timedelta(days=1))
    whole = (NOW + timedelta(days=1)).replace(microsecond=0)
    assert prepared.not_before == whole - 10 * SECOND
    assert prepared.not_after == whole + HOUR


def test_validity_does_not_begin_before_the_issuers() -> None:
    issuer = hierarchy().issuer
    prepared = prepare(now=issuer.not_before + SECOND)
    assert prepared.not_before == issuer.not_before
    with pytest.raises(ProfileViolation, match="not valid yet"):
        prepare(now=issuer.not_before - SECOND)


def test_validity_never_goes_beyond_the_issuers() -> None:
    issuer = hierarchy().issuer
    prepared = prepare(now=issuer.not_after - timedelta(seconds=61), ttl=HOUR)
    assert prepared.not_after == issuer.not_after
    assert leaf_of(issuer.sign(prepared)).not_valid_after_utc == issuer.not_after


def test_an_issuer_about_to_end_prepares_nothing() -> None:
    with pytest.raises(ProfileViolation, match="about to expire"):
        prepare(now=hierarchy().issuer.not_after - timedelta(seconds=59))


@pytest.mark.parametrize(
    ("ttl", "why"),
    [
        (timedelta(0), "at least one second"),
        (timedelta(seconds=-1), "at least one second"),
        (timedelta(milliseconds=900), "at least one second"),
        (WORKLOAD.max_ttl + SECOND, "at most"),
    ],
)
def test_lifetimes_outside_the_profile_are_refused_not_cut(ttl: timedelta, why: str) -> None:
    with pytest.raises(ProfileViolation, match=why):
        prepare(ttl=ttl)


def test_the_shortest_lifetime_is_valid_when_issued() -> None:
    prepared = prepare(ttl=SECOND)
    assert prepared.not_before <= NOW <= prepared.not_after


@pytest.mark.parametrize("profile", [WORKLOAD, NODE, BROKER])
def test_every_leaf_profile_issues_its_longest_life(profile: object) -> None:
    assert profile in (WORKLOAD, NODE, BROKER)
    for each in (WORKLOAD, NODE, BROKER):
        credential = hierarchy().issue(profile=each, ttl=each.max_ttl)
        assert credential.not_after - NOW.replace(microsecond=0) == each.max_ttl


def test_a_ca_profile_is_not_for_workloads() -> None:
    with pytest.raises(ProfileViolation, match="CA profile"):
        hierarchy().issue(profile=INTERMEDIATE)


def test_another_trust_domain_is_refused() -> None:
    with pytest.raises(ProfileViolation, match=r"trust domain example\.org"):
        prepare(spiffe_id=SpiffeId.parse("spiffe://example.com/payments/api"))


def test_names_asked_for_in_the_csr_are_never_granted() -> None:
    credential = hierarchy().issuer.sign(
        prepare(csr=csr_der(subject="admin", sans=("spiffe://example.org/admin",)))
    )
    assert b"admin" not in credential.chain[0]


def test_weak_keys_and_broken_requests_are_refused() -> None:
    with pytest.raises(KeyTooWeak):
        prepare(csr=weak_requests()["rsa-1024"])
    with pytest.raises(KeyTooWeak):
        prepare(csr=csr_der(KeyAlgorithm.ED25519))
    with pytest.raises(CsrRejected):
        prepare(csr=b"not a request")


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "*",
        "*.example.org",
        "Example.org",
        "example.org.",
        "a..b",
        "-a.b",
        "a_b",
        "10.0.0.1",
        "a" * 64,
        ("a" * 60 + ".") * 4 + "a" * 60,
        "exämple.org",
        "a b",
        "a\n",
        "a\x00.example.org",
    ],
)
def test_dns_names_must_be_plain_host_names(name: str) -> None:
    with pytest.raises(ProfileViolation, match="DNS name"):
        prepare(dns_names=(name,))


def test_a_dns_name_that_stands_for_another_id_is_refused() -> None:
    other = SpiffeId.parse("spiffe://example.org/admin").dns_san()
    assert other is not None
    for name in (other, "x.svid.example.org"):
        with pytest.raises(ProfileViolation, match="derived from SPIFFE IDs"):
            prepare(dns_names=(name,))


def test_dns_names_appear_once_and_not_too_many() -> None:
    own = WORKLOAD_ID.dns_san()
    assert own is not None
    leaf = leaf_of(hierarchy().issue(dns_names=["a.b", own, "a.b"]))
    san = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert san.get_values_for_type(x509.DNSName) == [own, "a.b"]
    most = tuple(f"n{number}.b" for number in range(WORKLOAD.max_dns_names))
    prepare(dns_names=most)
    with pytest.raises(ProfileViolation, match="at most 32"):
        prepare(dns_names=(*most, "one.more"))


def test_no_derived_dns_name_where_the_trust_domain_is_not_one() -> None:
    domain = TrustDomain("my_domain")
    issuer = hierarchy(domain).issuer
    credential = issuer.sign(prepare(issuer, spiffe_id=SpiffeId(domain, "/a")))
    san = leaf_of(credential).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert san.get_values_for_type(x509.DNSName) == []


def test_a_prepared_certificate_signs_once() -> None:
    issuer = hierarchy().issuer
    prepared = prepare()
    issuer.sign(prepared)
    with pytest.raises(ProfileViolation, match="signed already"):
        issuer.sign(prepared)
    with pytest.raises(ProfileViolation, match="signed already"):
        issuer.sign_many([prepared])


def test_the_same_one_twice_in_a_batch_signs_nothing() -> None:
    prepared = prepare()
    with pytest.raises(ProfileViolation, match="signed already"):
        hierarchy().issuer.sign_many([prepared, prepared])


def test_a_batch_keeps_its_order() -> None:
    ids = [SpiffeId.parse(f"spiffe://example.org/w/{number}") for number in range(5)]
    credentials = hierarchy().issuer.sign_many([prepare(spiffe_id=each) for each in ids])
    assert [each.spiffe_id for each in credentials] == ids
    for credential in credentials:
        leaf_of(credential).verify_directly_issued_by(hierarchy().intermediate)
    assert hierarchy().issuer.sign_many([]) == []


def test_only_prepare_makes_one() -> None:
    with pytest.raises(TypeError, match=r"only X509Issuer\.prepare"):
        PreparedX509(
            object(),
            authority_id="x509-1",
            serial="00",
            spiffe_id=WORKLOAD_ID,
            not_before=NOW,
            not_after=NOW,
            tbs=b"",
            tbs_digest="",
            key_fingerprint="",
        )


def test_bytes_changed_after_lint_are_not_signed() -> None:
    prepared = prepare()
    object.__setattr__(prepared, "tbs", prepared.tbs.replace(b"payments", b"admin123"))
    with pytest.raises(LintFailed, match="not the ones that were linted"):
        hierarchy().issuer.sign(prepared)


def test_another_authority_does_not_sign_it() -> None:
    root = build_root(signing_key(nth=5), trust_domain=TRUST_DOMAIN, ttl=timedelta(days=1), now=NOW)
    other = X509Issuer(
        authority_id="x509-2", trust_domain=TRUST_DOMAIN, key=signing_key(nth=5), chain=[root]
    )
    with pytest.raises(ProfileViolation, match="another authority"):
        other.sign(prepare())


def test_a_self_signed_authority_hands_out_the_leaf_alone() -> None:
    root = build_root(signing_key(nth=5), trust_domain=TRUST_DOMAIN, ttl=timedelta(days=1), now=NOW)
    issuer = X509Issuer(
        authority_id="self", trust_domain=TRUST_DOMAIN, key=signing_key(nth=5), chain=[root]
    )
    credential = issuer.sign(prepare(issuer))
    assert len(credential.chain) == 1
    leaf_of(credential).verify_directly_issued_by(root)


def test_an_issuer_needs_its_own_ca_certificate() -> None:
    below = hierarchy()
    key = below.issuer.key
    leaf = forge(
        subject="leaf",
        key=signing_key(nth=5),
        issuer=below.intermediate,
        issuer_key=signing_key(nth=92),
        extensions=leaf_extensions(),
    )
    bare = forge(
        subject="bare",
        key=signing_key(nth=5),
        issuer=None,
        issuer_key=signing_key(nth=5),
        extensions=without(ca_extensions(), x509.KeyUsage),
    )
    for chain, its_key, why in (
        ([], key, "needs its own"),
        ([below.root], key, "does not belong"),
        ([leaf], signing_key(nth=5), "may not sign"),
        ([bare], signing_key(nth=5), "lacks"),
    ):
        with pytest.raises(UpstreamRejected, match=why):
            X509Issuer(authority_id="x", trust_domain=TRUST_DOMAIN, key=its_key, chain=chain)


def test_the_year_2050_changes_the_form_of_times() -> None:
    now = datetime(2049, 12, 31, 23, 59, 50, tzinfo=UTC)
    root = build_root(
        signing_key(nth=6), trust_domain=TRUST_DOMAIN, ttl=timedelta(days=30), now=now
    )
    issuer = X509Issuer(
        authority_id="x", trust_domain=TRUST_DOMAIN, key=signing_key(nth=6), chain=[root]
    )
    leaf = leaf_of(issuer.sign(prepare(issuer, now=now)))
    assert leaf.not_valid_after_utc == now + HOUR
    assert b"20500101005950Z" in leaf.tbs_certificate_bytes
    assert b"491231235940Z" in leaf.tbs_certificate_bytes


def test_an_issuer_with_exactly_the_least_time_left_prepares() -> None:
    issuer = hierarchy().issuer
    prepared = prepare(now=issuer.not_after - MIN_ISSUER_REMAINING)
    assert prepared.not_after == issuer.not_after
    with pytest.raises(ProfileViolation, match="about to expire"):
        prepare(now=issuer.not_after - MIN_ISSUER_REMAINING + timedelta(microseconds=1))


def test_an_issuer_prepares_from_its_first_moment() -> None:
    issuer = hierarchy().issuer
    assert prepare(now=issuer.not_before).not_before == issuer.not_before


def test_a_life_with_a_fraction_ends_on_a_whole_second() -> None:
    assert NOW.microsecond == 400_000
    prepared = prepare(ttl=timedelta(seconds=1, milliseconds=700))
    assert prepared.not_after == NOW.replace(microsecond=0) + 2 * SECOND
    credential = hierarchy().issuer.sign(prepared)
    assert leaf_of(credential).not_valid_after_utc == credential.not_after


def test_what_was_encoded_wrong_is_not_prepared() -> None:
    """The linter stands between the template and the key, so an issuer's mistake stays unsigned."""
    below = hierarchy()
    issuer = X509Issuer(
        authority_id="x509-1",
        trust_domain=TRUST_DOMAIN,
        key=below.issuer.key,
        chain=[below.intermediate],
    )
    wrong = LeafTemplate(
        issuer_name=below.root.subject.public_bytes(),
        authority_key_id=bytes(20),
        signature_algorithm=bytes.fromhex("300a06082a8648ce3d040302"),
    )
    object.__setattr__(issuer, "_template", wrong)
    with pytest.raises(LintFailed, match="issuer"):
        prepare(issuer)


def test_a_key_that_answers_with_too_few_signatures_makes_no_credential() -> None:
    class Forgetful:
        def __init__(self) -> None:
            key = hierarchy().issuer.key
            self.key_id, self.remote = "transit:idb-x509@1", True
            self.algorithm, self.public_key = key.algorithm, key.public_key

        def sign_many(self, messages: list[bytes]) -> list[bytes]:
            return hierarchy().issuer.key.sign_many(messages[1:])

    issuer = X509Issuer(
        authority_id="x509-1",
        trust_domain=TRUST_DOMAIN,
        key=Forgetful(),  # type: ignore[arg-type]  # only ever signs many
        chain=[hierarchy().intermediate],
    )
    with pytest.raises(ValueError, match="zip"):
        issuer.sign_many([prepare(issuer), prepare(issuer)])
