"""The to-be-signed bytes of a certificate, encoded here (RFC 5280 section 4.1).

- Byte for byte what `cryptography`'s builder would sign for the same input; a property test holds
  that. Encoding first means: lint, record and digest come before any key is touched.
- What is the same for every leaf of an issuer is encoded once, in `LeafTemplate`.
- A leaf's name is the SPIFFE ID in the SAN. Where it has no subject the SAN is critical (X-4), and
  only there (RFC 5280 section 4.2.1.6).
- Nothing is checked here. `issuer` refuses bad input and `lint` reads the result back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime
from typing import Final

from cryptography import x509
from cryptography.x509.oid import (
    ExtendedKeyUsageOID,
    ExtensionOID,
    NameOID,
    SignatureAlgorithmOID,
)

from identity_ca.der import (
    BIT_STRING,
    BOOLEAN_TRUE,
    OCTET_STRING,
    SEQUENCE,
    Reader,
    element,
    element_head,
    encode_integer,
    encode_oid,
    encode_time,
)
from identity_ca.keys import KeyAlgorithm
from identity_ca.spiffe_id import SpiffeId, TrustDomain

__all__ = [
    "LeafTemplate",
    "assemble",
    "encode_authority_tbs",
    "encode_extension",
    "signature_algorithm_der",
    "subject_key_id",
]

_V3: Final = b"\xa0\x03\x02\x01\x02"
EMPTY_NAME: Final = b"\x30\x00"
_UTF8_STRING: Final = 0x0C
_SET: Final = 0x31
_COMMON_NAME: Final = encode_oid(NameOID.COMMON_NAME.dotted_string)
_URI: Final = 0x86
_DNS: Final = 0x82

_SIGNATURE_OIDS: Final = {
    KeyAlgorithm.EC_P256: SignatureAlgorithmOID.ECDSA_WITH_SHA256,
    KeyAlgorithm.EC_P384: SignatureAlgorithmOID.ECDSA_WITH_SHA384,
    KeyAlgorithm.RSA_2048: SignatureAlgorithmOID.RSA_WITH_SHA256,
    KeyAlgorithm.RSA_3072: SignatureAlgorithmOID.RSA_WITH_SHA256,
    KeyAlgorithm.RSA_4096: SignatureAlgorithmOID.RSA_WITH_SHA256,
    KeyAlgorithm.ED25519: SignatureAlgorithmOID.ED25519,
}
_RSA: Final = {KeyAlgorithm.RSA_2048, KeyAlgorithm.RSA_3072, KeyAlgorithm.RSA_4096}


def signature_algorithm_der(algorithm: KeyAlgorithm) -> bytes:
    """The AlgorithmIdentifier of signatures made with a key of that kind.

    RSA carries NULL parameters (RFC 4055 section 5), the others none (RFC 5758, RFC 8410).
    """
    parameters = b"\x05\x00" if algorithm in _RSA else b""
    return element(SEQUENCE, encode_oid(_SIGNATURE_OIDS[algorithm].dotted_string) + parameters)


def subject_key_id(spki: bytes) -> bytes:
    """The key identifier of a SubjectPublicKeyInfo: 20 octets of SHA-256 (RFC 7093 method 1)."""
    key_info = Reader(spki).enter(SEQUENCE, "key info")
    key_info.enter(SEQUENCE, "key algorithm")
    bits = key_info.content(BIT_STRING, "public key")
    return hashlib.sha256(bits[1:]).digest()[:20]


def encode_extension(oid: x509.ObjectIdentifier, value: bytes, *, critical: bool) -> bytes:
    """One Extension (RFC 5280 section 4.2) around an encoded value."""
    return element(
        SEQUENCE,
        encode_oid(oid.dotted_string)
        + (BOOLEAN_TRUE if critical else b"")
        + element(OCTET_STRING, value),
    )


def authority_key_id_extension(key_id: bytes) -> bytes:
    """AuthorityKeyIdentifier with the key identifier alone."""
    return encode_extension(
        ExtensionOID.AUTHORITY_KEY_IDENTIFIER,
        element(SEQUENCE, element(0x80, key_id)),
        critical=False,
    )


def assemble(tbs: bytes, signature_algorithm: bytes, signature: bytes) -> bytes:
    """The signed object (certificate or CRL) around its to-be-signed bytes."""
    end = signature_algorithm + element(BIT_STRING, b"\x00" + signature)
    return b"".join((element_head(SEQUENCE, len(tbs) + len(end)), tbs, end))


_KEY_USAGE_LEAF: Final = encode_extension(
    ExtensionOID.KEY_USAGE,
    b"\x03\x02\x07\x80",  # digitalSignature
    critical=True,
)
_KEY_USAGE_CA: Final = encode_extension(
    ExtensionOID.KEY_USAGE,
    b"\x03\x02\x01\x06",  # keyCertSign, cRLSign
    critical=True,
)
_EXTENDED_KEY_USAGE: Final = encode_extension(
    ExtensionOID.EXTENDED_KEY_USAGE,
    element(
        SEQUENCE,
        encode_oid(ExtendedKeyUsageOID.SERVER_AUTH.dotted_string)
        + encode_oid(ExtendedKeyUsageOID.CLIENT_AUTH.dotted_string),
    ),
    critical=False,
)
_NOT_A_CA: Final = encode_extension(ExtensionOID.BASIC_CONSTRAINTS, b"\x30\x00", critical=True)

# Extensions whose only moving part is at their end: everything before it, encoded once.
_KEY_ID_PREFIX: Final = encode_extension(
    ExtensionOID.SUBJECT_KEY_IDENTIFIER, element(OCTET_STRING, bytes(20)), critical=False
)[:-20]
_SAN_OID: Final = encode_oid(ExtensionOID.SUBJECT_ALTERNATIVE_NAME.dotted_string)


class LeafTemplate:
    """Encodes the leaf certificates of one issuer; built once, safe to share between threads.

    Args:
        issuer_name: the issuer's subject, DER.
        authority_key_id: the issuer's subject key identifier.
        signature_algorithm: AlgorithmIdentifier, DER.
        pointers: the extensions that say where to ask about revocation, DER; those at position
            serial number modulo their count are the certificate's. Empty for none.
    """

    __slots__ = ("_after_names", "_before_names", "_issuer", "_pointers", "_signature_algorithm")

    def __init__(
        self,
        *,
        issuer_name: bytes,
        authority_key_id: bytes,
        signature_algorithm: bytes,
        pointers: Sequence[bytes] = (),
    ) -> None:
        self._signature_algorithm: Final = signature_algorithm
        self._issuer: Final = signature_algorithm + issuer_name
        self._before_names: Final = (
            _KEY_USAGE_LEAF + _EXTENDED_KEY_USAGE + _NOT_A_CA + _KEY_ID_PREFIX
        )
        self._after_names: Final = authority_key_id_extension(authority_key_id)
        self._pointers: Final = tuple(pointers)

    def encode(
        self,
        *,
        serial: int,
        not_before: datetime,
        not_after: datetime,
        spki: bytes,
        spiffe_id: SpiffeId,
        dns_names: Sequence[str],
        subject: bytes = EMPTY_NAME,
    ) -> bytes:
        """The TBSCertificate. `dns_names` are all DNS SANs, in the order they are to appear."""
        names = element(_URI, str(spiffe_id).encode("ascii"))
        for name in dns_names:
            names += element(_DNS, name.encode("ascii"))
        san = element(
            SEQUENCE,
            _SAN_OID
            + (BOOLEAN_TRUE if subject == EMPTY_NAME else b"")
            + element(OCTET_STRING, element(SEQUENCE, names)),
        )
        extensions = self._before_names + subject_key_id(spki) + self._after_names + san
        if self._pointers:
            extensions += self._pointers[serial % len(self._pointers)]
        return element(
            SEQUENCE,
            _V3
            + encode_integer(serial)
            + self._issuer
            + element(SEQUENCE, encode_time(not_before) + encode_time(not_after))
            + subject
            + spki
            + element(0xA3, element(SEQUENCE, extensions)),
        )


def common_name(text: str) -> bytes:
    """A Name with a common name alone."""
    value = element(_UTF8_STRING, text.encode("ascii"))
    return element(SEQUENCE, element(_SET, element(SEQUENCE, _COMMON_NAME + value)))


def basic_constraints_ca(path_length: int | None) -> bytes:
    """The value of BasicConstraints of a CA; no limit when `path_length` is None."""
    limit = b"" if path_length is None else encode_integer(path_length)
    return element(SEQUENCE, BOOLEAN_TRUE + limit)


def name_constraints(trust_domain: TrustDomain) -> bytes:
    """The value of NameConstraints that permits URIs of one trust domain and no other URI.

    A URI constraint without a leading dot matches exactly that host (RFC 5280 section 4.2.1.10).
    """
    base = element(_URI, trust_domain.name.encode("ascii"))
    return element(SEQUENCE, element(0xA0, element(SEQUENCE, base)))


def encode_authority_tbs(
    *,
    serial: int,
    signature_algorithm: bytes,
    issuer_name: bytes,
    authority_key_id: bytes,
    subject: bytes,
    not_before: datetime,
    not_after: datetime,
    spki: bytes,
    trust_domain: TrustDomain,
    path_length: int | None,
) -> bytes:
    """The TBSCertificate of a CA of a trust domain: root or intermediate.

    It names the trust domain's own SPIFFE ID (X-5) and is limited to it by critical name
    constraints.
    """
    extensions = (
        encode_extension(
            ExtensionOID.BASIC_CONSTRAINTS, basic_constraints_ca(path_length), critical=True
        )
        + _KEY_USAGE_CA
        + _KEY_ID_PREFIX
        + subject_key_id(spki)
        + authority_key_id_extension(authority_key_id)
        + encode_extension(
            ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
            element(SEQUENCE, element(_URI, str(trust_domain.id).encode("ascii"))),
            critical=False,
        )
        + encode_extension(
            ExtensionOID.NAME_CONSTRAINTS, name_constraints(trust_domain), critical=True
        )
    )
    return element(
        SEQUENCE,
        _V3
        + encode_integer(serial)
        + signature_algorithm
        + issuer_name
        + element(SEQUENCE, encode_time(not_before) + encode_time(not_after))
        + subject
        + spki
        + element(0xA3, element(SEQUENCE, extensions)),
    )
