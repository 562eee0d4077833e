"""To-be-signed bytes read back and held against profile, issuer and SPIFFE, before any key.

- Reads with its own walk and its own literals: it shares no constant with `template`, so one
  mistake there cannot hide itself here.
- Everything not named is refused: a stray extension, a second URI, bytes at the end.
- The message names the clause of the SPIFFE conformance checklist (X-1 … X-10) or the field.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Final

from identity_ca.der import DerError
from identity_ca.errors import LintFailed
from identity_ca.keys import KeyAlgorithm
from identity_ca.profile import X509Profile
from identity_ca.spiffe_id import SpiffeId

__all__ = ["BACKDATE", "Expectations", "IssuerFacts", "lint_tbs"]

BACKDATE: Final = timedelta(seconds=10)
"""How far before now a certificate begins, for verifiers whose clock is behind."""

_KEY_USAGE: Final = bytes.fromhex("551d0f")
_BASIC_CONSTRAINTS: Final = bytes.fromhex("551d13")
_SAN: Final = bytes.fromhex("551d11")
_SUBJECT_KEY_ID: Final = bytes.fromhex("551d0e")
_AUTHORITY_KEY_ID: Final = bytes.fromhex("551d23")
_EXTENDED_KEY_USAGE: Final = bytes.fromhex("551d25")
_NAME_CONSTRAINTS: Final = bytes.fromhex("551d1e")
_CRL_DISTRIBUTION_POINTS: Final = bytes.fromhex("551d1f")
_AUTHORITY_INFO_ACCESS: Final = bytes.fromhex("2b06010505070101")

_LEAF_EXTENSIONS: Final = frozenset(
    {
        _KEY_USAGE,
        _BASIC_CONSTRAINTS,
        _SAN,
        _SUBJECT_KEY_ID,
        _AUTHORITY_KEY_ID,
        _EXTENDED_KEY_USAGE,
    }
)
_POINTING_LEAF_EXTENSIONS: Final = _LEAF_EXTENSIONS | {
    _CRL_DISTRIBUTION_POINTS,
    _AUTHORITY_INFO_ACCESS,
}
_CA_EXTENSIONS: Final = frozenset(
    {
        _KEY_USAGE,
        _BASIC_CONSTRAINTS,
        _SAN,
        _SUBJECT_KEY_ID,
        _AUTHORITY_KEY_ID,
        _NAME_CONSTRAINTS,
    }
)

_DIGITAL_SIGNATURE: Final = (True, bytes.fromhex("03020780"))
_CERT_AND_CRL_SIGN: Final = (True, bytes.fromhex("03020106"))
_NOT_CA: Final = (True, bytes.fromhex("3000"))
_SERVER_AND_CLIENT: Final = (
    False,
    bytes.fromhex("301406082b0601050507030106082b06010505070302"),
)
_EMPTY_SUBJECT: Final = bytes.fromhex("3000")
_COMMON_NAME: Final = bytes.fromhex("0603550403")
_OCSP: Final = bytes.fromhex("06082b06010505073001")

_RSA_KEY: Final = bytes.fromhex("300d06092a864886f70d0101010500")
_KEY_ALGORITHMS: Final = {
    bytes.fromhex("301306072a8648ce3d020106082a8648ce3d030107"): KeyAlgorithm.EC_P256,
    bytes.fromhex("301006072a8648ce3d020106052b81040022"): KeyAlgorithm.EC_P384,
    bytes.fromhex("300506032b6570"): KeyAlgorithm.ED25519,
}
_RSA_BY_OCTETS: Final = {
    256: KeyAlgorithm.RSA_2048,
    384: KeyAlgorithm.RSA_3072,
    512: KeyAlgorithm.RSA_4096,
}


@dataclass(frozen=True, slots=True)
class IssuerFacts:
    """What every certificate of an issuer must agree with.

    Attributes:
        name: the issuer's subject, DER.
        key_id: the issuer's subject key identifier.
        signature_algorithm: AlgorithmIdentifier, DER.
        not_before, not_after: the issuer's own validity.
    """

    name: bytes
    key_id: bytes
    signature_algorithm: bytes
    not_before: datetime
    not_after: datetime


@dataclass(frozen=True, slots=True)
class Expectations:
    """What one certificate must say.

    Attributes:
        spki: the subject's key, DER.
        dns_names: every DNS SAN, in order.
        subject: the subject's name, DER.
        path_length: for a CA; None means no limit.
        crl_url, ocsp_url: where a leaf says that revocation is asked about; empty for nowhere.
    """

    issuer: IssuerFacts
    spiffe_id: SpiffeId
    spki: bytes
    not_before: datetime
    not_after: datetime
    dns_names: tuple[str, ...] = ()
    subject: bytes = _EMPTY_SUBJECT
    path_length: int | None = None
    crl_url: str = ""
    ocsp_url: str = ""


def lint_tbs(tbs: bytes, profile: X509Profile, expected: Expectations) -> None:
    """Returns when `tbs` is exactly a certificate of that profile that meets the expectations.

    Raises:
        LintFailed: with the first rule it breaks.
    """
    try:
        _lint(tbs, profile, expected)
    except DerError as exc:
        raise LintFailed(
            "the certificate to be signed is not DER of the expected structure", detail=str(exc)
        ) from exc


def _lint(tbs: bytes, profile: X509Profile, expected: Expectations) -> None:
    at, end = _enter(tbs, 0, len(tbs), 0x30)
    _require(end == len(tbs), "nothing may follow the certificate")
    start, stop = _enter(tbs, at, end, 0xA0)
    _require(tbs[start:stop] == b"\x02\x01\x02", "the version must be 3")
    at, stop = _enter(tbs, stop, end, 0x02)
    _require(stop - at == 20 and 0 < tbs[at] < 0x80, "the serial number must have 20 octets")
    at = stop
    issuer = expected.issuer
    start, stop = _enter(tbs, at, end, 0x30)
    _require(
        tbs[at:stop] == issuer.signature_algorithm, "the signature algorithm must be the issuer's"
    )
    at = stop
    start, stop = _enter(tbs, at, end, 0x30)
    _require(tbs[at:stop] == issuer.name, "the issuer must be the CA certificate's subject")
    start, at = _enter(tbs, stop, end, 0x30)
    _lint_validity(tbs, start, at, profile, expected)
    start, stop = _enter(tbs, at, end, 0x30)
    subject = tbs[at:stop]
    _require(subject == expected.subject, "the subject must be the profile's")
    at = stop
    start, stop = _enter(tbs, at, end, 0x30)
    _require(tbs[at:stop] == expected.spki, "the key must be the proven one")
    key_id = _lint_key(tbs, start, stop, profile)
    start, stop = _enter(tbs, stop, end, 0xA3)
    _require(stop == end, "nothing may follow the extensions")
    extensions = _extensions(tbs, start, stop)
    _require(
        extensions.get(_SUBJECT_KEY_ID) == (False, b"\x04\x14" + key_id),
        "the subject key identifier must be the key's",
    )
    _require(
        extensions.get(_AUTHORITY_KEY_ID)
        == (
            False,
            bytes((0x30, len(issuer.key_id) + 2, 0x80, len(issuer.key_id))) + issuer.key_id,
        ),
        "the authority key identifier must be the issuer's",
    )
    if profile.ca:
        _lint_authority(extensions, expected)
    else:
        _lint_leaf(extensions, subject, expected)


def _lint_validity(
    tbs: bytes, at: int, end: int, profile: X509Profile, expected: Expectations
) -> None:
    middle = _element_end(tbs, at, end)
    stop = _element_end(tbs, middle, end)
    _require(stop == end, "the validity holds two times")
    not_before = _time(tbs[at:middle])
    not_after = _time(tbs[middle:stop])
    _require(
        not_before == expected.not_before and not_after == expected.not_after,
        "the validity must be the one asked for",
    )
    _require(not_before < not_after, "the validity must not be empty")
    _require(
        expected.issuer.not_before <= not_before and not_after <= expected.issuer.not_after,
        "the validity must lie inside the issuer's",
    )
    _require(
        not_after - not_before <= profile.max_ttl + BACKDATE,
        "the validity must not be longer than the profile's",
    )


def _lint_key(tbs: bytes, start: int, end: int, profile: X509Profile) -> bytes:
    """The key identifier (RFC 7093 method 1) of a key the profile allows."""
    _, stop = _enter(tbs, start, end, 0x30)
    algorithm_id = tbs[start:stop]
    bits, stop = _enter(tbs, stop, end, 0x03)
    _require(stop == end and bits < stop and tbs[bits] == 0, "the key must be whole octets")
    algorithm = _KEY_ALGORITHMS.get(algorithm_id)
    if algorithm is None and algorithm_id == _RSA_KEY:
        inner, inner_end = _enter(tbs, bits + 1, stop, 0x30)
        modulus, modulus_end = _enter(tbs, inner, inner_end, 0x02)
        # A leading zero keeps the modulus, whose top bit is set, positive.
        if modulus_end - modulus > 1 and tbs[modulus] == 0 and tbs[modulus + 1] >= 0x80:
            algorithm = _RSA_BY_OCTETS.get(modulus_end - modulus - 1)
    _require(algorithm in profile.key_algorithms, "the key must be of a kind the profile allows")
    return hashlib.sha256(tbs[bits + 1 : stop]).digest()[:20]


def _lint_leaf(
    extensions: dict[bytes, tuple[bool, bytes]], subject: bytes, expected: Expectations
) -> None:
    _require(
        extensions.keys() == (_POINTING_LEAF_EXTENSIONS if expected.crl_url else _LEAF_EXTENSIONS),
        "the extensions must be the profile's",
    )
    if expected.crl_url:
        _lint_pointers(extensions, expected)
    _require(
        extensions[_KEY_USAGE] == _DIGITAL_SIGNATURE,
        "key usage must be critical and digitalSignature alone (X-8, X-9)",
    )
    _require(
        extensions[_EXTENDED_KEY_USAGE] == _SERVER_AND_CLIENT,
        "extended key usage must be serverAuth and clientAuth (X-10)",
    )
    _require(extensions[_BASIC_CONSTRAINTS] == _NOT_CA, "a leaf must not be a CA (X-7)")
    critical, san = extensions[_SAN]
    _require(
        critical == (subject == _EMPTY_SUBJECT),
        "the SAN must be critical where there is no subject (X-4), and only there",
    )
    uris, names = _general_names(san)
    _require(len(uris) == 1, "there must be exactly one URI SAN (X-1)")
    spiffe_id = expected.spiffe_id
    _require(uris[0] == str(spiffe_id).encode("ascii"), "the URI SAN must be the SPIFFE ID (X-1)")
    _require(spiffe_id.path != "", "the SPIFFE ID of a leaf must have a path (X-3)")
    _require(
        names == [name.encode("ascii") for name in expected.dns_names],
        "the DNS SANs must be the ones granted",
    )
    if subject != _EMPTY_SUBJECT:
        _lint_common_name(subject, names)
    own = spiffe_id.dns_san()
    reserved = f".svid.{spiffe_id.trust_domain.name}".encode("ascii")
    stand_ins = [name for name in names if name.endswith(reserved)]
    _require(
        stand_ins == ([] if own is None else [own.encode("ascii")]),
        "the one DNS SAN derived from a SPIFFE ID must be this one's",
    )


def _lint_common_name(subject: bytes, names: list[bytes]) -> None:
    at, end = _enter(subject, 0, len(subject), 0x30)
    at, stop = _enter(subject, at, end, 0x31)
    at, last = _enter(subject, at, stop, 0x30)
    value, close = _enter(subject, at + len(_COMMON_NAME), last, 0x0C)
    _require(
        end == stop == last == close == len(subject)
        and subject[at : at + len(_COMMON_NAME)] == _COMMON_NAME
        and subject[value:close] in names
        and close - value <= 64,
        "the subject of a leaf must be one of its DNS names",
    )


def _lint_pointers(extensions: dict[bytes, tuple[bool, bytes]], expected: Expectations) -> None:
    points, access = _pointers(expected.crl_url, expected.ocsp_url)
    _require(
        extensions[_CRL_DISTRIBUTION_POINTS] == (False, points),
        "the one CRL distribution point must be the list of the certificate's serial number",
    )
    _require(
        extensions[_AUTHORITY_INFO_ACCESS] == (False, access),
        "the authority information access must be the OCSP responder alone",
    )


@lru_cache(maxsize=4096)
def _pointers(crl_url: str, ocsp_url: str) -> tuple[bytes, bytes]:
    """The values of both extensions, from the inside out."""
    points = crl_url.encode("ascii")
    for tag in (0x86, 0xA0, 0xA0, 0x30, 0x30):
        points = _inside(tag, points)
    access = _OCSP + _inside(0x86, ocsp_url.encode("ascii"))
    return points, _inside(0x30, _inside(0x30, access))


def _inside(tag: int, content: bytes) -> bytes:
    size = len(content)
    if size < 0x80:
        return bytes((tag, size)) + content
    octets = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 + len(octets))) + octets + content


def _lint_authority(extensions: dict[bytes, tuple[bool, bytes]], expected: Expectations) -> None:
    _require(extensions.keys() == _CA_EXTENSIONS, "the extensions must be the profile's")
    _require(expected.subject != _EMPTY_SUBJECT, "a CA must have a subject")
    _require(
        extensions[_KEY_USAGE] == _CERT_AND_CRL_SIGN,
        "key usage of a CA must be critical, keyCertSign and cRLSign (X-8, X-9)",
    )
    limit = expected.path_length
    constraints = bytes.fromhex("0101ff") + (
        b"" if limit is None else bytes((0x02, 0x01, limit & 0x7F))
    )
    _require(
        extensions[_BASIC_CONSTRAINTS] == (True, bytes((0x30, len(constraints))) + constraints),
        "basic constraints of a CA must be critical, with its path length (X-7)",
    )
    trust_domain = expected.spiffe_id.trust_domain
    _require(expected.spiffe_id.path == "", "the SPIFFE ID of a CA must have no path (X-5)")
    uris, names = _general_names(extensions[_SAN][1])
    _require(
        uris == [f"spiffe://{trust_domain.name}".encode("ascii")] and not names,
        "the SAN of a CA must be its trust domain (X-5)",
    )
    critical, value = extensions[_NAME_CONSTRAINTS]
    at, end = _enter(value, 0, len(value), 0x30)
    at, permitted_end = _enter(value, at, end, 0xA0)
    subtree, subtree_end = _enter(value, at, permitted_end, 0x30)
    base, base_end = _enter(value, subtree, subtree_end, 0x86)
    _require(
        critical
        and end == permitted_end == subtree_end == base_end == len(value)
        and value[base:base_end] == trust_domain.name.encode("ascii"),
        "name constraints of a CA must be critical and permit its trust domain's URIs alone",
    )


def _extensions(tbs: bytes, at: int, end: int) -> dict[bytes, tuple[bool, bytes]]:
    """Every extension: OID content to (critical, value)."""
    at, stop = _enter(tbs, at, end, 0x30)
    _require(stop == end, "nothing may follow the extensions")
    found: dict[bytes, tuple[bool, bytes]] = {}
    while at < end:
        start, at = _enter(tbs, at, end, 0x30)
        oid, stop = _enter(tbs, start, at, 0x06)
        critical = tbs[stop : stop + 3] == b"\x01\x01\xff"
        value, value_end = _enter(tbs, stop + 3 if critical else stop, at, 0x04)
        _require(value_end == at, "nothing may follow an extension's value")
        name = tbs[oid:stop]
        _require(name not in found, "an extension must not appear twice")
        found[name] = (critical, tbs[value:value_end])
    return found


def _general_names(san: bytes) -> tuple[list[bytes], list[bytes]]:
    """The URIs and DNS names of a SAN; any other kind of name is refused."""
    at, end = _enter(san, 0, len(san), 0x30)
    _require(end == len(san), "nothing may follow the SAN")
    uris: list[bytes] = []
    names: list[bytes] = []
    while at < end:
        tag = san[at]
        _require(tag in (0x82, 0x86), "a SAN holds URI and DNS names alone")
        start, at = _enter(san, at, end, tag)
        (uris if tag == 0x86 else names).append(san[start:at])
    return uris, names


def _enter(data: bytes, at: int, end: int, tag: int) -> tuple[int, int]:
    """Where the content of the element at `at` begins and ends; it must lie before `end`.

    A function over positions, not `der.Reader`: lint runs on every issue, and objects cost.
    """
    if at + 2 > end or data[at] != tag:
        raise DerError(f"tag {tag:#04x} expected at offset {at}")
    length = data[at + 1]
    start = at + 2
    if length >= 0x80:
        size = length - 0x80
        if not 1 <= size <= 3 or start + size > end:
            raise DerError(f"length at offset {at} is not DER")
        length = int.from_bytes(data[start : start + size], "big")
        if length < 0x80 or length >> (8 * (size - 1)) == 0:
            raise DerError(f"length at offset {at} is not DER")
        start += size
    stop = start + length
    if stop > end:
        raise DerError(f"the element at offset {at} is cut short")
    return start, stop


def _element_end(data: bytes, at: int, end: int) -> int:
    if at >= end:
        raise DerError(f"an element is missing at offset {at}")
    return _enter(data, at, end, data[at])[1]


@lru_cache(maxsize=256)
def _time(encoded: bytes) -> datetime:
    """A Time in the one form RFC 5280 allows for its year."""
    if len(encoded) == 15 and encoded[:2] == b"\x17\x0d":
        digits = (b"19" if encoded[2:3] >= b"5" else b"20") + encoded[2:14]
    elif len(encoded) == 17 and encoded[:2] == b"\x18\x0f" and encoded[2:6] >= b"2050":
        digits = encoded[2:16]
    else:
        raise DerError("a time is neither UTCTime nor GeneralizedTime of its year")
    if encoded[-1:] != b"Z" or not digits.isdigit():
        raise DerError("a time is not in UTC to the second")
    try:
        return datetime(
            int(digits[:4]),
            int(digits[4:6]),
            int(digits[6:8]),
            int(digits[8:10]),
            int(digits[10:12]),
            int(digits[12:14]),
            tzinfo=UTC,
        )
    except ValueError as exc:
        raise DerError("a time does not exist") from exc


def _require(holds: bool, rule: str) -> None:  # noqa: FBT001 - reads as a sentence
    if not holds:
        raise LintFailed(f"the certificate to be signed breaks a rule: {rule}")
