"""Certificate revocation lists (RFC 5280 section 5), made by appending, not by rebuilding.

- One revoked certificate is one short run of bytes (`encode_entry`) that never changes; a list is
  their concatenation, a header and a signature. A builder that takes entries one at a time gets
  slow with size; this does not.
- Byte for byte what `cryptography`'s builder would sign; a property test holds that.
- Three kinds: full; a part of an authority's certificates, which names itself as where it is to be
  had; and a delta, which says what changed since a full list (`encode_removal` stands there alone).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Protocol

from cryptography import x509
from cryptography.x509.oid import CRLEntryExtensionOID, ExtensionOID

from identity_ca.authority_certificate import issuer_facts
from identity_ca.der import SEQUENCE, element, element_head, encode_integer, encode_time
from identity_ca.distribution import (
    freshest_crl_extension,
    issuing_distribution_point_extension,
)
from identity_ca.errors import ProfileViolation
from identity_ca.keys import SigningKey
from identity_ca.template import assemble, authority_key_id_extension, encode_extension

__all__ = [
    "CrlIssuer",
    "RevokedEntry",
    "build_crl",
    "encode_entry",
    "encode_removal",
    "sign_crl",
]

_V2: Final = b"\x02\x01\x01"
_MAX_SERIAL_BITS: Final = 159
_MAX_NUMBER_BITS: Final = 159


def _reason(code: int) -> bytes:
    return element(
        SEQUENCE,
        encode_extension(
            CRLEntryExtensionOID.CRL_REASON, bytes((0x0A, 0x01, code)), critical=False
        ),
    )


# RFC 5280 section 5.3.1. 0 (unspecified) should not be written, 7 is unused, 8 is for deltas.
_REASON_EXTENSIONS: Final = {code: _reason(code) for code in (1, 2, 3, 4, 5, 6, 9, 10)} | {
    0: b"",
    None: b"",
}
_REMOVE_FROM_CRL: Final = _reason(8)


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
        ProfileViolation: the serial or the reason cannot stand in a CRL.
    """
    reason = _REASON_EXTENSIONS.get(entry.reason)
    if reason is None:
        raise ProfileViolation(
            "the revocation reason cannot stand in a full CRL",
            hint="reasons are 0 to 6, 9 and 10 (RFC 5280 section 5.3.1)",
        )
    return _entry(entry.serial, entry.revoked_at, reason)


def encode_removal(serial: int, at: datetime) -> bytes:
    """An entry of a delta that takes back what a full list said: removeFromCRL.

    Raises:
        ProfileViolation: the serial cannot stand in a CRL.
    """
    return _entry(serial, at, _REMOVE_FROM_CRL)


def _entry(serial: int, at: datetime, reason: bytes) -> bytes:
    if serial <= 0 or serial.bit_length() > _MAX_SERIAL_BITS:
        raise ProfileViolation("a revoked serial number must be positive and at most 20 octets")
    return element(SEQUENCE, encode_integer(serial) + encode_time(at) + reason)


def build_crl(
    *,
    issuer: CrlIssuer,
    entries: Iterable[RevokedEntry],
    number: int,
    this_update: datetime,
    next_update: datetime,
    scope_url: str = "",
    base_number: int | None = None,
    delta_url: str = "",
) -> bytes:
    """A signed CRL, DER, with the entries in the order given.

    Raises:
        As `encode_entry` and `sign_crl`.
    """
    return sign_crl(
        issuer=issuer,
        encoded_entries=map(encode_entry, entries),
        number=number,
        this_update=this_update,
        next_update=next_update,
        scope_url=scope_url,
        base_number=base_number,
        delta_url=delta_url,
    )


def sign_crl(
    *,
    issuer: CrlIssuer,
    encoded_entries: Iterable[bytes],
    number: int,
    this_update: datetime,
    next_update: datetime,
    scope_url: str = "",
    base_number: int | None = None,
    delta_url: str = "",
) -> bytes:
    """As `build_crl`, from entries encoded before.

    Args:
        encoded_entries: what `encode_entry` answered, each alone or several in a row.
        number: CRLNumber, larger than that of any list before (RFC 5280 section 5.2.3).
        scope_url: for a list that covers a part of the leaf certificates only: where it is, as the
            certificates name it.
        base_number: for a delta: the number of the full list that it builds on.
        delta_url: for a full list: where its delta is.

    Raises:
        ProfileViolation: the CA may not sign CRLs, or numbers, times or kinds make no sense.
        UpstreamRejected: the CA certificate does not belong to the key.
        BackendUnavailable, BackendMisconfigured, KeyNotFound: from a remote key.
    """
    _check_numbers(number, base_number)
    if base_number is not None and delta_url:
        raise ProfileViolation("a delta has no delta of its own")
    if next_update <= this_update:
        raise ProfileViolation("the next update of a CRL must come after this one")
    facts = issuer_facts(issuer.certificate, issuer.key)
    if not issuer.certificate.extensions.get_extension_for_class(x509.KeyUsage).value.crl_sign:
        raise ProfileViolation("the CA certificate's key usage does not allow signing CRLs")
    extensions = authority_key_id_extension(facts.key_id) + encode_extension(
        ExtensionOID.CRL_NUMBER, encode_integer(number), critical=False
    )
    if base_number is not None:
        extensions += encode_extension(
            ExtensionOID.DELTA_CRL_INDICATOR, encode_integer(base_number), critical=True
        )
    if scope_url:
        extensions += issuing_distribution_point_extension(scope_url)
    if delta_url:
        extensions += freshest_crl_extension(delta_url)
    before = b"".join(
        (
            _V2,
            facts.signature_algorithm,
            facts.name,
            encode_time(this_update),
            encode_time(next_update),
        )
    )
    after = element(0xA0, element(SEQUENCE, extensions))
    tbs = _to_be_signed(before, list(encoded_entries), after)
    return assemble(tbs, facts.signature_algorithm, issuer.key.sign(tbs))


def _to_be_signed(before: bytes, entries: list[bytes], after: bytes) -> bytes:
    """The TBSCertList, its entries copied once: there may be a million."""
    size = sum(map(len, entries))
    # An empty list has no revokedCertificates at all (RFC 5280 section 5.1.2.6).
    head = element_head(SEQUENCE, size) if size else b""
    whole = len(before) + len(head) + size + len(after)
    return b"".join((element_head(SEQUENCE, whole), before, head, *entries, after))


def _check_numbers(number: int, base_number: int | None) -> None:
    if number < 0 or number.bit_length() > _MAX_NUMBER_BITS:
        raise ProfileViolation("a CRL number must not be negative nor longer than 20 octets")
    if base_number is not None and not 0 <= base_number <= number:
        raise ProfileViolation("a delta's base must have a number before its own")
