"""Validates an X.509-SVID against a trust bundle (RFC 5280 section 6.1, X509-SVID.md section 5).

- Own path building, because a SPIFFE leaf has no DNS name or subject to ask a library about, and
  small: at most four certificates and one anchor, each signature checked at most once a path.
- Every certificate is checked for validity, key strength, signature algorithm and unknown critical
  extensions; CAs for their flag, key usage, path length and name constraints.
- Anchors are held to the same rules as other CAs: an expired root trusts nobody.
- Every refusal is a `ChainRejected` that begins with the same sentence; what follows the colon is
  stable too.
- Revocation is not looked at here: whoever asks knows the revoked serials.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Final, Protocol, TypeVar, cast

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.x509.oid import ExtensionOID, SignatureAlgorithmOID

from identity_ca.errors import CAError, ChainRejected, KeyTooWeak, SpiffeIdError
from identity_ca.keys import PublicKey, algorithm_of
from identity_ca.serial import serial_hex
from identity_ca.spiffe_id import SpiffeId, TrustDomain

__all__ = [
    "MAX_CHAIN_LENGTH",
    "VerifiedX509",
    "X509Authorities",
    "find_path",
    "verify_x509_svid",
]

MAX_CHAIN_LENGTH: Final = 4
"""Most certificates a peer may send: the leaf and three intermediates."""

_MAX_CERTIFICATE_BYTES: Final = 32768

_SIGNATURES: Final = frozenset(
    {
        SignatureAlgorithmOID.ECDSA_WITH_SHA256,
        SignatureAlgorithmOID.ECDSA_WITH_SHA384,
        SignatureAlgorithmOID.ECDSA_WITH_SHA512,
        SignatureAlgorithmOID.RSA_WITH_SHA256,
        SignatureAlgorithmOID.RSA_WITH_SHA384,
        SignatureAlgorithmOID.RSA_WITH_SHA512,
        SignatureAlgorithmOID.RSASSA_PSS,
        SignatureAlgorithmOID.ED25519,
    }
)
# What this module looks at, and what says nothing about whether a path is valid.
_KNOWN_EXTENSIONS: Final = frozenset(
    {
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
        ExtensionOID.NAME_CONSTRAINTS,
        ExtensionOID.CERTIFICATE_POLICIES,
    }
)
_Unreadable: Final = (
    ValueError,
    TypeError,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
    UnsupportedAlgorithm,
)


_Extension = TypeVar("_Extension", bound=x509.ExtensionType)


class X509Authorities(Protocol):
    """The part of a `TrustBundle` that X.509-SVIDs are verified with."""

    @property
    def trust_domain(self) -> TrustDomain: ...

    @property
    def x509_authorities(self) -> tuple[bytes, ...]: ...


@dataclass(frozen=True, slots=True)
class VerifiedX509:
    """A leaf that was verified, and who it stands for.

    Attributes:
        serial: lower-case hex, as the ledger keeps it.
        not_after: the end of the leaf.
    """

    spiffe_id: SpiffeId
    serial: str
    not_after: datetime
    public_key: PublicKey
    leaf: x509.Certificate


def verify_x509_svid(
    chain: Sequence[bytes], *, bundle: X509Authorities, now: datetime
) -> VerifiedX509:
    """The identity a chain proves, to whoever also proved possession of its leaf's key.

    Args:
        chain: DER, leaf first; the order of the others does not matter.
        bundle: the bundle of the trust domain the leaf must be in; other domains are refused.
        now: aware, in UTC.

    Raises:
        ChainRejected: the one kind of refusal, whatever the input.
    """
    if not chain:
        raise _rejected("no certificate was presented")
    if len(chain) > MAX_CHAIN_LENGTH:
        raise _rejected(f"it has more than {MAX_CHAIN_LENGTH} certificates")
    leaf, *intermediates = [_parse(der) for der in chain]
    anchors = [_parse(der) for der in bundle.x509_authorities]
    try:
        spiffe_id = _leaf_identity(leaf)
        if spiffe_id.trust_domain != bundle.trust_domain:
            raise _rejected("it belongs to another trust domain than the bundle")
        find_path(leaf, intermediates=intermediates, anchors=anchors, now=now)
        public_key = cast("PublicKey", leaf.public_key())  # find_path lets no other kind through
    except _Unreadable as exc:
        raise _rejected("a certificate cannot be read", detail=str(exc)) from exc
    return VerifiedX509(
        spiffe_id=spiffe_id,
        serial=serial_hex(leaf.serial_number),
        not_after=leaf.not_valid_after_utc,
        public_key=public_key,
        leaf=leaf,
    )


def find_path(
    target: x509.Certificate,
    *,
    intermediates: Sequence[x509.Certificate],
    anchors: Sequence[x509.Certificate],
    now: datetime,
) -> tuple[x509.Certificate, ...]:
    """The first valid path from `target` up to an anchor, both included (RFC 5280 section 6.1).

    Looks at the path alone: whether `target` is a leaf or a CA is the caller's question.

    Raises:
        ChainRejected: no path is valid; says what was wrong with the one that came furthest.
    """
    _check_certificate(target, now)
    furthest: tuple[int, CAError] = (0, _rejected("no authority of the bundle issued it"))
    paths: list[tuple[x509.Certificate, ...]] = [(target,)]
    while paths:
        path = paths.pop()
        for issuer, is_anchor in [
            *((each, True) for each in anchors),
            *((each, False) for each in intermediates),
        ]:
            # An intermediate already in the path, or one more than a peer may send, leads nowhere.
            if issuer.subject != path[-1].issuer or (
                not is_anchor and (issuer in path or len(path) >= MAX_CHAIN_LENGTH)
            ):
                continue
            try:
                _check_issuer(issuer, path, now)
            except ChainRejected as exc:
                furthest = max(furthest, (len(path), exc), key=lambda each: each[0])
                continue
            except _Unreadable as exc:
                # One damaged candidate must not hide a good one.
                unreadable = _rejected("a certificate cannot be read", detail=str(exc))
                furthest = max(furthest, (len(path), unreadable), key=lambda each: each[0])
                continue
            if is_anchor:
                return (*path, issuer)
            paths.append((*path, issuer))
    raise furthest[1]


def _check_issuer(
    issuer: x509.Certificate, path: tuple[x509.Certificate, ...], now: datetime
) -> None:
    """Whether `issuer` may stand above `path`, whose last certificate names it."""
    _check_certificate(issuer, now)
    constraints = _extension(issuer, x509.BasicConstraints)
    if constraints is None or not constraints.ca:
        raise _rejected("an issuer is not a CA")
    usage = _extension(issuer, x509.KeyUsage)
    if usage is None or not usage.key_cert_sign:
        raise _rejected("an issuer may not sign certificates")
    below = sum(1 for each in path[1:] if each.subject != each.issuer)
    if constraints.path_length is not None and below > constraints.path_length:
        raise _rejected("an issuer's path length is exceeded")
    names = _extension(issuer, x509.NameConstraints)
    if names is not None:
        for position, each in enumerate(path):
            # Self-issued intermediates are exempt, the end of the path never is (section 6.1.3 b).
            if position == 0 or each.subject != each.issuer:
                _check_names(names, each)
    try:
        path[-1].verify_directly_issued_by(issuer)
    except (InvalidSignature, *_Unreadable) as exc:
        raise _rejected("a signature does not verify", detail=str(exc)) from exc


def _check_certificate(certificate: x509.Certificate, now: datetime) -> None:
    if certificate.version is not x509.Version.v3:
        raise _rejected("a certificate is not of version 3")
    if now < certificate.not_valid_before_utc:
        raise _rejected("a certificate is not valid yet")
    if now > certificate.not_valid_after_utc:
        raise _rejected("a certificate has expired")
    if certificate.signature_algorithm_oid not in _SIGNATURES:
        raise _rejected("a certificate is signed with a weak or unknown algorithm")
    if certificate.signature_algorithm_oid == SignatureAlgorithmOID.RSASSA_PSS:
        digest = certificate.signature_hash_algorithm
        if digest is None or digest.digest_size < 32:
            raise _rejected("a certificate is signed with a weak or unknown algorithm")
    try:
        algorithm_of(certificate.public_key())
    except KeyTooWeak as exc:
        raise _rejected("a certificate holds a weak or unknown key", detail=str(exc)) from exc
    for extension in certificate.extensions:
        if extension.critical and extension.oid not in _KNOWN_EXTENSIONS:
            raise _rejected("a certificate has an unknown critical extension")


def _leaf_identity(leaf: x509.Certificate) -> SpiffeId:
    """The SPIFFE ID of a certificate that may be used for authentication."""
    constraints = _extension(leaf, x509.BasicConstraints)
    if constraints is not None and constraints.ca:
        raise _rejected("a signing certificate was presented for authentication (X-6, X-12)")
    usage = _extension(leaf, x509.KeyUsage)
    if usage is None or not usage.digital_signature:
        raise _rejected("the leaf's key usage is not digitalSignature (X-9)")
    if usage.key_cert_sign or usage.crl_sign:
        raise _rejected("a signing certificate was presented for authentication (X-6, X-12)")
    names = _extension(leaf, x509.SubjectAlternativeName)
    uris = [] if names is None else names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise _rejected("the leaf does not have exactly one URI SAN (X-2)")
    try:
        spiffe_id = SpiffeId.parse(uris[0])
    except SpiffeIdError as exc:
        raise _rejected("the leaf's URI SAN is not a SPIFFE ID (X-13)", detail=exc.message) from exc
    if not spiffe_id.path:
        raise _rejected("the leaf's SPIFFE ID has no path (X-13)")
    return spiffe_id


def _check_names(constraints: x509.NameConstraints, certificate: x509.Certificate) -> None:
    """Section 6.1.3 (b), (c) for URI and DNS names; any other constrained kind is refused."""
    names = _extension(certificate, x509.SubjectAlternativeName) or ()
    for name in names:
        permitted = _same_kind(constraints.permitted_subtrees, name)
        excluded = _same_kind(constraints.excluded_subtrees, name)
        if not permitted and not excluded:
            continue
        if not isinstance(name, x509.UniformResourceIdentifier | x509.DNSName):
            raise _rejected("a name constraint is of a kind that is not supported")
        if any(_covers(base, name) for base in excluded) or (
            permitted and not any(_covers(base, name) for base in permitted)
        ):
            raise _rejected("an issuer's name constraints do not permit it")
    directory = x509.DirectoryName(certificate.subject)
    if list(certificate.subject) and (
        _same_kind(constraints.permitted_subtrees, directory)
        or _same_kind(constraints.excluded_subtrees, directory)
    ):
        raise _rejected("a name constraint is of a kind that is not supported")


def _same_kind(
    subtrees: Sequence[x509.GeneralName] | None, name: x509.GeneralName
) -> list[x509.GeneralName]:
    return [base for base in subtrees or () if type(base) is type(name)]


def _covers(base: x509.GeneralName, name: x509.GeneralName) -> bool:
    """RFC 5280 section 4.2.1.10, for two names of the same kind, URI or DNS."""
    constraint = str(base.value).lower()
    if isinstance(name, x509.DNSName):
        host = name.value.lower()
        return constraint in ("", host) or host.endswith(f".{constraint}")
    _, _, rest = str(name.value).partition("://")
    host = rest.partition("/")[0].rpartition("@")[2].partition(":")[0].lower()
    if not host:
        return False
    return host.endswith(constraint) if constraint.startswith(".") else host == constraint


def _extension(certificate: x509.Certificate, kind: type[_Extension]) -> _Extension | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _parse(der: bytes) -> x509.Certificate:
    if len(der) > _MAX_CERTIFICATE_BYTES:
        raise _rejected("a certificate is too long")
    try:
        return _parsed(der)
    except _Unreadable as exc:
        raise _rejected("a certificate cannot be read", detail=str(exc)) from exc


# Certificates are immutable, and the same anchors and intermediates come with every peer.
@lru_cache(maxsize=512)
def _parsed(der: bytes) -> x509.Certificate:
    return x509.load_der_x509_certificate(der)


def _rejected(why: str, *, detail: str = "") -> ChainRejected:
    return ChainRejected(f"the X.509-SVID was rejected: {why}", detail=detail)
