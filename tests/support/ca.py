"""Requests, hierarchies and deliberately wrong certificates for the tests of the CA library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from identity_ca.authority_certificate import (
    build_intermediate_csr,
    build_root,
    sign_intermediate,
)
from identity_ca.bundle import TrustBundle
from identity_ca.issuer import X509Credential, X509Issuer
from identity_ca.keys import KeyAlgorithm, LocalSigningKey, signature_hash
from identity_ca.profile import WORKLOAD, X509Profile
from identity_ca.spiffe_id import SpiffeId, TrustDomain
from support.ca_material import NOW, TRUST_DOMAIN, WORKLOAD_ID, signing_key

HOUR = timedelta(hours=1)
WORKLOAD_KEY = 90  # nth keys of signing_key, apart from the ones that are CAs
ROOT_KEY = 91
CA_KEY = 92

SIGNING_ALGORITHMS = (
    KeyAlgorithm.EC_P256,
    KeyAlgorithm.EC_P384,
    KeyAlgorithm.RSA_2048,
    KeyAlgorithm.ED25519,
)


@cache
def workload_key(algorithm: KeyAlgorithm = KeyAlgorithm.EC_P256) -> LocalSigningKey:
    return signing_key(algorithm, WORKLOAD_KEY)


@cache
def csr_der(
    algorithm: KeyAlgorithm = KeyAlgorithm.EC_P256,
    subject: str = "",
    sans: tuple[str, ...] = (),
) -> bytes:
    """A good request by the workload's key."""
    key = workload_key(algorithm)
    return request_by(key.as_private_key(), signature_hash(algorithm), subject, sans)


def request_by(
    private_key: Any, digest: Any = None, subject: str = "", sans: Sequence[str] = ()
) -> bytes:
    names = [x509.NameAttribute(NameOID.COMMON_NAME, subject)] if subject else []
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(names))
    if sans:
        builder = builder.add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in sans]),
            critical=False,
        )
    return builder.sign(private_key, digest).public_bytes(Encoding.DER)


@cache
def weak_requests() -> dict[str, bytes]:
    """Well-signed requests for keys nobody should certify."""
    sha256 = hashes.SHA256()
    return {
        "rsa-1024": request_by(rsa.generate_private_key(65537, 1024), sha256),
        "rsa-2056": request_by(rsa.generate_private_key(65537, 2056), sha256),
        "rsa-2048-e3": request_by(rsa.generate_private_key(3, 2048), sha256),
        "p-521": request_by(ec.generate_private_key(ec.SECP521R1()), sha256),
        "secp256k1": request_by(ec.generate_private_key(ec.SECP256K1()), sha256),
        "p-224": request_by(ec.generate_private_key(ec.SECP224R1()), sha256),
        "dsa-2048": request_by(dsa.generate_private_key(2048), sha256),
        "ed448": request_by(ed448.Ed448PrivateKey.generate()),
    }


def intermediate_of(
    key: LocalSigningKey,
    *,
    issuer_key: LocalSigningKey,
    issuer: x509.Certificate,
    trust_domain: TrustDomain = TRUST_DOMAIN,
    ttl: timedelta = timedelta(days=30),
    now: datetime = NOW,
) -> x509.Certificate:
    """An intermediate for `key`, made the way the disk upstream makes it."""
    request = build_intermediate_csr(key, trust_domain=trust_domain)
    return sign_intermediate(
        issuer_key=issuer_key,
        issuer_certificate=issuer,
        csr=request.public_bytes(Encoding.DER),
        trust_domain=trust_domain,
        ttl=ttl,
        now=now,
    )


@dataclass(frozen=True)
class Hierarchy:
    """A root, an intermediate below it, and the issuer that signs with the intermediate."""

    root: x509.Certificate
    intermediate: x509.Certificate
    issuer: X509Issuer
    bundle: TrustBundle

    def issue(
        self,
        spiffe_id: SpiffeId = WORKLOAD_ID,
        *,
        algorithm: KeyAlgorithm = KeyAlgorithm.EC_P256,
        profile: X509Profile = WORKLOAD,
        ttl: timedelta = HOUR,
        now: datetime = NOW,
        dns_names: Sequence[str] = (),
    ) -> X509Credential:
        prepared = self.issuer.prepare(
            csr=csr_der(algorithm),
            spiffe_id=spiffe_id,
            profile=profile,
            ttl=ttl,
            now=now,
            dns_names=dns_names,
        )
        return self.issuer.sign(prepared)


@cache
def hierarchy(
    trust_domain: TrustDomain = TRUST_DOMAIN,
    algorithm: KeyAlgorithm = KeyAlgorithm.EC_P256,
    now: datetime = NOW,
) -> Hierarchy:
    root_key, ca_key = signing_key(algorithm, ROOT_KEY), signing_key(algorithm, CA_KEY)
    root = build_root(
        root_key, trust_domain=trust_domain, ttl=timedelta(days=365), now=now, path_length=1
    )
    below = intermediate_of(
        ca_key, issuer_key=root_key, issuer=root, trust_domain=trust_domain, now=now
    )
    issuer = X509Issuer(authority_id="x509-1", trust_domain=trust_domain, key=ca_key, chain=[below])
    bundle = TrustBundle(trust_domain, x509_authorities=(root.public_bytes(Encoding.DER),))
    return Hierarchy(root, below, issuer, bundle)


Extensions = tuple[tuple[x509.ExtensionType, bool], ...]


def key_usage(*, digital_signature: bool = False, sign: bool = False) -> x509.KeyUsage:
    """digitalSignature; keyCertSign with cRLSign."""
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign,
        crl_sign=sign,
        encipher_only=False,
        decipher_only=False,
    )


def uri_san(*uris: str) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris])


def leaf_extensions(*uris: str) -> Extensions:
    return (
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (key_usage(digital_signature=True), True),
        (
            x509.ExtendedKeyUsage(
                [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            ),
            False,
        ),
        (uri_san(*(uris or (str(WORKLOAD_ID),))), True),
    )


def ca_extensions(
    *, path_length: int | None = 0, trust_domain: TrustDomain | None = TRUST_DOMAIN
) -> Extensions:
    always: Extensions = (
        (x509.BasicConstraints(ca=True, path_length=path_length), True),
        (key_usage(sign=True), True),
    )
    if trust_domain is None:
        return always
    limit = x509.NameConstraints([x509.UniformResourceIdentifier(trust_domain.name)], None)
    return (*always, (uri_san(str(trust_domain.id)), False), (limit, True))


def replaced(extensions: Extensions, value: x509.ExtensionType, critical: bool) -> Extensions:
    """The same extensions with one of them, by its kind, replaced or added."""
    kept = tuple(each for each in extensions if type(each[0]) is not type(value))
    return (*kept, (value, critical))


def without(extensions: Extensions, kind: type[x509.ExtensionType]) -> Extensions:
    return tuple(each for each in extensions if type(each[0]) is not kind)


def forge(
    *,
    subject: str,
    key: LocalSigningKey,
    issuer: x509.Certificate | None,
    issuer_key: LocalSigningKey,
    extensions: Extensions,
    now: datetime = NOW,
    not_before: datetime | None = None,
    not_after: datetime | None = None,
) -> x509.Certificate:
    """Any certificate at all, through the builder; self-signed without an issuer."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)] if subject else [])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name if issuer is None else issuer.subject)
        .public_key(key.public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before or now - timedelta(minutes=1))
        .not_valid_after(not_after or now + timedelta(days=1))
    )
    for value, critical in extensions:
        builder = builder.add_extension(value, critical)
    return builder.sign(issuer_key.as_private_key(), signature_hash(issuer_key.algorithm))
