"""The `crl` field of a Workload API: read once, verified with the issuer where it is known.

- A list whose issuer is known and that its issuer did not sign is dropped: it denies nobody.
- A list of an issuer that is not known here, such as an intermediate that was replaced before
  this process started, is taken on the word of the Workload API, which hands out our keys and the
  bundle as well. It can deny certificates of that issuer and no others.
- A list with a critical extension that is not understood says nothing (RFC 5280, section 5.2).
- A list with 100,000 entries is parsed when it changes and not with every message.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Iterable

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPublicKeyTypes

from identity_client.peer import serial_text
from identity_client.revocation import Issuer, RevocationList

__all__ = ["ListReader"]

_logger = logging.getLogger(__name__)

_ISSUERS_KEPT = 64
_UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)


class ListReader:
    """Reads the lists of one source. One thread at a time uses it."""

    def __init__(self) -> None:
        self._read: dict[bytes, tuple[x509.CertificateRevocationList, RevocationList] | None] = {}
        self._verdicts: dict[tuple[bytes, x509.Certificate], bool] = {}
        # Every issuer ever seen, newest last: a list outlives the chain its issuer came in.
        self._issuers: OrderedDict[x509.Certificate, None] = OrderedDict()

    def learn(self, certificates: Iterable[x509.Certificate]) -> None:
        """Remembers CA certificates of the bundle and of our own chains."""
        for certificate in certificates:
            self._issuers[certificate] = None
            self._issuers.move_to_end(certificate)
        while len(self._issuers) > _ISSUERS_KEPT:
            self._issuers.popitem(last=False)

    def read(self, crls: Iterable[bytes]) -> tuple[RevocationList, ...]:
        """The lists that may be believed. May take a while for large ones."""
        wanted = tuple(dict.fromkeys(crls))
        self._read = {der: self._read[der] if der in self._read else _parse(der) for der in wanted}
        self._verdicts = {key: held for key, held in self._verdicts.items() if key[0] in self._read}
        return tuple(
            found[1]
            for der, found in self._read.items()
            if found is not None and self._is_believable(der, found[0])
        )

    def _is_believable(self, der: bytes, crl: x509.CertificateRevocationList) -> bool:
        named = Issuer.of(crl)
        known = [one for one in self._issuers if _may_have_signed(one, named)]
        if not known or any(self._is_signed_by(der, crl, one) for one in known):
            return True
        _logger.warning("a revocation list was not signed by its issuer and is ignored")
        return False

    def _is_signed_by(
        self, der: bytes, crl: x509.CertificateRevocationList, issuer: x509.Certificate
    ) -> bool:
        verdict = self._verdicts.get((der, issuer))
        if verdict is None:
            verdict = self._verdicts[der, issuer] = _verifies(crl, issuer)
        return verdict


def _parse(der: bytes) -> tuple[x509.CertificateRevocationList, RevocationList] | None:
    try:
        crl = x509.load_der_x509_crl(der)
        if any(one.critical and not _is_understood(one.value) for one in crl.extensions):
            _logger.warning("a revocation list of a kind that is not understood is ignored")
            return None
        serials = (serial_text(revoked.serial_number) for revoked in crl)
        until = crl.next_update_utc.timestamp() if crl.next_update_utc else math.inf
        return crl, RevocationList.of(Issuer.of(crl), serials, until)
    except _UNREADABLE as exc:
        _logger.warning("a revocation list cannot be read and is ignored: %s", exc)
        return None


def _is_understood(value: x509.ExtensionType) -> bool:
    # A list for a part of the certificates still says which of them are revoked; one that speaks
    # for other issuers' certificates would have to be read entry by entry.
    if isinstance(value, x509.IssuingDistributionPoint):
        return not value.indirect_crl
    return isinstance(value, (x509.AuthorityKeyIdentifier, x509.CRLNumber))


def _may_have_signed(certificate: x509.Certificate, named: Issuer) -> bool:
    try:
        key_id = b""
        for extension in certificate.extensions:
            if isinstance(extension.value, x509.SubjectKeyIdentifier):
                key_id = extension.value.digest
        return Issuer(certificate.subject.public_bytes(), key_id).may_be(named)
    except _UNREADABLE:
        return False


def _verifies(crl: x509.CertificateRevocationList, issuer: x509.Certificate) -> bool:
    try:
        key: CertificateIssuerPublicKeyTypes = issuer.public_key()  # type: ignore[assignment]
        return crl.is_signature_valid(key)
    except _UNREADABLE:
        return False
