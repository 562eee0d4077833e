"""An upstream CA whose certificate and key are PEM files, such as an organization's own sub-CA.

- The files are read again whenever one of them changed, so renewing them needs no restart.
- They are believed only together: the key belongs to the certificate, the chain ends at a root,
  every certificate in it is valid now, and the CA may have one more CA below it.
- The lifetime asked for is given or refused, never cut.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from identity_ca.authority_certificate import build_intermediate_csr, sign_intermediate
from identity_ca.backends.private_file import read_private_file, storage_failed
from identity_ca.crl import sign_crl
from identity_ca.errors import BackendMisconfigured, KeyTooWeak
from identity_ca.keys import LocalSigningKey, SigningKey, spki_der
from identity_ca.spiffe_id import TrustDomain
from identity_ca.upstream import SignedAuthority, verify_upstream

__all__ = ["DiskUpstream"]

_MAX_CERTIFICATES_BYTES: Final = 1024 * 1024

_Stamp = tuple[int, int, int, int, int]


@dataclass(frozen=True, slots=True)
class _Authority:
    """What the files hold.

    `chain` begins with the CA's own certificate and leaves the root out; `anchors` are those of
    the roots at which it ends.
    """

    key: LocalSigningKey
    certificate: x509.Certificate
    chain: tuple[x509.Certificate, ...]
    roots: tuple[x509.Certificate, ...]
    anchors: tuple[x509.Certificate, ...]


class DiskUpstream:
    """An `UpstreamAuthority` that signs with a CA key from a file. Safe to share among threads.

    Args:
        cert_file: PEM, the CA's certificate first, then the intermediates above it, if any.
        key_file: PEM, not encrypted, private to this user.
        bundle_file: PEM, the roots; may be left out when `cert_file` ends with its root.
    """

    name: Final = "disk"

    def __init__(
        self,
        cert_file: str | os.PathLike[str],
        key_file: str | os.PathLike[str],
        bundle_file: str | os.PathLike[str] | None = None,
    ) -> None:
        self._cert_file: Final = Path(cert_file)
        self._key_file: Final = Path(key_file)
        self._bundle_file: Final = Path(bundle_file) if bundle_file is not None else None
        # Swapped in one assignment: a reader has the stamps and what was read under them.
        self._loaded: tuple[tuple[_Stamp, ...], _Authority] | None = None

    def certify(
        self, key: SigningKey, *, trust_domain: TrustDomain, ttl: timedelta, now: datetime
    ) -> SignedAuthority:
        """An intermediate certificate for `key`, which may sign leaves and no CA.

        Raises:
            BackendMisconfigured: the files cannot be used, or the CA ends before `now + ttl`.
            BackendUnavailable: the disk fails.
            ProfileViolation, KeyTooWeak: lifetime or key are outside the profile `INTERMEDIATE`.
        """
        upstream = self._load()
        _check_valid(upstream, now)
        end = upstream.certificate.not_valid_after_utc
        if (now + ttl).replace(microsecond=0) > end:
            raise BackendMisconfigured(
                "the upstream CA ends before the authority it should certify",
                detail=f"{self._cert_file} ends at {end.isoformat()}",
                hint="renew the CA certificate, or configure a shorter authority lifetime",
            )
        request = build_intermediate_csr(key, trust_domain=trust_domain)
        certificate = sign_intermediate(
            issuer_key=upstream.key,
            issuer_certificate=upstream.certificate,
            csr=request.public_bytes(serialization.Encoding.DER),
            trust_domain=trust_domain,
            ttl=ttl,
            now=now,
        )
        signed = SignedAuthority(chain=(certificate, *upstream.chain), roots=upstream.roots)
        verify_upstream(signed, key=key, trust_domain=trust_domain, ttl=ttl, now=now)
        return signed

    def revocation_lists(
        self, *, number: int, this_update: datetime, next_update: datetime
    ) -> tuple[bytes, ...]:
        """One, empty, of the CA whose key is here; none when it may not sign lists.

        It speaks of what was certified here and never revoked; the organization that runs the CA
        may have a list of its own, with more in it.

        Raises:
            BackendMisconfigured, BackendUnavailable: as `certify`.
        """
        upstream = self._load()
        usage = upstream.certificate.extensions.get_extension_for_class(x509.KeyUsage).value
        if not usage.crl_sign:
            return ()
        return (
            sign_crl(
                issuer=upstream,
                encoded_entries=(),
                number=number,
                this_update=this_update,
                next_update=next_update,
            ),
        )

    def check(self) -> None:
        """Returns when the files can be used, whatever the time is; signs no certificate.

        Raises:
            BackendMisconfigured, BackendUnavailable
        """
        self._load()

    def close(self) -> None:
        """Forget the key."""
        self._loaded = None

    def _load(self) -> _Authority:
        files = [f for f in (self._cert_file, self._key_file, self._bundle_file) if f is not None]
        stamps = tuple(_stamp(file) for file in files)
        loaded = self._loaded
        if loaded is not None and loaded[0] == stamps:
            return loaded[1]
        authority = self._read()
        self._loaded = (stamps, authority)
        return authority

    def _read(self) -> _Authority:
        certificates = _read_certificates(self._cert_file)
        key = _read_key(self._key_file)
        certificate = certificates[0]
        _check_ca(certificate, self._cert_file)
        if spki_der(certificate.public_key()) != spki_der(key.public_key):
            raise BackendMisconfigured(
                "the upstream CA's key does not belong to its certificate",
                detail=f"{self._key_file}, {self._cert_file}",
                hint="configure the two files of one CA; if they are just being replaced, retry",
            )
        chain = tuple(c for c in certificates if not _is_self_signed(c))
        roots = tuple(c for c in certificates if _is_self_signed(c))
        if self._bundle_file is not None:
            roots = _read_certificates(self._bundle_file)
        anchors = _anchors(chain or (certificate,), roots, self._cert_file)
        return _Authority(key, certificate, chain, roots, anchors)


def _stamp(path: Path) -> _Stamp:
    try:
        found = path.stat()
    except OSError as exc:
        raise storage_failed(exc, path) from exc
    return (found.st_dev, found.st_ino, found.st_ctime_ns, found.st_mtime_ns, found.st_size)


def _read_certificates(path: Path) -> tuple[x509.Certificate, ...]:
    try:
        with path.open("rb") as file:
            pem = file.read(_MAX_CERTIFICATES_BYTES)
        return tuple(x509.load_pem_x509_certificates(pem))
    except OSError as exc:
        raise storage_failed(exc, path) from exc
    except (ValueError, x509.InvalidVersion) as exc:
        raise BackendMisconfigured(
            "a certificate file of the upstream CA holds no readable PEM certificate",
            detail=str(path),
        ) from exc


def _read_key(path: Path) -> LocalSigningKey:
    try:
        pem = read_private_file(path, mounted=True)
    except OSError as exc:
        raise storage_failed(exc, path) from exc
    try:
        private_key = serialization.load_pem_private_key(pem, password=None)
        if not isinstance(
            private_key,
            ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey,
        ):
            raise KeyTooWeak("not a kind of key this library signs with")
        return LocalSigningKey("disk:upstream@1", private_key)
    except (ValueError, TypeError, UnsupportedAlgorithm, KeyTooWeak) as exc:
        raise BackendMisconfigured(
            "the upstream CA's key file holds no usable private key",
            detail=str(path),
            hint="it has to be PEM and not encrypted: an EC, RSA or Ed25519 key",
        ) from exc


def _check_ca(certificate: x509.Certificate, path: Path) -> None:
    try:
        extensions = certificate.extensions
        constraints = extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = extensions.get_extension_for_class(x509.KeyUsage).value
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension) as exc:
        raise _not_a_ca(path, "basic constraints or key usage are missing") from exc
    if not constraints.ca:
        raise _not_a_ca(path, "cA is false")
    if not usage.key_cert_sign:
        raise _not_a_ca(path, "key usage has no keyCertSign")
    if constraints.path_length == 0:
        raise _not_a_ca(path, "its path length of 0 allows no CA below it")


def _not_a_ca(path: Path, why: str) -> BackendMisconfigured:
    return BackendMisconfigured(
        "the upstream certificate is not one of a CA that may certify another CA",
        detail=f"{path}: {why}",
        hint="configure a CA certificate with keyCertSign and a path length of at least 1",
    )


def _anchors(
    chain: Sequence[x509.Certificate], roots: Sequence[x509.Certificate], path: Path
) -> tuple[x509.Certificate, ...]:
    """The roots at which a chain ends, each certificate of which is issued by the next."""
    if not roots or not all(_is_self_signed(root) for root in roots):
        raise BackendMisconfigured(
            "the upstream CA's root is missing",
            detail=str(path),
            hint="append the root to the certificate file, or configure a bundle file of roots",
        )
    if not all(_issued_by(child, parent) for child, parent in pairwise(chain)):
        raise BackendMisconfigured(
            "the upstream CA's certificate file is not a chain",
            detail=str(path),
            hint="order it from the CA upwards, each certificate followed by its issuer",
        )
    top = chain[-1]
    anchors = tuple(root for root in roots if root == top or _issued_by(top, root))
    if not anchors:
        raise BackendMisconfigured(
            "the upstream CA's chain does not end at one of its roots",
            detail=str(path),
            hint="configure the bundle file that belongs to the certificate file",
        )
    return anchors


def _check_valid(upstream: _Authority, now: datetime) -> None:
    if all(_valid(c, now) for c in (upstream.certificate, *upstream.chain)) and any(
        _valid(root, now) for root in upstream.anchors
    ):
        return
    everything = (upstream.certificate, *upstream.chain, *upstream.anchors)
    raise BackendMisconfigured(
        "a certificate of the upstream CA has expired or is not valid yet",
        detail="; ".join(
            f"{c.subject.rfc4514_string()}: {c.not_valid_before_utc} to {c.not_valid_after_utc}"
            for c in everything
            if not _valid(c, now)
        ),
        hint="renew it",
    )


def _valid(certificate: x509.Certificate, now: datetime) -> bool:
    return certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc


def _is_self_signed(certificate: x509.Certificate) -> bool:
    return certificate.subject == certificate.issuer and _issued_by(certificate, certificate)


def _issued_by(child: x509.Certificate, parent: x509.Certificate) -> bool:
    try:
        child.verify_directly_issued_by(parent)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True
