"""Keys, authorities and CA files for the tests of the CA library's trust side."""

from __future__ import annotations

import json
from base64 import urlsafe_b64encode
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509.oid import NameOID

from identity_ca.authority import Authority, AuthorityKind, AuthorityState
from identity_ca.authority_certificate import build_root
from identity_ca.bundle import JwtKey, TrustBundle
from identity_ca.jwt import JwtIssuer
from identity_ca.keys import (
    KeyAlgorithm,
    LocalSigningKey,
    generate_private_key,
    signature_hash,
    spki_der,
)
from identity_ca.spiffe_id import SpiffeId, TrustDomain

TRUST_DOMAIN = TrustDomain("example.org")
WORKLOAD_ID = SpiffeId.parse("spiffe://example.org/payments/api")
NOW = datetime(2026, 3, 1, 12, 0, 0, 400_000, tzinfo=UTC)
DAY = timedelta(days=1)


def signing_key(algorithm: KeyAlgorithm = KeyAlgorithm.EC_P256, nth: int = 0) -> LocalSigningKey:
    """The same key for the same arguments: making RSA keys is slow."""
    return _signing_key(algorithm, nth)


@cache
def _signing_key(algorithm: KeyAlgorithm, nth: int) -> LocalSigningKey:
    return LocalSigningKey(f"memory:{algorithm.value}-{nth}@1", generate_private_key(algorithm))


def jwt_issuer(
    key: LocalSigningKey | None = None,
    *,
    key_id: str = "key-1",
    not_after: datetime = NOW + DAY,
) -> JwtIssuer:
    return JwtIssuer(
        authority_id=key_id,
        trust_domain=TRUST_DOMAIN,
        key=key or signing_key(),
        not_after=not_after,
    )


def jwt_bundle(*keys: tuple[str, LocalSigningKey]) -> TrustBundle:
    """A bundle of JWT keys; of the default issuer's when called without."""
    return TrustBundle(
        TRUST_DOMAIN,
        jwt_keys=tuple(
            JwtKey(key_id, spki_der(key.public_key))
            for key_id, key in (keys or (("key-1", signing_key()),))
        ),
    )


def root_certificate(
    algorithm: KeyAlgorithm = KeyAlgorithm.EC_P256,
    nth: int = 0,
    path_length: int | None = 1,
) -> x509.Certificate:
    """The same root for the same arguments, of `signing_key(algorithm, nth)`."""
    return _root_certificate(algorithm, nth, path_length)


@cache
def _root_certificate(
    algorithm: KeyAlgorithm, nth: int, path_length: int | None
) -> x509.Certificate:
    return build_root(
        signing_key(algorithm, nth),
        trust_domain=TRUST_DOMAIN,
        ttl=timedelta(days=365),
        now=NOW,
        path_length=path_length,
    )


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(c.public_bytes(serialization.Encoding.PEM) for c in certificates)


def key_pem(key: LocalSigningKey) -> bytes:
    private_key = key.as_private_key()
    return private_key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def write_private(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    path.chmod(0o600)
    return path


def authority(
    authority_id: str,
    kind: AuthorityKind = AuthorityKind.JWT,
    *,
    state: AuthorityState = AuthorityState.PREPARED,
    created_at: datetime = NOW,
    lifetime: timedelta = DAY,
    roots: tuple[bytes, ...] = (),
    key: LocalSigningKey | None = None,
) -> Authority:
    key = key or signing_key()
    return Authority(
        id=authority_id,
        kind=kind,
        state=state,
        key_id=key.key_id,
        algorithm=key.algorithm,
        public_key_der=spki_der(key.public_key),
        chain=roots[:1],
        roots=roots,
        upstream="none" if kind is AuthorityKind.JWT else "selfsigned",
        created_at=created_at,
        not_before=created_at,
        not_after=created_at + lifetime,
    )


# --- tokens nobody should make ----------------------------------------------------------------

_HASHES = {"256": hashes.SHA256(), "384": hashes.SHA384(), "512": hashes.SHA512()}


def b64url(raw: bytes) -> str:
    return urlsafe_b64encode(raw).rstrip(b"=").decode()


def jws_sign(algorithm: str, private_key: Any, message: bytes) -> bytes:
    """A JWS signature, written here once more so that the tests do not check code with itself."""
    hash_ = _HASHES[algorithm[2:]]
    if algorithm.startswith("RS"):
        return bytes(private_key.sign(message, padding.PKCS1v15(), hash_))
    if algorithm.startswith("PS"):
        scheme = padding.PSS(padding.MGF1(hash_), hash_.digest_size)
        return bytes(private_key.sign(message, scheme, hash_))
    octets = (private_key.curve.key_size + 7) // 8
    r, s = decode_dss_signature(private_key.sign(message, ec.ECDSA(hash_)))
    return r.to_bytes(octets, "big") + s.to_bytes(octets, "big")


def claims(**changes: Any) -> dict[str, Any]:
    """Good claims at `NOW`, changed; None takes one away."""
    good = {
        "sub": str(WORKLOAD_ID),
        "aud": ["reports"],
        "exp": int(NOW.timestamp()) + 300,
        "iat": int(NOW.timestamp()),
    }
    return {k: v for k, v in (good | changes).items() if v is not None}


def forge(
    header: dict[str, Any] | bytes,
    payload: dict[str, Any] | bytes,
    private_key: Any = None,
    algorithm: str = "ES256",
) -> str:
    """A compact JWS of any header and payload, signed properly with any key."""
    private_key = private_key or signing_key().as_private_key()
    parts = [
        b64url(part if isinstance(part, bytes) else json.dumps(part).encode())
        for part in (header, payload)
    ]
    signing_input = ".".join(parts)
    return f"{signing_input}.{b64url(jws_sign(algorithm, private_key, signing_input.encode()))}"


# --- CAs of an organization that knows nothing of SPIFFE ----------------------------------------


def foreign_ca(
    name: str,
    key: LocalSigningKey,
    *,
    below: tuple[x509.Certificate, LocalSigningKey] | None = None,
    ca: bool = True,
    path_length: int | None = None,
    key_cert_sign: bool = True,
    not_before: datetime = NOW - DAY,
    not_after: datetime = NOW + 365 * DAY,
) -> x509.Certificate:
    """A CA certificate as any PKI makes it; self-signed, or `below` another one."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer, issuer_key = (below[0].subject, below[1]) if below else (subject, key)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(x509.BasicConstraints(ca, path_length if ca else None), critical=True)
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(key.public_key),
            critical=False,
        )
        .add_extension(
            x509.KeyUsage(
                digital_signature=not key_cert_sign,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=key_cert_sign,
                crl_sign=key_cert_sign,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
    )
    if below:
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key),
            critical=False,
        )
    return builder.sign(issuer_key.as_private_key(), signature_hash(issuer_key.algorithm))
