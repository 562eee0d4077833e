"""Who certifies our signing key, and the check of what came back.

- The upstream is not trusted to do what it was asked: `verify_upstream` compares every property
  of the returned certificate, because real ones cut lifetimes and drop extensions silently.
- What does not pass is never published and never signs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Protocol, TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.x509.oid import ExtendedKeyUsageOID

from identity_ca.chain import find_path
from identity_ca.errors import ChainRejected, UpstreamRejected
from identity_ca.keys import SigningKey, spki_der
from identity_ca.spiffe_id import TrustDomain

__all__ = [
    "SignedAuthority",
    "UpstreamAuthority",
    "UpstreamList",
    "verify_upstream",
    "verify_upstream_list",
]

# Whole seconds, two clocks and one round trip lie between what was asked and what came back.
_MIN_TOLERANCE: Final = timedelta(seconds=5)
_MAX_TOLERANCE: Final = timedelta(seconds=60)
_PURPOSES: Final = {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
_Extension = TypeVar("_Extension", bound=x509.ExtensionType)


@dataclass(frozen=True, slots=True)
class SignedAuthority:
    """Our signing key, certified.

    Attributes:
        chain: our CA certificate first, then the intermediates above it, without the root; a
            self-signed authority has just its own root here.
        roots: what verifiers must trust, self-signed certificates.
    """

    chain: tuple[x509.Certificate, ...]
    roots: tuple[x509.Certificate, ...]


@dataclass(frozen=True, slots=True)
class UpstreamList:
    """A revocation list of an authority above ours, checked.

    Attributes:
        authority_id: the issuer's subject key identifier, hexadecimal.
        entries: how many certificates it revokes.
    """

    authority_id: str
    der: bytes
    number: int
    this_update: datetime
    next_update: datetime
    entries: int


class UpstreamAuthority(Protocol):
    """Certifies a signing key as a CA of a trust domain; one plugin kind, see `backends/`."""

    @property
    def name(self) -> str: ...

    def certify(
        self, key: SigningKey, *, trust_domain: TrustDomain, ttl: timedelta, now: datetime
    ) -> SignedAuthority:
        """A CA certificate for `key`, checked with `verify_upstream`.

        Raises:
            UpstreamRejected, BackendUnavailable, BackendMisconfigured
        """
        ...

    def revocation_lists(
        self, *, number: int, this_update: datetime, next_update: datetime
    ) -> tuple[bytes, ...]:
        """Revocation lists of authorities above ours, DER; empty when there are none to be had.

        Verifiers that check a whole chain need one of each of them.

        Args:
            number, this_update, next_update: for a list that is signed by this call.

        Raises:
            UpstreamRejected, BackendUnavailable, BackendMisconfigured
        """
        ...

    def check(self) -> None:
        """Returns when the upstream can be used; signs nothing.

        Raises:
            BackendUnavailable, BackendMisconfigured
        """
        ...

    def close(self) -> None:
        """Gives back connections; twice is harmless."""
        ...


def verify_upstream(
    signed: SignedAuthority,
    *,
    key: SigningKey,
    trust_domain: TrustDomain,
    ttl: timedelta,
    now: datetime,
) -> None:
    """Returns when the upstream did exactly what was asked.

    Raises:
        UpstreamRejected: with a sentence naming the first property that differs.
    """
    if not signed.chain or not signed.roots:
        raise _rejected("the chain or its root is missing")
    own = signed.chain[0]
    try:
        if spki_der(own.public_key()) != spki_der(key.public_key):
            raise _rejected("it is for another key")
        _check_extensions(own, trust_domain)
    except (ValueError, TypeError, x509.DuplicateExtension, UnsupportedAlgorithm) as exc:
        raise _rejected("it cannot be read", detail=str(exc)) from exc
    _check_lifetime(own, ttl, now)
    _check_path(signed, now)


def verify_upstream_list(der: bytes, certificates: Iterable[x509.Certificate]) -> UpstreamList:
    """The list, when one of the certificates' keys signed it and it can be used.

    Raises:
        UpstreamRejected: it cannot be read, has no next update, or is of none of them.
    """
    try:
        crl = x509.load_der_x509_crl(der)
        number = crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        next_update = crl.next_update_utc
        for certificate in certificates:
            key: Any = certificate.public_key()
            if certificate.subject == crl.issuer and crl.is_signature_valid(key):
                break
        else:
            raise _list_rejected("no authority above ours signed it")
        key_id = certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.ExtensionNotFound) as exc:
        raise _list_rejected("it cannot be read", detail=str(exc)) from exc
    if next_update is None:
        raise _list_rejected("it has no next update")
    return UpstreamList(
        authority_id=key_id.value.digest.hex(),
        der=der,
        number=number,
        this_update=crl.last_update_utc,
        next_update=next_update,
        entries=len(crl),
    )


def _list_rejected(why: str, *, detail: str = "") -> UpstreamRejected:
    return UpstreamRejected(
        f"the upstream authority's revocation list cannot be used: {why}", detail=detail
    )


def _check_extensions(own: x509.Certificate, trust_domain: TrustDomain) -> None:
    extensions = own.extensions
    constraints = _extension(extensions, x509.BasicConstraints)
    if constraints is None or not constraints.critical or not constraints.value.ca:
        raise _rejected("it is not a CA certificate (X-7)")
    if constraints.value.path_length != 0:
        raise _rejected("its path length is not 0")
    usage = _extension(extensions, x509.KeyUsage)
    if usage is None or not usage.critical:
        raise _rejected("it has no critical key usage (X-8)")
    if not usage.value.key_cert_sign or not usage.value.crl_sign:
        raise _rejected("its key usage does not allow certificates and CRLs (X-9)")
    limits = _extension(extensions, x509.NameConstraints)
    if limits is None or not limits.critical:
        raise _rejected(
            "it has no critical name constraints",
            hint="the upstream must copy them from the request (OpenBao: use_csr_values)",
        )
    if list(limits.value.permitted_subtrees or ()) != [
        x509.UniformResourceIdentifier(trust_domain.name)
    ] or list(limits.value.excluded_subtrees or ()):
        raise _rejected("its name constraints are not the trust domain's URIs alone")
    names = _extension(extensions, x509.SubjectAlternativeName)
    uris = [] if names is None else names.value.get_values_for_type(x509.UniformResourceIdentifier)
    if uris not in ([], [str(trust_domain.id)]):
        raise _rejected("its SPIFFE ID is not the trust domain's own (X-5)")
    purposes = _extension(extensions, x509.ExtendedKeyUsage)
    if purposes is not None and not set(purposes.value) >= _PURPOSES:
        raise _rejected("its extended key usage does not cover its leaves (X-10)")


def _check_lifetime(own: x509.Certificate, ttl: timedelta, now: datetime) -> None:
    tolerance = max(_MIN_TOLERANCE, min(_MAX_TOLERANCE, ttl / 10))
    if own.not_valid_before_utc > now:
        raise _rejected(
            "it is not valid yet", hint="compare the clocks of this host and the upstream"
        )
    # An upstream may backdate; how far is its own affair.
    if own.not_valid_after_utc > now + ttl + tolerance:
        raise _rejected("it lives longer than asked")
    if own.not_valid_after_utc < now + ttl - tolerance:
        raise _rejected(
            "it lives shorter than asked",
            hint="ask for a shorter time to live, or raise the upstream's limit"
            " (OpenBao: max_lease_ttl of the mount)",
            detail=f"it ends at {own.not_valid_after_utc.isoformat()}",
        )


def _check_path(signed: SignedAuthority, now: datetime) -> None:
    own = signed.chain[0]
    for root in signed.roots:
        if root.subject != root.issuer:
            raise _rejected("a root is not self-signed")
    try:
        path = find_path(own, intermediates=signed.chain[1:], anchors=signed.roots, now=now)
    except ChainRejected as exc:
        raise _rejected("no path leads from it to the root", detail=exc.message) from exc
    if own not in signed.roots:
        for below, issuer in enumerate(path[1:], start=1):
            limit = _extension(issuer.extensions, x509.BasicConstraints)
            room = None if limit is None else limit.value.path_length
            # `below` CAs, our own included, stand between this one and a leaf.
            if room is not None and room < below:
                raise _rejected("a path length above it leaves no room for it")
    if any(own.not_valid_after_utc > each.not_valid_after_utc for each in path):
        raise _rejected(
            "it outlives the authority above it",
            hint="renew that authority, or ask for a shorter time to live",
        )


def _extension(
    extensions: x509.Extensions, kind: type[_Extension]
) -> x509.Extension[_Extension] | None:
    try:
        return extensions.get_extension_for_class(kind)
    except x509.ExtensionNotFound:
        return None


def _rejected(why: str, *, hint: str = "", detail: str = "") -> UpstreamRejected:
    return UpstreamRejected(
        f"the upstream authority returned a certificate that was not asked for: {why}",
        hint=hint,
        detail=detail,
    )
