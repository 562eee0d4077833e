"""Certificates of CAs, requests for them, and the check of what an upstream returned."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from identity_ca.authority_certificate import (
    build_intermediate_csr,
    build_root,
)
from identity_ca.errors import KeyTooWeak, ProfileViolation, UpstreamRejected
from identity_ca.keys import KeyAlgorithm, LocalSigningKey, key_fingerprint
from identity_ca.profile import INTERMEDIATE, ROOT
from identity_ca.spiffe_id import TrustDomain
from identity_ca.upstream import SignedAuthority, verify_upstream
from support.ca import (
    SIGNING_ALGORITHMS,
    Extensions,
    ca_extensions,
    forge,
    intermediate_of,
    key_usage,
    replaced,
    uri_san,
    without,
)
from support.ca_material import DAY, NOW, TRUST_DOMAIN, signing_key

ROOT_KEY, KEY, OTHER = (signing_key(nth=nth) for nth in (91, 92, 93))
TTL = 30 * DAY
ROOT_CERTIFICATE = build_root(
    ROOT_KEY, trust_domain=TRUST_DOMAIN, ttl=365 * DAY, now=NOW, path_length=1
)


def signed(
    key: LocalSigningKey = KEY,
    *,
    issuer_key: LocalSigningKey = ROOT_KEY,
    issuer: x509.Certificate = ROOT_CERTIFICATE,
    ttl: timedelta = TTL,
    now: datetime = NOW,
) -> x509.Certificate:
    return intermediate_of(key, issuer_key=issuer_key, issuer=issuer, ttl=ttl, now=now)


@pytest.mark.parametrize("algorithm", SIGNING_ALGORITHMS)
def test_a_root(algorithm: KeyAlgorithm) -> None:
    if algorithm is KeyAlgorithm.ED25519:
        with pytest.raises(Exception, match="profile allows"):
            build_root(signing_key(algorithm), trust_domain=TRUST_DOMAIN, ttl=DAY, now=NOW)
        return
    key = signing_key(algorithm)
    root = build_root(key, trust_domain=TRUST_DOMAIN, ttl=DAY, now=NOW)
    root.verify_directly_issued_by(root)
    assert root.not_valid_before_utc == NOW.replace(microsecond=0) - timedelta(seconds=10)
    assert root.not_valid_after_utc == NOW.replace(microsecond=0) + DAY
    assert root.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0
    limits = root.extensions.get_extension_for_class(x509.NameConstraints)
    assert limits.critical
    assert limits.value.permitted_subtrees == [x509.UniformResourceIdentifier("example.org")]


def test_the_request_asks_for_everything_itself() -> None:
    csr = build_intermediate_csr(KEY, trust_domain=TRUST_DOMAIN)
    assert csr.is_signature_valid
    expected: Extensions = (
        (x509.BasicConstraints(ca=True, path_length=0), True),
        (key_usage(sign=True), True),
        (
            x509.NameConstraints([x509.UniformResourceIdentifier("example.org")], None),
            True,
        ),
        (uri_san("spiffe://example.org"), False),
    )
    assert {(each.value, each.critical) for each in csr.extensions} == set(expected)
    (name,) = csr.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    assert name.value == f"broker-ca-{key_fingerprint(KEY.public_key)[:32]}"


def test_an_intermediate_is_what_was_asked() -> None:
    certificate = signed()
    certificate.verify_directly_issued_by(ROOT_CERTIFICATE)
    verify_upstream(
        SignedAuthority((certificate,), (ROOT_CERTIFICATE,)),
        key=KEY,
        trust_domain=TRUST_DOMAIN,
        ttl=TTL,
        now=NOW,
    )


def test_two_keys_have_two_names() -> None:
    assert signed(KEY).subject != signed(OTHER).subject


def test_a_long_trust_domain_fits_into_the_name() -> None:
    root = build_root(KEY, trust_domain=TrustDomain("a" * 255), ttl=DAY, now=NOW)
    (name,) = root.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    assert name.value == "a" * 64


def test_refusals_of_sign_intermediate() -> None:
    short = build_root(ROOT_KEY, trust_domain=TRUST_DOMAIN, ttl=DAY, now=NOW, path_length=1)
    closed = build_root(ROOT_KEY, trust_domain=TRUST_DOMAIN, ttl=365 * DAY, now=NOW)
    with pytest.raises(ProfileViolation, match="when its issuer is not"):
        signed(issuer=short, ttl=2 * DAY)
    with pytest.raises(ProfileViolation, match="when its issuer is not"):
        signed(now=NOW - DAY)
    with pytest.raises(ProfileViolation, match="path length"):
        signed(issuer=closed)
    with pytest.raises(ProfileViolation, match="at most"):
        signed(ttl=INTERMEDIATE.max_ttl + DAY)
    with pytest.raises(ProfileViolation, match="at most"):
        build_root(KEY, trust_domain=TRUST_DOMAIN, ttl=ROOT.max_ttl + DAY, now=NOW)
    with pytest.raises(UpstreamRejected, match="does not belong"):
        signed(issuer_key=OTHER)
    with pytest.raises(KeyTooWeak):
        signed(signing_key(KeyAlgorithm.ED25519))


# --- what upstreams get wrong -------------------------------------------------------------------


def returned(
    change: Callable[[Extensions], Extensions] = lambda extensions: extensions,
    *,
    key: LocalSigningKey = KEY,
    issuer: x509.Certificate = ROOT_CERTIFICATE,
    issuer_key: LocalSigningKey = ROOT_KEY,
    ttl: timedelta = TTL,
    not_before: datetime = NOW - timedelta(seconds=30),
) -> x509.Certificate:
    """An intermediate by another CA implementation, wrong where the test says."""
    return forge(
        subject="broker-ca",
        key=key,
        issuer=issuer,
        issuer_key=issuer_key,
        extensions=change(ca_extensions()),
        not_before=not_before,
        not_after=NOW.replace(microsecond=0) + ttl,
    )


def check(
    *chain: x509.Certificate,
    roots: tuple[x509.Certificate, ...] = (ROOT_CERTIFICATE,),
    ttl: timedelta = TTL,
) -> None:
    verify_upstream(
        SignedAuthority(chain, roots), key=KEY, trust_domain=TRUST_DOMAIN, ttl=ttl, now=NOW
    )


def test_an_answer_without_our_san_is_good_enough() -> None:
    check(returned())
    check(returned(lambda e: without(e, x509.SubjectAlternativeName)))


BOTH = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]


def limits(*bases: x509.GeneralName) -> x509.NameConstraints:
    return x509.NameConstraints(list(bases), None)


URI = x509.UniformResourceIdentifier


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda e: replaced(e, x509.BasicConstraints(False, None), True), "X-7"),
        (lambda e: replaced(e, x509.BasicConstraints(True, 0), False), "X-7"),
        (lambda e: without(e, x509.BasicConstraints), "X-7"),
        (lambda e: replaced(e, x509.BasicConstraints(True, None), True), "path length"),
        (lambda e: replaced(e, x509.BasicConstraints(True, 1), True), "path length"),
        (lambda e: without(e, x509.KeyUsage), "X-8"),
        (lambda e: replaced(e, key_usage(sign=True), False), "X-8"),
        (lambda e: replaced(e, key_usage(digital_signature=True), True), "X-9"),
        (lambda e: without(e, x509.NameConstraints), "name constraints"),
        (lambda e: replaced(e, limits(URI("example.org")), False), "name constraints"),
        (lambda e: replaced(e, limits(URI("example.com")), True), "name constraints"),
        (
            lambda e: replaced(e, limits(URI("example.org"), URI("example.com")), True),
            "name constraints",
        ),
        (
            lambda e: replaced(
                e, x509.NameConstraints([URI("example.org")], [URI("example.org")]), True
            ),
            "name constraints",
        ),
        (lambda e: replaced(e, uri_san("spiffe://example.org/ca"), False), "X-5"),
        (lambda e: replaced(e, uri_san("spiffe://example.com"), False), "X-5"),
        (lambda e: (*e, (x509.ExtendedKeyUsage(BOTH[:1]), False)), "X-10"),
    ],
)
def test_wrong_extensions_are_rejected(
    change: Callable[[Extensions], Extensions], why: str
) -> None:
    with pytest.raises(UpstreamRejected, match=why) as caught:
        check(returned(change))
    assert caught.value.reason == "UPSTREAM_REJECTED"


def test_extended_key_usage_for_both_is_fine() -> None:
    check(returned(lambda e: (*e, (x509.ExtendedKeyUsage(BOTH), False))))


def test_another_key_is_rejected() -> None:
    with pytest.raises(UpstreamRejected, match="another key"):
        check(returned(key=OTHER))


@pytest.mark.parametrize(
    ("ttl", "why"),
    [
        (TTL + timedelta(seconds=59), ""),
        (TTL - timedelta(seconds=59), ""),
        (TTL + timedelta(seconds=62), "longer"),
        (TTL - timedelta(seconds=62), "shorter"),
        (timedelta(days=1), "shorter"),  # what a mount's max_lease_ttl does silently
    ],
)
def test_lifetimes(ttl: timedelta, why: str) -> None:
    if not why:
        check(returned(ttl=ttl))
        return
    with pytest.raises(UpstreamRejected, match=why):
        check(returned(ttl=ttl))


def test_a_certificate_from_the_future_is_rejected() -> None:
    with pytest.raises(UpstreamRejected, match="not valid yet"):
        check(returned(not_before=NOW + timedelta(seconds=5)))


def test_an_intermediate_that_outlives_its_root_is_rejected() -> None:
    short = build_root(ROOT_KEY, trust_domain=TRUST_DOMAIN, ttl=DAY, now=NOW, path_length=1)
    with pytest.raises(UpstreamRejected, match="outlives"):
        check(returned(issuer=short), roots=(short,))


def test_the_path_must_lead_to_a_root() -> None:
    other = build_root(OTHER, trust_domain=TRUST_DOMAIN, ttl=365 * DAY, now=NOW, path_length=1)
    with pytest.raises(UpstreamRejected, match="no path"):
        check(returned(), roots=(other,))
    with pytest.raises(UpstreamRejected, match="no path"):
        check(returned(issuer_key=OTHER))
    with pytest.raises(UpstreamRejected, match="not self-signed"):
        check(returned(), roots=(returned(),))
    with pytest.raises(UpstreamRejected, match="missing"):
        check()
    with pytest.raises(UpstreamRejected, match="missing"):
        check(returned(), roots=())


def test_a_chain_of_three_and_its_path_lengths() -> None:
    middle_key = signing_key(nth=94)
    for root_length, middle_length, why in ((2, 1, ""), (1, 1, "path length"), (2, 0, "length")):
        root = build_root(
            ROOT_KEY,
            trust_domain=TRUST_DOMAIN,
            ttl=365 * DAY,
            now=NOW,
            path_length=root_length,
        )
        middle = forge(
            subject="middle",
            key=middle_key,
            issuer=root,
            issuer_key=ROOT_KEY,
            extensions=ca_extensions(path_length=middle_length),
            not_after=NOW + 300 * DAY,
        )
        own = returned(issuer=middle, issuer_key=middle_key)
        if why:
            with pytest.raises(UpstreamRejected, match=why):
                check(own, middle, roots=(root,))
        else:
            check(own, middle, roots=(root,))


def test_a_self_signed_authority_is_its_own_root() -> None:
    own = build_root(KEY, trust_domain=TRUST_DOMAIN, ttl=TTL, now=NOW)
    check(own, roots=(own,))
    with pytest.raises(UpstreamRejected, match="no path"):
        check(own)
