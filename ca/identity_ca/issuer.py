"""Issues X.509-SVIDs in two steps with room for a record between them: prepare, then sign.

- `prepare` decides and encodes everything, and lints the very bytes; no key is touched.
- Only `prepare` makes a `PreparedX509`, and each is signed at most once.
- What is signed is what was linted: the digest is compared again on the way to the key.
- No credential outlives its issuer, begins before it, or names another trust domain.
- An `X509Issuer` is immutable and safe to share between threads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from identity_ca.authority_certificate import issuer_facts
from identity_ca.csr import CertificateRequest, parse_csr, require_allowed
from identity_ca.distribution import DistributionPoints, leaf_extensions, shard_of
from identity_ca.errors import LintFailed, ProfileViolation, UpstreamRejected
from identity_ca.keys import SigningKey
from identity_ca.lint import BACKDATE, Expectations, lint_tbs
from identity_ca.profile import X509Profile
from identity_ca.serial import new_serial, serial_hex
from identity_ca.spiffe_id import SpiffeId, TrustDomain, is_host_name
from identity_ca.template import EMPTY_NAME, LeafTemplate, assemble, common_name

__all__ = ["MIN_ISSUER_REMAINING", "PreparedX509", "X509Credential", "X509Issuer"]

MIN_ISSUER_REMAINING: Final = timedelta(seconds=60)
"""An issuer with less than this left signs nothing: its leaves would be dead on arrival."""

_MAKING: Final = object()
# RFC 5280, appendix A.1.
_UB_COMMON_NAME: Final = 64


class PreparedX509:
    """A certificate that is decided, encoded and linted, and not yet signed.

    Attributes:
        serial: 40 lower-case hex digits.
        tbs: the to-be-signed bytes, DER.
        tbs_digest: SHA-256 of `tbs`, hex.
        key_fingerprint: SHA-256 of the subject's SubjectPublicKeyInfo, hex.
        authority_id: the authority that prepared it; only that one signs it.
    """

    __slots__ = (
        "_ticket",
        "authority_id",
        "key_fingerprint",
        "not_after",
        "not_before",
        "serial",
        "spiffe_id",
        "tbs",
        "tbs_digest",
    )

    def __init__(
        self,
        making: object,
        *,
        authority_id: str,
        serial: str,
        spiffe_id: SpiffeId,
        not_before: datetime,
        not_after: datetime,
        tbs: bytes,
        tbs_digest: str,
        key_fingerprint: str,
    ) -> None:
        if making is not _MAKING:
            raise TypeError("only X509Issuer.prepare makes a PreparedX509")
        self.authority_id: Final = authority_id
        self.serial: Final = serial
        self.spiffe_id: Final = spiffe_id
        self.not_before: Final = not_before
        self.not_after: Final = not_after
        self.tbs: Final = tbs
        self.tbs_digest: Final = tbs_digest
        self.key_fingerprint: Final = key_fingerprint
        # One element, taken by the one signature: list.pop is atomic, so no lock is needed.
        self._ticket: Final = [None]

    def redeem(self, authority_id: str) -> bytes:
        """The bytes to sign, handed out once; for `X509Issuer.sign` alone.

        Raises:
            ProfileViolation: redeemed before, or by another authority.
            LintFailed: the bytes are not the linted ones.
        """
        if self.authority_id != authority_id:
            raise ProfileViolation("this certificate was prepared by another authority")
        if hashlib.sha256(self.tbs).hexdigest() != self.tbs_digest:
            raise LintFailed("the bytes to be signed are not the ones that were linted")
        try:
            self._ticket.pop()
        except IndexError:
            raise ProfileViolation(
                "this prepared certificate was signed already",
                hint="prepare again: a new serial number, a new record",
            ) from None
        return self.tbs

    def __repr__(self) -> str:
        return f"PreparedX509({self.serial}, {self.spiffe_id})"


@dataclass(frozen=True, slots=True)
class X509Credential:
    """A signed X.509-SVID.

    Attributes:
        chain: DER, leaf first, then intermediates, without the root.
        digest: SHA-256 of the leaf's DER, hex.
        serial: 40 lower-case hex digits.
    """

    chain: tuple[bytes, ...]
    digest: str
    serial: str
    spiffe_id: SpiffeId
    not_before: datetime
    not_after: datetime


class X509Issuer:
    """One X.509 authority at work.

    Args:
        authority_id: names the authority in records.
        key: the private key of `chain[0]`.
        chain: the authority's own CA certificate, then the intermediates above it. A self-signed
            certificate in it is a root and is never handed out with a leaf.
        points: where its certificates say that revocation is asked about; None for nowhere.

    Raises:
        UpstreamRejected: the chain is empty, its first certificate is not a CA or not of `key`.
    """

    __slots__ = (
        "_crl_urls",
        "_facts",
        "_handed_out",
        "_ocsp_url",
        "_template",
        "authority_id",
        "certificate",
        "key",
        "not_after",
        "not_before",
        "trust_domain",
    )

    def __init__(
        self,
        *,
        authority_id: str,
        trust_domain: TrustDomain,
        key: SigningKey,
        chain: Sequence[x509.Certificate],
        points: DistributionPoints | None = None,
    ) -> None:
        if not chain:
            raise UpstreamRejected("an issuer needs its own CA certificate")
        own = chain[0]
        self.authority_id: Final = authority_id
        self.trust_domain: Final = trust_domain
        self.key: Final = key
        self.certificate: Final = own
        self.not_before: Final = own.not_valid_before_utc
        self.not_after: Final = own.not_valid_after_utc
        self._facts: Final = issuer_facts(own, key)
        self._crl_urls: Final = () if points is None else points.shard_urls(authority_id)
        self._ocsp_url: Final = "" if points is None else points.ocsp_url
        self._template: Final = LeafTemplate(
            issuer_name=self._facts.name,
            authority_key_id=self._facts.key_id,
            signature_algorithm=self._facts.signature_algorithm,
            pointers=[leaf_extensions(url, self._ocsp_url) for url in self._crl_urls],
        )
        self._handed_out: Final = tuple(
            certificate.public_bytes(Encoding.DER)
            for certificate in chain
            if certificate.subject != certificate.issuer
        )

    def prepare(
        self,
        *,
        csr: bytes | CertificateRequest,
        spiffe_id: SpiffeId,
        profile: X509Profile,
        ttl: timedelta,
        now: datetime,
        dns_names: Sequence[str] = (),
    ) -> PreparedX509:
        """The certificate for the key in `csr`, up to but without its signature.

        Validity is from `now` - 10 s (not before the issuer's own) to `now` + `ttl` (not beyond
        the issuer's own), in whole seconds. DNS SANs are the one derived from the SPIFFE ID, then
        `dns_names` in their order, each once. The first of `dns_names` is the common name too, for
        those who want one (OpenBao's certificate login); without any there is no subject.

        Args:
            csr: PKCS #10, DER, or what `parse_csr` made of it. Only its key is used.
            now: aware, in UTC.

        Raises:
            CsrRejected, KeyTooWeak: see `csr.parse_csr`.
            ProfileViolation: another trust domain, no path, a lifetime or DNS name outside the
                profile, an issuer about to end.
            LintFailed: a bug in this library, caught before it was signed.
        """
        if spiffe_id.trust_domain != self.trust_domain:
            raise ProfileViolation(
                f"this authority issues for the trust domain {self.trust_domain} alone"
            )
        if not spiffe_id.path:
            raise ProfileViolation("the SPIFFE ID of an X.509-SVID must have a path (X-3)")
        if profile.ca:
            raise ProfileViolation("a workload certificate cannot have a CA profile")
        names = _dns_sans(spiffe_id, dns_names, profile)
        subject = _subject(dns_names) if dns_names else EMPTY_NAME
        not_before, not_after = self._validity(profile, ttl, now)
        if isinstance(csr, CertificateRequest):
            request = csr
            require_allowed(request.algorithm, profile.key_algorithms)
        else:
            request = parse_csr(csr, allowed=profile.key_algorithms)
        serial = new_serial(now)
        tbs = self._template.encode(
            serial=serial,
            not_before=not_before,
            not_after=not_after,
            spki=request.spki_der,
            spiffe_id=spiffe_id,
            dns_names=names,
            subject=subject,
        )
        urls = self._crl_urls
        lint_tbs(
            tbs,
            profile,
            Expectations(
                self._facts,
                spiffe_id,
                request.spki_der,
                not_before,
                not_after,
                names,
                subject,
                crl_url=urls[shard_of(serial, len(urls))] if urls else "",
                ocsp_url=self._ocsp_url,
            ),
        )
        return PreparedX509(
            _MAKING,
            authority_id=self.authority_id,
            serial=serial_hex(serial),
            spiffe_id=spiffe_id,
            not_before=not_before,
            not_after=not_after,
            tbs=tbs,
            tbs_digest=hashlib.sha256(tbs).hexdigest(),
            key_fingerprint=request.key_fingerprint,
        )

    def sign(self, prepared: PreparedX509) -> X509Credential:
        """The signature over what was prepared. It is tried once, whatever comes of it.

        Raises:
            ProfileViolation: signed before, or prepared by another authority.
            LintFailed: the bytes changed since they were linted.
            BackendUnavailable, BackendMisconfigured, KeyNotFound: from a remote key.
        """
        tbs = prepared.redeem(self.authority_id)
        return self._credential(prepared, self.key.sign(tbs))

    def sign_many(self, prepared: Sequence[PreparedX509]) -> list[X509Credential]:
        """As `sign` for each, in order, in one round trip to a remote key; all or none."""
        tbs = [each.redeem(self.authority_id) for each in prepared]
        signatures = self.key.sign_many(tbs)
        return [
            self._credential(each, signature)
            for each, signature in zip(prepared, signatures, strict=True)
        ]

    def _validity(
        self, profile: X509Profile, ttl: timedelta, now: datetime
    ) -> tuple[datetime, datetime]:
        profile.check_ttl(ttl)
        if now < self.not_before:
            raise ProfileViolation("the issuing authority is not valid yet")
        if self.not_after - now < MIN_ISSUER_REMAINING:
            raise ProfileViolation(
                "the issuing authority is about to expire",
                hint="idb authority list shows its end; rotate it",
            )
        not_before = now.replace(microsecond=0) - BACKDATE
        not_after = (now + ttl).replace(microsecond=0)
        return max(not_before, self.not_before), min(not_after, self.not_after)

    def _credential(self, prepared: PreparedX509, signature: bytes) -> X509Credential:
        leaf = assemble(prepared.tbs, self._facts.signature_algorithm, signature)
        return X509Credential(
            chain=(leaf, *self._handed_out),
            digest=hashlib.sha256(leaf).hexdigest(),
            serial=prepared.serial,
            spiffe_id=prepared.spiffe_id,
            not_before=prepared.not_before,
            not_after=prepared.not_after,
        )


def _subject(dns_names: Sequence[str]) -> bytes:
    first = dns_names[0]
    return common_name(first) if len(first) <= _UB_COMMON_NAME else EMPTY_NAME


def _dns_sans(
    spiffe_id: SpiffeId, dns_names: Sequence[str], profile: X509Profile
) -> tuple[str, ...]:
    own = spiffe_id.dns_san()
    derived = () if own is None else (own,)
    if not dns_names:
        return derived
    if len(dns_names) > profile.max_dns_names:
        raise ProfileViolation(
            f"a {profile.name} certificate may hold at most {profile.max_dns_names} DNS names"
        )
    reserved = f".svid.{spiffe_id.trust_domain}"
    for name in dns_names:
        if not is_host_name(name):
            raise ProfileViolation(
                "a DNS name must be a full host name in lower case, without wildcard"
            )
        # Such a name stands for a SPIFFE ID: granting one by hand would be impersonation.
        if name.endswith(reserved) and name != own:
            raise ProfileViolation(
                f"DNS names below svid.{spiffe_id.trust_domain} are derived from SPIFFE IDs"
                " and cannot be asked for"
            )
    return tuple(dict.fromkeys((*derived, *dns_names)))
