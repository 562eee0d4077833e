"""Where verifiers ask whether a certificate was revoked: the names of lists and responder.

- The same names in certificates, in lists and at the server: all of them are made here.
- An authority's certificates are divided among so many lists by serial number (`shard_of`). The
  name of a part says of how many it is one: lists that certificates name stay what they were when
  the number is changed.
- Values only: what is written is encoded once for each part, not for each certificate.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Self

from cryptography.x509.oid import AuthorityInformationAccessOID, ExtensionOID

from identity_ca.der import SEQUENCE, element, encode_oid
from identity_ca.errors import ProfileViolation
from identity_ca.template import encode_extension

__all__ = ["MOST_SHARDS", "DistributionPoints", "Shard", "shard_of"]

MOST_SHARDS: Final = 1024
"""Into how many parts the certificates of an authority may be divided."""

_LONGEST_URL: Final = 512
_URI: Final = 0x86
_NAME: Final = re.compile(r"(0|[1-9][0-9]{0,3})-of-([1-9][0-9]{0,3})", re.ASCII)
_OCSP: Final = encode_oid(AuthorityInformationAccessOID.OCSP.dotted_string)
_USER_CERTIFICATES_ONLY: Final = b"\x81\x01\xff"


def shard_of(serial: int, shards: int) -> int:
    """In which of `shards` lists a certificate with that serial number would stand.

    A public rule: whoever has the list's name and the certificate can check it.
    """
    return serial % shards


@dataclass(frozen=True, slots=True)
class Shard:
    """One of the parts that an authority's certificates are divided into; "5-of-64" as text.

    Raises:
        ProfileViolation: there is no such part.
    """

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.of <= MOST_SHARDS or not 0 <= self.number < self.of:
            raise ProfileViolation("there is no such part of a revocation list")

    @classmethod
    def parse(cls, name: str) -> Self:
        """The part of that name.

        Raises:
            ProfileViolation: it is no part's name.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            raise ProfileViolation(
                "there is no such part of a revocation list", hint='parts are named like "5-of-64"'
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}-of-{self.of}"


@dataclass(frozen=True, slots=True)
class DistributionPoints:
    """The names below one base.

    Attributes:
        base_url: scheme, host and port, without a slash at the end.
        shards: into how many lists the certificates of an authority are divided.

    Raises:
        ProfileViolation: the base cannot stand in a certificate, or there are too many parts.
    """

    base_url: str
    shards: int

    def __post_init__(self) -> None:
        if not self.base_url.isascii() or not 0 < len(self.base_url) <= _LONGEST_URL:
            raise ProfileViolation(
                f"a distribution point is a URL of at most {_LONGEST_URL} ASCII characters"
            )
        if not 1 <= self.shards <= MOST_SHARDS:
            raise ProfileViolation(f"there are 1 to {MOST_SHARDS} parts of a revocation list")

    @property
    def ocsp_url(self) -> str:
        """Of the OCSP responder, the same for every authority."""
        return f"{self.base_url}/ocsp"

    def full_url(self, authority_id: str) -> str:
        """Of the list of everything that an authority revoked."""
        return f"{self.base_url}/crl/{authority_id}.crl"

    def delta_url(self, authority_id: str) -> str:
        """Of what changed since a full list."""
        return f"{self.base_url}/crl/{authority_id}/delta.crl"

    def shard_url(self, authority_id: str, shard: Shard) -> str:
        """Of one part."""
        return f"{self.base_url}/crl/{authority_id}/{shard}.crl"

    def shard_urls(self, authority_id: str) -> tuple[str, ...]:
        """Of every part, in order."""
        return tuple(
            self.shard_url(authority_id, Shard(number, self.shards))
            for number in range(self.shards)
        )


def leaf_extensions(crl_url: str, ocsp_url: str) -> bytes:
    """CRLDistributionPoints, then AuthorityInfoAccess (RFC 5280 sections 4.2.1.13 and 4.2.2.1)."""
    access = element(SEQUENCE, _OCSP + _uri(ocsp_url))
    return encode_extension(
        ExtensionOID.CRL_DISTRIBUTION_POINTS, _points(crl_url), critical=False
    ) + encode_extension(
        ExtensionOID.AUTHORITY_INFORMATION_ACCESS, element(SEQUENCE, access), critical=False
    )


def freshest_crl_extension(delta_url: str) -> bytes:
    """FreshestCRL of a full list: where its delta is (RFC 5280 section 5.2.6)."""
    return encode_extension(ExtensionOID.FRESHEST_CRL, _points(delta_url), critical=False)


def issuing_distribution_point_extension(url: str) -> bytes:
    """IssuingDistributionPoint of one part of an authority's leaves (RFC 5280 section 5.2.5)."""
    return encode_extension(
        ExtensionOID.ISSUING_DISTRIBUTION_POINT,
        element(SEQUENCE, _point_name(url) + _USER_CERTIFICATES_ONLY),
        critical=True,
    )


def _points(url: str) -> bytes:
    return element(SEQUENCE, element(SEQUENCE, _point_name(url)))


def _point_name(url: str) -> bytes:
    return element(0xA0, element(0xA0, _uri(url)))


def _uri(url: str) -> bytes:
    return element(_URI, url.encode("ascii"))
