"""Certificate revocation lists (RFC 5280 section 5), made by appending, not by rebuilding.

- One revoked certificate is one short run of bytes (`encode_entry`) that never changes; a list is
  their concatenation, a header and a signature. A builder that takes entries one at a time gets
  slow with size; this does not.
- Byte for byte what `cryptography`'s builder would sign; a property test holds that.
- Full lists only: no delta, so `removeFromCRL` is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Protocol

from cryptography import x509
from cryptography.x509.oid import CRLEntryExtensionOID, ExtensionOID

from identity_ca.authority_certificate import issuer_facts
from identity_ca.der import SEQUENCE, element, encode_integer, encode_time
from identity_ca.errors import ProfileViolation
from identity_ca.keys import SigningKey
from identity_ca.template import assemble, authority_key_id_extension, encode_extension

__all__ = ["CrlIssuer", "RevokedEntry", "build_crl", "encode_entry", "sign_crl"]

_V2: Final = b"\x02\x01\x01"
_MAX_SERIAL_BITS: Final = 159
_MAX_NUMBER_BITS: Final = 159

# RFC 5280 section 5.3.1. 0 (unspecified) should not be written, 7 is unused, 8 is for deltas.
_REASON_EXTENSIONS: Final = {
    reason: element(
        SEQUENCE,
        encode_extension(
            CRLEntryExtensionOID.CRL_REASON, bytes((0x0A, 0x01, reason)), critical=False
        ),
    )
    for reason in (1, 2, 3, 4, 5, 6, 9, 10)
} | {0: b"", None: b""}


class CrlIssuer(Protocol):
    """What signs a list: an `X509Issuer`, or anything with its certificate and key."""

    @property
    def certificate(self) -> x509.Certificate: ...

    @property
    def key(self) -> SigningKey: ...


@dataclass(frozen=True, slots=True)
class RevokedEntry:
    """One revoked certificate.

    Attributes:
        serial: as in the certificate.
        revoked_at: aware, in UTC.
        reason: CRLReason (RFC 5280 section 5.3.1), or None when there is none to give.
    """

    serial: int
    revoked_at: datetime
    reason: int | None = None


def encode_entry(entry: RevokedEntry) -> bytes:
    """The bytes of one entry; they can be kept and handed to `sign_crl` again.

    Raises:
        ProfileViolation: the serial or the reason cannot stand in a full CRL.
    """
    serial = entry.serial
    if serial <= 0 or serial.bit_length() > _MAX_SERIAL_BITS:
        raise ProfileViolation("a revoked serial number must be positive and at most 20 octets")
    reason = _REASON_EXTENSIONS.get(entry.reason)
    if reason is None:
        raise ProfileViolation(
            "the revocation reason cannot stand in a full CRL",
            hint="reasons are 0 to 6, 9 and 10 (RFC 5280 section 5.3.1)",
        )
    return element(SEQUENCE, encode_integer(serial) + encode_time(entry.revoked_at) + reason)


def build_crl(
    *,
    issuer: CrlIssuer,
    entries: Iterable[RevokedEntry],
    number: int,
    this_update: datetime,
    next_update: datetime,
    issuing_distribution_point: x509.IssuingDistributionPoint | None = None,
) -> bytes:
    """A signed full CRL, DER, with the entries in the order given.

    Raises:
        As `encode_entry` and `sign_crl`.
    """
    return sign_crl(
        issuer=issuer,
        encoded_entries=b"".join(map(encode_entry, entries)),
        number=number,
        this_update=this_update,
        next_update=next_update,
        issuing_distribution_point=issuing_distribution_point,
    )


def sign_crl(
    *,
    issuer: CrlIssuer,
    encoded_entries: bytes,
    number: int,
    this_update: datetime,
    next_update: datetime,
    issuing_distribution_point: x509.IssuingDistributionPoint | None = None,
) -> bytes:
    """As `build_crl`, from entries encoded before.

    Args:
        encoded_entries: what `encode_entry` answered, concatenated; empty for an empty list.
        number: CRLNumber, larger than that of any list before (RFC 5280 section 5.2.3).
        issuing_distribution_point: for a list that covers a part of the certificates only.

    Raises:
        ProfileViolation: the CA may not sign CRLs, or the number or the times make no sense.
        UpstreamRejected: the CA certificate does not belong to the key.
        BackendUnavailable, BackendMisconfigured, KeyNotFound: from a remote key.
    """
    if number < 0 or number.bit_length() > _MAX_NUMBER_BITS:
        raise ProfileViolation("a CRL number must not be negative nor longer than 20 octets")
    if next_update <= this_update:
        raise ProfileViolation("the next update of a CRL must come after this one")
    facts = issuer_facts(issuer.certificate, issuer.key)
    if not issuer.certificate.extensions.get_extension_for_class(x509.KeyUsage).value.crl_sign:
        raise ProfileViolation("the CA certificate's key usage does not allow signing CRLs")
    extensions = authority_key_id_extension(facts.key_id) + encode_extension(
        ExtensionOID.CRL_NUMBER, encode_integer(number), critical=False
    )
    if issuing_distribution_point is not None:
        extensions += encode_extension(
            ExtensionOID.ISSUING_DISTRIBUTION_POINT,
            issuing_distribution_point.public_bytes(),
            critical=True,
        )
    # An empty list has no revokedCertificates at all (RFC 5280 section 5.1.2.6).
    revoked = element(SEQUENCE, encoded_entries) if encoded_entries else b""
    tbs = element(
        SEQUENCE,
        b"".join(
            (
                _V2,
                facts.signature_algorithm,
                facts.name,
                encode_time(this_update),
                encode_time(next_update),
                revoked,
                element(0xA0, element(SEQUENCE, extensions)),
            )
        ),
    )
    return assemble(tbs, facts.signature_algorithm, issuer.key.sign(tbs))
