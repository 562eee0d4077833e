"""SPIFFE IDs, strictly: py-spiffe's types, built only from canonical strings.

- py-spiffe lower-cases the scheme and the trust domain it is given and lets a trailing newline
  pass; a name in a certificate must be canonical to begin with (SPIFFE-ID section 2), so here a
  string that is not equal to its own parse is refused.
- `server_name` is the hash-of-ID DNS SAN that every X.509-SVID of the broker carries: through it
  any DNS-only TLS client pins one exact SPIFFE ID.
"""

from __future__ import annotations

import base64
import hashlib
import re

from spiffe import SpiffeId, TrustDomain
from spiffe.errors import PySpiffeError

from identity_client.errors import SettingsInvalid

__all__ = ["broker_id", "parse_spiffe_id", "parse_trust_domain", "server_name"]

_MAX_BYTES = 2048
_CANONICAL = re.compile(r"spiffe://[a-z0-9._-]{1,255}(/[A-Za-z0-9._-]+)*")
_DNS_NAME = re.compile(
    r"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)*(?![0-9]+\Z)[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?",
    re.ASCII,
)
_MAX_DNS_NAME = 253


def parse_spiffe_id(text: str | SpiffeId) -> SpiffeId:
    """The SPIFFE ID that `text` is the canonical form of.

    Raises:
        SettingsInvalid: reason SPIFFE_ID_INVALID (SPIFFE-ID sections 2.1 to 2.4).
    """
    if isinstance(text, SpiffeId):
        text = str(text)
    problem = "it must look like spiffe://trust-domain/path in canonical form"
    if len(text) <= _MAX_BYTES and _CANONICAL.fullmatch(text):
        try:
            return SpiffeId(text)
        except PySpiffeError:
            problem = "its path cannot contain dot segments"
    raise SettingsInvalid(
        f'"{text[:100]!s}" is not a SPIFFE ID: {problem}',
        reason="SPIFFE_ID_INVALID",
        hint='a SPIFFE ID looks like "spiffe://example.org/payments/api"',
    )


def parse_trust_domain(text: str | TrustDomain) -> TrustDomain:
    """The trust domain that `text` names, as "example.org" or "spiffe://example.org".

    Raises:
        SettingsInvalid: reason TRUST_DOMAIN_INVALID.
    """
    name = str(text).removeprefix("spiffe://")
    if not re.fullmatch(r"[a-z0-9._-]{1,255}", name):
        raise SettingsInvalid(
            f'"{name[:100]}" is not a trust domain: '
            "only lower-case letters, digits, dots, dashes and underscores",
            reason="TRUST_DOMAIN_INVALID",
            hint='a trust domain looks like "example.org"',
        )
    return TrustDomain(name)


def broker_id(trust_domain: TrustDomain) -> SpiffeId:
    """The broker's own SPIFFE ID."""
    return SpiffeId(f"spiffe://{trust_domain.name}/idb/broker")


def server_name(spiffe_id: SpiffeId) -> str:
    """The DNS SAN that stands for `spiffe_id` in its X.509-SVIDs.

    Raises:
        SettingsInvalid: the trust domain is not a DNS name, so no such SAN exists.
    """
    trust_domain = spiffe_id.trust_domain.name
    digest = base64.b32encode(hashlib.sha256(str(spiffe_id).encode()).digest())
    name = f"{digest.decode().lower().rstrip('=')}.svid.{trust_domain}"
    if len(name) > _MAX_DNS_NAME or not _DNS_NAME.fullmatch(trust_domain):
        raise SettingsInvalid(
            f'the trust domain "{trust_domain}" is not a (short enough) DNS name, '
            "so gRPC cannot pin its SPIFFE IDs",
            reason="TRUST_DOMAIN_NOT_DNS",
        )
    return name
