"""Certificates of CAs: roots, intermediates, and the requests for intermediates.

- The same order as for leaves: encode, lint, sign. The key may be remote.
- Every CA made here names its trust domain as SPIFFE ID (X-5), may sign certificates and CRLs,
  and is limited to its trust domain by critical name constraints.
- A request says all of that itself, because some upstreams copy what the request holds and add
  nothing of their own; `sign_intermediate` takes the key alone from it and writes the rest.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.x509.oid import NameOID

from identity_ca.csr import parse_csr
from identity_ca.errors import ProfileViolation, UpstreamRejected
from identity_ca.keys import PublicKey, SigningKey, key_fingerprint, signature_hash, spki_der
from identity_ca.lint import BACKDATE, Expectations, IssuerFacts, lint_tbs
from identity_ca.profile import INTERMEDIATE, ROOT, X509Profile
from identity_ca.serial import new_serial
from identity_ca.spiffe_id import TrustDomain
from identity_ca.template import (
    assemble,
    encode_authority_tbs,
    signature_algorithm_der,
    subject_key_id,
)

__all__ = ["build_intermediate_csr", "build_root", "issuer_facts", "sign_intermediate"]

_UB_ORGANIZATION_NAME: Final = 64
"""Longest organization name, in characters (RFC 5280 appendix A.1)."""


def build_root(
    key: SigningKey,
    *,
    trust_domain: TrustDomain,
    ttl: timedelta,
    now: datetime,
    path_length: int | None = 0,
) -> x509.Certificate:
    """A self-signed CA certificate for `key`.

    Args:
        ttl: at most `profile.ROOT.max_ttl`.
        path_length: how many CAs may stand between it and a leaf; 0 for a root that signs leaves
            itself, None for no limit.

    Raises:
        ProfileViolation: the lifetime is outside the profile.
        BackendUnavailable, BackendMisconfigured, KeyNotFound: from a remote key.
    """
    ROOT.check_ttl(ttl)
    spki = spki_der(key.public_key)
    subject = _subject("broker-root", key.public_key, trust_domain)
    not_before = now.replace(microsecond=0) - BACKDATE
    not_after = (now + ttl).replace(microsecond=0)
    facts = IssuerFacts(
        name=subject,
        key_id=subject_key_id(spki),
        signature_algorithm=signature_algorithm_der(key.algorithm),
        not_before=not_before,
        not_after=not_after,
    )
    expected = Expectations(
        issuer=facts,
        spiffe_id=trust_domain.id,
        spki=spki,
        not_before=not_before,
        not_after=not_after,
        subject=subject,
        path_length=path_length,
    )
    return _sign(ROOT, expected, key, now)


def build_intermediate_csr(
    key: SigningKey, *, trust_domain: TrustDomain
) -> x509.CertificateSigningRequest:
    """A request for a CA certificate of the trust domain, signed by `key`.

    It asks for critical name constraints, key usage, basic constraints with path length 0, and
    the trust domain's SPIFFE ID. Its common name begins with `broker-ca-`.

    Raises:
        BackendUnavailable, BackendMisconfigured, KeyNotFound: from a remote key.
    """
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(_name("broker-ca", key.public_key, trust_domain))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_CERT_AND_CRL_SIGN, critical=True)
        .add_extension(
            x509.NameConstraints(
                permitted_subtrees=[x509.UniformResourceIdentifier(trust_domain.name)],
                excluded_subtrees=None,
            ),
            critical=True,
        )
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(trust_domain.id))]),
            critical=False,
        )
        .sign(key.as_private_key(), signature_hash(key.algorithm))
    )


def sign_intermediate(
    *,
    issuer_key: SigningKey,
    issuer_certificate: x509.Certificate,
    csr: bytes,
    trust_domain: TrustDomain,
    ttl: timedelta,
    now: datetime,
) -> x509.Certificate:
    """An intermediate CA certificate for the key in `csr`, for an upstream whose key is at hand.

    Args:
        csr: PKCS #10, DER. Only its key is used.
        ttl: at most `profile.INTERMEDIATE.max_ttl`, and not beyond the issuer's end: unlike a
            leaf's it is not cut, for rotation is planned with it.

    Raises:
        CsrRejected, KeyTooWeak: see `csr.parse_csr`.
        ProfileViolation: the lifetime is outside the profile or the issuer's own.
        UpstreamRejected: `issuer_certificate` is not a CA certificate of `issuer_key`.
    """
    INTERMEDIATE.check_ttl(ttl)
    facts = issuer_facts(issuer_certificate, issuer_key)
    request = parse_csr(csr, allowed=INTERMEDIATE.key_algorithms)
    not_after = (now + ttl).replace(microsecond=0)
    if now < facts.not_before or not_after > facts.not_after:
        raise ProfileViolation(
            "an intermediate cannot be valid when its issuer is not",
            hint=f"the issuer is valid from {facts.not_before} to {facts.not_after};"
            " ask for a shorter time to live or renew it",
        )
    constraints = issuer_certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    if constraints.value.path_length == 0:
        raise ProfileViolation(
            "the issuer's path length forbids an intermediate below it",
            hint="use a CA certificate with a path length of at least 1",
        )
    expected = Expectations(
        issuer=facts,
        spiffe_id=trust_domain.id,
        spki=request.spki_der,
        not_before=max(now.replace(microsecond=0) - BACKDATE, facts.not_before),
        not_after=not_after,
        subject=_subject("broker-ca", request.public_key, trust_domain),
        path_length=0,
    )
    return _sign(INTERMEDIATE, expected, issuer_key, now)


def issuer_facts(own: x509.Certificate, key: SigningKey) -> IssuerFacts:
    """What certificates signed by `key` under `own` must agree with.

    Raises:
        UpstreamRejected: `own` is not a CA certificate, or not of `key`.
    """
    spki = spki_der(key.public_key)
    if spki_der(own.public_key()) != spki:
        raise UpstreamRejected("the CA certificate does not belong to the signing key")
    try:
        constraints = own.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = own.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound as exc:
        raise UpstreamRejected(
            "the CA certificate lacks basic constraints or key usage", detail=str(exc)
        ) from exc
    if not constraints.ca or not usage.key_cert_sign:
        raise UpstreamRejected("the certificate may not sign certificates (X-7, X-9)")
    try:
        key_id = own.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    except x509.ExtensionNotFound:
        key_id = subject_key_id(spki)
    return IssuerFacts(
        name=own.subject.public_bytes(),
        key_id=key_id,
        signature_algorithm=signature_algorithm_der(key.algorithm),
        not_before=own.not_valid_before_utc,
        not_after=own.not_valid_after_utc,
    )


def _name(kind: str, public_key: PublicKey, trust_domain: TrustDomain) -> x509.Name:
    """A name no other key has, so that chains are found by name alone."""
    return x509.Name(
        [
            x509.NameAttribute(
                NameOID.ORGANIZATION_NAME, trust_domain.name[:_UB_ORGANIZATION_NAME]
            ),
            x509.NameAttribute(NameOID.COMMON_NAME, f"{kind}-{key_fingerprint(public_key)[:32]}"),
        ]
    )


def _subject(kind: str, public_key: PublicKey, trust_domain: TrustDomain) -> bytes:
    return _name(kind, public_key, trust_domain).public_bytes()


_CERT_AND_CRL_SIGN: Final = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)


def _sign(
    profile: X509Profile, expected: Expectations, key: SigningKey, now: datetime
) -> x509.Certificate:
    issuer = expected.issuer
    tbs = encode_authority_tbs(
        serial=new_serial(now),
        signature_algorithm=issuer.signature_algorithm,
        issuer_name=issuer.name,
        authority_key_id=issuer.key_id,
        subject=expected.subject,
        not_before=expected.not_before,
        not_after=expected.not_after,
        spki=expected.spki,
        trust_domain=expected.spiffe_id.trust_domain,
        path_length=expected.path_length,
    )
    lint_tbs(tbs, profile, expected)
    return x509.load_der_x509_certificate(assemble(tbs, issuer.signature_algorithm, key.sign(tbs)))
