"""Strict SPIFFE IDs and trust domain names (SPIFFE-ID.md).

- An instance is valid: the constructors check, so no other module has to.
- Nothing is normalised. Upper case in the scheme or the trust domain is refused, not lowered
  (section 2.4 would allow both; one spelling per identity is what keeps policies honest).
- Trust domains that look like an IP address or a DNS name get no special treatment (ID-4);
  only `dns_san`, an addition of ours, asks whether the name can be part of a DNS name.
- Messages name the rule by the clause of the SPIFFE conformance checklist and echo no input.
"""

from __future__ import annotations

import hashlib
import re
from base64 import b32encode
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from identity_ca.errors import SpiffeIdError

__all__ = ["MAX_ID_BYTES", "MAX_TRUST_DOMAIN_BYTES", "SpiffeId", "TrustDomain", "is_host_name"]

MAX_ID_BYTES: Final = 2048
"""Longest SPIFFE ID accepted or made, in bytes (SPIFFE-ID section 2.3)."""

MAX_TRUST_DOMAIN_BYTES: Final = 255
"""Longest trust domain name, in bytes (SPIFFE-ID section 2.3)."""

_SCHEME: Final = "spiffe://"
_TRUST_DOMAIN: Final = re.compile(r"[a-z0-9._-]{1,255}", re.ASCII)
_SEGMENT: Final = re.compile(r"[A-Za-z0-9._-]+", re.ASCII)
# One pass over the whole path: no empty, "." or ".." segment, no trailing slash.
_PATH: Final = re.compile(r"(?:/(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._-]+)+", re.ASCII)
_DNS_NAME: Final = re.compile(
    r"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)*(?![0-9]+\Z)[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?",
    re.ASCII,
)
_MAX_DNS_NAME: Final = 253
_HINT: Final = 'a SPIFFE ID looks like "spiffe://example.org/payments/api"'
_TRUST_DOMAIN_HINT: Final = 'a trust domain name looks like "example.org"'


@dataclass(frozen=True, slots=True, order=True)
class TrustDomain:
    """The name of a trust domain, e.g. `example.org`.

    Raises:
        SpiffeIdError: the name is empty, longer than 255 bytes, or holds a character other than
            `a-z 0-9 . - _` (SPIFFE-ID section 2.1; ID-1, ID-2, ID-3, ID-6).
    """

    name: str

    def __post_init__(self) -> None:
        if _TRUST_DOMAIN.fullmatch(self.name) is None:
            raise _explain_trust_domain(self.name)

    @classmethod
    def parse(cls, text: str) -> TrustDomain:
        """From a name, or from a SPIFFE ID without a path: `example.org`, `spiffe://example.org`.

        Raises:
            SpiffeIdError: neither of the two.
        """
        return cls(text.removeprefix(_SCHEME))

    @property
    def id(self) -> SpiffeId:
        """The trust domain's own SPIFFE ID, which has no path (ID-8)."""
        return SpiffeId(self)

    @property
    def is_dns_name(self) -> bool:
        """Whether the name is also a host name."""
        return is_host_name(self.name)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True, order=True)
class SpiffeId:
    """A SPIFFE ID: trust domain and path. `path` is empty or begins with a slash.

    Raises:
        SpiffeIdError: the path breaks ID-5, or the whole is longer than 2,048 bytes (ID-6).
    """

    trust_domain: TrustDomain
    path: str = ""

    def __post_init__(self) -> None:
        path = self.path
        if path and _PATH.fullmatch(path) is None:
            raise _explain_path(path)
        if len(_SCHEME) + len(self.trust_domain.name) + len(path) > MAX_ID_BYTES:
            raise SpiffeIdError(
                f"a SPIFFE ID may be at most {MAX_ID_BYTES} bytes long (ID-6)", hint=_HINT
            )

    @classmethod
    def parse(cls, text: str) -> SpiffeId:
        """From its text.

        Raises:
            SpiffeIdError: with a message that names the clause (ID-1 … ID-6).
        """
        # Characters, not bytes: what is not ASCII is refused below whatever its length.
        if len(text) > MAX_ID_BYTES:
            raise SpiffeIdError(
                f"a SPIFFE ID may be at most {MAX_ID_BYTES} bytes long (ID-6)", hint=_HINT
            )
        if not text.startswith(_SCHEME):
            raise SpiffeIdError(
                'a SPIFFE ID begins with "spiffe://", in lower case (ID-1)', hint=_HINT
            )
        slash = text.find("/", len(_SCHEME))
        if slash < 0:
            return cls(TrustDomain(text[len(_SCHEME) :]))
        return cls(TrustDomain(text[len(_SCHEME) : slash]), text[slash:])

    @classmethod
    def from_segments(cls, trust_domain: TrustDomain, *segments: str) -> SpiffeId:
        """From path segments, none of which may smuggle in a slash.

        Raises:
            SpiffeIdError: a segment is empty, `.`, `..` or holds a character outside ID-5.
        """
        for segment in segments:
            if _SEGMENT.fullmatch(segment) is None or segment in (".", ".."):
                raise SpiffeIdError(
                    'a path segment is one or more of "a-z A-Z 0-9 . - _", and not "." or ".."'
                    " (ID-5)",
                    hint=_HINT,
                )
        return cls(trust_domain, "".join(f"/{segment}" for segment in segments))

    def member_of(self, trust_domain: TrustDomain) -> bool:
        """Whether this identity belongs to that trust domain."""
        return self.trust_domain == trust_domain

    def dns_san(self) -> str | None:
        """The DNS name that stands for exactly this SPIFFE ID, for clients that match DNS only.

        `<base32(sha256(id))>.svid.<trust domain>`, lower case, unpadded; None where the trust
        domain is not a DNS name or leaves no room for the prefix.
        """
        return _dns_san(self)

    def __str__(self) -> str:
        return f"{_SCHEME}{self.trust_domain.name}{self.path}"


def is_host_name(name: str) -> bool:
    """Whether `name` can stand as a DNS SAN: lower case, letters, digits and hyphens, no wildcard.

    At most 253 characters; the last label is not a number, so that no IPv4 address passes
    (RFC 1123 section 2.1).
    """
    return len(name) <= _MAX_DNS_NAME and _DNS_NAME.fullmatch(name) is not None


# Asked for twice on every issue (template and lint), and again at every renewal.
@lru_cache(maxsize=4096)
def _dns_san(spiffe_id: SpiffeId) -> str | None:
    trust_domain = spiffe_id.trust_domain
    if not trust_domain.is_dns_name:
        return None
    digest = hashlib.sha256(str(spiffe_id).encode("ascii")).digest()
    label = b32encode(digest).decode("ascii").rstrip("=").lower()
    name = f"{label}.svid.{trust_domain.name}"
    return name if len(name) <= _MAX_DNS_NAME else None


def _explain_trust_domain(name: str) -> SpiffeIdError:
    if not name:
        sentence = "the trust domain is empty (ID-1, ID-2)"
    elif len(name) > MAX_TRUST_DOMAIN_BYTES:
        sentence = f"a trust domain may be at most {MAX_TRUST_DOMAIN_BYTES} bytes long (ID-6)"
    elif "@" in name:
        sentence = "a trust domain has no user information (ID-2)"
    elif ":" in name:
        sentence = "a trust domain has no port (ID-2)"
    elif "?" in name or "#" in name:
        sentence = "a SPIFFE ID has no query and no fragment (ID-1)"
    elif "%" in name:
        sentence = "a trust domain is not percent-encoded (ID-3)"
    elif "/" in name:
        sentence = "a trust domain has no path"
    elif name != name.lower():
        sentence = "a trust domain is lower case (ID-3, ID-7)"
    else:
        sentence = 'a trust domain holds only "a-z 0-9 . - _" (ID-3)'
    return SpiffeIdError(sentence, hint=_TRUST_DOMAIN_HINT)


def _explain_path(path: str) -> SpiffeIdError:
    segments = path.split("/")
    if "?" in path or "#" in path:
        sentence = "a SPIFFE ID has no query and no fragment (ID-1)"
    elif not path.startswith("/"):
        sentence = "a path begins with a slash (ID-5)"
    elif "%" in path:
        sentence = "a path is not percent-encoded (ID-5)"
    elif path.endswith("/"):
        sentence = "a path has no trailing slash (ID-5)"
    elif "" in segments[1:]:
        sentence = "a path has no empty segment (ID-5)"
    elif "." in segments or ".." in segments:
        sentence = 'a path has no segment "." or ".." (ID-5)'
    else:
        sentence = 'a path segment holds only "a-z A-Z 0-9 . - _" (ID-5)'
    return SpiffeIdError(sentence, hint=_HINT)
